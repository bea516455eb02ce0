"""Sparse types against PEFT's.

One whole `update_weighted_adapter`, three sources of rank 8, density 0.4, new random weights each time, divided by what
PEFT's `add_weighted_adapter` calls to merge the same tensors, layer by layer, without the rest of it. Types that end in
`svd` decompose dense deltas on both sides, so they are measured on fewer layers.
"""
import pytest
from measure import interleaved, ratio
from typing import Any, Callable
from workloads import SOURCES, PeftMerge, Refill, build

LAYERS = {'': 24, 'svd': 1}


@pytest.fixture(scope='module')
def models() -> Any:
    """Models by the kind of type: 168 LoRA layers of hidden size 256, and 7."""
    return {kind: build(names=SOURCES, num_hidden_layers=layers) for kind, layers in LAYERS.items()}


@pytest.mark.gate
@pytest.mark.benchmark(group='sparse')
@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('method', ['ties', 'dare_linear', 'dare_ties', 'magnitude_prune'])
def test_sparse_types_against_peft(gate: Callable, benchmark: Any, models: Any, method: str, kind: str) -> None:
    name = f'{method}_{kind}' if kind else method
    update, peft = Refill(models[kind], name, f'fused_{kind}'), PeftMerge(models[kind], name)
    benchmark.pedantic(update, rounds=5)
    gate('sparse', name, lambda: ratio(interleaved({'update': update, 'PEFT': peft}, rounds=15, warmup=1)))
