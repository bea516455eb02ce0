"""The files of an adapter on disk, as they are at one time: looked at, and read, or known to have changed."""
import os
import shutil
import tempfile
import threading
import torch
import weakref
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from torch import Tensor
from typing import IO, Any, Dict, Iterator, Optional, Tuple

from ..errors import joined, short_repr
from .checkpoint import CONFIG_NAME, AdapterCheckpoint, find_checkpoint
from .header import Header, check_fetched, opened, read_header
from .reading import (DTYPES, FileChanged, Kind, Reading, Signature, are_finite, is_in, memory_of, read_into,
                      settled_signatures, signature_of)

# What tells a pointer to a file from the file.
_BEGIN = 64
# Headers that differ, of which all files that have one share what was made of it.
_MAX_HEADERS = 256


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """The files of one adapter as they were looked at.

    Attributes:
        checkpoint: what was found where the user said it is.
        file: the file that its tensors are read from: its own, or one that a pickle was converted to.
        header: what that file has.
        sources: the files that it all comes from, `file` last.
        signatures: what they were.
    """
    checkpoint: AdapterCheckpoint
    file: str
    header: Header
    sources: Tuple[str, ...]
    signatures: Tuple[Signature, ...]

    def is_current(self) -> bool:
        """Returns whether its files are what they were."""
        try:
            if any(signature_of(os.stat(path)) != of_it for path, of_it in zip(self.sources, self.signatures)):
                return False
        except OSError:
            return False
        # A file that is there now may come before a pickle.
        return len(self.sources) == 2 or str(self.checkpoint.weights_file) == self.sources[1]


class Files:
    """Looks at the files of adapters, and reads them. It remembers what many share. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._headers: 'OrderedDict[bytes, Header]' = OrderedDict()
        self._alike: 'OrderedDict[Any, Header]' = OrderedDict()
        self._converting = threading.Lock()
        self._converted: Optional[str] = None

    def look(self, name: str, path: Path) -> StoredAdapter:
        """Returns what the files of an adapter are now.

        Args:
            name: its name.
            path: its checkpoint.

        Raises:
            ValueError: it cannot be fused, or cannot be read.
            FileChanged: the files changed meanwhile.
        """
        checkpoint = find_checkpoint(name, path)
        weights = str(checkpoint.weights_file)
        sources: Tuple[str, ...] = (str(checkpoint.folder / CONFIG_NAME), weights)
        with _errors_of(checkpoint):
            signatures = settled_signatures(sources)
            # The folder may have been replaced between what read the config and what signed it.
            with opened(sources[0]) as fd:
                status = os.fstat(fd)
                content = os.pread(fd, status.st_size, 0)
                if signature_of(status) != signatures[0] or content != checkpoint.content:
                    raise FileChanged
            file = weights
            if not weights.endswith('.safetensors'):
                file = self._safetensors_of(weights, signatures[1])
                sources += file,
                signatures += signature_of(os.stat(file)),
            with opened(file) as fd:
                status = os.fstat(fd)
                if signature_of(status) != signatures[-1]:
                    raise FileChanged
                content = read_header(fd)
            header = self._header(content)
            header.check_size(status.st_size)
        found = StoredAdapter(checkpoint, file, header, sources, signatures)
        if not found.is_current():
            raise FileChanged
        return found

    def read(self, stored: StoredAdapter, reading: Reading, buffer: Tensor) -> Dict[Kind, Tensor]:
        """Returns the tensors of an adapter that was looked at.

        Args:
            stored: the adapter.
            reading: how its file is read.
            buffer: memory for its bytes, in which the tensors are where they can be.

        Raises:
            ValueError: they cannot be read, or a value is not finite, or is not in the dtype that it shall have.
            FileChanged: the files are not what they were.
        """
        with _errors_of(stored.checkpoint), opened(stored.file) as fd:
            if signature_of(os.fstat(fd)) != stored.signatures[-1]:
                raise FileChanged
            reading.read(fd, buffer)
            if signature_of(os.fstat(fd)) != stored.signatures[-1] or not stored.is_current():
                raise FileChanged
        if not reading.is_finite(buffer):
            _check_finite(stored, reading, buffer)
        found = reading.tensors(buffer)
        cast = [tensor for tensor in found.values() if not is_in(buffer, tensor)]
        if not are_finite(cast) and not all(tensor.isfinite().all() for tensor in cast):
            dtypes = joined(list(dict.fromkeys(str(tensor.dtype).removeprefix('torch.') for tensor in cast)))
            raise ValueError(f'{stored.checkpoint}: {stored.checkpoint.weights_file} is expected to hold values of '
                             f'{dtypes}, which it would have in this base model, found larger ones: train it again.')
        return found

    def _header(self, content: bytes) -> Header:
        with self._lock:
            header = self._headers.get(content)
            if header is None:
                header = Header(content)
                # There may be others of the same tensors, with another text beside.
                header = self._alike.setdefault(tuple(header.entries.items()), header)
                self._headers[content] = header
                for headers in (self._headers, self._alike):
                    if len(headers) > _MAX_HEADERS:
                        headers.popitem(last=False)
            self._headers.move_to_end(content)
            return header

    def _safetensors_of(self, pickle: str, signature: Signature) -> str:
        """Returns a safetensors file with the tensors of a pickle, which is converted once."""
        from safetensors.torch import save_file
        with self._converting:
            if self._converted is None:
                self._converted = tempfile.mkdtemp(prefix='swift_patch_')
                weakref.finalize(self, shutil.rmtree, self._converted, ignore_errors=True)
            # Whoever tidies up folders of temporary files may have been here.
            os.makedirs(self._converted, mode=0o700, exist_ok=True)
            file = os.path.join(self._converted, '-'.join(map(str, signature)))
            if not os.path.exists(file):
                with open(pickle, 'rb') as f:
                    save_file(_unpickled(f), f'{file}.part')
                    if signature_of(os.fstat(f.fileno())) != signature:
                        raise FileChanged
                # What was not written to its end, as where there is no space left, is no file of that name.
                os.replace(f'{file}.part', file)
            return file


def values_of(stored: StoredAdapter, key: str, begin: int, end: int) -> Tensor:
    """Returns elements of one tensor in the file of an adapter that was looked at, in one dimension.

    Raises:
        ValueError: they cannot be read.
        FileChanged: the file is not what it was.
    """
    entry = stored.header.entries[key]
    dtype = DTYPES[entry.dtype]
    buffer = torch.empty((end - begin) * dtype.itemsize, dtype=torch.uint8, device='cpu')
    with _errors_of(stored.checkpoint), opened(stored.file) as fd:
        read_into(fd, entry.begin + begin * dtype.itemsize, [memory_of(buffer)])
        if signature_of(os.fstat(fd)) != stored.signatures[-1]:
            raise FileChanged
    return buffer.view(dtype)


def _unpickled(file: IO[bytes]) -> Dict[str, Tensor]:
    """Returns the tensors in a pickle. Raises ValueError where it holds anything else."""
    check_fetched(file.read(_BEGIN))
    file.seek(0)
    try:
        found = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as e:  # pickles raise whatever comes
        # What torch says of it is long, and advises to execute what is in the file.
        raise ValueError(f'it is not a pickle of tensors alone, or a damaged one ({type(e).__name__})') from e
    if not isinstance(found, dict):
        raise ValueError(f'it is expected to hold an object of tensors by name, found a {type(found).__name__}')
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError('it is expected to hold an object of dense tensors by name, found '
                             f'{short_repr(key)}: a {type(tensor).__name__}')
    return {key: tensor.detach().clone().contiguous() for key, tensor in found.items()}


@contextmanager
def _errors_of(checkpoint: AdapterCheckpoint) -> Iterator[None]:
    """Within it, errors of files say whose they are."""
    try:
        yield
    except FileNotFoundError as e:
        raise FileChanged from e
    except (OSError, ValueError) as e:
        reason = e.strerror or e if isinstance(e, OSError) else f'{e}. Copy it again, or save the adapter again'
        raise ValueError(f'{checkpoint}: cannot read {checkpoint.weights_file}: {reason}.') from e


def _check_finite(stored: StoredAdapter, reading: Reading, buffer: Tensor) -> None:
    for key, values in reading.parts(buffer):
        count = int(values.isfinite().logical_not().sum())
        if count:
            raise ValueError(f'{stored.checkpoint}: tensor {short_repr(key)} of {stored.checkpoint.weights_file} is '
                             f'expected to hold finite values, found that {count} of {values.numel()} are infinite or '
                             'NaN: train it again.')
