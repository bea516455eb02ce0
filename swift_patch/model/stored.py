"""Adapters of a library as sources of one model: whether their files fit it, and where their tensors go."""
import math
import torch
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

from ..errors import joined, printable, short_repr
from ..lora.checkpoint import BASE_WEIGHTS, CONFIG_NAME, EMBEDDING_SEGMENTS, LINEAR_SEGMENTS, PEFT_PREFIX, split_key
from ..lora.header import SIZES, Entry
from ..lora.reading import Kind, Placed, Reading
from ..lora.stored import StoredAdapter, values_of
from .adapters import Adapters
from .arrangement import FlatFactors
from .kinds import StoredKind, kind_of
from .layers import base_of
from .renaming import renamed_keys

# Of base weights, so many elements are compared at a time.
_COMPARED = 2**24


@dataclass(frozen=True, eq=False)
class _Bound:
    kind: StoredKind
    reading: Reading


def stored_kind(adapters: Adapters, name: str) -> StoredKind:
    """Returns what PEFT would make of an adapter of the library. Its tensors are not looked at.

    Raises:
        ValueError: the adapter cannot be fused, or does not fit the model.
    """
    assert adapters.library is not None
    return kind_of(adapters, adapters.library.checkpoint(name))


def check_stored(adapters: Adapters, name: str) -> StoredKind:
    """Checks an adapter of the library by its config and by the header of its file, without its values.

    Returns:
        See `stored_kind`.

    Raises:
        ValueError: it cannot be fused, or does not fit the model.
    """
    assert adapters.library is not None
    return adapters.library.looked_at(name, lambda stored: _bound(adapters, stored)).kind


def read_stored(adapters: Adapters, name: str) -> Tuple[StoredKind, FlatFactors]:
    """Returns an adapter of the library as its files are now.

    Raises:
        ValueError: see `check_stored`, or its values cannot be read or are not finite.
    """
    library = adapters.library
    assert library is not None

    def read(stored: StoredAdapter) -> Tuple[StoredKind, FlatFactors]:
        bound = _bound(adapters, stored)
        tensors = library.read(stored, bound.reading)
        return bound.kind, FlatFactors(bound.kind.layout, tensors, bound.kind.scalings)

    return library.looked_at(name, read)


def _bound(adapters: Adapters, stored: StoredAdapter) -> _Bound:
    found: Optional[_Bound] = adapters.memory.stored.get(stored)
    if found is None or not found.kind.is_current(adapters):
        kind = kind_of(adapters, stored.checkpoint)
        key = stored.header, kind
        known: Any = adapters.memory.known(key)
        if known is None:
            known = adapters.memory.remember_new(key, _reading_of(adapters, kind, stored))
        reading, base_keys = known
        for file_key, module in base_keys:
            _check_base_weight(adapters, stored, file_key, module)
        found = adapters.memory.stored[stored] = _Bound(kind, reading)
    return found


def _reading_of(adapters: Adapters, kind: StoredKind, stored: StoredAdapter) -> Tuple[Reading, List[Tuple[str, str]]]:
    """Returns how files of one header are read, and the keys of base weights in them with the names of their modules.

    Raises:
        ValueError: the file does not hold what PEFT would make of the config: no more, no less, in its shapes.
    """
    layout = kind.layout
    expected: Dict[Tuple[str, str], Tuple[Kind, int, torch.Size]] = {}
    for name, place in layout.places.items():
        for side, segment in enumerate(EMBEDDING_SEGMENTS if name in kind.embeddings else LINEAR_SEGMENTS):
            expected[name, segment] = layout.sides[side][place]
    placed: List[Placed] = []
    # Of the file alone, and of the file in this model.
    faults: List[str] = []
    problems: List[str] = []
    foreign: List[str] = []
    base_keys: List[Tuple[str, str]] = []
    _check_one_adapter(stored)
    for key, new_key in renamed_keys(adapters.model, kind.config, stored).items():
        entry, parts = stored.header.entries[key], split_key(new_key)
        if parts is None and new_key.endswith(BASE_WEIGHTS):
            base_keys.append((key, new_key.removeprefix(PEFT_PREFIX).removesuffix('.weight')))
            continue
        if parts is None:
            faults.append(f'{printable(key)} is not a tensor of a LoRA and cannot be fused')
            continue
        expected_place = expected.pop(parts[:2], None)
        if expected_place is None:
            foreign.append(key)
            continue
        to, offset, shape = expected_place
        fault = _fault(entry, shape, 0 if parts[1].endswith('A') else 1)
        if fault is not None:
            faults.append(f'{printable(key)} {fault}')
        elif tuple(entry.shape) != tuple(shape):
            problems.append(f'{printable(key)} is of shape {tuple(entry.shape)} in the file, but {tuple(shape)} in '
                            'this base model')
        placed.append(Placed(key, to, offset))
    if foreign:
        problems.append(f'{len(foreign)} tensors of the file have no place in this base model: {joined(foreign)}')
    if expected:
        missing = [f'{name}.{segment}' for name, segment in expected]
        problems.append(f'the file has no tensors for {len(missing)} of the parameters that its config asks for in '
                        f'this base model: {joined(missing)}')
    if faults:
        raise ValueError(f'{stored.checkpoint}: {stored.checkpoint.weights_file} cannot be used: '
                         f'{"; ".join(faults[:5])}{"; ..." if len(faults) > 5 else ""}. Save the adapter again.')
    if problems:
        raise ValueError(f'{stored.checkpoint} does not fit this base model: {"; ".join(problems[:5])}'
                         f'{"; ..." if len(problems) > 5 else ""}.')
    return Reading(stored.header, placed), base_keys


def _check_one_adapter(stored: StoredAdapter) -> None:
    """Raises ValueError where a file holds the tensors of several adapters for one layer."""
    names: Dict[Tuple[str, str], str] = {}
    for key in stored.header.entries:
        parts = split_key(key)
        if parts is not None and names.setdefault(parts[:2], parts[2]) != parts[2]:
            raise ValueError(f'{stored.checkpoint}: {stored.checkpoint.weights_file} is expected to hold one adapter, '
                             f'found tensors of {short_repr(names[parts[:2]])} and of {short_repr(parts[2])}: save one '
                             'of them alone.')


def _fault(entry: Entry, shape: torch.Size, side: int) -> Optional[str]:
    """Returns what is wrong with a tensor in any base model, or None.

    Args:
        entry: The tensor.
        shape: The shape that it has by the config.
        side: The dimension that is the rank.
    """
    if math.prod(entry.shape) == 0 and shape.numel():
        return (f'is empty, of shape {tuple(entry.shape)}: it was saved without being gathered, as by DeepSpeed ZeRO-3 '
                'without `stage3_gather_16bit_weights_on_model_save`')
    others = [sizes[:side] + sizes[side + 1:] for sizes in (tuple(entry.shape), tuple(shape))]
    if others[0] == others[1] and entry.shape[side] != shape[side]:
        return f'is of rank {entry.shape[side]}, but of rank {shape[side]} by {CONFIG_NAME}'
    if entry.dtype not in SIZES:
        return f'is of dtype {entry.dtype}, expected one of {joined(list(SIZES))}'
    return None


def _check_base_weight(adapters: Adapters, stored: StoredAdapter, key: str, module_name: str) -> None:
    """Raises ValueError where a base weight that PEFT saved with an adapter is not that of the model."""
    name = module_name.removesuffix('.base_layer')
    place = adapters.view.index.order.get(name)
    weight = None if place is None else getattr(base_of(adapters.view.modules[place]), 'weight', None)
    entry = stored.header.entries[key]
    told = f'{stored.checkpoint} holds base weights of its own, {key}, which cannot be fused'
    if weight is None or tuple(weight.shape) != tuple(entry.shape) or entry.dtype not in SIZES:
        raise ValueError(f'{told}: {tuple(entry.shape)} in the file, '
                         f'{None if weight is None else tuple(weight.shape)} in this base model.')
    if weight.is_meta:
        raise ValueError(f'{told}: those of this base model are offloaded, where they cannot be compared. Load it '
                         'without offloading, or save the adapter with `save_embedding_layers=False`.')
    flat = weight.detach().reshape(-1)
    for begin in range(0, len(flat), _COMPARED):
        part = flat[begin:begin + _COMPARED]
        value = values_of(stored, key, begin, begin + len(part))
        if not torch.equal(value.to(part), part):
            raise ValueError(f'{told}: they are not those of this base model. Were its embeddings trained, or its '
                             'vocabulary resized?')
