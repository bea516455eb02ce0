"""The adapters of one model, and what is remembered of those that were fused: which may be refilled, and how."""
from contextlib import ExitStack
from dataclasses import dataclass, field
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from torch import nn
from typing import Any, Dict, List, Mapping, Optional, Tuple

from .lora_index import Factors, LoraIndex, factors, rescaled, unpadded
from .merging import MergeOptions
from .messages import shown
from .packing import Blocks, pack

# Where a model keeps the records of its fused adapters, in its `__dict__`: copied with it, and gone with it.
_ATTRIBUTE = '_fused_adapters'

# By layer, the rank and the scaling that a new adapter would have.
FreshLayers = Mapping[str, Tuple[int, float]]


@dataclass(frozen=True)
class FusedRecord:
    """What is remembered of one fused adapter.

    Attributes:
        config: the adapter's config. An adapter of the same name with another config is another adapter.
        options: what it was last filled with.
        fresh: the config that a new adapter would have had then. The adapter's own is that of its first sample.
        layers: the rank and the scaling that a new adapter would have had then, by layer. The parameters may have more
            rank, filled with zeros, and another scaling, made up for in A and B; and other layers hold only zeros.
    """
    config: LoraConfig
    options: MergeOptions
    fresh: LoraConfig
    layers: FreshLayers


@dataclass(frozen=True)
class Adapters:
    """The adapters of one model, for the time of one call: the model is compared with what is remembered once.

    Attributes:
        model: the model that holds their layers.
        configs: their configs by name.
        index: the index of the model.
    """
    model: nn.Module
    configs: Mapping[str, Any]
    index: LoraIndex
    _blocks: Dict[str, Blocks] = field(default_factory=dict)

    @classmethod
    def of(cls, tuner: Any) -> 'Adapters':
        """Returns the adapters of a `SwiftModel` or a `LoraModel` (what a `PeftModel` holds as its `base_model`)."""
        model, index = tuner.model, LoraIndex.of(tuner.model)
        if isinstance(tuner, LoraModel):
            configs = tuner.peft_config
        else:
            configs = {name: output.config for name, output in tuner.adapters.items()}
        for deleted in index.layouts.keys() - configs.keys():
            index.layouts.pop(deleted, None)
        return cls(model, configs, index)

    def layers(self) -> List[Tuple[str, LoraLayer]]:
        """Returns `(name, layer)` of every LoRA layer, in the order of `named_modules`."""
        return self.index.layers()

    def blocks(self, name: str) -> Blocks:
        """Returns all factors of an adapter."""
        found = self._blocks.get(name)
        if found is None:
            found = self._blocks[name] = Blocks.of(self.index, name)
        return found

    def pack(self, name: str, undo: ExitStack) -> None:
        """Moves the factors of an adapter into one piece of memory, see `packing.pack`."""
        if self.blocks(name).layout.is_loose:
            pack(self.index, name, undo)
            self.changed(name)

    def changed(self, name: str) -> None:
        """Is called where this very call moved parameters of an adapter."""
        self._blocks.pop(name, None)

    def is_fused(self, name: str) -> bool:
        """Returns whether `name` was made by `add_weighted_adapter`, so that it may be refilled."""
        record = self._records().get(name)
        return record is not None and record.config is self.configs.get(name)

    def record(self, name: str) -> FusedRecord:
        """Returns what the fused adapter `name` was filled with.

        Raises:
            TypeError: `name` is not a string.
            ValueError: there is no such adapter, or it was not made by `add_weighted_adapter`.
        """
        if not isinstance(name, str):
            raise TypeError(f'adapter_name is expected to be a string, found {shown(name)}.')
        if name not in self.configs:
            raise ValueError(f'There is no adapter {name!r} to refill, only {sorted(self.configs)}: make it by '
                             '`add_weighted_adapter` first.')
        if not self.is_fused(name):
            raise ValueError(f'Adapter {name!r} was not made by `add_weighted_adapter` (in this process) '
                             'and may have been trained: refilling would destroy it. Choose '
                             'another name and make it by `add_weighted_adapter` first.')
        return self._records()[name]

    def remember(self, name: str, options: MergeOptions, fresh: LoraConfig, layers: FreshLayers) -> None:
        """Records what the fused adapter `name` was filled with, see `FusedRecord`."""
        self._records()[name] = FusedRecord(self.configs[name], options, fresh, layers)

    def config(self, name: str) -> Any:
        """Returns the config of `name` as a source: of a fused adapter, the one that a new adapter would have."""
        return self._records()[name].fresh if self.is_fused(name) else self.configs[name]

    def rank(self, name: str) -> int:
        """Returns the largest rank that the LoRA `name` has by its config as a source."""
        config = self.config(name)
        rank: int = max(config.r, *(config.rank_pattern or {}).values(), 0)
        return rank

    def source(self, name: str, layer_name: str, layer: LoraLayer) -> Optional[Tuple[Factors, float]]:
        """Returns the factors and the scaling of `name` as a source, or None where it does not have the layer.

        Those of a fused adapter are what a new adapter would have, not how they are kept.
        """
        found = factors(layer, name)
        if found is None or not self.is_fused(name):
            return None if found is None else (found, layer.scaling[name])
        if layer_name not in self._records()[name].layers:
            return None
        rank, scaling = self._records()[name].layers[layer_name]
        return rescaled(unpadded(layer, found, rank), layer.scaling[name] / scaling), scaling

    def _records(self) -> Dict[str, FusedRecord]:
        records: Dict[str, FusedRecord] = self.model.__dict__.setdefault(_ATTRIBUTE, {})
        return records
