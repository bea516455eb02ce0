"""Which function merges by which combination type."""
from typing import Dict

from . import decomposed, merging, sparse
from .factors import Factors
from .merging import MergeFunction, Task

_FORMULAS: Dict[str, MergeFunction] = {
    'linear': merging.linear,
    'average': merging.average,
    'cat': merging.cat,
    'svd': decomposed.svd,
    'ties': sparse.ties,
    'ties_svd': decomposed.ties_svd,
    'dare_linear': sparse.dare_linear,
    'dare_ties': sparse.dare_ties,
    'dare_linear_svd': decomposed.dare_linear_svd,
    'dare_ties_svd': decomposed.dare_ties_svd,
    'magnitude_prune': sparse.magnitude_prune,
    'magnitude_prune_svd': decomposed.magnitude_prune_svd,
}


def merge(combination_type: str, task: Task) -> Factors:
    """Returns the fused factors of a task by a combination type. Changes nothing but, perhaps, `task.out`."""
    return _FORMULAS[combination_type](task)
