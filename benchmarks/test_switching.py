"""`set_active_adapters`, on 168 LoRA layers with 14 LoRAs.

The yardstick is a plain Python loop that looks an adapter's `lora_A` up in each of those layers: what any code that
asks every layer something pays: 0.43 ms where the bounds were chosen.
"""
import pytest
from itertools import cycle
from measure import Ratio, interleaved, ratio
from typing import Any, Callable
from workloads import NAMES, SOURCES, build, lora_layers, random_weights

from swift_patch.patching import reverted


@pytest.fixture(scope='module')
def model() -> Any:
    """A model with one active LoRA. Benchmarks share it: they switch, and change no more."""
    model = build()
    model.set_active_adapters(NAMES[0])
    return model


def over_lookup(model: Any, name: str, candidate: Callable[[], Any]) -> Ratio:
    """Measures `candidate` against the yardstick."""
    layers = lora_layers(model)

    def lookup() -> None:
        for layer in layers:
            layer.lora_A[NAMES[-1]]

    return ratio(interleaved({name: candidate, 'lookup': lookup}, rounds=200))


def switching(model: Any) -> Callable[[], None]:
    """Returns what activates another LoRA at each call."""
    names = cycle(NAMES[:2])
    return lambda: model.set_active_adapters(next(names))


@pytest.mark.gate
@pytest.mark.benchmark(group='switching')
def test_what_changes_nothing(gate: Callable, benchmark: Any, model: Any) -> None:

    def nothing() -> None:
        model.set_active_adapters(NAMES[0])

    benchmark.pedantic(nothing, rounds=50)
    gate('switching', 'nothing changes', lambda: over_lookup(model, 'set', nothing))


@pytest.mark.gate
@pytest.mark.benchmark(group='switching')
def test_a_switch(gate: Callable, benchmark: Any, model: Any) -> None:
    switch = switching(model)
    benchmark.pedantic(switch, rounds=50)
    gate('switching', 'another LoRA', lambda: over_lookup(model, 'set', switch))


@pytest.mark.benchmark(group='switching')
def test_stock_switches(benchmark: Any, model: Any) -> None:
    with reverted():
        benchmark.pedantic(switching(model), rounds=3)
    benchmark.extra_info.update(subject='switching', case='stock')


@pytest.mark.gate
@pytest.mark.benchmark(group='switching')
def test_a_switch_among_fused_adapters(gate: Callable, benchmark: Any) -> None:
    # A model of its own, for they stay.
    model = build()
    for i in range(60):
        model.add_weighted_adapter(SOURCES, random_weights(), f'fused_{i}', 'linear')
    switch = switching(model)
    benchmark.pedantic(switch, rounds=50)
    gate('switching', 'another LoRA, 60 fused besides', lambda: over_lookup(model, 'set', switch))
