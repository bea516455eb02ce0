"""Making a fused adapter, and refilling it in place: check -> plan -> merge -> grow -> write.

Both methods end in the same functions, so that the first sample and the thousandth are merged alike. Everything that
can be wrong is found in the plan, before the first write; what fails all the same is undone.
"""
import math
import torch
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from typing import Any, Dict, Iterator, List, Literal, Mapping, Optional, Sequence, Tuple

from .adapters import Adapters
from .growth import describe, grow
from .lora_index import Factors, LoraIndex, factors, padded
from .merging import COMBINATION_TYPES, MergeOptions, reference_scaling
from .plan import Plan, check_sources, check_target, plan_merge


def add_weighted_adapter(
    self: Any,
    adapters: List[str],
    weights: List[float],
    adapter_name: str,
    combination_type: str = 'svd',
    svd_rank: Optional[int] = None,
    svd_clamp: Optional[float] = None,
    svd_full_matrices: bool = True,
    svd_driver: Optional[str] = None,
    density: Optional[float] = None,
    majority_sign_method: Literal['total', 'frequency'] = 'total',
) -> None:
    """Adds a new adapter by merging the given adapters with the given weights.

    Like PEFT's `LoraModel.add_weighted_adapter`, with one more combination type, and with `svd` computed from the
    low-rank factors. The adapter can be refilled by `update_weighted_adapter` later. Does nothing where an adapter of
    that name exists.

    Args:
        adapters: Names of the adapters to merge.
        weights: A weight for each of them, of any sign.
        adapter_name: Name of the new adapter.
        combination_type: One of `linear`, `cat`, `svd`, `ties`, `ties_svd`, `dare_linear`, `dare_ties`,
            `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune`, `magnitude_prune_svd`, or `average` (the fusion of
            LoraRetriever, arXiv:2402.09997: A = Σ wⱼAⱼ, B = Σ wⱼBⱼ, the scaling kept). A single adapter is merged by
            `linear` whatever is given, except by `average`.
        svd_rank: Rank of the new adapter for the types that end in `svd`; by default the largest of the adapters'.
        svd_clamp: A quantile in [0, 1], to clamp the factors of an `svd` with.
        svd_full_matrices: Passed on to `torch.linalg.svd` where a clamp could see the difference.
        svd_driver: The cuSOLVER method for `torch.linalg.svd`, on CUDA only: `gesvd`, `gesvdj` or `gesvda`.
        density: The fraction of values to keep, for `ties*`, `dare_*` and `magnitude_prune*`.
        majority_sign_method: `total` or `frequency`, for `ties*` and `dare_ties*`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the adapters cannot be merged this way. The model is as it was.
    """
    if not isinstance(adapter_name, str):
        raise TypeError(f'adapter_name is expected to be a string, found {adapter_name!r}.')
    if adapter_name in self.peft_config:
        return
    if not adapter_name or '.' in adapter_name:
        raise ValueError(f'adapter_name is expected to have no dot in it and not to be empty, found {adapter_name!r}: '
                         'it becomes the name of a module.')
    adapters, weights = check_sources(adapters, weights)
    options = MergeOptions(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density,
                           majority_sign_method)
    loaded = Adapters.of(self)
    with _plain_tensors(), _on_device(loaded, adapters), ExitStack() as undo:
        plan = plan_merge(loaded, adapters, weights, options)
        for parameter in self.model.parameters():
            # PEFT freezes and unfreezes adapters when it adds or removes one.
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        self.peft_config[adapter_name] = plan.config
        undo.callback(_remove, self, adapter_name, list(self.targeted_module_names))
        self.inject_adapter(self.model, adapter_name)
        for name, parameter in self.model.named_parameters():
            if adapter_name in name.split('.'):
                parameter.requires_grad = False
        merged = _merge(plan)
        for item in plan.layers:
            slot = factors(item.layer, adapter_name)
            if slot is None:
                raise ValueError(f'Layer {item.name!r} is expected to take a new adapter like {item.like!r}, but did '
                                 'not: PEFT does not find it by the target modules.')
            scaling, new = merged[item.name]
            item.layer.scaling[adapter_name] = scaling
            if plan.combination_type != 'cat':
                # As PEFT: whatever the dtype of the base layer, the new adapter has that of the merge.
                for parameter, value in zip(slot, new):
                    parameter.data = parameter.data.to(value.dtype)
        describe(loaded, adapter_name, plan.config, plan.rank)
        _write(loaded, adapter_name, merged, undo)
        loaded.remember(adapter_name, options, plan.rank)
        undo.pop_all()


def update_weighted_adapter(
    self: Any,
    adapters: List[str],
    weights: List[float],
    adapter_name: str,
    combination_type: Optional[str] = None,
    svd_rank: Optional[int] = None,
    svd_clamp: Optional[float] = None,
    svd_full_matrices: bool = True,
    svd_driver: Optional[str] = None,
    density: Optional[float] = None,
    majority_sign_method: Literal['total', 'frequency'] = 'total',
) -> None:
    """Refills an adapter that `add_weighted_adapter` made, in place, with other adapters or other weights.

    Afterwards `adapter_name` computes what a new adapter made by `add_weighted_adapter` with these arguments would
    compute. Its parameters stay the same objects at the same addresses, with their dtype and device, and which
    adapters are active does not change; the cost does not depend on how many adapters there are. Only where the new
    sources need a larger rank, or layers that it lacks, does it grow, which is logged.

    Args:
        adapters: Names of the adapters to merge.
        weights: A weight for each of them, of any sign.
        adapter_name: Name of the adapter to refill.
        combination_type: One of the types of `add_weighted_adapter`: `linear`, `cat`, `svd`, `ties`, `ties_svd`,
            `dare_linear`, `dare_ties`, `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune`, `magnitude_prune_svd`,
            or `average`: A = Σ wⱼAⱼ, B = Σ wⱼBⱼ (the fusion of LoraRetriever, arXiv:2402.09997, §4.2.2, with
            wⱼ = 1/k). The sources' scaling s is kept: the delta is s · B · A. Where scalings differ, Aⱼ and Bⱼ are
            multiplied by √sⱼ first and s is 1, so that each source keeps its own delta wⱼ²sⱼBⱼAⱼ. By default the
            type, with its options, that the adapter was made or last filled with; options that are given besides
            replace those.
        svd_rank: Rank of the result for the types that end in `svd`; by default the largest of the sources' ranks.
        svd_clamp: A quantile in [0, 1], to clamp the factors of an `svd` with.
        svd_full_matrices: Passed on to `torch.linalg.svd` where a clamp could see the difference.
        svd_driver: The cuSOLVER method for `torch.linalg.svd`, on CUDA only: `gesvd`, `gesvdj` or `gesvda`.
        density: The fraction of values to keep, for `ties*`, `dare_*` and `magnitude_prune*`.
        majority_sign_method: `total` or `frequency`, for `ties*` and `dare_ties*`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `adapter_name` was not made by `add_weighted_adapter` or is merged into the base weights, or the
            adapters cannot be merged this way. The model is as it was, bit by bit.
    """
    loaded = Adapters.of(self)
    record = loaded.record(adapter_name)
    adapters, weights = check_sources(adapters, weights)
    options = MergeOptions(combination_type or record.options.combination_type, svd_rank, svd_clamp, svd_full_matrices,
                           svd_driver, density, majority_sign_method)
    if combination_type is None:
        given = {item.name: getattr(options, item.name) for item in fields(options)}
        options = replace(
            record.options,
            **{item.name: given[item.name]
               for item in fields(options) if given[item.name] != item.default})
    with _plain_tensors(), _on_device(loaded, (*adapters, adapter_name)), ExitStack() as undo:
        plan = plan_merge(loaded, adapters, weights, options)
        check_target(loaded, plan, adapters, adapter_name)
        merged = _merge(plan)
        rank = max(new.A.shape[0] for _, new in merged.values())
        grow(loaded, adapter_name, rank, {item.name: item.like for item in plan.layers}, undo)
        _write(loaded, adapter_name, merged, undo)
        loaded.remember(adapter_name, options, plan.rank)
        undo.pop_all()


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Within it, new tensors need no gradient and can be written to later, in inference mode and outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _merge(plan: Plan) -> Dict[str, Tuple[float, Factors]]:
    """Returns by layer name the fused factors and the scaling that they are for. Changes nothing."""
    merge = COMBINATION_TYPES[plan.combination_type].merge
    merged = {}
    for item in plan.layers:
        if plan.combination_type == 'average':
            scaling = reference_scaling(item.sources)
        else:
            # PEFT gives the new adapter α = r.
            scaling = math.sqrt(plan.rank) if plan.config.use_rslora else 1.0
        merged[item.name] = scaling, merge(item.sources, plan.options, plan.rank, item.is_transposed)
    return merged


def _write(adapters: Adapters, adapter_name: str, merged: Mapping[str, Tuple[float, Factors]], undo: ExitStack) -> None:
    """Writes `merged` into `adapter_name`, and zeros into its other layers."""
    writes: List[Tuple[Tensor, Optional[Tensor]]] = []
    for name, layer in adapters.layers():
        slot = factors(layer, adapter_name)
        if slot is None:
            continue
        if name in merged:
            scaling, new = merged[name]
            # The layer multiplies by its own scaling, a constant of compiled graphs: what differs goes into B.
            ratio = scaling / layer.scaling[adapter_name]
            new = padded(layer, new if ratio == 1 else Factors(new.A, new.B * ratio), slot)
            writes.extend(zip(slot, new))
        else:
            writes.extend((parameter, None) for parameter in slot)
    with torch.inference_mode(any(parameter.is_inference() for parameter, _ in writes)), torch.no_grad():
        for parameter, value in writes:
            undo.callback(parameter.data.copy_, parameter.clone())
            if value is None:
                parameter.zero_()
            else:
                parameter.copy_(value)


def _remove(model: Any, adapter_name: str, targeted_module_names: List[str]) -> None:
    """Takes a new adapter, or what there is of it, out of a `LoraModel`."""
    del model.peft_config[adapter_name]
    model.targeted_module_names[:] = targeted_module_names
    index = LoraIndex.of(model.model)
    for _, layer in index.layers():
        layer.delete_adapter(adapter_name)
    for _, wrapper in index.of_type(ModulesToSaveWrapper):
        if adapter_name in wrapper.modules_to_save:
            del wrapper.modules_to_save[adapter_name]
        wrapper._adapters.discard(adapter_name)


@contextmanager
def _on_device(adapters: Adapters, names: Sequence[str]) -> Iterator[None]:
    """Loads those of the adapters that were offloaded to the meta device, and puts them back at the end."""
    offloaded = []
    for layer_name, layer in adapters.layers():
        for name in dict.fromkeys(names):
            found = factors(layer, name)
            if found is not None and found.A.is_meta:
                if name not in layer.lora_A or not hasattr(layer.lora_A[name], 'origin_device'):
                    raise ValueError(f'Adapter {name!r} is on the meta device in layer {layer_name!r}, where it has no '
                                     'values: load it first.')
                offloaded.append((layer, name))
    if not offloaded:
        yield
        return
    # Only ms-swift offloads; PEFT alone shall not need it.
    from .activation import collect_garbage_once, move_adapters
    with collect_garbage_once(), ExitStack() as stack:
        for layer, name in offloaded:
            stack.callback(move_adapters, layer, {name}, 'meta')
            move_adapters(layer, {name}, None)
        yield
