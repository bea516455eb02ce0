"""Writing files that users name: what would fail is told before the work, and nobody finds half a file."""
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator


@contextmanager
def os_errors_as(what: str) -> Iterator[None]:
    """Turns an OSError into a ValueError that tells what could not be done."""
    try:
        yield
    except OSError as e:
        raise ValueError(f'{what}: {e.strerror or e}.') from e


def check_writable(path: Path) -> None:
    """Raises ValueError where a file cannot be written, also in folders that are yet to be made. Writes nothing."""
    with os_errors_as(f'Cannot write {path}'):
        if path.is_dir():
            raise ValueError(f'Cannot write {path}: it is a folder.')
        if path.exists() and not path.is_file():
            # What is read from a pipe or shown by a device cannot be put in place in one step, nor gone on with.
            raise ValueError(f'Cannot write {path}: it is not a regular file. Give the path of a file.')
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise ValueError(f'Cannot write {path}: {folder} is not a folder.')
        existing = path if path.exists() else folder
        if not os.access(existing, os.W_OK):
            raise ValueError(f'Cannot write {path}: no permission to write to {existing}.')


def check_replaceable(option: str, path: Path, overwrite: bool) -> None:
    """Raises ValueError where the file of an option cannot be written, or exists and is not to be overwritten."""
    check_writable(path)
    if path.exists() and not overwrite:
        raise ValueError(f'--{option} {path} exists: give --overwrite to replace it, or another file.')


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in place in one step, with the folders that it needs.

    Args:
        path: The file.
        write: Writes to the path that it is given, which is next to `path` and ends like it.

    Raises:
        ValueError: It cannot be written. Whatever was at `path` is still there.
    """
    tmp = path.with_name(f'.{os.getpid()}.tmp{path.suffix}')
    with os_errors_as(f'Cannot write {path}'):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(tmp)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
