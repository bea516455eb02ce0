"""What is remembered of one model, and of its fused adapters.

All of the former can be found again. It holds no module, parameter or config, dies with the model, and is no part of
it: neither a copied nor a pickled model has any. The record of a fused adapter is an attribute of the adapter's config.
It dies with the config, is copied with the model, and is left out of a pickle.
"""
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from peft.tuners.lora import LoraConfig
from torch import Tensor, device, nn
from typing import Any, Dict, FrozenSet, Mapping, Optional, Tuple, TypeVar

from ..lora.combination import MergeOptions
from ..lora.stored import StoredAdapter
from .index import LoraIndex, View

_T = TypeVar('_T')
_RECORD = '_fused_record'
# Pairs of configs whose new adapters are remembered; they cost a walk, and may be as many as there are adapters.
_MAX_NEW = 256

# By layer, the rank and the scaling that a new adapter would have.
LayersOfNew = Mapping[str, Tuple[int, float]]


@dataclass
class FusedMemory:
    """Memory that a fused adapter has beside its parameters.

    Attributes:
        spare: for values that are overwritten, by device, see `Undo.reserve`.
        rows: the rows of a batch, see `rows.Rows`.
    """
    spare: Dict[device, Tensor] = field(default_factory=dict)
    rows: Optional[Any] = None

    def clear(self) -> None:
        """Gives the memory back."""
        self.spare.clear()
        self.rows = None


@dataclass(frozen=True)
class FusedRecord:
    """What is remembered of one fused adapter.

    Attributes:
        options: what it was last filled with.
        config: the config that a new adapter would have had then. The adapter's own is that of its first sample.
        layers: the rank and the scaling that a new adapter would have had then, by layer. The parameters may have more
            rank, filled with zeros, and another scaling, made up for in A and B; and other layers hold only zeros.
        memory: memory that it has beside its parameters.
        owner: refers to a parameter of the adapter, with which `memory` is emptied: a config may live longer, for PEFT
            0.18 leaves it in a model that was unloaded.
    """
    options: MergeOptions
    config: LoraConfig
    layers: LayersOfNew
    memory: FusedMemory = field(default_factory=FusedMemory)
    owner: 'Optional[weakref.ref[Tensor]]' = None


class _Owned:
    """A record, with what it is a record of: a config that was copied by itself may be that of another adapter."""

    def __init__(self, model: nn.Module, name: str, config: LoraConfig, record: FusedRecord):
        self.model, self.name, self.config, self.record = weakref.ref(model), name, weakref.ref(config), record

    def __deepcopy__(self, memo: Dict[int, Any]) -> Any:
        # A tuner copies its model before its configs, and a config before its attributes.
        model, config = (memo.get(id(ref())) for ref in (self.model, self.config))
        if model is None or config is None:
            return None
        record = FusedRecord(self.record.options, self.record.config, self.record.layers)
        return _Owned(model, self.name, config, record)

    def __reduce__(self) -> Tuple[Any, ...]:
        # What was pickled is loaded where this package is not.
        return bool, ()


def record_of(model: nn.Module, name: str, config: Any) -> Optional[FusedRecord]:
    """Returns the record of a fused adapter, or None where the adapter was not made by a merge.

    Args:
        model: the model that has its layers.
        name: its name.
        config: its config.
    """
    found = getattr(config, '__dict__', {}).get(_RECORD)
    if isinstance(found, _Owned) and found.name == name and found.model() is model and found.config() is config:
        return found.record
    return None


def keep_record(model: nn.Module, name: str, config: LoraConfig, record: FusedRecord) -> None:
    """Keeps the record of a fused adapter, see `record_of`."""
    config.__dict__[_RECORD] = _Owned(model, name, config, record)


@dataclass(frozen=True)
class NewAdapter:
    """What PEFT would make of a config in one model.

    Attributes:
        config: the config. Nobody may change it.
        layers: the names of the layers that a new adapter would be in.
    """
    config: LoraConfig
    layers: FrozenSet[str]


class Memory:
    """What is remembered of one model.

    Attributes:
        index: where its modules are.
        layouts: where the factors of each adapter lie, see `packing.Layout`.
        new: what new adapters would be, by the sources' configs, and in which layers, by their own, see `new_adapter`.
        stored: what adapters of a library are in it, see `stored`.
        lock: held while an adapter is packed and written, for one thread would move what another one reads.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.index: Optional[LoraIndex] = None
        self.layouts: Dict[str, Any] = {}
        self.new: 'OrderedDict[Any, Any]' = OrderedDict()
        self.stored: 'weakref.WeakKeyDictionary[StoredAdapter, Any]' = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module) -> 'Memory':
        """Returns what is remembered of `model`."""
        with _guard:
            memory = _memories.get(model)
            if memory is None:
                memory = _memories[model] = cls()
            return memory

    def look(self, model: nn.Module) -> View:
        """Returns the modules of `model`, which are walked only where they are not those that were walked before."""
        view = None if self.index is None else self.index.look(model)
        # Again where another thread adds a layer between the walk and the look.
        while view is None:
            # What is remembered of the layers names their places in the index.
            self.layouts.clear()
            self.new.clear()
            self.stored.clear()
            self.index = LoraIndex(model)
            view = self.index.look(model)
        return view

    def known(self, key: Any) -> Any:
        """Returns what is remembered of new adapters, None where that is nothing."""
        found = self.new.get(key)
        if found is not None:
            self.new.move_to_end(key)
        return found

    def remember_new(self, key: Any, found: _T) -> _T:
        """Remembers what a new adapter would be; what was not asked for the longest goes first."""
        self.new[key] = found
        if len(self.new) > _MAX_NEW:
            self.new.popitem(last=False)
        return found


_memories: 'weakref.WeakKeyDictionary[nn.Module, Memory]' = weakref.WeakKeyDictionary()
_guard = threading.Lock()
