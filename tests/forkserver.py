"""Processes that are forked from one that has imported ms-swift already: the import takes longer than most tests.

Nothing of swift_patch is imported there, so that each process imports it anew, from where its `sys.path` says.
"""
import multiprocessing
from pathlib import Path
from typing import Any, Callable

PRELOADED = [
    'bitsandbytes', 'hypothesis', 'peft', 'pytest', 'swift.arguments', 'swift.infer_engine', 'swift.pipelines.utils',
    'swift.llm', 'swift.tuners', 'torch._dynamo.testing', 'transformers.models.qwen2.modeling_qwen2'
]

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(PRELOADED)


def start(target: Callable[..., None], log: Path, *arguments: Any) -> multiprocessing.Process:
    """Starts a process that calls `target`, a function of a module, and prints into the file `log`."""
    process = _context.Process(target=_run, args=(target, str(log), arguments), daemon=True)
    process.start()
    return process


def pipe() -> Any:
    """A pipe to such a process: the end to receive from and the end to send to."""
    return _context.Pipe(duplex=False)


def _run(target: Callable[..., None], log: str, arguments: Any) -> None:
    import os
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    target(*arguments)
