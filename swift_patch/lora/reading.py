"""Reading the tensors of a file to where a merge wants them, never half of an old file and half of a new one.

A file that is mapped ends the process (SIGBUS) where somebody shortens it. So it is read, by one call that scatters
its tensors: what comes out lies as packed factors do, whatever the order in the file.
"""
import os
import time
import torch
from collections import defaultdict
from torch import Tensor
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

from .header import Entry, Header

# Where values lie: the dtype and the device of a piece of memory.
Kind = Tuple[torch.dtype, torch.device]
# By their names in a header.
DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
# What tells a file from another one and from what it was before.
Signature = Tuple[int, ...]

# Pieces of memory that one call can scatter to (IOV_MAX of Linux and macOS).
_MAX_PIECES = 1024
# Bytes: a multiple of the size of any element, and a line of a CPU's cache.
_ALIGNMENT = 64
# A clock of a file system ticks every 10 ms at the slowest. What was written to longer ago than this can be told from
# what is written to from now on.
_SETTLED_NS = 50_000_000
# How long a file may go on being written to before that is an error.
_MAX_WAIT = 5.0


class FileChanged(Exception):
    """A file is not, or is no longer, what it was looked at as."""


class Placed(NamedTuple):
    """Where a tensor of a file goes.

    Attributes:
        key: its key in the file.
        kind: in which piece of memory.
        offset: where in it, in elements.
    """
    key: str
    kind: Kind
    offset: int


class _Section(NamedTuple):
    """Tensors of one dtype that go to one piece of memory.

    Attributes:
        dtype: their dtype in the file.
        begin: where they begin in the buffer, in bytes.
        end: where they end.
        parts: the key of each, where it goes in its piece of memory, and how many elements it has.
    """
    dtype: torch.dtype
    begin: int
    end: int
    parts: List[Tuple[str, int, int]]


class Reading:
    """How the tensors of files of one header are read: which bytes go where. Two that do the same are equal.

    Args:
        header: the header.
        placed: where each tensor goes. Those that go to one piece of memory fill it.

    Attributes:
        nbytes: the bytes that a buffer needs.
    """

    def __init__(self, header: Header, placed: Iterable[Placed]):
        placed = tuple(placed)
        self._key = header, placed
        self._hash = hash(self._key)
        sections: Dict[Tuple[Kind, torch.dtype], List[Tuple[int, str, Entry]]] = defaultdict(list)
        for key, kind, offset in placed:
            entry = header.entries[key]
            sections[kind, DTYPES[entry.dtype]].append((offset, key, entry))
        self._sections: Dict[Kind, List[_Section]] = defaultdict(list)
        moves: List[Tuple[int, int, int]] = []
        end = 0
        for (kind, dtype), items in sections.items():
            begin = end = -(-end // _ALIGNMENT) * _ALIGNMENT
            parts = []
            for offset, key, entry in sorted(items):
                size = entry.end - entry.begin
                moves.append((entry.begin, entry.end, end))
                parts.append((key, offset, size // dtype.itemsize))
                end += size
            self._sections[kind].append(_Section(dtype, begin, end, parts))
        self.nbytes = end
        self._calls = _calls(sorted(moves))

    def __eq__(self, other: object) -> bool:
        # The tree of a model changes, and is looked at anew: what was read before is still what it was.
        return self is other or (isinstance(other, Reading) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def read(self, fd: int, buffer: Tensor) -> None:
        """Reads a file into a buffer of bytes.

        Raises:
            FileChanged: the file ends too early.
            OSError: it cannot be read.
        """
        memory = memory_of(buffer)
        for offset, pieces in self._calls:
            read_into(fd, offset, [memory[begin:end] for begin, end in pieces])

    def tensors(self, buffer: Tensor) -> Dict[Kind, Tensor]:
        """Returns what was read, in one dimension for each piece of memory; in the buffer's memory where it can be."""
        found = {}
        for kind, sections in self._sections.items():
            (dtype, device), values = kind, [buffer[begin:end].view(of_file) for of_file, begin, end, _ in sections]
            if len(sections) == 1:
                found[kind] = values[0].to(device, dtype)
                continue
            found[kind] = torch.empty(sum(map(len, values)), dtype=dtype, device=device)
            for section, value in zip(sections, values):
                for (_, offset, count), part in zip(section.parts, _split(value, section)):
                    found[kind][offset:offset + count].copy_(part)
        return found

    def parts(self, buffer: Tensor) -> Iterator[Tuple[str, Tensor]]:
        """Yields the key of each tensor in a buffer, and its values in one dimension."""
        for sections in self._sections.values():
            for section in sections:
                values = _split(buffer[section.begin:section.end].view(section.dtype), section)
                yield from zip((key for key, _, _ in section.parts), values)

    def is_finite(self, buffer: Tensor) -> bool:
        """Returns whether all values in a buffer are finite. False also where their sum is too large for its dtype."""
        return are_finite(buffer[begin:end].view(dtype) for sections in self._sections.values()
                          for dtype, begin, end, _ in sections)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all values of tensors are finite. False also where the sum of one is too large for its dtype."""
    # A sum reads memory once and makes none. Infinities and NaN survive in it. (Halves are summed in float32 anyway;
    # asked for that as a result, PyTorch takes 60 times as long.)
    return all(bool(tensor.sum().isfinite()) for tensor in tensors)


def is_in(buffer: Tensor, tensor: Tensor) -> bool:
    """Returns whether what was read of a buffer is in its memory still, where no cast moved it elsewhere."""
    return tensor.untyped_storage().data_ptr() == buffer.data_ptr()


def memory_of(buffer: Tensor) -> memoryview:
    """Returns the memory of a tensor of bytes on the CPU, to write to it."""
    array: Any = buffer.numpy()
    return memoryview(array)


def read_into(fd: int, offset: int, views: List[memoryview]) -> None:
    """Fills pieces of memory, one after another, with what a file has from an offset on.

    Raises:
        FileChanged: the file ends too early.
        OSError: it cannot be read.
    """
    missing = sum(map(len, views))
    while missing:
        count = os.preadv(fd, views, offset)
        if count == 0:
            raise FileChanged
        missing -= count
        if missing:
            offset, views = offset + count, _rest(views, count)


def signature_of(status: os.stat_result) -> Signature:
    """Returns what tells a file from another one and from what it was before it was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def settled_signatures(paths: Sequence[str]) -> Tuple[Signature, ...]:
    """Returns the signatures of files, each of which was written to so long ago that a later write changes it.

    A file that was written to just now is waited for, some 50 ms.

    Raises:
        ValueError: one goes on being written to.
        OSError: one cannot be looked at.
    """
    deadline = time.monotonic() + _MAX_WAIT
    while True:
        found = tuple(signature_of(os.stat(path)) for path in paths)
        # Of the clock of another machine, a time in the future says nothing.
        ages = [time.time_ns() - written for *_, written, _ in found]
        young = [age for age in ages if 0 <= age < _SETTLED_NS]
        if not young:
            return found
        if time.monotonic() > deadline:
            raise ValueError('it goes on being written to')
        time.sleep((_SETTLED_NS - min(young)) / 1e9)


def _split(values: Tensor, section: _Section) -> Sequence[Tensor]:
    """Returns the tensors of a section, each in one dimension."""
    return torch.split(values, [count for _, _, count in section.parts])


def _calls(moves: Sequence[Tuple[int, int, int]]) -> List[Tuple[int, List[Tuple[int, int]]]]:
    """Returns the calls that read a file: where each begins in the file, and the pieces of memory that it fills."""
    calls: List[Tuple[int, List[Tuple[int, int]]]] = []
    expected = -1
    for begin, end, at in moves:
        if begin == end:
            continue
        pieces = calls[-1][1] if calls else []
        if begin != expected or len(pieces) == _MAX_PIECES:
            calls.append((begin, [(at, at + end - begin)]))
        elif pieces[-1][1] == at:
            pieces[-1] = pieces[-1][0], at + end - begin
        else:
            pieces.append((at, at + end - begin))
        expected = end
    return calls


def _rest(views: List[memoryview], count: int) -> List[memoryview]:
    """Returns what is left of pieces of memory once so many bytes of them are filled."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1:]]
        count -= len(view)
    return []
