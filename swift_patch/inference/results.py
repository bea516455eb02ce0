"""The result file of `swift-patch infer`: its lines, and the settings that they were made with."""
import fcntl
import json
import os
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Collection, Dict, List, Optional, Sequence, Set, Type

from ..errors import joined, short_repr
from ..files import check_writable, os_errors_as
from ..lora.checkpoint import AdapterCheckpoint
from .backends import is_vllm
from .config import ANSWER_OPTIONS, Answer, InferConfig
from .dataset import Sample

if TYPE_CHECKING:
    from ..ms_swift import InferArguments

# What the result lines depend on, as it is in ms-swift's arguments in the end, wherever it came from.
_RECORDED = ('model_type', 'model_revision', 'torch_dtype', 'attn_impl', *ANSWER_OPTIONS)
# Where a model runs, how it is fetched and what is made of the results does not make another run of it, and a token
# belongs in no file.
_NOT_RECORDED = ('model', 'device_map', 'max_memory', 'use_hf', 'hub_token', 'metric', 'stream', 'load_args',
                 'external_plugins', 'dataset_num_proc', 'load_from_cache_file', 'ddp_timeout', 'ddp_backend',
                 'vllm_gpu_memory_utilization', 'vllm_tensor_parallel_size', 'vllm_pipeline_parallel_size',
                 'vllm_data_parallel_size', 'vllm_max_num_seqs', 'vllm_max_lora_rank', 'vllm_enforce_eager',
                 'vllm_disable_custom_all_reduce', 'vllm_mm_processor_cache_gb')
# Settings that are told to be other than those of a result file.
_MAX_CHANGES = 10
# The setting that an adapter is, with its name after this.
_ADAPTER = 'adapter '


class ResultFile:
    """The result file and, next to it, `<result_path>.args.json` with the settings that the lines were made with.

    It is a context. A file that exists is locked for its time, so that no two runs write to one; the system unlocks it
    when a run is killed. Until `start` it is only read. What is replaced stays until the first new line is there.

    Args:
        path: The file.
        config: The run.
        args: ms-swift's arguments.
        samples: All samples of the dataset.
        checkpoints: The adapters.

    Attributes:
        todo: The samples whose lines are to be written, by number, in order.
        num_finished: How many of the others there are.
        num_errors: How many lines of those say that there is no response.

    Raises:
        ValueError: The file cannot be resumed because it belongs to other inputs or settings, or another run is writing
            it.
    """

    def __init__(self, path: Path, config: InferConfig, args: 'InferArguments', samples: Sequence[Sample],
                 checkpoints: Sequence[AdapterCheckpoint]):
        # Not a link to it, which would be replaced.
        self.path = Path(os.path.realpath(path))
        self.settings_path = Path(f'{self.path}.args.json')
        self.settings = _settings(config, args, checkpoints)
        self._old_settings: Dict[str, Any] = {}
        # The lines that are finished, and the bytes that they take.
        self._lines: List[bytes] = []
        self._size = 0
        # How many lines are in place.
        self._position = 0
        self._file: Optional[IO[bytes]] = None
        self._new: Optional[Path] = None
        # Whether a write failed: what came of it is no whole line.
        self._is_torn = False
        errors: List[int] = []
        self._locked = self._lock('r+b') if self.path.exists() else None
        try:
            if self._locked is not None and not config.overwrite:
                errors = self._read(self._locked, samples, config)
        except BaseException:
            self.close()
            raise
        retried = errors if config.retry_errors else []
        self.todo = [*retried, *range(len(self._lines), len(samples))]
        self.num_finished = len(self._lines) - len(retried)
        self.num_errors = len(errors) - len(retried)
        self._is_replaced = config.overwrite or bool(retried)

    def __enter__(self) -> 'ResultFile':
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        self.close()

    def start(self) -> None:
        """Makes ready for writing; what follows the finished lines is cut off.

        Raises:
            ValueError: The file cannot be written.
        """
        with os_errors_as(f'Cannot write {self.path}'):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._locked is not None and self._is_replaced:
                self._new = self.path.with_name(f'{self.path.name}.new')
                self._file = open(self._new, 'w+b')
                _lock_file(self._file, self._new)
                return
            if self._locked is None:
                self._locked = self._lock('a+b')
                if self._locked.seek(0, os.SEEK_END):
                    raise ValueError(f'Cannot write {self.path}: another run has written it meanwhile. Give another '
                                     '--result_path.')
            self._file = self._locked
            self._file.truncate(self._size)
            self._file.seek(self._size)
            self._position = len(self._lines)
            if not self._size or self._old_settings != self.settings:
                # Before the next line and in one step: lines without settings could not be resumed.
                self._write_settings()

    def write(self, number: int, line: Dict[str, Any]) -> None:
        """Writes the line of a sample; those of `todo` come in order.

        Raises:
            ValueError: It cannot be written.
        """
        assert self._file is not None, 'start() comes first'
        with os_errors_as(f'Cannot write {self.path}'):
            self._is_torn = True
            self._keep(number)
            write_line(self._file, line)
            self._is_torn = False
            self._position += 1
            if self._position >= len(self._lines):
                self._put_in_place()

    def close(self) -> None:
        """Keeps what is written, and unlocks the file.

        Raises:
            ValueError: It cannot be written.
        """
        try:
            # Where a write failed, closing tries it again.
            with os_errors_as(f'Cannot write {self.path}'):
                if self._file is not None and self._new is not None and self._position and not self._is_torn:
                    self._keep(len(self._lines))
                    self._file.flush()
                    self._put_in_place()
                if self._file is not None:
                    self._file.close()
        finally:
            if self._new is not None:
                with suppress(OSError):
                    self._new.unlink(missing_ok=True)
            if self._locked is not None:
                self._locked.close()
            self._file = self._locked = self._new = None

    def _keep(self, end: int) -> None:
        """Copies finished lines that come before a sample."""
        assert self._file is not None
        for line in self._lines[self._position:end]:
            self._file.write(line + b'\n')
            self._position += 1

    def _put_in_place(self) -> None:
        """Replaces the old file by the new one, which has everything that the old one had and is to be kept."""
        if self._new is None:
            return
        if self._lines:
            # The old file can be gone on with by these settings, too.
            self._write_settings()
            os.replace(self._new, self.path)
            self._new = None
            return
        # Lines with the settings of others could be resumed as if they were theirs; without settings they cannot.
        settings = self.settings_path.read_bytes() if self.settings_path.exists() else None
        self.settings_path.unlink(missing_ok=True)
        try:
            os.replace(self._new, self.path)
        except OSError:
            if settings is not None:
                self.settings_path.write_bytes(settings)
            raise
        self._new = None
        self._write_settings()

    def _write_settings(self) -> None:
        tmp = Path(f'{self.settings_path}.tmp')
        # A path that is not Unicode has halves of surrogate pairs, which become escapes of JSON so.
        tmp.write_text(
            json.dumps(self.settings, ensure_ascii=False, indent=2) + '\n', encoding='utf-8', errors='backslashreplace')
        os.replace(tmp, self.settings_path)

    def _lock(self, mode: str) -> IO[bytes]:
        """Opens the file and locks it for as long as it is open."""
        while True:
            with os_errors_as(f'Cannot write {self.path}'):
                file = open(self.path, mode)
                try:
                    _lock_file(file, self.path)
                    # Another run may have put its own in place meanwhile.
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                        return file
                except FileNotFoundError:
                    pass
                except BaseException:
                    file.close()
                    raise
                file.close()

    def _read(self, file: IO[bytes], samples: Sequence[Sample], config: InferConfig) -> List[int]:
        """Reads and checks the finished lines, and returns which samples have none but an error."""
        with os_errors_as(f'Cannot read {self.path}'):
            content = file.read()
        # A killed run may have left a part of a line, and nothing after it.
        self._size = content.rfind(b'\n') + 1
        self._lines = content[:self._size].split(b'\n')[:-1]
        # The others are those of samples that are to come.
        adapters = {f'{_ADAPTER}{name}' for sample in samples[:len(self._lines)] for name in sample.adapters}
        if self._lines:
            self._check_settings(adapters)
        if len(self._lines) > len(samples):
            raise self._mismatch(f'it has {len(self._lines)} lines, the dataset {len(samples)} samples')
        errors = [
            number for number, (line, sample) in enumerate(zip(self._lines, samples))
            if self._checked(number + 1, line, sample, config).error is not None
        ]
        # Not before: where the dataset is another one, it names other adapters.
        unknown = sorted(adapters - self._old_settings.keys())
        if unknown:
            raise self._mismatch(f'its settings in {self.settings_path} do not have {joined(unknown)}')
        return errors

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

    def _checked(self, number: int, line: bytes, sample: Sample, config: InferConfig) -> Answer:
        """Returns the answer in a finished line, which is counted from 1."""
        try:
            finished = json.loads(line)
            answer = Answer(finished['response'], finished['logprobs'], error=finished.get('error'))
            expected = json.loads(_encoded(result_line(config, sample, answer)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise self._mismatch(f'line {number} is not a result line, found {short_repr(line)}') from e
        for key in dict.fromkeys([*expected, *finished]):
            if expected.get(key) != finished.get(key):
                raise self._mismatch(
                    f'in its line {number}, {key:.60} is not that of line {sample.line} of the dataset')
        return answer

    def _mismatch(self, reason: str) -> ValueError:
        return ValueError(f'Cannot resume {self.path}: {reason}. Run with what it was made with, or give --overwrite '
                          f'or another --result_path.')


def check_result_path(path: Optional[Path], config: InferConfig, datasets: Collection[str]) -> None:
    """Raises ValueError where the result file cannot be written or is not to be. Nothing is written here.

    Args:
        path: The file, None where it is to be a new one of the default name.
        config: The run.
        datasets: The files with the samples; what is none is passed over.
    """
    if config.resume and config.overwrite:
        raise ValueError('--resume and --overwrite exclude each other.')
    if config.retry_errors and not config.resume:
        raise ValueError('--retry_errors tries samples of an existing result file again: give --resume with it.')
    if path is None:
        if config.resume:
            raise ValueError('--resume goes on with an existing result file: give its --result_path.')
        return
    check_writable(path)
    check_writable(Path(f'{path}.args.json'))
    with os_errors_as(f'Cannot write {path}'):
        if not path.exists() or path.stat().st_size == 0:
            return
        if any(os.path.isfile(dataset) and path.samefile(dataset) for dataset in datasets):
            raise ValueError(f'The result path {path} is the dataset itself.')
    if not config.overwrite and not config.resume:
        raise ValueError(f'The result file {path} exists. Give --resume to go on with it, --overwrite to '
                         f'start again, or another --result_path.')


def result_line(config: InferConfig, sample: Sample, answer: Answer) -> Dict[str, Any]:
    """Builds a result: what `swift infer` writes, then how it was composed and where it came from."""
    asked = list(sample.messages)
    line = {
        'response': answer.response,
        'labels': sample.label,
        'logprobs': answer.logprobs,
        **sample.data,
        'messages': asked if answer.error else [*asked, {
            'role': 'assistant',
            'content': answer.response
        }],
        'weights': list(sample.weights),
        'merge_method': config.merge_method,
        'line': sample.line,
    }
    if len(config.val_dataset) > 1:
        line['dataset'] = sample.dataset
    if answer.error is not None:
        line['error'] = answer.error
    return line


def write_line(file: IO[bytes], line: Dict[str, Any]) -> None:
    # In one write and flushed at once, so that a killed run loses the sample it was working on and no other.
    file.write(_encoded(line) + b'\n')
    file.flush()


def _encoded(line: Dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, default=_as_json).encode('utf-8')


def _as_json(value: Any) -> str:
    """Returns what a line has in place of what is no JSON: an image that came as bytes, a date of a table."""
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _lock_file(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ValueError(f'Cannot write {path}: another run is writing it. Wait for it, or give another '
                         '--result_path.') from e
    except OSError:
        # Some file systems have no locks.
        pass


def _settings(config: InferConfig, args: 'InferArguments', checkpoints: Sequence[AdapterCheckpoint]) -> Dict[str, Any]:
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
    if not is_vllm(config):
        # Padding rounds, and sampling draws, in another way in another batch. Those of vLLM are never the same twice.
        settings['max_batch_size'] = config.max_batch_size
    if config.compile_merging:
        # It rounds in another way.
        settings['compile_merging'] = True
    settings.update({f'{_ADAPTER}{checkpoint.name}': checkpoint.digest()[:16] for checkpoint in checkpoints})
    return settings


def _show(value: Any) -> str:
    text = 'not given' if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f'{text[:60]}...'
