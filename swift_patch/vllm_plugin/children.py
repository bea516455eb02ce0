"""The processes that an engine of vLLM has: they end with the one that started them, and not before it."""
import multiprocessing
import os
import threading
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Iterator

# What says that a process is one of these.
_VARIABLE = 'SWIFT_PATCH_CHILD'


@contextmanager
def starting_children(**environment: str) -> Iterator[None]:
    """Within it, processes that start are children of this one, and find variables in their environment."""
    environment = {_VARIABLE: '1', **environment}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def settle() -> None:
    """Has a child end where its parent did, however that was: vLLM's would wait for ever, with all of their memory.

    A signal to the parent's group (Ctrl-C, `torchrun`) is for the parent: it may still wait for answers.
    """
    parent = multiprocessing.parent_process()
    if parent is None or _VARIABLE not in os.environ:
        return
    os.setpgid(0, 0)

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
