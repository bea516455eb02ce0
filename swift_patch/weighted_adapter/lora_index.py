"""Where an adapter's A and B are in a model.

A model with M adapters holds three more modules per adapter in every LoRA layer, so walking `model.modules()` grows
with M and N. The index walks past the adapters, once, and afterwards only compares the children of every module with
those it saw: exact (whatever is added to, removed from or replaced in a module that has children is noticed) and far
cheaper than a walk.
"""
import math
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from typing import Any, Dict, List, Literal, NamedTuple, Optional, Set, Tuple

_ATTRIBUTE = '_lora_index'
# Keyed by adapter name in every LoRA layer, besides those that `adapter_layer_names` and `other_param_names` list.
_MORE_CONTAINERS = ('use_rslora', 'use_dora', 'lora_bias', 'lora_variant')


class Factors(NamedTuple):
    """The low-rank factors of one adapter in one LoRA layer: ΔW = scaling · B · A (Hu et al. 2021, LoRA).

    Attributes:
        A: shape (r, in_features); for a convolution (r, in_channels, *kernel), for an embedding (r, num_embeddings).
        B: shape (out_features, r); for a convolution (out_channels, r / groups, 1, ...), for an embedding
            (embedding_dim, r).
    """
    A: Tensor
    B: Tensor


# What factors are handed on as: those of one `layer`; the `matrices` of n layers of one shape, A (n, r, in_features)
# and B (n, out_features, r), the kernel of a convolution counted among the features; or the `elements` of any layers, A
# and B each in one row.
Form = Literal['layer', 'matrices', 'elements']


class LoraIndex:
    """The modules of one model without those inside its adapters, in the order of `named_modules`.

    It lives in the model's `__dict__` and dies with the model; a copied or pickled model gets none.

    Attributes:
        modules: `(name, module)` of every module but the adapters' own.
        layouts: what `packing` remembers of each adapter.
        spare: memory for values that are being overwritten, by device, see `Undo.reserve`.
    """

    def __init__(self, model: nn.Module):
        self.modules: List[Tuple[str, nn.Module]] = []
        # The dicts of children that were walked, and what they held then.
        self._children: List[Dict[str, Optional[nn.Module]]] = []
        self._seen: List[Dict[str, Optional[nn.Module]]] = []
        self._of_type: Dict[Any, List[Tuple[str, Any]]] = {}
        self._holders: Dict[Any, List['Holder']] = {}
        self.layouts: Dict[str, Any] = {}
        self.spare: Dict[torch.device, Tensor] = {}
        self._walk('', model, set())

    @classmethod
    def of(cls, model: nn.Module) -> 'LoraIndex':
        """Returns the index of `model`, walking it only where it is not the model that was walked before."""
        index = model.__dict__.get(_ATTRIBUTE)
        if not (isinstance(index, cls) and index._is_current(model)):
            # Straight into __dict__: a wrapper such as torch.compile's passes attributes on to what it wraps.
            index = model.__dict__[_ATTRIBUTE] = cls(model)
        return index

    def of_type(self, *classes: type) -> List[Tuple[str, Any]]:
        """Returns `(name, module)` of every module that is an instance of one of `classes`."""
        found = self._of_type.get(classes)
        if found is None:
            found = self._of_type[classes] = [item for item in self.modules if isinstance(item[1], classes)]
        return found

    def holders(self, *classes: type) -> List['Holder']:
        """Returns what the LoRA layers of these classes keep the modules of their adapters in."""
        found = self._holders.get(classes)
        if found is None:
            found = self._holders[classes] = [
                holder for _, layer in self.of_type(*classes) for holder in adapter_modules(layer)
            ]
        return found

    def layers(self) -> List[Tuple[str, LoraLayer]]:
        """Returns `(name, layer)` of every LoRA layer."""
        return self.of_type(LoraLayer)

    def __reduce__(self) -> Tuple[Any, ...]:
        # What is remembered of one model says nothing about its copy.
        return dict, ()

    def _is_current(self, model: nn.Module) -> bool:
        # Modules compare by identity: two dicts are equal only where they hold the very same modules.
        return self._children[0] is model._modules and self._children == self._seen

    def _walk(self, name: str, module: nn.Module, visited: Set[nn.Module]) -> None:
        visited.add(module)
        self.modules.append((name, module))
        children = module._modules
        if children or not name:
            self._children.append(children)
            self._seen.append(dict(children))
        for child_name, child in children.items():
            # A base layer may hold LoRA layers of its own (attention, experts); all other children are the adapters.
            is_adapters = isinstance(module, LoraLayer) and child_name != 'base_layer'
            if child is not None and child not in visited and not is_adapters:
                self._walk(f'{name}.{child_name}' if name else child_name, child, visited)


class Holder(NamedTuple):
    """One `ModuleDict` of a LoRA layer, keyed by adapter.

    Attributes:
        layer: the layer.
        attribute: its attribute.
        modules: the modules by adapter, as they are now.
    """
    layer: LoraLayer
    attribute: str
    modules: Dict[str, nn.Module]


def adapter_modules(layer: LoraLayer) -> List[Holder]:
    """Returns every `ModuleDict` of `layer` that is keyed by adapter."""
    children = {name: layer._modules.get(name) for name in layer.adapter_layer_names}
    return [Holder(layer, name, child._modules) for name, child in children.items() if isinstance(child, nn.ModuleDict)]


def adapter_containers(layer: LoraLayer) -> Dict[str, Any]:
    """Returns by attribute every container of `layer` that is keyed by adapter: parameters, rank, scaling, flags."""
    names = dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names, *_MORE_CONTAINERS))
    containers = {name: getattr(layer, name, None) for name in names}
    return {name: container for name, container in containers.items() if hasattr(container, 'keys')}


def factors(layer: LoraLayer, adapter: str) -> Optional[Factors]:
    """Returns the parameters of `adapter` in `layer`, or None where the adapter does not target this layer."""
    # Past `Module.__getattr__`, which is most of the time here, and this is most of the time of a small merge.
    children = layer._modules
    module = children['lora_A']._modules.get(adapter)
    if module is not None:
        return Factors(module.weight, children['lora_B']._modules[adapter].weight)
    if adapter in layer.lora_embedding_A:
        return Factors(layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])
    return None


def formed(stacked: Factors, form: Form) -> Factors:
    """Returns factors of n layers of one shape, n in front, in another form; of one layer where it is `layer`."""
    if form == 'layer':
        return Factors(stacked.A[0], stacked.B[0])
    if form == 'matrices':
        return Factors(stacked.A.flatten(2), stacked.B.flatten(2))
    return Factors(stacked.A.flatten(), stacked.B.flatten())


def groups(layer: LoraLayer) -> int:
    """Returns the groups of a convolution, which part the rank too; 1 for any other layer."""
    return getattr(layer.get_base_layer(), 'groups', 1)


def rescaled(pair: Factors, ratio: float, in_place: bool = False) -> Factors:
    """Returns `ratio` times the delta of `pair`, by A and B alike. Undone by the inverse."""
    if ratio == 1:
        return pair
    root = math.sqrt(abs(ratio))
    A, B = pair if in_place else (None, None)
    return Factors(torch.mul(pair.A, root, out=A), torch.mul(pair.B, math.copysign(root, ratio), out=B))


def padded(layer: LoraLayer, new: Factors, slot: Factors, stacked: int = 0) -> Factors:
    """Returns `new` with zeros up to the shape of `slot`, of larger rank: the same delta.

    Args:
        layer: the layer, or one of several that are alike.
        new: the factors.
        slot: factors of the rank that is wanted.
        stacked: how many dimensions there are before those of one layer's factors.
    """
    if new.A.shape == slot.A.shape:
        return new
    A, B, count = new.A.new_zeros(slot.A.shape), new.B.new_zeros(slot.B.shape), groups(layer)
    rank = new.B.shape[stacked + 1]
    A.unflatten(stacked, (count, -1)).narrow(stacked + 1, 0, rank).copy_(new.A.unflatten(stacked, (count, -1)))
    B.narrow(stacked + 1, 0, rank).copy_(new.B)
    return Factors(A, B)


def unpadded(layer: LoraLayer, slot: Factors, rank: int) -> Factors:
    """Returns the first `rank` of the rank of `slot`: undoes `padded`."""
    if rank >= slot.A.shape[0]:
        return slot
    rank //= groups(layer)
    return Factors(slot.A.unflatten(0, (groups(layer), -1))[:, :rank].flatten(0, 1), slot.B[:, :rank])
