"""Selection, fusion and mixture of LoRAs, one sample after another (LoraRetriever, arXiv:2402.09997, §4.2)."""
import math
import threading
import torch
import weakref
from contextlib import ExitStack, contextmanager
from numbers import Integral
from operator import attrgetter
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from typing import Any, Iterator, List, Literal, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from .adapters import Adapters, FusedRecord
from .lora_index import factors
from .merging import COMBINATION_TYPES, MergeOptions
from .messages import shown
from .plan import check_names, check_new_name, check_options, check_source, check_sources
from .weighted import new_swift_adapter, remove_adapter, reserve_weighted_adapter

MERGE_METHODS = {'fusion': 'average', 'mixture': 'cat', 'selection': 'linear'}

# One lock per model, not per composer: all composers of a model switch the same layers. It dies with the model.
_locks: 'weakref.WeakKeyDictionary[nn.Module, _ModelLock]' = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


class _ModelLock:
    """Held while a model's layers are switched or a fused adapter is used.

    Attributes:
        lock: the lock.
        held: what a `fused` block holds now: adapter, sources and weights. Only its thread can see it.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.held: Optional[Tuple[str, List[str], List[float]]] = None


class _Composition(NamedTuple):
    """What was composed last, and how to tell that nothing was written since.

    Attributes:
        sources: the sources.
        weights: their weights.
        record: the record of the fused adapter, a new one with each refill.
        parameters: all parameters of the sources and of the fused adapter.
        marks: what changes when they are written to.
        values: what some of the sources' parameters held.
    """
    sources: List[str]
    weights: List[float]
    record: FusedRecord
    parameters: List['weakref.ref[Tensor]']
    marks: List[Any]
    values: List[Tensor]


def merge_options(merge_method: str, combination_type: Optional[str] = None, **options: Any) -> MergeOptions:
    """Returns how a composer with these arguments merges.

    Args:
        merge_method: `fusion`, `mixture` or `selection`.
        combination_type: Any type of `add_weighted_adapter`, instead of `merge_method`.
        **options: The other fields of `MergeOptions`.

    Raises:
        ValueError: An argument is not one of its values, or they do not go together.
    """
    if not isinstance(merge_method, str) or merge_method not in MERGE_METHODS:
        raise ValueError(f'merge_method is expected to be one of {list(MERGE_METHODS)}, found {shown(merge_method)}.')
    if merge_method == 'selection' and combination_type is not None:
        raise ValueError("merge_method 'selection' takes one source alone, so it has no combination_type, found "
                         f'{shown(combination_type)}.')
    name = MERGE_METHODS[merge_method] if combination_type is None else combination_type
    merged = check_options(MergeOptions(combination_type=name, **options))
    if COMBINATION_TYPES[name].needs_density and merged.density is None:
        raise ValueError(f'combination_type {name!r} needs a density, the fraction of values to keep.')
    return merged


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
        TypeError: `model` is none of these, or `adapter_name` is not a string.
        ValueError: An argument is not one of its values, or `adapter_name` is a name that no adapter can have, or is
            taken by one that may not be overwritten.
        RuntimeError: PEFT has no `update_weighted_adapter`: the patch was reverted.

    Example:
        >>> composer = FusionComposer(model)
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
        self._model: Any = getattr(model, '_orig_mod', model) if isinstance(model, nn.Module) else model
        self._tuner: Any = self._model.base_model if isinstance(self._model, PeftModel) else self._model
        _check_applied()
        if not hasattr(type(self._tuner), 'update_weighted_adapter'):
            raise TypeError('model is expected to be a SwiftModel or a PeftModel with LoRAs, found '
                            f'{type(model).__name__}.')
        self._options = merge_options(
            merge_method,
            combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method)
        self.merge_method = merge_method
        self.adapter_name = adapter_name
        loaded = Adapters.of(self._tuner)
        if isinstance(adapter_name, str) and adapter_name in loaded.configs:
            loaded.record(adapter_name)
        else:
            check_new_name(adapter_name)
        self._last: Optional[_Composition] = None
        with _locks_guard:
            self._model_lock = _locks.setdefault(loaded.model, _ModelLock())
        # Mixture and selection are defined by the delta. PEFT's types give it √r times too much for sources with
        # rsLoRA, which is kept where a type is asked for by name.
        self._is_exact = combination_type is None and merge_method != 'fusion'

    def compose(self,
                adapters: Union[Sequence[str], Mapping[str, float]],
                weights: Optional[Sequence[float]] = None) -> str:
        """Fuses `adapters` and makes the fused adapter the only active one (in the calling thread, where ms-swift
        activates by thread). Doing it again with nothing changed does nothing.

        A source that was written to in between is noticed, except for single layers that were written to in place
        through `.data`, which counts nothing: call `update_weighted_adapter` then.

        Args:
            adapters: The names of the sources, or a mapping from names to weights.
            weights: A weight for each source; by default 1/k for each of k.

        Returns:
            The name of the fused adapter.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: The sources cannot be merged, or an adapter is merged into the base weights. The model is as it
                was.
            RuntimeError: the patch was reverted, or a `fused` block of this thread holds something else.
        """
        sources, numbers = self._sources(adapters, weights)
        with self._model_lock.lock, ExitStack() as undo:
            loaded = Adapters.of(self._tuner)
            self._check_usable(sources, numbers, loaded)
            if not self._is_composed(sources, numbers, loaded):
                self._last = None
                # First, for nothing may fail once the adapter is refilled.
                values = [parameter.detach().clone() for parameter in _samples(sources, loaded)]
                self._refill(sources, numbers, undo)
                loaded = Adapters.of(self._tuner)
                parameters, marks = self._written(sources, loaded)
                self._last = _Composition(sources, numbers, loaded.record(self.adapter_name),
                                          list(map(weakref.ref, parameters)), marks, values)
            self._activate()
            undo.pop_all()
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

        Raises:
            RuntimeError: Another `fused` block of this thread holds something else. For the rest see `compose`.
        """
        sources, numbers = self._sources(adapters, weights)
        with self._model_lock.lock:
            name, before = self.compose(sources, numbers), self._model_lock.held
            self._model_lock.held = (name, sources, numbers)
            try:
                yield name
            finally:
                self._model_lock.held = before

    def reserve(self, adapters: Optional[Sequence[str]] = None, max_sources: Optional[int] = None) -> None:
        """Makes the fused adapter large enough for any of `adapters`, so that it never grows (and nothing that was
        compiled or captured with it goes stale).

        Args:
            adapters: The adapters that will be composed; by default all LoRAs that are loaded.
            max_sources: How many of them at most at a time; by default all. Only `cat` needs more rank for more.

        Raises:
            TypeError: `adapters` is not a list of names.
            ValueError: An adapter does not exist, there is none, or `max_sources` is not a positive integer. The model
                is as it was.
        """
        loaded = Adapters.of(self._tuner)
        if adapters is None:
            adapters = [
                name for name, config in loaded.configs.items()
                if isinstance(config, LoraConfig) and not loaded.is_fused(name)
            ]
        sources = check_names(adapters)
        for name in sources:
            check_source(name, loaded)
        is_integer = isinstance(max_sources, Integral) and not isinstance(max_sources, bool)
        if max_sources is not None and not (is_integer and max_sources > 0):
            raise ValueError(f'max_sources is expected to be a positive integer or None, found {shown(max_sources)}.')
        ranks = sorted((loaded.rank(name) for name in sources), reverse=True)
        is_sum = COMBINATION_TYPES[self._options.combination_type].rank == 'sum'
        # A single source keeps its rank whatever `svd_rank` says.
        rank = sum(ranks[:max_sources]) if is_sum else max(ranks[0], self._options.svd_rank or 0)
        with self._model_lock.lock, ExitStack() as undo:
            if self.adapter_name not in loaded.configs:
                self._refill(sources[:1], [0.0], undo)
            loaded = Adapters.of(self._tuner)
            loaded.record(self.adapter_name)
            reserve_weighted_adapter(loaded, self.adapter_name, rank, sources)
            undo.pop_all()

    def _sources(self, adapters: Any, weights: Any) -> Tuple[List[str], List[float]]:
        if isinstance(adapters, Mapping):
            if weights is not None:
                raise TypeError('weights is expected to be left out where adapters is a mapping to weights, found '
                                f'{shown(weights)}.')
            adapters, weights = adapters.keys(), adapters.values()
        elif weights is None:
            adapters = check_names(adapters)
            weights = [1 / len(adapters) for _ in adapters]
        sources, numbers = check_sources(adapters, weights)
        if self.merge_method == 'selection':
            # The others are not merged, so that nothing else would see that they do not exist.
            for name in sources:
                check_source(name, Adapters.of(self._tuner))
            return [sources[numbers.index(max(numbers))]], [1.0]
        return sources, numbers

    def _check_usable(self, sources: List[str], weights: List[float], loaded: Adapters) -> None:
        _check_applied()
        held = self._model_lock.held
        if held is not None and held != (self.adapter_name, sources, weights):
            raise RuntimeError(f'Adapter {held[0]!r} is held by a `fused` block of this thread with {shown(held[1])}: '
                               f'compose {shown(sources)} after that block.')
        for name, layer in loaded.layers():
            if layer.merged:
                raise ValueError(
                    f'Adapters {layer.merged_adapters} are merged into the base weights of layer {name!r}, '
                    'where no other adapter takes effect then: unmerge them first.')

    def _refill(self, sources: List[str], weights: List[float], undo: ExitStack) -> None:
        loaded = Adapters.of(self._tuner)
        if self._is_exact and sources[0] in loaded.configs and getattr(loaded.config(sources[0]), 'use_rslora', False):
            root = math.sqrt(sum(loaded.rank(source) for source in sources if source in loaded.configs))
            weights = [weight / root for weight in weights]
        if self.adapter_name in loaded.configs:
            self._tuner.update_weighted_adapter(sources, weights, self.adapter_name, **vars(self._options))
            return
        if isinstance(self._tuner, LoraModel):
            self._tuner.add_weighted_adapter(sources, weights, self.adapter_name, **vars(self._options))
            undo.callback(self._tuner.peft_config.pop, self.adapter_name)
        else:
            new_swift_adapter(self._tuner, sources, weights, self.adapter_name, **vars(self._options))
            undo.callback(self._tuner.adapters.pop, self.adapter_name)
        undo.callback(remove_adapter, loaded.model, self.adapter_name)

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

    def _is_composed(self, sources: List[str], weights: List[float], loaded: Adapters) -> bool:
        """Whether the fused adapter holds these sources and nothing was written since."""
        last = self._last
        if last is None or (last.sources, last.weights) != (sources, weights):
            return False
        if not loaded.is_fused(self.adapter_name) or loaded.record(self.adapter_name) is not last.record:
            return False
        parameters, marks = self._written(sources, loaded)
        return marks == last.marks and all(old() is new for old, new in zip(last.parameters, parameters)) and all(
            map(torch.equal, last.values, _samples(sources, loaded)))

    def _written(self, sources: List[str], loaded: Adapters) -> Tuple[List[Tensor], List[Any]]:
        """Returns the parameters of the sources and the fused adapter, and what tells that they were written to."""
        parameters, marks = [], []
        for name in (*sources, self.adapter_name):
            found = loaded.blocks(name)
            layout = found.layout
            # Inference tensors do not count what is written to them, so they are never the same.
            versions = [object()] if layout.is_inference else list(map(attrgetter('_version'), found.parameters))
            marks.append((layout.names, layout.addresses, versions, [layer.scaling[name] for layer in layout.layers]))
            parameters.extend(found.parameters)
        return parameters, marks


def _samples(sources: List[str], loaded: Adapters) -> List[Tensor]:
    """Returns the sources' parameters in three of the layers.

    Writing through `.data` counts nothing. Whatever writes a whole adapter so, like PEFT's hotswap, is seen here.
    """
    layers = loaded.layers()
    some = [*layers[:1], *layers[len(layers) // 2:][:1], *layers[-1:]]
    found = (factors(layer, source) for _, layer in some for source in sources)
    # One that is offloaded to the meta device holds nothing, and is another object once it is loaded.
    return [parameter for pair in found for parameter in pair or () if not parameter.is_meta]


def _check_applied() -> None:
    if not hasattr(LoraModel, 'update_weighted_adapter'):
        raise RuntimeError('LoraModel of PEFT is expected to have `update_weighted_adapter`, but the patch was '
                           'reverted, or refuses the releases that are installed: call its `apply()`.')
