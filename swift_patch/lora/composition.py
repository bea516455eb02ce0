"""What one sample is composed of: sources, weights, and how they are merged. Checked once; a value from then on."""
from dataclasses import dataclass
from typing import AbstractSet, Any, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from ..errors import errors_of_sample, short_repr
from .combination import COMBINATION_TYPES, CombinationType, MergeOptions
from .numbers import as_number, equal_weights, is_finite_weight


@dataclass(frozen=True)
class Composition:
    """Sources, weights, and how they are merged. Made by `of`, which checks them.

    Attributes:
        sources: the names of the adapters to merge; one may be named several times. None for the base model alone.
        weights: a finite weight for each of them, of any sign.
        options: how to merge, as it was asked for.
        combination: the combination type that is applied, see `MergeOptions.applied`.
    """
    sources: Tuple[str, ...]
    weights: Tuple[float, ...]
    options: MergeOptions
    combination: CombinationType

    @classmethod
    def of(cls, sources: Iterable[str], weights: Iterable[float], options: MergeOptions) -> 'Composition':
        """Returns a composition.

        Args:
            sources: the names of the adapters.
            weights: a weight for each of them.
            options: as `MergeOptions.checked` returned them.

        Raises:
            TypeError: `sources` is not a list of strings, or `weights` not one of numbers.
            ValueError: there are no sources, or not as many weights, a weight is not finite, or a density is missing.
        """
        names = check_names(sources)
        numbers = _check_weights(weights)
        if len(names) != len(numbers):
            raise ValueError(f'adapters and weights are expected to be of one length, found {len(names)} adapters '
                             f'{short_repr(names)} and {len(numbers)} weights {short_repr(numbers)}.')
        return cls(tuple(names), tuple(numbers), options, options.applied(len(names)))

    @classmethod
    def of_sample(cls, adapters: Union[Iterable[str], Mapping[str, float]], weights: Optional[Iterable[float]],
                  options: MergeOptions) -> 'Composition':
        """Returns the composition of what a sample names: a mapping to weights, or names, with or without weights.

        Args:
            adapters: the names of the adapters, or a mapping from names to weights.
            weights: a weight for each name; by default 1/k for each of k.
            options: see `of`.

        Raises:
            TypeError: see `of`, or there are weights beside a mapping.
            ValueError: see `of`.
        """
        if isinstance(adapters, Mapping):
            if weights is not None:
                raise TypeError('weights is expected to be left out where adapters is a mapping to weights, found '
                                f'{short_repr(weights)}.')
            return cls.of(adapters.keys(), list(adapters.values()), options)
        names = check_names(adapters)
        return cls.of(names, equal_weights(len(names)) if weights is None else weights, options)

    @classmethod
    def of_batch(cls, samples: Iterable[Any], options: MergeOptions) -> 'List[Composition]':
        """Returns the composition of each sample of a batch.

        Args:
            samples: what each sample names: see `of_sample`, or a pair of both; None for the base model alone. What
                is a composition already stays one.
            options: see `of`.

        Raises:
            TypeError: see `of_sample`.
            ValueError: see `of_sample`, or there are no samples. It names the sample.
        """
        found = []
        if isinstance(samples, Mapping):
            raise TypeError(f'samples is expected to be a list with the adapters of each sample, found one sample '
                            f'{short_repr(samples)}: put it into a list.')
        every = _listed('samples', 'a list with the adapters of each sample', samples)
        for number, sample in enumerate(every):
            if isinstance(sample, cls):
                found.append(sample)
                continue
            is_pair = isinstance(sample, (tuple, list)) and len(sample) == 2 and not isinstance(sample[0], str)
            adapters, weights = sample if is_pair else (sample, None)
            if adapters is None and weights is None:
                found.append(cls((), (), options, COMBINATION_TYPES['linear']))
                continue
            with errors_of_sample(number, len(every)):
                found.append(cls.of_sample(adapters, weights, options))
        if not found:
            raise ValueError('samples is expected to hold at least one sample, found none.')
        return found

    @property
    def is_base(self) -> bool:
        """Whether no adapter is merged: the base model alone."""
        return not self.sources

    def selected(self) -> 'Composition':
        """Returns the heaviest source alone, with weight 1; of several the first."""
        heaviest = self.sources[self.weights.index(max(self.weights))]
        return Composition((heaviest, ), (1.0, ), self.options, self.options.applied(1))

    def weighted(self, factor: float) -> 'Composition':
        """Returns the same with all weights multiplied by a finite factor."""
        weights = tuple(weight * factor for weight in self.weights)
        return Composition(self.sources, weights, self.options, self.combination)


def check_names(adapters: Iterable[str]) -> List[str]:
    """Returns the names of adapters as a list.

    Raises:
        TypeError: `adapters` is not a list of strings.
        ValueError: there are none.
    """
    names = _listed('adapters', 'a list of adapter names', adapters)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f'adapters is expected to hold strings, found {short_repr(name)} in it.')
    if not names:
        raise ValueError(f'adapters is expected to name at least one adapter, found none in {short_repr(adapters)}.')
    return names


def _check_weights(weights: Iterable[float]) -> Sequence[float]:
    # Iterating these would give the keys alone, or equal weights once and in any order.
    if isinstance(weights, (Mapping, AbstractSet)):
        raise TypeError(f'weights is expected to be a list of numbers, found {short_repr(weights)}.')
    numbers = []
    for weight in _listed('weights', 'a list of numbers', weights):
        number = as_number(weight)
        if number is None:
            raise TypeError(f'weights is expected to hold numbers, found {short_repr(weight)} in it.')
        if not is_finite_weight(number):
            raise ValueError(
                f'weights is expected to hold finite numbers (of float32), found {short_repr(weight)} in it.')
        numbers.append(number)
    return numbers


def _listed(argument: str, expected: str, value: Any) -> List[Any]:
    """Returns the items of an argument that is a list of anything, or raises TypeError."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError('Its items would be its characters.')
        return list(value)
    except Exception as e:  # a value's own `__iter__` may raise anything
        raise TypeError(f'{argument} is expected to be {expected}, found {short_repr(value)}.') from e
