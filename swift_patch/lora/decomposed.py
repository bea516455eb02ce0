"""The combination types that decompose a delta: `svd`, from the low-rank factors, and those of dense deltas."""
import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor
from typing import Callable

from .factors import Factors, Source
from .merging import MergeFunction, Task
from .numbers import as_float32


def svd(task: Task) -> Factors:
    """The best approximation of rank `rank` to Σ wⱼsⱼ²BⱼAⱼ, as PEFT has it (the scaling counts twice).

    The sum has at most the rank Σrⱼ, so its truncated SVD is that of a (Σrⱼ, Σrⱼ) matrix between two orthonormal ones
    (QR of the stacked factors), and the (out_features, in_features) delta is never formed. Not so with `svd_clamp`:
    its threshold is a quantile of U and V, which depends on the signs that LAPACK happened to give their columns.
    """
    sources, rank = task.sources, task.rank
    if task.options.svd_clamp is not None:
        return _of_dense_deltas(task_arithmetic)(task)
    dtype = torch.promote_types(sources[0].A.dtype, torch.float32)
    stacked_A = torch.cat([source.A.to(dtype) for source in sources], dim=-2)
    weights = [as_float32(source.weight * source.scaling) * source.scaling for source in sources]
    stacked_B = torch.cat([source.B.to(dtype) * weight for source, weight in zip(sources, weights)], dim=-1)
    basis_B, core_B = torch.linalg.qr(stacked_B)
    basis_A, core_A = torch.linalg.qr(stacked_A.mT)
    U, S, Vh = torch.linalg.svd(core_B @ core_A.mT, full_matrices=False, driver=task.options.svd_driver)
    return Factors(Vh[..., :rank, :] @ basis_A.mT, basis_B @ (U[..., :rank] * S[..., None, :rank]))


def _of_dense_deltas(peft_merge: Callable[..., Tensor], *option_names: str) -> MergeFunction:
    """Returns the merge function that applies one of PEFT's merges to the dense deltas and truncates its SVD.

    The deltas are (out_features, in_features) or, where `is_transposed`, (in_features, out_features), since the random
    masks of `dare_*_svd` are drawn in that order.
    """

    def merge(task: Task) -> Factors:
        sources, options, rank = task.sources, task.options, task.rank
        arguments = [getattr(options, name) for name in option_names]
        weights = torch.tensor([source.weight * source.scaling for source in sources]).to(sources[0].A.device)
        delta = peft_merge([_dense_delta(source, task.is_transposed) for source in sources], weights, *arguments)
        delta = delta.T if task.is_transposed else delta.flatten(1)
        # The other columns of full matrices are never used; only a clamp would see which signs LAPACK chose for them.
        full_matrices = options.svd_full_matrices and options.svd_clamp is not None
        U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=options.svd_driver)
        B, A = U[:, :rank] * S[:rank], Vh[:rank]
        if options.svd_clamp is not None:
            high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), options.svd_clamp)
            B, A = B.clamp(-high, high), A.clamp(-high, high)
        return Factors(A.reshape(-1, *sources[0].A.shape[1:]), B.reshape(*B.shape, *sources[0].B.shape[2:]))

    return merge


def _svd_where_all_is_kept(merge: MergeFunction) -> MergeFunction:
    """Returns `merge` for a density below 1, and `svd` where nothing is pruned, so that the two are the same."""

    def merge_or_svd(task: Task) -> Factors:
        if task.options.density is None or task.options.density < 1:
            return merge(task)
        flat = [source._replace(A=source.A.flatten(1), B=source.B.flatten(1)) for source in task.sources]
        A, B = svd(task._replace(sources=flat))
        of_first = task.sources[0]
        return Factors(A.reshape(-1, *of_first.A.shape[1:]), B.reshape(*B.shape, *of_first.B.shape[2:]))

    return merge_or_svd


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


ties_svd = _of_dense_deltas(ties, 'density', 'majority_sign_method')
dare_linear_svd = _svd_where_all_is_kept(_of_dense_deltas(dare_linear, 'density'))
dare_ties_svd = _of_dense_deltas(dare_ties, 'density', 'majority_sign_method')
magnitude_prune_svd = _svd_where_all_is_kept(_of_dense_deltas(magnitude_prune, 'density'))
