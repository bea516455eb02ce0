"""The part `refill` of `swift-patch upstream`: the seconds of the first, the tenth and the sixtieth sample in a row,
through stock, the part and the plugin.

Not gated. As a program, `python benchmarks/test_upstream.py`, it prints the figures in the text of the part, in ten
minutes, of which stock takes nearly all.
"""
import pytest
import random
import statistics
import time
import torch
from itertools import count
from swift.tuners import SwiftModel
from typing import Any, Callable, Dict, List
from workloads import NAMES, build, options

from swift_patch.patching import reverted
from swift_patch.upstream import refill

SAMPLES = 60
SHOWN = (1, 10, 60)


def stock(combination_type: str, depth: int) -> Callable[[], None]:
    """Returns what makes a new adapter for each sample."""
    model, numbers = build(num_hidden_layers=depth), count()
    return lambda: model.add_weighted_adapter(
        random.sample(NAMES, 3), [1 / 3] * 3, f'fused_{next(numbers)}', combination_type, **options(combination_type))


def part(combination_type: str, depth: int) -> Callable[[], None]:
    """Returns what refills an adapter by the part."""
    model = build(num_hidden_layers=depth)
    model.add_weighted_adapter(NAMES[:3], [1 / 3] * 3, 'fused', combination_type, **options(combination_type))
    model.adapters['fused'].weighted = True
    SwiftModel._get_lora_weights = vars(refill.SwiftModel)['_get_lora_weights']
    update = refill.SwiftModel.update_weighted_adapter
    return lambda: update(model, random.sample(NAMES, 3), [1 / 3] * 3, 'fused', combination_type,
                          **options(combination_type))


def plugin(combination_type: str, depth: int) -> Callable[[], None]:
    """Returns what refills an adapter by the plugin."""
    model = build(num_hidden_layers=depth)
    model.add_weighted_adapter(NAMES[:3], [1 / 3] * 3, 'fused', combination_type, **options(combination_type))
    return lambda: model.update_weighted_adapter(
        random.sample(NAMES, 3), [1 / 3] * 3, 'fused', combination_type, **options(combination_type))


WAYS: Dict[str, Callable[[str, int], Callable[[], None]]] = {'stock': stock, 'part': part, 'plugin': plugin}


def seconds(way: str, combination_type: str, depth: int = 24) -> List[float]:
    """Returns how long each sample took."""
    if way == 'plugin':
        return _seconds(WAYS[way](combination_type, depth))
    with reverted():
        return _seconds(WAYS[way](combination_type, depth))


def _seconds(sample: Callable[[], None]) -> List[float]:
    found = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        sample()
        found.append(time.perf_counter() - start)
    return found


def around(found: List[float], number: int) -> float:
    """Returns the median of a sample and its neighbours."""
    return statistics.median(found[max(0, number - 3):number + 2])


@pytest.mark.benchmark(group='upstream')
@pytest.mark.parametrize('way', WAYS)
def test_seconds_per_sample_of_the_part(benchmark: Any, way: str) -> None:
    if not benchmark.enabled:
        pytest.skip('measured by `make bench`')
    found = benchmark.pedantic(seconds, args=(way, 'linear', 4), rounds=1)
    benchmark.extra_info.update(subject='upstream', case=way, samples=found)


if __name__ == '__main__':
    torch.set_num_threads(1)
    print('| type | way | ' + ' | '.join(f'N = {number}' for number in SHOWN) + ' |')
    print('| --- | --- |' + ' ---: |' * len(SHOWN))
    for each in ('linear', 'cat'):
        for name in WAYS:
            row = seconds(name, each)
            print(f'| `{each}` | {name} | ' + ' | '.join(f'{around(row, number):.3g}' for number in SHOWN) + ' |')
