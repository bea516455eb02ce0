"""What to do where something fails: callbacks, and the values of tensors that are overwritten."""
import torch
from contextlib import ExitStack
from torch import Tensor
from typing import Dict, Optional

# Where copies begin in memory, in bytes: a multiple of the size of any element.
_ALIGNMENT = 64


class Undo(ExitStack):
    """Undoes what its callbacks undo, last first, unless `commit` is called before its end."""

    def __init__(self) -> None:
        super().__init__()
        self._spare: Dict[torch.device, Tensor] = {}
        self._memory: Optional[Tensor] = None
        self._used = 0

    def reserve(self, spare: Dict[torch.device, Tensor], nbytes: int, tensors: int, device: torch.device) -> None:
        """Makes room for the values of tensors.

        Args:
            spare: memory from the last time, by device; `commit` puts this memory there for the next time, since on a
                CPU new memory costs more than the copy.
            nbytes: the bytes that the values take.
            tensors: how many tensors there are at most.
            device: where they are.
        """
        nbytes += tensors * _ALIGNMENT
        # Taken out, so that no other thread uses it meanwhile.
        self._spare, self._memory = spare, spare.pop(device, None)
        if self._memory is None or len(self._memory) < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def keep(self, tensor: Tensor) -> None:
        """Keeps the values of a tensor, to put them back."""
        begin, end = self._used, self._used + tensor.nbytes
        if self._memory is None or end > len(self._memory) or tensor.device != self._memory.device:
            values = tensor.data.clone()
        else:
            values = self._memory[begin:end].view(tensor.dtype).view(tensor.shape)
            values.copy_(tensor.data)
            self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        self.callback(tensor.data.copy_, values)

    def commit(self) -> None:
        """Keeps what was done."""
        self.pop_all()
        if self._memory is not None:
            self._spare[self._memory.device] = self._memory
