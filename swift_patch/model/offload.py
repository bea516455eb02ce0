"""Where layers and adapters have their values, and the context in which a merge works on a model."""
import torch
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Iterator, Optional, Sequence, Set

from .adapters import Adapters
from .index import View
from .layers import adapter_modules, base_of, factors_of


def device_of(view: View, name: str) -> Optional[torch.device]:
    """Returns the device that a layer computes on: that of its weights or, where they are offloaded, that of a hook.

    Accelerate keeps offloaded weights on the meta device, and has them elsewhere for the time of a forward.

    Args:
        view: the modules of the model.
        name: the name of the layer, which may be wrapped.

    Returns:
        The device; None where the layer has no values, and nothing says where it will have some.
    """
    modules, parts = view.modules, name.split('.')
    places = [view.index.order['.'.join(parts[:end])] for end in range(len(parts), -1, -1)]
    base = base_of(modules[places[0]])
    tensor = next((tensor for tensor in chain(base.parameters(), base.buffers()) if not tensor.is_meta), None)
    if tensor is not None:
        return tensor.device
    # The hook is the layer's own, or that of a module around it that loads whatever is in it.
    for module in (base, *map(modules.__getitem__, places)):
        hook = getattr(module, '_hf_hook', None)
        for one in getattr(hook, 'hooks', (hook, )):
            device = getattr(one, 'execution_device', None)
            if device is not None:
                return torch.device(device)
    return None


@contextmanager
def plain_tensors(adapters: Adapters) -> Iterator[None]:
    """Within it, new tensors have the dtype that is asked for, need no gradient, and can be written to later."""
    # Not of all parameters, which are as many as there are adapters. A model is on the CPU, on one kind of accelerator,
    # or on both.
    layers = [*adapters.layers[:1], *adapters.layers[-1:]]
    if layers:
        of_model = {device_of(adapters.view, name) for name, _ in layers}
    else:
        # Not by `parameters`, which takes longer than a merge.
        of_modules = (module._parameters.values() for module in adapters.view.modules)
        of_model = {parameter.device for parameter in chain.from_iterable(of_modules) if parameter is not None}
    devices = {'cpu', *(device.type for device in of_model if device is not None)} - {'meta'}
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        # Parameters that were made in inference mode could not be written to outside of it.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def on_device(adapters: Adapters, names: Sequence[str]) -> Iterator[Set[str]]:
    """Loads those of the adapters that were offloaded to the meta device, and puts them back at the end.

    Yields:
        Their names.

    Raises:
        ValueError: one is on the meta device, but was not offloaded.
    """
    offloaded = {name for name in names if adapters.factors(name).layout.is_meta}
    found = []
    for layer_name, layer in adapters.layers if offloaded else ():
        for name in offloaded:
            pair = factors_of(layer, name)
            if pair is not None and pair.A.is_meta:
                if name not in layer.lora_A or not hasattr(layer.lora_A[name], 'origin_device'):
                    raise ValueError(f'Adapter {name!r} is expected to have values, found it on the meta device in '
                                     f'layer {layer_name!r}: load it first, or compose it from a library.')
                found.append((layer, name))
    if not found:
        yield offloaded
        return
    # Only ms-swift offloads; PEFT alone shall not need it.
    from .activation import collect_garbage_once, move_adapters
    with collect_garbage_once(), ExitStack() as stack:
        for layer, name in found:
            holders = adapter_modules([layer])
            stack.callback(adapters.changed, name)
            stack.callback(move_adapters, holders, {name}, 'meta')
            move_adapters(holders, {name}, None)
        for name in offloaded:
            adapters.changed(name)
        yield offloaded
