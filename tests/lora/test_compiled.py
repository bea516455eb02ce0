import logging
import pytest
import shutil
import torch
from models import SOURCES, WEIGHTS, add, assert_close_deltas, fresh, layers, update

from swift_patch.lora import compiled
from swift_patch.model.layers import factors_of

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='there is no C++ compiler')


def values(model):
    return [factor.detach().clone() for layer in layers(model).values() for factor in factors_of(layer, 'fused')]


@pytest.fixture(autouse=True)
def not_compiled_afterwards():
    yield
    compiled.compile_merging(False)


@pytest.fixture
def calls(monkeypatch):
    """Counts what the kernel sums, and sums it as it would before it is compiled."""
    found = []
    compiled.compile_merging()

    def kernel(*args):
        found.append(args)
        compiled._sums(*args)

    monkeypatch.setattr(compiled, '_kernel', kernel)
    return found


@needs_compiler
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_compiled_the_result_is_what_stock_would_have_made(build, dtype):
    model = build().to(dtype)
    oracle = fresh(model, ['l1', 'l3'], [0.3, -0.6], 'linear')
    add(model, SOURCES, WEIGHTS, 'linear')
    compiled.compile_merging()
    update(model, ['l1', 'l3'], [0.3, -0.6])
    assert compiled._kernel is not None
    assert_close_deltas(model, 'fused', oracle, 1e-2 if dtype == torch.bfloat16 else 1e-5)


@needs_compiler
def test_compiled_half_precision_is_rounded_once(build):
    model = build().bfloat16()
    add(model, SOURCES, WEIGHTS, 'linear')
    exact = build()
    add(exact, SOURCES, WEIGHTS, 'linear')
    for name, layer in layers(exact).items():
        for source in SOURCES:
            for new, old in zip(factors_of(layer, source), factors_of(layers(model)[name], source)):
                new.data.copy_(old)
    update(exact)
    compiled.compile_merging()
    update(model)
    pairs = list(zip(values(model), values(exact)))
    equal = sum((found == expected.bfloat16()).sum() for found, expected in pairs)
    # All but a few that are half-way between two numbers.
    assert equal > 0.99 * sum(found.numel() for found, _ in pairs)


def test_what_pytorch_compiles_no_more_is_merged_as_before(model, monkeypatch):
    oracle = fresh(model, ['l1', 'l3'], [0.3, -0.6], 'linear')
    add(model, SOURCES, WEIGHTS, 'linear')

    compiled.compile_merging()
    calls = []

    def limit(*_):
        calls.append(None)
        raise torch._dynamo.exc.FailOnRecompileLimitHit

    monkeypatch.setattr(compiled, '_kernel', limit)
    for weights in ([1.0, 1.0], [0.3, -0.6]):
        update(model, ['l1', 'l3'], weights)
    assert compiled._kernel is limit and len(calls) == 1
    assert_close_deltas(model, 'fused', oracle)


@needs_compiler
def test_compiled_or_not_average_is_the_same(model):
    add(model, SOURCES, WEIGHTS, 'average')
    eager = values(model)
    update(model, ['l3'], [1.0])
    compiled.compile_merging()
    update(model, SOURCES, WEIGHTS)
    assert compiled._kernel is not None
    for found, expected in zip(values(model), eager):
        torch.testing.assert_close(found, expected)


def test_all_layers_are_summed_in_one_call(model, calls):
    add(model, SOURCES, WEIGHTS, 'linear')
    calls.clear()
    update(model)
    assert len(calls) == 1


@pytest.mark.parametrize('combination_type', ['cat', 'svd', 'magnitude_prune'])
def test_other_types_know_no_kernel(model, calls, combination_type):
    add(model, SOURCES, WEIGHTS, combination_type, density=0.5)
    assert not calls


def test_where_compiling_fails_merging_goes_on_and_says_so_once(model, monkeypatch, caplog):
    oracle = fresh(model, ['l1', 'l3'], [0.3, -0.6], 'linear')
    add(model, SOURCES, WEIGHTS, 'linear')

    def fail(outs, *_):
        outs[0].fill_(7)
        raise RuntimeError('no compiler\nand many lines more')

    monkeypatch.setattr(compiled, '_kernel', fail)
    with caplog.at_level(logging.WARNING):
        for weights in (WEIGHTS, [0.3, -0.6]):
            update(model, ['l1', 'l3', 'l0'][:len(weights)], weights)
    assert [record.message for record in caplog.records
            ] == ['Merging goes on without a compiled kernel, for torch.compile failed: no compiler']
    assert_close_deltas(model, 'fused', oracle)


def test_an_interrupt_while_compiling_is_no_failure_of_the_compiler(model, monkeypatch):
    add(model, SOURCES, WEIGHTS, 'linear')
    before = values(model)

    def interrupt(outs, *_):
        outs[0].fill_(7)
        raise KeyboardInterrupt

    monkeypatch.setattr(compiled, '_kernel', interrupt)
    with pytest.raises(KeyboardInterrupt):
        update(model, ['l1'], [1.0])
    assert compiled._kernel is interrupt
    assert all(map(torch.equal, values(model), before))
