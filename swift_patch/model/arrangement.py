"""Where the factors of layers lie in flat memory: one piece for each dtype and device, all A, then all B.

So lie the rows of a batch, and what is read of a file. A packed adapter lies so, too, with A and B in pieces of their
own: layers of one kind side by side, in the order of the model.
"""
import torch
from collections import defaultdict
from torch import Tensor
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple

from ..lora.combination import Form
from ..lora.factors import Factors, formed
from ..lora.reading import Kind


class Factor(NamedTuple):
    """What is known of A or B without its values."""
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> 'Factor':
        """Returns what is known of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)


class LayerFactors(NamedTuple):
    """The factors of one layer without their values.

    Attributes:
        name: the layer's name.
        A: its A.
        B: its B.
        groups: the groups of a convolution; 1 for any other layer.
        is_transposed: whether the base layer keeps its weight as (in_features, out_features).
    """
    name: str
    A: Factor
    B: Factor
    groups: int
    is_transposed: bool


class Arrangement:
    """Where the factors of layers lie in flat memory. See `packing.Layout`, whose attributes these are, too.

    Args:
        layers: the layers, in the order of the model.

    Attributes:
        sizes: how many elements each piece of memory has.
        sides: where every A lies, and every B: in which piece, from which element, in which shape.
    """
    # It is memory that was made for it.
    is_contiguous, is_meta, is_inference = True, False, False

    def __init__(self, layers: Iterable[LayerFactors]):
        kinds: Dict[Any, List[LayerFactors]] = defaultdict(list)
        for layer in layers:
            kinds[layer[1:]].append(layer)
        found = [layer for same in kinds.values() for layer in same]
        self.names = tuple(layer.name for layer in found)
        self.name_set = frozenset(self.names)
        self.places = {name: i for i, name in enumerate(self.names)}
        self.shapes = [(layer.A.shape, layer.B.shape) for layer in found]
        self.rank = max((A[0] for A, _ in self.shapes), default=0)
        self.groups = [layer.groups for layer in found]
        self.is_transposed = [layer.is_transposed for layer in found]
        self.biased: List[int] = []
        self.sharded: List[str] = []
        self.sizes: Dict[Kind, int] = {}
        self.sides: List[List[Tuple[Kind, int, torch.Size]]] = []
        for side in Factors._fields:
            places = []
            for layer in found:
                shape, *kind = getattr(layer, side)
                begin = self.sizes.get(tuple(kind), 0)
                places.append((tuple(kind), begin, shape))
                self.sizes[tuple(kind)] = begin + shape.numel()
            self.sides.append(places)
        self.is_one_run = self.is_packed = len(self.sizes) == 1
        self.runs: List[int] = []
        for same in kinds.values():
            self.runs += [len(self.runs)] * len(same)

    def is_like(self, other: Any) -> bool:
        """Returns whether another adapter has factors of the same shapes in the same layers, in as many runs."""
        return self is other or (self.names == other.names and self.runs == other.runs and self.shapes == other.shapes
                                 and self.is_one_run == other.is_one_run)


class FlatFactors:
    """The factors of one adapter in flat memory. See `packing.AdapterFactors`.

    Attributes:
        layout: where they lie.
        memory: the memory, in one dimension for each of its pieces.
        scalings: the adapter's scaling in each layer.
    """

    def __init__(self, layout: Arrangement, memory: Mapping[Kind, Tensor], scalings: Sequence[float]):
        self.layout, self.memory, self.scalings = layout, memory, scalings

    def formed(self, begin: int, end: int, form: Form) -> Factors:
        """Returns the factors of the layers from `begin` to `end`, all of one run or, where only their elements are
        asked for, in one piece of memory."""
        flat = self._elements(begin, end)
        return flat if form == 'elements' else formed(self._stacked(flat, begin, end), form)

    def factors(self, place: int) -> Factors:
        """Returns the factors of one layer."""
        return Factors(*(self.memory[kind][first:first + shape.numel()].view(shape)
                         for kind, first, shape in (side[place] for side in self.layout.sides)))

    def every(self) -> List[Factors]:
        """Returns the factors of all layers: what `factors` returns of each, in less time."""
        found: List[Factors] = []
        # A run is called by its first layer.
        begins = list(dict.fromkeys(self.layout.runs))
        for begin, end in zip(begins, [*begins[1:], len(self.layout.runs)]):
            found += map(Factors, *(side.unbind() for side in self._stacked(self._elements(begin, end), begin, end)))
        return found

    def _elements(self, begin: int, end: int) -> Factors:
        """Returns the elements of the layers from `begin` to `end`, all in one piece of memory."""
        flat = []
        for side in self.layout.sides:
            (kind, first, _), (_, last, shape) = side[begin], side[end - 1]
            flat.append(self.memory[kind][first:last + shape.numel()])
        return Factors(*flat)

    def _stacked(self, flat: Factors, begin: int, end: int) -> Factors:
        """Returns the elements of layers of one run as factors, with the layers in front."""
        return Factors(*(factor.view(end - begin, *shape) for factor, shape in zip(flat, self.layout.shapes[begin])))
