"""Merge against copy.

One whole `update_weighted_adapter` of a `SwiftModel`: three sources, new random weights each time, into a fused adapter
that was refilled a few times before. It is divided by one `Tensor.copy_` of 4·P elements of the same dtype, from one
buffer to another, where P is what one source holds: three sources and one result, for `cat` too, whose result holds
3·P.

The copy is timed on two threads and on one, and the faster of the two counts. On a machine of their own that is the one
on two. Where another process has one of two cores, threads wait for each other at the end of every copy: one of 13 MB
took 12 ms on two threads then, and 2 ms on one. Divided by the former, a slow merge would seem a fast one.

`compiled` is after `swift_patch.compile_merging()`, which needs a C++ compiler.
"""
import pytest
import statistics
import torch
from measure import Ratio, interleaved, ratio
from typing import Any, Callable, Dict, Iterator, Tuple
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
    source = torch.rand((len(SOURCES) + 1) * elements(model, SOURCES[0])).to(dtype)
    target = source.clone()

    def copy_on_one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        target.copy_(source)
        torch.set_num_threads(threads)

    return request.param, model, {'copy': lambda: target.copy_(source), 'copy on 1 thread': copy_on_one_thread}


@pytest.fixture
def compiled_only_here() -> Iterator[None]:
    yield
    swift_patch.compile_merging(False)


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
        seconds = interleaved({'update': update, **copies})
        copy = min(copies, key=lambda copy: statistics.median(seconds[copy]))
        return ratio({'update': seconds['update'], copy: seconds[copy]})

    benchmark.pedantic(update, rounds=10)
    gate('merge', f'{name} {way}', against_copy)
    # Or compiling failed, which was logged.
    assert bool(kernel._kernel) == bool(compiled)
