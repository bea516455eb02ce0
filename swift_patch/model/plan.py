"""Everything that can be wrong with a merge in a model, found before the first write; and the tensors to merge."""
import math
import torch
from dataclasses import dataclass
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

from ..errors import short_repr
from ..lora.combination import CombinationType, Form, MergeOptions
from ..lora.composition import Composition
from ..lora.factors import Factors, Source, formed
from ..lora.merging import reference_scaling
from .adapters import Adapters
from .layers import groups_of, is_transposed
from .new_adapter import new_adapter, nothing_to_merge

# Kinds of LoRA whose layers compute something else than scaling · B · A: a fused adapter keeps the kind it was made as.
_VARIANTS = ('use_dora', 'alora_invocation_tokens', 'arrow_config', 'use_qalora')
# What PEFT keeps the adapters of a layer in: modules and parameters, which become attributes named like the adapter.
_CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())

Shapes = Tuple[torch.Size, torch.Size]


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
    shapes: List[Shapes]
    like: str
    form: Form
    sources: List[Source]
    is_transposed: bool
    scaling: float


@dataclass(frozen=True)
class Plan:
    """One checked merge.

    Attributes:
        options: how to merge, as it was asked for.
        combination: the combination type that is applied.
        rank: the rank of what is merged, at most.
        config: the config that a new adapter would have. Nobody may change it.
        batches: all layers to merge.
        layers: the rank and the scaling that a new adapter would have in each layer.
    """
    options: MergeOptions
    combination: CombinationType
    rank: int
    config: LoraConfig
    batches: List[Batch]
    layers: Dict[str, Tuple[int, float]]


def plan_merge(adapters: Adapters, composition: Composition) -> Plan:
    """Checks a merge and finds its tensors. Changes nothing.

    Args:
        adapters: the adapters of the model.
        composition: what to merge, and how.

    Raises:
        ValueError: the sources cannot be merged this way.
    """
    sources, options, combination = composition.sources, composition.options, composition.combination
    for source in dict.fromkeys(sources):
        check_source(source, adapters)
    _check_modules_to_save(adapters, sources)
    ranks = {source: adapters.config_rank(source) for source in sources}
    combination.check_ranks(ranks)
    config_rank = combination.fused_rank([ranks[source] for source in sources], options.svd_rank)
    new = new_adapter(adapters, sources, combination.name, config_rank)
    # Tensors that were padded or swapped may have more.
    rank = config_rank if combination.rank == 'max' else combination.fused_rank(
        [adapters.rank(source) for source in sources])
    # A clamp's threshold is a quantile of one layer's factors.
    form = 'layer' if combination.rank == 'max' and options.svd_clamp is not None else combination.form
    batches = []
    for run in _runs(adapters, sources, form, new.layers):
        _check_run(run, composition)
        # Sources that were offloaded to the CPU are merged where the first one is.
        device = run.parts[0].factors.A.device
        tensors = [
            Source(
                part.factors.A.to(device), part.factors.B.to(device), composition.weights[part.number], part.scaling)
            for part in run.parts
        ]
        if combination.name == 'average':
            scaling = reference_scaling(tensors)
        else:
            # PEFT gives the new adapter α = r.
            scaling = math.sqrt(config_rank) if new.config.use_rslora else 1.0
        names, layers = tuple(run.layers), tuple(run.layers.values())
        batches.append(
            Batch(names, layers, run.shapes, sources[run.parts[0].number], form, tensors, is_transposed(layers[0]),
                  scaling))
    of_layers = {
        layer_name: (A[0] if combination.rank == 'same' else rank, batch.scaling)
        for batch in batches
        for layer_name, (A, _) in zip(batch.names, batch.shapes)
    }
    return Plan(options, combination, rank, new.config, batches, of_layers)


class _Part(NamedTuple):
    """What one source has to be merged with what the others have there.

    Attributes:
        number: the source's place among the sources.
        shapes: the shapes of A and B in the first of the layers.
        factors: the factors, in the form that the combination type takes.
        scaling: the scaling.
    """
    number: int
    shapes: Shapes
    factors: Factors
    scaling: float


class _Run(NamedTuple):
    """Layers that can be merged together.

    Attributes:
        layers: the layers by name.
        shapes: the shapes of A and B that the first source has in each.
        parts: what each source has in all of them.
    """
    layers: Dict[str, LoraLayer]
    shapes: List[Shapes]
    parts: List[_Part]


def _runs(adapters: Adapters, sources: Sequence[str], form: Form, wanted: 'frozenset[str]') -> Iterator[_Run]:
    """Yields the layers of a new adapter, those together that can be merged together.

    Args:
        adapters: the adapters of the model.
        sources: the names of the sources.
        form: the form that the combination type takes.
        wanted: the names of the layers.
    """
    every = [adapters.factors(source) for source in sources]
    first = every[0].layout
    is_alike = first.name_set == wanted and all(
        found.layout is first or (found.layout.names == first.names and found.layout.runs == first.runs)
        for found in every) and not any(adapters.record_of_source(source) for source in sources)
    if form == 'layer' or not is_alike:
        yield from _single_layers(adapters, sources, form, wanted)
        return
    is_one_run = form == 'elements' and all(found.layout.is_one_run and found.layout.shapes == first.shapes
                                            for found in every)
    scalings = [found.scalings for found in every]
    kinds = list(zip([0] * len(first.names) if is_one_run else first.runs, *scalings))
    begin = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[begin]:
            yield _Run(
                dict(zip(first.names[begin:end], every[0].layers[begin:end])), first.shapes[begin:end], [
                    _Part(i, found.layout.shapes[begin], found.formed(begin, end, form), scalings[i][begin])
                    for i, found in enumerate(every)
                ])
            begin = end


def _single_layers(adapters: Adapters, sources: Sequence[str], form: Form, wanted: 'frozenset[str]') -> Iterator[_Run]:
    """Yields the layers one by one, in the order of the model."""
    for name, layer in adapters.layers:
        if name not in wanted:
            continue
        parts, shapes = [], []
        for number, source in enumerate(sources):
            found = adapters.source(source, name)
            if found is not None:
                pair, scaling = found
                shapes.append((pair.A.shape, pair.B.shape))
                pair = Factors(*(factor.detach().unsqueeze(0) for factor in pair))
                parts.append(_Part(number, shapes[-1], formed(pair, form), scaling))
        if not parts:
            raise nothing_to_merge(name, sources)
        yield _Run({name: layer}, shapes[:1], parts)


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


def check_target(adapters: Adapters, plan: Plan, sources: Sequence[str], target: str) -> None:
    """Raises ValueError where the fused adapter `target` cannot take what `plan` merges."""
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
    missing = plan.layers.keys() - found.layout.places.keys()
    for variant in _VARIANTS:
        new, old = (getattr(config, variant, None) for config in (plan.config, adapters.configs[target]))
        if new != old:
            raise ValueError(
                f'Adapter {target!r} is expected to be refilled from adapters with {variant}={old!r}, as it was made, '
                f'found {variant}={new!r} of source {sources[0]!r}: make another one by `add_weighted_adapter`.')
        if new and missing:
            raise ValueError(f'Adapter {target!r} is expected to have layers {short_repr(sorted(missing))} and lacks '
                             f'them; it cannot grow, for it has {variant}={old!r}: make another one by '
                             '`add_weighted_adapter`.')


def check_source(source: str, adapters: Adapters) -> None:
    """Raises ValueError where `source` is not a LoRA that can be merged."""
    if source not in adapters.configs:
        raise ValueError(f'adapters is expected to name adapters of the model, {short_repr(sorted(adapters.configs))}, '
                         f'found {short_repr(source)}.')
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


def check_tensors(adapters: Adapters, name: str) -> None:
    """Raises ValueError where an adapter has tensors without memory of their own."""
    found = adapters.factors(name)
    if found.layout.sharded:
        place = found.layout.places[found.layout.sharded[0]]
        raise ValueError(
            f'Adapter {name!r} is expected to have plain tensors, found a {type(found.factors(place).A).__name__} in '
            f'layer {found.layout.sharded[0]!r}: it is sharded (FSDP2, tensor parallel) or quantized. Merge before '
            'that, or gather it.')


def _check_unmerged(adapters: Adapters, name: str) -> None:
    for layer_name, layer in adapters.merged:
        if name in layer.merged_adapters:
            raise ValueError(f'Adapter {name!r} is expected not to be merged into the base weights, found that it is '
                             f'in layer {layer_name!r}: unmerge it first.')


def _check_modules_to_save(adapters: Adapters, sources: Sequence[str]) -> None:
    for name, wrapper in adapters.view.of_type(ModulesToSaveWrapper):
        holders = [source for source in sources if source in wrapper.modules_to_save]
        if len(holders) > 1:
            raise ValueError(
                f'Adapters {short_repr(holders)} are expected not to hold a module {name!r} each (modules_to_save), '
                'which cannot be merged, but do: leave one of them out.')


def _check_run(run: _Run, composition: Composition) -> None:
    """Raises ValueError where the sources of a run of layers cannot be merged."""
    combination, sources, name = composition.combination, composition.sources, next(iter(run.layers))
    shapes = {(*A[1:], B[0]) for _, (A, B), _, _ in run.parts}
    if len(shapes) > 1:
        raise ValueError(f'Adapters {short_repr(list(sources))} are expected to be of one shape in layer {name!r}, '
                         f'found {sorted(shapes)}.')
    combination.check_ranks({sources[part.number]: part.shapes[0][0] for part in run.parts}, f' in layer {name!r}')
    count, device = groups_of(run.layers[name]), run.parts[0].factors.A.device
    if combination.rank == 'max' and count > 1:
        raise ValueError(f'combination_type {combination.name!r} expects layers of one group, found layer {name!r}, a '
                         f"convolution in {count} groups: use 'linear' or 'average'.")
    if combination.rank == 'max' and composition.options.svd_driver is not None and device.type != 'cuda':
        raise ValueError(f'svd_driver={composition.options.svd_driver!r} is expected on CUDA, found layer {name!r} on '
                         f'{device}: leave it out.')
