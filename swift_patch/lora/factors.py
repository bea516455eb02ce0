"""The factors A and B of a LoRA: their forms, their rank, their scaling."""
import math
import torch
from torch import Tensor
from typing import NamedTuple

from .combination import Form


class Factors(NamedTuple):
    """The low-rank factors of one adapter in one LoRA layer: ΔW = scaling · B · A (Hu et al. 2021, LoRA).

    Attributes:
        A: shape (r, in_features); for a convolution (r, in_channels, *kernel), for an embedding (r, num_embeddings).
        B: shape (out_features, r); for a convolution (out_channels, r / groups, 1, ...), for an embedding
            (embedding_dim, r).
    """
    A: Tensor
    B: Tensor


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


def formed(stacked: Factors, form: Form) -> Factors:
    """Returns factors of n layers of one shape, n in front, in another form; of one layer where it is `layer`."""
    if form == 'layer':
        return Factors(stacked.A[0], stacked.B[0])
    if form == 'matrices':
        return Factors(stacked.A.flatten(2), stacked.B.flatten(2))
    return Factors(stacked.A.flatten(), stacked.B.flatten())


def rescaled(pair: Factors, ratio: float, in_place: bool = False) -> Factors:
    """Returns `ratio` times the delta of `pair`, by A and B alike. The inverse ratio undoes it."""
    if ratio == 1:
        return pair
    root = math.sqrt(abs(ratio))
    A, B = pair if in_place else (None, None)
    return Factors(torch.mul(pair.A, root, out=A), torch.mul(pair.B, math.copysign(root, ratio), out=B))


def padded(new: Factors, target: Factors, groups: int, stacked: int = 0) -> Factors:
    """Returns `new` with zeros up to the shape of `target`, of larger rank: the same delta.

    Args:
        new: the factors.
        target: factors of the rank that is wanted.
        groups: the groups of a convolution, which part the rank too; 1 for any other layer.
        stacked: how many dimensions there are before those of one layer's factors.
    """
    if new.A.shape == target.A.shape:
        return new
    A, B = new.A.new_zeros(target.A.shape), new.B.new_zeros(target.B.shape)
    rank = new.B.shape[stacked + 1]
    A.unflatten(stacked, (groups, -1)).narrow(stacked + 1, 0, rank).copy_(new.A.unflatten(stacked, (groups, -1)))
    B.narrow(stacked + 1, 0, rank).copy_(new.B)
    return Factors(A, B)


def unpadded(pair: Factors, rank: int, groups: int) -> Factors:
    """Returns the first `rank` of the rank of `pair`: undoes `padded`."""
    if rank >= pair.A.shape[0]:
        return pair
    rank //= groups
    return Factors(pair.A.unflatten(0, (groups, -1))[:, :rank].flatten(0, 1), pair.B[:, :rank])


def is_padding_zero(pair: Factors, rank: int, groups: int) -> bool:
    """Returns whether `unpadded` loses nothing: A and B are zero beyond the first `rank`."""
    if rank >= pair.A.shape[0]:
        return True
    rank //= groups
    return not pair.A.unflatten(0, (groups, -1))[:, rank:].any() and not pair.B[:, rank:].any()
