"""Ranks share what there is to do, whoever is free, and none waits for one that is gone."""
import forkserver
import json
import os
import pickle
import pytest
import sharing
import signal
import socket
import subprocess
import sys
import torch.distributed
from collections import Counter
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Listener, wait
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, Dict, Iterator, List, Optional, Tuple

from swift_patch.inference.ranks import RankDied, Ranks, ToldByMain, _Peer

PROGRAM = str(Path(__file__).with_name('sharing.py'))
# For the slowest machine; nothing takes nearly as long.
DEADLINE = 120
# So many that they are not done before a thread of rank 0 hears that it is to hand out no more.
NUM_TASKS = 1000


def free_port() -> str:
    with socket.create_server(('127.0.0.1', 0)) as server:
        return str(server.getsockname()[1])


def call_as_a_stranger(port: int) -> None:
    """Connects to rank 0 without the key that the others find in the store."""
    # Taken for a rank here, for which rank 0 waits.
    store = torch.distributed.TCPStore('127.0.0.1', port, world_size=2, is_master=False)
    host, port, _ = pickle.loads(store.get('swift_patch/ranks/address'))
    with socket.create_connection((host, port)) as connection:
        connection.sendall(b'GET / HTTP/1.1')


class Run:
    """Ranks that tell the test what they are about to do, and wait to be told how it ends."""

    def __init__(self, tmp_path: Path, stack: ExitStack):
        self.path, self.stack = tmp_path, stack
        self.processes: List[Any] = []
        self.torchrun: Any = None
        self.connections: Dict[int, Any] = {}
        self.pids: Dict[int, int] = {}
        # What each rank works on.
        self.tasks: Dict[int, int] = {}

    def start(self, size: int, torchrun: bool = False, stranger: bool = False) -> None:
        """Starts the ranks: as `torchrun` would, from a process that has imported everything, or by `torchrun`."""
        # Not in a folder of its own, whose path may be too long for a socket.
        with Listener(family='AF_UNIX') as listener:
            arguments = [listener.address, str(self.path / 'delivered'), NUM_TASKS]
            listener._listener._socket.settimeout(DEADLINE)
            if torchrun:
                command = ['torch.distributed.run', '--standalone', '--nproc_per_node', str(size), PROGRAM]
                with open(self.path / 'all.log', 'w') as log:
                    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
                    process = subprocess.Popen([sys.executable, '-m', *command, *map(str, arguments)],
                                               env=environment,
                                               stdout=log,
                                               stderr=log)
                self.stack.callback(process.kill)
                self.torchrun = process
            else:
                of_all = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(), 'WORLD_SIZE': str(size)}
                for rank in range(size):
                    of_rank = {**of_all, 'RANK': str(rank)} if size > 1 else {}
                    process = forkserver.start(sharing.start, self.path / f'{rank}.log', of_rank, *arguments)
                    self.stack.callback(process.kill)
                    self.processes.append(process)
                    if stranger and rank == 0:
                        call_as_a_stranger(int(of_all['MASTER_PORT']))
            for _ in range(size):
                connection = self.stack.enter_context(listener.accept())
                rank, pid = connection.recv()
                self.connections[rank], self.pids[rank] = connection, pid

    def hear(self, rank: int) -> Any:
        """What a rank is about to do, `gone` where it has ended."""
        assert self.connections[rank].poll(DEADLINE), f'nothing happens any more\n{self.log()}'
        try:
            return self.connections[rank].recv()
        except (EOFError, ConnectionResetError):
            return 'gone', None

    def tell(self, rank: int, *what: Any) -> None:
        self.connections[rank].send(what)

    def join(self) -> None:
        """Goes on until every rank has a task."""
        assert self.hear(0) == ('main', None)
        self.tell(0, 'go', 'from rank 0')
        for rank in self.connections:
            assert self.hear(rank) == ('from_main', 'from rank 0')
            self.tell(rank, 'go')
        for rank in self.connections:
            self.hear_task(rank)

    def hear_task(self, rank: int) -> None:
        what, self.tasks[rank] = self.hear(rank)
        assert what == 'task', self.log()

    def finish(self, *ranks: int, alone: bool = False) -> List[int]:
        """Lets ranks that wait do so and all that comes. Returns which tasks they were given meanwhile.

        Where `alone`, rank 0 does no more before all others have ended or are told to do no more.
        """
        for rank in ranks:
            self.tell(rank, 'alone' if alone and rank == 0 else 'go')
        tasks = []
        left = {self.connections[rank]: rank for rank in ranks}
        while left:
            ready = wait(left, DEADLINE)
            assert ready, f'nothing happens any more\n{self.log()}'
            for connection in ready:
                what, about = self.hear(left[connection])
                if what == 'gone':
                    del left[connection]
                    continue
                if what == 'task':
                    assert not alone or left[connection] != 0, 'rank 0 goes on'
                    tasks.append(about)
                connection.send(('go', ))
        return tasks

    def end(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def statuses(self) -> List[Optional[int]]:
        """The exit status of each rank, or that of `torchrun`."""
        if self.torchrun is not None:
            return [self.torchrun.wait(DEADLINE)]
        for process in self.processes:
            process.join(DEADLINE)
        return [process.exitcode for process in self.processes]

    def delivered(self) -> Dict[int, str]:
        path = self.path / 'delivered'
        lines = path.read_text().splitlines() if path.exists() else []
        answers = dict(map(json.loads, lines))
        assert len(answers) == len(lines), 'delivered twice'
        return answers

    def log(self, *ranks: int) -> str:
        names = map(str, ranks) if ranks else ('all', *map(str, range(len(self.processes))))
        files = [self.path / f'{name}.log' for name in names]
        return ''.join(file.read_text() for file in files if file.exists())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with ExitStack() as stack:
        yield Run(tmp_path, stack)


def by(tasks: Dict[int, int]) -> Dict[int, str]:
    """The answers of ranks to their tasks."""
    return {task: f'{task} by {rank}' for rank, task in tasks.items()}


@pytest.mark.parametrize(('size', 'torchrun'), [(1, False), (2, False), (3, False), (3, True)])
def test_a_rank_that_is_free_takes_what_is_left(run: Run, size: int, torchrun: bool) -> None:
    run.start(size, torchrun)
    run.join()
    assert sorted(run.tasks.values()) == list(range(size))
    # The last rank works on its first task, while the others do all the rest.
    slow = size - 1
    fast = {run.connections[rank]: rank for rank in range(max(slow, 1))}
    for connection in fast:
        connection.send(('go', ))
    tasks: Dict[int, List[int]] = {rank: [] for rank in fast.values()}
    for _ in range(size, NUM_TASKS):
        connection = wait(fast, DEADLINE)[0]
        what, task = run.hear(fast[connection])
        assert what == 'task'
        tasks[fast[connection]].append(task)
        connection.send(('go', ))
    assert sorted(sum(tasks.values(), [])) == list(range(size, NUM_TASKS))
    assert all(of_rank == sorted(of_rank) for of_rank in tasks.values()), 'they are handed out in order'
    if slow:
        run.tell(slow, 'go')
    for rank in range(size):
        assert run.hear(rank) == ('end', 1), 'no thread is left'
        run.tell(rank, 'go')
    assert set(run.statuses()) == {0}
    answers = run.delivered()
    assert sorted(answers) == list(range(NUM_TASKS))
    assert [task for task in answers if answers[task].endswith(f'by {slow}')] == [run.tasks[slow]] or size == 1


@pytest.mark.parametrize('size', [2, 3])
def test_a_rank_that_is_killed_ends_the_work_once_the_others_have_finished_what_they_began(run: Run, size: int) -> None:
    run.start(size)
    run.join()
    run.end(1, signal.SIGKILL)
    assert run.hear(1) == ('gone', None)
    others = [rank for rank in range(size) if rank != 1]
    tasks = run.finish(*others, alone=True)
    assert len(tasks) < NUM_TASKS - size
    assert sorted(run.delivered()) == sorted([*(run.tasks[rank] for rank in others), *tasks])
    assert run.statuses() == [1, -signal.SIGKILL, 2][:size]
    assert run.log(0) == 'died: Rank 1 ended before its work did.\n'
    assert run.log(*others[1:]) == run.log(0) if size == 2 else run.log(2) == ''


@pytest.mark.parametrize('size', [2, 3])
def test_the_others_end_at_once_where_rank_0_is_killed(run: Run, size: int) -> None:
    run.start(size)
    run.join()
    run.end(0, signal.SIGKILL)
    # In the middle of their tasks, which nobody lets go on.
    assert run.statuses() == [-signal.SIGKILL, 1, 1][:size]
    assert run.delivered() == {}
    assert run.log(1) == 'died: Rank 0 ended before its work did.\n'


@pytest.mark.parametrize('rank', [0, 1, 2])
@pytest.mark.parametrize(('error', 'status'), [(ValueError('it is broken'), 2), (TypeError('it is broken'), 1)])
def test_an_answer_that_fails_is_told_on_rank_0_and_the_others_finish_theirs(run: Run, rank: int, error: Exception,
                                                                             status: int) -> None:
    run.start(3)
    run.join()
    run.tell(rank, 'raise', error)
    if rank:
        assert run.hear(rank) == ('gone', None)
    others = [other for other in range(3) if other != rank]
    tasks = run.finish(*others, alone=rank != 0)
    assert len(tasks) < NUM_TASKS - 3
    assert by({other: run.tasks[other] for other in others}).items() <= run.delivered().items()
    assert len(run.delivered()) == 2 + len(tasks)
    assert run.statuses() == [status if other in (0, rank) else 2 for other in range(3)]
    assert 'it is broken' in run.log(0)
    assert [other for other in (1, 2) if run.log(other)] == ([rank] if rank and status == 1 else [])


def test_an_answer_that_cannot_be_sent_is_an_error_that_says_so(run: Run) -> None:
    run.start(2)
    run.join()
    run.tell(1, 'go', 'lock')
    assert run.hear(1) == ('gone', None)
    assert run.finish(0, alone=True) == []
    assert run.statuses() == [1, 1]
    assert "cannot pickle '_thread.lock' object" in run.log(0)


@pytest.mark.parametrize('rank', [0, 1])
def test_what_deliver_raises_ends_the_work(run: Run, rank: int) -> None:
    run.start(3)
    run.join()
    run.tell(rank, 'go', 'full')
    assert run.hear(0) == ('full', None)
    others = {0, 1, 2} - {rank}
    assert run.finish(*others) == []
    assert run.delivered() == by({other: run.tasks[other] for other in others})
    assert run.statuses() == [2, 2, 2]
    assert [run.log(rank) for rank in range(3)] == ['error: the disk is full\n', '', '']


@pytest.mark.parametrize('rank', [0, 1])
def test_a_rank_that_gets_a_sigterm_finishes_its_task_and_no_other_is_begun(run: Run, rank: int) -> None:
    run.start(2)
    run.join()
    run.end(rank, signal.SIGTERM)
    tasks = run.finish(0, 1, alone=rank != 0)
    assert len(tasks) < NUM_TASKS - 2
    assert sorted(run.delivered()) == sorted([*run.tasks.values(), *tasks])
    assert run.statuses() == ([143, 2] if rank == 0 else [1, 143])
    assert run.log(rank) == 'terminated: SIGTERM was received.\n'


@pytest.mark.parametrize('size', [1, 3])
def test_an_interrupt_of_rank_0_ends_all_at_once(run: Run, size: int) -> None:
    run.start(size)
    run.join()
    run.end(0, signal.SIGINT)
    assert run.statuses() == [130, 1, 1][:size]
    assert run.delivered() == {}


def test_an_interrupt_of_another_rank_ends_it_at_once(run: Run) -> None:
    run.start(2)
    run.join()
    run.end(1, signal.SIGINT)
    assert run.hear(1) == ('gone', None)
    assert run.finish(0, alone=True) == []
    assert run.statuses() == [1, 130]
    assert run.delivered() == by({0: run.tasks[0]})


def test_a_mistake_that_rank_0_finds_ends_all_and_is_told_once(run: Run) -> None:
    run.start(3)
    assert run.hear(0) == ('main', None)
    run.tell(0, 'raise', ValueError('there is no such dataset'))
    assert run.statuses() == [2, 2, 2]
    assert [run.log(rank) for rank in range(3)] == ['error: there is no such dataset\n', '', '']


def test_what_rank_0_does_alone_ends_with_it(run: Run) -> None:
    run.start(3)
    assert run.hear(0) == ('main', None)
    run.end(0, signal.SIGKILL)
    assert run.statuses() == [-signal.SIGKILL, 1, 1]


@pytest.mark.parametrize('size', [2, 3])
def test_a_rank_that_ends_before_the_work_begins_leaves_the_others_with_what_they_have(run: Run, size: int) -> None:
    run.start(size)
    assert run.hear(0) == ('main', None)
    run.tell(0, 'go', 'from rank 0')
    for rank in range(size):
        run.hear(rank)
    run.end(1, signal.SIGKILL)
    assert run.hear(1) == ('gone', None)
    assert len(run.finish(*({*range(size)} - {1}))) < NUM_TASKS
    assert run.statuses() == [1, -signal.SIGKILL, 2][:size]


def test_torchrun_ends_the_others_where_one_is_killed(run: Run) -> None:
    run.start(3, torchrun=True)
    run.join()
    run.end(1, signal.SIGKILL)
    assert run.hear(1) == ('gone', None)
    tasks = run.finish(0, 2, alone=True)
    assert len(tasks) < NUM_TASKS - 3
    assert run.statuses() == [1]
    assert sorted(run.delivered()) == sorted([run.tasks[0], run.tasks[2], *tasks])
    assert 'Rank 1 ended before its work did.' in run.log()
    assert 'terminate called' not in run.log()


def test_a_stranger_that_connects_to_rank_0_is_turned_away(run: Run) -> None:
    run.start(2, stranger=True)
    run.join()
    run.finish(0, 1)
    assert run.statuses() == [0, 0]


class Window:
    """Ranks of this process, whose tasks are answered by the test.

    Attributes:
        told: What happens: the rank, and a task that it has begun with the future of its answer, or how it ended.
        delivered: The answers, by task.
    """

    def __init__(self, size: int, num_tasks: int, window: int) -> None:
        self.told: 'Queue[Tuple[Any, ...]]' = Queue()
        self.delivered: Dict[int, int] = {}
        peers, others = {}, []
        for rank in range(1, size):
            with socket.create_server(('127.0.0.1', 0)) as server:
                others.append(Ranks(rank, size, {0: _Peer(socket.create_connection(server.getsockname()))}))
                peers[rank] = _Peer(server.accept()[0])
                peers[rank].rank = rank
        for ranks in [Ranks(0, size, peers), *others]:
            Thread(target=self.share, args=(ranks, num_tasks, window)).start()

    def share(self, ranks: Ranks, num_tasks: int, window: int) -> None:
        error = None
        try:
            ranks.share(range(num_tasks), partial(self.begin, ranks.rank), self.delivered.__setitem__, window)
        except Exception as e:
            error = e
        ranks.leave()
        self.told.put((ranks.rank, error))

    def begin(self, rank: int, task: int) -> Future:
        future: Future = Future()
        self.told.put((rank, task, future))
        return future

    def take(self, count: int) -> List[Tuple[Any, ...]]:
        """What happens next."""
        return [self.told.get(timeout=DEADLINE) for _ in range(count)]

    def end(self, size: int) -> Tuple[Dict[int, Optional[Exception]], List[int]]:
        """Answers whatever comes, and returns how each rank ended, and the tasks that came."""
        errors, tasks = {}, []
        while len(errors) < size:
            [(rank, what, *future)] = self.take(1)
            if future:
                tasks.append(what)
                future[0].set_result(what)
            else:
                errors[rank] = what
        return errors, tasks


@pytest.mark.parametrize('size', [1, 3])
def test_each_rank_has_a_window_of_tasks_and_begins_one_more_for_each_that_is_answered(size: int) -> None:
    run = Window(size, 30, window=4)
    waiting = run.take(4 * size)
    assert Counter(rank for rank, _, _ in waiting) == dict.fromkeys(range(size), 4)
    for _ in range(4 * size, 30):
        # The newest first: they are answered in any order.
        rank, task, future = waiting.pop()
        assert run.told.empty()
        future.set_result(task)
        waiting += run.take(1)
        assert waiting[-1][0] == rank
    for _, task, future in waiting:
        future.set_result(task)
    assert run.end(size) == (dict.fromkeys(range(size)), [])
    assert run.delivered == {task: task for task in range(30)}


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('error', [ValueError('it is broken'), TypeError('it is broken'), RankDied('it is broken')])
def test_what_a_window_has_begun_is_answered_where_a_task_of_it_fails(rank: int, error: Exception) -> None:
    run = Window(2, NUM_TASKS, window=4)
    waiting = sorted(run.take(8), key=lambda begun: begun[0] != rank)
    waiting.pop(0)[2].set_exception(error)
    # After what went wrong there.
    for _, task, future in waiting:
        future.set_result(task)
    errors, later = run.end(2)
    assert len(later) < NUM_TASKS - 8
    assert sorted(run.delivered) == sorted([*(task for _, task, _ in waiting), *later])
    assert 'it is broken' in str(errors[0])
    kind = ValueError if isinstance(error, ValueError) else RankDied
    assert isinstance(errors[0], kind if rank else type(error))
    if rank:
        assert isinstance(errors[1], ToldByMain if kind is ValueError else type(error))


def test_one_process_needs_no_torch() -> None:
    program = """
import sys
from swift_patch.futures import settled
from swift_patch.inference.ranks import joined
with joined() as ranks:
    answer = lambda task: settled(lambda: ranks.from_main(lambda: 2 * task))
    ranks.share([1, 2], answer, lambda *answer: print(*answer))
print(ranks.rank, ranks.size, ranks.is_main, 'torch' in sys.modules)
"""
    environment = {key: value for key, value in os.environ.items() if key != 'RANK'}
    output = subprocess.run([sys.executable, '-c', program],
                            env=environment,
                            capture_output=True,
                            text=True,
                            check=True)
    assert output.stdout == '1 2\n2 4\n0 1 True False\n'
