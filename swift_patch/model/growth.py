"""Giving a fused adapter a larger rank, or layers that it lacks; and the config that says what it has."""
import copy
import logging
import math
import re
import statistics
import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from torch import nn
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Set

from ..lora.factors import Factors, padded
from .adapters import Adapters
from .layers import adapter_containers, factors_of, groups_of, scalings_of
from .new_adapter import inject
from .rows import conceal
from .undo import Undo

logger = logging.getLogger(__name__)

_DESCRIBED = ('r', 'lora_alpha', 'alpha_pattern', 'rank_pattern', 'target_modules', 'layers_to_transform',
              'layers_pattern', 'exclude_modules')


def grow(adapters: Adapters, name: str, rank: int, missing: Mapping[str, Optional[str]], undo: Undo) -> Adapters:
    """Makes sure that a fused adapter has a rank and certain layers. What it computes stays the same.

    Where something is missing, its parameters become new objects, which is logged, and a fusion for each row is lost.

    Args:
        adapters: the adapters of the model.
        name: the fused adapter.
        rank: the rank that it shall have at least.
        missing: the layers that it shall have besides, each with an adapter to make it like; None where PEFT makes it.
        undo: takes what undoes it.

    Returns:
        The adapters as they are then.
    """
    found, config = adapters.factors(name), adapters.configs[name]
    old_rank = found.layout.rank
    if rank <= old_rank and not missing:
        return adapters
    by_peft = [layer_name for layer_name, like in missing.items() if like is None]
    old = dict(zip(found.layout.names, found.layers))
    # One rank for all layers, as the config has it, and in every layer it must be divisible by the groups.
    modules = adapters.view.modules
    multiple = math.lcm(*(groups_of(modules[adapters.view.index.order[layer_name]]) for layer_name in (*old, *missing)))
    rank = math.ceil(max(rank, old_rank) / multiple) * multiple
    logger.warning(
        f'Adapter {name!r} grows, rank {old_rank} -> {rank}, layers {len(old)} -> {len(old) + len(missing)}: '
        'its parameters there are new objects, which compiled or captured graphs do not know.')
    conceal(adapters, name, undo)
    if by_peft:
        adapters = _injected(adapters, name, rank, by_peft, undo)
        found = adapters.factors(name)
    layers = dict(adapters.layers)
    for layer in old.values():
        target = factors_of(layer, name)
        if target is not None and target.A.shape[0] < rank:
            _install(layer, name, name, rank, undo)
    scaling = next(iter(old.values())).scaling[name]
    for layer_name, like in missing.items():
        layer = layers[layer_name]
        if like is not None:
            _install(layer, name, like, rank, undo)
        # Layers must not share a scaling tensor, since each is changed in place.
        layer.scaling[name] = scaling.clone() if isinstance(scaling, torch.Tensor) else scaling
        layer.use_rslora[name], layer.use_dora[name] = config.use_rslora, False
    for attribute in _DESCRIBED:
        undo.callback(setattr, config, attribute, getattr(config, attribute, None))
    if missing:
        config.target_modules = _targets({*old, *missing}, adapters.view.index.names,
                                         isinstance(config.target_modules, str))
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    adapters.changed(name)
    describe(adapters, name, config, rank)
    if rank > old_rank or by_peft:
        # All parameters are new objects now, or some are in other memory.
        adapters.pack(name, undo)
    return adapters


def describe(adapters: Adapters, name: str, config: LoraConfig, rank: int) -> None:
    """Makes `config` say the rank and the scalings that the adapter `name` has, so that it can be saved and loaded."""
    layers = {layer_name: layer for layer_name, layer in adapters.layers if factors_of(layer, name)}
    root = math.sqrt(rank) if config.use_rslora else rank
    alphas = {}
    for (layer_name, layer), scaling in zip(layers.items(), scalings_of(list(layers.values()), name)):
        # Whole numbers are what people write, and what rounding nearly gives back.
        alpha = scaling * root
        alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
        layer.lora_alpha[name] = alphas[layer_name] = alpha
    config.r, config.rank_pattern = rank, {}
    config.lora_alpha = statistics.mode(alphas.values())
    config.alpha_pattern = _pattern(alphas, config.lora_alpha)


def _injected(adapters: Adapters, name: str, rank: int, layer_names: Sequence[str], undo: Undo) -> Adapters:
    """Has PEFT put a fused adapter into layers that it lacks, where it holds zeros then."""
    config = copy.deepcopy(adapters.configs[name])
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.target_modules = _targets(set(layer_names), adapters.view.index.names, is_expression=False)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    dtype = adapters.factors(name).parameters[0].dtype
    adapters = inject(adapters, name, config, undo)
    layers = dict(adapters.layers)
    for layer_name in layer_names:
        target = factors_of(layers[layer_name], name) if layer_name in layers else None
        if target is None:
            raise ValueError(f'Layer {layer_name!r} is expected to take adapter {name!r}, but did not.')
        with torch.no_grad():
            for factor in target:
                factor.data = factor.data.to(dtype).zero_()
    return adapters


def _pattern(alphas: Mapping[str, float], common: float) -> Dict[str, float]:
    """Returns an `alpha_pattern` by which PEFT and ms-swift find the α of each layer, the common one aside.

    A key is a regular expression for the end of a layer's name: PEFT takes the first key that matches whole segments,
    ms-swift that or else the name itself. Where one layer's name ends with that of another, the longer name gets a key
    that matches it alone and comes first, also when the keys are sorted, as they are in a file.
    """
    plain = {name: alpha for name, alpha in alphas.items() if alpha != common}
    exact = {}
    for name in alphas:
        if any(end in plain for end in _ends(name)):
            parent, _, last = name.rpartition('.')
            exact[rf'(?<=^{re.escape(parent)}\.){re.escape(last)}'] = alphas[name]
            plain.pop(name, None)
    return {**exact, **plain}


def _targets(names: Set[str], modules: Iterable[str], is_expression: bool) -> Any:
    """Returns target modules that are these layers and no other of the modules.

    What was an expression stays one, for PEFT does not merge it with a list. A listed name stands for all modules whose
    names end with it: an expression is needed where there are others, too.
    """
    if is_expression or any(end in names for name in modules if name not in names for end in _ends(name)):
        return '|'.join(f'({re.escape(name)})' for name in sorted(names))
    return names


def _ends(name: str) -> Iterable[str]:
    """Yields the shorter names that a layer's name ends with: `b.c` and `c` of `a.b.c`."""
    while '.' in name:
        name = name.partition('.')[2]
        yield name


def _install(layer: LoraLayer, name: str, like: str, rank: int, undo: Undo) -> None:
    """Puts parameters of rank `rank` for `name` into `layer`, in all else as adapter `like` has it there.

    They hold what they held, filled up with zeros; only zeros where `like` is another adapter.
    """
    is_new = like != name
    for kind, container in adapter_containers(layer).items():
        if like in container and not (is_new and kind in ('lora_variant', 'lora_magnitude_vector')):
            old = container[name] if name in container else None
            undo.callback(_restore, container, name, old)
            container[name] = copy.deepcopy(container[like])
            if is_new and isinstance(container[name], nn.Module):
                # The adapter that it is like may have been offloaded.
                container[name].__dict__.pop('origin_device', None)
    target = factors_of(layer, name)
    assert target is not None  # It was copied just now.
    new = Factors(
        target.A.new_zeros((rank, *target.A.shape[1:])),
        target.B.new_zeros((target.B.shape[0], rank // groups_of(layer), *target.B.shape[2:])))
    if not is_new:
        new = padded(target, new, groups_of(layer))
    A, B = (nn.Parameter(value, requires_grad=target.A.requires_grad and not is_new) for value in new)
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
