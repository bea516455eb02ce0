"""What engines that compose have in common: a request with its composition, and what they are asked by."""
from concurrent.futures import Future
from itertools import repeat
from typing import (TYPE_CHECKING, Any, Callable, Coroutine, Dict, List, NamedTuple, Optional, Protocol, Sequence,
                    TypeVar, Union)

from ..lora.numbers import checked_seeds
from .composer import FusionComposer, Sample
from .tickets import Ticket

if TYPE_CHECKING:
    from ..ms_swift import InferRequest

_T = TypeVar('_T')


class EncodedRequest(NamedTuple):
    """A request as the model gets it, which `Engine.encoded` returns."""
    inputs: Dict[str, Any]


class ComposedRequest(NamedTuple):
    """A request, and what answers it.

    Attributes:
        request: the request.
        composition: what `FusionComposer.compose_batch` takes for a sample, None for the base model.
        seed: what random numbers come from, None to go on with those that there are.
        ticket: what becomes of it is noted there.
    """
    request: 'Union[InferRequest, EncodedRequest]'
    composition: Optional[Sample]
    seed: Optional[int] = None
    ticket: Optional[Ticket] = None


class EngineEnded(RuntimeError):
    """The engine ended, and with it what it was asked: it answers nothing any more."""


class Engine(Protocol):
    """What answers requests, each by its own composition: `FusionEngine`, or vLLM's.

    Attributes:
        composer: the composer.
        template: ms-swift's template of the model.
        max_model_len: how many tokens a prompt and its answer have at most, None where that is not known.
        strict: whether `infer` raises what is wrong with a request. Otherwise it takes the place of the response.
        on_batch: called with how many requests are answered together, where some are begun.
        seconds_composing: the seconds in which something was composed since the engine was made.
        seconds_generating: the seconds in which something was answered.
    """
    composer: FusionComposer
    template: Any
    max_model_len: Optional[int]
    strict: bool
    on_batch: Callable[[int], None]

    @property
    def seconds_composing(self) -> float:
        ...

    @property
    def seconds_generating(self) -> float:
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it can answer."""

    @property
    def merges_here(self) -> bool:
        """Whether adapters are read and merged in this process."""

    def fresh_seed(self) -> Optional[int]:
        """Returns the seed of a request that brings none."""

    def _get_num_tokens(self, inputs: Dict[str, Any]) -> int:
        """ms-swift's: returns how many tokens a request has that was encoded."""

    def _prepare_generation_config(self, request_config: Any) -> Any:
        """ms-swift's: raises an error where settings do not go together."""

    def encoded(self, infer_request: Any) -> EncodedRequest:
        """Encodes a request, for `ComposedRequest`. May be called from any thread."""

    async def infer_async(self, infer_request: Any, request_config: Any = None) -> Any:
        """Answers a request, with others that are there."""

    def infer(self, infer_requests: List[Any], request_config: Any = None, metrics: Any = None, **kwargs: Any) -> Any:
        """Answers requests, see `ComposedInference.infer`."""

    def submit(self, coroutine: 'Coroutine[Any, Any, _T]') -> 'Future[_T]':
        """Runs a coroutine that asks the engine, where another thread has no event loop for it."""

    def close(self, seconds: float) -> None:
        """Ends what is being answered, or waits for its end, at most so many seconds. Nothing is answered after it."""


class ComposedInference:
    """What engines of ms-swift's have with a composition for each request. Mixed into them."""
    template: Any

    def encoded(self, infer_request: 'InferRequest') -> EncodedRequest:
        """Encodes a request, so that its batch need not. May be called from any thread.

        Returns:
            What `ComposedRequest` takes as the request.

        Raises:
            Exception: What the template has against it.
        """
        return EncodedRequest(self.template.encode(infer_request, return_template_inputs=True))

    def infer(self,
              infer_requests: 'List[InferRequest]',
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
        # Of ms-swift's engine.
        answer: Any = super()
        found: List[Any] = answer.infer(wrapped, request_config, metrics, **kwargs)
        for response in found:
            if isinstance(response, Exception) and getattr(self, 'strict', True):
                raise response
        return found
