"""ms-swift's own engine, in which every request of a batch has its own composition of adapters."""
import logging
import math
import secrets
import time
import torch
import traceback
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from transformers import StoppingCriteriaList
from typing import Any, Callable, Coroutine, Dict, Iterable, Iterator, List, Optional, Sequence, TypeVar

from ..errors import RowsError, short_repr
from ..futures import settled
from ..lora.numbers import check_positive, derived_seed
from ..ms_swift import TEMPLATE_MODE, TransformersEngine, get_engine
from .composer import FusionComposer, Sample
from .requests import ComposedInference, ComposedRequest, EncodedRequest
from .streams import NOTHING, Client, Mailbox, Stream, checked
from .tickets import UntilAbandoned

logger = logging.getLogger(__name__)

_T = TypeVar('_T')

# How long an engine that had nothing to do waits for more requests after one came: those of one moment make one batch.
_SECONDS_OF_GATHERING = 0.004


class FusionEngine(ComposedInference, TransformersEngine):  # type: ignore[misc]  # ms-swift has no types
    """ms-swift's engine around one model with LoRAs, in which each request of a batch has its own fusion of them.

    Requests with different compositions, with a single adapter and with none at all are answered in one batch. What
    cannot be batched (layers that get the tokens of all rows in one heap) is answered one by one, which is logged once.

    Args:
        model: A `SwiftModel` or a `PeftModel` with the LoRAs loaded, or any model with a library of them.
        template: ms-swift's template of the model.
        max_batch_size: How many requests are answered together at most, each of the answers to one counted; it is
            halved where memory does not suffice.
        **composer_args: Arguments of `FusionComposer`: `library`, `merge_method`, `combination_type`, ... By default
            `rank_by_batch` is on, for no graphs are captured: turn it off where the model is compiled.

    Attributes:
        composer: the composer.
        seconds_composing: the seconds that composing took since the engine was made.
        seconds_generating: the seconds that answering took besides.
        on_batch: called with the size of each batch before it is answered, in the thread that answers.
        merges_here: True: adapters are read and merged in this process.

    Raises:
        TypeError: See `FusionComposer`.
        ValueError: See `FusionComposer`, or `max_batch_size` is not positive.

    Example:
        >>> engine = FusionEngine(model, template)
        >>> engine.infer(requests, RequestConfig(max_tokens=64), compositions=[['sql', 'math'], {'legal': 1.0}, None])
    """

    merges_here = True

    def __init__(self, model: torch.nn.Module, template: Any, *, max_batch_size: int = 16, **composer_args: Any):
        check_positive('max_batch_size', max_batch_size)
        self.composer = FusionComposer(model, **{'rank_by_batch': True, **composer_args})
        # A copy, for what generates is replaced in it; the user's stays as it is, also where it is another engine's.
        template = copy(template)
        vars(template).pop('generate', None)
        # The constructors of ms-swift 3 and 4 differ; what they make does not.
        self.__dict__.update(get_engine(model, template, max_batch_size=max_batch_size).__dict__)
        self.template = template
        self.seconds_composing = self.seconds_generating = 0.
        self.on_batch: Callable[[int], None] = lambda size: None
        self._waiting: List[Any] = []
        self._batch: Sequence[ComposedRequest] = ()
        self._has_told_of_rows = False
        self._stream = Stream()
        self._generate, template.generate = template.generate, self._generate_guarded
        if self.task_type == 'causal_lm':
            template.set_mode(TEMPLATE_MODE)

    def reserve(self, adapters: Optional[Sequence[str]] = None, max_sources: Optional[int] = None) -> None:
        """Makes room for any batch of `max_batch_size` requests, which is halved where memory does not suffice.

        The fused adapter becomes the only active one, which takes longest the first time.

        Args:
            adapters: See `FusionComposer.reserve`.
            max_sources: See `FusionComposer.reserve`.

        Raises:
            ValueError: See `FusionComposer.reserve`.
        """
        while True:
            try:
                self.composer.reserve(adapters, max_sources, self.max_batch_size)
                self.composer.activate()
                return
            except Exception as e:
                if self.max_batch_size == 1 or not is_out_of_memory(e):
                    raise
            self._halve(self.max_batch_size)

    @property
    def is_alive(self) -> bool:
        """Whether it can answer: the thread that answers has not ended."""
        return self._task_thread is None or self._task_thread.is_alive()

    def fresh_seed(self) -> int:
        """Returns the seed of a request that brings none: those of a batch are seeded all, or none."""
        return secrets.randbits(63)

    def submit(self, coroutine: 'Coroutine[Any, Any, _T]') -> 'Future[_T]':
        """Runs a coroutine that asks the engine to its end, also where this thread has a loop that runs."""
        return settled(lambda: self.safe_asyncio_run(coroutine))

    def close(self, seconds: float) -> None:
        """Waits until no batch is being answered, at most so many seconds."""
        lock = self.composer.lock
        if lock.acquire(timeout=seconds):
            lock.release()

    async def infer_async(self,
                          infer_request: Any,
                          request_config: Any = None,
                          *,
                          composition: Optional[Sample] = None,
                          **kwargs: Any) -> Any:
        """Answers a request in a batch with others that wait, whatever their compositions.

        A thread of the engine's computes. On few cores, load the model in a thread that ends: OpenMP slows down where
        threads of another one, which computed before, still wait.

        Args:
            infer_request: The request.
            request_config: How to generate. Requests whose configs differ are not batched.
            composition: What `FusionComposer.compose` takes, None for the base model.
            **kwargs: See ms-swift.

        Returns:
            The response; an asynchronous iterator of chunks where `request_config` asks for a stream.

        Raises:
            Exception: What was wrong with this request. The others of its batch are answered.
        """
        if not isinstance(infer_request, ComposedRequest):
            infer_request = ComposedRequest(infer_request, composition)
        response = await super().infer_async(infer_request, request_config, **kwargs)
        if isinstance(response, Exception):
            raise response
        return checked(response) if hasattr(response, '__aiter__') else response

    def _get_adapter_names(self, adapter_request: Any) -> None:
        """Returns None, for PEFT's `adapter_names` have no part in this. Raises ValueError where one is asked for."""
        if adapter_request is not None:
            raise ValueError(
                f'adapter_request is expected to be left out, found {short_repr(adapter_request)}: load the '
                'adapter into the model or add it to the library, and name it in a composition.')

    def _batch_encode(self, infer_requests: List[Any], *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        plain = [request for request in infer_requests if not isinstance(request, EncodedRequest)]
        # Where stock leaves a request out of a batch, the others would get each other's rows.
        found = iter(super()._batch_encode(plain, *args, strict=True, **kwargs)[0] if plain else ())
        return [
            # What is made of it takes parts of it out.
            dict(request.inputs) if isinstance(request, EncodedRequest) else next(found) for request in infer_requests
        ], []

    def _fetch_infer_requests(self) -> Any:
        """Waits for a request, and returns the oldest one that waits with others of the same settings, in the order in
        which they came."""
        if not self._waiting:
            self._waiting.append(self._queue.get())
            time.sleep(_SECONDS_OF_GATHERING)
        while not self._queue.empty():
            self._waiting.append(self._queue.get())
        self._waiting = [item for item in self._waiting if not _is_abandoned(item[0])]
        if not self._waiting:
            return None
        settings = self._waiting[0][1]
        config = settings['request_config']
        size = max(1, self.max_batch_size // max(config.n, config.num_beams))
        batch: List[Any] = []
        rest: List[Any] = []
        longest = 0
        for item in self._waiting:
            length = max(longest, self._length(item[0]))
            # Padded to the longest prompt, all have the room for tokens that this one leaves.
            fits = not batch or length + (config.max_tokens or 0) <= (self.max_model_len or math.inf)
            if len(batch) < size and item[1] == settings and fits:
                batch.append(item)
                longest = length
            else:
                rest.append(item)
        self._waiting = rest
        clients = [(Mailbox(queue), Client(loop)) for _, _, (queue, loop) in batch]
        return {**settings, 'infer_requests': [request for request, _, _ in batch], 'is_for_mailboxes': True}, clients

    def _length(self, request: Any) -> int:
        """Returns the tokens of a request that waits, 0 where it is not encoded yet."""
        encoded = request.request if isinstance(request, ComposedRequest) else request
        return int(self._get_num_tokens(encoded.inputs)) if isinstance(encoded, EncodedRequest) else 0

    def _infer(self,
               infer_requests: List[Any],
               request_config: Any,
               *,
               is_for_mailboxes: bool = False,
               **kwargs: Any) -> Any:
        """Answers one batch. What is wrong with a request takes the place of its response."""
        self.on_batch(len(infer_requests))
        for item in infer_requests:
            if item.ticket is not None:
                item.ticket.start(len(infer_requests))
        if request_config.stream:
            streamed = self._streamed(infer_requests, request_config, kwargs)
            return map(_without_gaps, streamed) if is_for_mailboxes else streamed
        return self._answered(infer_requests, request_config, kwargs)

    def _answered(self, batch: List[ComposedRequest], request_config: Any, kwargs: Dict[str, Any]) -> List[Any]:
        try:
            with self._composed(batch):
                found: List[Any] = super()._infer([item.request for item in batch], request_config, **kwargs)
                return found
        except Exception as e:
            error = self._told(e, batch)
        if len(batch) == 1:
            return [error]
        return [
            response for part in self._parts(batch, error) for response in self._answered(part, request_config, kwargs)
        ]

    def _streamed(self, batch: List[ComposedRequest], request_config: Any, kwargs: Dict[str,
                                                                                        Any]) -> Iterator[List[Any]]:
        has_begun = False
        stream = self._stream = Stream()
        try:
            with self._composed(batch), stream.until_its_end():
                for chunks in super()._infer([item.request for item in batch], request_config, **kwargs):
                    if stream.error is not None:
                        break
                    has_begun = True
                    yield chunks
                if stream.error is not None:
                    raise stream.error
            return
        except Exception as e:
            # What stock makes of a stream without tokens says nothing.
            error = self._told(e if stream.error is None else stream.error, batch)
        if has_begun or len(batch) == 1:
            yield [error] * len(batch)
            return
        begin = 0
        for part in self._parts(batch, error):
            for chunks in self._streamed(part, request_config, kwargs):
                yield [None] * begin + chunks + [None] * (len(batch) - begin - len(part))
            begin += len(part)

    def _generate_guarded(self, *args: Any, **kwargs: Any) -> Any:
        if any(item.ticket is not None for item in self._batch):
            criteria = UntilAbandoned([item.ticket for item in self._batch])
            kwargs['stopping_criteria'] = StoppingCriteriaList([*kwargs.get('stopping_criteria', ()), criteria])
        if kwargs.get('streamer') is None:
            return self._generate(*args, **kwargs)
        with self._stream.guarded(kwargs['streamer']):
            # In a thread of its own, and ms-swift may activate by thread.
            self.composer.activate()
            return self._generate(*args, **kwargs)

    @contextmanager
    def _composed(self, batch: List[ComposedRequest]) -> Iterator[None]:
        """Composes what a batch asks for, for the time of the `with` block, and counts the seconds of both."""
        seeds = [item.seed for item in batch if item.seed is not None]
        start = self._clock()
        with self.composer.fused_batch([item.composition for item in batch], seeds or None):
            composed = self._clock()
            self.seconds_composing += composed - start
            for item in batch:
                if item.ticket is not None:
                    item.ticket.composed(composed - start)
            self._batch = batch
            if seeds:
                # Generating has random numbers of its own: some compositions draw masks, others none.
                torch.manual_seed(derived_seed('generating', *seeds))
            try:
                yield
            finally:
                self.seconds_generating += self._clock() - composed

    def _clock(self) -> float:
        """Waits for the device and returns the time."""
        if self.model.device.type == 'cuda':
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _told(self, error: BaseException, batch: List[ComposedRequest]) -> BaseException:
        """Says in the log what is done about an error of a batch, and returns it without what it came from."""
        for item in batch:
            if item.ticket is not None:
                item.ticket.traceback = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
        # It holds the tensors of the whole batch.
        error.__traceback__ = None
        if len(batch) == 1:
            return error
        if is_out_of_memory(error):
            self._halve(len(batch))
        elif isinstance(error, RowsError) and not self._has_told_of_rows:
            self._has_told_of_rows = True
            logger.warning(f'Requests with different compositions are answered one by one, for {error}')
        return error

    def _halve(self, size: int) -> None:
        """Makes batches half as large as one that memory does not suffice for."""
        self.max_batch_size = size // 2
        logger.warning(f'Memory does not suffice for a batch of {size}: batches have {self.max_batch_size} requests at '
                       'most from now on.')
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _parts(self, batch: List[ComposedRequest], error: BaseException) -> Iterable[List[ComposedRequest]]:
        """Yields the parts that a batch is answered in after an error."""
        size = 1 if isinstance(error, RowsError) else -(-len(batch) // 2)
        return (batch[begin:begin + size] for begin in range(0, len(batch), size))


def _without_gaps(chunks: List[Any]) -> List[Any]:
    """Returns chunks of a batch for mailboxes."""
    return [NOTHING if chunk is None else chunk for chunk in chunks]


def _is_abandoned(request: Any) -> bool:
    """Returns whether a request that waits need not be answered."""
    return isinstance(request, ComposedRequest) and request.ticket is not None and request.ticket.is_abandoned


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory does not suffice, on any device."""
    # On a CPU, PyTorch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError)
                                                                        and "can't allocate memory" in str(error))
