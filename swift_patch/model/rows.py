"""A fusion of its own for each row of a batch: the memory of the rows, and which layers read it.

A row is what the parameters of a fused adapter would hold after a refill: of its layers and its scalings, and of its
rank or that of the batch. All rows are one piece of memory, which `variant.RowsVariant` reads.
"""
import math
import re
import torch
from contextlib import ExitStack
from functools import lru_cache, partial
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional

from ..errors import RowsError
from ..lora.reading import Kind
from .adapters import Adapters
from .arrangement import Arrangement, Factor, FlatFactors, LayerFactors
from .packing import AdapterFactors
from .variant import RowsVariant, reads_variants

# What the parts of a model for other things than text are called, in its config and among its modules.
_OF_OTHERS = re.compile('vision|visual|image|video|audio|speech')

# Models (of their authors' own code) whose layers get (sequence, batch, features).
_SEQUENCE_FIRST = ('chatglm', 'codegeex4')

# Sizes of a batch (of how many rows, of which rank) whose views of the memory are remembered: one for each layer and
# side, they take longer than a row's merge.
_MAX_SIZES = 16


class Rows:
    """The memory of the rows of one fused adapter, one piece for each dtype and device.

    It stays where it is, and so do all rows of one rank, so that compiled and captured graphs that read them stay
    valid. It keeps nothing of the model alive.

    Args:
        target: the fused adapter.
        count: how many rows there shall be.
        rank: their rank. There can be more rows of a smaller one, or fewer of a larger one.

    Attributes:
        variants: what is installed in the layers, in the order of the layout.
    """

    def __init__(self, target: AdapterFactors, count: int, rank: int):
        # A row has as many elements for each unit of the rank, whatever the rank.
        self._room = count * rank
        self._key = _key_of(target)
        layout = target.layout
        A, B = (map(Factor.of, side) for side in layout.sides(target.parameters))
        layers = list(map(LayerFactors, layout.names, A, B, layout.groups, layout.is_transposed))
        with torch.inference_mode(False):
            memory = {
                # Written to now, for memory that is new costs more than what is merged into it.
                kind: torch.empty(count * size, dtype=kind[0], device=kind[1]).zero_()
                for kind, size in Arrangement(_of_rank(layers, rank)).sizes.items()
            }
        self.variants = [RowsVariant(name) for name in layout.names]
        # No method of this object, which would keep it alive.
        self._section = lru_cache(maxsize=_MAX_SIZES)(partial(_Section, layers, memory))
        self.arrange(count, rank)

    def fits(self, target: AdapterFactors, count: int, rank: int) -> bool:
        """Returns whether these are rows for the fused adapter as it is now, and for so many of a rank."""
        return count * rank <= self._room and self._key == _key_of(target)

    def arrange(self, count: int, rank: int) -> None:
        """Has as many rows, of this rank, from now on. The variants read what they did until `show` or `hide`."""
        self._now = self._section(count, rank)

    def row(self, number: int, target: AdapterFactors) -> FlatFactors:
        """Returns a row, to write to it."""
        return FlatFactors(self._now.layout, {
            kind: memory[number]
            for kind, memory in self._now.memory.items()
        }, target.scalings)

    def clear(self, number: int) -> None:
        """Fills a row with zeros: the base model alone."""
        for memory in self._now.memory.values():
            memory[number].zero_()

    def show(self) -> None:
        """Has the variants read the rows."""
        for variant, (A, B) in zip(self.variants, self._now.factors):
            variant.read(A, B)

    def hide(self) -> None:
        """Has the variants read nothing, so that a forward is refused."""
        for variant in self.variants:
            variant.read(None, None)


class _Section:
    """So many rows of one rank, in the memory of all rows.

    Attributes:
        layout: where the factors of a row lie in it.
        memory: the rows, by dtype and device: (rows, elements).
        factors: A and B of each layer in all rows, rows in front.
    """

    def __init__(self, layers: Iterable[LayerFactors], memory: Mapping[Kind, Tensor], count: int, rank: int):
        self.layout = Arrangement(_of_rank(layers, rank))
        # What was viewed in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.memory = {
                kind: memory[kind][:count * size].view(count, size)
                for kind, size in self.layout.sizes.items()
            }
            self.factors = [(self._view(*A), self._view(*B)) for A, B in zip(*self.layout.sides)]

    def _view(self, kind: Kind, first: int, shape: torch.Size) -> Tensor:
        memory = self.memory[kind]
        return memory[:, first:first + shape.numel()].view(len(memory), *shape)


def _of_rank(layers: Iterable[LayerFactors], rank: int) -> Iterator[LayerFactors]:
    """Yields layers with another rank.

    A fused adapter has one rank in all layers, so that they are as many kinds, in the same order, in any rank.
    """
    for layer in layers:
        A, B = layer.A.shape, layer.B.shape
        yield layer._replace(
            A=layer.A._replace(shape=torch.Size((rank, *A[1:]))),
            B=layer.B._replace(shape=torch.Size((B[0], rank // layer.groups, *B[2:]))))


def rows_for(adapters: Adapters, name: str, count: int, undo: ExitStack, rank: Optional[int] = None) -> Rows:
    """Returns `count` rows of a fused adapter, in the memory of the last time where that is large enough.

    Args:
        adapters: the adapters of the model.
        name: the fused adapter.
        count: how many rows there shall be.
        undo: takes what undoes it.
        rank: the rank that they shall have at least; by default that of the fused adapter.
    """
    record, target = adapters.record(name), adapters.factors(name)
    if rank is None:
        rank = target.layout.rank
    # Which the groups of a convolution part; and no layer has rank 0.
    multiple = math.lcm(*target.layout.groups)
    rank = max(math.ceil(rank / multiple), 1) * multiple
    # What grew has other parameters, with which its memory goes.
    adapters.remember(name, record.options, record.config, record.layers, undo)
    memory = adapters.record(name).memory
    if memory.rows is None or not memory.rows.fits(target, count, rank):
        undo.callback(setattr, memory, 'rows', memory.rows)
        memory.rows = Rows(target, count, rank)
    else:
        memory.rows.arrange(count, rank)
    return memory.rows


def check_rows(adapters: Adapters, name: str) -> None:
    """Raises ValueError where a fused adapter cannot have a fusion for each row."""
    found = adapters.factors(name)
    model_type = getattr(getattr(adapters.model, 'config', None), 'model_type', None)
    if model_type in _SEQUENCE_FIRST:
        raise RowsError(
            f'The model is expected to put the rows of a batch in front in its layers, found {model_type!r}, '
            'which puts the sequence there: compose the samples one by one.')
    if all(name in layer.lora_embedding_A for layer in found.layers):
        raise RowsError(f'Adapter {name!r} is expected to be in some layer that is no embedding to have a fusion for '
                        'each row of a batch, found embeddings alone: compose the samples one by one.')
    for layer_name, layer in zip(found.layout.names, found.layers):
        if not reads_variants(type(layer)):  # type: ignore[arg-type]  # mypy takes a class for no key
            raise RowsError(f'Layer {layer_name!r} is expected to be of a class that can have a fusion for each row of '
                            f'a batch, found a {type(layer).__name__}, in which PEFT computes LoRA in another way: '
                            'compose the samples one by one.')
        variant = layer.lora_variant.get(name)
        if variant is not None and not isinstance(variant, RowsVariant):
            raise RowsError(f'Adapter {name!r} is expected to be a plain LoRA to have a fusion for each row of a '
                            f'batch, found a {type(variant).__name__} in layer {layer_name!r}: compose the samples one '
                            'by one.')


def install(adapters: Adapters, name: str, rows: Rows, undo: ExitStack) -> None:
    """Has the layers of a fused adapter read its rows. `undo` takes what undoes it."""
    is_in_text = _text_of(adapters)
    for layer, variant in zip(adapters.factors(name).layers, rows.variants):
        installed = layer.lora_variant.get(name)
        if installed is not variant:
            variant.is_in_text = is_in_text(variant.name)
            undo.callback(_put_back, layer.lora_variant, name, installed)
            layer.lora_variant[name] = variant


def uninstall(adapters: Adapters, name: str, undo: ExitStack) -> None:
    """Has the layers of a fused adapter read its parameters again. `undo` takes what undoes it."""
    # Nearly always none: each sample asks for this.
    for variants in [layer.lora_variant for _, layer in adapters.layers if name in layer.lora_variant]:
        installed = variants.get(name)
        if isinstance(installed, RowsVariant):
            undo.callback(_put_back, variants, name, installed)
            del variants[name]


def conceal(adapters: Adapters, name: str, undo: ExitStack) -> None:
    """Has no layer of a fused adapter read its rows, so that a forward is refused. `undo` takes what undoes it."""
    for _, layer in adapters.layers:
        installed = layer.lora_variant.get(name)
        if isinstance(installed, RowsVariant):
            undo.callback(installed.read, installed.A, installed.B)
            installed.read(None, None)


def has_rows(adapters: Adapters, name: str) -> bool:
    """Returns whether there is a fusion for each row in an adapter now."""
    variants = [layer.lora_variant.get(name) for layer in adapters.factors(name).layers]
    return any(isinstance(variant, RowsVariant) for variant in variants if variant is not None)


def _put_back(variants: Dict[str, LoraVariant], name: str, variant: Optional[LoraVariant]) -> None:
    if variant is None:
        variants.pop(name, None)
    else:
        variants[name] = variant


def _text_of(adapters: Adapters) -> Callable[[str], bool]:
    """Returns what says whether a layer belongs to the part of the model whose batch is that of the tokens.

    A tower for images or sounds gets as many as there are in the batch, however they are spread over its rows.
    """
    model: Any = adapters.model
    config = vars(getattr(model, 'config', None) or object) if hasattr(model, 'get_input_embeddings') else {}
    if not any(_OF_OTHERS.search(name) for name, value in config.items() if value is not None):
        return lambda name: True
    names = {id(module): name for name, module in zip(adapters.view.index.names, adapters.view.modules)}
    prefix = names.get(id(model.get_input_embeddings()), '').rpartition('.')[0]
    head = names.get(id(model.get_output_embeddings()))
    inside = f'{prefix}.' if prefix else ''
    return lambda name: name == head or (name.startswith(inside) and not _OF_OTHERS.search(name))


def _key_of(target: AdapterFactors) -> Any:
    layout = target.layout
    return layout.names, layout.shapes, [(parameter.dtype, parameter.device) for parameter in target.parameters]
