"""The context in which a merge works on a model: plain tensors, and adapters where their values are."""
import torch
from contextlib import ExitStack, contextmanager
from typing import Iterator, Sequence, Set

from .adapters import Adapters
from .layers import adapter_modules, factors_of


@contextmanager
def plain_tensors(adapters: Adapters) -> Iterator[None]:
    """Within it, new tensors have the dtype that is asked for, need no gradient, and can be written to later."""
    # Not of all parameters, which are as many as there are adapters. A model is on the CPU, on one kind of accelerator,
    # or on both.
    layers = [layer for _, layer in (*adapters.layers[:1], *adapters.layers[-1:])]
    if layers:
        of_model = {next(layer.parameters()).device.type for layer in layers}
    else:
        # Once, for then it has some.
        of_model = {parameter.device.type for parameter in adapters.model.parameters()}
    devices = {'cpu', *of_model} - {'meta'}
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
                                     f'layer {layer_name!r}: load it first.')
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
