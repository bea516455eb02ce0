"""What is remembered of one model. All of it can be found again, but which adapters were made by a merge.

It lives in the model's `__dict__` and dies with the model. It keeps no module, parameter or config alive, a pickled
model has none of it, and in a copied model only the records of fused adapters are left.
"""
import copy
import torch
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn
from typing import Any, Dict, FrozenSet, Mapping, Optional, Tuple

from ..lora.combination import MergeOptions
from .index import LoraIndex, View

_ATTRIBUTE = '_lora_memory'
# Pairs of configs whose new adapters are remembered; they cost a walk, and may be as many as there are adapters.
_MAX_NEW = 256

# By layer, the rank and the scaling that a new adapter would have.
LayersOfNew = Mapping[str, Tuple[int, float]]


@dataclass(frozen=True)
class FusedRecord:
    """What is remembered of one fused adapter.

    Attributes:
        options: what it was last filled with.
        config: the config that a new adapter would have had then. The adapter's own is that of its first sample.
        layers: the rank and the scaling that a new adapter would have had then, by layer. The parameters may have more
            rank, filled with zeros, and another scaling, made up for in A and B; and other layers hold only zeros.
    """
    options: MergeOptions
    config: LoraConfig
    layers: LayersOfNew


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
        new: what new adapters would be, by the sources' configs, see `new_adapter`.
        spare: memory for values that are overwritten, by device, see `Undo.reserve`.
    """

    def __init__(self) -> None:
        self.index: Optional[LoraIndex] = None
        self.layouts: Dict[str, Any] = {}
        self.new: 'OrderedDict[Any, NewAdapter]' = OrderedDict()
        self.spare: Dict[torch.device, Tensor] = {}
        # By name, the config of a fused adapter and its record. An adapter of that name with another config is another
        # adapter, and may have been trained.
        self._records: Dict[str, Tuple['weakref.ref[LoraConfig]', FusedRecord]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> 'Memory':
        """Returns what is remembered of `model`."""
        memory = model.__dict__.get(_ATTRIBUTE)
        if not isinstance(memory, cls):
            # Straight into __dict__: a wrapper such as torch.compile's passes attributes on to what it wraps.
            memory = model.__dict__[_ATTRIBUTE] = cls()
        return memory

    def look(self, model: nn.Module) -> View:
        """Returns the modules of `model`, which are walked only where they are not those that were walked before."""
        view = None if self.index is None else self.index.look(model)
        if view is None:
            # What is remembered of the layers names their places in the index.
            self.layouts.clear()
            self.new.clear()
            self.index = LoraIndex(model)
            view = self.index.look(model)
            assert view is not None
        return view

    def remember_new(self, key: Any, found: NewAdapter) -> NewAdapter:
        """Remembers what a new adapter would be; what was not asked for the longest is forgotten."""
        self.new[key] = found
        if len(self.new) > _MAX_NEW:
            self.new.popitem(last=False)
        return found

    def record(self, name: str, config: Any) -> Optional[FusedRecord]:
        """Returns the record of the fused adapter of that name and config; None where it was not made by a merge."""
        owner, record = self._records.get(name, (None, None))
        return record if owner is not None and owner() is config else None

    def remember(self, name: str, config: LoraConfig, record: FusedRecord) -> None:
        """Keeps the record of a fused adapter for as long as the config is alive."""
        memory = weakref.ref(self)

        def forget(owner: 'weakref.ref[LoraConfig]') -> None:
            found = memory()
            if found is not None and found._records.get(name, (None, ))[0] is owner:
                del found._records[name]
                if not found._records:
                    found.spare.clear()

        self._records[name] = weakref.ref(config, forget), record

    def __reduce__(self) -> Tuple[Any, ...]:
        # A pickled model is loaded where this package is not.
        return dict, ()

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'Memory':
        copied = Memory()
        for name, (owner, record) in list(self._records.items()):
            config = owner()
            if config is not None:
                # The one that the copied model has, too.
                copied.remember(name, copy.deepcopy(config, memo), record)
        return copied
