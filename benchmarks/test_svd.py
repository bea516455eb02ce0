"""Low-rank SVD against PEFT's of the dense delta.

One whole `update_weighted_adapter` of type `svd`, three sources of rank 8, new random weights each time, divided by
what PEFT's `add_weighted_adapter` calls to merge the same tensors, layer by layer, without the rest of it. PEFT takes
seconds, so it is measured twice per attempt. Both sides are on one thread: where another process had one of two cores,
LAPACK on two threads took more than 40 s for what takes 6 s on one, which makes any bound hold.
"""
import pytest
from measure import interleaved, ratio
from torch import nn
from typing import Any, Callable
from workloads import SOURCES, PeftMerge, Refill, build, with_loras, without_memory

# The largest layer of Qwen2.5-0.5B, and seven in each of 24 layers of hidden size 256.
MODELS = {
    'one 896x4864 layer':
    lambda: with_loras(
        without_memory(nn.ModuleDict({'down_proj': nn.Linear(4864, 896)})), SOURCES, targets=['down_proj']),
    '168 layers, hidden 256':
    lambda: build(names=SOURCES),
}


@pytest.mark.gate
@pytest.mark.benchmark(group='svd')
@pytest.mark.parametrize('case', MODELS)
def test_low_rank_svd_against_dense(gate: Callable, benchmark: Any, one_thread: None, case: str) -> None:
    model = MODELS[case]()
    update, peft = Refill(model, 'svd'), PeftMerge(model, 'svd')
    benchmark.pedantic(update, rounds=10)
    gate('svd', case, lambda: ratio(interleaved({'update': update, 'PEFT': peft}, rounds=2, warmup=0)))
