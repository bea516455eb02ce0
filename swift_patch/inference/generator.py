"""The base model in an engine that composes, from adapters that stay on disk."""
import asyncio
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, AsyncIterator, Dict, List, Sequence, Tuple

from ..files import os_errors_as
from ..futures import settled
from ..lora.checkpoint import AdapterCheckpoint
from ..lora.numbers import derived_seed
from .config import Answer, InferConfig
from .dataset import Sample
from .engine import load_engine
from .ranks import RankDied

if TYPE_CHECKING:
    from ..compose.requests import ComposedRequest
    from ..ms_swift import InferArguments, InferRequest

logger = logging.getLogger(__name__)

# The keys of a sample that ms-swift's engine takes besides the messages.
REQUEST_KEYS = ('images', 'audios', 'videos', 'tools', 'objects', 'chat_template_kwargs')
# How long an engine may take to end what nobody waits for.
_SECONDS_OF_ENDING = 5.


@dataclass
class Done:
    """What came of a batch.

    Attributes:
        answers: Those of its samples, by number.
        seconds_composing: The seconds in which something was composed since the last batch that was done.
        seconds_generating: The seconds in which something was answered since then.
    """
    answers: Dict[int, Answer]
    seconds_composing: float
    seconds_generating: float


class Generator:
    """Answers samples, each by its own composition of adapters. The model is loaded here.

    Args:
        config: The run.
        args: ms-swift's arguments.
        checkpoints: The adapters that samples name.
        samples: All samples of the dataset.

    Attributes:
        engine: The engine, which counts the seconds.

    Raises:
        ValueError: The model cannot be loaded, or an adapter does not fit it.
    """

    def __init__(self, config: InferConfig, args: 'InferArguments', checkpoints: Sequence[AdapterCheckpoint],
                 samples: Sequence[Sample]):
        from ..lora.library import AdapterLibrary
        self._samples = samples
        self._seed = args.seed
        self._request_config = args.get_request_config()
        # From all samples, so that a resumed run computes with the same shapes.
        self.engine = load_engine(
            args,
            AdapterLibrary({checkpoint.name: checkpoint.path
                            for checkpoint in checkpoints}),
            max_batch_size=min(config.max_batch_size, len(samples)),
            max_sources=max(len(sample.adapters) for sample in samples),
            max_compositions=len({(tuple(sample.adapters), tuple(sample.weights))
                                  for sample in samples}),
            composer_args={
                'merge_method': config.merge_method,
                **config.composer_args
            })
        # Errors take the places of responses, so that the others of a batch are answered.
        self.engine.strict = False
        self._reported = self._seconds()

    def begin(self, batch: Sequence[int]) -> 'Future[Done]':
        """Begins to answer samples, given by number."""
        return settled(lambda: self._done(batch, self.answer(batch)))

    def answer(self, batch: Sequence[int]) -> List[Answer]:
        """Answers samples together, given by number."""
        if self._request_config.stream:
            return [self.engine.submit(self._shown(number)).result() for number in batch]
        requests, compositions, seeds, _ = zip(*map(self._request, batch))
        return [
            self._to_answer(response) for response in self.engine.infer(
                list(requests), self._request_config, use_tqdm=False, compositions=compositions, seeds=seeds)
        ]

    def close(self) -> None:
        """Ends the processes of the engine, which has none here."""

    def _to_answer(self, response: Any) -> Answer:
        """Returns what came of a sample. Raises RankDied where nothing will come of any."""
        from ..compose.requests import EngineEnded
        if not isinstance(response, Exception):
            choice = response.choices[0]
            return Answer(choice.message.content, choice.logprobs, response.usage.completion_tokens)
        if isinstance(response, EngineEnded):
            raise RankDied(str(response)) from response
        logger.debug('A sample failed:', exc_info=response)
        reason = str(response)
        return Answer(error=reason if isinstance(response, ValueError) else f'{type(response).__name__}: {reason}')

    def _done(self, batch: Sequence[int], answers: Sequence[Answer]) -> Done:
        seconds = self._seconds()
        before, self._reported = self._reported, seconds
        return Done(dict(zip(batch, answers)), seconds[0] - before[0], seconds[1] - before[1])

    def _seconds(self) -> Tuple[float, float]:
        return self.engine.seconds_composing, self.engine.seconds_generating

    async def _shown(self, number: int) -> Answer:
        """Answers one sample while it shows, on stdout and as `swift infer` does, what there is of the response."""
        sample = self._samples[number]
        texts: List[str] = []
        tokens = 0
        with os_errors_as('Cannot show responses on stdout'):
            print(f'[QUERY] {sample.messages[-1]["content"]}')
            if sample.label:
                print(f'[LABELS] {sample.label}')
            print('[RESPONSE] ', end='', flush=True)
            try:
                async for chunk in self._chunks(number):
                    if isinstance(chunk, Exception):
                        return self._to_answer(chunk)
                    text = chunk.choices[0].delta.content or ''
                    print(text, end='', flush=True)
                    texts.append(text)
                    tokens = chunk.usage.completion_tokens
            finally:
                print('\n' + '-' * 50, flush=True)
        return Answer(''.join(texts), tokens=tokens)

    async def _chunks(self, number: int) -> AsyncIterator[Any]:
        """Yields what there is of a response, and what goes wrong with it, but not what goes wrong with showing it."""
        try:
            # Not by `infer`: in ms-swift 3, a stream that begins before the last one's loop has ended never ends.
            async for chunk in await self.engine.infer_async(self._request(number), self._request_config):
                yield chunk
        except Exception as e:
            yield e

    def _request(self, number: int) -> 'ComposedRequest':
        """Returns a sample with its composition, and with a seed that comes from its place alone."""
        from ..compose.requests import ComposedRequest
        sample = self._samples[number]
        return ComposedRequest(
            to_request(sample), dict(zip(sample.adapters, sample.weights)), derived_seed(self._seed, number))


class ContinuousGenerator(Generator):
    """Answers samples by an engine that answers each as it comes."""

    def begin(self, batch: Sequence[int]) -> 'Future[Done]':
        """Begins to answer samples, given by number. The next may be begun before they are answered."""
        if self._request_config.stream:
            return super().begin(batch)
        return self.engine.submit(self._answered(batch))

    def close(self) -> None:
        """Ends the processes of the engine."""
        self.engine.close(_SECONDS_OF_ENDING)

    async def _answered(self, batch: Sequence[int]) -> Done:
        return self._done(batch, await asyncio.gather(*map(self._answer, batch)))

    async def _answer(self, number: int) -> Answer:
        try:
            response = await self.engine.infer_async(self._request(number), self._request_config)
        except Exception as e:
            response = e
        return self._to_answer(response)


def to_request(sample: Sample) -> 'InferRequest':
    """Returns what ms-swift's engine and templates take."""
    from ..ms_swift import InferRequest
    extra: Dict[str, Any] = {key: sample.data[key] for key in REQUEST_KEYS if sample.data.get(key) is not None}
    return InferRequest(messages=[dict(message) for message in sample.messages], **extra)
