"""Errors of this package, and how their messages show what was found."""
import reprlib
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, Sequence


class RowsError(ValueError):
    """It cannot be told which row of a batch a value belongs to, or rows cannot be used for what is asked."""


class _Short(reprlib.Repr):

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 80
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxdict = 10

    def repr1(self, x: Any, level: int) -> str:
        try:
            return super().repr1(x, level)
        except Exception:  # integers of more than 4300 digits, for one, have no repr
            return f'<{type(x).__name__} without a repr>'


def short_repr(value: Any) -> str:
    """Returns the repr of any value, cut where it is long. Never raises, also where the value's own repr does."""
    return _Short().repr(value)


def joined(items: Sequence[Any]) -> str:
    """Returns what an error says of a list that may be long: the first of it."""
    return ', '.join(printable(item) for item in items[:5]) + (', ...' if len(items) > 5 else '')


def printable(value: Any) -> str:
    """Returns the text of a value that was found in a file, with escapes for what would control a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(value))


def reason_of(error: BaseException, length: int = 1000) -> str:
    """Returns the kind and the text of a library's error on one line, the text no longer than `length`."""
    return f'{type(error).__name__}: {" ".join(str(error).split()):.{length}}'


def without_paths(message: str, paths: Iterable[str]) -> str:
    """Returns what a client is told: a message without where things are on the server."""
    for path in paths:
        message = message.replace(f' ({path})', '').replace(path, '...')
    return message


@contextmanager
def errors_of_sample(number: int, count: int) -> Iterator[None]:
    """Within it, a ValueError or TypeError says which of `count` samples it is about, where there are several."""
    try:
        yield
    except (TypeError, ValueError) as e:
        if count == 1:
            raise
        raise type(e)(f'Sample {number}: {e}') from e
