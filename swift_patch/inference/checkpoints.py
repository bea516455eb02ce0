"""The checkpoints that a command is given: which there are, and what is wrong with them as files, all at once."""
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from ..errors import printable
from ..lora.checkpoint import BASE_WEIGHTS, AdapterCheckpoint, find_checkpoint, is_checkpoint, read_object, split_key
from ..lora.header import Header, opened, read_header
from ..lora.paths import expanded, listed_in_manifest, paths_in_folder
from .hub import Hub, is_hub_id, name_of_id, why_no_id

# What `--adapters` takes.
FORMS = 'NAME=PATH, a folder, @FILE or the id of an adapter on a hub'


def parse_adapters(items: Sequence[str]) -> Dict[str, str]:
    """Reads what `--adapters` is given, any mixture of these.

    - `NAME=PATH`: one checkpoint. A PATH may contain `=`, a NAME cannot.
    - `PATH`: one checkpoint, by the name of its folder.
    - `DIR`: all checkpoints in a folder, each by the name of its own folder.
    - `@FILE`: all checkpoints that a manifest lists, see `AdapterLibrary.from_manifest`.
    - A hub id (`owner/name`, `owner/name:folder`) wherever a path may be: nothing is fetched yet.

    `~` and `$VARIABLE` may be in all of them. Which files there are is looked at no further than this needs.

    Returns:
        The path or the hub id of each adapter, by name.

    Raises:
        ValueError: If an argument has another form, or a name comes twice.
    """
    adapters: Dict[str, str] = {}
    for item in items:
        for name, path in _parsed(item).items():
            if name in adapters:
                raise ValueError(f'--adapters names {name!r} twice: {adapters[name]} and {path}.')
            adapters[name] = path
    return adapters


def _parsed(item: str) -> Dict[str, str]:
    name, separator, path = item.partition('=')
    plain = expanded(item)
    if item.startswith('@'):
        return _in_manifest(expanded(item[1:]))
    if separator and not os.path.exists(plain):
        if not name or not path:
            raise ValueError(f'--adapters takes {FORMS}, got {item!r}.')
        return {name: expanded(path)}
    if is_hub_id(plain):
        return {name_of_id(plain): plain}
    if not os.path.exists(plain):
        raise ValueError(f'--adapters takes {FORMS}, got {item!r}: the path does not exist{why_no_id(plain)}.')
    if not os.path.isdir(plain):
        raise ValueError(f'--adapters takes {FORMS}, got {item!r}: this is a file; a manifest is given as @{item}, and '
                         'a checkpoint as its folder.')
    if is_checkpoint(Path(plain)):
        return {os.path.basename(os.path.abspath(plain)): plain}
    return paths_in_folder(plain)


def _in_manifest(file: str) -> Dict[str, str]:
    """Returns the paths and the hub ids in a manifest. Paths are relative to its folder."""
    folder = os.path.dirname(file)
    return {
        name: given if is_hub_id(given, folder) and is_hub_id(given) else os.path.join(folder, expanded(given, folder))
        for name, given in listed_in_manifest(file).items()
    }


def find_checkpoints(adapters: Mapping[str, Union[str, Path]],
                     swift_args: Optional[Mapping[str, Any]] = None) -> List[AdapterCheckpoint]:
    """Finds and checks the files of all adapters; headers only, so this takes no time and needs no model.

    Args:
        adapters: Where each named adapter is. A path is the folder that `swift sft` wrote as checkpoint-N. What has the
            id of an adapter on a hub instead is fetched.
        swift_args: What users gave of ms-swift's arguments, which tell the hub.

    Returns:
        The checkpoints in the order of `adapters`.

    Raises:
        ValueError: If any of them is missing, is not a LoRA or cannot be fused. It names all of those.
    """
    if not adapters:
        raise ValueError('No adapters are given.')
    checkpoints: List[AdapterCheckpoint] = []
    problems: List[str] = []
    hub = Hub(swift_args or {})
    for name, path in adapters.items():
        try:
            checkpoint = find_checkpoint(name, Path(hub.path_of(name, str(path))))
            _lora_shapes(checkpoint)
        except OSError as e:  # it vanished meanwhile, or a folder without permission
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
        ValueError: If adapters were made for layers of other shapes. It names all of those.
    """
    base_shapes = _base_shapes(Path(model_dir))
    found = (_misfit(checkpoint, base_shapes) for checkpoint in checkpoints)
    problems = [
        f'{checkpoint} does not belong to the base model {model_dir}: {misfit}.'
        for checkpoint, misfit in zip(checkpoints, found) if misfit
    ]
    if problems:
        raise ValueError('\n'.join(problems))


def _misfit(checkpoint: AdapterCheckpoint, base_shapes: Mapping[str, Tuple[int, ...]]) -> str:
    """Returns what shows that an adapter was made for another model, empty where nothing does."""
    shapes = _lora_shapes(checkpoint)
    for (module, segment, stored_name), a_shape in shapes.items():
        base_shape = base_shapes.get(f'{module}.weight', ())
        # An output head grows with new tokens after its weights were read.
        if segment != 'lora_A' or len(base_shape) != 2 or module.endswith('lm_head'):
            continue
        lora_shape = (*shapes[module, 'lora_B', stored_name][:1], *a_shape[1:])
        # Conv1D keeps its weight transposed.
        if sorted(base_shape) != sorted(lora_shape):
            return f'{printable(module)} is {lora_shape} in the adapter and {base_shape} in the model'
    return ''


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
        if parts is None and key.endswith(BASE_WEIGHTS):
            # They are compared with those of the model.
            continue
        if parts is None:
            raise ValueError(f'{checkpoint}: {printable(key)} is not a tensor of a LoRA and cannot be fused: save '
                             f'{checkpoint.weights_file} without it.')
        shapes[parts] = shape
    for module, segment, stored_name in shapes:
        partner = segment[:-1] + ('B' if segment[-1] == 'A' else 'A')
        if (module, partner, stored_name) not in shapes:
            raise ValueError(f'{checkpoint}: in {checkpoint.weights_file}, {printable(module)} has {segment} but not '
                             f'{partner}: save the adapter again.')
    if not shapes:
        raise ValueError(f'{checkpoint}: {checkpoint.weights_file} has no tensors: save the adapter again.')
    for (module, segment, stored_name), a_shape in shapes.items():
        b_shape = shapes[module, segment[:-1] + 'B', stored_name]
        # Those of a convolution may be in groups. What is empty is told when the file is compared with the model.
        is_pair = len(a_shape) == len(b_shape) > 1 and (len(a_shape) > 2 or a_shape[0] == b_shape[1])
        if segment[-1] == 'A' and not is_pair and 0 not in a_shape + b_shape:
            raise ValueError(f'{checkpoint}: {checkpoint.weights_file} is expected to have A and B of one rank, found '
                             f'shapes {a_shape} and {b_shape} for {printable(module)}: save the adapter again.')
    return shapes


def _header_shapes(prefix: str, file: Path) -> Dict[str, Tuple[int, ...]]:
    try:
        with opened(str(file)) as fd:
            header = Header(read_header(fd))
            header.check_size(os.fstat(fd).st_size)
    except (OSError, ValueError) as e:
        reason = e.strerror or e if isinstance(e, OSError) else f'{e}. Copy it again, or save it again'
        raise ValueError(f'{prefix} cannot read {file}: {reason}.') from e
    return {key: entry.shape for key, entry in header.entries.items()}


def _base_shapes(model_dir: Path) -> Dict[str, Tuple[int, ...]]:
    config_file = model_dir / 'config.json'
    prefix = f'base model ({model_dir}):'
    if not config_file.is_file() or 'quantization_config' in read_object(prefix, config_file):
        return {}
    shapes: Dict[str, Tuple[int, ...]] = {}
    for file in model_dir.glob('model*.safetensors'):
        shapes.update(_header_shapes(prefix, file))
    return shapes
