"""The result file of `swift-patch infer`: its lines, and the settings that they were made with."""
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Dict, Iterator, Sequence, Set

from ..errors import joined, short_repr
from ..files import check_writable, os_errors_as
from ..lora.checkpoint import AdapterCheckpoint
from .config import ANSWER_OPTIONS, InferConfig
from .dataset import Sample

if TYPE_CHECKING:
    from ..ms_swift import BaseArguments

# What the result lines depend on, as it is in ms-swift's arguments in the end, wherever it came from.
_RECORDED = ('model_type', 'model_revision', 'torch_dtype', 'attn_impl', *ANSWER_OPTIONS)
# Where a model runs and how it is fetched does not make another run of it, and a token belongs in no file.
_NOT_RECORDED = ('model', 'device_map', 'use_hf', 'hub_token')
# Settings that are told to be other than those of a result file.
_MAX_CHANGES = 10
# The setting that an adapter is, with its name after this.
_ADAPTER = 'adapter '


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
        self._old_settings: Dict[str, Any] = {}
        self.num_finished = 0
        self._size = 0
        if config.overwrite or not self.path.exists():
            return
        with os_errors_as(f'Cannot read {self.path}'):
            content = self.path.read_bytes()
        # A killed run may have left a part of a line, and nothing after it.
        self._size = content.rfind(b'\n') + 1
        lines = content[:self._size].split(b'\n')[:-1]
        # The others are those of samples that are to come.
        adapters = {f'{_ADAPTER}{name}' for sample in samples[:len(lines)] for name in sample.adapters}
        if lines:
            self._check_settings(adapters)
        if len(lines) > len(samples):
            raise self._mismatch(f'it has {len(lines)} lines, the dataset {len(samples)} samples')
        for number, (line, sample) in enumerate(zip(lines, samples), start=1):
            self._check_line(number, line, sample, config)
        # Not before: where the dataset is another one, it names other adapters.
        unknown = sorted(adapters - self._old_settings.keys())
        if unknown:
            raise self._mismatch(f'its settings in {self.settings_path} do not have {joined(unknown)}')
        self.num_finished = len(lines)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens the file for appending after the finished lines; what follows them is cut off."""
        with os_errors_as(f'Cannot write {self.path}'):
            file = open(self.path, 'r+b' if self._size else 'wb')
            file.truncate(self._size)
            file.seek(self._size)
            if not self._size or self._old_settings != self.settings:
                # Before the next line and in one step: lines without settings could not be resumed.
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
            with os_errors_as(f'Cannot write {self.path}'):
                file.close()

    def _check_settings(self, adapters: Set[str]) -> None:
        try:
            old = json.loads(self.settings_path.read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError) as e:
            raise self._mismatch(f'its settings in {self.settings_path} cannot be read: {e}') from e
        if not isinstance(old, dict):
            raise self._mismatch(f'its settings in {self.settings_path} are expected to be an object, found '
                                 f'{short_repr(old)}')
        self._old_settings = old
        changed = [
            f'{key:.60} was {_show(old.get(key))} and is now {_show(self.settings.get(key))}'
            for key in dict.fromkeys([*old, *self.settings])
            if old.get(key) != self.settings.get(key) and (not key.startswith(_ADAPTER) or key in adapters & old.keys())
        ]
        if changed:
            raise self._mismatch('; '.join(changed[:_MAX_CHANGES]) + ('; ...' if len(changed) > _MAX_CHANGES else ''))

    def _check_line(self, number: int, line: bytes, sample: Sample, config: InferConfig) -> None:
        try:
            finished = json.loads(line)
            expected = result_line(config, sample, finished['response'], finished['logprobs'])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise self._mismatch(f'line {number} is not a result line, found {short_repr(line)}') from e
        for key in dict.fromkeys([*expected, *finished]):
            if expected.get(key) != finished.get(key):
                raise self._mismatch(
                    f'in its line {number}, {key:.60} is not that of line {sample.line} of the dataset')

    def _mismatch(self, reason: str) -> ValueError:
        return ValueError(f'Cannot resume {self.path}: {reason}. Run with what it was made with, or give --overwrite '
                          f'or another --result_path.')


def check_result_path(config: InferConfig) -> None:
    """Raises ValueError where the result file cannot be written or is not to be. Nothing is written here."""
    path = Path(config.result_path)
    if config.resume and config.overwrite:
        raise ValueError('--resume and --overwrite exclude each other.')
    check_writable(path)
    with os_errors_as(f'Cannot write {path}'):
        if not path.exists() or path.stat().st_size == 0:
            return
        if path.samefile(config.val_dataset):
            raise ValueError(f'The result path {path} is the dataset itself.')
    if not config.overwrite and not config.resume:
        raise ValueError(f'The result file {path} exists. Give --resume to go on with it, --overwrite to '
                         f'start again, or another --result_path.')


def result_line(config: InferConfig, sample: Sample, response: Any, logprobs: Any) -> Dict[str, Any]:
    """Builds a result: what `swift infer` writes, then how it was composed and where it came from."""
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


def write_line(file: BinaryIO, line: Dict[str, Any]) -> None:
    # In one write and flushed at once, so that a killed run loses the sample it was working on and no other.
    file.write(json.dumps(line, ensure_ascii=False).encode('utf-8') + b'\n')
    file.flush()


def _settings(config: InferConfig, args: 'BaseArguments', checkpoints: Sequence[AdapterCheckpoint]) -> Dict[str, Any]:
    """Collects what the result lines depend on besides the samples, as JSON."""
    settings: Dict[str, Any] = {'model': os.path.abspath(args.model) if os.path.isdir(args.model) else args.model}
    for key in dict.fromkeys([*_RECORDED, *sorted(config.swift_args)]):
        # ms-swift has more of them with every release.
        value = getattr(args, key, None)
        if value is not None and key not in _NOT_RECORDED:
            # A torch.dtype, for one, is no JSON.
            settings[key] = value if isinstance(value, (bool, int, float, str, list, dict)) else str(value)
    settings['merge_method'] = config.merge_method
    settings.update({key: value for key, value in sorted(config.composer_args.items()) if value is not None})
    # Padding rounds, and sampling draws, in another way in another batch.
    settings['max_batch_size'] = config.max_batch_size
    if config.compile_merging:
        # It rounds in another way.
        settings['compile_merging'] = True
    settings.update({f'{_ADAPTER}{checkpoint.name}': checkpoint.digest()[:16] for checkpoint in checkpoints})
    return settings


def _show(value: Any) -> str:
    text = 'not given' if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f'{text[:60]}...'
