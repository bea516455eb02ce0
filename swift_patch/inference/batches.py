"""Which samples of a dataset are answered together."""
from typing import Iterator, List, Optional, Sequence

# Batches whose samples are looked at together. A run that is killed loses as many at most.
_WINDOW = 4


def batches(lengths: Sequence[Optional[int]], max_batch_size: int) -> Iterator[List[int]]:
    """Yields the samples of a dataset, by number, that are answered together.

    Samples of similar length go together, for a batch costs what its longest prompt does; but only within a few batches
    that follow one another, so that results can be written in the order of the dataset. It is the same whichever of the
    samples are finished, so that a run that goes on computes what an undisturbed one does.

    Args:
        lengths: How many tokens the prompt of each sample has, None where that is not known.
        max_batch_size: How many samples a batch has at most.
    """
    window = _WINDOW * max_batch_size
    for begin in range(0, len(lengths), window):
        numbers = list(range(begin, min(begin + window, len(lengths))))
        # The order among equal lengths is kept.
        numbers.sort(key=lambda number: lengths[number] or 0)
        for first in range(0, len(numbers), max_batch_size):
            yield numbers[first:first + max_batch_size]
