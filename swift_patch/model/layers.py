"""One LoRA layer of PEFT or ms-swift: where it keeps what belongs to an adapter."""
from operator import attrgetter, itemgetter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from ..lora.factors import Factors

# Keyed by adapter name in every LoRA layer, besides those that `adapter_layer_names` and `other_param_names` list.
_MORE_CONTAINERS = ('use_rslora', 'use_dora', 'lora_bias', 'lora_variant')

_active_of, _scaling_of = attrgetter('_active_adapter'), attrgetter('scaling')

# One `ModuleDict` of a LoRA layer, keyed by adapter: the layer, the attribute, and the modules as they are now.
Holder = Tuple[LoraLayer, str, Dict[str, nn.Module]]


def adapter_modules(layers: Iterable[LoraLayer]) -> List[Holder]:
    """Returns every `ModuleDict` of some layers that is keyed by adapter."""
    # Without a call: each switch asks all layers for this.
    return [(layer, name, children[name]._modules) for layer in layers if (children := layer._modules)
            for name in layer.adapter_layer_names if name in children and children[name].__class__ is nn.ModuleDict]


def adapter_containers(layer: LoraLayer) -> Dict[str, Any]:
    """Returns by attribute every container of `layer` that is keyed by adapter: parameters, rank, scaling, flags."""
    names = dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names, *_MORE_CONTAINERS))
    containers = {name: getattr(layer, name, None) for name in names}
    return {name: container for name, container in containers.items() if hasattr(container, 'keys')}


def factors_of(layer: LoraLayer, adapter: str) -> Optional[Factors]:
    """Returns the parameters of `adapter` in `layer`, or None where the adapter does not target this layer."""
    # Past `Module.__getattr__`, which is most of the time here.
    children = layer._modules
    module = children['lora_A']._modules.get(adapter)
    if module is not None:
        return Factors(module.weight, children['lora_B']._modules[adapter].weight)
    if adapter in layer.lora_embedding_A:
        return Factors(layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter])
    return None


def parameters_of(layer: LoraLayer, adapter: str) -> Iterator[nn.Parameter]:
    """Yields all parameters of `adapter` in `layer`: A and B, and a bias or a magnitude where it has one."""
    for container in adapter_containers(layer).values():
        value = container[adapter] if adapter in container else None
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, nn.Parameter):
            yield value


def has_adapter(layer: LoraLayer, adapter: str) -> bool:
    """Returns whether `adapter` targets this layer."""
    children = layer._modules
    return adapter in children['lora_A']._modules or adapter in children['lora_embedding_A']._parameters


def is_active_alone(layers: Sequence[LoraLayer], adapter: str) -> bool:
    """Returns whether `adapter`, and no other, is active in each layer."""
    # What the property `active_adapters` reads. In C, for this is asked for every sample.
    active = list(map(_active_of, layers))
    return active == [[adapter]] * len(active) or all(value in (adapter, [adapter]) for value in active)


def scalings_of(layers: Sequence[LoraLayer], adapter: str) -> List[float]:
    """Returns the scaling of `adapter` in each layer. PEFT keeps it in a tensor where adapters are hot-swapped."""
    scalings = list(map(itemgetter(adapter), map(_scaling_of, layers)))
    return scalings if set(map(type, scalings)) == {float} else list(map(float, scalings))


def base_of(layer: nn.Module) -> nn.Module:
    """Returns the layer that LoRA layers wrap, however many; a layer that none wraps as it is."""
    while isinstance(layer, LoraLayer):
        layer = layer.base_layer
    return layer


def groups_of(layer: nn.Module) -> int:
    """Returns the groups of a convolution, which part the rank too; 1 for any other layer."""
    return getattr(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer, 'groups', 1)


def is_transposed(layer: LoraLayer) -> bool:
    """Returns whether the base layer keeps its weight as (in_features, out_features)."""
    return bool(getattr(layer, 'fan_in_fan_out', False)) or len(layer.lora_embedding_A) > 0


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor keeps its values in tensors of its own, as a DTensor does: it has no memory itself."""
    return type(tensor) is not nn.Parameter and is_traceable_wrapper_subclass(tensor)


def is_kept_elsewhere(layer: LoraLayer, adapter: str) -> bool:
    """Returns whether FSDP or ZeRO-3 keeps the values of `adapter` in `layer`, whatever the layer itself has now.

    What is written to a parameter that they gathered is lost when it is sharded again.
    """
    modules = [layer._modules[side]._modules.get(adapter) for side in ('lora_A', 'lora_B')]
    if None in modules:
        modules = [layer.lora_embedding_A, layer.lora_embedding_B]
    return any(map(_is_kept_elsewhere, modules, factors_of(layer, adapter) or ()))


def _is_kept_elsewhere(module: Any, tensor: Tensor) -> bool:
    # What FSDP1 flattened, and what ZeRO-3 partitions, is marked.
    if getattr(tensor, '_fsdp_flattened', False) or hasattr(tensor, 'ds_id'):
        return True
    # Where FSDP1 has one parameter for all, it leaves views that are no parameters.
    if not isinstance(tensor, nn.Parameter) and getattr(module, '_is_fsdp_managed_module', False):
        return True
    # FSDP2 has the module of each of its parameters tell it when values are loaded. It may be wrapped around what holds
    # the model, so that its own state is not to be found from here.
    hooks = module._load_state_dict_post_hooks.values()
    return any('fsdp' in str(getattr(hook, '__module__', '')).split('.') for hook in hooks)
