"""What happens to files between any two system calls of somebody who reads them."""
import builtins
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping
from unittest import mock

# All that the library asks of the system, by which file names or numbers are its first argument.
_CALLS = ('open', 'stat', 'fstat', 'scandir', 'pread', 'preadv')


@contextmanager
def between_calls(folder: Path, actions: Mapping[int, Callable[[], Any]]) -> Iterator[List[str]]:
    """Within it, `actions[n]` happens right before the n-th system call that looks at a file in a folder.

    Yields:
        The calls so far.
    """
    calls: List[str] = []
    opened: List[int] = []
    is_acting = False

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:

        def call(first: Any = '.', *args: Any, **kwargs: Any) -> Any:
            nonlocal is_acting
            is_meant = first in opened if isinstance(first, int) else str(first).startswith(str(folder))
            if not is_meant or is_acting:
                return function(first, *args, **kwargs)
            calls.append(name)
            is_acting = True
            try:
                actions.get(len(calls) - 1, lambda: None)()
            finally:
                is_acting = False
            result = function(first, *args, **kwargs)
            if name.endswith('open'):
                opened.append(result if isinstance(result, int) else result.fileno())
            return result

        return call

    patches = [mock.patch.object(os, name, watched(name, getattr(os, name))) for name in _CALLS]
    patches.append(mock.patch.object(builtins, 'open', watched('builtins.open', open)))
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()
