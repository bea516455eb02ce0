"""What a merge may take: adapters of a library, then those of the model. For the time of one call."""
import torch
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from ..lora.factors import Factors, is_padding_zero, rescaled, unpadded
from .adapters import Adapters
from .arrangement import Arrangement, FlatFactors
from .checks import check_modules_to_save, check_source
from .kinds import StoredKind
from .memory import FusedRecord
from .packing import AdapterFactors, Layout
from .stored import check_stored, read_stored, stored_kind


class Sources:
    """Adapters as sources of a merge, by name.

    What is found of the library is kept in `adapters`, so that one call sees one state of its files.

    Args:
        adapters: the adapters of the model, with the library.
        with_values: whether the values of the library's adapters are read. They are on the meta device otherwise.
    """

    def __init__(self, adapters: Adapters, with_values: bool = True):
        self.adapters, self._with_values = adapters, with_values
        self._intact: Dict[str, bool] = {}

    def is_stored(self, name: str) -> bool:
        """Returns whether a name is that of an adapter of the library."""
        library = self.adapters.library
        return name in self.adapters.stored or (library is not None and name in library)

    def of_model(self, names: Iterable[str]) -> List[str]:
        """Returns those of some names that are not of the library."""
        return [name for name in names if not self.is_stored(name)]

    def check(self, name: str) -> None:
        """Raises ValueError where there is no such adapter, or it cannot be merged. A call looks at it once."""
        if name in self.adapters.checked:
            return
        if not self.is_stored(name):
            check_source(self.adapters, name)
        elif self._with_values:
            self.adapters.stored[name] = check_stored(self.adapters, name), None
        else:
            # By its config alone, which says nothing of its file.
            self._kind(name)
            return
        self.adapters.checked.add(name)

    def check_modules_to_save(self, names: Sequence[str]) -> None:
        """Raises ValueError where several sources hold a module each beside their LoRA layers."""
        check_modules_to_save(self.adapters, self.of_model(names))

    def record(self, name: str) -> Optional[FusedRecord]:
        """Returns the record of a source that is a fused adapter; None where it is to be taken as it is.

        So is one that holds values where its record says zeros: something else than a refill wrote to it.
        """
        record = None if self.is_stored(name) else self.adapters.record_or_none(name)
        if record is None:
            return None
        intact = self._intact.get(name)
        if intact is None:
            intact = self._intact[name] = self._is_as_recorded(name, record)
        return record if intact else None

    def config(self, name: str) -> Any:
        """Returns the config of a source: of a fused adapter, the one that a new adapter would have."""
        if self.is_stored(name):
            return self._kind(name).config
        record = self.record(name)
        return self.adapters.configs[name] if record is None else record.config

    def config_rank(self, name: str) -> int:
        """Returns the largest rank of the config of a source, which PEFT takes for the adapter's."""
        config = self.config(name)
        rank: int = max(config.r, *(config.rank_pattern or {}).values(), 0)
        return rank

    def rank(self, name: str) -> int:
        """Returns the largest rank that a source has: of its config and of its tensors, which may have more where an
        adapter was padded or swapped."""
        record = self.record(name)
        if record is None:
            return max(self.config_rank(name), self.layout(name).rank)
        return max(self.config_rank(name), *(rank for rank, _ in record.layers.values()))

    def layout(self, name: str) -> Union[Layout, Arrangement]:
        """Returns where the factors of a source lie. No values are read."""
        return self._kind(name).layout if self.is_stored(name) else self.adapters.factors(name).layout

    def scalings(self, name: str) -> List[float]:
        """Returns the scaling of a source in each layer, in the order of its layout."""
        return self._kind(name).scalings if self.is_stored(name) else self.adapters.factors(name).scalings

    def factors(self, name: str) -> Union[AdapterFactors, FlatFactors]:
        """Returns all factors of a source."""
        if not self.is_stored(name):
            return self.adapters.factors(name)
        if not self._with_values:
            kind = self._kind(name)
            memory = {of: torch.empty(size, dtype=of[0], device='meta') for of, size in kind.layout.sizes.items()}
            return FlatFactors(kind.layout, memory, kind.scalings)
        factors: Optional[FlatFactors] = self.adapters.stored.get(name, (None, None))[1]
        if factors is None:
            before = self._kind(name)
            kind, factors = read_stored(self.adapters, name)
            if kind is not before and not kind.is_like(before):
                raise ValueError(f'Adapter {name!r} of the library is expected to stay as it is while it is merged, '
                                 'found another one in its files meanwhile: compose again.')
            self.adapters.stored[name] = before, factors
        return factors

    def source(self, name: str, layer_name: str) -> Optional[Tuple[Factors, float]]:
        """Returns the factors and the scaling of a source in a layer, or None where it does not have the layer.

        Those of a fused adapter are what a new adapter would have, not how they are kept.
        """
        place = self.layout(name).places.get(layer_name)
        if place is None:
            return None
        found, record = self.factors(name), self.record(name)
        if record is None:
            return found.factors(place), found.scalings[place]
        if layer_name not in record.layers:
            return None
        rank, scaling = record.layers[layer_name]
        pair = unpadded(found.factors(place), rank, found.layout.groups[place])
        return rescaled(pair, found.scalings[place] / scaling), scaling

    def _kind(self, name: str) -> StoredKind:
        found: Optional[Tuple[StoredKind, Any]] = self.adapters.stored.get(name)
        if found is None:
            found = self.adapters.stored[name] = stored_kind(self.adapters, name), None
        return found[0]

    def _is_as_recorded(self, name: str, record: FusedRecord) -> bool:
        """Whether a fused adapter is zero in all layers, and beyond all ranks, that its record does not name."""
        found = self.adapters.factors(name)
        if found.layout.is_meta:
            return True
        for place, layer_name in enumerate(found.layout.names):
            rank, _ = record.layers.get(layer_name, (0, 1.0))
            if not is_padding_zero(found.factors(place), rank, found.layout.groups[place]):
                return False
        return record.layers.keys() <= found.layout.places.keys()
