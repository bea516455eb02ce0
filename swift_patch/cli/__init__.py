"""The command `swift-patch`. It is ready for Ctrl-C before it imports anything that takes long."""
import os
import signal
import sys
import threading
from types import FrameType
from typing import List, Optional

# As shells have it: 128 and the number of the signal.
_INTERRUPTED = 128 + signal.SIGINT


def command() -> None:
    """Runs `swift-patch` and ends the process with its exit code."""
    code = main()
    # There is nothing left to interrupt, but the code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == _INTERRUPTED:
        # Where the interrupt came into Python that a library runs in C, the interpreter would end by the signal.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_main() -> bool:
    """Tells whether this is the process of a run that talks: the others do the same and would say the same."""
    return os.environ.get('RANK', '0') == '0'


def main(argv: Optional[List[str]] = None) -> int:
    """Runs `swift-patch`.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0; 1 or 2 where the command failed, which is told on stderr; 130 where it was interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    interrupts: List[int] = []

    def interrupt(number: int, frame: Optional[FrameType]) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    # Signals are the main thread's, and somebody may have said that they are to be ignored, as `nohup` does.
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    if is_ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from .commands import run
        return run(arguments)
    except BaseException as e:
        # Libraries make errors of their own of it, where it comes while they are imported.
        if not isinstance(e, KeyboardInterrupt) and not interrupts:
            raise
        # With a text on how to go on, where there is something to go on with.
        how = f'; {e}' if isinstance(e, KeyboardInterrupt) and e.args else ''
        if is_main():
            print(f'swift-patch {" ".join(arguments[:1])}: interrupted{how}', file=sys.stderr)
        return _INTERRUPTED
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
