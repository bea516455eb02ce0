"""Making a fused adapter, and refilling it in place: check -> plan -> merge -> grow -> write.

Both methods end in the same functions, so that the first sample and the thousandth are merged alike. Everything that
can be wrong is found in the plan, before the first write; what fails all the same is undone.
"""
import math
import torch
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from peft.tuners.lora import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from typing import Any, Dict, Iterator, List, Literal, Mapping, Optional, Sequence, Tuple

from .adapters import Adapters
from .growth import describe, grow
from .lora_index import Factors, LoraIndex, adapter_containers, factors, padded, rescaled
from .merging import COMBINATION_TYPES, MergeOptions, reference_scaling
from .messages import shown
from .plan import Plan, check_new_name, check_options, check_sources, check_target, plan_merge


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
    if isinstance(adapter_name, str) and adapter_name in self.peft_config:
        return
    check_new_name(adapter_name)
    adapters, weights = check_sources(adapters, weights)
    options = check_options(
        MergeOptions(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density,
                     majority_sign_method))
    loaded = Adapters.of(self)
    # What undoes it comes last, so that it runs before an adapter goes back to where it was offloaded.
    with plain_tensors(loaded), on_device(loaded, adapters), ExitStack() as undo:
        plan = plan_merge(loaded, adapters, weights, options)
        for parameter in self.model.parameters():
            # PEFT freezes and unfreezes adapters when it adds or removes one.
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        self.peft_config[adapter_name] = plan.config
        undo.callback(setattr, self, 'targeted_module_names', list(self.targeted_module_names))
        undo.callback(self.peft_config.pop, adapter_name)
        undo.callback(remove_adapter, self.model, adapter_name)
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
        loaded.remember(adapter_name, options, plan.config, _fresh_layers(plan, merged))
        undo.pop_all()


def swift_add_weighted_adapter(
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
    if isinstance(adapter_name, str) and adapter_name in self.adapters:
        self.set_active_adapters(adapter_name)
        return
    with ExitStack() as undo:
        new_swift_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type=combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method)
        undo.callback(remove_adapter, self.model, adapter_name)
        undo.callback(self.adapters.pop, adapter_name)
        self.set_active_adapters(adapter_name)
        undo.pop_all()


swift_add_weighted_adapter.__doc__ = (add_weighted_adapter.__doc__
                                      or '').replace("Like PEFT's `LoraModel.add_weighted_adapter`, with",
                                                     'It becomes the only active adapter. Like stock, with')


def new_swift_adapter(model: Any, adapters: List[str], weights: List[float], adapter_name: str, **options: Any) -> None:
    """Adds a fused adapter to a `SwiftModel` and leaves the active adapters as they are.

    Args:
        model: The `SwiftModel`, which has no adapter of that name.
        adapters: See `add_weighted_adapter`.
        weights: See `add_weighted_adapter`.
        adapter_name: See `add_weighted_adapter`.
        **options: The other arguments of `add_weighted_adapter`.
    """
    # PEFT alone shall not need ms-swift.
    from swift.tuners.lora_layers import LoraModel, lora_state_dict, mark_lora_as_trainable
    from swift.tuners.utils import SwiftOutput

    loaded = Adapters.of(model)
    lora_model = LoraModel(model.model, None, '')
    lora_model.peft_config = dict(loaded.configs)
    lora_model.targeted_module_names = [name for name, _ in loaded.layers()]
    lora_model.active_adapter = {name for name in model.active_adapters if isinstance(loaded.configs[name], LoraConfig)}
    lora_model.add_weighted_adapter(adapters, weights, adapter_name, **options)
    config = lora_model.peft_config[adapter_name]
    config.has_additional_modules = True
    model.adapters[adapter_name] = SwiftOutput(
        config=config,
        state_dict_callback=partial(lora_state_dict, bias=config.bias),
        mark_trainable_callback=partial(mark_lora_as_trainable, adapter_name=adapter_name, bias=config.bias))


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
            type, with its options, that the adapter was made or last filled with; options that are given besides,
            and are not their defaults, replace those.
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
    options = check_options(
        MergeOptions(MergeOptions.combination_type if combination_type is None else combination_type, svd_rank,
                     svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method))
    if combination_type is None:
        changed = [item.name for item in fields(options) if getattr(options, item.name) != item.default]
        options = replace(record.options, **{name: getattr(options, name) for name in changed})
    # What undoes it comes last, so that it runs before an adapter goes back to where it was offloaded.
    with plain_tensors(loaded), on_device(loaded, (*adapters, adapter_name)), ExitStack() as undo:
        plan = plan_merge(loaded, adapters, weights, options)
        check_target(loaded, plan, adapters, adapter_name)
        merged = _merge(plan)
        layers = _fresh_layers(plan, merged)
        rank = max(rank for rank, _ in layers.values())
        grow(loaded, adapter_name, rank, {item.name: item.like for item in plan.layers}, undo)
        _write(loaded, adapter_name, merged, undo)
        loaded.remember(adapter_name, options, plan.config, layers)
        undo.pop_all()


def reserve_weighted_adapter(adapters: Adapters, name: str, rank: int, sources: Sequence[str]) -> None:
    """Makes a fused adapter large enough for what is to come. What it computes stays the same.

    Args:
        adapters: The adapters of the model.
        name: The fused adapter.
        rank: The rank that it shall have at least.
        sources: The adapters whose layers it shall have.
    """
    likes: Dict[str, str] = {}
    for source in sources:
        likes.update((layer_name, source) for layer_name, layer in adapters.layers() if factors(layer, source))
    with plain_tensors(adapters), on_device(adapters, [name]), ExitStack() as undo:
        grow(adapters, name, rank, likes, undo)
        undo.pop_all()


@contextmanager
def plain_tensors(adapters: Adapters) -> Iterator[None]:
    """Within it, new tensors have the dtype that is asked for, need no gradient, and can be written to later."""
    # Not of all parameters, which are as many as there are adapters. A model is on the CPU, on one kind of accelerator,
    # or on both.
    layers = [layer for _, layer in adapters.layers()]
    devices = {'cpu', *(next(layer.parameters()).device.type for layer in (layers[:1] + layers[-1:]))} - {'meta'}
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        # Parameters that were made in inference mode could not be written to outside of it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
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
        try:
            merged[item.name] = scaling, merge(item.sources, plan.options, plan.rank, item.is_transposed)
        except torch.linalg.LinAlgError as e:
            weights = [source.weight for source in item.sources]
            raise ValueError(f'combination_type {plan.combination_type!r} cannot decompose layer {item.name!r} with '
                             f'weights {shown(weights)}: they are expected to be small enough for the sum to be '
                             f'finite, and so are the adapters ({e}).') from e
    return merged


def _fresh_layers(plan: Plan, merged: Mapping[str, Tuple[float, Factors]]) -> Dict[str, Tuple[int, float]]:
    """Returns the rank and the scaling that a new adapter would have in each layer."""
    is_same = COMBINATION_TYPES[plan.combination_type].rank == 'same'
    return {name: (new.A.shape[0] if is_same else plan.rank, scaling) for name, (scaling, new) in merged.items()}


def _write(adapters: Adapters, adapter_name: str, merged: Mapping[str, Tuple[float, Factors]], undo: ExitStack) -> None:
    """Writes `merged` into `adapter_name`, and zeros into its other layers."""
    writes: List[Tuple[Tensor, Optional[Tensor]]] = []
    for name, layer in adapters.layers():
        slot = factors(layer, adapter_name)
        if slot is None:
            continue
        if name in merged:
            scaling, new = merged[name]
            # The layer multiplies by its own scaling, a constant of compiled graphs: what differs goes into A and B.
            new = rescaled(new, scaling / layer.scaling[adapter_name])
            writes.extend(zip(slot, padded(layer, new, slot)))
        else:
            writes.extend((parameter, None) for parameter in slot)
        if layer.lora_bias.get(adapter_name):
            # It has one where the first source has, and it is never merged.
            writes.append((layer.lora_B[adapter_name].bias, None))
    with torch.inference_mode(any(parameter.is_inference() for parameter, _ in writes)), torch.no_grad():
        for parameter, value in writes:
            undo.callback(parameter.data.copy_, parameter.clone())
            if value is None:
                parameter.zero_()
            else:
                parameter.copy_(value)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes a new adapter, or what there is of it, out of the layers of a model."""
    index = LoraIndex.of(model)
    for _, layer in index.layers():
        for container in adapter_containers(layer).values():
            if adapter_name in container:
                del container[adapter_name]
        for states in getattr(layer, '_thread_inf', {}).values():
            states.pop(adapter_name, None)
    for _, wrapper in index.of_type(ModulesToSaveWrapper):
        if adapter_name in wrapper.modules_to_save:
            del wrapper.modules_to_save[adapter_name]
        wrapper._adapters.discard(adapter_name)


@contextmanager
def on_device(adapters: Adapters, names: Sequence[str]) -> Iterator[None]:
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
