"""The process that starts ranks, and what each of them is instead of Python: it does what the test says."""
import os
import signal
import sys
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, Dict, List

# As `torchrun` starts what is not Python; by `sh`, which finds it with spaces in its path.
SCRIPT = f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).absolute()}" "$@"\n'


def launch(environment: Dict[str, str], argv: List[str]) -> None:
    """Becomes `swift-patch`, in a process that was forked."""
    from swift_patch.cli.launch import launched
    os.environ.pop('OMP_NUM_THREADS')
    os.environ.update(environment)
    try:
        status = launched(argv, '--verbose' in argv)
    except ValueError as e:
        sys.exit(f'error: {e}')
    sys.exit(100 if status is None else status)


def be_rank(argv: List[str]) -> Any:
    """Tells the test who it is and what it was given, and exits as the test says."""
    # From the first moment on, as the test may interrupt it as soon as it has told who it is.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    test = Client(os.environ['TEST_ADDRESS'])
    test.send((int(os.environ['RANK']), os.getpid(), argv, os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS']))
    return test.recv()


if __name__ == '__main__':
    sys.exit(be_rank(sys.argv[1:]))
