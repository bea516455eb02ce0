"""`swift-patch infer --infer_backend vllm` writes what it writes by transformers, each line as soon as it can."""
import asyncio
import json
import os
import psutil
import pytest
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock
from vllm_deployed import PLACES, VLLM, drawn, is_idle, until

from swift_patch.inference import generator
from swift_patch.inference.config import InferConfig
from swift_patch.inference.ranks import Terminated
from swift_patch.inference.run import run_infer
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE

COUNT = 20


def make_config(written, folder, count=COUNT, max_new_tokens=8):
    """A run by vLLM, of the likeliest tokens."""
    model, paths = written
    samples = [{
        'messages': [{
            'role': 'user',
            'content': f'hello {number}'
        }],
        'adapters': list(mixture),
        'weights': list(mixture.values()),
        'id': number
    } for number, mixture in enumerate(drawn(count, seed=4))]
    dataset = folder / 'data.jsonl'
    dataset.write_text('\n'.join(map(json.dumps, samples)))
    return InferConfig(
        adapters=dict(paths['peft']),
        val_dataset=[str(dataset)],
        result_path=str(folder / 'results' / 'out.jsonl'),
        swift_args={
            'model': model,
            'model_type': MODEL_TYPE,
            'template': TEMPLATE,
            'torch_dtype': 'float32',
            'max_new_tokens': max_new_tokens,
            'temperature': 0.,
            **VLLM
        },
        max_batch_size=PLACES)


def by_transformers(config):
    """The same run by transformers."""
    swift_args = {key: value for key, value in config.swift_args.items() if key not in VLLM}
    return replace(config, swift_args=swift_args, max_batch_size=16)


def content(config):
    path = Path(config.result_path)
    return path.read_bytes() if path.exists() else b''


def lines(config):
    return [json.loads(line) for line in content(config).splitlines()]


@pytest.fixture
def config(written, tmp_path):
    return make_config(written, tmp_path)


@pytest.fixture(scope='module')
def expected(written, tmp_path_factory):
    """The lines of the run by transformers."""
    config = by_transformers(make_config(written, tmp_path_factory.mktemp('expected')))
    run_infer(config)
    return content(config)


@pytest.fixture(autouse=True)
def shared(deployed, monkeypatch):
    """Runs of this process have the engine of the server, which stays when they end."""
    monkeypatch.setattr(generator, 'load_engine', lambda *args, **kwargs: deployed.engine)
    monkeypatch.setattr(generator.ContinuousGenerator, 'close', lambda self: None)
    yield
    until(lambda: is_idle(deployed.engine))


def watched(engine, before):
    """Within it, `before` is awaited with the number of a request, counted from 1, before it is asked."""
    infer_async, count = engine.infer_async, iter(range(1, 10**6))

    async def asked(*args, **kwargs):
        await before(next(count))
        return await infer_async(*args, **kwargs)

    return mock.patch.object(engine, 'infer_async', asked)


def test_the_lines_are_those_of_transformers(config, expected):
    summary = run_infer(config)
    assert content(config) == expected
    assert (summary.samples, summary.errors, summary.tokens) == (COUNT, 0, 8 * COUNT)
    assert 0 < summary.seconds_composing and 0 < summary.seconds_generating <= summary.seconds


def test_a_run_goes_on_with_another_window_but_not_by_another_backend(config, expected):
    run_infer(config)
    path = Path(config.result_path)
    left = b''.join(expected.splitlines(keepends=True)[:7])
    path.write_bytes(left + expected[len(left):len(left) + 20])
    config.resume = True
    with pytest.raises(ValueError, match='infer_backend was "vllm" and is now not given'):
        run_infer(by_transformers(config))
    config.max_batch_size = 2
    assert run_infer(config).resumed == 7
    assert content(config) == expected


def test_a_window_is_kept_in_flight_and_a_slow_sample_holds_up_nothing_but_the_lines_behind_it(
        config, expected, deployed):
    running, most, seen = set(), [], []
    others_are_done = asyncio.Event()

    async def infer_async(request, *args):
        number = request.request.messages[0]['content']
        running.add(number)
        most.append(len(running))
        if number == 'hello 2':
            # All others are answered meanwhile.
            await others_are_done.wait()
            seen.append(content(config).count(b'\n'))
        response = await ask(request, *args)
        running.discard(number)
        if running == {'hello 2'} and len(most) == COUNT:
            others_are_done.set()
        return response

    ask = deployed.engine.infer_async
    with mock.patch.object(deployed.engine, 'infer_async', infer_async):
        run_infer(config)
    assert content(config) == expected
    assert max(most) == PLACES and most[:PLACES] == list(range(1, PLACES + 1))
    assert seen == [2]


@pytest.mark.parametrize('strict', [True, False])
def test_a_sample_that_cannot_be_answered_is_told_after_the_lines_before_it(config, expected, strict):
    dataset = Path(config.val_dataset[0])
    samples = [json.loads(line) for line in dataset.read_text().splitlines()]
    # Of other ranks.
    samples[9].update(adapters=['l0', 'l4'], weights=[.5, .5])
    dataset.write_text('\n'.join(map(json.dumps, samples)))
    config.strict = strict
    before = b''.join(expected.splitlines(keepends=True)[:9])
    if strict:
        with pytest.raises(ValueError, match='line 10: .*rank'):
            run_infer(config)
        assert content(config) == before
        return
    assert run_infer(config).errors == 1
    found = content(config).splitlines(keepends=True)
    assert b''.join(found[:9]) == before and found[10:] == expected.splitlines(keepends=True)[10:]
    assert 'rank' in json.loads(found[9])['error'] and json.loads(found[9])['response'] is None


@pytest.mark.parametrize(('number', 'error'), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_it_and_it_can_be_gone_on_with(config, expected, deployed, number, error):

    async def kill(count):
        if count == 10:
            os.kill(os.getpid(), number)

    with watched(deployed.engine, kill), pytest.raises(error, match='--resume goes on with'):
        run_infer(config)
    left = content(config)
    # After a SIGTERM, what was begun is written.
    assert 10 * (number == signal.SIGTERM) <= left.count(b'\n') < COUNT
    assert expected.startswith(left) and left.endswith((b'\n', b'')[not left:])
    config.resume = True
    run_infer(config)
    assert content(config) == expected


def test_a_stream_shows_one_response_after_another(config, expected, capsys):
    config.swift_args['stream'] = True
    run_infer(config)
    assert content(config) == expected
    shown = ''.join(f'[QUERY] {line["messages"][0]["content"]}\n[RESPONSE] {line["response"]}\n{"-" * 50}\n'
                    for line in lines(config))
    assert capsys.readouterr().out.endswith(shown)


def test_the_command_has_options_of_vllm_and_ends_with_its_engine_and_several_processes_go_on(written, tmp_path):
    config = make_config(written, tmp_path, count=60, max_new_tokens=60)
    process = start(config)
    while content(config).count(b'\n') < 3:
        assert process.poll() is None, process.communicate()
        threading.Event().wait(.01)
    family = psutil.Process(process.pid).children(recursive=True)
    # The engine: what else there is tracks resources.
    [engine] = [child for child in family if 'EngineCore' in child.name() or 'EngineCore' in ' '.join(child.cmdline())]
    engine.kill()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    error = next(line for line in told.splitlines() if line.startswith('swift-patch infer: error: '))
    assert f'--resume goes on with {config.result_path}' in error
    psutil.wait_procs(family, 30)
    assert not [child for child in family if child.is_running()]
    left = content(config)
    assert left.endswith(b'\n') and left.count(b'\n') < 60
    # By several processes, each with an engine.
    process = start(config, '--resume', NPROC_PER_NODE='2')
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert content(config).startswith(left)
    found = content(config)
    config.overwrite = True
    run_infer(by_transformers(config))
    assert content(config) == found


def start(config, *options, **environment):
    """Starts the command."""
    arguments = [f'--{key}={value}' for key, value in config.swift_args.items()]
    adapters = [f'{name}={path}' for name, path in config.adapters.items()]
    command = ['infer', '--adapters', *adapters, '--val_dataset', *config.val_dataset, *arguments]
    command += ['--result_path', config.result_path, '--max_batch_size', str(config.max_batch_size), *options]
    return subprocess.Popen([sys.executable, '-m', 'swift_patch.cli', *command],
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            text=True,
                            env={
                                **os.environ,
                                **environment
                            })
