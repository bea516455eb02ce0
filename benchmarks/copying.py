"""The limit of a merge: what copying takes that reads and writes as many elements.

A merge of k sources of P elements reads k·P and writes P. One `Tensor.copy_` of (k + 1)·P / 2 elements, from one buffer
to another, reads as many as it writes: (k + 1)·P in all, too. That is 2P for three sources, for `cat` as well, whose
result holds 3·P.

The copy is timed on two threads and on one, and the faster of the two counts. On a machine of their own that is the one
on two. Where another process has one of two cores, threads wait for each other at the end of every copy: one of 13 MB
took 12 ms on two threads then, and 2 ms on one. Divided by the former, a slow merge would seem a fast one.
"""
import statistics
import torch
from measure import Ratio, ratio
from typing import Any, Callable, Dict, Mapping, Sequence


def copies_of(elements: int, sources: int, dtype: torch.dtype) -> Dict[str, Callable[[], Any]]:
    """Returns what copies as much memory as a merge of so many sources moves, by name.

    Args:
        elements: how many elements a source has.
        sources: how many sources.
        dtype: their dtype.
    """
    source = torch.rand((sources + 1) * elements // 2).to(dtype)
    target = source.clone()

    def copy_on_one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        target.copy_(source)
        torch.set_num_threads(threads)

    return {'copy': lambda: target.copy_(source), 'copy on 1 thread': copy_on_one_thread}


def over_copy(seconds: Mapping[str, Sequence[float]], name: str, copies: Mapping[str, Any]) -> Ratio:
    """Returns how many times as long a candidate took as the faster copy."""
    copy = min(copies, key=lambda copy: statistics.median(seconds[copy]))
    return ratio({name: seconds[name], copy: seconds[copy]})
