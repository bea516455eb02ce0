"""Loading the m-th LoRA from a checkpoint, by `Swift.from_pretrained`.

The 100th to 104th divided by the 5th to 9th, by turns on two models of 28 LoRA layers. ms-swift loads, not this
plugin, so the number is reported and has no bound.
"""
import pytest
from itertools import count
from measure import interleaved, ratio
from pathlib import Path
from swift.tuners import Swift
from typing import Any, Callable
from workloads import build

ORDINALS = {'100th': 100, '5th': 5}


@pytest.mark.gate
@pytest.mark.benchmark(group='loading')
def test_the_hundredth_lora(gate: Callable, benchmark: Any, tmp_path: Path) -> None:
    build(names=['saved'], num_hidden_layers=4).save_pretrained(tmp_path)

    def loader(ordinal: int) -> Callable[[], Any]:
        model = build(names=[f'lora_{i}' for i in range(1, ordinal)], num_hidden_layers=4)
        ordinals = count(ordinal)
        return lambda: Swift.from_pretrained(model, tmp_path, adapter_name={'saved': f'lora_{next(ordinals)}'})

    loaders = {name: loader(ordinal) for name, ordinal in ORDINALS.items()}
    gate('loading', '100th LoRA', lambda: ratio(interleaved(loaders, rounds=5, warmup=0)))
    benchmark.pedantic(loaders['100th'], rounds=3)
