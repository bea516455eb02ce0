"""Several processes for one command, started as `swift infer` starts them: by `torchrun`, from its variables."""
import io
import logging
import os
import signal
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any, Iterator, List, Optional, Sequence

# Those that `swift infer` reads: any of the first two asks for `torchrun`, and each is an option of it.
_ASKING = ('NPROC_PER_NODE', 'NNODES')
_OPTIONS = (*_ASKING, 'MASTER_PORT', 'NODE_RANK', 'MASTER_ADDR')
# What the launcher of `torchrun` handles, and leaves so.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def launched(argv: Sequence[str], verbose: bool = False) -> Optional[int]:
    """Runs a command as several processes, where the environment asks for it as it asks `swift infer`.

    Args:
        argv: The arguments of `swift-patch`, the command first.
        verbose: Whether what `torchrun` logs is shown.

    Returns:
        None where one process is asked for, or where this is one of several. Otherwise the exit status: 0, or that of
        the rank that failed first, or 128 and the number of the signal that ended it.

    Raises:
        ValueError: If the processes cannot be started.
    """
    if 'RANK' in os.environ or not any(name in os.environ for name in _ASKING):
        return None
    try:
        with _as_before():
            return _run(argv, verbose)
    except KeyboardInterrupt:
        # Before the launcher handles it: there are no ranks yet.
        return 128 + signal.SIGINT


def _run(argv: Sequence[str], verbose: bool) -> int:
    # Not by `swift.cli.main`, which has these lines, but imports all of ms-swift for them.
    options = [f'--{name.lower()}={os.environ[name]}' for name in _OPTIONS if name in os.environ]
    if not verbose:
        # It logs what ranks tell themselves, every signal and, in C++, that others close their connections.
        logging.disable(logging.CRITICAL)
        os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    try:
        args = _parsed([*options, '-m', 'swift_patch.cli', *argv])
        # Only 1 is what `torchrun` chooses, with a warning.
        num_cores = len(os.sched_getaffinity(0))
        num_ranks = run.determine_local_world_size(args.nproc_per_node)
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, num_cores // max(1, num_ranks))))
        run.run(args)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        # Nobody else may have been left to tell it.
        print(f'swift-patch {argv[0]}: error: rank {rank} was ended by {failure.signal_name()}.', file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as e:
        return 128 + e.sigval
    except (AssertionError, RuntimeError, ValueError) as e:
        found = ' '.join(f'{name}={os.environ[name]}' for name in _OPTIONS if name in os.environ)
        raise ValueError(f'The processes cannot be started with {found}: {e}') from e
    return 0


def _parsed(arguments: List[str]) -> Any:
    """Parses arguments of `torchrun`. Raises ValueError, where that would print its usage and exit."""
    from torch.distributed.run import parse_args
    try:
        with redirect_stderr(io.StringIO()) as told:
            return parse_args(arguments)
    except SystemExit:
        raise ValueError(told.getvalue().strip().rpartition('error: ')[2]) from None


@contextmanager
def _as_before() -> Iterator[None]:
    """Puts back what starting ranks changes in this process: signal handlers, the environment, logging."""
    with ExitStack() as stack:
        for number in _SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
        stack.callback(logging.disable, logging.root.manager.disable)
        environment = dict(os.environ)
        stack.callback(os.environ.update, environment)
        stack.callback(os.environ.clear)
        yield
