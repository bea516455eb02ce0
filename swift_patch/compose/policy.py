"""What is merged for what a sample asks for (LoraRetriever, arXiv:2402.09997, §4.2)."""
import math
from peft import LoraConfig
from typing import List, Sequence

from ..errors import errors_of_sample, short_repr
from ..lora.composition import Composition, check_names
from ..model.sources import Sources


def exact(compositions: Sequence[Composition], sources: Sources) -> List[Composition]:
    """Returns compositions as they are merged: those of a mixture or a selection are defined by the delta.

    PEFT's types give it √r times too much for sources with rsLoRA, which is kept where a type is asked for by name.

    Args:
        compositions: what the samples ask for.
        sources: the adapters that they may take.

    Raises:
        ValueError: a source cannot be merged. It says of which sample, where there are several.
    """
    found = []
    for number, composition in enumerate(compositions):
        with errors_of_sample(number, len(compositions)):
            is_exact = composition.is_base or composition.options.merge_method is None
            found.append(composition if is_exact else _exact(composition, sources))
    return found


def _exact(composition: Composition, sources: Sources) -> Composition:
    # Those that a selection leaves out are not merged, so that nothing else would see that they do not exist.
    for name in composition.sources:
        sources.check(name)
    if composition.options.merge_method == 'selection':
        composition = composition.selected()
    if sources.config(composition.sources[0]).use_rslora:
        rank = sum(map(sources.config_rank, composition.sources))
        composition = composition.weighted(1 / math.sqrt(rank))
    return composition


def some_source(sources: Sources, compositions: Sequence[Composition]) -> str:
    """Returns an adapter to make the fused one like: one that is composed or, for the base model alone, any."""
    for composition in compositions:
        if not composition.is_base:
            return composition.sources[0]
    return every_source(sources)[0]


def every_source(sources: Sources) -> List[str]:
    """Returns the LoRAs of the library, and those that are loaded, the fused ones aside.

    Raises:
        ValueError: there are none.
    """
    adapters = sources.adapters
    loaded = [
        name for name, config in adapters.configs.items()
        if isinstance(config, LoraConfig) and not adapters.is_fused(name)
    ]
    return check_names(dict.fromkeys([*(adapters.library or ()), *loaded]))


def told(compositions: Sequence[Composition]) -> str:
    """Returns what an error says of compositions."""
    if len(compositions) == 1:
        return short_repr(list(compositions[0].sources))
    return f'{len(compositions)} rows, {short_repr([list(composition.sources) for composition in compositions])},'
