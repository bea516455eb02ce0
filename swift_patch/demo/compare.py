"""The same samples through stock ms-swift and through the patch: seconds composing per sample, and the answers."""
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Sequence, Tuple

import swift_patch
from ..bench.measure import seconds_composing, stock_composing
from ..inference.checkpoints import find_checkpoints
from ..inference.engine import load_model
from ..quiet import silenced
from ..synthetic.tiny_model import MODEL_TYPE, TEMPLATE
from .tasks import Sample

# What stock has, too: the one type with which both paths can be compared on the paper's kind of fusion.
COMPARED_TYPE = 'linear'


@dataclass
class Answers:
    """What one path gave for the samples, in their order.

    Attributes:
        responses: The generated texts.
        seconds: The seconds that composing took, for each.
    """
    responses: List[str] = field(default_factory=list)
    seconds: List[float] = field(default_factory=list)


class TaskEngine:
    """The base model with the LoRAs of all tasks, in ms-swift's own engine.

    Args:
        model_dir: The directory of the base model.
        adapters: The checkpoint of each task's LoRA.
    """

    def __init__(self, model_dir: str, adapters: Dict[str, str]):
        from ..ms_swift import BaseArguments, get_engine
        with silenced():
            args = BaseArguments(
                model=model_dir,
                model_type=MODEL_TYPE,
                template=TEMPLATE,
                torch_dtype='float32',
                max_new_tokens=8,
                temperature=0)
            self.model, self._template, self._aliases = load_model(args, find_checkpoints(adapters))
            self._engine = get_engine(self.model, self._template, max_batch_size=1)
            self._request_config = args.get_request_config()

    def answer(self,
               samples: Sequence[Sample],
               compose: Callable[[List[str], List[float]], Any],
               advance: Callable[[], Any],
               max_seconds: float = float('inf')) -> Answers:
        """Composes and generates, sample by sample.

        Args:
            samples: The samples.
            compose: Is called with the sample's adapters, by their names in the model, and weights. Only it is timed.
            advance: Is called after each sample.
            max_seconds: No further sample is begun when composing took longer than this in sum.

        Returns:
            The answers to the samples, or to the first of them.
        """
        answers = Answers()
        for request, seconds in zip(
                self._requests(samples), seconds_composing(self._compositions(samples), compose, max_seconds)):
            answers.seconds.append(seconds)
            [response] = self._engine.infer([request], self._request_config, use_tqdm=False)
            answers.responses.append(response.choices[0].message.content)
            advance()
        return answers

    def answer_in_batches(self, samples: Sequence[Sample], max_batch_size: int, advance: Callable[[], Any],
                          **options: Any) -> Answers:
        """Composes and generates, batch by batch, each sample with its own fusion.

        Args:
            samples: The samples.
            max_batch_size: How many are answered together.
            advance: Is called after each batch.
            **options: Those of `FusionComposer`.

        Returns:
            The answers; of each batch, the seconds that it took in all.
        """
        from ..compose.engine import FusionEngine
        engine = FusionEngine(self.model, self._template, max_batch_size=max_batch_size, **options)
        engine.reserve(max_sources=3)
        requests, compositions = self._requests(samples), self._compositions(samples)
        answers = Answers()
        for begin in range(0, len(samples), max_batch_size):
            batch = slice(begin, begin + max_batch_size)
            start = time.perf_counter()
            responses = engine.infer(
                requests[batch], self._request_config, use_tqdm=False, compositions=compositions[batch])
            answers.seconds.append(time.perf_counter() - start)
            answers.responses += [response.choices[0].message.content for response in responses]
            advance()
        return answers

    def _compositions(self, samples: Sequence[Sample]) -> List[Tuple[List[str], List[float]]]:
        return [([self._aliases[name] for name in sample['adapters']], list(sample['weights'])) for sample in samples]

    @staticmethod
    def _requests(samples: Sequence[Sample]) -> List[Any]:
        from ..ms_swift import InferRequest
        return [InferRequest(messages=[dict(message) for message in sample['messages']]) for sample in samples]


def answer_with_stock(engine: TaskEngine, samples: Sequence[Sample], advance: Callable[[], Any],
                      max_seconds: float) -> Answers:
    """Answers as users of stock ms-swift do: a new fused adapter for every sample. The patch is off meanwhile."""
    with stock_composing(engine.model, combination_type=COMPARED_TYPE) as compose:
        return engine.answer(samples, compose, advance, max_seconds)


def answer_with_patch(engine: TaskEngine, samples: Sequence[Sample], advance: Callable[[], Any],
                      **options: Any) -> Answers:
    """Answers with one fused adapter, refilled for every sample.

    Args:
        engine: The model.
        samples: The samples.
        advance: Is called after each sample.
        **options: Those of `FusionComposer`.
    """
    composer = swift_patch.FusionComposer(engine.model, **options)
    return engine.answer(samples, composer.compose, advance)


def answer_with_base(engine: TaskEngine, samples: Sequence[Sample], advance: Callable[[], Any]) -> Answers:
    """Answers with no adapter at all."""
    return engine.answer(samples, lambda adapters, weights: engine.model.set_active_adapters([]), advance)
