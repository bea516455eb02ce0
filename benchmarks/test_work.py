"""The work of one sample, counted: operations, elements that are written, functions that are called, looks taken.

Three of 14 LoRAs of rank 8 in 168 LoRA layers are composed anew. What is gated here is a matter of the code alone, so
that the bounds hold on a busy machine, too; what the same costs in time is reported by the other benchmarks.
"""
import pytest
import random
from typing import Any, Callable
from work import calls, counted, over, writes
from workloads import NAMES, SOURCES, Refill, build, elements, lora_layers

from swift_patch import FusionComposer
from swift_patch.model import packing
from swift_patch.model.index import LoraIndex


@pytest.fixture(scope='module')
def model() -> Any:
    """The model. Benchmarks share it."""
    return build()


@pytest.mark.gate
@pytest.mark.benchmark(group='work')
@pytest.mark.parametrize('combination_type', ['linear', 'average', 'cat'])
def test_what_a_refill_writes(gate: Callable, benchmark: Any, model: Any, combination_type: str) -> None:
    update = Refill(model, combination_type, f'fused_{combination_type}')
    benchmark.pedantic(update, rounds=3)
    gate('operations', combination_type, lambda: over(writes(update).operations, 1))
    gate('elements', combination_type, lambda: over(writes(update).elements, elements(model, SOURCES[0])))


def composing(loras: int) -> Callable[[], Any]:
    """Returns what composes three random LoRAs out of so many."""
    names = [f'lora_{i}' for i in range(loras)]
    composer, rng = FusionComposer(build(names=names)), random.Random(0)
    composer.reserve(max_sources=3)

    def sample() -> None:
        with composer.fused(rng.sample(names, 3)):
            pass

    for _ in range(60):
        sample()
    return sample


@pytest.mark.gate
@pytest.mark.benchmark(group='work')
def test_what_a_sample_calls(gate: Callable, benchmark: Any, model: Any) -> None:
    layers, sample = len(lora_layers(model)), composing(len(NAMES))
    benchmark.pedantic(sample, rounds=3)
    gate('calls', '168 layers, 14 LoRAs', lambda: over(calls(sample), layers))
    gate('looks', 'at the tree of modules', lambda: over(counted(LoraIndex, 'look', sample), 1))
    gate('looks', 'at the memory of an adapter', lambda: over(counted(packing.Layout, 'is_current', sample), 4))
    first = calls(sample)
    for _ in range(500):
        sample()
    gate('calls', 'sample 600 over sample 60', lambda: over(calls(sample), first))
    more = composing(64)
    gate('calls', '64 LoRAs over 14', lambda: over(calls(more), first))


@pytest.mark.gate
@pytest.mark.benchmark(group='work')
def test_what_switching_calls(gate: Callable, benchmark: Any) -> None:
    model = build()
    layers = len(lora_layers(model))
    model.set_active_adapters(NAMES[0])

    def nothing() -> None:
        model.set_active_adapters(NAMES[0])

    def offload() -> None:
        model.set_active_adapters(NAMES[0], offload='cpu')

    offload()
    benchmark.pedantic(nothing, rounds=3)
    gate('calls', 'set_active_adapters, nothing changes', lambda: over(calls(nothing), layers))
    gate('calls', 'offload, nothing to move', lambda: over(calls(offload), layers))
