"""Which adapters are active, on which device they are: touch only what differs.

Two walks through the whole model for every adapter that was ever added would take longer with each. These functions
look at each LoRA layer once per call, ask it what is active in the calling thread (the layers are the truth, not
`SwiftModel.active_adapters`), and change what is not as wanted.
"""
import threading
from contextlib import contextmanager
from operator import attrgetter
from swift.tuners.lora import LoRA
from swift.tuners.lora_layers import LoRAActivationMixin, LoraLayer, LoRALayer
from swift.tuners.mapping import SWIFT_MAPPING
from swift.tuners.utils import ModulesToSaveWrapper, OffloadHelper, SwiftAdapter
from swift.utils import gc_collect
from torch import nn
from typing import AbstractSet, Any, Dict, Iterable, Iterator, List, Optional, Union

from ..errors import short_repr
from .adapters import Adapters
from .index import View
from .layers import Holder, adapter_modules
from .memory import Memory

# How deep this thread is in `collect_garbage_once`, and whether anything was moved inside.
_offloading = threading.local()


@contextmanager
def collect_garbage_once() -> Iterator[None]:
    """Within it, `offload_module` leaves the garbage; at its outermost end it is collected, if anything was moved."""
    depth = getattr(_offloading, 'depth', 0)
    if depth == 0:
        _offloading.moved = False
    _offloading.depth = depth + 1
    try:
        yield
    finally:
        _offloading.depth = depth
        if depth == 0 and _offloading.moved:
            gc_collect()


def offload_module(module: nn.Module, adapter_name: str, module_key: str, offload: Optional[str]) -> None:
    """Moves the parameters of `module` to the CPU or, through a file, to the meta device.

    Garbage is collected only where something was moved.

    Args:
        module: The module to move, its device is remembered in its attribute `origin_device`.
        adapter_name: With `module_key`, names the file for the meta device.
        module_key: The name of the module in the model.
        offload: `'cpu'`, `'meta'`, or None to do nothing.

    Raises:
        NotImplementedError: `offload` is none of these.
    """
    check_offload(offload)
    if not offload:
        return
    device = next(iter(module.parameters())).device
    if getattr(module, 'origin_device', str(device)) != str(device):
        return
    # Torch declares the attributes of modules to be tensors or modules.
    setattr(module, 'origin_device', str(device))
    if device.type == offload:
        return
    if offload == 'meta':
        if SwiftAdapter.offload_helper is None:
            SwiftAdapter.offload_helper = OffloadHelper()
        SwiftAdapter.offload_helper.offload_disk(module, adapter_name=adapter_name, module_key=module_key)
    module.to(offload)
    if getattr(_offloading, 'depth', 0):
        _offloading.moved = True
    else:
        gc_collect()


def check_offload(offload: Optional[str]) -> None:
    """Raises NotImplementedError, as stock, where `offload` is none of `'cpu'`, `'meta'` and None."""
    if offload and offload not in ('cpu', 'meta'):
        raise NotImplementedError(f"offload is expected to be 'cpu' or 'meta', found {short_repr(offload)}.")


def set_active_adapters(self: Any, adapter_names: Union[List[str], str], offload: Optional[str] = None) -> None:
    """Set activated adapters

    Activates what is not active and deactivates what is; the cost does not depend on how many adapters were added.

    Args:
        adapter_names(`Union[List[str], str]`): The adapters needed to be activated
        offload(`str`): Whether to offload the deactivated ones to `cpu` or `meta` device
    """
    if not adapter_names:
        adapter_names = []
    if isinstance(adapter_names, str):
        adapter_names = [adapter_names]
    _set_active(self, Memory.of(self.base_model).look(self.base_model), set(adapter_names), offload)


def activate_alone(adapters: Adapters, name: str) -> None:
    """Makes one adapter of a `SwiftModel` the only active one, as `set_active_adapters` does.

    Args:
        adapters: The adapters of the model, as they are now.
        name: The adapter.
    """
    _set_active(adapters.tuner, adapters.view, {name}, None)


def _set_active(model: Any, view: View, names: AbstractSet[str], offload: Optional[str]) -> None:
    active = set(names) & set(model.adapters)
    if active != set(model.adapters):
        check_offload(offload)
    loras = {name for name, output in model.adapters.items() if _is_lora(output.config)}
    with collect_garbage_once():
        # Other tuners keep their state each in a way of its own: only they know what differs.
        for name in active - loras:
            model.activate_adapter(name)
        for name in set(model.adapters) - active - loras:
            model.deactivate_adapter(name, offload)
        switch_adapters(view, active & loras, loras - active, offload)
    model.active_adapters = active


def activate_adapter(module: nn.Module, adapter_name: str, activate: bool, offload: Optional[str] = None) -> None:
    """Activates or deactivates one LoRA adapter in the calling thread.

    Args:
        module: The model.
        adapter_name: The adapter.
        activate: Whether to activate or to deactivate it.
        offload: Where to move the weights of a deactivated adapter: `'cpu'`, `'meta'` or None, to leave them.
    """
    view = Memory.of(module).look(module)
    with collect_garbage_once():
        if activate:
            switch_adapters(view, {adapter_name}, frozenset(), offload)
        else:
            switch_adapters(view, frozenset(), {adapter_name}, offload)


def switch_adapters(view: View, activate: AbstractSet[str], deactivate: AbstractSet[str],
                    offload: Optional[str]) -> None:
    """Makes the LoRA adapters `activate` active and `deactivate` inactive in the calling thread.

    Args:
        view: The modules of the model with the LoRA layers.
        activate: Adapters to activate; weights that were offloaded are loaded, in active layers too.
        deactivate: Adapters to deactivate, none of them in `activate`.
        offload: Where to move the weights of all of `deactivate`, also of those that are inactive already.
    """
    if deactivate:
        check_offload(offload)
    for wrapper in view.instances(ModulesToSaveWrapper):
        _switch_wrapper(wrapper, activate, deactivate, offload)
    this_thread = threading.get_ident()
    right: Optional[Dict[str, bool]] = None
    for layer in view.instances(LoraLayer, LoRALayer):
        # Not by the properties that say so: in a switch that changes nothing, this is what there is to do.
        thread = 0 if layer._unique_thread else this_thread
        states = layer._thread_inf.get(thread, {})
        # A layer in the state that the last one ended in needs no change.
        if states == right:
            continue
        for name in activate:
            if not states.get(name):
                layer.set_activation(name, True)
        for name in [name for name, is_active in states.items() if is_active and name in deactivate]:
            layer.set_activation(name, False)
        right = dict(layer._thread_inf.get(thread, {}))
    holders = adapter_modules(view.instances(LoRAActivationMixin))
    move_adapters(holders, activate, None)
    if offload:
        move_adapters(holders, deactivate, offload)


def move_adapters(holders: Iterable[Holder], adapters: Iterable[str], offload: Optional[str]) -> None:
    """Offloads the weights of `adapters` in some of ms-swift's LoRA layers, or loads them back where they were.

    Args:
        holders: What the layers keep their adapters in.
        adapters: The adapters; those that a layer does not have are passed over.
        offload: `'cpu'`, `'meta'`, or None to load.
    """
    # In as few steps as can be for each module: there are thousands, and mostly nothing to do for any.
    for adapter in adapters:
        if not offload:
            away = [(holder, module) for holder in holders
                    if (module := holder[2].get(adapter)) is not None and 'origin_device' in module.__dict__]
            for (layer, attribute, _), module in away:
                SwiftAdapter.load(module, f'{attribute}.{adapter}', layer.module_key)
            continue
        is_there = attrgetter(f'is_{offload}')
        here = [(holder, module) for holder in holders if (module := holder[2].get(adapter)) is not None
                and not ('origin_device' in (state := module.__dict__) and is_there(state['_parameters']['weight']))]
        for (layer, attribute, _), module in here:
            SwiftAdapter.offload(module, f'{attribute}.{adapter}', layer.module_key, offload=offload)


def _switch_wrapper(wrapper: ModulesToSaveWrapper, activate: Iterable[str], deactivate: Iterable[str],
                    offload: Optional[str]) -> None:
    for name in activate:
        wrapper.set_adapter(name)
    for name in deactivate:
        # Always, where the adapter has this module: the call also freezes it, and loads the original module.
        if name in wrapper.modules_to_save:
            wrapper.deactivate_adapter(name, offload)


def _is_lora(config: Any) -> bool:
    # By the function, not by the class: LongLoRA is switched by what it inherits from LoRA.
    return SWIFT_MAPPING[config.swift_type][1].activate_adapter is LoRA.activate_adapter
