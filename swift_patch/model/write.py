"""Writing what is merged into a fused adapter, in the memory of its parameters."""
import torch
from dataclasses import replace
from itertools import groupby
from torch import Tensor
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ..errors import short_repr
from ..lora.factors import Factors, padded, rescaled
from ..lora.formulas import merge
from ..lora.merging import Task
from ..lora.sparse import pruned_at_random
from .adapters import Adapters
from .arrangement import FlatFactors
from .packing import AdapterFactors
from .plan import Batch, Plan
from .undo import Undo

# What is filled: a fused adapter's own parameters, or a row.
Target = Union[AdapterFactors, FlatFactors]


def prune_at_random(adapters: Adapters, plan: Plan) -> Plan:
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
    for name in adapters.in_order(pairs):
        for old, new in pairs[name]:
            new.copy_(pruned_at_random(old, plan.options))
    return replace(plan, batches=batches)


def merge_batch(plan: Plan, batch: Batch, out: Optional[Factors] = None) -> Factors:
    """Returns the fused factors of a batch in the plan's form, for its scaling. Changes nothing but, perhaps, `out`."""
    try:
        return merge(plan.combination.name, Task(batch.sources, plan.options, plan.rank, batch.is_transposed, out))
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]  # torch exports it in no way that mypy sees
        weights = [source.weight for source in batch.sources]
        raise ValueError(f'combination_type {plan.options.combination_type!r} expects a sum that can be decomposed, '
                         f'found one that cannot in layer {batch.names[0]!r} with weights {short_repr(weights)}: give '
                         f'smaller weights, or adapters that are finite ({e}).') from e


def write(adapters: Adapters, adapter_name: str, plan: Plan, merged: Callable[[Batch, Optional[Factors]], Factors],
          undo: Undo) -> None:
    """Writes what is merged into a fused adapter, and zeros into its other layers.

    Args:
        adapters: the adapters of the model.
        adapter_name: the fused adapter, which has all layers and the rank of the plan.
        plan: what is merged.
        merged: returns the factors of a batch, in the memory that it is given where it can.
        undo: takes what undoes it.
    """
    target = adapters.factors(adapter_name)
    layout = target.layout
    record = adapters.record_or_none(adapter_name)
    if record is not None:
        undo.reserve(record.memory.spare, layout.nbytes, len(target.parameters))
    with torch.inference_mode(layout.is_inference), torch.no_grad():
        fill(target, plan, merged, undo.keep)
        # The adapter has biases where the first source has, and they are never merged.
        for place in layout.biased:
            bias = target.layers[place].lora_B[adapter_name].bias
            undo.keep(bias)
            bias.zero_()
    if not layout.is_inference:
        # Writing to several parameters in one operation counts for one of them alone.
        _increment_versions(target.parameters)


def clear(adapters: Adapters, adapter_name: str) -> None:
    """Writes zeros into a fused adapter that is new: there is nothing to undo."""
    target = adapters.factors(adapter_name)
    with torch.inference_mode(target.layout.is_inference), torch.no_grad():
        for parameter in target.parameters:
            parameter.zero_()


def fill(target: Target,
         plan: Plan,
         merged: Callable[[Batch, Optional[Factors]], Factors],
         keep: Optional[Callable[[Tensor], None]] = None) -> None:
    """Fills factors with what is merged, and with zeros where nothing is.

    Args:
        target: the factors of a fused adapter, or of one row.
        plan: see `write`.
        merged: see `write`.
        keep: is given every tensor before it is written to.
    """
    layout = target.layout
    keep = keep or (lambda _: None)
    for batch in plan.batches:
        whole = _factors_together(target, batch)
        for old in whole or ():
            # Before it is merged into.
            keep(old)
        new = merged(batch, whole)
        parts = [(whole, batch, new)] if whole else _parts_together(target, batch, new)
        for factors, part, new in parts:
            # The layer multiplies by its own scaling, a constant of compiled graphs: what differs goes into A and B.
            place = layout.places[part.names[0]]
            new = rescaled(new, batch.scaling / target.scalings[place], in_place=True)
            new = padded(new, factors, part.groups[0], stacked=int(part.form == 'matrices'))
            for old, value in zip(factors, new):
                if whole is None:
                    keep(old)
                old.copy_(value)
    for name in layout.places.keys() - plan.layers.keys():
        for old in target.factors(layout.places[name]):
            keep(old)
            old.zero_()


def _increment_versions(parameters: List[Tensor]) -> None:
    if _TAKES_A_LIST:
        torch.autograd.graph.increment_version(parameters)
    else:
        for parameter in parameters:
            torch.autograd.graph.increment_version(parameter)


def _takes_a_list() -> bool:
    try:
        torch.autograd.graph.increment_version([torch.empty(0, device='cpu')])
    except Exception:  # PyTorch 2.4 takes one tensor
        return False
    return True


_TAKES_A_LIST = _takes_a_list()


def _factors_together(target: Target, batch: Batch) -> Optional[Factors]:
    """Returns the target's factors in the layers of a batch, in its form and in the memory of the parameters.

    None where the target does not hold them together, or with several scalings; it always holds one `layer`.
    """
    layout, begin = target.layout, target.layout.places[batch.names[0]]
    if batch.form == 'layer':
        return target.factors(begin)
    end = begin + len(batch.names)
    if layout.names[begin:end] != batch.names or not layout.is_contiguous:
        return None
    is_together = layout.runs[begin] == layout.runs[end - 1]
    if batch.form == 'elements':
        is_together = (is_together or layout.is_one_run) and layout.shapes[begin:end] == batch.shapes
    if not is_together or len(set(target.scalings[begin:end])) > 1:
        return None
    return target.formed(begin, end, batch.form)


def _parts_together(target: Target, batch: Batch, new: Factors) -> Iterator[Tuple[Factors, Batch, Factors]]:
    """Yields the factors of a batch, all or in parts, with where to put them: the target's factors, and the layers."""
    factors = _factors_together(target, batch)
    if factors is not None:
        yield factors, batch, new
        return
    for part, new_of_part in _split(batch, new):
        yield from _parts_together(target, part, new_of_part)


def _split(batch: Batch, new: Factors) -> Iterator[Tuple[Batch, Factors]]:
    """Yields a batch and its factors in parts: elements as the matrices of layers of one kind, matrices by layer."""
    is_by_kind = batch.form == 'elements'
    keys = zip(batch.shapes, batch.groups) if is_by_kind else range(len(batch.names))
    begin, offsets = 0, [0, 0]
    for count in (len(list(same)) for _, same in groupby(keys)):
        span = slice(begin, begin + count)
        A, B = batch.shapes[begin]
        part = batch._replace(
            names=batch.names[span],
            groups=batch.groups[span],
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
