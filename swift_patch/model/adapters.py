"""The adapters of one model, for the time of one call: one look at the model, which is handed down."""
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from torch import nn
from typing import Any, Dict, Iterable, List, Mapping, Optional, Set, Tuple

from ..errors import short_repr
from ..lora.combination import MergeOptions
from ..lora.library import AdapterLibrary
from .index import View
from .memory import FusedMemory, FusedRecord, LayersOfNew, Memory, keep_record, record_of
from .packing import AdapterFactors, pack


@dataclass(frozen=True)
class Adapters:
    """The adapters of one model, for the time of one call.

    Attributes:
        tuner: the `SwiftModel` or `LoraModel` that has them.
        model: the model that holds their layers.
        configs: their configs by name.
        memory: what is remembered of the model.
        view: the modules of the model.
        merged: name and layer where adapters are merged into the base weights.
        library: adapters on disk, which are looked for first; None where there are none.
        checked: the adapters that were found fit to be merged in this very call.
        stored: what was found of the library in this very call, see `sources.Sources`.
        kinds: the kinds of stored adapters that were found to be of the model in this very call, see `kinds`.
    """
    tuner: Any
    model: nn.Module
    configs: Mapping[str, Any]
    memory: Memory
    view: View
    merged: List[Tuple[str, LoraLayer]]
    library: Optional[AdapterLibrary] = None
    _factors: Dict[str, AdapterFactors] = field(default_factory=dict)
    checked: Set[str] = field(default_factory=set)
    stored: Dict[str, Any] = field(default_factory=dict)
    kinds: Set[Any] = field(default_factory=set)

    @classmethod
    def of(cls, tuner: Any, library: Optional[AdapterLibrary] = None) -> 'Adapters':
        """Returns the adapters of a `SwiftModel` or a `LoraModel` (what a `PeftModel` holds as its `base_model`).

        Args:
            tuner: the model.
            library: adapters on disk, which are looked for first.
        """
        model = tuner.model
        memory = Memory.of(model)
        view = memory.look(model)
        if isinstance(tuner, LoraModel):
            configs = tuner.peft_config
        else:
            configs = {name: output.config for name, output in tuner.adapters.items()}
        for deleted in memory.layouts.keys() - configs.keys():
            memory.layouts.pop(deleted, None)
        merged = [item for item in view.layers if item[1].merged_adapters]
        return cls(tuner, model, configs, memory, view, merged, library)

    def in_order(self, names: Iterable[str]) -> List[str]:
        """Returns names of modules in the order of `named_modules`."""
        return sorted(names, key=self.view.index.order.__getitem__)

    @property
    def layers(self) -> List[Tuple[str, LoraLayer]]:
        """`(name, layer)` of every LoRA layer, in the order of `named_modules`."""
        return self.view.layers

    def factors(self, name: str) -> AdapterFactors:
        """Returns all factors of an adapter."""
        found = self._factors.get(name)
        if found is None:
            found = self._factors[name] = AdapterFactors.of(self.memory.layouts, self.view, name)
        return found

    def pack(self, name: str, undo: ExitStack) -> None:
        """Moves the factors of an adapter into one piece of memory, see `packing.pack`."""
        if not self.factors(name).layout.is_packed:
            pack(self.memory.layouts, self.view, name, undo)
            self.changed(name)

    def changed(self, name: str) -> None:
        """Is called where this very call moved or replaced parameters of an adapter."""
        self._factors.pop(name, None)

    def is_fused(self, name: str) -> bool:
        """Returns whether `name` was made by `add_weighted_adapter`, so that it may be refilled."""
        return self.record_or_none(name) is not None

    def record_or_none(self, name: str) -> Optional[FusedRecord]:
        """Returns what the fused adapter `name` was filled with; None where it was not made by a merge."""
        return record_of(self.model, name, self.configs.get(name))

    def record(self, name: str) -> FusedRecord:
        """Returns what the fused adapter `name` was filled with.

        Raises:
            TypeError: `name` is not a string.
            ValueError: there is no such adapter, or it was not made by `add_weighted_adapter`.
        """
        if not isinstance(name, str):
            raise TypeError(f'adapter_name is expected to be a string, found {short_repr(name)}.')
        if name not in self.configs:
            raise ValueError(f'adapter_name is expected to be one of {sorted(self.configs)}, found {name!r}: make it '
                             'by `add_weighted_adapter` first.')
        record = self.record_or_none(name)
        if record is None:
            raise ValueError(f'Adapter {name!r} is expected to have been made by `add_weighted_adapter` in this '
                             'process, but was not and may have been trained: refilling would destroy it. Choose '
                             'another name and make it by `add_weighted_adapter` first.')
        return record

    def remember(self, name: str, options: MergeOptions, config: LoraConfig, layers: LayersOfNew,
                 undo: ExitStack) -> None:
        """Records what the fused adapter `name` was filled with, see `FusedRecord`. `undo` takes what undoes it."""
        before = self.record_or_none(name)
        parameter = self.factors(name).parameters[0]
        if before is not None and before.owner is not None and before.owner() is parameter:
            memory, owner = before.memory, before.owner
        else:
            memory = FusedMemory()
            owner = weakref.ref(parameter, lambda _: memory.clear())
        record = FusedRecord(options, config, layers, memory, owner)
        if before is not None:
            undo.callback(keep_record, self.model, name, self.configs[name], before)
        keep_record(self.model, name, self.configs[name], record)
