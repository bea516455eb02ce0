"""Killed again and again at random moments of every phase, and resumed each time, a run ends as if undisturbed."""
import forkserver
import json
import os
import pytest
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from test_run import SAMPLES, command_line, make_config
from typing import Any, Dict, List, Tuple

# In the order of a run, each with the number of kills that shall fall into it; 25 in all.
PHASES = {
    'starting': 3,
    'loading the model': 4,
    'looking at the adapters': 4,
    'reserving': 1,
    'composing': 2,
    'generating': 4,
    'writing': 6,
    'writing the settings': 1,
}
# So many that no kill comes too late: a run writes at most three samples before it is killed.
NUM_SAMPLES = 60
# For the slowest machine; nothing takes nearly as long.
DEADLINE = 120


def infer(told: Any, argv: List[str], num_bytes: int, settings: bool) -> None:
    """Runs `swift-patch infer` and tells which phase it enters, by name and time.

    It kills itself after `num_bytes` bytes of results, unless negative, or where `settings`, before the settings are
    in place: moments too short to be hit from outside.
    """
    told.send(('starting', time.perf_counter()))
    from tqdm import tqdm

    from swift_patch import FusionComposer, cli, ms_swift
    from swift_patch.inference import results

    def tell(owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def telling(*args: Any, **kwargs: Any) -> Any:
            told.send((phase, time.perf_counter()))
            return function(*args, **kwargs)

        setattr(owner, name, telling)

    tell(ms_swift, 'prepare_model_template', 'loading the model')
    tell(FusionComposer, 'check', 'looking at the adapters')
    tell(FusionComposer, 'reserve', 'reserving')
    tell(FusionComposer, 'fused_batch', 'composing')
    tell(ms_swift.TransformersEngine, 'infer', 'generating')
    tell(results, 'write_line', 'writing')
    tell(os, 'replace', 'writing the settings')
    # By default a semaphore, which nobody removes when the process is killed.
    tqdm.set_lock(threading.RLock())
    if num_bytes >= 0:
        results.open = lambda *args: DyingFile(open(*args), num_bytes)
    if settings:
        os.replace = lambda *args: die()
    sys.exit(cli.main(argv))


class DyingFile:
    """A file that takes `num_bytes` bytes and then kills the process, wherever in a line that is."""

    def __init__(self, file: Any, num_bytes: int) -> None:
        self.file, self.left = file, num_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        self.file.write(data[:self.left])
        self.file.flush()
        self.left -= len(data[:self.left])
        if not self.left:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def start(log: Path, argv: List[str], num_bytes: int = -1, settings: bool = False) -> Tuple[Any, Any]:
    receiver, sender = forkserver.pipe()
    process = forkserver.start(infer, log, sender, argv, num_bytes, settings)
    # So that the receiver sees the end of the process.
    sender.close()
    return process, receiver


def receive(receiver: Any) -> Tuple[str, float]:
    """The next phase and when it began, `'end'` where the process has ended."""
    assert receiver.poll(DEADLINE), 'nothing happens any more'
    try:
        return receiver.recv()
    except EOFError:
        return 'end', time.perf_counter()


def run_to_the_end(log: Path, argv: List[str]) -> Dict[str, float]:
    """Runs undisturbed and returns how long each phase took, where there are several the longest."""
    process, receiver = start(log, argv)
    phase, began = receive(receiver)
    seconds = dict.fromkeys(PHASES, 0.)
    while phase != 'end':
        following, ended = receive(receiver)
        seconds[phase] = max(seconds[phase], ended - began)
        phase, began = following, ended
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    return seconds


def kill(log: Path, argv: List[str], phase: str, nth: int, delay: float, num_bytes: int) -> str:
    """Starts a run and kills it, `delay` seconds after it entered `phase` for the `nth` time or at `num_bytes`.

    Returns the phase in which it died.
    """
    process, receiver = start(log, argv, num_bytes, settings=phase == 'writing the settings')
    seen = []
    if num_bytes < 0 and phase != 'writing the settings':
        while seen.count(phase) < nth:
            seen.append(receive(receiver)[0])
            assert seen[-1] != 'end', f'ended before it was killed: {log.read_text()[-3000:]}'
        process.join(delay)
        process.kill()
    process.join(DEADLINE)
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
    while not seen or seen[-1] != 'end':
        seen.append(receive(receiver)[0])
    return seen[-2]


def choose_num_bytes(rng: random.Random, rest: bytes) -> int:
    """A moment of writing: before, within or at the end of one of the next three lines, with or without its newline."""
    lines = rest.splitlines(keepends=True)
    before = sum(map(len, lines[:rng.randrange(3)]))
    line = rest[before:rest.index(b'\n', before) + 1]
    return before + rng.choice([0, 1, rng.randrange(len(line)), len(line) - 1, len(line)])


# By the batch size, how many kills leave more lines than there were: a window of batches is written at a time.
@pytest.mark.parametrize(('max_batch_size', 'progress'), [(1, 8), (8, 4)])
@pytest.mark.parametrize('seed', [int(os.environ.get('KILL_SEED', 0))])
def test_a_run_that_is_killed_25_times_and_resumed_ends_as_an_undisturbed_one(model_dir: str, checkpoints: Dict[str,
                                                                                                                str],
                                                                              tmp_path: Path, seed: int,
                                                                              max_batch_size: int,
                                                                              progress: int) -> None:
    config = make_config(model_dir, checkpoints, tmp_path)
    samples = [{**SAMPLES[i % len(SAMPLES)], 'id': f'{i} {"é" * (i % 7)}'} for i in range(NUM_SAMPLES)]
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))
    path, log = Path(config.result_path), tmp_path / 'log.txt'
    # Both the compositions and the answers are drawn at random.
    argv = [
        'infer', *command_line(config), '--combination_type', 'dare_linear', '--density', '0.5', '--max_batch_size',
        str(max_batch_size)
    ]
    seconds = run_to_the_end(log, argv)
    undisturbed = tmp_path / 'undisturbed'
    path.parent.rename(undisturbed)
    expected = (undisturbed / path.name).read_bytes()
    assert expected.count(b'\n') == NUM_SAMPLES and len(set(expected.splitlines())) == NUM_SAMPLES

    rng = random.Random(seed)
    plan = [phase for phase, count in PHASES.items() for _ in range(count)]
    rng.shuffle(plan)
    # Settings are written by a run that finds no lines.
    plan.sort(key='writing the settings'.__ne__)
    history: List[Tuple[str, str, int]] = []
    left = b''
    for phase in plan:
        whole = left[:left.rfind(b'\n') + 1]
        num_bytes = choose_num_bytes(rng, expected[len(whole):]) if phase == 'writing' else -1
        nth = rng.randint(1, 3) if phase in ('composing', 'generating') else 1
        died_in = kill(log, [*argv, '--resume'], phase, nth, rng.random() * seconds[phase], num_bytes)
        left = path.read_bytes() if path.exists() else b''
        history.append((phase, died_in, len(left)))
        assert expected.startswith(left) and len(left) >= len(whole), history
        if num_bytes >= 0:
            assert len(left) == len(whole) + num_bytes, history

    print(f'seed {seed}: {len(history)} kills, as (planned, died in, bytes left): {history}')
    sizes = [0, *(size for _, _, size in history)]
    assert len(history) == 25
    assert sum(after > before for before, after in zip(sizes, sizes[1:])) >= progress, history
    assert len(left) < len(expected), history
    # At last by the command itself, which imports everything anew.
    process = subprocess.run([sys.executable, '-m', 'swift_patch.cli', *argv, '--resume'],
                             capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert f'│ finished before    │ {left.count(10)}' in process.stdout
    for file in undisturbed.iterdir():
        assert (path.parent / file.name).read_bytes() == file.read_bytes(), history
    assert sorted(os.listdir(path.parent)) == sorted(os.listdir(undisturbed))
