"""LoRA checkpoints in ms-swift's format and in PEFT's: told apart and checked as files."""
import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

from ..errors import joined, printable, short_repr
from .changes_base import why_changed_base

CONFIG_NAME = 'adapter_config.json'
ARGS_NAME = 'args.json'
WEIGHTS_NAMES = ('adapter_model.safetensors', 'adapter_model.bin')
EXTRA_STATES = 'extra_states'

# A linear layer holds its A and B as modules (`lora_A.<adapter>.weight`), an embedding as parameters.
LINEAR_SEGMENTS = ('lora_A', 'lora_B')
EMBEDDING_SEGMENTS = ('lora_embedding_A', 'lora_embedding_B')
PEFT_PREFIX = 'base_model.model.'
# What PEFT saves with an adapter of embeddings: base weights, of a layer that is wrapped or is not.
BASE_WEIGHTS = ('.base_layer.weight', 'embed_tokens.weight', 'lm_head.weight')

# What a digest reads of a file: so many blocks of so many bytes.
_BLOCKS, _BLOCK = 17, 2**12

# A checkpoint in ms-swift's format has the folder of its adapter, and a few more at most.
_MOST_FOLDERS = 16

# Options of a LoRA that a weighted sum of A and B cannot carry over, each with the values that are harmless.
_UNFUSABLE = {
    'modules_to_save': (None, []),
    'bias': (None, 'none'),
    'lora_bias': (None, False),
    'use_dora': (None, False),
    'use_qalora': (None, False),
    'use_qa_lora': (None, False),
    'use_merged_linear': (None, False),
    'trainable_token_indices': (None, [], {}),
    'layer_replication': (None, []),
    'target_parameters': (None, []),
    'alora_invocation_tokens': (None, []),
    'arrow_config': (None, ),
    'use_bdlora': (None, False),
    'monteclora_config': (None, ),
    'velora_config': (None, ),
}


def _is_number(value: Any) -> bool:
    # JSON as Python reads it has NaN and infinity.
    return type(value) in (int, float) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (TypeError, ValueError, re.error, RecursionError, OverflowError):
        return False
    return isinstance(value, str)


def _is_pattern_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns what tells an object from patterns of layer names to values that are right."""
    return lambda value: isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(is_right, value.values()))


def _are_targets(value: Any) -> bool:
    return _is_pattern(value) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


# What PEFT would stumble over with an error that tells neither the adapter nor the option. None is its default.
_EXPECTED: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    'r': ('a positive integer', _is_rank),
    'lora_alpha': ('a finite number', _is_number),
    'rank_pattern': ('an object of regular expressions and positive integers', _is_pattern_of(_is_rank)),
    'alpha_pattern': ('an object of regular expressions and finite numbers', _is_pattern_of(_is_number)),
    'target_modules': ('a list of names or a regular expression', _are_targets),
    'exclude_modules': ('a list of names or a regular expression', _are_targets),
    'init_lora_weights': ('a name, true or false', lambda value: isinstance(value, (str, bool))),
}


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A LoRA checkpoint whose files have been found and checked.

    Attributes:
        name: What the user calls it.
        path: Where the user says it is.
        folder: The folder with the config and the weights: `path`, or the one below it in ms-swift's format.
        is_swift: Whether it is in ms-swift's format, written by a `SwiftModel`; otherwise it is in PEFT's.
        config: What adapter_config.json holds. Checkpoints whose files are alike share it: nobody may change it.
        content: The bytes of that file.
    """
    name: str
    path: Path
    folder: Path
    is_swift: bool
    config: Dict[str, Any]
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return f'adapter {self.name!r} ({self.path})'

    @property
    def has_args(self) -> bool:
        """Whether there is an args.json, from which ms-swift takes what a user does not give."""
        return (self.path / ARGS_NAME).is_file()

    @property
    def weights_file(self) -> Path:
        """The file with the tensors; raises ValueError where there is none."""
        for name in WEIGHTS_NAMES:
            file = self.folder / name
            if os.path.isfile(file):
                return file
        raise ValueError(f'{self}: there is no {WEIGHTS_NAMES[0]} in {self.folder}.')

    def digest(self) -> str:
        """Returns a SHA-256 that stays the same when the checkpoint moves.

        It is over the config, and over the size and some parts of the file with the tensors: its header, and blocks
        that are spread over it. So it takes as long for a large file as for a small one, and tells two trainings apart
        unless they differ in a few values alone.
        """
        sha = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        try:
            with open(self.weights_file, 'rb') as f:
                size = os.fstat(f.fileno()).st_size
                sha.update(f'{self.weights_file.name} {size}'.encode())
                for number in range(_BLOCKS):
                    f.seek(number * max(size - _BLOCK, 0) // (_BLOCKS - 1))
                    sha.update(f.read(_BLOCK))
        except OSError as e:
            raise ValueError(f'{self}: cannot read {self.weights_file}: {e.strerror or e}.') from e
        return sha.hexdigest()


def split_key(key: str) -> Optional[Tuple[str, str, str]]:
    """Splits a key into module, segment (`lora_A`, ...) and the adapter's name in the file, empty in PEFT's format."""
    parts = key.removeprefix(PEFT_PREFIX).split('.')
    # The first one: an adapter may itself be called `lora_A`, a module of a model is not.
    at = next((i for i, part in enumerate(parts) if part in LINEAR_SEGMENTS + EMBEDDING_SEGMENTS), None)
    if at is None:
        return None
    tail = parts[at + 1:]
    if parts[at] in LINEAR_SEGMENTS:
        if not tail or tail.pop() != 'weight':
            return None
    if len(tail) > 1:
        return None
    return '.'.join(parts[:at]), parts[at], ''.join(tail)


def join_key(module: str, segment: str, name: str = '') -> str:
    """Returns the key that `split_key` splits into these, without PEFT's prefix."""
    return '.'.join(filter(None, (module, segment, name, 'weight' if segment in LINEAR_SEGMENTS else '')))


def is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is a checkpoint of an adapter, in PEFT's format or in ms-swift's; not one of several.

    Of a folder of many, no file is opened.
    """
    if (path / CONFIG_NAME).is_file():
        return True
    try:
        with os.scandir(path) as entries:
            folders = [entry.path for entry in entries if entry.is_dir()]
        if len(folders) > _MOST_FOLDERS:
            return False
        # ms-swift's format has one folder for the adapter in it. In PEFT's, that is the checkpoint of another one.
        configs = [file for file in (Path(folder, CONFIG_NAME) for folder in folders) if file.is_file()]
        return len(configs) == 1 and 'swift_type' in read_object(f'{path}:', configs[0])
    except (OSError, ValueError):
        # Whoever uses it is told.
        return False


def find_checkpoint(name: str, path: Path) -> AdapterCheckpoint:
    """Finds the files of an adapter and checks its config. No tensor is read, and no model is needed.

    Args:
        name: What the user calls it.
        path: The folder that `swift sft` wrote as checkpoint-N, or that PEFT wrote.

    Raises:
        ValueError: It is missing, is not a LoRA, or cannot be fused.
    """
    try:
        checkpoint = _found(name, path)
        _check_config(checkpoint)
        return checkpoint
    except OSError as e:  # a name that is too long, a folder without permission
        raise ValueError(f'adapter {name!r} ({path}): {e.strerror or e}.') from e


def _found(name: str, path: Path) -> AdapterCheckpoint:
    prefix = f'adapter {name!r} ({path}):'
    try:
        config, content = _read_config(prefix, path)
        return AdapterCheckpoint(name, path, path, 'swift_type' in config, config, content)
    except (FileNotFoundError, NotADirectoryError):
        pass
    if not path.exists():
        raise ValueError(f'{prefix} the path does not exist.')
    if not path.is_dir():
        raise ValueError(f'{prefix} this is a file; give the folder {str(path.parent)!r}.')
    # ms-swift's format has one folder per adapter in a checkpoint, PEFT's has not.
    below = {folder.parent: _read_config(prefix, folder.parent) for folder in sorted(path.glob(f'*/{CONFIG_NAME}'))}
    swift_folders = [folder for folder, (config, _) in below.items() if 'swift_type' in config]
    if len(swift_folders) == 1:
        folder = swift_folders[0]
        if (path / EXTRA_STATES).exists():
            raise ValueError(f'{prefix} it was saved with {EXTRA_STATES}, which are not part of a LoRA.')
        return AdapterCheckpoint(name, path, folder, True, *below[folder])
    if swift_folders:
        raise ValueError(f'{prefix} it holds several adapters; give one of {joined(swift_folders)}.')
    # The output folder of a training, or one above it.
    nested = [
        *below, *(file.parent for file in sorted(path.glob(f'*/*/{CONFIG_NAME}'))),
        *(file.parent for file in sorted(path.glob(f'*/*/*/{CONFIG_NAME}')))
    ]
    if nested:
        found = {folder.parent if 'swift_type' in _read_config(prefix, folder)[0] else folder for folder in nested}
        raise ValueError(f'{prefix} this is not a checkpoint but holds some; give one of {joined(sorted(found))}.')
    if (path / 'config.json').is_file():
        raise ValueError(f'{prefix} this is a full model, not an adapter.')
    raise ValueError(f'{prefix} there is no {CONFIG_NAME} in it.')


def _read_config(prefix: str, folder: Path) -> Tuple[Dict[str, Any], bytes]:
    """Returns what a config holds, and its bytes. Raises what `read_object` raises."""
    try:
        return _read(prefix, folder / CONFIG_NAME, _parsed)
    except ValueError as e:
        raise ValueError(f'{str(e).rstrip(".")}: put it right, or copy the adapter again.') from e


def read_object(prefix: str, file: Path) -> Dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: the file cannot be read, or has none. The message begins with `prefix`.
        FileNotFoundError: there is no file.
        NotADirectoryError: one of its folders is a file.
    """
    return _read(prefix, file, _parsed.__wrapped__)[0]


@functools.lru_cache(maxsize=256)
def _parsed(content: bytes) -> Tuple[Any, bytes]:
    # With the bytes, so that ten thousand adapters whose files are alike keep them once.
    return json.loads(content), content


def _read(prefix: str, file: Path, parse: Callable[[bytes], Tuple[Any, bytes]]) -> Tuple[Dict[str, Any], bytes]:
    try:
        with open(file, 'rb') as f:
            data, content = parse(f.read())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror or e if isinstance(e, OSError) else f'it is not JSON: {printable(e)}'
        raise ValueError(f'{prefix} cannot read {file}: {reason}.') from e
    if not isinstance(data, dict):
        raise ValueError(f'{prefix} {file} must hold an object, found {short_repr(data)}.')
    return data, content


def _check_config(checkpoint: AdapterCheckpoint) -> None:
    config = checkpoint.config
    file = checkpoint.folder / CONFIG_NAME
    key = 'swift_type' if checkpoint.is_swift else 'peft_type'
    kind = config.get(key)
    if kind is None:
        raise ValueError(f'{checkpoint}: {file} is expected to have a {key}, found none: this is no config of an '
                         'adapter, or a damaged one.')
    if kind != 'LORA':
        raise ValueError(f'{checkpoint}: this is an adapter of type {printable(kind):.60}, not LORA.')
    for option, harmless in _UNFUSABLE.items():
        if config.get(option) not in harmless:
            raise ValueError(
                f'{checkpoint}: it was trained with {option}={short_repr(config[option])}, which cannot be fused.')
    init = config.get('init_lora_weights')
    why = why_changed_base(init)
    if why:
        raise ValueError(f'{checkpoint}: it was trained with init_lora_weights={short_repr(init)}, {why}.')
    for option, (expected, is_right) in _EXPECTED.items():
        value = config.get(option)
        if value is not None and not is_right(value):
            raise ValueError(f'{checkpoint}: {option} in {file} is expected to be {expected}, found '
                             f'{short_repr(value)}: put it right, or save the adapter again.')
