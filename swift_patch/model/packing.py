"""An adapter's factors in one piece of memory: all A in a row, then all B, layers of equal shapes side by side.

A merge of many small layers costs as many calls as there are layers. Packed, it costs as many as there are shapes or,
element by element, a handful, whatever the number of layers. Packing takes no memory, and parameters stay the same
objects, at other addresses. What is remembered is compared with the model at each use, address by address: an adapter
that was moved, cast, copied or reloaded is looked at anew.
"""
import threading
import torch
from collections import Counter, defaultdict
from contextlib import ExitStack
from itertools import accumulate
from operator import attrgetter, itemgetter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from ..lora.combination import Form
from ..lora.factors import Factors, formed
from ..lora.holders import ALONE, holders
from .index import View
from .layers import factors_of, groups_of, has_adapter, is_kept_elsewhere, is_sharded, is_transposed, scalings_of

_parameters_of, _weight_of = attrgetter('_parameters'), itemgetter('weight')

# Two threads that pack one adapter would each get half of it.
_lock = threading.Lock()


class Layout:
    """Where the factors of one adapter lie in memory. It keeps nothing of the adapter alive.

    Layers of one kind (shapes, dtypes, devices) come one after another, in the order of the model. The lists have an
    item for each layer.

    Attributes:
        names: the layers' names.
        places: by name, the layer's place in these lists.
        shapes: the shapes of A and B.
        rank: the largest rank.
        groups: the groups of the layers, see `layers.groups_of`.
        is_transposed: whether the base layers keep their weights as (in_features, out_features).
        runs: a number that layers of one kind share where their A follow one another in memory, and so do their B.
        biased: the places of the layers that have a bias beside B.
        is_one_run: whether all A follow one another in memory, and so do all B.
        is_packed: whether that is so, or is so for all of each dtype and device.
        is_contiguous: whether each is contiguous in itself.
        is_meta: whether some are on the meta device.
        is_inference: whether some were made in inference mode.
        sharded: the names of the layers that have a DTensor, or another tensor that has no memory of its own.
        kept_elsewhere: the names of the layers whose values FSDP or ZeRO-3 keeps, though they may have all of them now.
        nbytes: the bytes that all take on each device.
        addresses: the address of every A, then of every B.
    """

    def __init__(self, view: View, adapter: str):
        kinds: Dict[Any, List[Tuple[int, str, LoraLayer]]] = defaultdict(list)
        self._missing = []
        for number, (name, layer) in enumerate(view.layers):
            pair = factors_of(layer, adapter)
            if pair is None:
                self._missing.append(number)
            else:
                of_pair = ((factor.shape, factor.dtype, factor.device) for factor in pair)
                kind = (*of_pair, groups_of(layer), is_transposed(layer))
                kinds[kind].append((number, name, layer))
        found = [item for same in kinds.values() for item in same]
        self._numbers = [number for number, _, _ in found]
        self.names = tuple(name for _, name, _ in found)
        self.name_set = frozenset(self.names)
        self.places = {name: i for i, name in enumerate(self.names)}
        self.shapes = [(kind[0][0], kind[1][0]) for kind, same in kinds.items() for _ in same]
        self.rank = max((A[0] for A, _ in self.shapes), default=0)
        self.groups = [kind[-2] for kind, same in kinds.items() for _ in same]
        self.is_transposed = [kind[-1] for kind, same in kinds.items() for _ in same]
        self.biased = [i for i, (_, _, layer) in enumerate(found) if layer.lora_bias.get(adapter)]
        self._adapter = adapter
        # An embedding has A and B as parameters; a parametrized module has no parameter `weight`.
        modules = [layer._modules[side]._modules.get(adapter) for _, _, layer in found for side in ('lora_A', 'lora_B')]
        self._has_modules = all(module is not None and 'weight' in module._parameters for module in modules)

        parameters = self.find(view)
        A, B = self.sides(parameters)
        self.runs: List[int] = []
        for same in kinds.values():
            begin = len(self.runs)
            of_kind = slice(begin, begin + len(same))
            is_one = _is_in_a_row(A[of_kind]) and _is_in_a_row(B[of_kind])
            self.runs.extend(begin if is_one else begin + i for i in range(len(same)))
        self.is_one_run = _is_in_a_row(A) and _is_in_a_row(B)
        self.is_packed = all(map(_is_in_a_row, self.rows(parameters)))
        self.is_contiguous = all(parameter.is_contiguous() for parameter in parameters)
        self.is_meta = any(parameter.is_meta for parameter in parameters)
        self.is_inference = any(parameter.is_inference() for parameter in parameters)
        self.sharded = [name for name, *pair in zip(self.names, A, B) if any(map(is_sharded, pair))]
        self.kept_elsewhere = [name for _, name, layer in found if is_kept_elsewhere(layer, adapter)]
        self.nbytes: Dict[torch.device, int] = defaultdict(int)
        for parameter in parameters:
            self.nbytes[parameter.device] += parameter.nbytes
        self.offsets = [[0, *accumulate(map(Tensor.numel, side))] for side in (A, B)]
        # Views of one piece of memory that all kept their addresses kept their shapes: one of each run is looked at.
        self._firsts = [i for i, run in enumerate(self.runs) if i == run]
        self.addresses, self._facts = list(map(Tensor.data_ptr, parameters)), self._facts_of(parameters)

    def is_like(self, other: Any) -> bool:
        """Returns whether another adapter has factors of the same shapes in the same layers, in as many runs."""
        return self is other or (self.names == other.names and self.runs == other.runs and self.shapes == other.shapes
                                 and self.is_one_run == other.is_one_run)

    def layers(self, view: View) -> List[LoraLayer]:
        """Returns the layers."""
        layers = view.layers
        return [layers[number][1] for number in self._numbers]

    def find(self, view: View) -> List[Tensor]:
        """Returns the adapter's parameters in the model now: A of each layer, then B of each.

        Raises:
            KeyError: a layer does not have the adapter any more.
        """
        name = self._adapter
        if self._has_modules:
            # Past everything that is not a dict: this is most of the time of a small merge.
            modules = (modules for side in view.adapter_modules for modules in map(side.__getitem__, self._numbers))
            return list(map(_weight_of, map(_parameters_of, map(itemgetter(name), modules))))
        pairs = [factors_of(layer, name) for layer in self.layers(view)]
        if None in pairs:
            raise KeyError(name)
        return [*(pair.A for pair in pairs), *(pair.B for pair in pairs)]  # type: ignore[union-attr]

    def sides(self, parameters: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Returns the A and the B among what `find` returned."""
        return parameters[:len(self.names)], parameters[len(self.names):]

    def rows(self, parameters: List[Tensor]) -> Iterator[List[Tensor]]:
        """Yields what `pack` puts in a row: the A, or the B, of one dtype and device."""
        for side in self.sides(parameters):
            rows = defaultdict(list)
            for parameter in side:
                rows[parameter.dtype, parameter.device].append(parameter)
            yield from rows.values()

    def is_current(self, view: View, parameters: List[Tensor]) -> bool:
        """Returns whether these parameters, found now, are all, and what and where they were."""
        return (list(map(Tensor.data_ptr, parameters)) == self.addresses and self._facts_of(parameters) == self._facts
                and not any(has_adapter(view.layers[number][1], self._adapter) for number in self._missing))

    def _facts_of(self, parameters: List[Tensor]) -> List[Any]:
        # The size of the memory, too: separate tensors may come to lie where views of one were.
        return [_facts(side[i]) for side in self.sides(parameters) for i in self._firsts]


class AdapterFactors:
    """All factors of one adapter as the model holds them now.

    Attributes:
        layout: where they lie.
        parameters: A of each layer, then B of each.
        layers: the layers, in the order of the layout.
        scalings: the adapter's scaling in each.
    """

    def __init__(self, layout: Layout, parameters: List[Tensor], layers: List[LoraLayer], adapter: str):
        self.layout, self.parameters, self.layers = layout, parameters, layers
        self.scalings = scalings_of(layers, adapter)

    @classmethod
    def of(cls, layouts: Dict[str, Layout], view: View, adapter: str) -> 'AdapterFactors':
        """Returns the factors of `adapter` as they are now.

        Args:
            layouts: what is remembered of the layouts, by adapter.
            view: the modules of the model.
            adapter: the adapter.
        """
        layout = layouts.get(adapter)
        parameters = None
        if layout is not None:
            try:
                parameters = layout.find(view)
                if not layout.is_current(view, parameters):
                    layout = None
            except KeyError:  # It was deleted from some layer.
                layout = None
        if layout is None or parameters is None:
            layout = layouts[adapter] = Layout(view, adapter)
            parameters = layout.find(view)
        return cls(layout, parameters, layout.layers(view), adapter)

    def formed(self, begin: int, end: int, form: Form) -> Factors:
        """Returns the factors of the layers from `begin` to `end`, in the memory of the parameters.

        They are all of one run or, where only their elements are asked for, all are.
        """
        firsts = [side[begin].detach() for side in self.layout.sides(self.parameters)]
        if form == 'elements' and end - begin > 1:
            counts = [offsets[end] - offsets[begin] for offsets in self.layout.offsets]
            return Factors(*(first.as_strided((count, ), (1, )) for first, count in zip(firsts, counts)))
        return formed(
            Factors(*(first.as_strided((end - begin, *first.shape), (first.numel(), *first.stride()))
                      for first in firsts)), form)

    def factors(self, place: int) -> Factors:
        """Returns the factors of one layer, in the memory of the parameters."""
        return Factors(*(side[place].detach() for side in self.layout.sides(self.parameters)))


def pack(layouts: Dict[str, Layout], view: View, adapter: str, undo: ExitStack) -> None:
    """Moves the factors of an adapter into one piece of memory for each dtype and device.

    A no-op where they are packed already, and where anything else holds their memory.

    Args:
        layouts: see `AdapterFactors.of`.
        view: the modules of the model.
        adapter: the adapter.
        undo: takes what undoes it.
    """
    with _lock:
        found = AdapterFactors.of(layouts, view, adapter)
        if found.layout.is_packed or not _is_own(found.parameters):
            return
        for row in found.layout.rows(found.parameters):
            memory = torch.cat([parameter.detach().flatten() for parameter in row])
            for parameter, values in zip(row, memory.split(list(map(Tensor.numel, row)))):
                undo.callback(setattr, parameter, 'data', parameter.data)
                parameter.data = values.view(parameter.shape)


def _facts(parameter: Tensor) -> Tuple[Any, ...]:
    if parameter.is_meta or is_sharded(parameter):
        # The identity, for there is no address.
        return parameter.shape, parameter.dtype, parameter.device, id(parameter)
    return parameter.shape, parameter.dtype, parameter.device, parameter.untyped_storage().nbytes()


def _is_in_a_row(parameters: Sequence[Tensor]) -> bool:
    """Whether parameters follow one another in one piece of memory. True for none or one."""
    if len(parameters) < 2:
        return True
    first = parameters[0]
    if any(parameter.is_meta or is_sharded(parameter) or not parameter.is_contiguous() for parameter in parameters):
        return False
    if len({parameter.untyped_storage().data_ptr() for parameter in parameters}) > 1:
        return False
    ends = accumulate((parameter.nbytes for parameter in parameters), initial=first.data_ptr())
    return all(parameter.data_ptr() == end and parameter.dtype == first.dtype
               for parameter, end in zip(parameters, ends))


def _is_own(parameters: Sequence[Tensor]) -> bool:
    """Whether nothing but these parameters holds their memory, so that they may be moved to another place."""
    used: Dict[int, int] = Counter()
    tensors: Dict[int, int] = {}
    for parameter in parameters:
        # Parameters of other classes keep their values in ways of their own.
        if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.is_inference():
            return False
        if not parameter.is_contiguous() or (parameter.device.type == 'cpu' and parameter.is_shared()):
            return False
        if parameter.device.type == 'cpu' and not parameter.untyped_storage().resizable():
            # It is that of a NumPy array, of a buffer, or of a file, or was given to one.
            return False
        key, references, tensors[key] = holders(parameter)
        if references > ALONE:
            return False
        used[key] += 1
    return used == tensors
