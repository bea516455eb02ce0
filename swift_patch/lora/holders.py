"""Who holds the memory of a tensor."""
import sys
import torch
from torch import Tensor
from typing import Tuple


def holders(tensor: Tensor) -> Tuple[int, int, int]:
    """Returns what names a tensor's memory, how many in Python refer to it, and how many tensors have it.

    Tensors are those of `state_dict`, of an optimizer's flat buffer, of a second model, of a graph that waits for its
    backward pass.
    """
    # Python has one object for a storage, whoever asks for it. It holds the memory, too.
    storage = tensor.untyped_storage()
    return storage._cdata, sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata) - 1


def is_held(tensor: Tensor) -> bool:
    """Returns whether anything but one tensor holds its memory."""
    _, references, tensors = holders(tensor)
    return references > ALONE or tensors > 1


# How many in Python refer to the memory of a tensor while `holders` looks at it. Releases of PyTorch differ.
_, ALONE, _ = holders(torch.empty(1))
