"""Which samples of a dataset are answered together."""
import itertools
from typing import Collection, Iterator, List, Mapping, Optional

# Batches whose samples are looked at together. A run that is killed loses as many at most.
_WINDOW = 4


def looked_at(numbers: Collection[int], count: int, max_batch_size: int) -> List[int]:
    """Returns the samples whose lengths `batches` needs, to find the batches that some samples are in.

    Args:
        numbers: Some samples, by number.
        count: How many samples the dataset has.
        max_batch_size: How many samples a batch has at most.
    """
    window = _WINDOW * max_batch_size
    begins = sorted({number // window * window for number in numbers})
    return [number for begin in begins for number in range(begin, min(begin + window, count))]


def batches(lengths: Mapping[int, Optional[int]], max_batch_size: int) -> Iterator[List[int]]:
    """Yields the samples of a dataset, by number, that are answered together.

    Samples of similar length go together, for a batch costs what its longest prompt does; but only within a few batches
    that follow one another, so that results can be written in the order of the dataset. It is the same whichever of the
    samples are finished, so that a run that goes on computes what an undisturbed one does.

    Args:
        lengths: How many tokens the prompt of each sample has, by its number, None where that is not known. Samples
            that cannot be answered are left out.
        max_batch_size: How many samples a batch has at most.
    """
    for _, window in itertools.groupby(sorted(lengths), lambda number: number // (_WINDOW * max_batch_size)):
        numbers = list(window)
        if max_batch_size > 1:
            # The order among equal lengths is kept.
            numbers.sort(key=lambda number: lengths[number] or 0)
        for first in range(0, len(numbers), max_batch_size):
            yield numbers[first:first + max_batch_size]
