"""The cost per sample.

Flatness: the median of the last hundred compositions of a thousand divided by that of the first hundred, and the cost
with 64 LoRAs divided by that with 4. Besides, not gated: the seconds of each of 30 samples in a row, through stock,
PEFT and the patch, from which `make figures` draws its picture.
"""
import pytest
import random
import statistics
import time
from itertools import count
from measure import Ratio, interleaved, ratio
from peft import LoraConfig, get_peft_model
from typing import Any, Callable, Dict, Tuple
from workloads import NAMES, SOURCES, TARGETS, base_model, build

from swift_patch import FusionComposer
from swift_patch.patching import reverted

SAMPLES = 30


@pytest.mark.gate
@pytest.mark.benchmark(group='flatness')
@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
def test_a_thousand_compositions_cost_the_same_from_first_to_last(gate: Callable, benchmark: Any, one_thread: None,
                                                                  merge_method: str) -> None:
    rng = random.Random(0)
    # The young one composes only while the first and the last hundred are measured, by turns with the old one: how the
    # machine itself got slower or faster in between is in both.
    old, young = (FusionComposer(build(num_hidden_layers=8), merge_method) for _ in range(2))

    def compose(composer: FusionComposer) -> float:
        sources = rng.sample(NAMES, 3)
        start = time.perf_counter()
        composer.compose(sources)
        return time.perf_counter() - start

    def medians() -> Tuple[float, float]:
        pairs = [(compose(old), compose(young)) for _ in range(100)]
        return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)

    def late_over_early() -> Ratio:
        first, first_of_young = medians()
        for _ in range(800):
            compose(old)
        last, last_of_young = medians()
        return Ratio(last / first / (last_of_young / first_of_young), {'last': last, 'first': first})

    for composer in (old, young):
        composer.reserve(max_sources=3)
        for _ in range(50):
            compose(composer)
    benchmark.pedantic(compose, args=(young, ), rounds=50)
    gate('late', merge_method, late_over_early)


@pytest.mark.gate
@pytest.mark.benchmark(group='flatness')
def test_a_composition_costs_the_same_however_many_loras_are_loaded(gate: Callable, benchmark: Any,
                                                                    one_thread: None) -> None:

    def composing(loras: int) -> Callable[[], Any]:
        composer = FusionComposer(build(names=[f'lora_{i}' for i in range(loras)], num_hidden_layers=8))
        weights = count(1)
        return lambda: composer.compose(SOURCES, [next(weights), 1, 1])

    candidates = {'64 LoRAs': composing(64), '4 LoRAs': composing(4)}
    benchmark.pedantic(candidates['64 LoRAs'], rounds=50)
    gate('loaded', '64 LoRAs', lambda: ratio(interleaved(candidates, rounds=200, warmup=50)))


def peft_model() -> Any:
    """Returns the model of `build` as a `PeftModel`."""
    config = LoraConfig(r=8, target_modules=TARGETS)
    model = get_peft_model(base_model(), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def stock_sample() -> Callable[[], None]:
    """`SwiftModel.add_weighted_adapter` of stock: one more adapter per sample, since it has no `delete_adapter`."""
    model, numbers = build(), count()
    return lambda: model.add_weighted_adapter(
        random.sample(NAMES, 3), [1 / 3] * 3, f'fused_{next(numbers)}', combination_type='linear')


def peft_sample() -> Callable[[], None]:
    """PEFT's `add_weighted_adapter` and `set_adapter`: one more adapter per sample."""
    model, numbers = peft_model(), count()

    def sample() -> None:
        name = f'fused_{next(numbers)}'
        model.add_weighted_adapter(random.sample(NAMES, 3), [1 / 3] * 3, name, combination_type='linear')
        model.set_adapter(name)

    return sample


def deleting_sample() -> Callable[[], None]:
    """The same, with the last sample's adapter deleted before: the best that a user of PEFT can do."""
    model = peft_model()

    def sample() -> None:
        if 'fused' in model.peft_config:
            model.delete_adapter('fused')
        model.add_weighted_adapter(random.sample(NAMES, 3), [1 / 3] * 3, 'fused', combination_type='linear')
        model.set_adapter('fused')

    return sample


def patch_sample() -> Callable[[], None]:
    """The patch: `FusionComposer.compose`, of the same type."""
    composer = FusionComposer(build(), combination_type='linear')
    return lambda: composer.compose(random.sample(NAMES, 3))


PATHS: Dict[str, Callable[[], Callable[[], None]]] = {
    'stock ms-swift': stock_sample,
    'PEFT add + set': peft_sample,
    'PEFT delete + add + set': deleting_sample,
    'swift_patch': patch_sample,
}


@pytest.mark.benchmark(group='samples')
@pytest.mark.parametrize('path', PATHS)
def test_seconds_per_sample(benchmark: Any, path: str) -> None:
    sample = PATHS[path]()
    if path == 'swift_patch':
        benchmark.pedantic(sample, rounds=SAMPLES)
    else:
        with reverted():
            benchmark.pedantic(sample, rounds=SAMPLES)
    benchmark.extra_info.update(subject='samples', case=path)
    if benchmark.enabled:
        benchmark.extra_info.update(samples=list(benchmark.stats.stats.data))
