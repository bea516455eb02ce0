"""Selection, fusion and mixture of LoRAs, one sample after another (LoraRetriever, arXiv:2402.09997, §4.2)."""
import threading
import torch
import weakref
from contextlib import ExitStack, contextmanager
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from typing import Any, Dict, Iterable, Iterator, List, Literal, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from .adapters import Adapters, FusedRecord
from .growth import grow
from .lora_index import factors
from .merging import COMBINATION_TYPES, MergeOptions
from .plan import check_options, check_source, check_sources

MERGE_METHODS = {'fusion': 'average', 'mixture': 'cat', 'selection': 'linear'}

# One lock per model, not per composer: all composers of a model switch the same layers. It dies with the model.
_locks: 'weakref.WeakKeyDictionary[nn.Module, threading.RLock]' = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


class _Composition(NamedTuple):
    """What was composed last, and how the tensors could be recognised that it was composed from and into."""
    sources: List[str]
    weights: List[float]
    record: FusedRecord
    tensors: List[Tuple['weakref.ref[Tensor]', int, int, float]]


class FusionComposer:
    """Merges the LoRAs that fit a sample into one fused adapter and activates it, sample by sample.

    The first call makes the fused adapter and all later ones refill it in place, so that every sample costs the same.

    Args:
        model: A `SwiftModel` or a `PeftModel` (or its `LoraModel`) with the LoRAs loaded.
        merge_method: `fusion` averages the parameters (`average`), `mixture` the outputs (`cat`), `selection` takes
            the heaviest source alone.
        combination_type: Any type of `add_weighted_adapter`, instead of `merge_method`.
        adapter_name: The name of the fused adapter.
        svd_rank: See `update_weighted_adapter`, like all that follow.
        svd_clamp: See `update_weighted_adapter`.
        svd_driver: See `update_weighted_adapter`.
        density: See `update_weighted_adapter`.
        majority_sign_method: See `update_weighted_adapter`.

    Raises:
        TypeError: `model` is none of these.
        ValueError: An argument is not one of its values, or `adapter_name` is taken by an adapter that may not be
            overwritten.

    Example:
        >>> composer = swift_patch.FusionComposer(model)
        >>> with composer.fused({'sql': 0.7, 'math': 0.3}):
        ...     model.generate(...)
    """

    def __init__(self,
                 model: nn.Module,
                 merge_method: Literal['fusion', 'mixture', 'selection'] = 'fusion',
                 *,
                 combination_type: Optional[str] = None,
                 adapter_name: str = 'fused',
                 svd_rank: Optional[int] = None,
                 svd_clamp: Optional[float] = None,
                 svd_driver: Optional[str] = None,
                 density: Optional[float] = None,
                 majority_sign_method: Literal['total', 'frequency'] = 'total'):
        # Any model that torch.compile wrapped; the layers are the same.
        self._model: Any = getattr(model, '_orig_mod', model)
        self._tuner: Any = self._model.base_model if isinstance(self._model, PeftModel) else self._model
        if not hasattr(type(self._tuner), 'update_weighted_adapter'):
            raise TypeError(f'model is expected to be a SwiftModel or a PeftModel with LoRAs, found '
                            f'{type(model).__name__} (and swift_patch to be applied, see swift_patch.apply).')
        if merge_method not in MERGE_METHODS:
            raise ValueError(f'merge_method is expected to be one of {list(MERGE_METHODS)}, found {merge_method!r}.')
        if merge_method == 'selection' and combination_type is not None:
            raise ValueError("merge_method 'selection' takes one source alone, so it has no combination_type, found "
                             f'{combination_type!r}.')
        self.merge_method = merge_method
        self.adapter_name = adapter_name
        self._options = MergeOptions(
            combination_type=MERGE_METHODS[merge_method] if combination_type is None else combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method)
        check_options(self._options)
        if COMBINATION_TYPES[self._options.combination_type].needs_density and density is None:
            raise ValueError(f'combination_type {combination_type!r} needs a density, the fraction of values to keep.')
        loaded = Adapters.of(self._tuner)
        if adapter_name in loaded.configs:
            loaded.record(adapter_name)
        self._last: Optional[_Composition] = None
        with _locks_guard:
            self._lock = _locks.setdefault(loaded.model, threading.RLock())

    def compose(self,
                adapters: Union[Sequence[str], Mapping[str, float]],
                weights: Optional[Sequence[float]] = None) -> str:
        """Fuses `adapters` and makes the fused adapter the only active one (in the calling thread, where ms-swift
        activates by thread). Doing it again with nothing changed does nothing.

        Args:
            adapters: The names of the sources, or a mapping from names to weights.
            weights: A weight for each source; by default 1/k for each of k.

        Returns:
            The name of the fused adapter.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: The sources cannot be merged. The model is as it was.
        """
        sources, numbers = self._sources(adapters, weights)
        with self._lock:
            if not self._is_composed(sources, numbers):
                self._last = None
                self._refill(sources, numbers)
                record = Adapters.of(self._tuner).record(self.adapter_name)
                tensors = [(weakref.ref(tensor), *rest) for tensor, *rest in self._tensors(sources)]
                self._last = _Composition(sources, numbers, record, tensors)
            self._activate()
        return self.adapter_name

    @contextmanager
    def fused(self,
              adapters: Union[Sequence[str], Mapping[str, float]],
              weights: Optional[Sequence[float]] = None) -> Iterator[str]:
        """Composes, and holds the fused adapter for the time of the `with` block: `compose` in another thread waits.

        Args:
            adapters: See `compose`.
            weights: See `compose`.

        Yields:
            The name of the fused adapter.
        """
        with self._lock:
            yield self.compose(adapters, weights)

    def reserve(self, adapters: Optional[Sequence[str]] = None, max_sources: Optional[int] = None) -> None:
        """Makes the fused adapter large enough for any of `adapters`, so that it never grows (and nothing that was
        compiled or captured with it goes stale).

        Args:
            adapters: The adapters that will be composed; by default all LoRAs that are loaded.
            max_sources: How many of them at most at a time; by default all. Only `cat` needs more rank for more.

        Raises:
            ValueError: An adapter does not exist, or there is none.
        """
        loaded = Adapters.of(self._tuner)
        if adapters is None:
            adapters = [
                name for name, config in loaded.configs.items()
                if isinstance(config, LoraConfig) and not loaded.is_fused(name)
            ]
        if not adapters:
            raise ValueError('adapters is expected to name at least one LoRA to reserve for, found none.')
        with self._lock, torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
            if self.adapter_name not in loaded.configs:
                active = self._tuner.active_adapters
                self._refill(list(adapters)[:1], [0.0])
                if not isinstance(self._tuner, LoraModel):
                    # Which makes a new adapter the active one.
                    self._tuner.set_active_adapters(active)
            loaded = Adapters.of(self._tuner)
            loaded.record(self.adapter_name)
            likes: Dict[str, str] = {}
            for name in adapters:
                check_source(name, loaded)
                likes.update((layer_name, name) for layer_name, layer in loaded.layers() if factors(layer, name))
            ranks = sorted((loaded.rank(name) for name in adapters), reverse=True)
            rule = COMBINATION_TYPES[self._options.combination_type].rank
            rank = sum(ranks[:max_sources]) if rule == 'sum' else ranks[0]
            if rule == 'max':
                rank = self._options.svd_rank or rank
            grow(loaded, self.adapter_name, rank, likes, undo)
            undo.pop_all()

    def _sources(self, adapters: Any, weights: Any) -> Tuple[List[str], List[float]]:
        if isinstance(adapters, Mapping):
            if weights is not None:
                raise TypeError('weights is expected to be left out where adapters is a mapping to weights, found '
                                f'{weights!r}.')
            adapters, weights = list(adapters), list(adapters.values())
        elif weights is None and isinstance(adapters, Iterable) and not isinstance(adapters, str):
            adapters = list(adapters)
            weights = [1 / len(adapters) for _ in adapters]
        sources, numbers = check_sources(adapters, weights)
        if self.merge_method == 'selection':
            return [sources[numbers.index(max(numbers))]], [1.0]
        return sources, numbers

    def _refill(self, sources: List[str], weights: List[float]) -> None:
        is_there = self.adapter_name in Adapters.of(self._tuner).configs
        fill = self._tuner.update_weighted_adapter if is_there else self._tuner.add_weighted_adapter
        fill(sources, weights, self.adapter_name, **vars(self._options))

    def _activate(self) -> None:
        if not isinstance(self._tuner, LoraModel):
            self._tuner.set_active_adapters(self.adapter_name)
            return
        layers = Adapters.of(self._tuner).layers()
        if self._model.active_adapters != [self.adapter_name] or any(
                layer.active_adapters != [self.adapter_name] or layer.merged for _, layer in layers):
            self._model.set_adapter(self.adapter_name)
            # PEFT takes an adapter that is switched on for one to be trained.
            for _, layer in layers:
                for parameter in factors(layer, self.adapter_name) or ():
                    parameter.requires_grad_(False)

    def _is_composed(self, sources: List[str], weights: List[float]) -> bool:
        """Whether the fused adapter holds these sources and nothing was written since."""
        last, loaded = self._last, Adapters.of(self._tuner)
        if last is None or (last.sources, last.weights) != (sources, weights):
            return False
        if not loaded.is_fused(self.adapter_name) or loaded.record(self.adapter_name) is not last.record:
            return False
        now = self._tensors(sources)
        return len(now) == len(last.tensors) and all(old[0]() is new[0] and old[1:] == new[1:]
                                                     for old, new in zip(last.tensors, now))

    def _tensors(self, sources: List[str]) -> List[Tuple[Tensor, int, Any, float]]:
        """Returns the tensors of the sources and the fused adapter, with all that tells that they were written to.

        One way of writing is not seen: through `.data`, which counts nothing.
        """
        return [
            # Inference tensors do not count what is written to them, so they are never the same.
            (parameter, parameter.data_ptr(), object() if parameter.is_inference() else parameter._version,
             layer.scaling[adapter]) for _, layer in Adapters.of(self._tuner).layers()
            for adapter in (*sources, self.adapter_name) for parameter in factors(layer, adapter) or ()
        ]
