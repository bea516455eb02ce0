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
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from .lora_index import Factors, Form, LoraIndex, factors, formed, groups

# Two threads that pack one adapter would each get half of it.
_lock = threading.Lock()


class _Container(NamedTuple):
    """What a layer keeps one side of its adapters in: a `ModuleDict`'s modules or a `ParameterDict`'s parameters."""
    children: Dict[str, Any]
    is_of_modules: bool


class Layout:
    """Where the factors of one adapter lie in memory. It keeps nothing of the adapter alive.

    Layers of one kind (shapes, dtypes, devices) come one after another, in the order of the model. The lists have an
    item for each layer.

    Attributes:
        names: the layers' names.
        layers: the layers.
        shapes: the shapes of A and B.
        blocks: a number that layers of one kind share where their A follow one another in memory, and so do their B.
        places: by name, the layer's index in these lists.
        biased: the layers that have a bias beside B.
        is_flat: whether all A follow one another in memory, and so do all B.
        is_loose: whether that is not so, or not of all of one dtype and device, but `pack` can make it so.
        is_contiguous: whether each is contiguous in itself.
        is_meta: whether some are on the meta device.
        is_inference: whether some were made in inference mode.
        nbytes: the bytes that all take.
        addresses: the address of every A, then of every B.
    """

    def __init__(self, index: LoraIndex, adapter: str):
        kinds: Dict[Any, List[Tuple[str, LoraLayer]]] = defaultdict(list)
        lacking = []
        for name, layer in index.layers():
            pair = factors(layer, adapter)
            if pair is None:
                lacking.append(layer)
            else:
                of_pair = ((factor.shape, factor.dtype, factor.device) for factor in pair)
                kind = (*of_pair, groups(layer), is_transposed(layer))
                kinds[kind].append((name, layer))
        found = [item for same in kinds.values() for item in same]
        self.names = tuple(name for name, _ in found)
        self.layers = tuple(layer for _, layer in found)
        self.places = {name: i for i, name in enumerate(self.names)}
        self.shapes = [(kind[0][0], kind[1][0]) for kind, same in kinds.items() for _ in same]
        self.biased = [layer for layer in self.layers if layer.lora_bias.get(adapter)]
        self._adapter = adapter
        self._containers = [_container(layer, side, adapter) for side in 'AB' for layer in self.layers]
        self._lacking = [container for layer in lacking for container in _containers(layer, 'A')]

        parameters = self.find()
        A, B = self.sides(parameters)
        self.blocks: List[int] = []
        for same in kinds.values():
            begin = len(self.blocks)
            of_block = slice(begin, begin + len(same))
            is_one = _is_in_a_row(A[of_block]) and _is_in_a_row(B[of_block])
            self.blocks.extend(begin if is_one else begin + i for i in range(len(same)))
        self.is_flat = _is_in_a_row(A) and _is_in_a_row(B)
        self.is_loose = not all(map(_is_in_a_row, self.rows(parameters))) and _is_own(parameters)
        self.is_contiguous = all(parameter.is_contiguous() for parameter in parameters)
        self.is_meta = any(parameter.is_meta for parameter in parameters)
        self.is_inference = any(parameter.is_inference() for parameter in parameters)
        self.nbytes = sum(parameter.nbytes for parameter in parameters)
        self.offsets = [[0, *accumulate(map(Tensor.numel, side))] for side in (A, B)]
        self.addresses, self._facts = list(map(Tensor.data_ptr, parameters)), self._facts_of(parameters)

    def find(self) -> List[Tensor]:
        """Returns the adapter's parameters in the model now: A of each layer, then B of each.

        Raises:
            KeyError: a layer does not have the adapter any more.
        """
        name = self._adapter
        return [
            children[name]._parameters['weight'] if is_of_modules else children[name]
            for children, is_of_modules in self._containers
        ]

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

    def is_current(self, parameters: List[Tensor]) -> bool:
        """Returns whether these parameters, found now, are all, and what and where they were."""
        return (list(map(Tensor.data_ptr, parameters)) == self.addresses and self._facts_of(parameters) == self._facts
                and not any(self._adapter in container.children for container in self._lacking))

    def _facts_of(self, parameters: List[Tensor]) -> List[Any]:
        # One layer of each block: views of one piece of memory that all kept their addresses kept their shapes. The
        # size of that piece, too: separate tensors may come to lie where views of one were.
        firsts = [i for i, block in enumerate(self.blocks) if i == block]
        return [_facts(side[i]) for side in self.sides(parameters) for i in firsts]


class Blocks:
    """All factors of one adapter as the model holds them now.

    Attributes:
        layout: where they lie.
        parameters: A of each layer, then B of each.
    """

    def __init__(self, layout: Layout, parameters: List[Tensor]):
        self.layout, self.parameters = layout, parameters

    @classmethod
    def of(cls, index: LoraIndex, adapter: str) -> 'Blocks':
        """Returns the factors of `adapter` as they are now."""
        layout = index.layouts.get(adapter)
        if layout is not None:
            try:
                parameters = layout.find()
                if layout.is_current(parameters):
                    return cls(layout, parameters)
            except KeyError:
                pass  # It was deleted from some layer.
        layout = index.layouts[adapter] = Layout(index, adapter)
        return cls(layout, layout.find())

    def formed(self, begin: int, end: int, form: Form) -> Factors:
        """Returns the factors of the layers from `begin` to `end`, in the memory of the parameters.

        They are all of one block or, where only their elements are asked for, the layout is flat.
        """
        firsts = [side[begin].detach() for side in self.layout.sides(self.parameters)]
        if form == 'elements' and end - begin > 1:
            counts = [offsets[end] - offsets[begin] for offsets in self.layout.offsets]
            return Factors(*(first.as_strided((count, ), (1, )) for first, count in zip(firsts, counts)))
        return formed(
            Factors(*(first.as_strided((end - begin, *first.shape), (first.numel(), *first.stride()))
                      for first in firsts)), form)


def pack(index: LoraIndex, adapter: str, undo: ExitStack) -> None:
    """Moves the factors of an adapter into one piece of memory for each dtype and device, where they are loose.

    Args:
        index: the index of the model.
        adapter: the adapter.
        undo: takes what undoes it.
    """
    with _lock:
        blocks = Blocks.of(index, adapter)
        if not blocks.layout.is_loose:
            return
        for row in blocks.layout.rows(blocks.parameters):
            memory = torch.cat([parameter.detach().flatten() for parameter in row])
            for parameter, values in zip(row, memory.split(list(map(Tensor.numel, row)))):
                undo.callback(setattr, parameter, 'data', parameter.data)
                parameter.data = values.view(parameter.shape)


def is_transposed(layer: LoraLayer) -> bool:
    """Returns whether the base layer keeps its weight as (in_features, out_features)."""
    return bool(getattr(layer, 'fan_in_fan_out', False)) or len(layer.lora_embedding_A) > 0


def _containers(layer: LoraLayer, side: str) -> Tuple[_Container, _Container]:
    modules, embeddings = (layer._modules[f'{name}_{side}'] for name in ('lora', 'lora_embedding'))
    return _Container(modules._modules, True), _Container(embeddings._parameters, False)


def _container(layer: LoraLayer, side: str, adapter: str) -> _Container:
    """Returns the one of a layer's two containers that has `adapter`."""
    modules, embeddings = _containers(layer, side)
    return modules if adapter in modules.children else embeddings


def _facts(parameter: Tensor) -> Tuple[Any, ...]:
    storage = None if parameter.is_meta else parameter.untyped_storage().nbytes()
    return parameter.shape, parameter.dtype, parameter.device, storage


def _is_in_a_row(parameters: Sequence[Tensor]) -> bool:
    """Whether parameters follow one another in one piece of memory. One alone does, and so do none."""
    if len(parameters) < 2:
        return True
    first = parameters[0]
    if first.is_meta or not all(parameter.is_contiguous() for parameter in parameters):
        return False
    if len({parameter.untyped_storage().data_ptr() for parameter in parameters}) > 1:
        return False
    ends = accumulate((parameter.nbytes for parameter in parameters), initial=first.data_ptr())
    return all(parameter.data_ptr() == end and parameter.dtype == first.dtype
               for parameter, end in zip(parameters, ends))


def _is_own(parameters: Sequence[Tensor]) -> bool:
    """Whether the memory of these parameters is theirs alone, so that nobody is left behind when they move."""
    used: Dict[int, int] = Counter()
    sizes: Dict[int, int] = {}
    for parameter in parameters:
        # Parameters of other classes keep their values in ways of their own.
        if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.is_inference():
            return False
        if not parameter.is_contiguous() or (parameter.device.type == 'cpu' and parameter.is_shared()):
            return False
        storage = parameter.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        used[storage.data_ptr()] += parameter.nbytes
    return used == sizes
