"""A fusion of its own for each row of a batch: the memory of the rows, and which layers read it.

A row is what the parameters of a fused adapter would hold after a refill: of its layers, its rank and its scalings. All
rows are one piece of memory, which `variant.RowsVariant` reads.
"""
import re
import torch
from contextlib import ExitStack
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..errors import RowsError
from .adapters import Adapters
from .arrangement import Arrangement, Factor, FlatFactors, LayerFactors
from .packing import AdapterFactors
from .variant import RowsVariant, reads_variants

# What the parts of a model for other things than text are called, in its config and among its modules.
_OF_OTHERS = re.compile('vision|visual|image|video|audio|speech')

# Models (of their authors' own code) whose layers get (sequence, batch, features).
_SEQUENCE_FIRST = ('chatglm', 'codegeex4')


class Rows:
    """The memory of the rows of one fused adapter, one piece for each dtype and device: (capacity, elements).

    It stays where it is, so that compiled and captured graphs that read it stay valid. It keeps nothing of the model
    alive.

    Args:
        target: the fused adapter.
        capacity: how many rows there can be.

    Attributes:
        capacity: how many rows there can be.
        variants: what is installed in the layers, in the order of the layout.
    """

    def __init__(self, target: AdapterFactors, capacity: int):
        self.capacity = capacity
        self._key = _key_of(target)
        layout = target.layout
        self.layout = Arrangement(
            LayerFactors(name, Factor.of(A), Factor.of(B), groups, is_transposed) for name, A, B, groups, is_transposed
            in zip(layout.names, *layout.sides(target.parameters), layout.groups, layout.is_transposed))
        with torch.inference_mode(False):
            self._memory = {
                # Written to now, for memory that is new costs more than what is merged into it.
                kind: torch.empty((capacity, size), dtype=kind[0], device=kind[1]).zero_()
                for kind, size in self.layout.sizes.items()
            }
        self.variants = [RowsVariant(name) for name in target.layout.names]
        # What the variants read, and how many rows of it, which are mostly as many as the last time.
        self._shown: List[Tuple[Tensor, Tensor]] = []
        self._count = 0

    def fits(self, target: AdapterFactors, count: int) -> bool:
        """Returns whether these are rows for the fused adapter as it is now, and for so many."""
        return count <= self.capacity and self._key == _key_of(target)

    def row(self, number: int, target: AdapterFactors) -> FlatFactors:
        """Returns a row, to write to it."""
        return FlatFactors(self.layout, {
            kind: memory[number]
            for kind, memory in self._memory.items()
        }, target.scalings)

    def clear(self, number: int) -> None:
        """Fills a row with zeros: the base model alone."""
        for memory in self._memory.values():
            memory[number].zero_()

    def show(self, count: int) -> None:
        """Has the variants read the first `count` rows."""
        if len(self._shown) != len(self.variants) or self._count != count:
            self._shown = [(self.view(0, place)[:count], self.view(1, place)[:count])
                           for place in range(len(self.variants))]
            self._count = count
        for variant, (A, B) in zip(self.variants, self._shown):
            variant.read(A, B)

    def hide(self) -> None:
        """Has the variants read nothing, so that a forward is refused."""
        for variant in self.variants:
            variant.read(None, None)

    def view(self, side: int, place: int) -> Tensor:
        """Returns A (side 0) or B (side 1) of one layer in all rows, rows in front."""
        kind, first, shape = self.layout.sides[side][place]
        return self._memory[kind][:, first:first + shape.numel()].view(self.capacity, *shape)


def rows_for(adapters: Adapters, name: str, count: int, undo: ExitStack) -> Rows:
    """Returns memory for `count` rows of a fused adapter, that of the last time where it is large enough.

    Args:
        adapters: the adapters of the model.
        name: the fused adapter.
        count: how many rows there shall be.
        undo: takes what undoes it.
    """
    record, target = adapters.record(name), adapters.factors(name)
    # What grew has other parameters, with which its memory goes.
    adapters.remember(name, record.options, record.config, record.layers, undo)
    memory = adapters.record(name).memory
    if memory.rows is None or not memory.rows.fits(target, count):
        undo.callback(setattr, memory, 'rows', memory.rows)
        memory.rows = Rows(target, count)
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
