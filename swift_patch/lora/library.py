"""Adapters that stay on disk: found by name, looked at when they are used, read to where a merge wants them."""
import os
import threading
from pathlib import Path
from torch import Tensor, device
from typing import Callable, Dict, Iterator, Mapping, NamedTuple, Optional, TypeVar

from ..errors import joined, short_repr
from .cache import TensorCache
from .checkpoint import AdapterCheckpoint, find_checkpoint
from .paths import PathLike, paths_in_folder, paths_in_manifest
from .reading import FileChanged, Kind, Reading, is_in
from .stored import Files, StoredAdapter

_T = TypeVar('_T')

# How often a file is looked at anew that changes while it is read.
_TRIES = 3


class LibraryStats(NamedTuple):
    """What a library has read so far, and what it keeps.

    Attributes:
        hits: how many times the tensors of an adapter were in memory when they were asked for.
        misses: how many times they were read from its file.
        nbytes: the bytes that are kept on each device.
    """
    hits: int
    misses: int
    nbytes: Dict[device, int]


class AdapterLibrary:
    """LoRA adapters on disk, by name. As many as there may be, they cost nothing until they are used.

    An adapter is a checkpoint of `swift sft`, in ms-swift's format or in PEFT's. A `FusionComposer` with a library
    merges from the files: no adapter is loaded into the model. What a file holds is checked when it is used first, and
    again when it has changed since. All methods may be called from any thread.

    Args:
        adapters: Where the checkpoint of each adapter is, by name. Nothing is looked at yet.
        cache_bytes: How much memory may hold tensors that were read before, on each device. Those that are not in it
            are read again.

    Raises:
        TypeError: A name is not a string, or a path is no path.
        ValueError: A name is empty, or `cache_bytes` is negative.

    Example:
        >>> library = AdapterLibrary({'sql': 'output/sql/checkpoint-100', 'math': 'output/math/checkpoint-80'})
        >>> composer = FusionComposer(model, library=library)
        >>> with composer.fused({'sql': 0.7, 'math': 0.3}):
        ...     model.generate(...)
    """

    def __init__(self, adapters: Optional[Mapping[str, PathLike]] = None, *, cache_bytes: int = 2**30):
        if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int):
            raise TypeError(f'cache_bytes is expected to be an integer, found {short_repr(cache_bytes)}.')
        if cache_bytes < 0:
            raise ValueError(f'cache_bytes is expected not to be negative, found {cache_bytes}.')
        if adapters is not None and not isinstance(adapters, Mapping):
            raise TypeError('adapters is expected to be a mapping from names to paths, found '
                            f'{short_repr(adapters)}: use `AdapterLibrary.from_folder` or `from_manifest` for others.')
        self._lock = threading.RLock()
        self._paths = {name: _located(name, path) for name, path in (adapters or {}).items()}
        self._stored: Dict[str, StoredAdapter] = {}
        self._files = Files()
        self._cache = TensorCache(cache_bytes)
        self._hits = self._misses = 0

    @property
    def stats(self) -> LibraryStats:
        """What was read so far."""
        with self._lock:
            return LibraryStats(self._hits, self._misses, self._cache.nbytes)

    @classmethod
    def from_folder(cls, folder: PathLike, *, cache_bytes: int = 2**30) -> 'AdapterLibrary':
        """Returns a library of the checkpoints in a folder, each by the name of its own folder.

        Args:
            folder: The folder. All folders in it count, except those whose names begin with a dot.
            cache_bytes: See `AdapterLibrary`.

        Raises:
            ValueError: There is no such folder, it has no folders in it, or it is itself a checkpoint.
        """
        return cls(paths_in_folder(folder), cache_bytes=cache_bytes)

    @classmethod
    def from_manifest(cls, file: PathLike, *, cache_bytes: int = 2**30) -> 'AdapterLibrary':
        """Returns a library of the checkpoints that a file lists.

        Args:
            file: A JSON object of names and paths, or JSON lines of `{"name": ..., "path": ...}`. Paths are relative to
                its folder.
            cache_bytes: See `AdapterLibrary`.

        Raises:
            ValueError: It cannot be read, is neither of both, or names an adapter twice.
        """
        return cls(paths_in_manifest(file), cache_bytes=cache_bytes)

    def add(self, name: str, path: PathLike) -> None:
        """Adds an adapter. Its files are looked at when it is used.

        Args:
            name: Its name, any string.
            path: Its checkpoint.

        Raises:
            TypeError: The name is not a string, or the path is no path.
            ValueError: The name is empty, or taken.
        """
        located = _located(name, path)
        with self._lock:
            if name in self._paths:
                raise ValueError(f'Adapter {short_repr(name)} is expected to be new in the library, found that it is '
                                 f'{self._paths[name]}: remove it first.')
            self._paths[name] = located

    def put(self, name: str, path: PathLike) -> None:
        """Adds an adapter, at once in the place of one of its name if there is one.

        Args:
            name: See `add`.
            path: See `add`.

        Raises:
            TypeError: See `add`.
            ValueError: The name is empty.
        """
        located = _located(name, path)
        with self._lock:
            self._forget(name)
            self._paths[name] = located

    def remove(self, name: str) -> None:
        """Removes an adapter, and what is remembered of it. Its files stay.

        Raises:
            ValueError: There is none of that name.
        """
        with self._lock:
            self._path(name)
            del self._paths[name]
            self._forget(name)

    def path(self, name: str) -> Path:
        """Returns where the user said that an adapter is, from the root on.

        Raises:
            ValueError: There is none of that name.
        """
        return Path(self._path(name))

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names as they are now."""
        with self._lock:
            return iter(list(self._paths))

    def __repr__(self) -> str:
        return f'AdapterLibrary({len(self)} adapters: {joined(list(self))})'

    def checkpoint(self, name: str) -> AdapterCheckpoint:
        """Returns the config of an adapter, checked, as it is now. Its tensors are not looked at.

        Raises:
            ValueError: There is no such adapter, or it cannot be fused.
        """
        with self._lock:
            known = self._stored.get(name)
        if known is not None and known.is_current():
            return known.checkpoint
        return find_checkpoint(name, Path(self._path(name)))

    def stored(self, name: str) -> StoredAdapter:
        """Returns what the files of an adapter are now. They are looked at only where they are not what they were.

        Raises:
            ValueError: There is no such adapter, it cannot be fused, or its files cannot be read.
        """
        with self._lock:
            known = self._stored.get(name)
        if known is not None and known.is_current():
            return known
        path = self._path(name)
        found = _while_it_changes(name, path, lambda: self._files.look(name, Path(path)))
        with self._lock:
            if self._paths.get(name) == path:
                self._stored[name] = found
        return found

    def looked_at(self, name: str, look: Callable[[StoredAdapter], _T]) -> _T:
        """Returns what `look` returns for what the files of an adapter are now, which may read them.

        Raises:
            ValueError: see `stored`, or what `look` raises.
        """
        return _while_it_changes(name, self._path(name), lambda: look(self.stored(name)))

    def read(self, stored: StoredAdapter, reading: Reading) -> Dict[Kind, Tensor]:
        """Returns the tensors of an adapter that was looked at, from memory where they were read before.

        Args:
            stored: the adapter, as `looked_at` gives it.
            reading: how its file is read.

        Returns:
            The tensors in one dimension for each piece of memory. Nobody may write to them.

        Raises:
            ValueError: they cannot be read, or a value is not finite.
            FileChanged: the files are not what they were; `looked_at` looks again.
        """
        key = stored.checkpoint.name, reading
        with self._lock:
            found = self._cache.get(key, stored.signatures)
            if found is not None:
                self._hits += 1
                return found
            self._misses += 1
            buffer = self._cache.buffer(reading.nbytes)
        found = self._files.read(stored, reading, buffer)
        with self._lock:
            if not any(is_in(buffer, tensor) for tensor in found.values()):
                self._cache.recycle(buffer)
            if stored.checkpoint.name in self._paths:
                self._cache.put(key, stored.signatures, found)
        return found

    def _forget(self, name: str) -> None:
        self._stored.pop(name, None)
        self._cache.drop_all(lambda key: key[0] == name)

    def _path(self, name: str) -> str:
        with self._lock:
            path = self._paths.get(name)
        if path is None:
            raise ValueError(f'The library is expected to have adapter {short_repr(name)}, but does not: add it.')
        return path


def _located(name: str, path: PathLike) -> str:
    """Returns where an adapter is, from the root on. Raises what `AdapterLibrary.add` raises of names and paths."""
    if not isinstance(name, str):
        raise TypeError(f'The name of an adapter is expected to be a string, found {short_repr(name)}.')
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f'The path of adapter {short_repr(name)} is expected to be a path, found '
                        f'{short_repr(path)}.')
    if not os.fspath(path):
        raise ValueError(f'The path of adapter {short_repr(name)} is expected not to be empty: give its folder.')
    if not name:
        raise ValueError(f'The name of an adapter is expected not to be empty, found {name!r} for {path}.')
    # The folder of the process may be another one when it is used.
    return os.fspath(path) if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def _while_it_changes(name: str, path: str, look: Callable[[], _T]) -> _T:
    """Returns what a look at files returns, a few times where they change meanwhile."""
    for _ in range(_TRIES):
        try:
            return look()
        except FileChanged:
            continue
    raise ValueError(
        f'adapter {name!r} ({path}): its files are expected to stay as they are while they are read, found '
        'that they go on changing or vanish: write a checkpoint elsewhere, and move it there when it is '
        'whole.')
