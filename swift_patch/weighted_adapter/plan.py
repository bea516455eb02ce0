"""Everything that can be wrong with a merge, found before the first write; and the tensors to merge."""
import ctypes
import math
import torch
from dataclasses import dataclass, replace
from numbers import Integral, Real
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn
from typing import (AbstractSet, Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set,
                    Tuple, Union)

from .adapters import Adapters
from .lora_index import Factors, Form, formed, groups
from .merging import COMBINATION_TYPES, CombinationType, MergeOptions, Source, reference_scaling
from .messages import shown
from .packing import is_transposed

# Kinds of LoRA whose layers compute something else than scaling · B · A: a fused adapter keeps the kind it was made as.
_VARIANTS = ('use_dora', 'alora_invocation_tokens', 'arrow_config', 'use_qalora')
# Ways to initialise a LoRA that change the base layer's weight.
_CHANGE_BASE = ('pissa', 'olora', 'corda', 'loftq')
# No layer of a model has so many features that a larger rank meant anything; memory would be all it took.
_MAX_SVD_RANK = 2**16
# What PEFT keeps the adapters of a layer in: modules and parameters, which become attributes named like the adapter.
_CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())


class Batch(NamedTuple):
    """LoRA layers to be merged together: of equal scalings, and of one shape unless they are merged element by element.

    Attributes:
        names: the layers' names in the model.
        layers: the layers.
        shapes: the shapes of A and B that the first source has in each.
        like: the first source that has them, to make a missing one like.
        form: the form of the sources' factors.
        sources: what to merge, all on one device.
        is_transposed: whether the base layers keep their weights as (in_features, out_features).
        scaling: the scaling that a new adapter would have there.
    """
    names: Tuple[str, ...]
    layers: Tuple[LoraLayer, ...]
    shapes: List[Tuple[torch.Size, torch.Size]]
    like: str
    form: Form
    sources: List[Source]
    is_transposed: bool
    scaling: float


@dataclass(frozen=True)
class Plan:
    """One checked merge.

    Attributes:
        options: as `check_options` returned them; `options.combination_type` is what the adapter is remembered by.
        combination: what is applied: a single source is merged by `linear`, as in PEFT, unless by `average`.
        rank: the rank that a new adapter would have.
        config: the config that a new adapter would have.
        batches: all layers to merge; by the layer they come in the order of `named_modules`, in which random masks are
            drawn.
        fresh: the rank and the scaling that a new adapter would have in each layer.
    """
    options: MergeOptions
    combination: CombinationType
    rank: int
    config: LoraConfig
    batches: List[Batch]
    fresh: Dict[str, Tuple[int, float]]


def plan_merge(adapters: Adapters, sources: Sequence[str], weights: Sequence[float], options: MergeOptions) -> Plan:
    """Checks a merge and finds its tensors. Changes nothing.

    Args:
        adapters: the adapters of the model.
        sources: the names of the sources, as `check_sources` returned them.
        weights: their weights, likewise.
        options: how to merge, as `check_options` returned them.

    Raises:
        ValueError: the sources cannot be merged this way.
    """
    for source in sources:
        check_source(source, adapters)

    name = options.combination_type
    if len(sources) == 1 and name != 'average':
        name = 'linear'
    combination = COMBINATION_TYPES[name]
    if combination.needs_density and options.density is None:
        raise ValueError(f'combination_type {name!r} needs a density, the fraction of values to keep.')
    ranks = [adapters.rank(source) for source in sources]
    if combination.rank == 'same' and len(set(ranks)) > 1:
        raise ValueError(f'combination_type {name!r} merges adapters of one rank, found '
                         f"{shown(dict(zip(sources, ranks)))}: use 'cat' or 'svd'.")
    rank = sum(ranks) if combination.rank == 'sum' else max(ranks)
    if combination.rank == 'max' and options.svd_rank:
        rank = options.svd_rank

    config = _fused_config([adapters.config(source) for source in sources], name, rank)
    # A clamp's threshold is a quantile of one layer's factors.
    form = 'layer' if combination.rank == 'max' and options.svd_clamp is not None else combination.form
    is_restricted = _is_restricted(config)
    if is_restricted:
        _check_other_layers(config, adapters, sources)
    batches = []
    for layers, shapes, parts in _runs(adapters, sources, form, by_layer=is_restricted):
        names = tuple(layers)
        if not (check_target_module_exists(config, names[0]) if is_restricted else parts):
            continue
        _check_layers(layers, parts, sources, name, options)
        # Sources that were offloaded to the CPU are merged where the first one is.
        device = parts[0].factors.A.device
        tensors = [
            Source(part.factors.A.to(device), part.factors.B.to(device), weights[part.number], part.scaling)
            for part in parts
        ]
        if name == 'average':
            scaling = reference_scaling(tensors)
        else:
            # PEFT gives the new adapter α = r.
            scaling = math.sqrt(rank) if config.use_rslora else 1.0
        of_first = layers[names[0]]
        batches.append(
            Batch(names, tuple(layers.values()), shapes, sources[parts[0].number], form, tensors,
                  is_transposed(of_first), scaling))
    _check_modules_to_save(adapters, sources)
    fresh = {
        layer_name: (A[0] if combination.rank == 'same' else rank, batch.scaling)
        for batch in batches
        for layer_name, (A, _) in zip(batch.names, batch.shapes)
    }
    return Plan(options, combination, rank, config, batches, fresh)


class _Part(NamedTuple):
    """What one source has to be merged with what the others have there.

    Attributes:
        number: the source's place among the sources.
        shapes: the shapes of A and B in the first of the layers.
        factors: the factors, in the form that the combination type takes.
        scaling: the scaling.
    """
    number: int
    shapes: Tuple[torch.Size, torch.Size]
    factors: Factors
    scaling: float


_Run = Tuple[Dict[str, LoraLayer], List[Tuple[torch.Size, torch.Size]], List[_Part]]


def _runs(adapters: Adapters, sources: Sequence[str], form: Form, by_layer: bool) -> Iterator[_Run]:
    """Yields all layers, those together that can be merged together.

    Args:
        adapters: the adapters of the model.
        sources: the names of the sources.
        form: the form that the combination type takes.
        by_layer: whether to yield each layer alone, in the order of the model, whatever the form.

    Yields:
        Layers by name, the shapes of A and B that the first source has in each, and what each source has in all of
        them; alone, also a layer that none has.
    """
    every = [adapters.blocks(source) for source in sources]
    first = every[0].layout
    is_alike = not any(map(adapters.is_fused, sources)) and all(
        blocks.layout.names == first.names and blocks.layout.blocks == first.blocks for blocks in every)
    if by_layer or form == 'layer' or not is_alike:
        for name, layer in adapters.layers():
            parts, shapes = [], []
            for number, source in enumerate(sources):
                found = adapters.source(source, name, layer)
                if found is not None:
                    pair, scaling = found
                    shapes.append((pair.A.shape, pair.B.shape))
                    pair = Factors(*(factor.detach().unsqueeze(0) for factor in pair))
                    parts.append(_Part(number, shapes[-1], formed(pair, form), scaling))
            yield {name: layer}, shapes[:1], parts
        return
    is_flat = form == 'elements' and all(blocks.layout.is_flat and blocks.layout.shapes == first.shapes
                                         for blocks in every)
    scalings = [[layer.scaling[source] for layer in first.layers] for source in sources]
    kinds = list(zip([0] * len(first.names) if is_flat else first.blocks, *scalings))
    begin = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[begin]:
            yield dict(zip(first.names[begin:end], first.layers[begin:end])), first.shapes[begin:end], [
                _Part(i, blocks.layout.shapes[begin], blocks.formed(begin, end, form), scalings[i][begin])
                for i, blocks in enumerate(every)
            ]
            begin = end


def check_sources(sources: Iterable[str], weights: Iterable[float]) -> Tuple[List[str], List[float]]:
    """Returns both as lists.

    Raises:
        TypeError: `sources` is not a list of strings, or `weights` not one of numbers.
        ValueError: there are no sources, or not as many weights, or a weight is not finite.
    """
    names, numbers = check_names(sources), []
    # Iterating these would give the keys alone, or equal weights once and in any order.
    if isinstance(weights, (Mapping, AbstractSet)):
        raise TypeError(f'weights is expected to be a list of numbers, found {shown(weights)}.')
    for weight in _listed('weights', 'a list of numbers', weights):
        number = _number(weight)
        if number is None:
            raise TypeError(f'weights is expected to hold numbers, found {shown(weight)} in it.')
        # PEFT multiplies with float32.
        if not math.isfinite(ctypes.c_float(number).value):
            raise ValueError(f'weights is expected to hold finite numbers (of float32), found {shown(weight)} in it.')
        numbers.append(number)
    if len(names) != len(numbers):
        raise ValueError(f'adapters and weights are expected to be of one length, found {len(names)} adapters '
                         f'{shown(names)} and {len(numbers)} weights {shown(numbers)}.')
    return names, numbers


def check_names(adapters: Iterable[str]) -> List[str]:
    """Returns the names of adapters as a list.

    Raises:
        TypeError: `adapters` is not a list of strings.
        ValueError: there are none.
    """
    names = _listed('adapters', 'a list of adapter names', adapters)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f'adapters is expected to hold strings, found {shown(name)} in it.')
    if not names:
        raise ValueError(f'adapters is expected to name at least one adapter, found none in {shown(adapters)}.')
    return names


def check_new_name(name: str) -> None:
    """Checks the name for a new adapter.

    Raises:
        TypeError: it is not a string.
        ValueError: no adapter can have it.
    """
    if not isinstance(name, str):
        raise TypeError(f'adapter_name is expected to be a string, found {shown(name)}.')
    if not name or '.' in name:
        raise ValueError(f'adapter_name is expected to have no dot in it and not to be empty, found {shown(name)}: '
                         'it becomes the name of a module.')
    if any(hasattr(container, name) for container in _CONTAINERS):
        raise ValueError(f'adapter_name is expected to be no attribute of torch modules, found {shown(name)}: it '
                         'becomes the name of a module. Choose another one.')


def check_options(options: MergeOptions) -> MergeOptions:
    """Returns the options with Python's own numbers. Raises ValueError where one is not one of its values."""
    numbers = {name: _number(getattr(options, name)) for name in ('svd_clamp', 'density')}
    rank = options.svd_rank

    def is_in(name: str, low: float, high: float) -> bool:
        number = numbers[name]
        return getattr(options, name) is None or (number is not None and low <= number <= high)

    def is_one_of(name: str, values: Iterable[str]) -> bool:
        value = getattr(options, name)
        return isinstance(value, str) and value in values

    def expect(name: str, expected: str, is_right: bool) -> None:
        if not is_right:
            raise ValueError(f'{name} is expected to be {expected}, found {shown(getattr(options, name))}.')

    expect('combination_type', f'one of {list(COMBINATION_TYPES)}', is_one_of('combination_type', COMBINATION_TYPES))
    # PEFT takes 0 for None.
    expect('svd_rank', f'an integer from 1 to {_MAX_SVD_RANK} or None', rank is None
           or (isinstance(rank, Integral) and not isinstance(rank, bool) and 0 <= rank <= _MAX_SVD_RANK))
    expect('svd_clamp', 'a quantile from 0 to 1 or None', is_in('svd_clamp', 0, 1))
    expect('svd_full_matrices', 'True or False', isinstance(options.svd_full_matrices, bool))
    expect('svd_driver', "'gesvd', 'gesvdj', 'gesvda' or None", options.svd_driver is None
           or is_one_of('svd_driver', ('gesvd', 'gesvdj', 'gesvda')))
    # PEFT allows more than 1, which prunes nothing.
    expect('density', 'the fraction of values to keep, from 0 to 1', is_in('density', 0, 2**31))
    expect('majority_sign_method', "'total' or 'frequency'", is_one_of('majority_sign_method', ('total', 'frequency')))
    return replace(
        options,
        svd_rank=None if rank is None else int(rank),
        svd_clamp=numbers['svd_clamp'],
        density=numbers['density'])


def _listed(argument: str, expected: str, value: Any) -> List[Any]:
    """Returns the items of an argument that is a list of anything, or raises TypeError."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError('Its items would be its characters.')
        return list(value)
    except Exception as e:  # a value's own `__iter__` may raise anything
        raise TypeError(f'{argument} is expected to be {expected}, found {shown(value)}.') from e


def _number(value: Any) -> Optional[float]:
    """Returns a real number of any kind as a float, infinite where it is too large for one; None for what is none."""
    try:
        if getattr(value, 'shape', None) == ():
            # A tensor or an array without dimensions.
            value = value.item()
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    except OverflowError:
        return math.inf
    except Exception:  # a tensor on the meta device has no value; an object may raise anything
        return None


def check_target(adapters: Adapters, plan: Plan, sources: Sequence[str], target: str) -> None:
    """Raises ValueError where the fused adapter `target` cannot take what `plan` merges."""
    if target in sources:
        raise ValueError(f'Adapter {target!r} cannot be refilled from itself: make another one by '
                         '`add_weighted_adapter`.')
    lacking = plan.fresh.keys() - adapters.blocks(target).layout.places.keys()
    for name, layer in adapters.layers():
        if target in layer.merged_adapters:
            raise ValueError(f'Adapter {target!r} is merged into the base weights of layer {name!r}: unmerge it before '
                             'refilling it.')
        if layer.scaling.get(target) == 0:
            raise ValueError(
                f'Adapter {target!r} is expected to have a scaling in layer {name!r}, found 0: set it back '
                'before refilling it.')
    for variant in _VARIANTS:
        new, old = (getattr(config, variant, None) for config in (plan.config, adapters.configs[target]))
        if new != old:
            raise ValueError(
                f'Adapter {target!r} was made with {variant}={old!r}, but from source {sources[0]!r} would '
                f'have {variant}={new!r}: make another one by `add_weighted_adapter`.')
        if new and lacking:
            raise ValueError(f'Adapter {target!r} lacks layers {shown(sorted(lacking))} and cannot grow, for it has '
                             f'{variant}={old!r}: make another one by `add_weighted_adapter`.')


def check_source(source: str, adapters: Adapters) -> None:
    """Raises ValueError where `source` is not a LoRA that can be merged."""
    if source not in adapters.configs:
        raise ValueError(f'There is no adapter {shown(source)} to merge, only '
                         f'{shown(sorted(adapters.configs))}.')
    config = adapters.configs[source]
    if not isinstance(config, LoraConfig):
        raise ValueError(f'Adapter {source!r} is expected to be a LoRA, found a {type(config).__name__}.')
    if getattr(config, 'target_parameters', None):
        raise ValueError(f'Adapter {source!r} targets parameters ({config.target_parameters}), which cannot be merged.')
    if not adapters.blocks(source).layout.places:
        raise ValueError(f'Adapter {source!r} is expected to have LoRA layers that can be merged, found none: the '
                         'model was changed, or they are of another kind (as with `use_merged_linear`).')


def _check_modules_to_save(adapters: Adapters, sources: Sequence[str]) -> None:
    for name, wrapper in adapters.index.of_type(ModulesToSaveWrapper):
        holders = [source for source in sources if source in wrapper.modules_to_save]
        if len(holders) > 1:
            raise ValueError(
                f'Adapters {shown(holders)} each hold a module {name!r} of their own (modules_to_save), which '
                'cannot be merged.')


def _check_other_layers(config: LoraConfig, adapters: Adapters, sources: Sequence[str]) -> None:
    """Raises ValueError where a new adapter of this config would be in a layer that no adapter is in."""
    for name, module in adapters.index.modules:
        if not isinstance(module, LoraLayer) and check_target_module_exists(config, name):
            raise _nothing_to_merge(name, sources)


def _nothing_to_merge(layer_name: str, sources: Sequence[str]) -> ValueError:
    return ValueError(f'Adapters {shown(list(sources))} have nothing to merge in layer {layer_name!r}, which a new '
                      'adapter would have: that takes all target modules, and the other settings of '
                      f'{sources[0]!r}.')


def _check_layers(layers: Mapping[str, LoraLayer], parts: Sequence[_Part], sources: Sequence[str],
                  combination_type: str, options: MergeOptions) -> None:
    """Raises ValueError where the sources of a run of layers cannot be merged."""
    rule, name = COMBINATION_TYPES[combination_type].rank, next(iter(layers))
    if not parts:
        raise _nothing_to_merge(name, sources)
    for layer_name, layer in layers.items():
        merged = [source for source in sources if source in layer.merged_adapters] if layer.merged_adapters else []
        if merged:
            raise ValueError(f'Adapters {shown(merged)} are merged into the base weights of layer {layer_name!r}: '
                             'unmerge them first.')
    shapes = {(*A[1:], B[0]) for _, (A, B), _, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f'Adapters {shown(list(sources))} are expected to be of one shape in layer {name!r}, found '
                         f'{sorted(shapes)}.')
    ranks = [A[0] for _, (A, _), _, _ in parts]
    if rule == 'same' and len(set(ranks)) > 1:
        raise ValueError(
            f'combination_type {combination_type!r} merges adapters of one rank, found ranks {shown(ranks)} in '
            f"layer {name!r}: use 'cat' or 'svd'.")
    count, device = groups(layers[name]), parts[0].factors.A.device
    if rule == 'max' and count > 1:
        raise ValueError(f'combination_type {combination_type!r} cannot merge layer {name!r}, a convolution in '
                         f"{count} groups: use 'linear' or 'average'.")
    if rule == 'max' and options.svd_driver is not None and device.type != 'cuda':
        raise ValueError(f'svd_driver={options.svd_driver!r} is for CUDA, found layer {name!r} on {device}: leave it '
                         'out.')


def _fused_config(configs: Sequence[LoraConfig], combination_type: str, rank: int) -> LoraConfig:
    """Returns the config of a new adapter merged from adapters of these configs, as PEFT makes it."""
    targets = [config.target_modules for config in configs]
    if len({isinstance(target, str) for target in targets}) > 1:
        raise ValueError('The target modules of the adapters are expected to be all regular expressions or all lists, '
                         f'found {shown(targets)}.')
    target_modules: Union[str, Set[str]]
    if isinstance(targets[0], str):
        target_modules = '|'.join(f'({target})' for target in targets)
    else:
        target_modules = set().union(*targets)
    changes: Dict[str, Any] = {'r': rank, 'lora_alpha': rank, 'alpha_pattern': {}, 'rank_pattern': {}}
    if combination_type == 'average':
        # The scaling is the sources', however they came by it.
        changes['use_rslora'] = False
    if str(configs[0].init_lora_weights).startswith(_CHANGE_BASE):
        # Unlike PEFT, which changes the base weights again for an adapter whose values are then overwritten.
        changes['init_lora_weights'] = True
    return replace(configs[0], target_modules=target_modules, **changes)


def _is_restricted(config: LoraConfig) -> bool:
    """Whether a new adapter of this config would not be in all layers of its sources, or in others, too.

    These settings are the first source's, and hold for the target modules of all.
    """
    restrictions = ('layers_to_transform', 'exclude_modules', 'modules_to_save')
    return any(getattr(config, name, None) not in (None, [], '') for name in restrictions)
