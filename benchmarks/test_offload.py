"""`set_active_adapters(..., offload='cpu')` where all is on the CPU already.

On 168 LoRA layers with 14 LoRAs, divided by the yardstick of `test_switching`. Stock, which collects garbage for each
layer of each LoRA, is measured once, and with the patch beside, on 14 layers with 3 LoRAs.
"""
import pytest
from test_switching import over_lookup
from typing import Any, Callable
from workloads import NAMES, SOURCES, build

from swift_patch.patching import reverted


def offload(model: Any) -> None:
    """Activates the first LoRA, and offloads all others."""
    model.set_active_adapters(NAMES[0], offload='cpu')


@pytest.mark.gate
@pytest.mark.benchmark(group='offload')
def test_nothing_to_move(gate: Callable, benchmark: Any) -> None:
    model = build()
    benchmark.pedantic(offload, args=(model, ), rounds=50)
    gate('offload', 'nothing to move', lambda: over_lookup(model, 'offload', lambda: offload(model)))


@pytest.mark.benchmark(group='offload, 14 layers, 3 LoRAs')
@pytest.mark.parametrize('path', ['patch', 'stock'])
def test_stock_and_patch(benchmark: Any, path: str) -> None:
    model = build(names=SOURCES, num_hidden_layers=2)
    if path == 'patch':
        benchmark.pedantic(offload, args=(model, ), rounds=20, warmup_rounds=1)
    else:
        with reverted():
            benchmark.pedantic(offload, args=(model, ), rounds=1)
    benchmark.extra_info.update(subject='offload', case=path)
