"""How to merge: the combination types, what each needs, and the options of a merge. Imports no torch."""
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Dict, Iterable, Literal, Optional, Sequence

from ..errors import short_repr
from .numbers import as_number

# What factors are handed on as: those of one `layer`; the `matrices` of n layers of one shape, A (n, r, in_features)
# and B (n, out_features, r), the kernel of a convolution counted among the features; or the `elements` of any layers, A
# and B each in one row.
Form = Literal['layer', 'matrices', 'elements']

# No layer of a model has so many features that a larger rank meant anything; memory would be all it took.
_MAX_SVD_RANK = 2**16


@dataclass(frozen=True)
class CombinationType:
    """A way to merge LoRAs. `merging.merge` has the formulas.

    Attributes:
        name: the name, as `add_weighted_adapter` takes it.
        rank: the fused rank: that of all sources (`same`), their `sum`, or their `max` unless `svd_rank` is given.
        needs_density: whether the option `density` must be given.
        prunes_at_random: whether the sources are pruned at random first.
        form: the form of the factors that are merged at a time.
    """
    name: str
    rank: Literal['same', 'sum', 'max']
    needs_density: bool = False
    prunes_at_random: bool = False
    form: Form = 'layer'

    @property
    def is_random(self) -> bool:
        """Whether two merges of the same adapters differ."""
        return self.name.startswith('dare')

    def fused_rank(self, ranks: Sequence[int], svd_rank: Optional[int] = None) -> int:
        """Returns the rank of an adapter that is merged from adapters of these ranks."""
        if self.rank == 'sum':
            return sum(ranks)
        return svd_rank or max(ranks) if self.rank == 'max' else max(ranks)

    def largest_rank(self, ranks: Sequence[int], max_sources: Optional[int], svd_rank: Optional[int] = None) -> int:
        """Returns the largest rank that any `max_sources` of adapters of these ranks give; None for all of them."""
        if self.rank == 'sum':
            return sum(sorted(ranks, reverse=True)[:max_sources])
        # A single source keeps its rank whatever `svd_rank` says.
        return max(*ranks, svd_rank or 0)

    def check_ranks(self, ranks: Dict[str, int], where: str = '') -> None:
        """Raises ValueError where adapters of these ranks, by name, cannot be merged.

        Args:
            ranks: the ranks.
            where: where they have them, for the message.
        """
        if self.rank == 'same' and len(set(ranks.values())) > 1:
            raise ValueError(f'combination_type {self.name!r} expects adapters of one rank, found '
                             f"{short_repr(ranks)}{where}: use 'cat' or 'svd'.")


COMBINATION_TYPES: Dict[str, CombinationType] = {
    kind.name: kind
    for kind in (
        CombinationType('linear', 'same', form='elements'),
        CombinationType('average', 'same', form='elements'),
        CombinationType('cat', 'sum', form='matrices'),
        CombinationType('svd', 'max', form='matrices'),
        CombinationType('ties', 'same', needs_density=True, form='matrices'),
        CombinationType('ties_svd', 'max', needs_density=True),
        CombinationType('dare_linear', 'same', needs_density=True, prunes_at_random=True, form='matrices'),
        CombinationType('dare_ties', 'same', needs_density=True, prunes_at_random=True, form='matrices'),
        CombinationType('dare_linear_svd', 'max', needs_density=True),
        CombinationType('dare_ties_svd', 'max', needs_density=True),
        CombinationType('magnitude_prune', 'same', needs_density=True, form='matrices'),
        CombinationType('magnitude_prune_svd', 'max', needs_density=True),
    )
}

# LoraRetriever's ways to use several LoRAs (arXiv:2402.09997, §4.2), each with its combination type.
MERGE_METHODS = {'fusion': 'average', 'mixture': 'cat', 'selection': 'linear'}


@dataclass(frozen=True)
class MergeOptions:
    """How to merge: the arguments of `add_weighted_adapter` behind the sources.

    Attributes:
        merge_method: `mixture` or `selection` where that is what was asked for: they are defined by the delta, whatever
            the type that they are merged by makes of the sources.
    """
    combination_type: str = 'svd'
    svd_rank: Optional[int] = None
    svd_clamp: Optional[float] = None
    svd_full_matrices: bool = True
    svd_driver: Optional[str] = None
    density: Optional[float] = None
    majority_sign_method: Literal['total', 'frequency'] = 'total'
    merge_method: Optional[str] = None

    def checked(self) -> 'MergeOptions':
        """Returns these options with Python's own numbers.

        Raises:
            ValueError: one of them is not one of its values.
        """
        numbers = {name: as_number(getattr(self, name)) for name in ('svd_clamp', 'density')}
        rank = self.svd_rank

        def is_in(name: str, low: float, high: float) -> bool:
            number = numbers[name]
            return getattr(self, name) is None or (number is not None and low <= number <= high)

        def is_one_of(name: str, values: Iterable[str]) -> bool:
            value = getattr(self, name)
            return isinstance(value, str) and value in values

        def expect(name: str, expected: str, is_right: bool) -> None:
            if not is_right:
                raise ValueError(f'{name} is expected to be {expected}, found {short_repr(getattr(self, name))}.')

        expect('combination_type', f'one of {list(COMBINATION_TYPES)}', is_one_of('combination_type',
                                                                                  COMBINATION_TYPES))
        # PEFT takes 0 for None.
        expect(
            'svd_rank', f'an integer from 1 to {_MAX_SVD_RANK} or None', rank is None
            or (isinstance(rank, Integral) and not isinstance(rank, bool) and 0 <= rank <= _MAX_SVD_RANK))
        expect('svd_clamp', 'a quantile from 0 to 1 or None', is_in('svd_clamp', 0, 1))
        expect('svd_full_matrices', 'True or False', isinstance(self.svd_full_matrices, bool))
        expect('svd_driver', "'gesvd', 'gesvdj', 'gesvda' or None", self.svd_driver is None
               or is_one_of('svd_driver', ('gesvd', 'gesvdj', 'gesvda')))
        # PEFT allows more than 1, which prunes nothing.
        expect('density', 'the fraction of values to keep, from 0 to 1', is_in('density', 0, 2**31))
        expect('majority_sign_method', "'total' or 'frequency'",
               is_one_of('majority_sign_method', ('total', 'frequency')))
        return replace(
            self,
            svd_rank=None if rank is None else int(rank),
            svd_clamp=numbers['svd_clamp'],
            density=numbers['density'])

    def applied(self, count: int) -> CombinationType:
        """Returns the combination type by which `count` sources are merged: a single one by `linear`, as in PEFT,
        unless by `average`.

        Raises:
            ValueError: it needs a density, and there is none.
        """
        is_linear = count == 1 and self.combination_type != 'average'
        found = COMBINATION_TYPES['linear' if is_linear else self.combination_type]
        if found.needs_density and self.density is None:
            raise ValueError(f'combination_type {found.name!r} expects a density, the fraction of values to keep, '
                             'found None: give one from 0 to 1.')
        return found


def options_of_method(merge_method: str, combination_type: Optional[str] = None, **options: Any) -> MergeOptions:
    """Returns how a composer with these arguments merges.

    Args:
        merge_method: `fusion`, `mixture` or `selection`.
        combination_type: any type of `add_weighted_adapter`, instead of `merge_method`.
        **options: the other fields of `MergeOptions`.

    Raises:
        ValueError: an argument is not one of its values, or they do not go together.
    """
    if not isinstance(merge_method, str) or merge_method not in MERGE_METHODS:
        raise ValueError(
            f'merge_method is expected to be one of {list(MERGE_METHODS)}, found {short_repr(merge_method)}.')
    if merge_method == 'selection' and combination_type is not None:
        raise ValueError("merge_method 'selection' is expected to have no combination_type, for it takes one source "
                         f'alone, found {short_repr(combination_type)}: leave it out.')
    is_by_delta = combination_type is None and merge_method != 'fusion'
    name = MERGE_METHODS[merge_method] if combination_type is None else combination_type
    found = MergeOptions(combination_type=name, merge_method=merge_method if is_by_delta else None, **options).checked()
    # As for several sources, which is what a composer is for.
    found.applied(2)
    return found
