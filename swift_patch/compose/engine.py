"""ms-swift's own engine, in which every request of a batch has its own composition of adapters."""
import logging
import time
import torch
from contextlib import contextmanager
from copy import copy
from itertools import repeat
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

from ..errors import RowsError, short_repr
from ..lora.numbers import check_positive, checked_seeds, derived_seed
from ..ms_swift import BATCHES_STREAMS, InferRequest, TransformersEngine, get_engine
from .composer import FusionComposer, Sample
from .streams import Client, Stream, checked

logger = logging.getLogger(__name__)


class ComposedRequest(NamedTuple):
    """A request, and what answers it.

    Attributes:
        request: the request.
        composition: what `FusionComposer.compose` takes, None for the base model.
        seed: what random numbers come from, None to go on with those that there are.
    """
    request: InferRequest
    composition: Optional[Sample]
    seed: Optional[int] = None


class FusionEngine(TransformersEngine):  # type: ignore[misc]  # ms-swift has no types
    """ms-swift's engine around one model with LoRAs, in which each request of a batch has its own fusion of them.

    Requests with different compositions, with a single adapter and with none at all are answered in one batch. What
    cannot be batched (layers that get the tokens of all rows in one heap) is answered one by one, which is logged once.

    Args:
        model: A `SwiftModel` or a `PeftModel` with the LoRAs loaded, or any model with a library of them.
        template: ms-swift's template of the model.
        max_batch_size: How many requests are answered together at most; it is halved where memory does not suffice.
        **composer_args: Arguments of `FusionComposer`: `library`, `merge_method`, `combination_type`, ...

    Attributes:
        composer: the composer.
        seconds_composing: the seconds that composing took since the engine was made.
        seconds_generating: the seconds that answering took besides.

    Raises:
        TypeError: See `FusionComposer`.
        ValueError: See `FusionComposer`, or `max_batch_size` is not positive.

    Example:
        >>> engine = FusionEngine(model, template)
        >>> engine.infer(requests, RequestConfig(max_tokens=64), compositions=[['sql', 'math'], {'legal': 1.0}, None])
    """

    def __init__(self, model: torch.nn.Module, template: Any, *, max_batch_size: int = 16, **composer_args: Any):
        check_positive('max_batch_size', max_batch_size)
        self.composer = FusionComposer(model, **composer_args)
        # A copy, for what generates is replaced in it; the user's stays as it is, also where it is another engine's.
        template = copy(template)
        vars(template).pop('generate', None)
        # The constructors of ms-swift 3 and 4 differ; what they make does not.
        self.__dict__.update(get_engine(model, template, max_batch_size=max_batch_size).__dict__)
        self.template = template
        self.seconds_composing = self.seconds_generating = 0.
        self._waiting: List[Any] = []
        self._has_told_of_rows = False
        self._stream = Stream()
        self._generate, template.generate = template.generate, self._generate_guarded

    def infer(self,
              infer_requests: List[InferRequest],
              request_config: Any = None,
              metrics: Any = None,
              *,
              compositions: Optional[Sequence[Optional[Sample]]] = None,
              seeds: Optional[Sequence[int]] = None,
              **kwargs: Any) -> List[Any]:
        """Answers requests, each by its own composition of adapters.

        Args:
            infer_requests: The requests.
            request_config: How to generate.
            metrics: See ms-swift.
            compositions: For each request what `FusionComposer.compose` takes, None for the base model. By default the
                base model answers all.
            seeds: For each request a seed, so that the random numbers of a batch come from those of its requests alone.
            **kwargs: See ms-swift.

        Returns:
            A response for each request; an iterator of chunks for each where `request_config` asks for a stream.

        Raises:
            ValueError: There are not as many compositions as requests, or one of them is wrong.
        """
        count = len(infer_requests)
        compositions = [None for _ in range(count)] if compositions is None else list(compositions)
        if len(compositions) != count:
            raise ValueError(f'compositions is expected to have one for each of {count} requests, found '
                             f'{len(compositions)}.')
        every_seed = checked_seeds(seeds, count) or repeat(None)
        wrapped = [ComposedRequest(*each) for each in zip(infer_requests, compositions, every_seed)]
        found: List[Any] = super().infer(wrapped, request_config, metrics, **kwargs)
        for response in found:
            if isinstance(response, Exception) and getattr(self, 'strict', True):
                raise response
        return found

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

    async def infer_async(self,
                          infer_request: Any,
                          request_config: Any = None,
                          *,
                          composition: Optional[Sample] = None,
                          **kwargs: Any) -> Any:
        """Answers a request in a batch with others that wait, whatever their compositions.

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

    def _batch_encode(self, *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        # Where stock leaves a request out of a batch, the others would get each other's rows.
        return super()._batch_encode(*args, strict=True, **kwargs)

    def _fetch_infer_requests(self) -> Any:
        """Returns the oldest request that waits, with others of the same settings, in the order in which they came."""
        while not self._queue.empty():
            self._waiting.append(self._queue.get())
        if not self._waiting:
            return None
        settings = self._waiting[0][1]
        size = 1 if settings['request_config'].stream and not BATCHES_STREAMS else self.max_batch_size
        batch: List[Any] = []
        rest: List[Any] = []
        for item in self._waiting:
            (batch if len(batch) < size and item[1] == settings else rest).append(item)
        self._waiting = rest
        clients = [(queue, Client(loop)) for _, _, (queue, loop) in batch]
        return {**settings, 'infer_requests': [request for request, _, _ in batch]}, clients

    def _infer(self, infer_requests: List[Any], request_config: Any, **kwargs: Any) -> Any:
        """Answers one batch. What is wrong with a request takes the place of its response."""
        if request_config.stream:
            return self._streamed(infer_requests, request_config, kwargs)
        return self._answered(infer_requests, request_config, kwargs)

    def _answered(self, batch: List[ComposedRequest], request_config: Any, kwargs: Dict[str, Any]) -> List[Any]:
        try:
            with self._composed(batch):
                found: List[Any] = super()._infer([item.request for item in batch], request_config, **kwargs)
                return found
        except Exception as e:
            error = self._told(e, batch)
            # It holds the tensors of the whole batch.
            error.__traceback__ = None
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
            error.__traceback__ = None
        if has_begun or len(batch) == 1:
            yield [error] * len(batch)
            return
        begin = 0
        for part in self._parts(batch, error):
            for chunks in self._streamed(part, request_config, kwargs):
                yield [None] * begin + chunks + [None] * (len(batch) - begin - len(part))
            begin += len(part)

    def _generate_guarded(self, *args: Any, **kwargs: Any) -> Any:
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
        """Says in the log what is done about an error of a batch, and returns it."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory does not suffice, on any device."""
    # On a CPU, PyTorch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError)
                                                                        and "can't allocate memory" in str(error))
