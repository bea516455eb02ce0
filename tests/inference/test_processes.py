"""Several processes of one run write the file of one, and what they leave can be gone on with by any number of them."""
import json
import os
import pytest
import subprocess
import sys
from pathlib import Path
from test_run import SAMPLES, command_line, make_config
from typing import Any, Dict, List

from swift_patch.inference.config import InferConfig
from swift_patch.inference.run import run_infer

NUM_SAMPLES = 24
# Kills rank 1 in the middle of its second batch. Rank 0 waits for that in its first one.
KILLER = """
import os, signal
from swift_patch.inference.generator import Generator

answer, batches = Generator.answer, []
pipe = os.path.join(os.path.dirname(__file__), 'pipe')

def answer_or_die(self, batch):
    batches.append(batch)
    if os.environ['RANK'] == '0' and len(batches) == 1:
        open(pipe).read()
    if os.environ['RANK'] == '1' and len(batches) == 2:
        open(pipe, 'w')
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, batch)

Generator.answer = answer_or_die
"""


def make(model_dir: str, checkpoints: Dict[str, str], folder: Path) -> InferConfig:
    """A run that draws both its compositions and its tokens."""
    config = make_config(model_dir, checkpoints, folder)
    samples = [{**SAMPLES[i % len(SAMPLES)], 'id': i} for i in range(NUM_SAMPLES)]
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))
    config.composer_args = {'combination_type': 'dare_linear', 'density': 0.5}
    config.max_batch_size = 2
    return config


@pytest.fixture
def config(model_dir: str, checkpoints: Dict[str, str], tmp_path: Path) -> InferConfig:
    return make(model_dir, checkpoints, tmp_path)


@pytest.fixture(scope='module')
def expected(model_dir: str, checkpoints: Dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, bytes]:
    """The files of one process."""
    config = make(model_dir, checkpoints, tmp_path_factory.mktemp('one'))
    run_infer(config)
    return files(config)


def files(config: InferConfig) -> Dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(config.result_path).parent.iterdir()}


def infer(config: InferConfig, num_processes: int, *options: str) -> Any:
    argv: List[str] = ['infer', *command_line(config), '--combination_type', 'dare_linear', '--density', '0.5']
    argv += ['--max_batch_size', '2', *options]
    return subprocess.run([sys.executable, '-m', 'swift_patch.cli', *argv],
                          env={
                              **os.environ, 'NPROC_PER_NODE': str(num_processes)
                          },
                          capture_output=True,
                          text=True)


def test_two_processes_write_the_file_of_one(config: InferConfig, expected: Dict[str, bytes]) -> None:
    process = infer(config, 2)
    assert process.returncode == 0, process.stderr[-3000:]
    assert files(config) == expected
    # Only one of them talks.
    assert process.stdout.count('Wrote ') == process.stderr.count('Loading the model') == 1
    assert '[INFO' not in process.stderr and 'OMP_NUM_THREADS' not in process.stderr


def test_what_is_left_of_two_when_one_is_killed_is_gone_on_with_by_three(config: InferConfig, tmp_path: Path,
                                                                         expected: Dict[str, bytes]) -> None:
    (tmp_path / 'killer.py').write_text(KILLER)
    os.mkfifo(tmp_path / 'pipe')
    process = infer(config, 2, '--external_plugins', str(tmp_path / 'killer.py'))
    assert process.returncode not in (0, 2), process.stderr[-3000:]
    assert 'Traceback' not in process.stderr, process.stderr
    left = files(config)['out.jsonl']
    # The lines of whole batches, up to the one that was lost.
    assert expected['out.jsonl'].startswith(left) and left.endswith(b'\n') and left.count(b'\n') < NUM_SAMPLES
    process = infer(config, 3, '--resume')
    assert process.returncode == 0, process.stderr[-3000:]
    assert files(config) == expected


def test_a_mistake_is_told_by_one_of_them(config: InferConfig) -> None:
    config.adapters = {**config.adapters, 'A': 'none'}
    process = infer(config, 2)
    assert process.returncode == 2
    assert process.stderr.count("adapter 'A' (none): the path does not exist") == 1


@pytest.mark.parametrize(('options', 'told'), [
    (['--val_dataset', 'pipe'], 'pipe is a pipe, of which several processes cannot read all each: give a file.'),
    (['--stream'], '--stream shows one response after another, but this is one of several processes'),
])  # yapf: disable
def test_what_several_cannot_do_is_told(config: InferConfig, tmp_path: Path, options: List[str], told: str) -> None:
    os.mkfifo(tmp_path / 'pipe')
    process = infer(config, 2, *(str(tmp_path / option) if option == 'pipe' else option for option in options))
    assert process.returncode == 2
    assert process.stderr.count('error: ') == 1 and told in process.stderr
    assert 'What is not given' not in process.stderr


def test_what_only_one_of_them_finds_is_told_once_and_ends_all(config: InferConfig) -> None:
    Path(config.result_path).parent.mkdir()
    Path(config.result_path).write_text('no result\n')
    process = infer(config, 2, '--resume')
    assert process.returncode == 2
    assert process.stderr.count('Cannot resume') == 1
    assert Path(config.result_path).read_text() == 'no result\n'


@pytest.mark.parametrize('option', ['--val_dataset', '--model'])
def test_what_only_another_one_finds_is_told_and_ends_all(config: InferConfig, tmp_path: Path, option: str) -> None:
    # As on a second machine that lacks something: each reads what its own number is in.
    given = config.val_dataset[0] if option == '--val_dataset' else config.swift_args['model']
    (tmp_path / 'its.0').symlink_to(given)
    process = infer(config, 2, option, str(tmp_path / 'its.$RANK'))
    assert process.returncode == 2, process.stderr[-3000:]
    assert f'{tmp_path}/its.1' in process.stderr and 'ank 1: ' in process.stderr
    assert process.stderr.count('error: ') == 1 and 'Traceback' not in process.stderr
    assert not Path(config.result_path).exists()


def test_a_model_that_one_of_them_cannot_load_is_told_and_ends_all(config: InferConfig, tmp_path: Path) -> None:
    (tmp_path / 'plugin.py').write_text('import os\n'
                                        'from swift_patch.inference import engine\n'
                                        'def fail(args):\n    raise ValueError("out of memory")\n'
                                        'if os.environ["RANK"] == "1":\n    engine.load_base_model = fail\n')
    process = infer(config, 2, '--external_plugins', str(tmp_path / 'plugin.py'))
    assert process.returncode == 2
    assert process.stderr.count('error: Rank 1: out of memory') == process.stderr.count('error: ') == 1
