"""The run of `swift-patch infer`: check everything, load once, then compose, generate and write sample by sample."""
import hashlib
import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Dict, Iterator, List, Literal, Mapping, Optional, Sequence, Tuple

from ..errors import short_repr
from ..files import check_writable, told_as
from ..patching import why_not_applied
from .adapters import AdapterCheckpoint, check_base_model, find_checkpoints
from .dataset import DatasetError, Sample, read_dataset
from .engine import load_engine, swift_arguments

if TYPE_CHECKING:
    from ..ms_swift import BaseArguments, InferRequest

# The keys of a sample that ms-swift's engine takes besides the messages.
REQUEST_KEYS = ('images', 'audios', 'videos', 'tools', 'objects', 'chat_template_kwargs')
# What the result lines depend on, as it is in ms-swift's arguments in the end, wherever it came from.
_RECORDED = ('model_type', 'model_revision', 'torch_dtype', 'attn_impl', 'template', 'system', 'max_length',
             'truncation_strategy', 'response_prefix', 'enable_thinking', 'max_new_tokens', 'temperature', 'top_k',
             'top_p', 'repetition_penalty', 'num_beams', 'stop_words', 'logprobs', 'top_logprobs', 'seed')
# Where a model runs and how it is fetched does not make another run of it, and a token belongs in no file.
_NOT_RECORDED = ('model', 'device_map', 'use_hf', 'hub_token')
# Settings that are told to be other than those of a result file.
_MAX_CHANGES = 10


@dataclass
class InferConfig:
    """What one run is.

    Attributes:
        adapters: Where the checkpoint of each named adapter is.
        val_dataset: The JSONL with the samples.
        result_path: The JSONL to write, one line per sample.
        swift_args: Arguments of ms-swift's `BaseArguments` (`model`, `template`, `torch_dtype`, `max_new_tokens`,
            `temperature`, `seed`, ...). As in `swift infer`, what is not given comes from the args.json of the first
            adapter that has one.
        merge_method: 'fusion', 'mixture' or 'selection'.
        composer_args: Further arguments of `FusionComposer` (`combination_type`, `density`, ...).
        compile_merging: Merge by a compiled kernel, see `swift_patch.compile_merging`.
        resume: Go on with an existing result file.
        overwrite: Start again, over an existing result file.
    """
    adapters: Mapping[str, str]
    val_dataset: str
    result_path: str
    swift_args: Dict[str, Any] = field(default_factory=dict)
    merge_method: Literal['fusion', 'mixture', 'selection'] = 'fusion'
    composer_args: Dict[str, Any] = field(default_factory=dict)
    compile_merging: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass
class InferSummary:
    """What one run did.

    Attributes:
        samples: Samples generated now.
        resumed: Samples that were finished before.
        seconds_composing: Seconds spent on composing adapters.
        seconds_generating: Seconds spent in ms-swift's engine.
        seconds: Seconds of the whole loop, with writing.
    """
    samples: int = 0
    resumed: int = 0
    seconds_composing: float = 0.
    seconds_generating: float = 0.
    seconds: float = 0.

    @property
    def samples_per_second(self) -> float:
        """Samples generated now over the seconds of the loop, 0 where there were none."""
        return self.samples / self.seconds if self.samples else 0.


def run_infer(config: InferConfig) -> InferSummary:
    """Answer every sample of a dataset with its own composition of adapters.

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
    _check_result_path(config)
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
    with told_as(f'Cannot write {results.path}'):
        results.path.parent.mkdir(parents=True, exist_ok=True)
    generator = _Generator(config, args, checkpoints, samples)

    from tqdm import tqdm
    with results.open() as file, tqdm(
            total=len(samples), initial=summary.resumed, unit='sample', dynamic_ncols=True) as progress:
        start = time.perf_counter()
        try:
            for index in range(summary.resumed, len(samples)):
                choice = generator.generate(index, samples[index], requests[index], summary)
                line = _result_line(config, samples[index], choice.message.content, choice.logprobs)
                with told_as(f'Cannot write {results.path}'):
                    _write_line(file, line)
                summary.samples += 1
                summary.seconds = time.perf_counter() - start
                progress.update()
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(f'--resume goes on with {results.path}') from e
    return summary


class ResultFile:
    """The result file and, next to it, `<result_path>.args.json` with the settings that the lines were made with.

    Args:
        config: The run.
        args: ms-swift's arguments.
        samples: All samples of the dataset.
        checkpoints: The adapters.

    Attributes:
        num_finished: The number of samples whose lines are already there, always the first ones of the dataset.

    Raises:
        ValueError: If the file cannot be resumed because it belongs to other inputs or settings. It is only read here.
    """

    def __init__(self, config: InferConfig, args: 'BaseArguments', samples: Sequence[Sample],
                 checkpoints: Sequence[AdapterCheckpoint]):
        self.path = Path(config.result_path)
        self.settings_path = Path(f'{config.result_path}.args.json')
        self.settings = _settings(config, args, checkpoints)
        self.num_finished = 0
        self._size = 0
        if config.overwrite or not self.path.exists():
            return
        with told_as(f'Cannot read {self.path}'):
            content = self.path.read_bytes()
        # A killed run may have left a part of a line, and nothing after it.
        self._size = content.rfind(b'\n') + 1
        lines = content[:self._size].split(b'\n')[:-1]
        if lines:
            self._check_settings()
        if len(lines) > len(samples):
            raise self._mismatch(f'it has {len(lines)} lines, the dataset {len(samples)} samples')
        for number, (line, sample) in enumerate(zip(lines, samples), start=1):
            self._check_line(number, line, sample, config)
        self.num_finished = len(lines)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for appending after the finished lines; what follows them is cut off."""
        with told_as(f'Cannot write {self.path}'):
            file = open(self.path, 'r+b' if self._size else 'wb')
            file.truncate(self._size)
            file.seek(self._size)
            if not self._size:
                # Before the first line and in one step: lines without settings could not be resumed.
                tmp = Path(f'{self.settings_path}.tmp')
                # A path that is not Unicode has halves of surrogate pairs, which become escapes of JSON so.
                tmp.write_text(
                    json.dumps(self.settings, ensure_ascii=False, indent=2) + '\n',
                    encoding='utf-8',
                    errors='backslashreplace')
                os.replace(tmp, self.settings_path)
        try:
            yield file
        finally:
            # Where a write failed, closing tries it again.
            with told_as(f'Cannot write {self.path}'):
                file.close()

    def _check_settings(self) -> None:
        try:
            old = json.loads(self.settings_path.read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError) as e:
            raise self._mismatch(f'its settings in {self.settings_path} cannot be read: {e}') from e
        if not isinstance(old, dict):
            raise self._mismatch(f'its settings in {self.settings_path} are expected to be an object, found '
                                 f'{short_repr(old)}')
        changed = [
            f'{key:.60} was {_show(old.get(key))} and is now {_show(self.settings.get(key))}'
            for key in dict.fromkeys([*old, *self.settings]) if old.get(key) != self.settings.get(key)
        ]
        if changed:
            raise self._mismatch('; '.join(changed[:_MAX_CHANGES]) + ('; ...' if len(changed) > _MAX_CHANGES else ''))

    def _check_line(self, number: int, line: bytes, sample: Sample, config: InferConfig) -> None:
        try:
            finished = json.loads(line)
            expected = _result_line(config, sample, finished['response'], finished['logprobs'])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise self._mismatch(f'line {number} is not a result line, found {short_repr(line)}') from e
        for key in dict.fromkeys([*expected, *finished]):
            if expected.get(key) != finished.get(key):
                raise self._mismatch(
                    f'in its line {number}, {key:.60} is not that of line {sample.line} of the dataset')

    def _mismatch(self, reason: str) -> ValueError:
        return ValueError(f'Cannot resume {self.path}: {reason}. Run with what it was made with, or give --overwrite '
                          f'or another --result_path.')


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
        """Return the engine's choice for one sample and add the seconds it took to the summary."""
        weights = {self.aliases[name]: weight for name, weight in zip(sample.adapters, sample.weights)}
        # Composing is seeded by what is composed: the composer skips it where the sample before had the same.
        start = self._clock(_derive_seed(self.seed, sample.adapters, sample.weights))
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
        """Seed torch, wait for the device and return the time."""
        import torch
        if seed is not None:
            torch.manual_seed(seed)
        if self.engine.model.device.type == 'cuda':
            torch.cuda.synchronize(self.engine.model.device)
        return time.perf_counter()


def _check_result_path(config: InferConfig) -> None:
    """Raise ValueError where the result file cannot be written or is not to be. Nothing is written here."""
    path = Path(config.result_path)
    if config.resume and config.overwrite:
        raise ValueError('--resume and --overwrite exclude each other.')
    check_writable(path)
    with told_as(f'Cannot write {path}'):
        if not path.exists() or path.stat().st_size == 0:
            return
        if path.samefile(config.val_dataset):
            raise ValueError(f'The result path {path} is the dataset itself.')
    if not config.overwrite and not config.resume:
        raise ValueError(f'The result file {path} exists. Give --resume to go on with it, --overwrite to '
                         f'start again, or another --result_path.')


def _to_request(sample: Sample) -> 'InferRequest':
    from ..ms_swift import InferRequest
    extra = {key: sample.data[key] for key in REQUEST_KEYS if sample.data.get(key) is not None}
    return InferRequest(messages=sample.messages, **extra)


def _check_template(config: InferConfig, args: 'BaseArguments', samples: Sequence[Sample],
                    requests: 'Sequence[InferRequest]') -> None:
    """Encode every sample with the model's template, for which the model itself is not needed.

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


def _result_line(config: InferConfig, sample: Sample, response: Any, logprobs: Any) -> Dict[str, Any]:
    """Build a result: what `swift infer` writes, then how it was composed and where it came from."""
    data = {
        **sample.data,
        'messages': [*sample.messages, {
            'role': 'assistant',
            'content': response
        }],
        'weights': list(sample.weights),
    }
    return {
        'response': response,
        'labels': sample.label,
        'logprobs': logprobs,
        **data,
        'merge_method': config.merge_method,
        'line': sample.line,
    }


def _write_line(file: BinaryIO, line: Dict[str, Any]) -> None:
    # In one write and flushed at once, so that a killed run loses the sample it was working on and no other.
    file.write(json.dumps(line, ensure_ascii=False).encode('utf-8') + b'\n')
    file.flush()


def _settings(config: InferConfig, args: 'BaseArguments', checkpoints: Sequence[AdapterCheckpoint]) -> Dict[str, Any]:
    """Collect what the result lines depend on besides the samples, as JSON."""
    settings: Dict[str, Any] = {'model': os.path.abspath(args.model) if os.path.isdir(args.model) else args.model}
    for key in dict.fromkeys([*_RECORDED, *sorted(config.swift_args)]):
        # ms-swift has more of them with every release.
        value = getattr(args, key, None)
        if value is not None and key not in _NOT_RECORDED:
            # A torch.dtype, for one, is no JSON.
            settings[key] = value if isinstance(value, (bool, int, float, str, list, dict)) else str(value)
    settings['merge_method'] = config.merge_method
    settings.update({key: value for key, value in sorted(config.composer_args.items()) if value is not None})
    if config.compile_merging:
        # It rounds in another way.
        settings['compile_merging'] = True
    settings.update({f'adapter {checkpoint.name}': checkpoint.digest()[:16] for checkpoint in checkpoints})
    return settings


def _derive_seed(*parts: Any) -> int:
    """Derive a seed that has nothing to do with those derived from other parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7], 'big')


def _show(value: Any) -> str:
    text = 'not given' if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f'{text[:60]}...'
