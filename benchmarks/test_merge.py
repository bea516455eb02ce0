"""Merge against copy.

One whole `update_weighted_adapter` of a `SwiftModel`: three sources, new random weights each time, into a fused adapter
that was refilled a few times before. It is divided by its limit, see `copying.py`.

`compiled` is after `swift_patch.compile_merging()`, which needs a C++ compiler.
"""
import pytest
import torch
from copying import copies_of, over_copy
from measure import Ratio, interleaved
from typing import Any, Callable, Dict, Tuple
from workloads import SOURCES, Refill, base_model, elements, with_loras

import swift_patch
from swift_patch.lora import compiled as kernel

# By name: the shape, the rank and the dtype.
SIZES: Dict[str, Tuple[str, int, torch.dtype]] = {
    '0.8M fp32': ('small', 8, torch.float32),
    '9.2M fp32': ('Qwen2.5-1.5B', 8, torch.float32),
    '9.2M bf16': ('Qwen2.5-1.5B', 8, torch.bfloat16),
    '40M fp32': ('Qwen2.5-7B', 16, torch.float32),
    '40M bf16': ('Qwen2.5-7B', 16, torch.bfloat16),
}


@pytest.fixture(scope='module', params=SIZES)
def size(request: pytest.FixtureRequest) -> Tuple[str, Any, Dict[str, Callable[[], Any]]]:
    """A size's name, its model, and the copies."""
    shape, rank, dtype = SIZES[request.param]
    # A base of this dtype, too: an adapter that PEFT adds for `cat` has that.
    model = with_loras(base_model(shape, dtype), SOURCES, rank, dtype=dtype)
    return request.param, model, copies_of(elements(model, SOURCES[0]), len(SOURCES), dtype)


@pytest.mark.gate
@pytest.mark.benchmark(group='merge')
@pytest.mark.parametrize('way', ['linear', 'average', 'cat', 'linear compiled', 'average compiled'])
def test_merge_against_copy(gate: Callable, benchmark: Any, size: Tuple[str, Any, Dict[str, Callable[[], Any]]],
                            way: str, compiled_only_here: None) -> None:
    name, model, copies = size
    combination_type, *compiled = way.split()
    swift_patch.compile_merging(bool(compiled))
    update = Refill(model, combination_type, 'wide' if combination_type == 'cat' else 'fused')

    def against_copy() -> Ratio:
        return over_copy(interleaved({'update': update, **copies}), 'update', copies)

    benchmark.pedantic(update, rounds=10)
    gate('merge', f'{name} {way}', against_copy)
    # Or compiling failed, which was logged.
    assert bool(kernel._kernel) == bool(compiled)
