"""Compositions as vLLM's requests for adapters, checked before vLLM sees them."""
import torch
from collections import OrderedDict
from typing import Any, Dict, Optional, Sequence, get_args
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

from ..compose.composer import FusionComposer
from ..errors import short_repr
from ..lora.composition import Composition
from ..lora.library import AdapterLibrary
from .skeleton import skeleton_of
from .stored_mixture import StoredMixture, is_mixture

# The ranks that vLLM has kernels for.
LORA_RANKS: Sequence[int] = get_args(MaxLoRARanks)
# vLLM's memory for one request is another's next, and NaN times the zero of a mask is NaN.
MAX_WEIGHT = 1000
# What follows the name in that of a request.
_NUMBER = '#'
# Mixtures of which it is remembered that they can be merged.
_MAX_KNOWN = 2**12


class Mixtures:
    """Makes vLLM's requests for adapters of compositions. For any thread.

    Args:
        config: the config of the base model, as vLLM keeps it.
        dtype: the dtype that it computes in.
        library: the adapters.
        **composer_args: arguments of `FusionComposer`: `merge_method`, `combination_type`, ...

    Attributes:
        composer: makes and checks compositions. Its model has no values.
        max_lora_rank: the largest rank that the engine takes; None while there is none.

    Raises:
        ValueError: Transformers has no such model, or an argument is not one of its values.
    """

    def __init__(self, config: Any, dtype: torch.dtype, library: AdapterLibrary, **composer_args: Any):
        self.composer = FusionComposer(skeleton_of(config, dtype), library=library, **composer_args)
        self.max_lora_rank: Optional[int] = None
        self._library = library
        self._ranks: 'OrderedDict[str, int]' = OrderedDict()

    def request(self, composition: Composition, name: str = '') -> LoRARequest:
        """Returns vLLM's request for a composition.

        Args:
            composition: what `composer.composition` returned.
            name: what the answers call it, see `shown_name`.

        Raises:
            ValueError: there is no such adapter, they cannot be merged, a weight is beyond `MAX_WEIGHT`, or they give a
                larger rank than the engine takes.
        """
        largest = max(map(abs, composition.weights))
        if largest > MAX_WEIGHT:
            raise ValueError(f'weights is expected to hold numbers from -{MAX_WEIGHT} to {MAX_WEIGHT} with vLLM, found '
                             f'{largest}: what overflows stays in memory that other requests get.')
        mixture = StoredMixture.of(composition, self._library)
        path = mixture.path
        rank = self._ranks.get(path)
        if rank is None:
            rank = self._ranks[path] = self.composer.merged(composition, with_values=False).layout.rank
            if len(self._ranks) > _MAX_KNOWN:
                self._ranks.popitem(last=False)
        if self.max_lora_rank is not None and rank > self.max_lora_rank:
            raise ValueError(f'Adapters {short_repr(list(composition.sources))} are expected to give a rank of '
                             f'{self.max_lora_rank} at most, found {rank}: start the engine with a max_lora_rank of '
                             f'{served_rank(rank)}.')
        # vLLM takes two of one name for one, whatever their numbers.
        return LoRARequest(f'{name}{_NUMBER}{mixture.lora_id:x}', mixture.lora_id, path)

    def served_rank(self, adapters: Optional[Sequence[str]] = None, max_sources: Optional[int] = None) -> int:
        """Returns the `max_lora_rank` that any fusion of some adapters needs.

        Args:
            adapters: their names; by default all of the library.
            max_sources: how many of them at most at a time; by default all.

        Raises:
            ValueError: one does not exist or does not fit the model, or vLLM has no such rank.
        """
        return served_rank(self.composer.largest_rank(adapters, max_sources))


def shown_name(request: LoRARequest) -> str:
    """Returns what the answers to a request for an adapter call it."""
    name: str = request.lora_name
    return name.rpartition(_NUMBER)[0] if is_mixture(request.lora_path) else name


def served_rank(rank: int) -> int:
    """Returns the smallest rank of vLLM's that holds a rank. Raises ValueError where none does."""
    for served in LORA_RANKS:
        if served >= rank:
            return served
    raise ValueError(f'vLLM is expected to serve ranks up to {LORA_RANKS[-1]}, found that a fusion has {rank}: merge '
                     'fewer adapters at a time, or not by their outputs.')


def lora_options(max_lora_rank: int, max_loras: int) -> Dict[str, int]:
    """Returns vLLM's options for adapters that come and go with each request.

    Args:
        max_lora_rank: see `Mixtures.served_rank`.
        max_loras: how many requests are computed at a time.
    """
    # Those that wait are there, too: loading them anew would hold up the engine.
    return {'max_lora_rank': max_lora_rank, 'max_loras': max_loras, 'max_cpu_loras': 4 * max_loras}
