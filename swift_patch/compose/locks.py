"""The lock of a model, which all of its composers share."""
import threading
import weakref
from torch import nn
from typing import List, Optional, Tuple

from ..lora.composition import Composition

# One lock per model, not per composer: all composers of a model switch the same layers. It dies with the model.
_locks: 'weakref.WeakKeyDictionary[nn.Module, ModelLock]' = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


class ModelLock:
    """Held while a model's layers are switched or a fused adapter is used.

    Attributes:
        lock: the lock.
        held: what a `fused` block holds now: the fused adapter, its compositions, their seeds. Its thread alone can see
            it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.held: Optional[Tuple[str, List[Composition], Optional[List[int]]]] = None


def lock_of(model: nn.Module) -> ModelLock:
    """Returns the lock of a model."""
    with _locks_guard:
        return _locks.setdefault(model, ModelLock())
