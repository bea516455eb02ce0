"""Memory of a thousand compositions.

How much the memory of the process grows from the 50th composition to the 1050th, in MiB. One fused adapter of the
model takes 1 MiB (`mixture` 3 MiB): a composition that left one behind would be seen a thousandfold.
"""
import gc
import os
import psutil
import pytest
import random
from measure import Ratio
from typing import Any, Callable
from workloads import NAMES, build

from swift_patch import FusionComposer


@pytest.mark.gate
@pytest.mark.benchmark(group='memory')
@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
def test_a_thousand_compositions(gate: Callable, benchmark: Any, one_thread: None, merge_method: str) -> None:
    rng, process = random.Random(0), psutil.Process(os.getpid())
    composer = FusionComposer(build(num_hidden_layers=8), merge_method)
    composer.reserve(max_sources=3)

    def compose() -> None:
        composer.compose(rng.sample(NAMES, 3))

    def growth() -> Ratio:
        gc.collect()
        before = process.memory_info().rss
        for _ in range(1000):
            compose()
        gc.collect()
        return Ratio((process.memory_info().rss - before) / 2**20)

    benchmark.pedantic(compose, rounds=50)
    for _ in range(50):
        compose()
    gate('memory', merge_method, growth)
