"""The processes of a run: what one of them does alone, and how all take what is left of the work.

`torch.distributed` tells who there is and where rank 0 is. What the ranks say to each other goes through sockets of
their own: the end of a process closes them, which is noticed at once, whatever it was doing. A gloo group notices it,
too, but nothing ends its other receives: they hold off signals, and threads within them abort the process at its end.
"""
import os
import pickle
import secrets
import signal
import socket
import threading
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from queue import SimpleQueue
from typing import Any, Callable, Dict, Generic, Iterator, List, Optional, Sequence, Tuple, TypeVar

T = TypeVar('T')
# What begins a task, and returns where its answer will be.
Begin = Callable[[int], 'Future[T]']

# Seconds within which rank 0 tells what another rank told it, unless it hangs.
_PATIENCE = 10.

# What ranks send: rank 0 a task, a value, an error, or that all is done (with why, where it failed).
_TASK, _VALUE, _ERROR, _END = 'task', 'value', 'error', 'end'
# Another rank that it can begin a task, what it found, why nobody is to begin any more, or that it does no more.
_FREE, _DONE, _FAILED, _LEFT = 'free', 'done', 'failed', 'left'
# What a rank hears from nobody else: an answer of its own, a signal, or that rank 0 is gone.
_ANSWER, _SIGNAL, _GONE = 'answer', 'signal', 'gone'

# The key by which the others find rank 0 in the store that all share.
_ADDRESS = 'swift_patch/ranks/address'


class ToldByMain(ValueError):
    """An error of the run that rank 0 tells the user. The other ranks end with the same status and say nothing."""


class RankDied(RuntimeError):
    """A rank ended before its work did. What the others had begun is done."""


class Terminated(RuntimeError):
    """A SIGTERM ended the work. What was begun is done."""


class Ranks:
    """The processes of a run, as one of them sees them. `joined` makes it.

    Attributes:
        rank: The number of this one.
        size: How many there are.
    """

    def __init__(self, rank: int, size: int, peers: Dict[int, '_Peer']):
        self.rank, self.size, self._peers = rank, size, peers

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads, writes and talks to the user."""
        return self.rank == 0

    def from_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 alone, while the others wait. All ranks call this.

        Nothing that all ranks have to do together belongs into `function`: ms-swift's downloads, for one.

        Args:
            function: What returns a value that can be pickled.

        Returns:
            The value, on all ranks.

        Raises:
            ToldByMain: If `function` raised a ValueError, on the other ranks. Rank 0 raises that itself.
            RankDied: If a rank is gone.
        """
        if not self.is_main:
            kind, content = self._peers[0].receive()
            if kind == _ERROR:
                raise ToldByMain(content)
            value: T = content
            return value
        value = self._called_on_main(function)
        for peer in self._peers.values():
            peer.send(_VALUE, value)
        return value

    def on_all(self, function: Callable[[], T]) -> T:
        """Calls `function` on every rank. All ranks call this.

        Args:
            function: What may wait for the other ranks itself, as ms-swift does where it downloads.

        Returns:
            The value of this rank.

        Raises:
            ToldByMain: If `function` raised a ValueError on any rank, on the ranks other than 0.
            ValueError: If it raised one, on rank 0: its own or that of another rank, with its number. On that rank
                where rank 0 does not hear it.
            RankDied: If a rank is gone.
        """
        if not self.is_main:
            return self._with_main(function)
        value = self._called_on_main(function)
        errors = []
        for peer in self._peers.values():
            kind, content = peer.receive()
            if kind == _ERROR:
                errors.append(f'Rank {peer.rank}: {content}')
        for peer in self._peers.values():
            peer.tell(_ERROR if errors else _VALUE, ''.join(errors[:1]))
        if errors:
            raise ValueError(errors[0])
        return value

    def _called_on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0, and tells the others where it raises a ValueError."""
        try:
            return function()
        except ValueError as e:
            for peer in self._peers.values():
                peer.tell(_ERROR, str(e))
            raise

    def _with_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on a rank other than 0, see `on_all`."""
        main = self._peers[0]
        error: Optional[ValueError] = None
        try:
            value = function()
        except ValueError as e:
            error = e
        main.send(_VALUE if error is None else _ERROR, '' if error is None else str(error))
        if error is not None and not main.answers_within(_PATIENCE):
            # It waits for this rank, in a place of its own.
            raise error
        kind, content = main.receive()
        if kind == _ERROR:
            raise ToldByMain(content)
        return value

    def share(self,
              tasks: Sequence[int],
              begin: 'Begin[T]',
              deliver: Callable[[int, T], None],
              window: int = 1) -> None:
        """Answers every task on whatever rank is free for it. All ranks call this, with the same tasks.

        Tasks are handed out in order, one at a time. Whatever goes wrong, no further task is handed out, but what was
        begun is answered and delivered before this raises. Only a KeyboardInterrupt, or the end of rank 0, ends it at
        once. It is over on all ranks at the same time.

        Args:
            tasks: The numbers of the tasks.
            begin: Called on some rank for each, in the thread that called this. What comes of its future can be
                pickled. `futures.settled` makes one of an answer that is there at once.
            deliver: Called on rank 0 with each task and its answer, in any order, from any thread, one call at a time.
            window: How many tasks a rank has begun at most that are not answered yet.

        Raises:
            ToldByMain: If it failed elsewhere, on any rank but 0.
            RankDied: If a rank ended before this did or if a task failed there, on rank 0; or if rank 0 ended.
            Terminated: If a SIGTERM was received.
            ValueError: If a task raised one, on rank 0, wherever that was.
            Exception: What a task or `deliver` raised here.
        """
        if self.is_main:
            _Main(self._peers, tasks, begin, deliver, window).run()
        else:
            _Worker(self._peers[0], begin, window).run()

    def leave(self) -> None:
        """Ends the connections. The other ranks notice at once."""
        for peer in self._peers.values():
            peer.hang_up()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Finds the other processes of this run, as `torchrun` started them. Leaves them at the end of the context.

    Where ms-swift starts process groups meanwhile, they end with it.

    Raises:
        RankDied: If there are ranks that do not come.
        ValueError: If `torchrun` would have set more variables of the environment.
    """
    if 'RANK' not in os.environ:
        yield Ranks(0, 1, {})
        return
    import torch.distributed as dist
    is_own = not dist.is_initialized()
    rank, size = int(os.environ['RANK']), int(os.environ.get('WORLD_SIZE') or 1)
    # ms-swift's process group finds this store at the same port, and gets it: it is to live until then.
    peers, _store = _meet(rank, size) if size > 1 else ({}, None)
    ranks = Ranks(rank, size, peers)
    try:
        yield ranks
    finally:
        ranks.leave()
        if is_own and dist.is_initialized():
            dist.destroy_process_group()


def _meet(rank: int, size: int) -> Tuple[Dict[int, '_Peer'], Any]:
    """Connects rank 0 with each other rank. Returns the connections of this one, and what is to be kept for them."""
    from torch.distributed.constants import default_pg_timeout
    from torch.distributed.rendezvous import rendezvous
    seconds = default_pg_timeout.total_seconds()
    try:
        store, _, _ = next(rendezvous('env://'))
        return _accept(store, size, seconds) if rank == 0 else {0: _connect(store, rank, seconds)}, store
    except (OSError, EOFError, RuntimeError) as e:
        raise RankDied(f'Rank {rank} finds no {"others" if rank == 0 else "rank 0"}: {e}') from e


def _accept(store: Any, size: int, seconds: float) -> Dict[int, '_Peer']:
    """Waits for all other ranks to connect."""
    host, family = _own_address(size)
    with socket.create_server(('127.0.0.1' if host == '127.0.0.1' else '', 0), family=family, backlog=size) as server:
        server.settimeout(seconds)
        key = secrets.token_bytes(32)
        store.set(_ADDRESS, pickle.dumps((host, server.getsockname()[1], key)))
        peers: Dict[int, _Peer] = {}
        while len(peers) < size - 1:
            peer = _Peer(server.accept()[0])
            try:
                peer.prove(key, first=True)
                peer.rank = peer.receive()[1]
            except Exception:  # it is none of the ranks
                peer.hang_up()
                continue
            peers[peer.rank] = peer
    # Who joins again does not find what is no more.
    store.delete_key(_ADDRESS)
    return peers


def _connect(store: Any, rank: int, seconds: float) -> '_Peer':
    """Connects to rank 0."""
    host, port, key = pickle.loads(store.get(_ADDRESS))
    connection = socket.create_connection((host, port), timeout=seconds)
    connection.settimeout(None)
    peer = _Peer(connection)
    peer.prove(key, first=False)
    peer.send(_FREE, rank)
    return peer


def _own_address(size: int) -> Tuple[str, socket.AddressFamily]:
    """Returns where the other ranks find this one."""
    if int(os.environ.get('LOCAL_WORLD_SIZE') or 1) == size:
        return '127.0.0.1', socket.AF_INET
    master = os.environ['MASTER_ADDR']
    family, kind, _, _, address = socket.getaddrinfo(master, int(os.environ['MASTER_PORT']), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        # Nothing is sent: this only chooses the way to where all ranks find the store.
        probe.connect(address)
        host = probe.getsockname()[0]
    # The way to itself may be one that only this machine knows.
    return (master if host.startswith('127.') or host == '::1' else host), family


class _Peer:
    """The connection to another rank."""

    def __init__(self, connection: socket.socket):
        self.rank = 0
        # It shuts down what another thread waits for, which closing does not.
        self._socket = connection
        # A machine that is gone closes nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = Connection(os.dup(connection.fileno()))

    def fileno(self) -> int:
        return self._connection.fileno()

    def prove(self, key: bytes, first: bool) -> None:
        """Makes sure that both sides have the key."""
        steps = [deliver_challenge, answer_challenge]
        for step in steps if first else reversed(steps):
            step(self._connection, key)

    def send(self, kind: str, *content: Any) -> None:
        """Sends a message. Raises RankDied where the other is gone."""
        # Before, so that what cannot be pickled is not taken for an end.
        data = pickle.dumps((kind, *content))
        try:
            self._connection.send_bytes(data)
        except OSError as e:
            raise RankDied(self.gone()) from e

    def tell(self, kind: str, *content: Any) -> None:
        """Sends a message to one that may be gone."""
        try:
            self.send(kind, *content)
        except RankDied:
            pass

    def receive(self) -> Tuple[Any, ...]:
        """Waits for a message. Raises RankDied where the other is gone."""
        try:
            data = self._connection.recv_bytes()
        except (EOFError, OSError) as e:
            raise RankDied(self.gone()) from e
        message: Tuple[Any, ...] = pickle.loads(data)
        return message

    def answers_within(self, seconds: float) -> bool:
        """Waits for a message, or the other's end, and returns whether it came."""
        return self._connection.poll(seconds)

    def gone(self) -> str:
        return f'Rank {self.rank} ended before its work did.'

    def hang_up(self) -> None:
        """Ends the connection, for whoever waits at either end of it."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other did
            pass
        self._socket.close()


@contextmanager
def _on_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Within it, a SIGTERM that nobody else looks after calls `act` and does not end the process."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: act())
    after = signal.SIG_DFL
    try:
        yield
    except (RankDied, Terminated):
        # What is left is to say so, which takes less than until `torchrun` kills what does not end.
        after = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGTERM, after)


class _Main(Generic[T]):
    """Rank 0 within `Ranks.share`. A thread of it hears the others, while the one that called answers tasks itself."""

    def __init__(self, peers: Dict[int, _Peer], tasks: Sequence[int], begin: 'Begin[T]',
                 deliver: Callable[[int, T], None], window: int):
        self._peers, self._tasks, self._begin, self._deliver, self._window = peers, iter(tasks), begin, deliver, window
        # Those that answer, or that have not asked for anything yet, and how many tasks each may still ask for.
        self._busy = dict(peers)
        self._asking = dict.fromkeys(peers, window)
        self._failures: List[BaseException] = []
        self._is_terminated = False
        # While tasks are taken and answers delivered.
        self._lock = threading.Lock()
        self._is_over = False
        self._others_ended = threading.Event()

    def run(self) -> None:
        with _on_sigterm(self._terminate):
            try:
                self._run()
            finally:
                # Where it was interrupted, the thread is still there.
                with self._lock:
                    self._is_over = True

    def _terminate(self) -> None:
        # In the middle of anything that the main thread does: no lock here.
        self._is_terminated = True

    def _run(self) -> None:
        threading.Thread(target=self._hear, daemon=True).start()
        begun: 'Dict[Future[T], int]' = {}
        while True:
            while len(begun) < self._window and (task := self._take()) is not None:
                begun[self._begin(task)] = task
            if not begun:
                break
            for future in wait_for_futures(begun, return_when=FIRST_COMPLETED).done:
                task = begun.pop(future)
                try:
                    self._keep(task, future.result())
                except Exception as e:
                    self._failures.append(e)
        # Not by `join`, which not every Python lets a signal interrupt.
        self._others_ended.wait()
        failure = self._failures[0] if self._failures else None
        if failure is None and self._is_terminated:
            failure = Terminated('SIGTERM was received.')
        for peer in self._peers.values():
            peer.tell(_END, None if failure is None else str(failure))
        if failure is not None:
            raise failure

    def _take(self) -> Optional[int]:
        with self._lock:
            if self._failures or self._is_terminated:
                return None
            return next(self._tasks, None)

    def _keep(self, task: int, value: T) -> None:
        with self._lock:
            if self._is_over:
                return
            try:
                self._deliver(task, value)
            except Exception as e:
                # Before anyone takes a task.
                self._failures.append(e)

    def _hear(self) -> None:
        try:
            while self._busy:
                # It takes whatever has a fileno.
                for peer in wait(list(self._busy.values())):  # type: ignore[arg-type]
                    try:
                        self._hear_one(peer)  # type: ignore[arg-type]
                    except Exception as e:  # its end, what cannot be unpickled
                        self._failures.append(e)
                        del self._busy[peer.rank]  # type: ignore[union-attr]
        finally:
            self._others_ended.set()

    def _hear_one(self, peer: _Peer) -> None:
        kind, *content = peer.receive()
        if kind == _FAILED:
            reason, is_mistake = content
            self._failures.append(ValueError(reason) if is_mistake else RankDied(f'Rank {peer.rank}: {reason}'))
            return
        if kind == _LEFT:
            del self._busy[peer.rank]
            return
        if kind == _DONE:
            self._keep(*content)
        task = self._take()
        if task is not None:
            peer.send(_TASK, task)
            return
        self._asking[peer.rank] -= 1
        if not self._asking[peer.rank]:
            del self._busy[peer.rank]


class _Worker(Generic[T]):
    """Any other rank within `Ranks.share`. A thread of it hears rank 0, also while a task is answered."""

    def __init__(self, main: _Peer, begin: 'Begin[T]', window: int):
        self._main, self._begin, self._window = main, begin, window
        self._inbox: 'SimpleQueue[Tuple[Any, ...]]' = SimpleQueue()
        self._is_main_gone = False
        self._can_interrupt = threading.current_thread() is threading.main_thread()

    def run(self) -> None:
        # A queue, for it takes what a signal handler puts into it.
        with _on_sigterm(lambda: self._inbox.put((_SIGNAL, ))):
            threading.Thread(target=self._hear, daemon=True).start()
            try:
                self._run()
            except KeyboardInterrupt:
                if self._is_main_gone:
                    raise RankDied(self._main.gone()) from None
                raise
            finally:
                self._can_interrupt = False

    def _run(self) -> None:
        for _ in range(self._window):
            self._main.send(_FREE)
        num_begun = 0
        error: Optional[BaseException] = None
        while error is None or num_begun:
            kind, *content = self._inbox.get()
            if kind == _GONE:
                raise RankDied(self._main.gone())
            if kind == _END:
                [reason] = content
                if reason is not None:
                    raise ToldByMain(reason)
                return
            failure: Optional[BaseException] = None
            if kind == _SIGNAL:
                failure = Terminated('SIGTERM was received.')
            elif kind == _ANSWER:
                num_begun -= 1
                failure = self._tell_answer(*content)
            elif error is None:
                num_begun += 1
                self._answer(*content)
            if failure is not None and error is None:
                error = failure
                self._main.tell(_FAILED, _reason_of(error), isinstance(error, ValueError))
        self._main.tell(_LEFT)
        if isinstance(error, ValueError):
            raise ToldByMain(str(error)) from error
        raise error

    def _answer(self, task: int) -> None:
        self._begin(task).add_done_callback(lambda future: self._inbox.put((_ANSWER, task, future)))

    def _tell_answer(self, task: int, future: 'Future[T]') -> Optional[BaseException]:
        """Tells rank 0 an answer. Returns what went wrong here."""
        error = future.exception()
        if error is not None:
            return error
        try:
            self._main.send(_DONE, task, future.result())
        except RankDied:
            raise
        except Exception as e:  # it cannot be pickled
            return e
        return None

    def _hear(self) -> None:
        try:
            while True:
                message = self._main.receive()
                self._inbox.put(message)
                if message[0] == _END:
                    return
        except RankDied:
            self._is_main_gone = True
            self._inbox.put((_GONE, ))
            if self._can_interrupt:
                # What is being answered is for nobody.
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]


def _reason_of(error: BaseException) -> str:
    """Returns what rank 0 tells of an error of another rank."""
    return str(error) if isinstance(error, (ValueError, RankDied, Terminated)) else f'{type(error).__name__}: {error}'
