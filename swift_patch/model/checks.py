"""What can be wrong with adapters of a model that are to be merged, or refilled; found before the first write."""
from peft.tuners.lora import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn
from typing import AbstractSet, Sequence

from ..errors import short_repr
from .adapters import Adapters
from .rows import has_rows

# Kinds of LoRA whose layers compute something else than scaling · B · A: a fused adapter keeps the kind it was made as.
_VARIANTS = ('use_dora', 'alora_invocation_tokens', 'arrow_config', 'use_qalora')
# What PEFT keeps the adapters of a layer in: modules and parameters, which become attributes named like the adapter.
_CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())


def check_new_name(name: str) -> None:
    """Checks the name for a new adapter.

    Raises:
        TypeError: it is not a string.
        ValueError: no adapter can have it.
    """
    if not isinstance(name, str):
        raise TypeError(f'adapter_name is expected to be a string, found {short_repr(name)}.')
    if not name or '.' in name:
        raise ValueError(f'adapter_name is expected to have no dot in it and not to be empty, found {short_repr(name)}'
                         ': it becomes the name of a module.')
    if any(hasattr(container, name) for container in _CONTAINERS):
        raise ValueError(f'adapter_name is expected to be no attribute of torch modules, found {short_repr(name)}: it '
                         'becomes the name of a module. Choose another one.')


def check_target(adapters: Adapters, config: LoraConfig, layers: AbstractSet[str], sources: Sequence[str],
                 target: str) -> None:
    """Raises ValueError where a fused adapter cannot take what is merged.

    Args:
        adapters: the adapters of the model.
        config: the config that a new adapter would have.
        layers: the names of the layers that it would have.
        sources: the sources.
        target: the fused adapter.
    """
    if target in sources:
        raise ValueError(f'Adapter {target!r} is expected not to be among its own sources, found {list(sources)}: make '
                         'another one by `add_weighted_adapter`.')
    check_tensors(adapters, target)
    _check_unmerged(adapters, target)
    found = adapters.factors(target)
    if 0 in found.scalings:
        name = found.layout.names[found.scalings.index(0)]
        raise ValueError(f'Adapter {target!r} is expected to have a scaling in layer {name!r}, found 0: set it back '
                         'before refilling it.')
    missing = layers - found.layout.places.keys()
    for variant in _VARIANTS:
        # Null and False are both off.
        new, old = (getattr(of_one, variant, None) or None for of_one in (config, adapters.configs[target]))
        if new != old:
            raise ValueError(
                f'Adapter {target!r} is expected to be refilled from adapters with {variant}={old!r}, as it was made, '
                f'found {variant}={new!r} of source {sources[0]!r}: make another one by `add_weighted_adapter`.')
        if new and missing:
            raise ValueError(f'Adapter {target!r} is expected to have layers {short_repr(sorted(missing))} and lacks '
                             f'them; it cannot grow, for it has {variant}={old!r}: make another one by '
                             '`add_weighted_adapter`.')


def check_source(adapters: Adapters, source: str) -> None:
    """Raises ValueError where `source` is not a LoRA of the model that can be merged."""
    if source not in adapters.configs:
        library = '' if adapters.library is None else f'the library ({len(adapters.library)}) or '
        raise ValueError(f'adapters is expected to name adapters of {library}the model, '
                         f'{short_repr(sorted(adapters.configs))}, found {short_repr(source)}.')
    config = adapters.configs[source]
    if not isinstance(config, LoraConfig):
        raise ValueError(f'Adapter {source!r} is expected to be a LoRA, found a {type(config).__name__}.')
    if getattr(config, 'target_parameters', None):
        raise ValueError(f'Adapter {source!r} is expected to target modules, found that it targets parameters '
                         f'({config.target_parameters}), which cannot be merged.')
    if not adapters.factors(source).layout.places:
        raise ValueError(f'Adapter {source!r} is expected to have LoRA layers that can be merged, found none: the '
                         'model was changed, or they are of another kind (as with `use_merged_linear`).')
    check_tensors(adapters, source)
    _check_unmerged(adapters, source)
    if has_rows(adapters, source):
        raise ValueError(f'Adapter {source!r} is expected to be one adapter to be merged, found a fusion for each row '
                         'of a batch: compose one sample first.')


def check_tensors(adapters: Adapters, name: str) -> None:
    """Raises ValueError where an adapter has tensors without memory of their own, or that FSDP or ZeRO-3 keeps."""
    found = adapters.factors(name)
    if found.layout.sharded:
        place = found.layout.places[found.layout.sharded[0]]
        raise ValueError(
            f'Adapter {name!r} is expected to have plain tensors, found a {type(found.factors(place).A).__name__} in '
            f'layer {found.layout.sharded[0]!r}: it is sharded (FSDP2, tensor parallel) or quantized. Merge before '
            'that, or gather it.')
    if found.layout.kept_elsewhere:
        raise ValueError(
            f'Adapter {name!r} is expected to have tensors of its own, found that FSDP or ZeRO-3 keeps those of layer '
            f'{found.layout.kept_elsewhere[0]!r}: what is written to them is lost when they are sharded again. Merge '
            'before that, or have FSDP leave the adapters alone (`ignored_params`, or `ignored_states` of FSDP1).')


def _check_unmerged(adapters: Adapters, name: str) -> None:
    for layer_name, layer in adapters.merged:
        if name in layer.merged_adapters:
            raise ValueError(f'Adapter {name!r} is expected not to be merged into the base weights, found that it is '
                             f'in layer {layer_name!r}: unmerge it first.')


def check_modules_to_save(adapters: Adapters, sources: Sequence[str]) -> None:
    """Raises ValueError where several sources hold a module each beside their LoRA layers."""
    for name, wrapper in adapters.view.of_type(ModulesToSaveWrapper):
        holders = [source for source in sources if source in wrapper.modules_to_save]
        if len(holders) > 1:
            raise ValueError(
                f'Adapters {short_repr(holders)} are expected not to hold a module {name!r} each (modules_to_save), '
                'which cannot be merged, but do: leave one of them out.')
