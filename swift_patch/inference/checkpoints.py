"""LoRA checkpoints in ms-swift's format and in PEFT's: told apart and checked as files."""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from ..errors import short_repr
from ..lora.changes_base import changes_base

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = 'adapter_config.json'
ARGS_NAME = 'args.json'
WEIGHTS_NAMES = ('adapter_model.safetensors', 'adapter_model.bin')
EXTRA_STATES = 'extra_states'

# A linear layer holds its A and B as modules (`lora_A.<adapter>.weight`), an embedding as parameters.
LINEAR_SEGMENTS = ('lora_A', 'lora_B')
EMBEDDING_SEGMENTS = ('lora_embedding_A', 'lora_embedding_B')
PEFT_PREFIX = 'base_model.model.'

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
}


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A LoRA checkpoint whose files have been found and checked.

    Attributes:
        name: What the user calls it.
        path: Where the user says it is.
        folder: The folder with the config and the weights: `path`, or the one below it in ms-swift's format.
        is_swift: Whether it is in ms-swift's format, written by a `SwiftModel`; otherwise it is in PEFT's.
        config: The content of adapter_config.json.
    """
    name: str
    path: Path
    folder: Path
    is_swift: bool
    config: Dict[str, Any]

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
            if (self.folder / name).is_file():
                return self.folder / name
        raise ValueError(f'{self}: there is no {WEIGHTS_NAMES[0]} in {self.folder}.')

    def digest(self) -> str:
        """Returns a SHA-256 over the config and the tensors, which stays the same when the checkpoint moves."""
        sha = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        with open(self.weights_file, 'rb') as f:
            while chunk := f.read(1 << 20):
                sha.update(chunk)
        return sha.hexdigest()

    def load_tensors(self) -> 'Dict[str, Tensor]':
        """Reads the tensors to the CPU, keyed as in the file. Raises ValueError where the file is damaged."""
        from peft.utils import load_peft_weights
        try:
            tensors: Dict[str, Tensor] = load_peft_weights(str(self.folder), device='cpu')
            return tensors
        except Exception as e:  # safetensors and pickle have errors of their own
            raise ValueError(f'{self}: cannot read {self.weights_file}: {e}') from e


def parse_adapters(items: Sequence[str]) -> Dict[str, str]:
    """Reads `NAME=PATH` arguments. A PATH may contain `=`, a NAME cannot.

    Raises:
        ValueError: If an argument has another form or a NAME comes twice.
    """
    adapters: Dict[str, str] = {}
    for item in items:
        name, separator, path = item.partition('=')
        if not separator or not name or not path:
            raise ValueError(f'--adapters takes NAME=PATH, got {item!r}.')
        if name in adapters:
            raise ValueError(f'--adapters names {name!r} twice: {adapters[name]} and {path}.')
        adapters[name] = path
    return adapters


def find_checkpoints(adapters: Mapping[str, Union[str, Path]]) -> List[AdapterCheckpoint]:
    """Finds and checks the files of all adapters; headers only, so this takes no time and needs no model.

    Args:
        adapters: Where each named adapter is. A path is the folder that `swift sft` wrote as checkpoint-N.

    Returns:
        The checkpoints in the order of `adapters`.

    Raises:
        ValueError: If any of them is missing, is not a LoRA or cannot be fused. It names all of those.
    """
    if not adapters:
        raise ValueError('No adapters are given.')
    checkpoints: List[AdapterCheckpoint] = []
    problems: List[str] = []
    for name, path in adapters.items():
        try:
            checkpoint = _find_checkpoint(name, Path(path))
            if checkpoint.has_args:
                _read_object(f'{checkpoint}:', checkpoint.path / ARGS_NAME)
            _check_config(checkpoint)
            _lora_shapes(checkpoint)
        except OSError as e:  # a name that is too long, a folder without permission
            problems.append(f'adapter {name!r} ({path}): {e.strerror or e}.')
        except ValueError as e:
            problems.append(str(e))
        else:
            checkpoints.append(checkpoint)
    if problems:
        raise ValueError('\n'.join(problems))
    return checkpoints


def check_base_model(checkpoints: Sequence[AdapterCheckpoint], model_dir: Union[str, Path]) -> None:
    """Compare the shapes of LoRA tensors with those of the base model's weights, reading file headers only.

    What the headers do not tell (names that differ, quantized weights, files of another kind) is left to loading.

    Args:
        checkpoints: The adapters.
        model_dir: The base model's folder.

    Raises:
        ValueError: If an adapter was made for a layer of another shape.
    """
    base_shapes = _base_shapes(Path(model_dir))
    for checkpoint in checkpoints:
        shapes = _lora_shapes(checkpoint)
        for (module, segment, stored_name), a_shape in shapes.items():
            base_shape = base_shapes.get(f'{module}.weight', ())
            # An output head grows with new tokens after its weights were read.
            if segment != 'lora_A' or len(base_shape) != 2 or module.endswith('lm_head'):
                continue
            lora_shape = (*shapes[module, 'lora_B', stored_name][:1], *a_shape[1:])
            # Conv1D keeps its weight transposed.
            if sorted(base_shape) != sorted(lora_shape):
                raise ValueError(f'{checkpoint} does not belong to the base model {model_dir}: {module} is '
                                 f'{lora_shape} in the adapter and {base_shape} in the model.')


def lora_parameter_name(key: str, alias: str) -> str:
    """Names the parameter, inside a base model, that a tensor of a checkpoint is for.

    Args:
        key: The tensor's key in a file of either format: `<module>.lora_A.weight`, `<module>.lora_A.<adapter>.weight`,
            `<module>.lora_embedding_A` or `<module>.lora_embedding_A.<adapter>`, all with or without PEFT's prefix.
        alias: The adapter's name in the model.

    Raises:
        ValueError: If the key is not that of a LoRA tensor.
    """
    parts = split_key(key)
    if parts is None:
        raise ValueError(f'{key!r} is not the key of a LoRA tensor.')
    module, segment, _ = parts
    return f'{module}.{segment}.{alias}' + ('.weight' if segment in LINEAR_SEGMENTS else '')


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


def _find_checkpoint(name: str, path: Path) -> AdapterCheckpoint:
    prefix = f'adapter {name!r} ({path}):'
    if not path.exists():
        raise ValueError(f'{prefix} the path does not exist.')
    if not path.is_dir():
        raise ValueError(f'{prefix} this is a file; give the folder {str(path.parent)!r}.')
    if (path / CONFIG_NAME).is_file():
        config = _read_config(prefix, path)
        return AdapterCheckpoint(name, path, path, 'swift_type' in config, config)
    # ms-swift's format has one folder per adapter in a checkpoint, PEFT's has not.
    below = {folder.parent: _read_config(prefix, folder.parent) for folder in sorted(path.glob(f'*/{CONFIG_NAME}'))}
    swift_folders = [folder for folder, config in below.items() if 'swift_type' in config]
    if len(swift_folders) == 1:
        folder = swift_folders[0]
        if (path / EXTRA_STATES).exists():
            raise ValueError(f'{prefix} it was saved with {EXTRA_STATES}, which are not part of a LoRA.')
        return AdapterCheckpoint(name, path, folder, True, below[folder])
    if swift_folders:
        raise ValueError(f'{prefix} it holds several adapters; give one of {joined(swift_folders)}.')
    # The output folder of a training, or one above it.
    nested = [
        *below, *(file.parent for file in sorted(path.glob(f'*/*/{CONFIG_NAME}'))),
        *(file.parent for file in sorted(path.glob(f'*/*/*/{CONFIG_NAME}')))
    ]
    if nested:
        found = {folder.parent if 'swift_type' in _read_config(prefix, folder) else folder for folder in nested}
        raise ValueError(f'{prefix} this is not a checkpoint but holds some; give one of {joined(sorted(found))}.')
    if (path / 'config.json').is_file():
        raise ValueError(f'{prefix} this is a full model, not an adapter.')
    raise ValueError(f'{prefix} there is no {CONFIG_NAME} in it.')


def _read_config(prefix: str, folder: Path) -> Dict[str, Any]:
    return _read_object(prefix, folder / CONFIG_NAME)


def _read_object(prefix: str, file: Path) -> Dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f'{prefix} cannot read {file}: {e}') from e
    if not isinstance(data, dict):
        raise ValueError(f'{prefix} {file} must hold an object, found {short_repr(data)}.')
    return data


def _check_config(checkpoint: AdapterCheckpoint) -> None:
    config = checkpoint.config
    kind = config.get('swift_type' if checkpoint.is_swift else 'peft_type')
    if kind != 'LORA':
        raise ValueError(f'{checkpoint}: this is an adapter of type {kind!s:.60}, not LORA.')
    for option, harmless in _UNFUSABLE.items():
        if config.get(option) not in harmless:
            raise ValueError(
                f'{checkpoint}: it was trained with {option}={short_repr(config[option])}, which cannot be fused.')
    init = config.get('init_lora_weights')
    if changes_base(init):
        raise ValueError(
            f'{checkpoint}: it was trained with init_lora_weights={short_repr(init)}, which changes the base model; '
            f'give the converted checkpoint.')


def _lora_shapes(checkpoint: AdapterCheckpoint) -> Dict[Tuple[str, str, str], Tuple[int, ...]]:
    """Reads the shapes of the tensors by module, segment and stored name; empty for a pickle, which has no header.

    Raises:
        ValueError: If the file holds anything but pairs of A and B.
    """
    if checkpoint.weights_file.suffix != '.safetensors':
        return {}
    shapes = {}
    for key, shape in _header_shapes(f'{checkpoint}:', checkpoint.weights_file).items():
        parts = split_key(key)
        if parts is None:
            raise ValueError(f'{checkpoint}: {key} is not a tensor of a LoRA and cannot be fused.')
        shapes[parts] = shape
    for module, segment, stored_name in shapes:
        partner = segment[:-1] + ('B' if segment[-1] == 'A' else 'A')
        if (module, partner, stored_name) not in shapes:
            raise ValueError(f'{checkpoint}: {module} has {segment} but not {partner}.')
    if not shapes:
        raise ValueError(f'{checkpoint}: {checkpoint.weights_file} is empty.')
    return shapes


def joined(items: Sequence[Union[str, Path]]) -> str:
    return ', '.join(map(str, items[:5])) + (', ...' if len(items) > 5 else '')


def _header_shapes(prefix: str, file: Path) -> Dict[str, Tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework='pt') as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except (OSError, SafetensorError) as e:
        raise ValueError(f'{prefix} cannot read {file}: {e}') from e


def _base_shapes(model_dir: Path) -> Dict[str, Tuple[int, ...]]:
    config_file = model_dir / 'config.json'
    prefix = f'base model ({model_dir}):'
    if not config_file.is_file() or 'quantization_config' in _read_object(prefix, config_file):
        return {}
    shapes: Dict[str, Tuple[int, ...]] = {}
    for file in model_dir.glob('model*.safetensors'):
        shapes.update(_header_shapes(prefix, file))
    return shapes
