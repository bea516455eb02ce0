"""What the engine core of vLLM does about adapters that its workers cannot load in a step: their requests fail."""
import logging
import wrapt
from collections import defaultdict
from functools import partial
from typing import Any, Callable, Dict, List

from .stored_mixture import is_mixture
from .worker import add_lora, take_failures

# vLLM shows what its own loggers say, and those below them.
logger = logging.getLogger(f'vllm.{__name__}')

# The attribute of an engine core that says that it loaded an adapter between two steps.
_HAS_LOADED = '_swift_patch_has_loaded'
# The one that says which adapters the last step used.
_USED = '_swift_patch_used'


def install(module: Any) -> None:
    """Has the engine core of this process fail requests whose adapters its workers could not load.

    Args:
        module: `vllm.v1.engine.core`.
    """
    # Not its constructor, in which it loads plugins.
    wrapt.wrap_function_wrapper(module, 'EngineCore.step', _step)
    wrapt.wrap_function_wrapper(module, 'EngineCore.step_with_batch_queue', _step)
    wrapt.wrap_function_wrapper(module, 'EngineCore.add_lora', _add)


def _step(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """Has the scheduler of an engine core ask the workers, from the first step on."""
    scheduler = core.scheduler
    if not isinstance(scheduler.update_from_output, partial):
        scheduler.update_from_output = partial(_updated, core, scheduler.update_from_output)
    return wrapped(*args, **kwargs)


def _add(wrapped: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
    """Has the workers load a mixture. Raises ValueError where one cannot.

    Of an error that a worker raises, vLLM leaves the answers of the other workers in their queues: each call after it
    reads those of the one before, until a queue is full and the engine waits for ever. So it comes as a value.
    """
    # Others may have been put out, which the next step then loads again.
    setattr(core, _HAS_LOADED, True)
    [request] = args or kwargs.values()
    if not is_mixture(request.lora_path):
        return wrapped(*args, **kwargs)
    errors = [error for error in core.model_executor.collective_rpc(add_lora, args=(request, )) if error is not None]
    if errors:
        raise ValueError(errors[0])
    return True


def _updated(core: Any, update: Callable[[Any, Any], Any], step: Any, output: Any) -> Dict[int, Any]:
    """Returns the outputs of a step. Requests whose adapters could not be loaded end with an error."""
    broken = _fail(core) if _may_have_loaded(core, step) else []
    outputs: Dict[int, Any] = update(step, output)
    if not broken:
        return outputs
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    by_client: Dict[int, List[Any]] = defaultdict(list)
    for request in broken:
        by_client[request.client_index].append(
            EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR))
    for client, ended in by_client.items():
        outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(ended)
    return outputs


def _may_have_loaded(core: Any, step: Any) -> bool:
    """Returns whether a step may have loaded mixtures. Its workers are asked then, which takes time."""
    requests = map(core.scheduler.requests.get, step.num_scheduled_tokens)
    used = {request.lora_request for request in requests if request is not None and request.lora_request is not None}
    before = vars(core).get(_USED, set())
    setattr(core, _USED, used)
    # One that comes may put another out, which this step then loads again.
    comes = vars(core).pop(_HAS_LOADED, False) or not used <= before
    return comes and any(is_mixture(lora_request.lora_path) for lora_request in used)


def _fail(core: Any) -> List[Any]:
    """Ends the requests whose adapters could not be loaded, and returns them."""
    from vllm.v1.request import RequestStatus
    failures: Dict[int, str] = {}
    for of_worker in core.model_executor.collective_rpc(take_failures):
        failures.update(of_worker)
    if not failures:
        return []
    scheduler = core.scheduler
    broken = [
        request for request in list(scheduler.requests.values())
        if request.lora_request is not None and request.lora_request.lora_int_id in failures
    ]
    for request in broken:
        logger.error('Request %s fails: %s', request.request_id, failures[request.lora_request.lora_int_id])
        # What was computed without the adapter is found by no later request.
        blocks = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        scheduler.kv_cache_manager.evict_blocks({block for group in blocks for block in group})
    ended: List[Any] = scheduler.finish_requests([request.request_id for request in broken],
                                                 RequestStatus.FINISHED_ERROR)
    return ended
