"""Selection, fusion and mixture of LoRAs, one sample after another (LoraRetriever, arXiv:2402.09997, §4.2)."""
import threading
import torch
from contextlib import contextmanager
from functools import partial
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from typing import Any, Iterable, Iterator, List, Literal, Mapping, Optional, Sequence, Tuple, Union

from ..errors import RowsError, short_repr
from ..lora.combination import COMBINATION_TYPES, options_of_method
from ..lora.composition import Composition, check_names
from ..lora.library import AdapterLibrary
from ..lora.numbers import check_positive, checked_seeds
from ..lora.paths import PathLike
from ..model.adapters import Adapters
from ..model.arrangement import FlatFactors
from ..model.checks import check_new_name
from ..model.layers import is_active_alone, parameters_of
from ..model.merged import merged
from ..model.refill import add, make_room, refill, refill_rows
from ..model.sources import Sources
from ..model.tuner import tuner_around, tuner_of
from ..model.undo import Undo
from .locks import lock_of
from .policy import every_source, exact, some_source, told

# What a sample of a batch names: adapters, adapters with weights, a pair of adapters and weights, or a composition that
# `FusionComposer.composition` returned.
Sample = Union[Sequence[str], Mapping[str, float], Tuple[Sequence[str], Optional[Sequence[float]]], Composition]


class FusionComposer:
    """Merges the LoRAs that fit a sample into one fused adapter and activates it, sample by sample.

    The first call makes the fused adapter and all later ones refill it in place, so that every sample costs the same.

    Args:
        model: A `SwiftModel` or a `PeftModel` (or its `LoraModel`) with the LoRAs loaded. With a library, any model:
            its layers are wrapped in place when something is composed first, and its weights frozen, as PEFT does.
        merge_method: `fusion` averages the parameters (`average`), `mixture` the outputs (`cat`), `selection` takes
            the heaviest source alone.
        combination_type: Any type of `add_weighted_adapter`, instead of `merge_method`.
        adapter_name: The name of the fused adapter.
        library: Adapters on disk, which are merged from there. A source is looked for in it, then in the model.
        rank_by_batch: Whether the rows of `compose_batch` have the rank that their batch needs, not that of the fused
            adapter. The fused adapter does not grow in rank for a batch then: one `mixture` of many adapters makes no
            later batch slower. Leave it off where graphs are compiled or captured, for what the layers read has
            another shape from batch to batch.
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
                 library: Optional[AdapterLibrary] = None,
                 rank_by_batch: bool = False,
                 svd_rank: Optional[int] = None,
                 svd_clamp: Optional[float] = None,
                 svd_driver: Optional[str] = None,
                 density: Optional[float] = None,
                 majority_sign_method: Literal['total', 'frequency'] = 'total'):
        # Any model that torch.compile wrapped; the layers are the same.
        self._model: Any = getattr(model, '_orig_mod', model) if isinstance(model, nn.Module) else model
        self._tuner: Any = tuner_of(self._model)
        _check_applied()
        if library is not None and not isinstance(library, AdapterLibrary):
            raise TypeError(f'library is expected to be an AdapterLibrary, found {short_repr(library)}.')
        if not hasattr(type(self._tuner), 'update_weighted_adapter'):
            if library is None or not isinstance(self._tuner, nn.Module) or isinstance(self._tuner, BaseTuner):
                raise TypeError('model is expected to be a SwiftModel or a PeftModel with LoRAs, or any model with a '
                                f'library, found {type(model).__name__}{"" if library is None else " and a library"}.')
            self._model = self._tuner = tuner_around(self._tuner)
        self._library = library
        self._options_of = partial(
            options_of_method,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method)
        self._options = self._options_of(merge_method, combination_type)
        self.merge_method = merge_method
        self.rank_by_batch = rank_by_batch
        self.adapter_name = adapter_name
        found = self._look()
        if isinstance(adapter_name, str) and adapter_name in found.configs:
            found.record(adapter_name)
        else:
            check_new_name(adapter_name)
        self._model_lock = lock_of(found.model)

    def composition(self,
                    adapters: Union[Sequence[str], Mapping[str, float]],
                    weights: Optional[Sequence[float]] = None,
                    merge_method: Optional[str] = None) -> Composition:
        """Returns what a batch takes as a sample, checked, and with a merge method of its own.

        Args:
            adapters: See `compose`.
            weights: See `compose`.
            merge_method: `fusion`, `mixture` or `selection`; by default as this composer merges.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: A weight is not finite, there are not as many as sources, there are no sources, or the
                merge method is none. Whether there are such adapters is not looked at.
        """
        options = self._options if merge_method is None else self._options_of(merge_method)
        return Composition.of_sample(adapters, weights, options)

    def composition_of(self, sample: Optional[Sample]) -> Composition:
        """Returns the composition of what `compose_batch` takes for a sample, checked. None is the base model.

        Raises:
            TypeError: See `composition`.
            ValueError: See `composition`.
        """
        [found] = Composition.of_batch([sample], self._options)
        return found

    @property
    def lock(self) -> threading.RLock:
        """What all composers of the model hold while they compose, and in a `fused` block."""
        return self._model_lock.lock

    def compose(self,
                adapters: Union[Sequence[str], Mapping[str, float]],
                weights: Optional[Sequence[float]] = None) -> str:
        """Fuses `adapters` and makes the fused adapter the only active one (in the calling thread, where ms-swift
        activates by thread).

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
        with self._model_lock.lock:
            self._compose([Composition.of_sample(adapters, weights, self._options)])
        return self.adapter_name

    def compose_batch(self, samples: Iterable[Optional[Sample]], seeds: Optional[Sequence[int]] = None) -> str:
        """Gives each row of a batch its own fusion, and makes the fused adapter the only active one.

        Until the next `compose` or `compose_batch`, row i of what goes through the model is computed as after
        `compose(samples[i])`. Where each row comes n times in a row (beams, several return sequences), so does its
        fusion. A batch of another size is refused by the first layer. A fusion that is that of all rows serves any
        number of rows.

        Args:
            samples: For each row what `compose` takes: names, a mapping from names to weights, or a pair of names and
                weights; or what `composition` returned. None for the base model alone.
            seeds: For each row an integer from 0 to 2**63 - 1, with which torch's random numbers begin, for types that
                draw some. By default they go on from row to row.

        Returns:
            The name of the fused adapter.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: The sources of a sample cannot be merged, layers cannot have rows (`RowsError`), or an adapter
                is merged into the base weights. The model is as it was.
            RuntimeError: See `compose`.
        """
        compositions = Composition.of_batch(samples, self._options)
        seeds = checked_seeds(seeds, len(compositions))
        with self._model_lock.lock:
            self._compose(compositions, seeds, self.rank_by_batch)
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
        with self._held([Composition.of_sample(adapters, weights, self._options)]):
            yield self.adapter_name

    @contextmanager
    def fused_batch(self, samples: Iterable[Optional[Sample]], seeds: Optional[Sequence[int]] = None) -> Iterator[str]:
        """Composes a batch, and holds the fused adapter for the time of the `with` block.

        Args:
            samples: See `compose_batch`.
            seeds: See `compose_batch`.

        Yields:
            The name of the fused adapter.

        Raises:
            RuntimeError: See `fused`. For the rest see `compose_batch`.
        """
        compositions = Composition.of_batch(samples, self._options)
        with self._held(compositions, checked_seeds(seeds, len(compositions)), self.rank_by_batch):
            yield self.adapter_name

    def activate(self) -> None:
        """Makes the fused adapter the only active one in the calling thread, where ms-swift activates by thread.

        For a thread that computes on behalf of one that holds a `fused` block. Nothing is composed.

        Raises:
            ValueError: Nothing was composed yet.
        """
        adapters = self._look()
        adapters.record(self.adapter_name)
        self._activate(adapters)

    def reserve(self,
                adapters: Optional[Sequence[str]] = None,
                max_sources: Optional[int] = None,
                max_rows: Optional[int] = None) -> None:
        """Makes the fused adapter large enough for any of `adapters`, so that it never grows (and nothing that was
        compiled or captured with it goes stale).

        Args:
            adapters: The adapters that will be composed; by default all of the library, and all LoRAs that are loaded.
                Those of the library are asked for their configs alone.
            max_sources: How many of them at most at a time; by default all. Only `cat` needs more rank for more.
            max_rows: How many rows a batch of `compose_batch` has at most: memory for them is made, too. A batch with
                fewer rows costs what these need. By default none is made now, and as much as a batch needs later. With
                `rank_by_batch`, fewer rows of a larger rank fit there, too: a `composition` may have another merge
                method, of which nothing is known here.

        Raises:
            TypeError: `adapters` is not a list of names.
            ValueError: An adapter does not exist, there is none, or a number is not a positive integer. The model is as
                it was.
        """
        for argument, value in (('max_sources', max_sources), ('max_rows', max_rows)):
            if value is not None:
                check_positive(argument, value)
        names = None if adapters is None else check_names(adapters)
        with self._model_lock.lock, Undo() as undo:
            found = self._look()
            sources = Sources(found)
            if names is None:
                names = every_source(sources)
            rank = self._largest_rank(sources, names, max_sources)
            if self.adapter_name not in found.configs:
                found = self._added(found, names[0], undo)
            found.record(self.adapter_name)
            make_room(found, self.adapter_name, rank, sources, names, max_rows or 0)
            undo.commit()

    def largest_rank(self, adapters: Optional[Sequence[str]] = None, max_sources: Optional[int] = None) -> int:
        """Returns the largest rank that a fusion of any of `adapters` has, by their configs.

        Args:
            adapters: See `reserve`.
            max_sources: See `reserve`.

        Raises:
            TypeError: See `reserve`.
            ValueError: An adapter does not exist or does not fit the model, or there is none.
        """
        names = None if adapters is None else check_names(adapters)
        with self._model_lock.lock:
            sources = Sources(self._look())
            return self._largest_rank(sources, every_source(sources) if names is None else names, max_sources)

    def merged(self, composition: Composition, seed: Optional[int] = None, with_values: bool = True) -> FlatFactors:
        """Returns what a new adapter would hold, for who keeps adapters elsewhere. The model stays as it is.

        The model may be on the meta device, where the library has the values.

        Args:
            composition: What `composition` returned.
            seed: What random masks of values on the CPU come from; by default torch's random numbers go on.
            with_values: Whether values are read and merged. Everything else is checked all the same.

        Returns:
            A and B of each layer in flat memory, and the scaling that goes with them.

        Raises:
            ValueError: The sources cannot be merged this way.
        """
        with self._model_lock.lock:
            adapters = self._look()
            [composition] = exact([composition], Sources(adapters))
            return merged(adapters, composition, seed, with_values)

    def check(self, adapters: Optional[Sequence[str]] = None) -> None:
        """Checks that adapters can be composed, by configs and headers of files: values are not read.

        Args:
            adapters: Their names; by default all of the library, and all LoRAs that are loaded.

        Raises:
            TypeError: `adapters` is not a list of names.
            ValueError: Some cannot. It tells of all of them.
        """
        names = None if adapters is None else check_names(adapters)
        problems = []
        with self._model_lock.lock:
            sources = Sources(self._look())
            for name in every_source(sources) if names is None else names:
                try:
                    sources.check(name)
                except ValueError as e:
                    problems.append(str(e))
        if problems:
            raise ValueError('\n'.join(problems))

    def check_checkpoint(self, name: str, path: PathLike) -> None:
        """Checks that an adapter could be composed if the library had it, see `check`.

        Args:
            name: What it would be called.
            path: Its checkpoint.

        Raises:
            TypeError: See `AdapterLibrary`.
            ValueError: See `AdapterLibrary`, or it cannot be composed.
        """
        with self._model_lock.lock:
            Sources(Adapters.of(self._tuner, AdapterLibrary({name: path}))).check(name)

    def _largest_rank(self, sources: Sources, names: Sequence[str], max_sources: Optional[int]) -> int:
        for name in sources.of_model(names):
            sources.check(name)
        combination = COMBINATION_TYPES[self._options.combination_type]
        return combination.largest_rank([sources.rank(name) for name in names], max_sources, self._options.svd_rank)

    def _look(self) -> Adapters:
        """Returns the adapters as they are now."""
        if self._library is not None and self.adapter_name in self._library:
            raise ValueError(f'adapter_name is expected not to be that of an adapter of the library, found '
                             f'{short_repr(self.adapter_name)}: choose another one.')
        return Adapters.of(self._tuner, self._library)

    @contextmanager
    def _held(self,
              compositions: List[Composition],
              seeds: Optional[List[int]] = None,
              rank_by_batch: bool = False) -> Iterator[None]:
        """Composes, and holds the lock and what was composed for the time of the `with` block."""
        with self._model_lock.lock:
            self._compose(compositions, seeds, rank_by_batch)
            before = self._model_lock.held
            self._model_lock.held = (self.adapter_name, compositions, seeds)
            try:
                yield
            finally:
                self._model_lock.held = before

    def _compose(self,
                 compositions: List[Composition],
                 seeds: Optional[List[int]] = None,
                 rank_by_batch: bool = False) -> None:
        """Fills the fused adapter or its rows, and activates it. The lock is held."""
        _check_applied()
        adapters = self._look()
        held = self._model_lock.held
        if held is not None and held != (self.adapter_name, compositions, seeds):
            raise RuntimeError(
                f'A `fused` block of this thread is expected to keep {told(held[1])} in adapter {held[0]!r}, found '
                f'that {told(compositions)} shall be composed: do that after that block.')
        if adapters.merged:
            name, layer = adapters.merged[0]
            raise ValueError(
                f'Layer {name!r} is expected to have nothing merged into its base weights, where no other adapter '
                f'takes effect then, found adapters {layer.merged_adapters}: unmerge them first.')
        with Undo() as undo:
            # What is held is in the adapter, where random masks drawn anew would replace it.
            if held is None:
                if any(composition.options.merge_method is not None for composition in compositions):
                    compositions = exact(compositions, Sources(adapters))
                adapters = self._filled(adapters, compositions, seeds, undo, rank_by_batch)
            self._activate(adapters)
            undo.commit()

    def _filled(self, adapters: Adapters, compositions: List[Composition], seeds: Optional[Sequence[int]], undo: Undo,
                rank_by_batch: bool) -> Adapters:
        """Fills the fused adapter, which is made where there is none, and returns the adapters as they are then.

        Its rows are filled where there are several fusions, or where they shall have the rank of their batch.
        """
        name, first = self.adapter_name, compositions[0]
        if compositions.count(first) == len(compositions) and not first.combination.is_random:
            # What all rows share serves any number of rows.
            compositions = compositions[:1]
        is_plain = len(compositions) == 1 and not first.is_base
        if name in adapters.configs:
            adapters.record(name)
        elif is_plain and seeds is None and not rank_by_batch:
            return add(adapters, first, name, undo)
        else:
            adapters = self._added(adapters, some_source(Sources(adapters), compositions), undo)
        if rank_by_batch or not is_plain:
            try:
                return refill_rows(adapters, compositions, name, undo, seeds, rank_by_batch)
            except RowsError:
                if not is_plain:
                    raise
                # What all rows share needs no rows. What was found before may be of a growth that was undone.
                adapters = self._look()
        if seeds is not None:
            torch.manual_seed(seeds[0])
        return refill(adapters, first, name, undo)

    def _added(self, adapters: Adapters, source: str, undo: Undo) -> Adapters:
        """Makes a fused adapter of zeros, like a source, and returns the adapters as they are then."""
        composition = Composition.of([source], [0.0], self._options)
        return add(adapters, composition, self.adapter_name, undo, with_values=False)

    def _activate(self, adapters: Adapters) -> None:
        name = self.adapter_name
        if not isinstance(self._tuner, LoraModel):
            # Only ms-swift has other tuners; PEFT alone shall not need it.
            from ..model.activation import activate_alone
            activate_alone(adapters, name)
            return
        layers = [layer for _, layer in adapters.layers]
        if not (self._model.active_adapters == [name] and is_active_alone(layers, name)):
            self._model.set_adapter(name)
            # PEFT takes an adapter that is switched on for one to be trained.
            for layer in layers:
                for parameter in parameters_of(layer, name):
                    parameter.requires_grad_(False)


def _check_applied() -> None:
    if not hasattr(LoraModel, 'update_weighted_adapter'):
        raise RuntimeError('LoraModel of PEFT is expected to have `update_weighted_adapter`, but the patch was '
                           'reverted, or refuses the releases that are installed: call `swift_patch.apply()`.')
