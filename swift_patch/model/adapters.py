"""The adapters of one model, for the time of one call: one look at the model, which is handed down."""
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from torch import nn
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from ..errors import short_repr
from ..lora.combination import MergeOptions
from ..lora.factors import Factors, is_padding_zero, rescaled, unpadded
from .index import View
from .layers import groups_of
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
        checked: the adapters that were found fit to be merged in this very call.
    """
    tuner: Any
    model: nn.Module
    configs: Mapping[str, Any]
    memory: Memory
    view: View
    merged: List[Tuple[str, LoraLayer]]
    _factors: Dict[str, AdapterFactors] = field(default_factory=dict)
    _intact: Dict[str, bool] = field(default_factory=dict)
    checked: Set[str] = field(default_factory=set)

    @classmethod
    def of(cls, tuner: Any) -> 'Adapters':
        """Returns the adapters of a `SwiftModel` or a `LoraModel` (what a `PeftModel` holds as its `base_model`)."""
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
        return cls(tuner, model, configs, memory, view, merged)

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
        self._intact.pop(name, None)

    def written(self, name: str) -> None:
        """Is called where this very call wrote to an adapter."""
        self._intact.pop(name, None)

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

    def record_of_source(self, name: str) -> Optional[FusedRecord]:
        """Returns the record of a source that is a fused adapter; None where it is to be taken as it is.

        So is one that holds values where its record says zeros: something else than a refill wrote to it.
        """
        record = self.record_or_none(name)
        if record is None:
            return None
        intact = self._intact.get(name)
        if intact is None:
            intact = self._intact[name] = self._is_as_recorded(name, record)
        return record if intact else None

    def config(self, name: str) -> Any:
        """Returns the config of `name` as a source: of a fused adapter, the one that a new adapter would have."""
        record = self.record_of_source(name)
        return self.configs[name] if record is None else record.config

    def config_rank(self, name: str) -> int:
        """Returns the largest rank of the config of `name` as a source, which PEFT takes for the adapter's."""
        config = self.config(name)
        rank: int = max(config.r, *(config.rank_pattern or {}).values(), 0)
        return rank

    def rank(self, name: str) -> int:
        """Returns the largest rank that `name` has as a source: of its config and of its tensors, which may have more
        where an adapter was padded or swapped."""
        record = self.record_of_source(name)
        if record is None:
            return max(self.config_rank(name), self.factors(name).layout.rank)
        return max(self.config_rank(name), *(rank for rank, _ in record.layers.values()))

    def source(self, name: str, layer_name: str) -> Optional[Tuple[Factors, float]]:
        """Returns the factors and the scaling of `name` as a source, or None where it does not have the layer.

        Those of a fused adapter are what a new adapter would have, not how they are kept.
        """
        found = self.factors(name)
        place = found.layout.places.get(layer_name)
        if place is None:
            return None
        record = self.record_of_source(name)
        if record is None:
            return found.factors(place), found.scalings[place]
        if layer_name not in record.layers:
            return None
        rank, scaling = record.layers[layer_name]
        pair = unpadded(found.factors(place), rank, groups_of(found.layers[place]))
        return rescaled(pair, found.scalings[place] / scaling), scaling

    def _is_as_recorded(self, name: str, record: FusedRecord) -> bool:
        """Whether a fused adapter is zero in all layers, and beyond all ranks, that its record does not name."""
        found = self.factors(name)
        if found.layout.is_meta:
            return True
        for place, layer_name in enumerate(found.layout.names):
            rank, _ = record.layers.get(layer_name, (0, 1.0))
            if not is_padding_zero(found.factors(place), rank, groups_of(found.layers[place])):
                return False
        return record.layers.keys() <= found.layout.places.keys()
