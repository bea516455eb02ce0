"""`swift-patch` starts ranks as `swift infer` does, ends as they end, and leaves none."""
import forkserver
import launching
import logging
import os
import psutil
import pytest
import signal
import socket
from contextlib import ExitStack
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from swift_patch.cli.launch import launched

# For the slowest machine; nothing takes nearly as long.
DEADLINE = 120


class Launch:
    """Launchers of ranks that wait to be told how they end."""

    def __init__(self, tmp_path: Path, stack: ExitStack):
        self.path, self.stack = tmp_path, stack
        self.script = tmp_path / 'a rank'
        self.script.write_text(launching.SCRIPT)
        self.script.chmod(0o755)
        # Not in a folder of its own, whose path may be too long for a socket.
        self.listener = stack.enter_context(Listener(family='AF_UNIX'))
        self.address = self.listener.address
        self.listener._listener._socket.settimeout(DEADLINE)
        self.launchers: List[Any] = []
        # By rank: the connection, and what it was started with.
        self.connections: Dict[int, Any] = {}
        self.processes: Dict[int, psutil.Process] = {}
        self.started: Dict[int, Any] = {}

    def start(self, *argv: str, **environment: Any) -> None:
        of_all = {'PYTHON_EXEC': str(self.script), 'TEST_ADDRESS': self.address}
        of_this = {key: str(value) for key, value in environment.items()}
        log = self.path / f'{len(self.launchers)}.log'
        launcher = forkserver.start(launching.launch, log, {**of_all, **of_this}, ['infer', *argv])
        self.stack.callback(launcher.kill)
        self.launchers.append(launcher)

    def accept(self, size: int) -> None:
        for _ in range(size):
            connection = self.stack.enter_context(self.listener.accept())
            rank, pid, *self.started[rank] = connection.recv()
            self.connections[rank], self.processes[rank] = connection, psutil.Process(pid)

    def statuses(self) -> List[Optional[int]]:
        for launcher in self.launchers:
            launcher.join(DEADLINE)
        return [launcher.exitcode for launcher in self.launchers]

    def log(self) -> str:
        return ''.join(file.read_text() for file in sorted(self.path.glob('*.log')))

    def is_anyone_left(self) -> bool:
        return any(process.is_running() for process in self.processes.values())


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    with ExitStack() as stack:
        yield Launch(tmp_path, stack)


@pytest.mark.parametrize('environment', [{}, {
    'NODE_RANK': '0',
    'MASTER_PORT': '1'
}, {
    'NPROC_PER_NODE': '2',
    'RANK': '0'
}])
def test_a_process_that_is_one_of_several_or_the_only_one_starts_none(monkeypatch: pytest.MonkeyPatch,
                                                                      environment: Dict[str, str]) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert launched(['infer']) is None


@pytest.mark.parametrize('omp_num_threads', [None, '7'])
def test_each_rank_gets_the_arguments_and_its_share_of_the_cores(launch: Launch,
                                                                 omp_num_threads: Optional[str]) -> None:
    given = {} if omp_num_threads is None else {'OMP_NUM_THREADS': omp_num_threads}
    launch.start('--result_path', 'a b', NPROC_PER_NODE=2, **given)
    launch.accept(2)
    for rank in range(2):
        argv, size, threads = launch.started[rank]
        assert argv == ['-u', '-m', 'swift_patch.cli', 'infer', '--result_path', 'a b']
        assert size == '2'
        assert threads == (omp_num_threads or str(max(1, len(os.sched_getaffinity(0)) // 2)))
        launch.connections[rank].send(0)
    assert launch.statuses() == [0]
    assert launch.log() == ''


def test_ranks_of_several_nodes_find_each_other(launch: Launch) -> None:
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    for node in (0, 1):
        launch.start(NNODES=2, NODE_RANK=node, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    launch.accept(2)
    for rank in (0, 1):
        assert launch.started[rank][1] == '2'
        launch.connections[rank].send(0)
    assert launch.statuses() == [0, 0]


@pytest.mark.parametrize('rank', [0, 1])
def test_the_status_is_that_of_the_rank_that_failed_first(launch: Launch, rank: int) -> None:
    launch.start(NPROC_PER_NODE=2)
    launch.accept(2)
    launch.connections[rank].send(2)
    # The other is ended.
    assert launch.statuses() == [2]
    assert launch.log() == ''
    assert not launch.is_anyone_left()


def test_a_rank_that_is_killed_is_told(launch: Launch) -> None:
    launch.start(NPROC_PER_NODE=2)
    launch.accept(2)
    launch.processes[1].kill()
    assert launch.statuses() == [128 + signal.SIGKILL]
    assert launch.log() == 'swift-patch infer: error: rank 1 was ended by SIGKILL.\n'
    assert not launch.is_anyone_left()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks_without_a_word(launch: Launch, number: int) -> None:
    launch.start(NPROC_PER_NODE=3)
    launch.accept(3)
    os.kill(launch.launchers[0].pid, number)
    assert launch.statuses() == [128 + number]
    assert launch.log() == ''
    assert not launch.is_anyone_left()


def test_verbose_shows_what_torchrun_logs(launch: Launch) -> None:
    launch.start('--verbose', NPROC_PER_NODE=1)
    launch.accept(1)
    launch.connections[0].send(3)
    assert launch.statuses() == [3]
    assert 'exitcode: 3' in launch.log()


@pytest.mark.parametrize(('environment', 'said'), [
    ({
        'NPROC_PER_NODE': 'two'
    }, 'NPROC_PER_NODE=two: Unsupported nproc_per_node value: two'),
    ({
        'NNODES': '2',
        'NODE_RANK': 'a'
    }, "NNODES=2 NODE_RANK=a: argument --node-rank/--node_rank: invalid int value: 'a'"),
    ({
        'NNODES': '0'
    }, 'NNODES=0: '),
])
def test_what_torchrun_does_not_take_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch,
                                                               capfd: pytest.CaptureFixture,
                                                               environment: Dict[str, str], said: str) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError) as e:
        launched(['infer'])
    assert said in str(e.value)
    assert capfd.readouterr() == ('', '')


def test_a_port_that_is_taken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(('127.0.0.1', 0)) as server:
        monkeypatch.setenv('NNODES', '1')
        monkeypatch.setenv('MASTER_PORT', str(server.getsockname()[1]))
        with pytest.raises(ValueError, match='cannot be started'):
            launched(['infer'])


def test_the_process_is_as_before(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('NPROC_PER_NODE', '1')
    # Any rank that ends.
    monkeypatch.setenv('PYTHON_EXEC', '/bin/true')
    handlers = [signal.getsignal(number) for number in signal.Signals]
    environment, disabled = dict(os.environ), logging.root.manager.disable
    assert launched(['infer']) == 0
    assert [signal.getsignal(number) for number in signal.Signals] == handlers
    assert os.environ == environment
    assert logging.root.manager.disable == disabled
