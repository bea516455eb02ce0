"""Giving a fused adapter a larger rank, or layers that it lacks."""
import copy
import logging
import math
import statistics
import torch
from contextlib import ExitStack
from peft.tuners.lora import LoraConfig, LoraLayer
from torch import nn
from typing import Any, Mapping

from .adapters import Adapters
from .lora_index import Factors, adapter_containers, factors, groups, padded

logger = logging.getLogger(__name__)

_DESCRIBED = ('r', 'lora_alpha', 'alpha_pattern', 'rank_pattern', 'target_modules', 'layers_to_transform',
              'layers_pattern', 'exclude_modules')


def grow(adapters: Adapters, name: str, rank: int, lacking: Mapping[str, str], undo: ExitStack) -> None:
    """Makes sure that a fused adapter has a rank and certain layers. What it computes stays the same.

    Where something is lacking, its parameters become new objects, which is logged.

    Args:
        adapters: the adapters of the model.
        name: the fused adapter.
        rank: the rank that it shall have at least.
        lacking: the layers that it shall have besides, each with an adapter to make it like.
        undo: takes what undoes it.
    """
    layout, config = adapters.blocks(name).layout, adapters.configs[name]
    old_rank = max(A[0] for A, _ in layout.shapes)
    if rank <= old_rank and not lacking:
        return
    layers = dict(adapters.layers())
    slots = {layer_name: factors(layer, name) for layer_name, layer in layers.items()}
    old = {layer_name: slot for layer_name, slot in slots.items() if slot is not None}
    # One rank for all layers, as the config has it, and in every layer it must be divisible by the groups.
    multiple = math.lcm(*(groups(layers[layer_name]) for layer_name in (*old, *lacking)))
    rank = math.ceil(max(rank, old_rank) / multiple) * multiple
    logger.warning(
        f'Adapter {name!r} grows, rank {old_rank} -> {rank}, layers {len(old)} -> {len(old) + len(lacking)}: '
        'its parameters there are new objects, which compiled or captured graphs do not know.')
    for layer_name, slot in old.items():
        if slot.A.shape[0] < rank:
            _install(layers[layer_name], name, name, rank, undo)
    scaling = layers[next(iter(old))].scaling[name]
    for layer_name, like in lacking.items():
        layer = layers[layer_name]
        _install(layer, name, like, rank, undo)
        layer.scaling[name], layer.use_rslora[name], layer.use_dora[name] = scaling, config.use_rslora, False
    for attribute in _DESCRIBED:
        undo.callback(setattr, config, attribute, getattr(config, attribute, None))
    if lacking:
        config.target_modules = {*old, *lacking}
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    describe(adapters, name, config, rank)
    adapters.changed(name)
    if rank > old_rank:
        # All parameters are new objects now.
        adapters.pack(name, undo)


def describe(adapters: Adapters, name: str, config: LoraConfig, rank: int) -> None:
    """Makes `config` say the rank and the scalings that the adapter `name` has, so that it can be saved and loaded."""
    layers = {layer_name: layer for layer_name, layer in adapters.layers() if factors(layer, name)}
    root = math.sqrt(rank) if config.use_rslora else rank
    for layer in layers.values():
        # Whole numbers are what people write, and what rounding nearly gives back.
        alpha = layer.scaling[name] * root
        layer.lora_alpha[name] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    alphas = {layer_name: layer.lora_alpha[name] for layer_name, layer in layers.items()}
    config.r, config.rank_pattern = rank, {}
    config.lora_alpha = statistics.mode(alphas.values())
    config.alpha_pattern = {layer_name: alpha for layer_name, alpha in alphas.items() if alpha != config.lora_alpha}


def _install(layer: LoraLayer, name: str, like: str, rank: int, undo: ExitStack) -> None:
    """Puts parameters of rank `rank` for `name` into `layer`, in all else as adapter `like` has it there.

    They hold what they held, filled up with zeros; only zeros where `like` is another adapter.
    """
    is_new = like != name
    for kind, container in adapter_containers(layer).items():
        if like in container and not (is_new and kind in ('lora_variant', 'lora_magnitude_vector')):
            old = container[name] if name in container else None
            undo.callback(_restore, container, name, old)
            container[name] = copy.deepcopy(container[like])
    slot = factors(layer, name)
    assert slot is not None  # It was copied just now.
    new = Factors(
        slot.A.new_zeros((rank, *slot.A.shape[1:])),
        slot.B.new_zeros((slot.B.shape[0], rank // groups(layer), *slot.B.shape[2:])))
    if not is_new:
        new = padded(layer, slot, new)
    A, B = (nn.Parameter(value, requires_grad=slot.A.requires_grad and not is_new) for value in new)
    if name in layer.lora_embedding_A:
        layer.lora_embedding_A[name], layer.lora_embedding_B[name] = A, B
    else:
        module_A, module_B = layer.lora_A[name], layer.lora_B[name]
        module_A.weight, module_B.weight = A, B
        is_linear = isinstance(module_A, nn.Linear)
        setattr(module_A, 'out_features' if is_linear else 'out_channels', rank)
        setattr(module_B, 'in_features' if is_linear else 'in_channels', rank)
        if is_new and module_B.bias is not None:
            module_B.bias = nn.Parameter(torch.zeros_like(module_B.bias), requires_grad=False)
    layer.r[name] = rank


def _restore(container: Any, name: str, value: Any) -> None:
    if value is not None:
        container[name] = value
    elif name in container:
        del container[name]
