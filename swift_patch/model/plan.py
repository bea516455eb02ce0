"""What a merge in a model merges: which layers together, which tensors. Whatever is wrong is found here."""
import math
import torch
from dataclasses import dataclass, replace
from operator import ne
from peft.tuners.lora import LoraConfig
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..errors import errors_of_sample, short_repr
from ..lora.combination import CombinationType, Form, MergeOptions
from ..lora.composition import Composition
from ..lora.factors import Factors, Source, formed
from ..lora.merging import reference_scaling
from .new_adapter import new_adapter, nothing_to_merge
from .sources import Sources

Shapes = Tuple[torch.Size, torch.Size]


class Batch(NamedTuple):
    """LoRA layers to be merged together: of equal scalings, and of one shape unless they are merged element by element.

    Attributes:
        names: the layers' names in the model.
        groups: the groups of each, see `layers.groups_of`.
        shapes: the shapes of A and B that the first source has in each.
        like: the first source that has them, to make a missing one like.
        form: the form of the sources' factors.
        sources: what to merge, all on one device.
        is_transposed: whether the base layers keep their weights as (in_features, out_features).
        scaling: the scaling that a new adapter would have there.
        span: where the layers are among those of every source, from and to; None where sources differ in that.
    """
    names: Tuple[str, ...]
    groups: Tuple[int, ...]
    shapes: List[Shapes]
    like: str
    form: Form
    sources: List[Source]
    is_transposed: bool
    scaling: float
    span: Optional[Tuple[int, int]]


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


def plan_merge(sources: Sources, composition: Composition) -> Plan:
    """Checks a merge and finds its tensors. Changes nothing.

    Args:
        sources: the adapters that it may take.
        composition: what to merge, and how.

    Raises:
        ValueError: the sources cannot be merged this way.
    """
    names, options, combination = composition.sources, composition.options, composition.combination
    for name in dict.fromkeys(names):
        sources.check(name)
    sources.check_modules_to_save(names)
    ranks = {name: sources.config_rank(name) for name in names}
    combination.check_ranks(ranks)
    config_rank = combination.fused_rank([ranks[name] for name in names], options.svd_rank)
    new = new_adapter(sources.adapters, names, [sources.config(name) for name in names], combination.name, config_rank)
    # Tensors that were padded or swapped may have more.
    rank = config_rank if combination.rank == 'max' else combination.fused_rank([sources.rank(name) for name in names])
    # A clamp's threshold is a quantile of one layer's factors.
    form = 'layer' if combination.rank == 'max' and options.svd_clamp is not None else combination.form
    batches = []
    for run in _runs(sources, names, form, new.layers):
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
        batches.append(
            Batch(run.names, run.groups, run.shapes, names[run.parts[0].number], form, tensors, run.is_transposed,
                  scaling, run.span))
    of_layers = {
        layer_name: (A[0] if combination.rank == 'same' else rank, batch.scaling)
        for batch in batches
        for layer_name, (A, _) in zip(batch.names, batch.shapes)
    }
    return Plan(options, combination, rank, new.config, batches, of_layers)


def plan_rows(sources: Sources, compositions: Sequence[Composition]) -> List[Optional[Plan]]:
    """Checks the merges of a batch and finds their tensors; None for the base model alone. Changes nothing.

    Rows whose sources are alike in all but their values share a plan, but for the tensors and the weights.

    Args:
        sources: the adapters that they may take.
        compositions: what to merge for each row, and how.

    Raises:
        ValueError: the sources of a row cannot be merged this way. It says which row.
    """
    kinds: Dict[str, int] = {}
    made: Dict[Tuple[object, ...], Plan] = {}
    plans: List[Optional[Plan]] = []
    for number, composition in enumerate(compositions):
        if composition.is_base:
            plans.append(None)
            continue
        with errors_of_sample(number, len(compositions)):
            for name in composition.sources:
                if name not in kinds:
                    sources.check(name)
                    alike = (kind for other, kind in kinds.items() if _are_alike(sources, name, other))
                    kinds[name] = next(alike, len(kinds))
            key = (composition.options, *(kinds[name] for name in composition.sources))
            plan = made.get(key)
            if plan is None or any(batch.span is None for batch in plan.batches):
                plan = made[key] = plan_merge(sources, composition)
            else:
                sources.check_modules_to_save(composition.sources)
                plan = replace(plan, batches=[_batch_like(sources, batch, composition) for batch in plan.batches])
        plans.append(plan)
    return plans


def _are_alike(sources: Sources, name: str, other: str) -> bool:
    """Whether two sources have equal configs, and factors of equal shapes in the same layers and the same order."""
    return (sources.config(name) == sources.config(other) and sources.record(name) is None
            and sources.record(other) is None and sources.scalings(name) == sources.scalings(other)
            and sources.layout(name).is_like(sources.layout(other)))


def _batch_like(sources: Sources, batch: Batch, composition: Composition) -> Batch:
    """Returns a batch with the tensors and the weights of sources that are like its own."""
    assert batch.span is not None
    device, found = batch.sources[0].A.device, []
    for name, weight, old in zip(composition.sources, composition.weights, batch.sources):
        A, B = sources.factors(name).formed(*batch.span, batch.form)
        found.append(Source(A.to(device), B.to(device), weight, old.scaling))
    return batch._replace(sources=found, like=composition.sources[0])


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
        names: see `Batch`.
        groups: see `Batch`.
        is_transposed: see `Batch`.
        shapes: the shapes of A and B that the first source has in each.
        parts: what each source has in all of them.
        span: see `Batch`.
    """
    names: Tuple[str, ...]
    groups: Tuple[int, ...]
    is_transposed: bool
    shapes: List[Shapes]
    parts: List[_Part]
    span: Optional[Tuple[int, int]] = None


def _runs(sources: Sources, names: Sequence[str], form: Form, wanted: 'frozenset[str]') -> Iterator[_Run]:
    """Yields the layers of a new adapter, those together that can be merged together.

    Args:
        sources: the adapters that a merge may take.
        names: those that it takes.
        form: the form that the combination type takes.
        wanted: the names of the layers.
    """
    every = [sources.factors(name) for name in names]
    first = every[0].layout
    is_alike = first.name_set == wanted and all(
        found.layout is first or (found.layout.names == first.names and found.layout.runs == first.runs)
        for found in every) and not any(sources.record(name) for name in names)
    if form == 'layer' or not is_alike:
        yield from _single_layers(sources, names, form, wanted)
        return
    is_one_run = form == 'elements' and all(found.layout.is_one_run and found.layout.shapes == first.shapes
                                            for found in every)
    scalings = [found.scalings for found in every]
    kinds = list(zip([0] * len(first.names) if is_one_run else first.runs, *scalings))
    ends = [end for end, differs in enumerate(map(ne, kinds[1:], kinds), 1) if differs]
    for begin, end in zip([0, *ends], [*ends, len(kinds)]):
        yield _Run(first.names[begin:end], tuple(first.groups[begin:end]), first.is_transposed[begin],
                   first.shapes[begin:end], [
                       _Part(i, found.layout.shapes[begin], found.formed(begin, end, form), scalings[i][begin])
                       for i, found in enumerate(every)
                   ], (begin, end))


def _single_layers(sources: Sources, names: Sequence[str], form: Form, wanted: 'frozenset[str]') -> Iterator[_Run]:
    """Yields the layers one by one, in the order of the model."""
    for layer_name in sources.adapters.in_order(wanted):
        parts, shapes = [], []
        for number, name in enumerate(names):
            found = sources.source(name, layer_name)
            if found is not None:
                pair, scaling = found
                shapes.append((pair.A.shape, pair.B.shape))
                pair = Factors(*(factor.detach().unsqueeze(0) for factor in pair))
                parts.append(_Part(number, shapes[-1], formed(pair, form), scaling))
        if not parts:
            raise nothing_to_merge(layer_name, names)
        layout = sources.layout(names[parts[0].number])
        place = layout.places[layer_name]
        yield _Run((layer_name, ), (layout.groups[place], ), layout.is_transposed[place], shapes[:1], parts)


def _check_run(run: _Run, composition: Composition) -> None:
    """Raises ValueError where the sources of a run of layers cannot be merged."""
    combination, sources, name = composition.combination, composition.sources, run.names[0]
    shapes = {(*A[1:], B[0]) for _, (A, B), _, _ in run.parts}
    if len(shapes) > 1:
        raise ValueError(f'Adapters {short_repr(list(sources))} are expected to be of one shape in layer {name!r}, '
                         f'found {sorted(shapes)}.')
    combination.check_ranks({sources[part.number]: part.shapes[0][0] for part in run.parts}, f' in layer {name!r}')
    count, device = run.groups[0], run.parts[0].factors.A.device
    if combination.rank == 'max' and count > 1:
        raise ValueError(f'combination_type {combination.name!r} expects layers of one group, found layer {name!r}, a '
                         f"convolution in {count} groups: use 'linear' or 'average'.")
    if combination.rank == 'max' and composition.options.svd_driver is not None and device.type != 'cuda':
        raise ValueError(f'svd_driver={composition.options.svd_driver!r} is expected on CUDA, found layer {name!r} on '
                         f'{device}: leave it out.')
