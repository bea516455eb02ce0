"""What was read of files, in memory that is bounded."""
import torch
from collections import Counter, OrderedDict
from torch import Tensor
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Tuple

from .holders import is_held
from .reading import Kind

_CPU = torch.device('cpu')
# The parts of the memory (one in so many bytes) for what was asked for once, which are few so that their memory is
# still in the cache of a CPU when it is filled again, and for memory that waits to be filled again.
_FIRST_OF, _FREE_OF = 64, 8
# Keys of what was read once are remembered, so many of them.
_MAX_SEEN = 2**17
# How much larger than what is needed a buffer may be.
_MAX_SPARE = 1.25


class _Entry(NamedTuple):
    signature: Hashable
    tensors: Dict[Kind, Tensor]

    @property
    def memory(self) -> List[Tuple[torch.device, torch.UntypedStorage]]:
        """All memory that is kept because of the tensors, which may be parts of it, and several of one."""
        found = {}
        for (_, device), tensor in self.tensors.items():
            storage = tensor.untyped_storage()
            found[storage._cdata] = device, storage
        return list(found.values())


class _Queue:
    """Entries, the least recently used first, and their bytes on each device."""

    def __init__(self) -> None:
        self.entries: 'OrderedDict[Hashable, _Entry]' = OrderedDict()
        self.nbytes: 'Counter[torch.device]' = Counter()

    def put(self, key: Hashable, entry: _Entry) -> None:
        self.entries[key] = entry
        for device, memory in entry.memory:
            self.nbytes[device] += memory.nbytes()

    def pop(self, key: Hashable) -> Optional[_Entry]:
        entry = self.entries.pop(key, None)
        for device, memory in entry.memory if entry is not None else ():
            self.nbytes[device] -= memory.nbytes()
        return entry

    def oldest(self, device: torch.device) -> Hashable:
        """Returns the key of the oldest entry that has something on a device."""
        return next(key for key, entry in self.entries.items() if any(of == device for _, of in entry.tensors))


class TensorCache:
    """The tensors of files by key, in a bounded number of bytes on each device; the least recently used go first.

    What was asked for once goes before what was asked for again (2Q, Johnson and Shasha 1994): adapters that come once
    and never again push no others out. Memory of what went is filled again, for on a CPU memory that is new costs
    several times what reading into it does. Not for several threads at a time.

    Args:
        max_bytes: the bytes on each device.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._first, self._again = _Queue(), _Queue()
        self._seen: 'OrderedDict[Hashable, None]' = OrderedDict()
        # On the CPU, the oldest first.
        self._free: List[Tensor] = []

    @property
    def nbytes(self) -> Dict[torch.device, int]:
        """The bytes that are in use on each device."""
        found = self._first.nbytes + self._again.nbytes
        found[_CPU] += sum(memory.nbytes for memory in self._free)
        return dict(found)

    def get(self, key: Hashable, signature: Hashable) -> Optional[Dict[Kind, Tensor]]:
        """Returns what was put under a key; None where that went, or was of another signature."""
        entry = self._again.entries.get(key)
        if entry is not None and entry.signature == signature:
            self._again.entries.move_to_end(key)
            return entry.tensors
        entry = self._first.entries.get(key)
        if entry is not None and entry.signature == signature:
            self._first.pop(key)
            self._again.put(key, entry)
            return entry.tensors
        return None

    def put(self, key: Hashable, signature: Hashable, tensors: Dict[Kind, Tensor]) -> None:
        """Puts tensors under a key, and others out where there is no room. Nobody may write to them from now on."""
        self.drop(key)
        (self._again if key in self._seen else self._first).put(key, _Entry(signature, tensors))
        self._seen[key] = None
        if len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        for device in {device for _, device in tensors}:
            while self._first.nbytes[device] > self.max_bytes // _FIRST_OF:
                self._put_out(self._first, device)
            while self.nbytes.get(device, 0) > self.max_bytes:
                if device == _CPU and self._free:
                    self._free.pop(0)
                else:
                    self._put_out(self._again if self._again.nbytes[device] else self._first, device)

    def drop(self, key: Hashable) -> None:
        """Forgets what was put under a key."""
        for queue in (self._first, self._again):
            self._recycle(queue.pop(key))

    def drop_all(self, is_meant: Callable[[Any], bool]) -> None:
        """Forgets what was put under keys that are meant."""
        for key in [*filter(is_meant, self._first.entries), *filter(is_meant, self._again.entries)]:
            self.drop(key)

    def buffer(self, nbytes: int) -> Tensor:
        """Returns memory on the CPU for so many bytes: that of something that went, where nobody holds it any more."""
        # The newest first, which is in the cache of the CPU.
        for number, memory in reversed(list(enumerate(self._free))):
            if nbytes <= memory.nbytes <= nbytes * _MAX_SPARE and not is_held(memory):
                return self._free.pop(number)
        return torch.empty(nbytes, dtype=torch.uint8, device=_CPU)

    def recycle(self, memory: Tensor) -> None:
        """Takes memory on the CPU that is for the next `buffer`."""
        if sum(free.nbytes for free in self._free) + memory.nbytes <= self.max_bytes // _FREE_OF:
            self._free.append(memory)

    def _put_out(self, queue: _Queue, device: torch.device) -> None:
        self._recycle(queue.pop(queue.oldest(device)))

    def _recycle(self, entry: Optional[_Entry]) -> None:
        for device, memory in entry.memory if entry is not None else ():
            if device == _CPU:
                self.recycle(torch.empty(0, dtype=torch.uint8, device=_CPU).set_(memory))
