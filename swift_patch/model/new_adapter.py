"""What a new adapter would be: the config that PEFT would make, and the layers that PEFT would put it in.

Only PEFT (or ms-swift's edition of it) knows the latter: target modules, regular expressions, layers to transform,
excluded and tied modules, layers inside LoRA layers. So it is asked: it injects the adapter into a copy of the tree of
modules that has no values.
"""
import copy
import math
import torch
import warnings
from dataclasses import fields, replace
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from typing import Any, Dict, FrozenSet, Optional, Sequence, Set, Tuple, Union

from ..errors import short_repr
from ..lora.changes_base import changes_base
from .adapters import Adapters
from .layers import adapter_containers, factors_of, groups_of, has_adapter
from .memory import NewAdapter
from .offload import device_of
from .undo import Tree, Undo, copied_containers

# The name of the adapter in a copy.
NEW_NAME = 'new'
# What makes a LoRA layer compute something else, or PEFT do something besides: it matters to no layer's being one.
_PLAIN: Dict[str, Any] = {
    'init_lora_weights': False,
    'use_dora': False,
    'use_qalora': False,
    'alora_invocation_tokens': None,
    'arrow_config': None,
    'trainable_token_indices': None,
    'eva_config': None,
    'corda_config': None,
    'loftq_config': {},
    'lora_ga_config': None,
    'rank_pattern': {},
    'alpha_pattern': {},
    'megatron_config': None,
    # These say nothing of layers.
    'inference_mode': False,
    'base_model_name_or_path': None,
    'revision': None,
    'lora_dropout': 0.0,
    'lora_alpha': 1,
}


def new_adapter(adapters: Adapters, sources: Sequence[str], configs: Sequence[LoraConfig], combination_type: str,
                rank: int) -> NewAdapter:
    """Returns what a new adapter would be that is merged from these sources.

    Args:
        adapters: the adapters of the model.
        sources: the names of the sources, all of them LoRAs.
        configs: the config of each.
        combination_type: how they are merged.
        rank: the rank of the new adapter.

    Raises:
        ValueError: PEFT would make none.
    """
    key = (_settings(configs[0]), *(_hashable(config.target_modules)
                                    for config in configs[1:]), combination_type == 'average', rank)
    found: Optional[NewAdapter] = adapters.memory.known(key)
    if found is None:
        config = _config(configs, sources, combination_type, rank)
        found = adapters.memory.remember_new(key, NewAdapter(config, _layers(adapters, sources, config)))
    return found


def injecting_tuner(adapters: Adapters, model: nn.Module) -> LoraModel:
    """Returns a tuner that injects adapters into `model`, the model of `adapters` or a copy of its tree.

    Its dicts and lists are its own: what is injected does not get into those of the tuner.
    """
    tuner = adapters.tuner
    if isinstance(tuner, LoraModel):
        found: Any = object.__new__(type(tuner))
        found.__dict__ = dict(tuner.__dict__, _modules={**tuner._modules, 'model': model})
        found.active_adapter = copy.copy(tuner.active_adapter)
    else:
        # Only ms-swift has other tuners; PEFT alone shall not need it.
        from swift.tuners.lora_layers import LoraModel as SwiftLoraModel
        found = SwiftLoraModel(model, None, '')
        found.active_adapter = {
            name
            for name in tuner.active_adapters if isinstance(adapters.configs.get(name), LoraConfig)
        }
    found.peft_config = dict(adapters.configs)
    found.targeted_module_names = []
    found.targeted_parameter_names = []
    return found


def _config(configs: Sequence[LoraConfig], sources: Sequence[str], combination_type: str, rank: int) -> LoraConfig:
    """Returns the config of a new adapter merged from adapters of these configs, as PEFT makes it."""
    targets = [config.target_modules for config in configs]
    if len({isinstance(target, str) for target in targets}) > 1:
        raise ValueError('The target modules of the adapters are expected to be all regular expressions or all lists, '
                         f'found {short_repr(targets)}.')
    target_modules: Union[str, Set[str]]
    if isinstance(targets[0], str):
        target_modules = '|'.join(f'({target})' for target in targets)
    else:
        target_modules = set().union(*targets)
    if getattr(configs[0], 'layer_replication', None):
        raise ValueError(f'Adapter {sources[0]!r} is expected to have no layer_replication, found '
                         f'{short_repr(configs[0].layer_replication)}: a new adapter would replicate the layers of '
                         'the base model once more. Name another adapter first.')
    changes: Dict[str, Any] = {'r': rank, 'lora_alpha': rank, 'alpha_pattern': {}, 'rank_pattern': {}}
    if combination_type == 'average':
        # The scaling is the sources', however they came by it.
        changes['use_rslora'] = False
    if changes_base(configs[0].init_lora_weights):
        # Unlike PEFT, which changes the base weights again for an adapter whose values are then overwritten.
        changes['init_lora_weights'] = True
    return replace(configs[0], target_modules=target_modules, **changes)


def remember_layers(adapters: Adapters, config: LoraConfig, layers: 'frozenset[str]') -> None:
    """Remembers that PEFT put an adapter of this config into these layers of a copy."""
    adapters.memory.remember_new(_settings(_plain(adapters, config)), layers)


def _plain(adapters: Adapters, config: LoraConfig) -> LoraConfig:
    """Returns a copy of a config that says no more than which layers an adapter is in."""
    plain = {name: value for name, value in _PLAIN.items() if hasattr(config, name)}
    # Of a rank that every layer can have: a fused adapter has the next larger one then.
    plain['r'] = math.lcm(*(groups_of(layer) for _, layer in adapters.layers),
                          *(module.groups for _, module in adapters.view.of_type(_ConvNd)))
    return replace(copy.deepcopy(config), **plain)


def _layers(adapters: Adapters, sources: Sequence[str], config: LoraConfig) -> 'frozenset[str]':
    """Returns the names of the layers that PEFT would put an adapter of this config in."""
    plain_config = _plain(adapters, config)
    # The rank, and how many sources there are, make no other layers.
    key = _settings(plain_config)
    known: Optional[FrozenSet[str]] = adapters.memory.known(key)
    if known is not None:
        return known
    try:
        layers = injected_copy(adapters, plain_config)
    except ValueError as e:
        raise ValueError(f'PEFT is expected to make a new adapter from {short_repr(list(sources))}, but does not: '
                         f'{e}') from e
    return adapters.memory.remember_new(key, frozenset(layers))


def injected_copy(adapters: Adapters, config: LoraConfig) -> Dict[str, LoraLayer]:
    """Returns the layers, by name, that an adapter would be in: copies without values, with that adapter alone.

    Args:
        adapters: the adapters of the model.
        config: the config of the adapter, `NEW_NAME` in the copies. PEFT changes it as it changes that of an adapter.

    Raises:
        ValueError: PEFT makes none.
    """
    model = _without_values(adapters.model)
    tuner = injecting_tuner(adapters, model)
    tuner.peft_config[NEW_NAME] = config
    # PEFT warns again when the adapter is made, if it is; and nobody's random numbers change.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device('meta'):
        warnings.simplefilter('ignore')
        tuner.inject_adapter(model, NEW_NAME)
    layers = {
        name: layer
        for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and has_adapter(layer, NEW_NAME)
    }
    if getattr(config, 'lora_dtype', None) is None:
        for layer in layers.values():
            _take_dtype_of_base(layer, NEW_NAME)
    if isinstance(adapters.tuner, LoraModel):
        # As where PEFT loads an adapter.
        tuner._cast_adapter_dtype(NEW_NAME, autocast_adapter_dtype=True)
    return layers


def inject(adapters: Adapters, name: str, config: LoraConfig, undo: Undo) -> Adapters:
    """Has PEFT, or ms-swift, put an adapter into the layers that a config names, and returns the adapters then.

    Args:
        adapters: the adapters of the model.
        name: the name of the adapter.
        config: the config. Whose it is stays as it is.
        undo: takes what undoes it.
    """
    tree = Tree(adapters.tuner)
    undo.callback(tree.restore)
    injecting = injecting_tuner(adapters, adapters.model)
    injecting.peft_config[name] = config
    # PEFT changes what needs a gradient, which inference tensors allow in their own mode alone.
    with torch.inference_mode(any(parameter.is_inference() for parameter in adapters.model.parameters())):
        injecting.inject_adapter(adapters.model, name)
        adapters = Adapters.of(adapters.tuner, adapters.library)
        for layer_name, layer in adapters.layers:
            pair = factors_of(layer, name)
            if pair is not None and tree.is_new(pair.A):
                _place(layer, name, config, device_of(adapters.view, layer_name))
        for parameter in adapters.model.parameters():
            if tree.is_new(parameter):
                parameter.requires_grad = False
    return adapters


def _place(layer: LoraLayer, adapter: str, config: LoraConfig, device: Optional[torch.device]) -> None:
    """Puts an adapter that was injected just now where its layer computes.

    PEFT puts it on the meta device where the base layer is offloaded, and leaves it on the CPU, in PyTorch's default
    dtype, where another adapter of the layer is offloaded.

    Args:
        layer: the layer.
        adapter: the name of the adapter. It holds zeros where it was on the meta device.
        config: its config.
        device: what `device_of` returns of the layer.

    Raises:
        ValueError: it has values on the meta device that come from the base layer's.
    """
    is_beside_offloaded = False
    for kind, container in adapter_containers(layer).items():
        value = container[adapter] if adapter in container else None
        if isinstance(value, nn.Parameter):
            container[adapter] = _placed(value, device)
        elif isinstance(value, nn.Module):
            for key, parameter in list(value.named_parameters(recurse=False)):
                if parameter.is_meta and kind not in ('lora_A', 'lora_B'):
                    raise ValueError(
                        f'Adapter {adapter!r} is expected to be a plain LoRA where base layers are offloaded, found '
                        f'that it has {kind}, which is made of the weights of one: load the model without offloading.')
                setattr(value, key, _placed(parameter, device))
        if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
            is_beside_offloaded |= any(parameter.is_meta for parameter in container.parameters())
    if is_beside_offloaded and getattr(config, 'lora_dtype', None) is None:
        _take_dtype_of_base(layer, adapter)


def _placed(parameter: nn.Parameter, device: Optional[torch.device]) -> nn.Parameter:
    if parameter.is_meta:
        return nn.Parameter(torch.zeros_like(parameter, device=device or 'cpu'), requires_grad=False)
    if device is None or parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device), requires_grad=False)


def _take_dtype_of_base(layer: LoraLayer, adapter: str) -> None:
    """Gives the factors of an adapter the dtype of the base layer, where PEFT does not."""
    base = layer.get_base_layer()
    if isinstance(base, nn.MultiheadAttention):
        base = base.out_proj
    weight, pair = getattr(base, 'weight', None), factors_of(layer, adapter)
    # Not that of a quantized weight.
    if isinstance(weight, Tensor) and weight.is_floating_point():
        for factor in pair or ():
            factor.data = factor.data.to(weight.dtype)


def nothing_to_merge(layer_name: str, sources: Sequence[str]) -> ValueError:
    """Returns the error for a layer that a new adapter would have, but none of the sources."""
    return ValueError(
        f'Adapters {short_repr(list(sources))} are expected to have layer {layer_name!r}, which a new adapter would '
        f'have, but none does: it would have all target modules, and the other settings of {sources[0]!r}. Name '
        'another adapter first.')


def _without_values(model: nn.Module) -> nn.Module:
    """Returns a copy of the tree of a model: its parameters and buffers on the meta device, no adapter in its layers.

    Containers are copies, so that whatever is done to the tree is not done to the model. Everything else is shared.
    """
    modules: Dict[nn.Module, nn.Module] = {}
    tensors: Dict[Tensor, Tensor] = {}

    def of_tensor(tensor: Optional[Tensor]) -> Optional[Tensor]:
        if tensor is None:
            return None
        if tensor not in tensors:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[tensor] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        return tensors[tensor]

    def of_module(module: Optional[nn.Module]) -> Optional[nn.Module]:
        if module is None:
            return None
        if module in modules:
            return modules[module]
        # Not by a `__new__` of its class: that of FSDP2's classes makes a module of another class.
        new = modules[module] = object.__new__(type(module))
        # By type, not by name: torch, PEFT and ms-swift keep what belongs to an adapter in dicts.
        state = {name: copied_containers(value) for name, value in module.__dict__.items()}
        new.__dict__ = state
        state['_parameters'] = {name: of_tensor(value) for name, value in module._parameters.items()}
        state['_buffers'] = {name: of_tensor(value) for name, value in module._buffers.items()}
        is_lora = isinstance(module, LoraLayer)
        state['_modules'] = {
            # What a LoRA layer keys by adapter.
            name: type(child)() if is_lora and isinstance(child,
                                                          (nn.ModuleDict, nn.ParameterDict)) else of_module(child)
            for name, child in module._modules.items()
        }
        return new

    copied = of_module(model)
    assert copied is not None
    return copied


def _settings(config: LoraConfig) -> Tuple[Any, ...]:
    """Returns all settings of a config, to be compared by value."""
    return tuple(_hashable(getattr(config, item.name)) for item in fields(config))


def _hashable(value: Any) -> Any:
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    return repr(value)
