"""Where the LoRA layers of a model are.

A model with M adapters holds three more modules per adapter in every LoRA layer, so that a walk through
`model.modules()` grows with M and N. The index walks past the adapters, once, and afterwards only compares the
children of every module with those that it saw: whatever is added, removed, replaced or renamed is noticed. It holds
no module: everything is referred to weakly.
"""
import weakref
from functools import cached_property
from itertools import chain
from operator import attrgetter, itemgetter
from peft.tuners.lora import LoraLayer
from torch import nn
from typing import Any, Dict, Iterator, List, Optional, Tuple

_modules_of, _base_layer_of = attrgetter('_modules'), itemgetter('base_layer')


class LoraIndex:
    """The modules of one model without those inside its adapters, in the order of `named_modules`.

    Args:
        model: the model.

    Attributes:
        names: the modules' names.
    """

    def __init__(self, model: nn.Module):
        modules: Dict[nn.Module, int] = {}
        self.names: List[str] = []
        # In the order of a walk, the modules whose children were all walked: their places, their children's names and
        # places. LoRA layers have one child that is walked, the base layer: all others are the adapters.
        self._parents: List[int] = []
        self._counts: List[int] = []
        self._child_names: List[str] = []
        self._children: List[int] = []
        self._lora_layers: List[int] = []
        self._base_layers: List[int] = []
        self._places: Dict[Tuple[type, ...], List[int]] = {}
        # The place of a child that is None.
        none = -1
        stack = [('', model)]
        edges: List[Tuple[int, List[Tuple[str, Optional[nn.Module]]], bool]] = []
        while stack:
            name, module = stack.pop()
            if module in modules:
                continue
            modules[module] = len(modules)
            self.names.append(name)
            is_lora = isinstance(module, LoraLayer)
            children = [('base_layer', module._modules.get('base_layer'))] if is_lora else list(module._modules.items())
            edges.append((modules[module], children, is_lora))
            stack.extend((f'{name}.{child_name}' if name else child_name, child)
                         for child_name, child in reversed(children) if child is not None)
        for place, children, is_lora in edges:
            places = [none if child is None else modules[child] for _, child in children]
            if is_lora:
                self._lora_layers.append(place)
                self._base_layers += places
            else:
                self._parents.append(place)
                self._counts.append(len(children))
                self._child_names += [child_name for child_name, _ in children]
                self._children += places
        self._refs = [weakref.ref(module) for module in modules]

    def look(self, model: nn.Module) -> Optional['View']:
        """Returns the modules as they are now, or None where they are not those that were walked."""
        modules: List[Optional[nn.Module]] = [ref() for ref in self._refs]
        if modules[0] is not model:
            return None
        get = modules.__getitem__
        try:
            children = list(map(_modules_of, map(get, self._parents)))
            base_layers = list(map(_base_layer_of, map(_modules_of, map(get, self._lora_layers))))
        except (AttributeError, KeyError):  # one is gone
            return None
        # The place -1 is that of None.
        modules.append(None)
        # Modules compare by identity. All of this is done in C, for it is done for every sample.
        is_same = (
            list(map(len, children)) == self._counts and list(chain.from_iterable(children)) == self._child_names
            and list(chain.from_iterable(map(dict.values, children))) == list(map(get, self._children))
            and base_layers == list(map(get, self._base_layers)))
        if not is_same:
            return None
        modules.pop()
        return View(self, modules)

    @cached_property
    def order(self) -> Dict[str, int]:
        """The place of each module, by name."""
        return {name: place for place, name in enumerate(self.names)}

    def places(self, classes: Tuple[type, ...], modules: List[Any]) -> List[int]:
        """Returns the places of the modules that are instances of one of `classes`."""
        found = self._places.get(classes)
        if found is None:
            found = self._places[classes] = [i for i, module in enumerate(modules) if isinstance(module, classes)]
        return found


class View:
    """The modules of a model, for the time of one call.

    Attributes:
        index: the index that it was made with.
        modules: the modules, in the order of `index.names`.
        layers: `(name, layer)` of every LoRA layer.
    """

    def __init__(self, index: LoraIndex, modules: List[Any]):
        self.index, self.modules = index, modules
        self.layers: List[Tuple[str, LoraLayer]] = self.of_type(LoraLayer)

    @cached_property
    def adapter_modules(self) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
        """By LoRA layer, the modules of all adapters that hold A, and those that hold B, by adapter."""
        children = [layer._modules for _, layer in self.layers]
        A, B = (list(map(_modules_of, map(itemgetter(side), children))) for side in ('lora_A', 'lora_B'))
        return A, B

    def of_type(self, *classes: type) -> List[Tuple[str, Any]]:
        """Returns `(name, module)` of every module that is an instance of one of `classes`."""
        names, modules = self.index.names, self.modules
        return [(names[place], modules[place]) for place in self.index.places(classes, modules)]

    def instances(self, *classes: type) -> Iterator[Any]:
        """Returns every module that is an instance of one of `classes`."""
        return map(self.modules.__getitem__, self.index.places(classes, self.modules))
