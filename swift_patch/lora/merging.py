"""Merging LoRAs: tensors in, fused factors out (or into given memory). `formulas` names the function of each type.

Formulas, quirks included, are those of `peft.LoraModel.add_weighted_adapter`, so that a refilled adapter holds what a
new one would hold. This module has the sums: `linear`, `average` and `cat`.
"""
import math
import torch
from functools import lru_cache, reduce
from peft.tuners.lora import LoraModel
from torch import Tensor
from types import SimpleNamespace
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from .combination import MergeOptions
from .compiled import compiled_sums
from .factors import Factors, Source
from .numbers import as_float32

# Elements that stay in a core's cache from one operation to the next, while memory is read and written once.
_CACHED = 2**18


class Task(NamedTuple):
    """What a merge function takes.

    Attributes:
        sources: what to merge, in the form of the combination type.
        options: how.
        rank: the fused adapter's rank, which decompositions truncate to.
        is_transposed: whether the base layer keeps its weight as (in_features, out_features).
        out: memory that the factors may be put in where it has their shapes and dtypes, by a function that can.
    """
    sources: Sequence[Source]
    options: MergeOptions
    rank: int
    is_transposed: bool
    out: Optional[Factors] = None


# The factors are for scaling 1, those of `average` for `reference_scaling(sources)`.
MergeFunction = Callable[[Task], Factors]


def linear(task: Task) -> Factors:
    """A = Σ ±√|wⱼsⱼ| Aⱼ, B = Σ √|wⱼsⱼ| Bⱼ: the delta has cross terms BᵢAⱼ besides the weighted sum of the deltas.

    The sign of wⱼsⱼ is on A alone, or on both factors where the installed PEFT has it so.
    """
    return by_side(task, root_weights(task.sources), _weighted_sum, compiled_sums)


def average(task: Task) -> Factors:
    """A = Σ wⱼAⱼ, B = Σ wⱼBⱼ: the fusion of LoraRetriever (Zhao et al. 2024, arXiv:2402.09997, §4.2.2, wⱼ = 1/k).

    With s the sources' scaling the delta is s · B · A, for the scaling stays beside the factors. Where scalings differ,
    Aⱼ and Bⱼ are both multiplied by √(sⱼ/s) first, s = `reference_scaling(sources)`: each source keeps its own delta
    wⱼ²sⱼBⱼAⱼ, and the result does not depend on s.
    """
    reference = reference_scaling(task.sources)
    weights_B = [source.weight * math.sqrt(abs(source.scaling) / reference) for source in task.sources]
    weights_A = [math.copysign(1.0, source.scaling) * weight for source, weight in zip(task.sources, weights_B)]
    return by_side(task, [weights_A, weights_B], _weighted_sum, compiled_sums)


def reference_scaling(sources: Sequence[Source]) -> float:
    """Returns the scaling that the factors of `average` are for: the first source's that is not zero, positive."""
    return next((abs(source.scaling) for source in sources if source.scaling), 1.0)


def cat(task: Task) -> Factors:
    """A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁ B₂ …]: the delta, so the output, is the weighted sum of the sources'.

    Not so for a convolution in groups, which pair other rows of A with B then: there, too, it is what PEFT makes.
    """
    sources, out = task.sources, task.out
    A = _memory([source.A for source in sources], out and out.A, -2)
    B = _memory([source.B for source in sources], out and out.B, -1)
    for source, rows in zip(sources, A.split([source.A.shape[-2] for source in sources], dim=-2)):
        torch.mul(source.A, source.weight * source.scaling, out=rows)
    for part, *parts in _chunks(B, [source.B for source in sources]):
        torch.cat(parts, dim=-1, out=part)
    return Factors(A, B)


def root_weights(sources: Sequence[Source]) -> List[List[float]]:
    """Returns ±√|wⱼsⱼ| for A and for B, as PEFT rounds them: to float32."""
    weights_A, weights_B = [], []
    for source in sources:
        weight = source.weight * source.scaling
        root = as_float32(math.sqrt(abs(weight)))
        sign = 1.0 if weight >= 0 else -1.0
        weights_A.append(sign * root)
        weights_B.append(sign * root if _is_sign_on_both_factors() else root)
    return [weights_A, weights_B]


def by_side(
    task: Task,
    weights: Sequence[Sequence[float]],
    combine: Callable[[Sequence[Tensor], Sequence[float], Tensor], None],
    combine_all: Optional[Callable[[Sequence[Sequence[Tensor]], Sequence[Sequence[float]], Sequence[Tensor]],
                                   bool]] = None
) -> Factors:
    """Returns what `combine` makes of the A, and of the B: of their shape, and the dtypes of the first source.

    Args:
        task: the task.
        weights: the sources' weights for A, and those for B.
        combine: puts into its last argument what it makes of tensors and weights.
        combine_all: does that for both sides at once where it can, and returns whether it did.
    """
    sides = [source.A for source in task.sources], [source.B for source in task.sources]
    found = Factors(*map(_memory, sides, task.out or (None, None)))
    if combine_all is not None and combine_all(sides, weights, found):
        return found
    for tensors, weights_of_side, result in zip(sides, weights, found):
        for part, *parts in _chunks(result, tensors):
            combine(parts, weights_of_side, part)
    return found


def _memory(tensors: Sequence[Tensor], out: Optional[Tensor], dim: Optional[int] = None) -> Tensor:
    """Returns `out`, or new memory where that is not as a merge of the tensors needs it.

    That is the shape and the dtype of the first or, along `dim`, of all one after another.
    """
    shape, dtype = list(tensors[0].shape), tensors[0].dtype
    if dim is not None:
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    if out is not None and (list(out.shape), out.dtype, out.device) == (shape, dtype, tensors[0].device):
        return out
    return tensors[0].new_empty(shape, dtype=dtype)


def _chunks(out: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tuple[Tensor, ...]]:
    """Yields chunks of `out` and of all tensors along their first dimension, which stay in the cache of a CPU."""
    size = max(len(out) * _CACHED // max(out.numel(), 1), 1) if out.device.type == 'cpu' else max(len(out), 1)
    return zip(*(tensor.split(size) for tensor in (out, *tensors)))


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Puts Σ wⱼTⱼ into `out`, summed in float32 at least and rounded once to its dtype."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    total = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    torch.mul(tensors[0].to(dtype), weights[0], out=total)
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total.add_(tensor, alpha=weight)
    if total is not out:
        out.copy_(total)


@lru_cache(maxsize=None)
def _is_sign_on_both_factors() -> bool:
    """Whether PEFT puts a negative sign on both factors (up to 0.18), where it cancels, or on A alone. It is tried."""
    # No modules, whose initial values would be drawn from the user's random numbers.
    A, B = (SimpleNamespace(weight=torch.ones(1, 1, device='cpu')) for _ in 'AB')
    layer = SimpleNamespace(lora_A={'a': A}, lora_B={'a': B}, lora_embedding_A={}, scaling={'a': 1.0})
    _, merged_B = LoraModel._generalized_task_arithmetic_weighted_adapter(None, 'linear', ['a'], [-1.0], layer, None,
                                                                          'total')
    return bool(merged_B.item() < 0)
