"""The combination types that keep a fraction of the values: `ties`, `magnitude_prune`, `dare_linear`, `dare_ties`.

They are points on two axes: which values are kept (the largest, or any at random), and how what is kept is combined
(`linear`, or the elected sign alone).
"""
import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune, reshape_weight_task_tensors
from torch import Tensor
from typing import Sequence

from .combination import MergeOptions
from .factors import Factors
from .merging import MergeFunction, Task, by_side, linear, root_weights


def elected(task: Task) -> Factors:
    """`linear` of the values alone that have the sign of the majority, averaged over those (TIES, Yadav et al. 2023,
    arXiv:2306.01708)."""

    def combine(tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        stacked = torch.stack(list(tensors))
        is_elected = calculate_majority_sign_mask(stacked, task.options.majority_sign_method)
        weighted = stacked * reshape_weight_task_tensors(stacked, torch.tensor(weights).to(out.device))
        out.copy_(disjoint_merge(weighted, is_elected))

    return by_side(task, root_weights(task.sources), combine)


def _of_largest(combine: MergeFunction) -> MergeFunction:
    """Returns `combine` of what is left of A and of B in each layer when only the largest values are kept."""

    def merge(task: Task) -> Factors:
        density = _density(task.options)
        kept = [
            source._replace(A=_largest(source.A, density), B=_largest(source.B, density)) for source in task.sources
        ]
        return combine(task._replace(sources=kept))

    return merge


def pruned_at_random(tensor: Tensor, options: MergeOptions) -> Tensor:
    """Returns a tensor with `density` of its values, as PEFT draws them (DARE, Yu et al. 2023, arXiv:2311.03099)."""
    pruned: Tensor = prune(tensor, _density(options), 'random', rescale=True)
    return pruned


def _density(options: MergeOptions) -> float:
    assert options.density is not None  # `MergeOptions.applied` sees to it.
    return options.density


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Returns a tensor with the values of largest magnitude in each layer, as PEFT's `prune` keeps them one by one."""
    if density >= 1:
        pruned: Tensor = prune(tensor, density, 'magnitude')
        return pruned
    rows = tensor.flatten(1)
    largest = rows.abs().topk(int(density * rows.shape[1])).indices
    return torch.zeros_like(rows).scatter_(1, largest, rows.gather(1, largest)).view(tensor.shape)


ties = _of_largest(elected)
magnitude_prune = _of_largest(linear)
# Of sources that were pruned before, see `pruned_at_random`.
dare_linear = linear
dare_ties = elected
