"""Making a fused adapter, and refilling it in place: plan -> merge -> grow -> write.

`add` and `refill` end in the same functions, so that the first sample and the thousandth are merged alike. Everything
that can be wrong is found in the plan, before the first write; what fails all the same is undone.
"""
import copy
import torch
from functools import partial
from peft.tuners.lora import LoraModel
from typing import Any, ContextManager, Dict, Optional, Sequence, Set

from ..lora.composition import Composition
from ..lora.factors import Factors
from .adapters import Adapters
from .checks import check_target, check_tensors
from .growth import describe, grow
from .layers import factors_of
from .new_adapter import inject
from .offload import on_device, plain_tensors
from .plan import Plan, plan_merge, plan_rows
from .rows import check_rows, install, rows_for, uninstall
from .sources import Sources
from .undo import Undo
from .write import clear, fill, merge_batch, prune_at_random, write


def add(adapters: Adapters, composition: Composition, name: str, undo: Undo, with_values: bool = True) -> Adapters:
    """Adds a fused adapter. Which adapters are active stays as it is.

    Args:
        adapters: the adapters of the model, none of them of that name.
        composition: what to merge, and how.
        name: the name of the new adapter.
        undo: takes what undoes it. Nothing is committed.
        with_values: whether it is filled. It holds zeros otherwise, and no values of a library are read.

    Returns:
        The adapters as they are then.

    Raises:
        ValueError: the sources cannot be merged this way. The model is as it was.
    """
    # What undoes a failure here comes last, so that it runs before an adapter goes back to where it was offloaded.
    with adapters.memory.lock, plain_tensors(adapters), _prepared(adapters, composition.sources) as offloaded, \
            Undo() as own:
        _pack_sources(adapters, composition.sources, offloaded, own)
        plan = plan_merge(Sources(adapters, with_values), composition)
        # Growth describes another rank in it.
        config = copy.deepcopy(plan.config)
        config.r = config.lora_alpha = plan.rank
        adapters = inject(adapters, name, config, own)
        if with_values:
            # As in stock, random masks are drawn after the initial values of the new adapter.
            plan = prune_at_random(adapters, plan)
            merged = {batch.names: merge_batch(plan, batch) for batch in plan.batches}
        else:
            # Of the dtypes of what would be merged.
            merged = {batch.names: Factors(*batch.sources[0][:2]) for batch in plan.batches}
        _register(adapters, name, config)
        adapters = Adapters.of(adapters.tuner, adapters.library)
        layers = dict(adapters.layers)
        for batch in plan.batches:
            for layer_name in batch.names:
                layer = layers.get(layer_name)
                target = None if layer is None else factors_of(layer, name)
                if layer is None or target is None:
                    raise ValueError(f'Layer {layer_name!r} is expected to take a new adapter like {batch.like!r}, but '
                                     'did not: PEFT did another thing than in a copy of the model.')
                layer.scaling[name] = batch.scaling
                if plan.combination.rank != 'sum':
                    # As PEFT: whatever the dtype of the base layer, the new adapter has that of the merge.
                    for new, value in zip(target, merged[batch.names]):
                        new.data = new.data.to(value.dtype)
        # PEFT 0.18 leaves the rows of an adapter of that name that was deleted.
        uninstall(adapters, name, own)
        describe(adapters, name, config, plan.rank)
        adapters.pack(name, own)
        if with_values:
            write(adapters, name, plan, lambda batch, _: merged[batch.names], own)
        else:
            clear(adapters, name)
        adapters.remember(name, composition.options, plan.config, plan.layers, own)
        # From here on it is the caller's to undo.
        own.pass_to(undo)
    return adapters


def refill(adapters: Adapters, composition: Composition, name: str, undo: Undo) -> Adapters:
    """Refills a fused adapter in place. Which adapters are active stays as it is.

    Args:
        adapters: the adapters of the model.
        composition: what to merge, and how.
        name: the fused adapter.
        undo: takes what undoes it. Nothing is committed.

    Returns:
        The adapters as they are then.

    Raises:
        ValueError: the sources cannot be merged this way. The model is as it was, bit by bit.
    """
    names = composition.sources
    # What undoes it comes last, so that it runs before an adapter goes back to where it was offloaded.
    with adapters.memory.lock, plain_tensors(adapters), _prepared(adapters, names, name) as offloaded, Undo() as own:
        _pack_sources(adapters, names, offloaded, own)
        sources = Sources(adapters)
        plan = plan_merge(sources, composition)
        check_target(adapters, plan.config, plan.layers.keys(), names, name)
        missing = _missing(sources, name, [plan])
        uninstall(adapters, name, own)
        adapters = grow(adapters, name, max(rank for rank, _ in plan.layers.values()), missing, own)
        write(adapters, name, prune_at_random(adapters, plan), partial(merge_batch, plan), own)
        adapters.remember(name, composition.options, plan.config, plan.layers, own)
        if name in offloaded:
            # It goes back to where it has no values that could be put back.
            own.commit()
        else:
            own.pass_to(undo)
    return adapters


def refill_rows(adapters: Adapters,
                compositions: Sequence[Composition],
                name: str,
                undo: Undo,
                seeds: Optional[Sequence[int]] = None,
                rank_by_batch: bool = False) -> Adapters:
    """Gives each row of a batch a fusion of its own. Which adapters are active stays as it is.

    The fused adapter's parameters stay as they are, except that it may grow: in layers alone where rows have the rank
    of their batch.

    Args:
        adapters: the adapters of the model.
        compositions: what to merge for each row, and how.
        name: the fused adapter.
        undo: takes what undoes it. Nothing is committed.
        seeds: for each row, what torch's random numbers begin with.
        rank_by_batch: whether the rows have the rank that this batch needs, not that of the fused adapter.

    Returns:
        The adapters as they are then.

    Raises:
        ValueError: the sources of a row cannot be merged this way, or layers cannot have rows. The model is as it was.
    """
    names = tuple(dict.fromkeys(source for composition in compositions for source in composition.sources))
    with adapters.memory.lock, plain_tensors(adapters), _prepared(adapters, names, name) as offloaded, Undo() as own:
        _pack_sources(adapters, names, offloaded, own)
        sources = Sources(adapters)
        plans = plan_rows(sources, compositions)
        # Of each kind, for most rows share their layers.
        merges = list({id(plan.layers): plan for plan in plans if plan is not None}.values())
        for merge in merges:
            check_target(adapters, merge.config, merge.layers.keys(), names, name)
        rank = max((rank for plan in merges for rank, _ in plan.layers.values()), default=0)
        adapters = grow(adapters, name, 0 if rank_by_batch else rank, _missing(sources, name, merges), own)
        check_rows(adapters, name)
        rows = rows_for(adapters, name, len(plans), own, rank if rank_by_batch else None)
        target = adapters.factors(name)
        # What was there before cannot be put back: nobody reads it then.
        own.callback(rows.hide)
        install(adapters, name, rows, own)
        with torch.inference_mode(False), torch.no_grad():
            for number, plan in enumerate(plans):
                if plan is None:
                    rows.clear(number)
                    continue
                if seeds is not None:
                    torch.manual_seed(seeds[number])
                fill(rows.row(number, target), prune_at_random(adapters, plan), partial(merge_batch, plan))
        rows.show()
        own.pass_to(undo)
    return adapters


def make_room(adapters: Adapters, name: str, rank: int, sources: Sources, names: Sequence[str], rows: int = 0) -> None:
    """Makes a fused adapter large enough for what is to come. What it computes stays the same.

    Args:
        adapters: the adapters of the model.
        name: the fused adapter.
        rank: the rank that it shall have at least.
        sources: the adapters that will be merged.
        names: their names.
        rows: how many rows of that rank there shall be memory for.

    Raises:
        ValueError: its tensors cannot be replaced.
    """
    check_tensors(adapters, name)
    # A library of thousands has few kinds, which share a layout.
    stored = {id(layout): layout for layout in map(sources.layout, filter(sources.is_stored, names))}
    missing: Dict[str, Optional[str]] = dict.fromkeys(name for layout in stored.values() for name in layout.names)
    for source in sources.of_model(names):
        # A layer is made like an adapter that the model has there, if there is one.
        missing.update(dict.fromkeys(adapters.factors(source).layout.names, source))
    for layer_name in adapters.factors(name).layout.names:
        missing.pop(layer_name, None)
    # Of the sources, those that a layer is made like.
    needed = tuple(like for like in dict.fromkeys(missing.values()) if like is not None)
    with adapters.memory.lock, plain_tensors(adapters), on_device(adapters,
                                                                  (*needed, name)) as offloaded, Undo() as undo:
        adapters = grow(adapters, name, rank, missing, undo)
        for source in sources.of_model(names):
            if source not in offloaded and not adapters.factors(source).layout.is_meta:
                adapters.pack(source, undo)
        if rows:
            rows_for(adapters, name, rows, undo)
        undo.commit()


def _missing(sources: Sources, name: str, plans: Sequence[Plan]) -> Dict[str, Optional[str]]:
    """Returns the layers that a fused adapter lacks, each with an adapter of the model to make it like, or None."""
    places = sources.adapters.factors(name).layout.places
    return {
        layer_name: None if sources.is_stored(batch.like) else batch.like
        for plan in plans
        for batch in plan.batches
        for layer_name in batch.names if layer_name not in places
    }


def _prepared(adapters: Adapters, sources: Sequence[str], *others: str) -> 'ContextManager[Set[str]]':
    """Returns `on_device` for those of the sources that the model has, and for others."""
    return on_device(adapters, (*Sources(adapters).of_model(sources), *others))


def _pack_sources(adapters: Adapters, names: Sequence[str], offloaded: Set[str], undo: Undo) -> None:
    """Packs those of the sources that are on their device to stay."""
    for name in Sources(adapters).of_model(names):
        if name in adapters.configs and name not in offloaded:
            adapters.pack(name, undo)


def _register(adapters: Adapters, name: str, config: Any) -> None:
    """Has the tuner know an adapter that was injected."""
    tuner = adapters.tuner
    if isinstance(tuner, LoraModel):
        tuner.peft_config[name] = config
        # As PEFT does where it makes a tuner.
        adapters.model.peft_config = tuner.peft_config
        return
    # Only ms-swift has other tuners; PEFT alone shall not need it.
    from swift.tuners.lora_layers import lora_state_dict, mark_lora_as_trainable
    from swift.tuners.utils import SwiftOutput
    config.has_additional_modules = True
    output = tuner.adapters[name] = SwiftOutput(
        config=config,
        state_dict_callback=partial(lora_state_dict, bias=config.bias),
        mark_trainable_callback=partial(mark_lora_as_trainable, adapter_name=name, bias=config.bias))
    if hasattr(output, 'weighted'):
        # An ms-swift with the part `refill` of `swift-patch upstream` refills what is marked so.
        output.weighted = True
