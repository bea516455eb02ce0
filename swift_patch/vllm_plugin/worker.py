"""What a worker of vLLM does: it merges mixtures in memory where vLLM would read an adapter from a folder."""
import logging
import torch
import weakref
import wrapt
from typing import Any, Callable, Dict, List, Optional, Set

from ..compose.composer import FusionComposer
from ..errors import joined, reason_of
from ..lora.checkpoint import LINEAR_SEGMENTS, PEFT_PREFIX, join_key
from ..lora.library import AdapterLibrary
from ..model.arrangement import Arrangement, FlatFactors
from .settings import CACHE_BYTES, positive_integer
from .skeleton import skeleton_of
from .stored_mixture import StoredMixture, digest_of, is_mixture

# vLLM shows what its own loggers say, and those below them.
logger = logging.getLogger(f'vllm.{__name__}')

_DEFAULT_CACHE_BYTES = 2**32
# The attribute of vLLM's manager that its merger is.
_MERGER = '_swift_patch_merger'

# By number, why adapters could not be loaded in steps of the engine. Of this process.
_failures: Dict[int, str] = {}


def install(module: Any) -> None:
    """Has the workers of this process merge mixtures.

    Args:
        module: `vllm.lora.worker_manager`.
    """
    for method, wrapper in (('create_lora_manager', _create), ('_load_adapter', _load), ('set_active_adapters', _step)):
        for manager in ('WorkerLoRAManager', 'LRUCacheWorkerLoRAManager'):
            if method in vars(getattr(module, manager)):
                wrapt.wrap_function_wrapper(module, f'{manager}.{method}', wrapper)


def add_lora(worker: Any, request: Any) -> Optional[str]:
    """Has a worker load an adapter, and returns why it cannot.

    Args:
        worker: what vLLM gives to a function that it calls in its workers.
        request: vLLM's request for it.
    """
    try:
        worker.add_lora(request)
        return None
    except Exception as e:
        return str(e) if isinstance(e, ValueError) else reason_of(e)


def take_failures(worker: Any) -> Dict[int, str]:
    """Returns, by number, why adapters could not be loaded in steps of the engine since this was asked last.

    Args:
        worker: what vLLM gives to a function that it calls in its workers.
    """
    found = dict(_failures)
    _failures.clear()
    return found


def _create(wrapped: Callable[..., Any], manager: Any, args: Any, kwargs: Any) -> Any:
    """Gives a manager its merger, once there is a model."""
    found = wrapped(*args, **kwargs)
    vllm_config = kwargs.get('vllm_config') or args[1]
    setattr(manager, _MERGER, Merger(manager, vllm_config.model_config))
    return found


def _load(wrapped: Callable[..., Any], manager: Any, args: Any, kwargs: Any) -> Any:
    """Merges a mixture, and leaves other adapters to vLLM."""
    [request] = args or kwargs.values()
    if not is_mixture(request.lora_path):
        return wrapped(*args, **kwargs)
    merger: Merger = getattr(manager, _MERGER)
    try:
        return merger.load(request)
    except Exception as e:
        if not merger.is_in_step:
            raise
        # It would end the engine, with all requests. Those for this adapter fail when the step has ended.
        _failures[request.lora_int_id] = reason_of(e)
        logger.error('Adapter %s cannot be loaded: %s', request.lora_name, _failures[request.lora_int_id])
        return merger.placeholder(request.lora_int_id)


def _step(wrapped: Callable[..., Any], manager: Any, args: Any, kwargs: Any) -> Any:
    """Notes that adapters are loaded in a step of the engine now."""
    merger: Merger = getattr(manager, _MERGER)
    merger.remove_placeholders()
    merger.is_in_step = True
    try:
        return wrapped(*args, **kwargs)
    finally:
        merger.is_in_step = False


class Merger:
    """Merges mixtures for one of vLLM's managers of adapters.

    Args:
        manager: vLLM's `WorkerLoRAManager`.
        model_config: vLLM's config of the model.

    Attributes:
        is_in_step: whether adapters are loaded in a step of the engine, which an error would end.
    """

    def __init__(self, manager: Any, model_config: Any):
        self._manager, self._model_config = manager, model_config
        self._library = AdapterLibrary(cache_bytes=positive_integer(CACHE_BYTES, _DEFAULT_CACHE_BYTES))
        self._composer: Any = None
        self._names: 'weakref.WeakKeyDictionary[Arrangement, List[str]]' = weakref.WeakKeyDictionary()
        self._placeholders: Set[int] = set()
        self.is_in_step = False

    def load(self, request: Any) -> Any:
        """Returns vLLM's `LoRAModel` of a mixture.

        Raises:
            ValueError: it cannot be merged, is not what it was when it was asked for, or vLLM cannot take it.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights
        factors = self._merged(StoredMixture.parse(request.lora_path), request.lora_int_id)
        layout = factors.layout
        rank, max_rank = layout.rank, self._manager.lora_config.max_lora_rank
        if rank > max_rank:
            raise ValueError(f'A fusion of rank {max_rank} at most is expected, found {rank}: start vLLM with a larger '
                             '--max-lora-rank.')
        loras = {}
        of_layers = zip(self._names_in_vllm(layout), layout.shapes, factors.every(), factors.scalings)
        for name, (shape, _), (A, B), scaling in of_layers:
            # vLLM multiplies B by the scaling, in place.
            loras[name] = LoRALayerWeights(name, shape[0], shape[0], A, B, scaling)
        return LoRAModel(request.lora_int_id, rank, loras)

    def placeholder(self, lora_id: int) -> Any:
        """Returns an adapter that adds nothing, for the rest of a step."""
        self._placeholders.add(lora_id)
        manager = self._manager
        return manager._adapter_manager.create_dummy_lora(lora_id, 1, manager.embedding_modules)

    def remove_placeholders(self) -> None:
        """Removes what was loaded in the place of adapters."""
        while self._placeholders:
            self._manager.remove_adapter(self._placeholders.pop())

    def _merged(self, mixture: StoredMixture, seed: int) -> FlatFactors:
        library = self._library
        for source in mixture.sources:
            if source.name not in library or str(library.path(source.name)) != source.folder:
                library.put(source.name, source.folder)
        if self._composer is None:
            # Not before there is a mixture: an engine may serve adapters from folders alone.
            config = self._model_config
            self._composer = FusionComposer(skeleton_of(config.hf_config, config.dtype), library=library)
        before = [library.stored(source.name) for source in mixture.sources]
        for stored, source in zip(before, mixture.sources):
            if digest_of(stored) != source.digest:
                raise ValueError(f'Adapter {source.name!r} is expected to be what it was when the request came, found '
                                 'other files: ask again.')
        # By the number of the request, all workers draw the same masks.
        found: FlatFactors = self._composer.merged(mixture.composition, seed)
        if any(library.stored(stored.checkpoint.name) is not stored for stored in before):
            raise ValueError('Adapters are expected to stay as they are while they are merged, found other files '
                             'meanwhile: ask again.')
        memory = {kind: self._for_vllm(tensor) for kind, tensor in found.memory.items()}
        return FlatFactors(found.layout, memory, found.scalings)

    def _for_vllm(self, memory: torch.Tensor) -> torch.Tensor:
        """Returns memory in vLLM's dtype for adapters: PEFT computes those of half precision in float32."""
        from vllm.utils import torch_utils
        found = memory.to(self._manager.lora_config.lora_dtype)
        # vLLM would pin each factor by itself, which takes longer than merging.
        return found.pin_memory() if torch_utils.PIN_MEMORY else found

    def _names_in_vllm(self, layout: Arrangement) -> List[str]:
        """Returns what vLLM calls the layers. Raises ValueError where it takes no adapters in one."""
        found = self._names.get(layout)
        if found is None:
            from vllm.lora.utils import parse_fine_tuned_lora_name
            adapters = self._manager._adapter_manager
            mapper = getattr(adapters.model, 'hf_to_vllm_mapper', None)
            # What it stacks are the parts of layers, which adapters have each by its own.
            mapper = None if mapper is None else mapper.get_rename_mapper()
            keys = [PEFT_PREFIX + join_key(name, LINEAR_SEGMENTS[0]) for name in layout.names]
            found = [parse_fine_tuned_lora_name(key, mapper)[0] for key in keys]
            taken = {
                part
                for module in adapters.supported_lora_modules
                for part in (module, *adapters.packed_modules_mapping.get(module, ()))
            }
            others = [name for name in found if _kind_of(name) not in taken]
            if others:
                raise ValueError(
                    f'Adapters are expected in the layers in which vLLM takes them, {joined(sorted(taken))}, '
                    f'found some in {joined(others)}.')
            self._names[layout] = found
        return found


def _kind_of(name: str) -> str:
    """Returns how vLLM calls layers of one kind."""
    at = name.find('.experts')
    return name[at + 1:] if at >= 0 else name.rpartition('.')[2]
