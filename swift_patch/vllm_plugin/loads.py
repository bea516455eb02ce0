"""Which adapters the engine has: it is asked to load each once, before a request for it enters a batch."""
import asyncio
from collections import OrderedDict
from typing import Any
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from ..errors import reason_of

# How long an engine that was asked something may be silent before it is looked whether it has ended.
_SECONDS_OF_LOOKING = 1.


class Loads:
    """What the engine was asked to load, in one event loop.

    Args:
        engine: vLLM's client of the engine.
        max_loaded: how many adapters its workers keep.
    """

    def __init__(self, engine: Any, max_loaded: int):
        self._engine, self._max_loaded = engine, max_loaded
        # By number. The engine puts others out in about this order.
        self._tasks: 'OrderedDict[int, asyncio.Task[None]]' = OrderedDict()

    def __len__(self) -> int:
        return len(self._tasks)

    async def load(self, lora_request: LoRARequest) -> None:
        """Has the engine load an adapter, unless it was asked to already, and waits until it has.

        Raises:
            EngineDeadError: the engine ended.
            ValueError: the adapter cannot be loaded; the next request for it tries again.
        """
        number = lora_request.lora_int_id
        task = self._tasks.get(number)
        if task is None:
            task = self._tasks[number] = asyncio.ensure_future(self._load(lora_request))
            # Where everybody who waits goes away, nobody asks what came of it.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            while len(self._tasks) > self._max_loaded:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(number)
        # Others may wait for it, too.
        await asyncio.shield(task)

    async def _load(self, lora_request: LoRARequest) -> None:
        try:
            await self._asked(lora_request)
        except BaseException:
            # It may have been put out, and asked for again.
            if self._tasks.get(lora_request.lora_int_id) is asyncio.current_task():
                del self._tasks[lora_request.lora_int_id]
            raise

    async def _asked(self, lora_request: LoRARequest) -> None:
        asked = asyncio.ensure_future(self._engine.add_lora(lora_request))
        # One that ends meanwhile may never say anything.
        while not asked.done() and not self._engine.errored:
            await asyncio.wait((asked, ), timeout=_SECONDS_OF_LOOKING)
        if not asked.done() or asked.cancelled():
            asked.cancel()
            raise EngineDeadError()
        error = asked.exception()
        if isinstance(error, EngineDeadError) or error is not None and self._engine.errored:
            raise EngineDeadError() from error
        if error is not None:
            # What a worker raises comes as text of an error of another kind.
            raise ValueError(str(error).partition('method failed: ')[2] or reason_of(error)) from error
