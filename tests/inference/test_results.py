"""One run writes to a result file, which is a file; nothing old goes before something new is there."""
import json
import os
import pytest
import subprocess
import sys
from pathlib import Path
from test_run import SAMPLES, make_config, read
from typing import Any, Dict, List
from unittest import mock

from swift_patch import ms_swift
from swift_patch.inference import plan, results
from swift_patch.inference.config import Answer, InferConfig
from swift_patch.inference.results import ResultFile, check_result_path, result_line
from swift_patch.inference.run import run_infer
from swift_patch.inference.samples import read_samples

SETTINGS = {'model': 'm', 'adapter A': '0123'}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InferConfig:
    """A run of four samples whose settings need no ms-swift."""
    monkeypatch.setattr(results, '_settings', lambda *args: SETTINGS)
    dataset = tmp_path / 'data.jsonl'
    sample = {'messages': [{'role': 'user', 'content': 'hello'}], 'adapters': ['A']}
    dataset.write_text('\n'.join(json.dumps({**sample, 'id': i}) for i in range(4)))
    return InferConfig({'A': 'a'}, [str(dataset)], str(tmp_path / 'out' / 'r.jsonl'))


def opened(config: InferConfig) -> ResultFile:
    samples = read_samples(config.val_dataset, config.adapters)
    return ResultFile(Path(config.result_path), config, None, samples, [])


def write(config: InferConfig, file: ResultFile, number: int, answer: Answer) -> None:
    samples = read_samples(config.val_dataset, config.adapters)
    file.write(number, result_line(config, samples[number], answer))


def written(config: InferConfig, *answers: Answer) -> bytes:
    """The file of a run that got so far."""
    with opened(config) as file:
        file.start()
        for number, answer in enumerate(answers):
            write(config, file, number, answer)
    return Path(config.result_path).read_bytes()


GOOD, BAD = Answer('good'), Answer(error='it cannot be answered')


def test_of_two_runs_on_one_file_the_second_is_refused(config: InferConfig) -> None:
    written(config, GOOD)
    config.resume = True
    with opened(config) as first:
        first.start()
        with pytest.raises(ValueError, match='another run is writing it. Wait for it, or give another --result_path'):
            opened(config)
        write(config, first, 1, GOOD)
    assert opened(config).num_finished == 2


def test_of_two_runs_that_start_a_file_the_second_is_refused(config: InferConfig) -> None:
    with opened(config) as first, opened(config) as second:
        first.start()
        with pytest.raises(ValueError, match='another run is writing it'):
            second.start()
        write(config, first, 0, GOOD)
    with opened(config) as third:
        assert third.num_finished == 1


def test_a_file_that_another_run_has_started_and_ended_meanwhile_is_not_written_to(config: InferConfig) -> None:
    with opened(config) as file:
        expected = written(config, GOOD, GOOD)
        with pytest.raises(ValueError, match='another run has written it meanwhile'):
            file.start()
    assert Path(config.result_path).read_bytes() == expected


def test_a_killed_run_leaves_no_lock(config: InferConfig) -> None:
    written(config, GOOD)
    code = f'import fcntl, os; fcntl.flock(open({config.result_path!r}, "r+b"), fcntl.LOCK_EX); os.kill(os.getpid(), 9)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == -9
    config.resume = True
    with opened(config) as file:
        assert file.num_finished == 1


def test_two_commands_at_once_leave_the_file_of_one(model_dir: str, checkpoints: Dict[str, str],
                                                    tmp_path: Path) -> None:
    config = make_config(model_dir, checkpoints, tmp_path)
    run_infer(config)
    expected = Path(config.result_path).read_bytes()
    config.overwrite = True
    write_line, told = results.write_line, []

    def write_line_beside_another_run(file: Any, line: Dict[str, Any]) -> None:
        if not told:
            told.append(None)
            with pytest.raises(ValueError) as e:
                run_infer(config)
            told[0] = str(e.value)
        write_line(file, line)

    with mock.patch.object(results, 'write_line', write_line_beside_another_run):
        run_infer(config)
    assert 'another run is writing it' in told[0]
    assert Path(config.result_path).read_bytes() == expected


def test_what_is_overwritten_stays_until_a_line_is_there(config: InferConfig) -> None:
    before = written(config, GOOD, GOOD)
    path, settings = Path(config.result_path), Path(f'{config.result_path}.args.json')
    config.overwrite = True
    with opened(config) as file:
        file.start()
        assert path.read_bytes() == before and settings.exists()
        write(config, file, 0, Answer('new'))
        assert [line['response'] for line in read(config)] == ['new']
        write(config, file, 1, Answer('newer'))
    assert [line['response'] for line in read(config)] == ['new', 'newer']
    assert sorted(path.parent.iterdir()) == [path, settings]


def test_a_run_that_ends_without_a_line_leaves_what_it_was_to_overwrite(config: InferConfig) -> None:
    before = written(config, GOOD, GOOD)
    config.overwrite = True
    with opened(config) as file:
        file.start()
    assert Path(config.result_path).read_bytes() == before
    assert len(list(Path(config.result_path).parent.iterdir())) == 2


@pytest.mark.parametrize('name', ['replace', 'unlink'])
def test_a_file_that_cannot_be_put_in_place_leaves_what_it_was_to_overwrite(config: InferConfig, name: str) -> None:
    before = written(config, GOOD, GOOD)
    config.overwrite = True

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, 'Read-only file system')

    file = opened(config)
    file.start()
    with mock.patch.object(results.os if name == 'replace' else Path, name, fail):
        for write_or_close in (lambda: write(config, file, 0, GOOD), file.close):
            with pytest.raises(ValueError, match='Cannot write .*r.jsonl: Read-only file system'):
                write_or_close()
    assert Path(config.result_path).read_bytes() == before
    assert json.loads(Path(f'{config.result_path}.args.json').read_text()) == SETTINGS


def test_errors_are_finished_lines_unless_they_are_tried_again(config: InferConfig) -> None:
    before = written(config, GOOD, BAD, GOOD)
    assert [line.get('error') for line in read(config)] == [None, 'it cannot be answered', None]
    assert read(config)[1]['messages'] == [{'role': 'user', 'content': 'hello'}]
    config.resume = True
    with opened(config) as file:
        assert (file.todo, file.num_finished, file.num_errors) == ([3], 3, 1)
    config.retry_errors = True
    with opened(config) as file:
        assert (file.todo, file.num_finished, file.num_errors) == ([1, 3], 2, 0)
        file.start()
        write(config, file, 1, Answer('now'))
        assert Path(config.result_path).read_bytes() == before
        write(config, file, 3, GOOD)
    assert [line['response'] for line in read(config)] == ['good', 'now', 'good', 'good']
    assert len(list(Path(config.result_path).parent.iterdir())) == 2


@pytest.mark.parametrize('done', [0, 1, 2])
def test_a_retry_that_is_interrupted_keeps_the_lines_that_it_did_not_come_to(config: InferConfig, done: int) -> None:
    before = written(config, GOOD, BAD, GOOD, BAD)
    config.resume = config.retry_errors = True
    with pytest.raises(KeyboardInterrupt):
        with opened(config) as file:
            file.start()
            for number in [1, 3][:done]:
                write(config, file, number, Answer('now'))
            raise KeyboardInterrupt
    responses = [line['response'] for line in read(config)]
    assert responses == ['good', 'now' if done > 0 else None, 'good', 'now' if done > 1 else None]
    assert done or Path(config.result_path).read_bytes() == before


def test_a_retry_that_is_killed_when_it_puts_its_file_in_place_can_be_gone_on_with(config: InferConfig) -> None:
    written(config, GOOD, BAD)
    config.resume = config.retry_errors = True
    file = opened(config)
    file.start()

    def kill(*args: Any) -> None:
        # What a killed process leaves at most.
        os.rename(*args)
        raise KeyboardInterrupt

    with mock.patch.object(results.os, 'replace', lambda *args: (kill if args[1] == file.path else os.rename)(*args)):
        with pytest.raises(KeyboardInterrupt):
            write(config, file, 1, Answer('now'))
    file._locked.close()
    file._file.close()
    with opened(config) as file:
        assert file.todo == [2, 3]


@pytest.mark.parametrize('retry', [True, False])
def test_a_line_that_was_written_in_part_is_not_put_in_place_of_a_whole_one(config: InferConfig, retry: bool) -> None:
    before = written(config, GOOD, BAD, GOOD)
    config.resume = config.retry_errors = retry
    config.overwrite = not retry

    def fail(file: Any, line: Any) -> None:
        file.write(b'{"response": "n')
        raise OSError(28, 'No space left on device')

    with pytest.raises(ValueError, match='No space left on device'):
        with opened(config) as file:
            file.start()
            with mock.patch.object(results, 'write_line', fail):
                write(config, file, 1 if retry else 0, Answer('now'))
    assert Path(config.result_path).read_bytes() == before
    assert len(list(Path(config.result_path).parent.iterdir())) == 2


def test_a_link_is_written_through(config: InferConfig, tmp_path: Path) -> None:
    path, target = Path(config.result_path), tmp_path / 'elsewhere' / 'target.jsonl'
    path.parent.mkdir()
    target.parent.mkdir()
    target.write_text('old\n')
    path.symlink_to(target)
    config.overwrite = True
    written(config, GOOD)
    assert path.is_symlink() and json.loads(target.read_text())['response'] == 'good'


@pytest.mark.parametrize('kind', ['pipe', 'device', 'socket', 'settings'])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(config: InferConfig, tmp_path: Path, kind: str,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'r'
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'device':
        path = Path('/dev/null')
    elif kind == 'socket':
        import socket
        server = socket.socket(socket.AF_UNIX)
        # The whole path may be too long for a socket.
        monkeypatch.chdir(tmp_path)
        server.bind(path.name)
    else:
        os.mkfifo(f'{path}.args.json')
    before = sorted(os.listdir(tmp_path))
    with mock.patch.object(results, 'open', side_effect=AssertionError, create=True):
        with pytest.raises(ValueError, match='Cannot write .*: it is not a regular file'):
            check_result_path(path, config, [])
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(('options', 'told'), [
    ({'resume': True, 'overwrite': True}, 'exclude each other'),
    ({'retry_errors': True}, 'give --resume with it'),
    ({'result_path': None, 'resume': True}, 'give its --result_path'),
    ({'result_path': None, 'resume': True, 'overwrite': True}, 'exclude each other'),
    ({'result_path': None, 'retry_errors': True}, 'give --resume with it'),
])  # yapf: disable
def test_options_that_make_no_sense_are_refused(config: InferConfig, options: Dict[str, bool], told: str) -> None:
    vars(config).update(options)
    with pytest.raises(ValueError, match=told):
        check_result_path(config.result_path and Path(config.result_path), config, [])


@pytest.fixture
def failing(model_dir: str, checkpoints: Dict[str, str], tmp_path: Path) -> InferConfig:
    """A run of eight samples: one is too long, one is refused by the template, one fails in the model."""
    config = make_config(model_dir, checkpoints, tmp_path)
    contents: List[Any] = ['one', 'x' * 600, 'three', 'four', 'FAIL', 'six', 'seven', 'eight']
    samples = [{**SAMPLES[0], 'messages': [{'role': 'user', 'content': content}]} for content in contents]
    samples[5]['tools'] = 3
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))
    config.strict, config.max_batch_size = False, 3
    return config


def fail_where_it_says_so(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
    if any('FAIL' in request.messages[-1]['content'] for request in requests):
        raise RuntimeError('the model is tired')
    return INFER(self, requests, *args, **kwargs)


INFER = ms_swift.TransformersEngine._infer


def test_samples_that_cannot_be_answered_get_lines_that_say_why(failing: InferConfig) -> None:
    with mock.patch.object(ms_swift.TransformersEngine, '_infer', fail_where_it_says_so):
        summary = run_infer(failing)
    assert (summary.samples, summary.errors, summary.resumed) == (8, 3, 0)
    lines = read(failing)
    assert [line['line'] for line in lines] == list(range(1, 9))
    assert [line['response'] is None for line in lines] == [False, True, False, False, True, True, False, False]
    assert 'larger than the max_length(512)' in lines[1]['error'] and 'refuses it' in lines[5]['error']
    assert lines[4]['error'] == 'RuntimeError: the model is tired'

    failing.resume = True
    assert vars(run_infer(failing)).items() >= {'samples': 0, 'errors': 3, 'resumed': 8}.items()
    failing.retry_errors = True
    summary = run_infer(failing)
    assert (summary.samples, summary.errors, summary.resumed) == (3, 2, 5)
    assert [line['response'] is None
            for line in read(failing)] == [False, True, False, False, False, True, False, False]


def test_a_retry_answers_as_a_run_in_which_nothing_failed(failing: InferConfig) -> None:
    run_infer(failing)
    expected = Path(failing.result_path).read_bytes()
    failing.overwrite = True
    # Alone in its batch, so that the others are answered together as before.
    failing.swift_args['temperature'] = 0.
    with mock.patch.object(ms_swift.TransformersEngine, '_infer', fail_where_it_says_so):
        run_infer(failing)
    failing.overwrite, failing.resume, failing.retry_errors = False, True, True
    run_infer(failing)
    retried = Path(failing.result_path).read_bytes()
    failing.overwrite, failing.resume, failing.retry_errors = True, False, False
    run_infer(failing)
    assert Path(failing.result_path).read_bytes() == retried != expected


def test_a_run_goes_on_from_errors_as_if_undisturbed(failing: InferConfig) -> None:
    run_infer(failing)
    path = Path(failing.result_path)
    expected = path.read_bytes()
    failing.resume = True
    for lines in range(1, 8):
        path.write_bytes(b''.join(expected.splitlines(keepends=True)[:lines]))
        run_infer(failing)
        assert path.read_bytes() == expected


def test_finished_samples_are_not_encoded_again(failing: InferConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    failing.max_batch_size = 1
    run_infer(failing)
    path = Path(failing.result_path)
    path.write_bytes(b''.join(path.read_bytes().splitlines(keepends=True)[:6]))
    failing.resume = True
    encoded: List[str] = []
    to_request = plan.to_request

    def encode(sample: Any) -> Any:
        encoded.append(sample.messages[0]['content'])
        return to_request(sample)

    monkeypatch.setattr(plan, 'to_request', encode)
    run_infer(failing)
    # Those of the batches that are looked at together.
    assert encoded == ['FAIL', 'six', 'seven', 'eight']
