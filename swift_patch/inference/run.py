"""The run of `swift-patch infer`: check everything, load once, then compose, generate and write sample by sample."""
import hashlib
import json
import time
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

from ..files import os_errors_as
from ..patching import why_not_applied
from .checkpoints import AdapterCheckpoint, check_base_model, find_checkpoints
from .config import InferConfig, InferSummary
from .dataset import DatasetError, Sample, read_dataset
from .engine import load_engine, swift_arguments
from .results import ResultFile, check_result_path, result_line, write_line

if TYPE_CHECKING:
    from ..ms_swift import BaseArguments, InferRequest

# The keys of a sample that ms-swift's engine takes besides the messages.
REQUEST_KEYS = ('images', 'audios', 'videos', 'tools', 'objects', 'chat_template_kwargs')


def run_infer(config: InferConfig) -> InferSummary:
    """Answers every sample of a dataset with its own composition of adapters.

    No file is written before the dataset, the adapters, the options, an existing result file, the template's view of
    every sample and the loading of the model have all succeeded. Each result line is flushed when its sample is done.
    The lines depend on the inputs only (the random state is seeded per sample), so that a resumed run writes the same
    file.

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
    checkpoints = find_checkpoints(config.adapters)
    check_result_path(config)
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
    _check_template(config, args, samples, requests)
    with os_errors_as(f'Cannot write {results.path}'):
        results.path.parent.mkdir(parents=True, exist_ok=True)
    generator = _Generator(config, args, checkpoints, samples)

    from tqdm import tqdm
    with results.open() as file, tqdm(
            total=len(samples), initial=summary.resumed, unit='sample', dynamic_ncols=True) as progress:
        start = time.perf_counter()
        try:
            for index in range(summary.resumed, len(samples)):
                choice = generator.generate(index, samples[index], requests[index], summary)
                line = result_line(config, samples[index], choice.message.content, choice.logprobs)
                with os_errors_as(f'Cannot write {results.path}'):
                    write_line(file, line)
                summary.samples += 1
                summary.seconds = time.perf_counter() - start
                progress.update()
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(f'--resume goes on with {results.path}') from e
    return summary


class _Generator:
    """The model with its adapters, the composer and ms-swift's engine."""

    def __init__(self, config: InferConfig, args: 'BaseArguments', checkpoints: Sequence[AdapterCheckpoint],
                 samples: Sequence[Sample]):
        from ..compose.composer import FusionComposer
        self.config = config
        self.seed = args.seed
        self.engine, self.aliases = load_engine(args, checkpoints)
        self.composer = FusionComposer(self.engine.model, config.merge_method, **config.composer_args)
        # From all samples, so that a resumed run computes with the same shapes.
        used = {name for sample in samples for name in sample.adapters}
        self.composer.reserve([alias for name, alias in self.aliases.items() if name in used],
                              max_sources=max(len(sample.adapters) for sample in samples))
        self.request_config = args.get_request_config()

    def generate(self, index: int, sample: Sample, request: 'InferRequest', summary: InferSummary) -> Any:
        """Returns the engine's choice for one sample and adds the seconds it took to the summary."""
        weights = {self.aliases[name]: weight for name, weight in zip(sample.adapters, sample.weights)}
        # Seeds come from the sample's place alone. Generating has its own: some compositions draw masks, others none.
        start = self._clock(_derive_seed(self.seed, index, 'composing'))
        try:
            with self.composer.fused(weights):
                composed = self._clock(_derive_seed(self.seed, index))
                response = self.engine.infer([request], self.request_config, use_tqdm=False)[0]
                generated = self._clock()
        except ValueError as e:
            raise ValueError(f'{self.config.val_dataset}, line {sample.line}: {e}') from e
        summary.seconds_composing += composed - start
        summary.seconds_generating += generated - composed
        return response.choices[0]

    def _clock(self, seed: Optional[int] = None) -> float:
        """Seeds torch, waits for the device and returns the time."""
        import torch
        if seed is not None:
            torch.manual_seed(seed)
        if self.engine.model.device.type == 'cuda':
            torch.cuda.synchronize(self.engine.model.device)
        return time.perf_counter()


def _to_request(sample: Sample) -> 'InferRequest':
    from ..ms_swift import InferRequest
    extra = {key: sample.data[key] for key in REQUEST_KEYS if sample.data.get(key) is not None}
    return InferRequest(messages=sample.messages, **extra)


def _check_template(config: InferConfig, args: 'BaseArguments', samples: Sequence[Sample],
                    requests: 'Sequence[InferRequest]') -> None:
    """Encodes every sample with the model's template, for which the model itself is not needed.

    Raises:
        DatasetError: If there are samples that the template refuses or that leave no room for an answer.
    """
    if args.task_type != 'causal_lm':
        raise ValueError(f'swift-patch infer generates text, but this is a model for {args.task_type}.')
    if args.model_meta.is_multimodal:  # encoding would load every image twice
        return
    from ..ms_swift import TEMPLATE_MODE, get_template
    template = get_template(args)
    template.set_mode(TEMPLATE_MODE)
    max_model_len = template.model_info.max_model_len
    problems: List[Tuple[int, str]] = []
    for sample, request in zip(samples, requests):
        try:
            length = len(template.encode(request)['input_ids'])
        except Exception as e:  # templates raise whatever comes: assertions, KeyError, ValueError
            problems.append((sample.line, f"the model's template refuses it: {type(e).__name__}: {str(e):.300}"))
            continue
        if max_model_len is not None and length >= max_model_len:
            problems.append((sample.line, f'{length} tokens leave no room for an answer in {max_model_len}'))
    if problems:
        raise DatasetError(config.val_dataset, problems)


def _derive_seed(*parts: Any) -> int:
    """Derives a seed that has nothing to do with those derived from other parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7], 'big')
