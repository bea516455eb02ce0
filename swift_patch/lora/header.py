"""The header of a safetensors file: which tensors it has, and where. Imports no torch."""
import json
import math
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, NamedTuple, Tuple

from ..errors import printable, short_repr

# The bytes of an element of the dtypes that the factors of a LoRA have, by their names in a header.
SIZES = {'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2}
# As safetensors has it: a longer header is none.
_MAX_HEADER = 100_000_000
# What a file begins with that is yet to be fetched.
_LFS = b'version https://git-lfs.github.com/'
# Read at once, which is all of the header where there are not thousands of tensors.
_READ_AT_ONCE = 2**16


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: its dtype as the header names it: one of `SIZES`, or one that no factor of a LoRA has.
        shape: its shape.
        begin: where its values begin in the file, in bytes.
        end: where they end.
    """
    dtype: str
    shape: Tuple[int, ...]
    begin: int
    end: int


class Header:
    """What a safetensors file has. Files of equal headers share one object.

    Args:
        content: the header, without the eight bytes of its length.

    Attributes:
        entries: the tensors by key, in the order of the file.
        nbytes: the size of the file.

    Raises:
        ValueError: it is not the header of a safetensors file.
    """

    def __init__(self, content: bytes):
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as e:
            raise ValueError(f'its header is not JSON: {printable(e)}') from e
        if not isinstance(data, dict):
            raise ValueError(f'its header is expected to be an object, found {short_repr(data)}')
        data.pop('__metadata__', None)
        begin = 8 + len(content)
        entries = [(key, _entry(key, value, begin)) for key, value in data.items()]
        # An empty tensor lies where another one begins.
        entries.sort(key=lambda item: (item[1].begin, item[1].end))
        for key, entry in entries:
            if entry.begin != begin:
                raise ValueError(f'tensor {short_repr(key)} is expected at byte {begin}, found at '
                                 f'{short_repr(entry.begin)}')
            begin = entry.end
        self.entries: Dict[str, Entry] = dict(entries)
        self.nbytes = begin

    def check_size(self, size: int) -> None:
        """Raises ValueError where a file of so many bytes is not whole."""
        if self.nbytes != size:
            raise ValueError(f'it is expected to have {self.nbytes} bytes, found {size}: it was not written to its end')


@contextmanager
def opened(file: str) -> Iterator[int]:
    """Opens a file to read it, for the time of the `with` block."""
    fd = os.open(file, os.O_RDONLY | getattr(os, 'O_BINARY', 0))
    try:
        yield fd
    finally:
        os.close(fd)


def read_header(fd: int) -> bytes:
    """Returns the header of a file as it is, without the eight bytes of its length.

    Raises:
        ValueError: there is none.
        OSError: the file cannot be read.
    """
    first = os.pread(fd, _READ_AT_ONCE, 0)
    length = int.from_bytes(first[:8], 'little')
    check_fetched(first)
    if len(first) < 8 or length > _MAX_HEADER:
        raise ValueError('it is not a safetensors file: it has no header')
    content = first[8:8 + length]
    while len(content) < length:
        more = os.pread(fd, length - len(content), 8 + len(content))
        if not more:
            raise ValueError('it is shorter than its header says: it was not written to its end')
        content += more
    return content


def check_fetched(content: bytes) -> None:
    """Raises ValueError where a file begins as a pointer of Git LFS does."""
    if content.startswith(_LFS):
        raise ValueError('it is a pointer of Git LFS to the file, which `git lfs pull` fetches')


def _entry(key: str, value: Any, begin: int) -> Entry:
    try:
        told, shape, (first, last) = value['dtype'], tuple(value['shape']), value['data_offsets']
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError('Sizes are expected to be integers from 0.')
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f'its header says of tensor {short_repr(key)} what nobody understands: '
                         f'{short_repr(value)}') from e
    size = SIZES.get(told) if isinstance(told, str) else None
    if last < first or (size is not None and last - first != math.prod(shape) * size):
        raise ValueError(f'tensor {short_repr(key)} of shape {short_repr(shape)} is expected to have another size than '
                         f'{short_repr(last - first)} bytes')
    return Entry(str(told), shape, begin + first, begin + last)
