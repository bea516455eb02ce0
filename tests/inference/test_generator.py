"""What is asked and shown of a sample."""
import asyncio
import errno
import io
import json
import pytest
import sys
from pathlib import Path
from test_run import SAMPLES, make_config, read
from typing import Any, Dict
from unittest import mock

from swift_patch import ms_swift
from swift_patch.inference.config import InferConfig
from swift_patch.inference.run import run_infer


@pytest.fixture
def config(model_dir: str, checkpoints: Dict[str, str], tmp_path: Path) -> InferConfig:
    """A run that takes the likeliest tokens."""
    config = make_config(model_dir, checkpoints, tmp_path)
    config.swift_args['temperature'] = 0.
    return config


def test_a_stream_shows_what_swift_infer_shows_and_writes_what_a_batch_does(config: InferConfig,
                                                                            capsys: pytest.CaptureFixture) -> None:
    if ms_swift.TransformersEngine.__name__ == 'PtEngine':
        pytest.skip('ms-swift 3 loses line breaks of streams')
    run_infer(config)
    expected = read(config)
    capsys.readouterr()
    config.swift_args['stream'], config.overwrite = True, True
    summary = run_infer(config)
    assert read(config) == expected and summary.tokens
    shown = ''.join(f'[QUERY] {line["messages"][-2]["content"]}\n'
                    + (f'[LABELS] {line["labels"]}\n' if line['labels'] else '')
                    + f'[RESPONSE] {line["response"]}\n{"-" * 50}\n' for line in expected)
    assert capsys.readouterr().out.endswith(shown)


def test_a_stream_is_shown_in_a_notebook_too(config: InferConfig) -> None:
    config.swift_args['stream'] = True

    async def cell() -> int:
        return run_infer(config).samples

    assert asyncio.run(cell()) == len(SAMPLES)


def test_a_stream_that_fails_is_the_error_of_its_sample(config: InferConfig) -> None:
    config.swift_args['stream'], config.strict = True, False
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, SAMPLES)))
    stream = ms_swift.TransformersEngine._infer

    def failing(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if requests[0].messages[0]['role'] == 'system':
            raise RuntimeError('the model is tired')
        return stream(self, requests, *args, **kwargs)

    with mock.patch.object(ms_swift.TransformersEngine, '_infer', failing):
        summary = run_infer(config)
    assert (summary.samples, summary.errors) == (5, 1)
    assert [line.get('error') for line in read(config)][2] == 'RuntimeError: the model is tired'


def test_a_stream_that_cannot_be_shown_is_no_error_of_a_sample(config: InferConfig,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    config.swift_args['stream'], config.strict = True, False
    for shown in (0, 30):
        # As of `... | head`, in the question and in the response.
        monkeypatch.setattr(sys, 'stdout', Broken(shown))
        with pytest.raises(ValueError, match='Cannot show responses on stdout: Broken pipe'):
            run_infer(config)
        assert read(config) == []
        config.resume = True


class Broken(io.StringIO):
    """Takes so many characters."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.size:
            raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
        return super().write(text)


def test_log_probabilities_are_written(config: InferConfig) -> None:
    config.swift_args.update(logprobs=True, top_logprobs=2)
    run_infer(config)
    for line in read(config):
        tokens = line['logprobs']['content']
        assert tokens and all(len(token['top_logprobs']) == 2 for token in tokens)


def test_a_dataset_of_ms_swift_is_answered_with_default_adapters_as_json_lines_are(config: InferConfig,
                                                                                   tmp_path: Path) -> None:
    samples = [{'messages': [{'role': 'user', 'content': text}], 'adapters': ['lora', 'A'], 'weights': [.75, .25]}
               for text in ('one', 'two')]  # yapf: disable
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))
    run_infer(config)
    expected = [line['response'] for line in read(config)]
    table = tmp_path / 'table.csv'
    table.write_text('query,response\none,x\ntwo,y\n')
    config.val_dataset, config.default_adapters = [str(table)], {'lora': .75, 'A': .25}
    config.overwrite = True
    run_infer(config)
    lines = read(config)
    assert [line['response'] for line in lines] == expected
    assert [line['labels'] for line in lines] == ['x', 'y'] and [line['line'] for line in lines] == [1, 2]
    assert all(line['adapters'] == ['lora', 'A'] and line['weights'] == [.75, .25] for line in lines)
    config.overwrite, config.resume = False, True
    assert run_infer(config).resumed == 2


def test_lines_of_several_datasets_say_which_they_are_of(config: InferConfig, tmp_path: Path) -> None:
    other = tmp_path / 'other.jsonl'
    other.write_text(json.dumps(SAMPLES[0]))
    config.val_dataset = [*config.val_dataset, str(other)]
    run_infer(config)
    assert [line['dataset'] for line in read(config)] == [config.val_dataset[0]] * 5 + [str(other)]
    config.resume = True
    assert run_infer(config).resumed == 6
