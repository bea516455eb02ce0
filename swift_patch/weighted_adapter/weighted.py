"""Making a fused adapter, and refilling it in place: check -> plan -> merge -> grow -> write.

Both methods end in the same functions, so that the first sample and the thousandth are merged alike. Everything that
can be wrong is found in the plan, before the first write; what fails all the same is undone.
"""
import torch
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from peft.tuners.lora import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from typing import Any, Callable, Dict, Iterator, List, Literal, Optional, Sequence, Set, Tuple

from .adapters import Adapters
from .growth import describe, grow
from .lora_index import Factors, LoraIndex, adapter_containers, adapter_modules, factors, groups, padded, rescaled
from .merging import MergeOptions, pruned_at_random
from .messages import shown
from .packing import Blocks
from .plan import Batch, Plan, check_new_name, check_options, check_sources, check_target, plan_merge
from .undo import Undo


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

    Like PEFT's `LoraModel.add_weighted_adapter`, with one more combination type, and with `svd` computed from
    the low-rank factors. The adapter can be refilled by `update_weighted_adapter` later. Does nothing where an
    adapter of that name exists.

    Args:
        adapters: Names of the adapters to merge.
        weights: A weight for each of them, of any sign.
        adapter_name: Name of the new adapter.
        combination_type: One of `linear`, `cat`, `svd`, `ties`, `ties_svd`, `dare_linear`, `dare_ties`,
            `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune`, `magnitude_prune_svd`, or `average` (the fusion
            of LoraRetriever, arXiv:2402.09997: A = Σ wⱼAⱼ, B = Σ wⱼBⱼ, the scaling kept). A single adapter is
            merged by `linear` whatever is given, except by `average`.
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
    with plain_tensors(loaded), on_device(loaded, adapters) as passing, Undo() as undo:
        _pack_sources(loaded, adapters, passing, undo)
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
        plan = _pruned_at_random(loaded, plan)
        merged = {batch.names: _merge(plan, batch) for batch in plan.batches}
        loaded = Adapters.of(self)
        for batch in plan.batches:
            for name, layer in zip(batch.names, batch.layers):
                slot = factors(layer, adapter_name)
                if slot is None:
                    raise ValueError(f'Layer {name!r} is expected to take a new adapter like {batch.like!r}, but did '
                                     'not: PEFT does not find it by the target modules.')
                layer.scaling[adapter_name] = batch.scaling
                if plan.combination.rank != 'sum':
                    # As PEFT: whatever the dtype of the base layer, the new adapter has that of the merge.
                    for parameter, value in zip(slot, merged[batch.names]):
                        parameter.data = parameter.data.to(value.dtype)
        describe(loaded, adapter_name, plan.config, plan.rank)
        loaded.pack(adapter_name, undo)
        _write(loaded, adapter_name, plan, lambda batch, _: merged[batch.names], undo)
        loaded.remember(adapter_name, options, plan.config, plan.fresh)
        undo.commit()


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
    """Adds a new adapter by merging the given adapters with the given weights, and makes it the only active one.

    Like PEFT's `LoraModel.add_weighted_adapter`, with one more combination type, `average`, and with `svd` computed
    from the low-rank factors. The adapter can be refilled by `update_weighted_adapter` later. One of that name that
    exists already becomes the only active one, and nothing else is done.

    Args:
        adapters: Names of the adapters to merge.
        weights: A weight for each of them, of any sign.
        adapter_name: Name of the new adapter.
        combination_type: One of the types of `update_weighted_adapter`. A single adapter is merged by `linear`
            whatever is given, except by `average`.
        svd_rank: See `update_weighted_adapter`, like all that follow.
        svd_clamp: See `update_weighted_adapter`.
        svd_full_matrices: See `update_weighted_adapter`.
        svd_driver: See `update_weighted_adapter`.
        density: See `update_weighted_adapter`.
        majority_sign_method: See `update_weighted_adapter`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the adapters cannot be merged this way. The model is as it was.
    """
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
            `dare_linear`, `dare_ties`, `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune`,
            `magnitude_prune_svd`, or `average`: A = Σ wⱼAⱼ, B = Σ wⱼBⱼ (the fusion of LoraRetriever,
            arXiv:2402.09997, §4.2.2, with wⱼ = 1/k). The sources' scaling s is kept: the delta is s · B · A. Where
            scalings differ, Aⱼ and Bⱼ are multiplied by √sⱼ first and s is 1, so that each source keeps its own
            delta wⱼ²sⱼBⱼAⱼ. By default the type, with its options, that the adapter was made or last filled with;
            options that are given besides, and are not their defaults, replace those.
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
    with plain_tensors(loaded), on_device(loaded, (*adapters, adapter_name)) as passing, Undo() as undo:
        _pack_sources(loaded, adapters, passing, undo)
        plan = plan_merge(loaded, adapters, weights, options)
        check_target(loaded, plan, adapters, adapter_name)
        places = loaded.blocks(adapter_name).layout.places
        lacking = {name: batch.like for batch in plan.batches for name in batch.names if name not in places}
        grow(loaded, adapter_name, max(rank for rank, _ in plan.fresh.values()), lacking, undo)
        _write(loaded, adapter_name, _pruned_at_random(loaded, plan), partial(_merge, plan), undo)
        loaded.remember(adapter_name, options, plan.config, plan.fresh)
        undo.commit()


def reserve_weighted_adapter(adapters: Adapters, name: str, rank: int, sources: Sequence[str]) -> None:
    """Makes a fused adapter large enough for what is to come. What it computes stays the same.

    Args:
        adapters: The adapters of the model.
        name: The fused adapter.
        rank: The rank that it shall have at least.
        sources: The adapters whose layers it shall have.
    """
    lacking: Dict[str, str] = {}
    for source in sources:
        lacking.update(dict.fromkeys(adapters.blocks(source).layout.names, source))
    for layer_name in adapters.blocks(name).layout.names:
        lacking.pop(layer_name, None)
    with plain_tensors(adapters), on_device(adapters, [name]), ExitStack() as undo:
        grow(adapters, name, rank, lacking, undo)
        for source in sources:
            if not adapters.blocks(source).layout.is_meta:
                adapters.pack(source, undo)
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


def _pack_sources(adapters: Adapters, sources: Sequence[str], passing: Set[str], undo: ExitStack) -> None:
    """Packs those of the sources that are on their device to stay."""
    for source in sources:
        if source in adapters.configs and source not in passing:
            adapters.pack(source, undo)


def _pruned_at_random(adapters: Adapters, plan: Plan) -> Plan:
    """Returns a plan with its sources pruned, where the combination type prunes at random.

    The masks are drawn in PEFT's order: layer by layer as they come in the model, first of A for each source, then of
    B.
    """
    if not plan.combination.prunes_at_random:
        return plan
    batches = []
    # By layer, what is pruned and where that is put.
    pairs: Dict[str, Sequence[Tuple[Tensor, Tensor]]] = {}
    for batch in plan.batches:
        pruned = [
            source._replace(A=torch.empty_like(source.A), B=torch.empty_like(source.B)) for source in batch.sources
        ]
        batches.append(batch._replace(sources=pruned))
        of_all_layers = [
            zip(getattr(old, side), getattr(new, side)) for side in Factors._fields
            for old, new in zip(batch.sources, pruned)
        ]
        pairs.update(zip(batch.names, zip(*of_all_layers)))
    for name, _ in adapters.layers():
        for old, new in pairs.get(name, ()):
            new.copy_(pruned_at_random(old, plan.options))
    return replace(plan, batches=batches)


def _merge(plan: Plan, batch: Batch, out: Optional[Factors] = None) -> Factors:
    """Returns the fused factors of a batch in the plan's form, for its scaling. Changes nothing but, perhaps, `out`."""
    try:
        return plan.combination.merge(batch.sources, plan.options, plan.rank, batch.is_transposed, out)
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]  # torch exports it in no way that mypy sees
        weights = [source.weight for source in batch.sources]
        raise ValueError(f'combination_type {plan.options.combination_type!r} cannot decompose layer '
                         f'{batch.names[0]!r} with weights {shown(weights)}: they are expected to be small enough for '
                         f'the sum to be finite, and so are the adapters ({e}).') from e


def _write(adapters: Adapters, adapter_name: str, plan: Plan, merge: Callable[[Batch, Optional[Factors]], Factors],
           undo: Undo) -> None:
    """Writes what is merged into `adapter_name`, and zeros into its other layers."""
    target = adapters.blocks(adapter_name)
    layout = target.layout
    undo.reserve(adapters.index.spare, layout.nbytes, len(target.parameters), target.parameters[0].device)
    with torch.inference_mode(layout.is_inference), torch.no_grad():
        for batch in plan.batches:
            whole = _slot(target, adapter_name, batch)
            for old in whole or ():
                # Before it is merged into.
                undo.keep(old)
            new = merge(batch, whole)
            parts = [(whole, batch, new)] if whole else _fitting(target, adapter_name, batch, new)
            for slot, part, new in parts:
                # The layer multiplies by its own scaling, a constant of compiled graphs: what differs goes into A and
                # B.
                new = rescaled(new, batch.scaling / part.layers[0].scaling[adapter_name], in_place=True)
                new = padded(part.layers[0], new, slot, stacked=int(part.form == 'matrices'))
                for old, value in zip(slot, new):
                    if whole is None:
                        undo.keep(old)
                    old.copy_(value)
        unwritten = [layout.places[name] for name in layout.places.keys() - plan.fresh.keys()]
        zeros = [factor for place in unwritten for factor in target.formed(place, place + 1, 'layer')]
        # The adapter has biases where the first source has, and they are never merged.
        zeros += [layer.lora_B[adapter_name].bias for layer in layout.biased]
        for old in zeros:
            undo.keep(old)
            old.zero_()
    if not layout.is_inference:
        # Writing to several parameters in one operation counts for one of them alone.
        torch.autograd.graph.increment_version(target.parameters)


def _slot(target: Blocks, adapter_name: str, batch: Batch) -> Optional[Factors]:
    """Returns the target's factors in the layers of a batch, in its form and in the memory of the parameters.

    None where the target does not hold them together, or with several scalings; it always holds one `layer`.
    """
    layout, begin = target.layout, target.layout.places[batch.names[0]]
    end = begin + len(batch.names)
    if batch.form != 'layer':
        if layout.names[begin:end] != batch.names or not layout.is_contiguous:
            return None
        is_together = layout.blocks[begin] == layout.blocks[end - 1]
        if batch.form == 'elements':
            is_together = (is_together or layout.is_flat) and layout.shapes[begin:end] == batch.shapes
        if not is_together or len({layer.scaling[adapter_name] for layer in batch.layers}) > 1:
            return None
    return target.formed(begin, end, batch.form)


def _fitting(target: Blocks, adapter_name: str, batch: Batch, new: Factors) -> Iterator[Tuple[Factors, Batch, Factors]]:
    """Yields the factors of a batch, all or in parts, with where to put them: the target's factors, and the layers."""
    slot = _slot(target, adapter_name, batch)
    if slot is not None:
        yield slot, batch, new
        return
    for part, new_of_part in _split(batch, new):
        yield from _fitting(target, adapter_name, part, new_of_part)


def _split(batch: Batch, new: Factors) -> Iterator[Tuple[Batch, Factors]]:
    """Yields a batch and its factors in parts: elements as the matrices of layers of one kind, matrices by layer."""
    is_by_kind = batch.form == 'elements'
    keys = zip(batch.shapes, map(groups, batch.layers)) if is_by_kind else range(len(batch.layers))
    begin, offsets = 0, [0, 0]
    for count in (len(list(same)) for _, same in groupby(keys)):
        span = slice(begin, begin + count)
        A, B = batch.shapes[begin]
        part = batch._replace(
            names=batch.names[span],
            layers=batch.layers[span],
            shapes=batch.shapes[span],
            form='matrices' if is_by_kind else 'layer')
        if is_by_kind:
            sizes = count * A.numel(), count * B.numel()
            of_A, of_B = (factor.narrow(0, *place) for factor, *place in zip(new, offsets, sizes))
            yield part, Factors(of_A.reshape(count, A[0], -1), of_B.reshape(count, B[0], -1))
            offsets = [offset + size for offset, size in zip(offsets, sizes)]
        else:
            yield part, Factors(new.A[begin].reshape(-1, *A[1:]), new.B[begin].reshape(B[0], -1, *B[2:]))
        begin += count


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
def on_device(adapters: Adapters, names: Sequence[str]) -> Iterator[Set[str]]:
    """Loads those of the adapters that were offloaded to the meta device, and puts them back at the end.

    Yields:
        Their names.
    """
    passing = {name for name in names if adapters.blocks(name).layout.is_meta}
    offloaded = []
    for layer_name, layer in adapters.layers() if passing else ():
        for name in passing:
            found = factors(layer, name)
            if found is not None and found.A.is_meta:
                if name not in layer.lora_A or not hasattr(layer.lora_A[name], 'origin_device'):
                    raise ValueError(f'Adapter {name!r} is on the meta device in layer {layer_name!r}, where it has no '
                                     'values: load it first.')
                offloaded.append((layer, name))
    if not offloaded:
        yield passing
        return
    # Only ms-swift offloads; PEFT alone shall not need it.
    from .activation import collect_garbage_once, move_adapters
    with collect_garbage_once(), ExitStack() as stack:
        for layer, name in offloaded:
            holders = adapter_modules(layer)
            stack.callback(move_adapters, holders, {name}, 'meta')
            move_adapters(holders, {name}, None)
            adapters.changed(name)
        yield passing
