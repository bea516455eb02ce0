"""The base model in an engine that composes, from adapters that stay on disk."""
import logging
from typing import TYPE_CHECKING, Any, AsyncIterator, Dict, List, Sequence

from ..files import os_errors_as
from ..lora.checkpoint import AdapterCheckpoint
from ..lora.numbers import derived_seed
from ..quiet import without_bars
from .config import Answer, InferConfig
from .dataset import Sample
from .engine import load_base_model

if TYPE_CHECKING:
    from ..compose.engine import ComposedRequest
    from ..lora.library import AdapterLibrary
    from ..ms_swift import InferArguments, InferRequest

logger = logging.getLogger(__name__)

# The keys of a sample that ms-swift's engine takes besides the messages.
REQUEST_KEYS = ('images', 'audios', 'videos', 'tools', 'objects', 'chat_template_kwargs')


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
        import torch

        from ..compose.engine import FusionEngine
        from ..lora.library import AdapterLibrary
        self._samples = samples
        self._seed = args.seed
        self._request_config = args.get_request_config()
        # The embeddings of new tokens are drawn.
        torch.manual_seed(args.seed)
        with without_bars():
            model, template = load_base_model(args)
        library = AdapterLibrary({checkpoint.name: checkpoint.path for checkpoint in checkpoints})
        self.engine = FusionEngine(
            model,
            template,
            max_batch_size=min(config.max_batch_size, len(samples)),
            library=library,
            adapter_name=free_name(library),
            merge_method=config.merge_method,
            **config.composer_args)
        # Errors take the places of responses, so that the others of a batch are answered.
        self.engine.strict = False
        self.engine.composer.check(list(library))
        # From all samples, so that a resumed run computes with the same shapes.
        self.engine.reserve(list(library), max_sources=max(len(sample.adapters) for sample in samples))

    def answer(self, batch: Sequence[int]) -> List[Answer]:
        """Answers samples together, given by number."""
        if self._request_config.stream:
            # In a thread of its own: in a notebook, this one has a loop that runs.
            return [self.engine.safe_asyncio_run(self._shown(number)) for number in batch]
        requests, compositions, seeds, _ = zip(*map(self._request, batch))
        return [
            _answer(response) for response in self.engine.infer(
                list(requests), self._request_config, use_tqdm=False, compositions=compositions, seeds=seeds)
        ]

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
                        return _answer(chunk)
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
        from ..compose.engine import ComposedRequest
        sample = self._samples[number]
        return ComposedRequest(
            to_request(sample), dict(zip(sample.adapters, sample.weights)), derived_seed(self._seed, number))


def to_request(sample: Sample) -> 'InferRequest':
    """Returns what ms-swift's engine and templates take."""
    from ..ms_swift import InferRequest
    extra: Dict[str, Any] = {key: sample.data[key] for key in REQUEST_KEYS if sample.data.get(key) is not None}
    return InferRequest(messages=[dict(message) for message in sample.messages], **extra)


def _answer(response: Any) -> Answer:
    if isinstance(response, Exception):
        logger.debug('A sample failed:', exc_info=response)
        reason = str(response)
        return Answer(error=reason if isinstance(response, ValueError) else f'{type(response).__name__}: {reason}')
    choice = response.choices[0]
    return Answer(choice.message.content, choice.logprobs, response.usage.completion_tokens)


def free_name(library: 'AdapterLibrary') -> str:
    """Returns a name for the fused adapter that none of the library has."""
    name = 'fused'
    while name in library:
        name += '_'
    return name
