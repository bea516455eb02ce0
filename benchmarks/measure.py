"""Timing by turns, so that what else the machine is doing hits all candidates alike."""
import gc
import statistics
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence

LEAST_ROUNDS = 5


class Ratio(NamedTuple):
    """One measurement of a gated number.

    Attributes:
        value: what is compared with the bound.
        seconds: what it was computed from, by name; empty where it is not made of times.
    """
    value: float
    seconds: Mapping[str, float] = {}


def interleaved(candidates: Mapping[str, Callable[[], Any]],
                rounds: int = 25,
                warmup: int = 3,
                limit: float = 4.0) -> Dict[str, List[float]]:
    """Times candidates by turns, in an order that alternates, without garbage collections in between.

    Args:
        candidates: what to time, by name.
        rounds: how often each is timed.
        warmup: how often each is run before.
        limit: seconds after which no further round begins, the first `LEAST_ROUNDS` aside.

    Returns:
        The seconds of each candidate, by round.
    """
    for _ in range(warmup):
        for candidate in candidates.values():
            candidate()
    seconds: Dict[str, List[float]] = {name: [] for name in candidates}
    order = list(candidates)
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + limit
        for i in range(rounds):
            if i >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name in order:
                start = time.perf_counter()
                candidates[name]()
                seconds[name].append(time.perf_counter() - start)
            # What runs first finds other caches than what runs second.
            order.reverse()
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]]) -> Ratio:
    """Returns how many times as long the first of two candidates took as the second: the median over the rounds.

    Each round is a ratio of its own: two runs side by side share the machine's mood, two medians may not.
    """
    value = statistics.median(first / second for first, second in zip(*seconds.values()))
    return Ratio(value, {name: statistics.median(of_one) for name, of_one in seconds.items()})
