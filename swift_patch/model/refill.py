"""Making a fused adapter, and refilling it in place: plan -> merge -> grow -> write.

`add` and `refill` end in the same functions, so that the first sample and the thousandth are merged alike. Everything
that can be wrong is found in the plan, before the first write; what fails all the same is undone.
"""
import copy
import torch
from functools import partial
from peft.tuners.lora import LoraModel
from typing import Any, Dict, Optional, Sequence, Set

from ..lora.composition import Composition
from .adapters import Adapters
from .checks import check_target, check_tensors
from .growth import describe, grow
from .layers import factors_of
from .new_adapter import injecting_tuner
from .offload import on_device, plain_tensors
from .plan import plan_merge, plan_rows
from .rows import check_rows, install, rows_for, uninstall
from .undo import Tree, Undo
from .write import fill, merge_batch, prune_at_random, write


def add(adapters: Adapters, composition: Composition, name: str, undo: Undo) -> None:
    """Adds a fused adapter. Which adapters are active stays as it is.

    Args:
        adapters: the adapters of the model, none of them of that name.
        composition: what to merge, and how.
        name: the name of the new adapter.
        undo: takes what undoes it. Nothing is committed.

    Raises:
        ValueError: the sources cannot be merged this way. The model is as it was.
    """
    # What undoes a failure here comes last, so that it runs before an adapter goes back to where it was offloaded.
    with adapters.memory.lock, plain_tensors(adapters), on_device(adapters,
                                                                  composition.sources) as offloaded, Undo() as own:
        _pack_sources(adapters, composition.sources, offloaded, own)
        plan = plan_merge(adapters, composition)
        tree = Tree(adapters.tuner)
        own.callback(tree.restore)
        # Growth describes another rank in it.
        config = copy.deepcopy(plan.config)
        config.r = config.lora_alpha = plan.rank
        # PEFT changes what needs a gradient, which inference tensors allow in their own mode alone.
        with torch.inference_mode(any(parameter.is_inference() for parameter in adapters.model.parameters())):
            _inject(adapters, name, config)
            for parameter in adapters.model.parameters():
                if tree.is_new(parameter):
                    parameter.requires_grad = False
        plan = prune_at_random(adapters, plan)
        merged = {batch.names: merge_batch(plan, batch) for batch in plan.batches}
        adapters = Adapters.of(adapters.tuner)
        for batch in plan.batches:
            for layer_name, layer in zip(batch.names, batch.layers):
                target = factors_of(layer, name)
                if target is None:
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
        write(adapters, name, plan, lambda batch, _: merged[batch.names], own)
        adapters.remember(name, composition.options, plan.config, plan.layers, own)
        # From here on it is the caller's to undo.
        own.pass_to(undo)


def refill(adapters: Adapters, composition: Composition, name: str, undo: Undo) -> None:
    """Refills a fused adapter in place. Which adapters are active stays as it is.

    Args:
        adapters: the adapters of the model.
        composition: what to merge, and how.
        name: the fused adapter.
        undo: takes what undoes it. Nothing is committed.

    Raises:
        ValueError: the sources cannot be merged this way. The model is as it was, bit by bit.
    """
    sources = composition.sources
    # What undoes it comes last, so that it runs before an adapter goes back to where it was offloaded.
    with adapters.memory.lock, plain_tensors(adapters), on_device(adapters,
                                                                  (*sources, name)) as offloaded, Undo() as own:
        _pack_sources(adapters, sources, offloaded, own)
        plan = plan_merge(adapters, composition)
        check_target(adapters, plan.config, plan.layers.keys(), sources, name)
        places = adapters.factors(name).layout.places
        missing = {
            layer_name: batch.like
            for batch in plan.batches
            for layer_name in batch.names if layer_name not in places
        }
        uninstall(adapters, name, own)
        grow(adapters, name, max(rank for rank, _ in plan.layers.values()), missing, own)
        write(adapters, name, prune_at_random(adapters, plan), partial(merge_batch, plan), own)
        adapters.remember(name, composition.options, plan.config, plan.layers, own)
        if name in offloaded:
            # It goes back to where it has no values that could be put back.
            own.commit()
        else:
            own.pass_to(undo)


def refill_rows(adapters: Adapters,
                compositions: Sequence[Composition],
                name: str,
                undo: Undo,
                seeds: Optional[Sequence[int]] = None) -> None:
    """Gives each row of a batch a fusion of its own. Which adapters are active stays as it is.

    The fused adapter's parameters stay as they are, except that it may grow.

    Args:
        adapters: the adapters of the model.
        compositions: what to merge for each row, and how.
        name: the fused adapter.
        undo: takes what undoes it. Nothing is committed.
        seeds: for each row, what torch's random numbers begin with.

    Raises:
        ValueError: the sources of a row cannot be merged this way, or layers cannot have rows. The model is as it was.
    """
    sources = tuple(dict.fromkeys(source for composition in compositions for source in composition.sources))
    with adapters.memory.lock, plain_tensors(adapters), on_device(adapters,
                                                                  (*sources, name)) as offloaded, Undo() as own:
        _pack_sources(adapters, sources, offloaded, own)
        plans = plan_rows(adapters, compositions)
        # Of each kind, for most rows share their layers.
        merges = list({id(plan.layers): plan for plan in plans if plan is not None}.values())
        for merge in merges:
            check_target(adapters, merge.config, merge.layers.keys(), sources, name)
        places = adapters.factors(name).layout.places
        missing = {
            layer_name: batch.like
            for plan in merges
            for batch in plan.batches
            for layer_name in batch.names if layer_name not in places
        }
        rank = max((rank for plan in merges for rank, _ in plan.layers.values()), default=0)
        check_rows(adapters, name, missing)
        grow(adapters, name, rank, missing, own)
        rows = rows_for(adapters, name, len(plans), own)
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
        rows.show(len(plans))
        own.pass_to(undo)


def make_room(adapters: Adapters, name: str, rank: int, sources: Sequence[str], rows: int = 1) -> None:
    """Makes a fused adapter large enough for what is to come. What it computes stays the same.

    Args:
        adapters: the adapters of the model.
        name: the fused adapter.
        rank: the rank that it shall have at least.
        sources: the adapters whose layers it shall have.
        rows: how many rows there shall be memory for, where there are several.

    Raises:
        ValueError: its tensors cannot be replaced.
    """
    check_tensors(adapters, name)
    missing: Dict[str, str] = {}
    for source in sources:
        missing.update(dict.fromkeys(adapters.factors(source).layout.names, source))
    for layer_name in adapters.factors(name).layout.names:
        missing.pop(layer_name, None)
    # Of the sources, those that a layer is made like.
    needed = (*dict.fromkeys(missing.values()), name)
    with adapters.memory.lock, plain_tensors(adapters), on_device(adapters, needed) as offloaded, Undo() as undo:
        grow(adapters, name, rank, missing, undo)
        for source in sources:
            if source not in offloaded and not adapters.factors(source).layout.is_meta:
                adapters.pack(source, undo)
        if rows > 1:
            rows_for(adapters, name, rows, undo)
        undo.commit()


def _pack_sources(adapters: Adapters, sources: Sequence[str], offloaded: Set[str], undo: Undo) -> None:
    """Packs those of the sources that are on their device to stay."""
    for source in sources:
        if source in adapters.configs and source not in offloaded:
            adapters.pack(source, undo)


def _inject(adapters: Adapters, name: str, config: Any) -> None:
    """Has PEFT, or ms-swift, make a new adapter of this config."""
    tuner = adapters.tuner
    if isinstance(tuner, LoraModel):
        tuner.peft_config[name] = config
        tuner.inject_adapter(adapters.model, name)
        return
    # Only ms-swift has other tuners; PEFT alone shall not need it.
    from swift.tuners.lora_layers import lora_state_dict, mark_lora_as_trainable
    from swift.tuners.utils import SwiftOutput
    injecting = injecting_tuner(adapters, adapters.model)
    injecting.peft_config[name] = config
    injecting.inject_adapter(adapters.model, name)
    config.has_additional_modules = True
    output = tuner.adapters[name] = SwiftOutput(
        config=config,
        state_dict_callback=partial(lora_state_dict, bias=config.bias),
        mark_trainable_callback=partial(mark_lora_as_trainable, adapter_name=name, bias=config.bias))
    if hasattr(output, 'weighted'):
        # An ms-swift with the part `refill` of `swift-patch upstream` refills what is marked so.
        output.weighted = True
