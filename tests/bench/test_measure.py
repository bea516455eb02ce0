"""Both paths compose the same samples, each as its users do, and only composing is timed."""
import pytest
import torch
import weakref
from contextlib import contextmanager
from models import assert_close_deltas, layers
from typing import Any, Dict, List

import swift_patch
from swift_patch.bench import measure
from swift_patch.bench.measure import (BenchConfig, Sample, describe_model, random_samples, run_bench,
                                       seconds_composing, stock_composing)
from swift_patch.synthetic.tiny_model import MODEL_TYPE

NAMES = ['l0', 'l1', 'l2', 'l3']


@contextmanager
def no_stage(description: str, total: int) -> Any:
    yield lambda: None


def make_config(written: Any, kind: str, names: List[str] = NAMES, **changes: Any) -> BenchConfig:
    model_dir, paths = written
    swift_args = {'model': model_dir, 'model_type': MODEL_TYPE, 'torch_dtype': 'float32', 'device_map': 'cpu'}
    return BenchConfig({name: paths[kind][name] for name in names}, swift_args=swift_args, samples=4, **changes)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> List[Dict[str, Any]]:
    """What each path has measured, in the end of it."""
    found, original = [], measure._measure

    def watched(model: Any, samples: Any, *rest: Any) -> List[float]:
        seconds = original(model, samples, *rest)
        adapters = {name for layer in layers(model).values() for name in layer.r}
        active = {tuple(layer.active_adapters) for layer in layers(model).values()}
        found.append({
            'model': model,
            'samples': samples,
            'is_applied': swift_patch.is_applied(),
            'adapters': adapters,
            'active': active
        })
        return seconds

    monkeypatch.setattr(measure, '_measure', watched)
    return found


@pytest.mark.parametrize('kind', ['swift', 'peft'])
@pytest.mark.parametrize('options', [{}, {'combination_type': 'cat', 'adapters_per_sample': 2}])
def test_both_paths_compose_the_same_samples(written: Any, seen: List[Dict[str, Any]], kind: str,
                                             options: Dict[str, Any]) -> None:
    result = run_bench(make_config(written, kind, **options), no_stage, lambda text: None)
    patch, stock = seen
    assert patch['samples'] == stock['samples'] and len(patch['samples']) == 4
    assert [sample.weights for sample in patch['samples']] == [sample.weights for sample in result.samples]
    assert (patch['is_applied'], stock['is_applied'], swift_patch.is_applied()) == (True, False, True)
    assert patch['adapters'] - stock['adapters'] == {'fused'} and len(patch['adapters']) == 5
    assert stock['adapters'] - patch['adapters'] == {'fused_1', 'fused_2', 'fused_3', 'fused_4'}
    assert (patch['active'], stock['active']) == ({('fused', )}, {('fused_4', )})
    assert_close_deltas(patch['model'], 'fused', stock['model'], oracle_adapter='fused_4')
    assert len(result.patch) == len(result.stock) == 4 and min(result.patch + result.stock) > 0
    assert {len(sample.adapters) for sample in result.samples} == {options.get('adapters_per_sample', 3)}
    assert result.model == {
        'wrapper': {
            'swift': 'SwiftModel',
            'peft': 'PeftModel'
        }[kind],
        'dtype': 'float32',
        'adapter_dtype': 'float32',
        'lora_layers': 14,
        'adapters': 4,
        'ranks': [4],
    }
    assert (result.machine['device'], result.machine['threads']) == ('cpu', torch.get_num_threads())


def test_the_first_model_is_gone_before_the_second_is_loaded(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models, original = [], measure.load_model

    def watched(*args: Any) -> Any:
        assert all(model() is None for model in models)
        found = original(*args)
        models.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(measure, 'load_model', watched)
    run_bench(make_config(written, 'swift'), no_stage, lambda text: None)
    assert len(models) == 2


def test_stock_is_cut_where_it_takes_too_long_and_the_patch_is_not(written: Any) -> None:
    config = make_config(written, 'peft', stock_seconds=0., adapters_per_sample=1)
    result = run_bench(config, no_stage, lambda text: None)
    assert (len(result.stock), len(result.patch)) == (1, 4)


def test_a_single_adapter_and_adapters_of_several_ranks_are_measured(written: Any) -> None:
    assert len(run_bench(make_config(written, 'swift', ['l4']), no_stage, print).samples[0].adapters) == 1
    result = run_bench(make_config(written, 'swift', ['l3', 'l4'], combination_type='cat'), no_stage, print)
    assert result.model['ranks'] == [4, 8] and {len(sample.adapters) for sample in result.samples} == {2}


def fail(*args: Any) -> None:
    raise AssertionError('a model is loaded')


@pytest.mark.parametrize(('changes', 'told'), [
    ({'adapters': {}}, 'No adapters are given'),
    ({'adapters': {'x': 'none'}}, r"adapter 'x' \(none\): the path does not exist"),
    ({'adapters_per_sample': 6}, '--adapters_per_sample is expected to be at most the number of adapters, 4, found 6'),
    ({'combination_type': 'ties'}, "'ties' expects a density"),
    ({'swift_args': {'model': '.'}}, 'ms-swift cannot use these arguments'),
])  # yapf: disable
def test_mistakes_are_told_before_a_model_is_loaded(written: Any, monkeypatch: pytest.MonkeyPatch, changes: Any,
                                                    told: str) -> None:
    monkeypatch.setattr(measure, 'load_model', fail)
    config = make_config(written, 'swift')
    vars(config).update(changes)
    with pytest.raises(ValueError, match=told):
        run_bench(config, no_stage, print)


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_ranks_that_stock_refuses_are_told_before_a_model_is_loaded(written: Any, monkeypatch: pytest.MonkeyPatch,
                                                                    kind: str) -> None:
    monkeypatch.setattr(measure, 'load_model', fail)
    with pytest.raises(ValueError, match="'linear' expects adapters of one rank, found {'l3': 4, 'l4': 8}: use 'cat'"):
        run_bench(make_config(written, kind, ['l3', 'l4']), no_stage, print)
    # Each alone is no sum.
    with pytest.raises(AssertionError, match='a model is loaded'):
        run_bench(make_config(written, kind, ['l3', 'l4'], adapters_per_sample=1), no_stage, print)


def test_adapters_of_another_model_are_told_before_a_model_is_loaded(written: Any, monkeypatch: pytest.MonkeyPatch,
                                                                     tmp_path: Any) -> None:
    from swift_patch.synthetic.tiny_model import build_tiny_qwen2
    monkeypatch.setattr(measure, 'load_model', fail)
    config = make_config(written, 'peft')
    config.swift_args['model'] = build_tiny_qwen2(tmp_path / 'other', hidden_size=64, num_layers=2)
    with pytest.raises(ValueError, match="adapter 'l0' .* does not belong to the base model"):
        run_bench(config, no_stage, print)


def test_a_switched_off_patch_is_told(written: Any) -> None:
    swift_patch.revert()
    try:
        with pytest.raises(ValueError, match='The patch is switched off'):
            run_bench(make_config(written, 'swift'), no_stage, print)
    finally:
        swift_patch.apply()


def test_samples_depend_on_the_seed_alone() -> None:
    samples = random_samples(NAMES, 50, 3, seed=1)
    assert samples == random_samples(NAMES, 50, 3, seed=1) != random_samples(NAMES, 50, 3, seed=2)
    assert samples[:10] == random_samples(NAMES, 10, 3, seed=1)
    assert len({tuple(sample.weights) for sample in samples}) == 50
    for sample in samples:
        assert len(set(sample.adapters)) == 3 and set(sample.adapters) <= set(NAMES)
        assert min(sample.weights) > 0 and sum(sample.weights) == pytest.approx(1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> List[float]:
    """The time, which stands still until somebody adds to it."""
    now = [100.]
    monkeypatch.setattr(measure.time, 'perf_counter', lambda: now[0])
    return now


SAMPLES = [Sample(['l0', 'l1'], [0.4, 0.6])] * 5


@pytest.mark.parametrize(('max_seconds', 'count'), [(0, 1), (2, 2), (2.1, 2), (3.9, 2), (4, 3), (1e9, 5)])
def test_only_composing_is_timed_and_no_sample_begun_after_the_limit(clock: List[float], max_seconds: float,
                                                                     count: int) -> None:

    def compose(adapters: List[str], weights: List[float]) -> None:
        assert (adapters, weights) == (['l0', 'l1'], [0.4, 0.6])
        clock[0] += 2

    found = []
    for seconds in seconds_composing(SAMPLES, compose, max_seconds):
        found.append(seconds)
        clock[0] += 50
    assert found == [2] * count


def test_a_cuda_device_is_waited_for_before_the_clock_is_read(clock: List[float],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    events, devices = [], [torch.device('cpu'), torch.device('cuda:0'), torch.device('cuda:1')]
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: events.append(str(device)))

    def read() -> float:
        events.append('clock')
        return 0.

    monkeypatch.setattr(measure.time, 'perf_counter', read)
    waited = ['cuda:0', 'cuda:1', 'clock']
    assert len(list(seconds_composing(SAMPLES[:2], lambda *_: events.append('compose'), devices=devices))) == 2
    assert events == [*waited, 'compose', *waited] * 2


def test_the_patch_is_back_where_stock_fails(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match='does not exist'):
        with stock_composing(model, combination_type='linear') as compose:
            assert not swift_patch.is_applied()
            compose(['l0', 'nobody'], [0.5, 0.5])
    assert swift_patch.is_applied()


def test_ranks_and_dtypes_are_those_of_the_model(build: Any) -> None:
    model = build(r=[4, 8]).to(torch.bfloat16)
    about = describe_model(model, 4)
    assert (about['ranks'], about['dtype'], about['adapter_dtype']) == ([4, 8], 'bfloat16', 'bfloat16')
