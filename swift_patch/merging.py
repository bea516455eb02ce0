"""One pure function per combination type: the sources of one LoRA layer in, the fused factors out.

Formulas, quirks included, are those of `peft.LoraModel.add_weighted_adapter`, and the sparsifying ones call PEFT's own
functions, so that a refilled adapter holds what a new one would hold. `COMBINATION_TYPES` at the end lists them all.
"""
import ctypes
import math
import torch
from dataclasses import dataclass
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor
from typing import Callable, Dict, List, Literal, NamedTuple, Optional, Sequence

from .compat import sign_on_both_factors
from .lora_index import Factors


class Source(NamedTuple):
    """One adapter to merge, in one LoRA layer.

    Attributes:
        A: shape (r, in_features, ...), see `Factors`.
        B: shape (out_features, r, ...), on the device of `A`.
        weight: the adapter's weight in the merge, of any sign.
        scaling: the adapter's scaling in this layer, α/r or α/√r.
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


# (sources, options, rank, is_transposed) -> factors. `rank` is the fused adapter's, which `svd` truncates to;
# `is_transposed` says that the base layer keeps its weight as (in_features, out_features).
MergeFunction = Callable[[Sequence[Source], MergeOptions, int, bool], Factors]


@dataclass(frozen=True)
class CombinationType:
    """A way to merge LoRAs.

    Attributes:
        merge: the function. Its factors are for scaling 1, those of `average` for `reference_scaling(sources)`.
        rank: the fused rank: that of all sources (`same`), their `sum`, or their `max` unless `svd_rank` is given.
        needs_density: whether the option `density` must be given.
    """
    merge: MergeFunction
    rank: Literal['same', 'sum', 'max']
    needs_density: bool = False


def linear(sources: Sequence[Source], options: MergeOptions, rank: int, is_transposed: bool) -> Factors:
    """A = Σ ±√|wⱼsⱼ| Aⱼ, B = Σ √|wⱼsⱼ| Bⱼ: the delta has cross terms BᵢAⱼ besides the weighted sum of the deltas.

    The sign of wⱼsⱼ is on A alone, or on both factors where the installed PEFT has it so.
    """
    weights_A, weights_B = _root_weights(sources)
    return Factors(
        _weighted_sum([source.A for source in sources], weights_A),
        _weighted_sum([source.B for source in sources], weights_B))


def average(sources: Sequence[Source], options: MergeOptions, rank: int, is_transposed: bool) -> Factors:
    """A = Σ wⱼAⱼ, B = Σ wⱼBⱼ: the fusion of LoraRetriever (Zhao et al. 2024, arXiv:2402.09997, §4.2.2, wⱼ = 1/k).

    With s the sources' scaling the delta is s · B · A, for the scaling stays beside the factors. Where scalings differ,
    Aⱼ and Bⱼ are both multiplied by √(sⱼ/s) first, s = `reference_scaling(sources)`: each source keeps its own delta
    wⱼ²sⱼBⱼAⱼ, and the result does not depend on s.
    """
    reference = reference_scaling(sources)
    weights_B = [source.weight * math.sqrt(abs(source.scaling) / reference) for source in sources]
    weights_A = [math.copysign(1.0, source.scaling) * weight for source, weight in zip(sources, weights_B)]
    return Factors(
        _weighted_sum([source.A for source in sources], weights_A),
        _weighted_sum([source.B for source in sources], weights_B))


def reference_scaling(sources: Sequence[Source]) -> float:
    """Returns the scaling that the factors of `average` are for: the first source's that is not zero, positive."""
    return next((abs(source.scaling) for source in sources if source.scaling), 1.0)


def cat(sources: Sequence[Source], options: MergeOptions, rank: int, is_transposed: bool) -> Factors:
    """A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁ B₂ …]: the delta, so the output, is the weighted sum of the sources'.

    Not so for a convolution in groups, which pair other rows of A with B then: there, too, it is what PEFT makes.
    """
    return Factors(
        torch.cat([source.A * (source.weight * source.scaling) for source in sources], dim=0),
        torch.cat([source.B for source in sources], dim=1))


def svd(sources: Sequence[Source], options: MergeOptions, rank: int, is_transposed: bool) -> Factors:
    """The best approximation of rank `rank` to Σ wⱼsⱼ²BⱼAⱼ, as PEFT has it (the scaling counts twice).

    The sum has at most the rank Σrⱼ, so its truncated SVD is that of a (Σrⱼ, Σrⱼ) matrix between two orthonormal ones
    (QR of the stacked factors), and the (out_features, in_features) delta is never formed. Not so with `svd_clamp`:
    its threshold is a quantile of U and V, which depends on the signs that LAPACK happened to give their columns.
    """
    if options.svd_clamp is not None:
        return _dense_svd(task_arithmetic)(sources, options, rank, is_transposed)
    dtype = torch.promote_types(sources[0].A.dtype, torch.float32)
    stacked_A = torch.cat([source.A.flatten(1).to(dtype) for source in sources], dim=0)
    stacked_B = torch.cat([
        source.B.flatten(1).to(dtype) * (_as_float32(source.weight * source.scaling) * source.scaling)
        for source in sources
    ],
                          dim=1)
    basis_B, core_B = torch.linalg.qr(stacked_B)
    basis_A, core_A = torch.linalg.qr(stacked_A.mT)
    U, S, Vh = torch.linalg.svd(core_B @ core_A.mT, full_matrices=False, driver=options.svd_driver)
    A = Vh[:rank] @ basis_A.mT
    B = basis_B @ (U[:, :rank] * S[:rank])
    return Factors(A.reshape(-1, *sources[0].A.shape[1:]), B.reshape(*B.shape, *sources[0].B.shape[2:]))


def _sparse(peft_merge: Callable[..., Tensor], *option_names: str) -> MergeFunction:
    """Returns the merge function that applies one of PEFT's sparsifying merges to A and to B."""

    def merge(sources: Sequence[Source], options: MergeOptions, rank: int, is_transposed: bool) -> Factors:
        arguments = [getattr(options, name) for name in option_names]
        merged = [
            peft_merge(tensors,
                       torch.tensor(weights).to(tensors[0].device), *arguments).to(tensors[0].dtype)
            for tensors, weights in zip(([source.A
                                          for source in sources], [source.B
                                                                   for source in sources]), _root_weights(sources))
        ]
        return Factors(*merged)

    return merge


def _dense_svd(peft_merge: Callable[..., Tensor], *option_names: str) -> MergeFunction:
    """Returns the merge function that applies one of PEFT's merges to the dense deltas and truncates its SVD.

    The deltas are (out_features, in_features) or, where `is_transposed`, (in_features, out_features), since the random
    masks of `dare_*_svd` are drawn in that order.
    """

    def merge(sources: Sequence[Source], options: MergeOptions, rank: int, is_transposed: bool) -> Factors:
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

    def merge(sources: Sequence[Source], options: MergeOptions, rank: int, is_transposed: bool) -> Factors:
        is_full = options.density is not None and options.density >= 1
        return (svd if is_full else dense)(sources, options, rank, is_transposed)

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


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns Σ wⱼTⱼ, summed in float32 at least and rounded once to the dtype of the first tensor."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    total = tensors[0].to(dtype) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


def _as_float32(value: float) -> float:
    # PEFT keeps weights in a float32 tensor: a float64 model sees the difference.
    return ctypes.c_float(value).value


COMBINATION_TYPES: Dict[str, CombinationType] = {
    'linear': CombinationType(linear, 'same'),
    'average': CombinationType(average, 'same'),
    'cat': CombinationType(cat, 'sum'),
    'svd': CombinationType(svd, 'max'),
    'ties': CombinationType(_sparse(ties, 'density', 'majority_sign_method'), 'same', needs_density=True),
    'ties_svd': CombinationType(_dense_svd(ties, 'density', 'majority_sign_method'), 'max', needs_density=True),
    'dare_linear': CombinationType(_sparse(dare_linear, 'density'), 'same', needs_density=True),
    'dare_ties': CombinationType(_sparse(dare_ties, 'density', 'majority_sign_method'), 'same', needs_density=True),
    'dare_linear_svd': CombinationType(_unless_full(_dense_svd(dare_linear, 'density')), 'max', needs_density=True),
    'dare_ties_svd':
    CombinationType(_dense_svd(dare_ties, 'density', 'majority_sign_method'), 'max', needs_density=True),
    'magnitude_prune': CombinationType(_sparse(magnitude_prune, 'density'), 'same', needs_density=True),
    'magnitude_prune_svd':
    CombinationType(_unless_full(_dense_svd(magnitude_prune, 'density')), 'max', needs_density=True),
}
