"""Which samples are answered together; and that answers do not depend on it."""
import json
import logging
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pathlib import Path
from test_run import SAMPLES, make_config
from typing import Any, Dict, List
from unittest import mock

from swift_patch import ms_swift
from swift_patch.inference.batches import batches, looked_at
from swift_patch.inference.config import InferConfig
from swift_patch.inference.run import run_infer

lengths = st.lists(st.one_of(st.none(), st.integers(1, 50)), max_size=60)


@given(lengths, st.integers(1, 9))
def test_every_sample_is_in_one_batch_and_not_far_from_its_place(found: List[Any], size: int) -> None:
    all_batches = list(batches(dict(enumerate(found)), size))
    assert sorted(number for batch in all_batches for number in batch) == list(range(len(found)))
    assert all(0 < len(batch) <= size for batch in all_batches)
    assert len(all_batches) == -(-len(found) // size)
    order = [number for batch in all_batches for number in batch]
    assert all(abs(place - number) < 4 * size for place, number in enumerate(order))


@given(lengths, st.integers(1, 9), st.data())
def test_batches_are_the_same_where_only_those_near_some_samples_are_looked_at(found: List[Any], size: int,
                                                                               data: st.DataObject) -> None:
    numbers = data.draw(st.sets(st.sampled_from(range(len(found))))) if found else set()
    near = looked_at(numbers, len(found), size)
    all_batches = list(batches({number: found[number] for number in near}, size))
    assert numbers <= {*near}
    assert all_batches == [batch for batch in batches(dict(enumerate(found)), size) if {*batch} & {*near}]


def test_samples_of_similar_length_go_together() -> None:
    assert list(batches(dict(enumerate([9, 1, 8, 2, 7, 3])), 2)) == [[1, 3], [5, 4], [2, 0]]


def test_batches_of_one_are_in_the_order_of_the_dataset() -> None:
    assert list(batches(dict(enumerate([9, 1, 8])), 1)) == [[0], [1], [2]]


def test_without_lengths_the_order_is_that_of_the_dataset() -> None:
    assert list(batches(dict.fromkeys(range(5)), 2)) == [[0, 1], [2, 3], [4]]


def test_samples_that_are_left_out_leave_the_others_where_they_are() -> None:
    assert list(batches(dict.fromkeys([0, 2, 8, 9, 11]), 2)) == [[0, 2], [8, 9], [11]]


@pytest.fixture
def config(model_dir: str, checkpoints: Dict[str, str], tmp_path: Path) -> InferConfig:
    """A run of 20 samples that takes the likeliest tokens."""
    config = make_config(model_dir, checkpoints, tmp_path)
    config.swift_args['temperature'] = 0.
    config.overwrite = True
    contents = ['hello', 'a longer question', 'and one that is longer than all of the others', 'x']
    samples = [{
        **SAMPLES[i % len(SAMPLES)], 'messages': [{
            'role': 'user',
            'content': f'{contents[i % 4]} {i}'
        }]
    } for i in range(20)]
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))
    return config


def results(config: InferConfig) -> bytes:
    run_infer(config)
    return Path(config.result_path).read_bytes()


@pytest.mark.parametrize('composer_args', [{}, {'combination_type': 'dare_linear', 'density': 0.5}])
def test_greedy_answers_do_not_depend_on_the_batch_size(config: InferConfig, composer_args: Dict[str, Any]) -> None:
    config.composer_args = composer_args
    found = []
    for config.max_batch_size in (1, 3, 16):
        found.append(results(config))
    assert found[0].count(b'\n') == 20
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.parametrize('merge_method', ['mixture', 'selection'])
def test_other_merge_methods_are_batched_too(config: InferConfig, merge_method: str) -> None:
    config.merge_method = merge_method
    config.max_batch_size = 1
    expected = results(config)
    config.max_batch_size = 8
    assert results(config) == expected


def test_a_batch_that_memory_does_not_suffice_for_is_halved_and_the_run_goes_on(
        config: InferConfig, caplog: pytest.LogCaptureFixture) -> None:
    config.max_batch_size = 1
    expected = results(config)
    config.max_batch_size = 8
    infer = ms_swift.TransformersEngine._infer

    def limited(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if len(requests) > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return infer(self, requests, *args, **kwargs)

    with mock.patch.object(ms_swift.TransformersEngine, '_infer', limited), caplog.at_level(logging.WARNING):
        assert results(config) == expected
    assert 'Memory does not suffice for a batch of 8' in caplog.text


def test_a_sample_that_fails_is_told_by_its_line_after_those_before_it_were_written(config: InferConfig) -> None:
    config.max_batch_size = 4
    infer = ms_swift.TransformersEngine._infer

    def failing(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if any(' 9' in request.messages[-1]['content'] for request in requests):
            raise ValueError('it cannot be answered')
        return infer(self, requests, *args, **kwargs)

    with mock.patch.object(ms_swift.TransformersEngine, '_infer', failing):
        with pytest.raises(ValueError, match='line 10: it cannot be answered'):
            run_infer(config)
    assert Path(config.result_path).read_bytes().count(b'\n') == 9


@pytest.mark.parametrize('finished', [1, 5, 8, 13, 19])
def test_a_run_goes_on_from_any_line_as_if_undisturbed(config: InferConfig, finished: int) -> None:
    config.swift_args['temperature'] = 1.
    config.max_batch_size = 3
    expected = results(config)
    path = Path(config.result_path)
    path.write_bytes(b''.join(expected.splitlines(keepends=True)[:finished]))
    config.overwrite, config.resume = False, True
    assert run_infer(config).samples == 20 - finished
    assert path.read_bytes() == expected


def test_another_batch_size_is_another_run(config: InferConfig) -> None:
    results(config)
    config.overwrite, config.resume = False, True
    config.max_batch_size = 2
    with pytest.raises(ValueError, match='max_batch_size was 16 and is now 2'):
        path = Path(config.result_path)
        path.write_bytes(b''.join(path.read_bytes().splitlines(keepends=True)[:3]))
        run_infer(config)
