"""Timing by turns."""
import gc
import measure
import pytest
from measure import in_blocks, interleaved, ratio
from types import SimpleNamespace
from typing import Any


def test_candidates_take_turns_in_an_order_that_alternates_without_the_garbage_collector() -> None:
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append((name, gc.isenabled()))
                           for name in 'ab'},
                          rounds=3,
                          warmup=1)
    assert calls == [('a', True), ('b', True), *((name, False) for name in 'abbaab')]
    assert {name: len(of_one) for name, of_one in seconds.items()} == {'a': 3, 'b': 3}
    assert gc.isenabled()


def test_the_garbage_collector_is_back_where_a_candidate_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        interleaved({'fails': lambda: 1 / 0}, warmup=0)
    assert gc.isenabled()


def test_no_round_begins_beyond_the_limit_but_the_first_five() -> None:
    assert len(interleaved({'a': int}, rounds=50, limit=0)['a']) == 5


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The machine was ten times slower in the last two rounds.
    found = ratio({'one': [2, 2, 20, 30], 'other': [1, 1, 10, 10]})
    assert found.value == 2
    assert found.seconds == {'one': 11, 'other': 5.5}


def test_blocks_take_turns_and_what_prepares_one_is_not_timed() -> None:
    calls = []

    def prepare(name: str) -> Any:
        calls.append(f'prepare {name}')
        return lambda: calls.append((name, gc.isenabled()))

    seconds = in_blocks({name: lambda name=name: prepare(name) for name in 'ab'}, blocks=2, calls=2, warmup=1)
    assert calls == [entry for name in 'abba' for entry in (f'prepare {name}', *[(name, False)] * 3)]
    assert {name: len(of_one) for name, of_one in seconds.items()} == {'a': 2, 'b': 2}


def test_a_block_is_the_median_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = 0.0, iter([50, 7, 2, 3])

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def prepare() -> Any:
        passes(200)
        return lambda: passes(next(durations))

    monkeypatch.setattr(measure, 'time', SimpleNamespace(perf_counter=lambda: now))
    assert in_blocks({'a': prepare}, blocks=1, calls=3, warmup=1) == {'a': [3]}
