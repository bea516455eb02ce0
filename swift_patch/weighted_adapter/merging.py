"""One pure function per combination type: the sources of one LoRA layer in, the fused factors out.

Formulas, quirks included, are those of `peft.LoraModel.add_weighted_adapter`, and the sparsifying ones call PEFT's own
functions, so that a refilled adapter holds what a new one would hold. `COMBINATION_TYPES` at the end lists them all.
"""
import ctypes
import math
import torch
from dataclasses import dataclass
from functools import reduce
from peft.utils.merge_utils import (calculate_majority_sign_mask, dare_linear, dare_ties, disjoint_merge,
                                    magnitude_prune, prune, reshape_weight_task_tensors, task_arithmetic, ties)
from torch import Tensor
from typing import Callable, Dict, Iterator, List, Literal, NamedTuple, Optional, Sequence, Tuple

from .compat import sign_on_both_factors
from .compiling import compiled_sums
from .lora_index import Factors, Form


class Source(NamedTuple):
    """One adapter to merge, in one LoRA layer or in several, in the form that the combination type takes.

    Attributes:
        A: see `Form`.
        B: likewise, on the device of `A`.
        weight: the adapter's weight in the merge, of any sign.
        scaling: the adapter's scaling in these layers, α/r or α/√r.
    """
    A: Tensor
    B: Tensor
    weight: float
    scaling: float


@dataclass(frozen=True)
class MergeOptions:
    """How to merge: the arguments of `add_weighted_adapter` behind the sources."""
    combination_type: str = 'svd'
    svd_rank: Optional[int] = None
    svd_clamp: Optional[float] = None
    svd_full_matrices: bool = True
    svd_driver: Optional[str] = None
    density: Optional[float] = None
    majority_sign_method: Literal['total', 'frequency'] = 'total'


# (sources, options, rank, is_transposed, out) -> factors. `rank` is the fused adapter's, which `svd` truncates to;
# `is_transposed` says that the base layer keeps its weight as (in_features, out_features); `out` is memory that the
# factors may be put in, where they have its shapes and dtypes, by a function that can.
MergeFunction = Callable[[Sequence[Source], MergeOptions, int, bool, Optional[Factors]], Factors]

# Elements that stay in a core's cache from one operation to the next, while memory is read and written once.
_CACHED = 2**18


@dataclass(frozen=True)
class CombinationType:
    """A way to merge LoRAs.

    Attributes:
        merge: the function. Its factors are for scaling 1, those of `average` for `reference_scaling(sources)`.
        rank: the fused rank: that of all sources (`same`), their `sum`, or their `max` unless `svd_rank` is given.
        needs_density: whether the option `density` must be given.
        prunes_at_random: whether what it takes was pruned, see `pruned_at_random`.
        form: what the function takes, and gives.
    """
    merge: MergeFunction
    rank: Literal['same', 'sum', 'max']
    needs_density: bool = False
    prunes_at_random: bool = False
    form: Form = 'layer'


def linear(sources: Sequence[Source],
           options: MergeOptions,
           rank: int,
           is_transposed: bool,
           out: Optional[Factors] = None) -> Factors:
    """A = Σ ±√|wⱼsⱼ| Aⱼ, B = Σ √|wⱼsⱼ| Bⱼ: the delta has cross terms BᵢAⱼ besides the weighted sum of the deltas.

    The sign of wⱼsⱼ is on A alone, or on both factors where the installed PEFT has it so.
    """
    return _by_side(sources, _root_weights(sources), out, _weighted_sum)


def average(sources: Sequence[Source],
            options: MergeOptions,
            rank: int,
            is_transposed: bool,
            out: Optional[Factors] = None) -> Factors:
    """A = Σ wⱼAⱼ, B = Σ wⱼBⱼ: the fusion of LoraRetriever (Zhao et al. 2024, arXiv:2402.09997, §4.2.2, wⱼ = 1/k).

    With s the sources' scaling the delta is s · B · A, for the scaling stays beside the factors. Where scalings differ,
    Aⱼ and Bⱼ are both multiplied by √(sⱼ/s) first, s = `reference_scaling(sources)`: each source keeps its own delta
    wⱼ²sⱼBⱼAⱼ, and the result does not depend on s.
    """
    reference = reference_scaling(sources)
    weights_B = [source.weight * math.sqrt(abs(source.scaling) / reference) for source in sources]
    weights_A = [math.copysign(1.0, source.scaling) * weight for source, weight in zip(sources, weights_B)]
    return _by_side(sources, [weights_A, weights_B], out, _weighted_sum)


def reference_scaling(sources: Sequence[Source]) -> float:
    """Returns the scaling that the factors of `average` are for: the first source's that is not zero, positive."""
    return next((abs(source.scaling) for source in sources if source.scaling), 1.0)


def cat(sources: Sequence[Source],
        options: MergeOptions,
        rank: int,
        is_transposed: bool,
        out: Optional[Factors] = None) -> Factors:
    """A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁ B₂ …]: the delta, so the output, is the weighted sum of the sources'.

    Not so for a convolution in groups, which pair other rows of A with B then: there, too, it is what PEFT makes.
    """
    A = _room([source.A for source in sources], out and out.A, -2)
    B = _room([source.B for source in sources], out and out.B, -1)
    for source, rows in zip(sources, A.split([source.A.shape[-2] for source in sources], dim=-2)):
        torch.mul(source.A, source.weight * source.scaling, out=rows)
    for part, *parts in _parts(B, [source.B for source in sources]):
        torch.cat(parts, dim=-1, out=part)
    return Factors(A, B)


def _room(tensors: Sequence[Tensor], out: Optional[Tensor], dim: Optional[int] = None) -> Tensor:
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


def svd(sources: Sequence[Source],
        options: MergeOptions,
        rank: int,
        is_transposed: bool,
        out: Optional[Factors] = None) -> Factors:
    """The best approximation of rank `rank` to Σ wⱼsⱼ²BⱼAⱼ, as PEFT has it (the scaling counts twice).

    The sum has at most the rank Σrⱼ, so its truncated SVD is that of a (Σrⱼ, Σrⱼ) matrix between two orthonormal ones
    (QR of the stacked factors), and the (out_features, in_features) delta is never formed. Not so with `svd_clamp`:
    its threshold is a quantile of U and V, which depends on the signs that LAPACK happened to give their columns.
    """
    if options.svd_clamp is not None:
        return _dense_svd(task_arithmetic)(sources, options, rank, is_transposed, out)
    dtype = torch.promote_types(sources[0].A.dtype, torch.float32)
    stacked_A = torch.cat([source.A.to(dtype) for source in sources], dim=-2)
    weights = [_as_float32(source.weight * source.scaling) * source.scaling for source in sources]
    stacked_B = torch.cat([source.B.to(dtype) * weight for source, weight in zip(sources, weights)], dim=-1)
    basis_B, core_B = torch.linalg.qr(stacked_B)
    basis_A, core_A = torch.linalg.qr(stacked_A.mT)
    U, S, Vh = torch.linalg.svd(core_B @ core_A.mT, full_matrices=False, driver=options.svd_driver)
    return Factors(Vh[..., :rank, :] @ basis_A.mT, basis_B @ (U[..., :rank] * S[..., None, :rank]))


def elected(sources: Sequence[Source],
            options: MergeOptions,
            rank: int,
            is_transposed: bool,
            out: Optional[Factors] = None) -> Factors:
    """`linear` of the values alone that have the sign of the majority, averaged over those (TIES, Yadav et al. 2023,
    arXiv:2306.01708)."""

    def merge(tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        stacked = torch.stack(list(tensors))
        is_elected = calculate_majority_sign_mask(stacked, options.majority_sign_method)
        weighted = stacked * reshape_weight_task_tensors(stacked, torch.tensor(weights).to(out.device))
        out.copy_(disjoint_merge(weighted, is_elected))

    return _by_side(sources, _root_weights(sources), out, merge)


def _trimmed(combine: MergeFunction) -> MergeFunction:
    """Returns `combine` of what is left of A and of B in each layer when only the largest values are kept."""

    def merge(sources: Sequence[Source],
              options: MergeOptions,
              rank: int,
              is_transposed: bool,
              out: Optional[Factors] = None) -> Factors:
        density = _density(options)
        trimmed = [source._replace(A=_largest(source.A, density), B=_largest(source.B, density)) for source in sources]
        return combine(trimmed, options, rank, is_transposed, out)

    return merge


def pruned_at_random(tensor: Tensor, options: MergeOptions) -> Tensor:
    """Returns a tensor with `density` of its values, as PEFT draws them (DARE, Yu et al. 2023, arXiv:2311.03099)."""
    pruned: Tensor = prune(tensor, _density(options), 'random', rescale=True)
    return pruned


def _density(options: MergeOptions) -> float:
    assert options.density is not None  # The plan sees to it.
    return options.density


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Returns a tensor with the values of largest magnitude in each layer, as PEFT's `prune` keeps them one by one."""
    if density >= 1:
        pruned: Tensor = prune(tensor, density, 'magnitude')
        return pruned
    rows = tensor.flatten(1)
    largest = rows.abs().topk(int(density * rows.shape[1])).indices
    return torch.zeros_like(rows).scatter_(1, largest, rows.gather(1, largest)).view(tensor.shape)


def _dense_svd(peft_merge: Callable[..., Tensor], *option_names: str) -> MergeFunction:
    """Returns the merge function that applies one of PEFT's merges to the dense deltas and truncates its SVD.

    The deltas are (out_features, in_features) or, where `is_transposed`, (in_features, out_features), since the random
    masks of `dare_*_svd` are drawn in that order.
    """

    def merge(sources: Sequence[Source],
              options: MergeOptions,
              rank: int,
              is_transposed: bool,
              out: Optional[Factors] = None) -> Factors:
        arguments = [getattr(options, name) for name in option_names]
        weights = torch.tensor([source.weight * source.scaling for source in sources]).to(sources[0].A.device)
        delta = peft_merge([_dense_delta(source, is_transposed) for source in sources], weights, *arguments)
        delta = delta.T if is_transposed else delta.flatten(1)
        # The other columns of full matrices are never used; only a clamp would see which signs LAPACK chose for them.
        full_matrices = options.svd_full_matrices and options.svd_clamp is not None
        U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=options.svd_driver)
        B, A = U[:, :rank] * S[:rank], Vh[:rank]
        if options.svd_clamp is not None:
            high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), options.svd_clamp)
            B, A = B.clamp(-high, high), A.clamp(-high, high)
        return Factors(A.reshape(-1, *sources[0].A.shape[1:]), B.reshape(*B.shape, *sources[0].B.shape[2:]))

    return merge


def _unless_full(dense: MergeFunction) -> MergeFunction:
    """Returns `dense` for a density below 1, and `svd` where nothing is pruned, so that the two are the same."""

    def merge(sources: Sequence[Source],
              options: MergeOptions,
              rank: int,
              is_transposed: bool,
              out: Optional[Factors] = None) -> Factors:
        if options.density is None or options.density < 1:
            return dense(sources, options, rank, is_transposed, out)
        flat = [source._replace(A=source.A.flatten(1), B=source.B.flatten(1)) for source in sources]
        A, B = svd(flat, options, rank, is_transposed)
        return Factors(A.reshape(-1, *sources[0].A.shape[1:]), B.reshape(*B.shape, *sources[0].B.shape[2:]))

    return merge


def _dense_delta(source: Source, is_transposed: bool) -> Tensor:
    """Returns s · B · A as `LoraLayer.get_delta_weight` does, which would write to half-precision adapters on a CPU."""
    A, B, dtype = source.A, source.B.flatten(1), source.B.dtype
    if A.device.type == 'cpu' and dtype in (torch.float16, torch.bfloat16):
        A, B = A.float(), B.float()
    if A.dim() == 2:
        delta = (B @ A).T if is_transposed else B @ A
    else:
        # In memory as convolving A with B leaves it, input channels first: random masks are drawn in that order.
        delta = torch.einsum('rik,or->iok', A.flatten(2), B).contiguous().transpose(0, 1)
    return (delta * source.scaling).to(dtype)


def _root_weights(sources: Sequence[Source]) -> List[List[float]]:
    """Returns ±√|wⱼsⱼ| for A and for B, as PEFT rounds them: to float32."""
    weights_A, weights_B = [], []
    for source in sources:
        weight = source.weight * source.scaling
        root = _as_float32(math.sqrt(abs(weight)))
        sign = 1.0 if weight >= 0 else -1.0
        weights_A.append(sign * root)
        weights_B.append(sign * root if sign_on_both_factors() else root)
    return [weights_A, weights_B]


def _by_side(sources: Sequence[Source], weights: Sequence[Sequence[float]], out: Optional[Factors],
             merge: Callable[[Sequence[Tensor], Sequence[float], Tensor], None]) -> Factors:
    """Returns what `merge` makes of the A, and of the B: of their shape, and the dtypes of the first source.

    Args:
        sources: the sources.
        weights: their weights for A, and those for B.
        out: memory that the factors may be put in.
        merge: puts into its last argument what it makes of tensors and weights.
    """
    tensors = [source.A for source in sources], [source.B for source in sources]
    found = Factors(*map(_room, tensors, out or (None, None)))
    # One dimension: the elements of all layers.
    if merge is _weighted_sum and found.A.dim() == found.B.dim() == 1 and compiled_sums(tensors, weights, found):
        return found
    for tensors_of_side, weights_of_side, result in zip(tensors, weights, found):
        for part, *parts in _parts(result, tensors_of_side):
            merge(parts, weights_of_side, part)
    return found


def _parts(out: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tuple[Tensor, ...]]:
    """Yields parts of `out` and of all tensors along their first dimension, which stay in the cache of a CPU."""
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


def _as_float32(value: float) -> float:
    # PEFT keeps weights in a float32 tensor: a float64 model sees the difference.
    return ctypes.c_float(value).value


COMBINATION_TYPES: Dict[str, CombinationType] = {
    'linear': CombinationType(linear, 'same', form='elements'),
    'average': CombinationType(average, 'same', form='elements'),
    'cat': CombinationType(cat, 'sum', form='matrices'),
    'svd': CombinationType(svd, 'max', form='matrices'),
    'ties': CombinationType(_trimmed(elected), 'same', needs_density=True, form='matrices'),
    'ties_svd': CombinationType(_dense_svd(ties, 'density', 'majority_sign_method'), 'max', needs_density=True),
    'dare_linear': CombinationType(linear, 'same', needs_density=True, prunes_at_random=True, form='matrices'),
    'dare_ties': CombinationType(elected, 'same', needs_density=True, prunes_at_random=True, form='matrices'),
    'dare_linear_svd': CombinationType(_unless_full(_dense_svd(dare_linear, 'density')), 'max', needs_density=True),
    'dare_ties_svd':
    CombinationType(_dense_svd(dare_ties, 'density', 'majority_sign_method'), 'max', needs_density=True),
    'magnitude_prune': CombinationType(_trimmed(linear), 'same', needs_density=True, form='matrices'),
    'magnitude_prune_svd':
    CombinationType(_unless_full(_dense_svd(magnitude_prune, 'density')), 'max', needs_density=True),
}
