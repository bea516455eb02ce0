"""The adapters of one model, and what is remembered of those that were fused: which may be refilled, and how."""
from dataclasses import dataclass
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from torch import nn
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .lora_index import Factors, LoraIndex, factors, unpadded
from .merging import MergeOptions

# Where a model keeps the records of its fused adapters, in its `__dict__`: copied with it, and gone with it.
_ATTRIBUTE = '_fused_adapters'


@dataclass(frozen=True)
class FusedRecord:
    """What is remembered of one fused adapter.

    Attributes:
        config: the adapter's config. An adapter of the same name with another config is another adapter.
        options: what it was last filled with.
        rank: the rank that a new adapter would have had then; the parameters may have more, filled with zeros.
    """
    config: LoraConfig
    options: MergeOptions
    rank: int


class Adapters(NamedTuple):
    """The adapters of one model.

    Attributes:
        model: the model that holds their layers.
        configs: their configs by name.
    """
    model: nn.Module
    configs: Mapping[str, Any]

    @classmethod
    def of(cls, tuner: Any) -> 'Adapters':
        """Returns the adapters of a `SwiftModel` or a `LoraModel` (what a `PeftModel` holds as its `base_model`)."""
        if isinstance(tuner, LoraModel):
            return cls(tuner.model, tuner.peft_config)
        return cls(tuner.model, {name: output.config for name, output in tuner.adapters.items()})

    def layers(self) -> List[Tuple[str, LoraLayer]]:
        """Returns `(name, layer)` of every LoRA layer, in the order of `named_modules`."""
        return LoraIndex.of(self.model).layers()

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
            raise TypeError(f'adapter_name is expected to be a string, found {name!r}.')
        if name not in self.configs:
            raise ValueError(f'There is no adapter {name!r} to refill, only {sorted(self.configs)}: make it by '
                             '`add_weighted_adapter` first.')
        if not self.is_fused(name):
            raise ValueError(f'Adapter {name!r} was not made by `add_weighted_adapter` (in this process, with '
                             'swift_patch applied) and may have been trained: refilling would destroy it. Choose '
                             'another name and make it by `add_weighted_adapter` first.')
        return self._records()[name]

    def remember(self, name: str, options: MergeOptions, rank: int) -> None:
        """Records what the fused adapter `name` was filled with."""
        self._records()[name] = FusedRecord(self.configs[name], options, rank)

    def rank(self, name: str) -> int:
        """Returns the largest rank of the LoRA `name`; of a fused adapter, the rank that is in use."""
        config = self.configs[name]
        if self.is_fused(name):
            return self._records()[name].rank
        return max(config.r, *(config.rank_pattern or {}).values(), 0)

    def factors(self, name: str, layer: LoraLayer) -> Optional[Factors]:
        """Returns the `Factors` of `name` in `layer`, without the zeros that fill up a fused adapter, or None."""
        found = factors(layer, name)
        if found is not None and self.is_fused(name):
            return unpadded(layer, found, self._records()[name].rank)
        return found

    def _records(self) -> Dict[str, FusedRecord]:
        return self.model.__dict__.setdefault(_ATTRIBUTE, {})
