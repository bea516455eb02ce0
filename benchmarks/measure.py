"""Timing by turns, so that what else the machine is doing hits all candidates alike."""
import gc
import statistics
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence

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
    return _by_turns({name: lambda of_one=of_one: timed(of_one) for name, of_one in candidates.items()}, rounds, limit)


def in_blocks(candidates: Mapping[str, Callable[[], Callable[[], Any]]],
              blocks: int = 9,
              calls: int = 20,
              warmup: int = 3,
              limit: float = 4.0) -> Dict[str, List[float]]:
    """Times candidates by turns, each for a block of calls: what runs again and again has its memory in the caches of
    the CPU, which call by call the others would take.

    Args:
        candidates: by name, what prepares a block, untimed, and returns what to time.
        blocks: how many blocks of each.
        calls: how many calls in a block.
        warmup: how many before, untimed.
        limit: see `interleaved`.

    Returns:
        The median of each block, by candidate.
    """

    def block(prepare: Callable[[], Callable[[], Any]]) -> float:
        call = prepare()
        for _ in range(warmup):
            call()
        return statistics.median(timed(call) for _ in range(calls))

    return _by_turns({name: lambda of_one=of_one: block(of_one) for name, of_one in candidates.items()}, blocks, limit)


def timed(call: Callable[..., Any], *args: Any) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def _by_turns(measures: Mapping[str, Callable[[], float]], rounds: int, limit: float) -> Dict[str, List[float]]:
    """Measures by turns, see `interleaved`."""
    found: Dict[str, List[float]] = {name: [] for name in measures}
    order = list(measures)
    with _without_collections():
        end = time.perf_counter() + limit
        for i in range(rounds):
            if i >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name in order:
                found[name].append(measures[name]())
            # What runs first finds other caches than what runs second.
            order.reverse()
    return found


@contextmanager
def _without_collections() -> Iterator[None]:
    """Within it, Python collects no garbage; it did before."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def ratio(seconds: Mapping[str, Sequence[float]]) -> Ratio:
    """Returns how many times as long the first of two candidates took as the second: the median over the rounds.

    Each round is a ratio of its own: two runs side by side share the machine's mood, two medians may not.
    """
    value = statistics.median(first / second for first, second in zip(*seconds.values()))
    return Ratio(value, {name: statistics.median(of_one) for name, of_one in seconds.items()})
