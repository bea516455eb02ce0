"""The run of `swift-patch infer`: check everything, load once, then compose, generate and write batch by batch."""
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from ..files import os_errors_as
from ..lora.checkpoint import AdapterCheckpoint
from ..lora.numbers import derived_seed
from ..patching import why_not_applied
from .batches import batches
from .checkpoints import check_base_model, find_checkpoints
from .config import InferConfig, InferSummary
from .dataset import DatasetError, Sample, read_dataset
from .engine import load_base_model, swift_arguments
from .results import ResultFile, check_result_path, result_line, write_line

if TYPE_CHECKING:
    from ..lora.library import AdapterLibrary
    from ..ms_swift import BaseArguments, InferRequest

# The keys of a sample that ms-swift's engine takes besides the messages.
REQUEST_KEYS = ('images', 'audios', 'videos', 'tools', 'objects', 'chat_template_kwargs')


def run_infer(config: InferConfig) -> InferSummary:
    """Answers every sample of a dataset with its own composition of adapters.

    No file is written before the dataset, the adapters, the options, an existing result file, the template's view of
    every sample and the loading of the model have all succeeded. Each result line is flushed when its sample and all
    before it are done. The lines depend on the inputs only (the random state is seeded per batch, and batches do not
    depend on what is finished), so that a resumed run writes the same file.

    Args:
        config: What to run.

    Returns:
        How many samples, and how long it took.

    Raises:
        DatasetError: If samples are wrong, with all of them.
        ValueError: If anything else that a user can put right is wrong.
        KeyboardInterrupt: Where it was interrupted; once there is a result file, with a text on how to go on.
    """
    reason = why_not_applied()
    if reason is not None:
        raise ValueError(reason)
    samples = read_dataset(config.val_dataset, config.adapters)
    check_result_path(config)
    used = {name for sample in samples for name in sample.adapters}
    # The others may be ten thousand, and broken.
    named = {name: path for name, path in config.adapters.items() if name in used}
    checkpoints = find_checkpoints(named, config.swift_args)
    from ..lora.combination import options_of_method
    from ..lora.compiled import compile_merging
    if config.compile_merging:
        compile_merging()
    options_of_method(config.merge_method, **config.composer_args)
    args = swift_arguments(config.swift_args, checkpoints)
    results = ResultFile(config, args, samples, checkpoints)
    summary = InferSummary(resumed=results.num_finished)
    if summary.resumed == len(samples):
        return summary

    check_base_model(checkpoints, args.model_dir)
    requests = [_to_request(sample) for sample in samples]
    lengths = _check_template(config, args, samples, requests)
    with os_errors_as(f'Cannot write {results.path}'):
        results.path.parent.mkdir(parents=True, exist_ok=True)
    generator = _Generator(config, args, checkpoints, samples)

    from tqdm import tqdm
    with results.open() as file, tqdm(
            total=len(samples), initial=summary.resumed, unit='sample', dynamic_ncols=True) as progress:
        start = time.perf_counter()
        # Answers whose lines wait for those of samples before them.
        answers: Dict[int, Any] = {}
        written = summary.resumed
        try:
            for batch in batches(lengths, config.max_batch_size):
                if max(batch) < summary.resumed:
                    continue
                answers.update(zip(batch, generator.answer(batch, samples, requests)))
                while written in answers:
                    line = _line_of(config, samples[written], answers.pop(written))
                    with os_errors_as(f'Cannot write {results.path}'):
                        write_line(file, line)
                    written += 1
                    progress.update()
                    summary.samples = written - summary.resumed
                    summary.seconds = time.perf_counter() - start
                    summary.seconds_composing = generator.engine.seconds_composing
                    summary.seconds_generating = generator.engine.seconds_generating
                # Those of this batch that were finished before.
                answers = {number: answer for number, answer in answers.items() if number >= written}
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(f'--resume goes on with {results.path}') from e
    return summary


class _Generator:
    """The base model in an engine that composes, from adapters that stay on disk."""

    def __init__(self, config: InferConfig, args: 'BaseArguments', checkpoints: Sequence[AdapterCheckpoint],
                 samples: Sequence[Sample]):
        from ..compose.engine import FusionEngine
        from ..lora.library import AdapterLibrary
        self.seed = args.seed
        model, template = load_base_model(args)
        library = AdapterLibrary({checkpoint.name: checkpoint.path for checkpoint in checkpoints})
        self.engine = FusionEngine(
            model,
            template,
            max_batch_size=min(config.max_batch_size, len(samples)),
            library=library,
            adapter_name=_free_name(library),
            merge_method=config.merge_method,
            **config.composer_args)
        # Errors take the places of responses, so that the other samples of a batch are answered.
        self.engine.strict = False
        self.engine.composer.check(list(library))
        # From all samples, so that a resumed run computes with the same shapes.
        self.engine.reserve(list(library), max_sources=max(len(sample.adapters) for sample in samples))
        self.request_config = args.get_request_config()

    def answer(self, batch: Sequence[int], samples: Sequence[Sample], requests: 'Sequence[InferRequest]') -> List[Any]:
        """Returns, for each sample of a batch, the response or what went wrong."""
        found: List[Any] = self.engine.infer(
            [requests[number] for number in batch],
            self.request_config,
            use_tqdm=False,
            compositions=[dict(zip(samples[number].adapters, samples[number].weights)) for number in batch],
            # They come from the places of the samples alone.
            seeds=[derived_seed(self.seed, number) for number in batch])
        return found


def _free_name(library: 'AdapterLibrary') -> str:
    """Returns a name for the fused adapter that none of the library has."""
    name = 'fused'
    while name in library:
        name += '_'
    return name


def _line_of(config: InferConfig, sample: Sample, answer: Any) -> Dict[str, Any]:
    """Returns the result line of a sample, or raises what went wrong with it."""
    if isinstance(answer, ValueError):
        raise ValueError(f'{config.val_dataset}, line {sample.line}: {answer}') from answer
    if isinstance(answer, Exception):
        raise answer
    choice = answer.choices[0]
    return result_line(config, sample, choice.message.content, choice.logprobs)


def _to_request(sample: Sample) -> 'InferRequest':
    from ..ms_swift import InferRequest
    extra = {key: sample.data[key] for key in REQUEST_KEYS if sample.data.get(key) is not None}
    return InferRequest(messages=sample.messages, **extra)


def _check_template(config: InferConfig, args: 'BaseArguments', samples: Sequence[Sample],
                    requests: 'Sequence[InferRequest]') -> List[Optional[int]]:
    """Encodes every sample with the model's template, for which the model itself is not needed.

    Returns:
        How many tokens each has, None where that is not known.

    Raises:
        DatasetError: If there are samples that the template refuses or that leave no room for an answer.
    """
    if args.task_type != 'causal_lm':
        raise ValueError(f'swift-patch infer generates text, but this is a model for {args.task_type}.')
    if args.model_meta.is_multimodal:  # encoding would load every image twice
        return [None] * len(samples)
    from ..ms_swift import TEMPLATE_MODE, get_template
    template = get_template(args)
    template.set_mode(TEMPLATE_MODE)
    max_model_len = template.model_info.max_model_len
    problems: List[Tuple[int, str]] = []
    lengths: List[Optional[int]] = []
    for sample, request in zip(samples, requests):
        try:
            length = len(template.encode(request)['input_ids'])
        except Exception as e:  # templates raise whatever comes: assertions, KeyError, ValueError
            problems.append((sample.line, f"the model's template refuses it: {type(e).__name__}: {str(e):.300}"))
            continue
        lengths.append(length)
        if max_model_len is not None and length >= max_model_len:
            problems.append((sample.line, f'{length} tokens leave no room for an answer in {max_model_len}'))
    if problems:
        raise DatasetError(config.val_dataset, problems)
    return lengths
