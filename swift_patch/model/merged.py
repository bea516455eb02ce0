"""Merging for who keeps adapters in a place of its own: the factors of a fused adapter, in memory that is new."""
import torch
from functools import partial
from typing import List, Optional

from ..lora.composition import Composition
from .adapters import Adapters
from .arrangement import Arrangement, Factor, FlatFactors, LayerFactors
from .offload import plain_tensors
from .plan import Plan, plan_merge
from .sources import Sources
from .write import fill, merge_batch, prune_at_random


def merged(adapters: Adapters,
           composition: Composition,
           seed: Optional[int] = None,
           with_values: bool = True) -> FlatFactors:
    """Returns what a new adapter would hold, with the scaling that it would have in each layer.

    The model may be on the meta device: its modules say which layers there are, and the values are those of a library.

    Args:
        adapters: the adapters of the model.
        composition: what to merge, and how.
        seed: what random masks of values on the CPU come from; by default torch's random numbers go on.
        with_values: whether values are read and merged. What is returned is on the meta device otherwise.

    Raises:
        ValueError: the sources cannot be merged this way.
    """
    with adapters.memory.lock, plain_tensors(adapters):
        for name in dict.fromkeys(composition.sources):
            # By the header of its file, too.
            Sources(adapters).check(name)
        plan = plan_merge(Sources(adapters, with_values), composition)
        layout = _layout_of(adapters, plan)
        memory = {kind: torch.empty(size, dtype=kind[0], device=kind[1]) for kind, size in layout.sizes.items()}
        target = FlatFactors(layout, memory, [plan.layers[name][1] for name in layout.names])
        if not with_values:
            return target
        own = seed if plan.combination.is_random else None
        with torch.random.fork_rng(devices=[], enabled=own is not None):
            if own is not None:
                # Not those of devices, by which others may sample.
                torch.default_generator.manual_seed(own)
            fill(target, prune_at_random(adapters, plan), partial(merge_batch, plan))
    return target


def _layout_of(adapters: Adapters, plan: Plan) -> Arrangement:
    """Returns where the factors of a new adapter lie, in the order in which the plan has its layers."""
    key = 'merged', tuple((batch.names, batch.sources[0].A.dtype, batch.sources[0].B.dtype, batch.sources[0].A.device)
                          for batch in plan.batches), tuple(plan.layers.values())
    found: Optional[Arrangement] = adapters.memory.known(key)
    if found is not None:
        return found
    layers: List[LayerFactors] = []
    for batch in plan.batches:
        source = batch.sources[0]
        for name, groups, (A, B) in zip(batch.names, batch.groups, batch.shapes):
            rank = plan.layers[name][0]
            layers.append(
                LayerFactors(name, Factor(torch.Size((rank, *A[1:])), source.A.dtype, source.A.device),
                             Factor(torch.Size((B[0], rank // groups, *B[2:])), source.B.dtype, source.B.device),
                             groups, batch.is_transposed))
    return adapters.memory.remember_new(key, Arrangement(layers))
