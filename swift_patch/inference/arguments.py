"""ms-swift's arguments, as `swift infer` makes them: what users give, and the args.json of adapters for the rest."""
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Type

from ..errors import reason_of, short_repr
from ..lora.checkpoint import ARGS_NAME, AdapterCheckpoint, read_object
from ..lora.paths import expanded

if TYPE_CHECKING:
    from ..ms_swift import InferArguments

logger = logging.getLogger(__name__)

# Files that are imported, in ms-swift 4 and before.
PLUGIN_OPTIONS = ('external_plugins', 'custom_register_path')
# Paths, which a shell does not expand after `=`.
_PATHS = ('model', *PLUGIN_OPTIONS)
# How an adapter was trained, and which implementation of one and the same thing it was trained with.
_NO_MATTER = ('tuner_type', 'train_type', 'attn_impl', 'experts_impl')
# Adapters that were trained with it name the place that it had there.
_OWN_PLUGIN = str(Path(__file__).parents[1] / 'external_plugin' / 'swift_patch_plugin.py')
# How to do without what an args.json says.
_WITHOUT = 'give --load_args false, and --model and the rest yourself'


def swift_arguments(swift_args: Mapping[str, Any],
                    checkpoints: Sequence[AdapterCheckpoint],
                    *,
                    val_dataset: Sequence[str] = (),
                    result_path: Optional[str] = os.devnull,
                    max_batch_size: int = 1,
                    arguments_class: 'Optional[Type[InferArguments]]' = None) -> 'InferArguments':
    """Builds ms-swift's arguments, with which models are loaded and asked.

    As in `swift infer`, what users do not give comes from the args.json of the first adapter that has one, unless they
    say `load_args=False`. Where that of another adapter says otherwise, a warning tells it.

    Args:
        swift_args: What users gave, by the names of ms-swift's `InferArguments`.
        checkpoints: What `find_checkpoints` returned.
        val_dataset: The dataset of an inference. Without one, there is nothing that several processes could share.
        result_path: Where its results go.
        max_batch_size: How many samples are answered together at most.
        arguments_class: The class of the arguments, by default `InferArguments`.

    Returns:
        The arguments. Where this is one process of several, ms-swift has made them a group.

    Raises:
        ValueError: ms-swift cannot use them, an args.json cannot be read, or this is one process of several.
    """
    from swift.utils import is_dist, is_master

    from ..ms_swift import InferArguments, registering_datasets
    if is_dist() and not val_dataset:
        raise ValueError('This command of swift-patch runs in one process, but this is one of several, as of torchrun: '
                         'start it by itself.')
    if is_dist() and swift_args.get('stream'):
        raise ValueError('--stream shows one response after another, but this is one of several processes, as of '
                         'torchrun: leave out --stream, or start it by itself.')
    given = {key: _expanded(key, value) for key, value in swift_args.items()}
    trained = [checkpoint for checkpoint in checkpoints if checkpoint.has_args] if given.get('load_args', True) else []
    if given.get('infer_backend') == 'vllm':
        # By default, vLLM computes 256 answers at a time, and the rank is that of the adapters, not 16.
        given = {'vllm_max_num_seqs': max_batch_size, 'vllm_max_lora_rank': None, **given}
        given['vllm_use_async_engine'] = True
    given.update(_from_args_files(trained, given, logger.warning if is_master() else logger.debug))
    source = ''
    if trained:
        source = (f' What is not given is that of {trained[0]}, from {trained[0].path / ARGS_NAME}: give what is wrong '
                  'there.')
    elif not given.get('model'):
        reason = 'with --load_args false' if not given.get('load_args', True) else 'where no adapter has an args.json'
        raise ValueError(f'A base model is expected {reason}, found none: give --model.')
    try:
        # It registers the user's own, and refuses those that another run of this process has registered.
        with registering_datasets():
            return (arguments_class or InferArguments)(
                **{
                    # ms-swift would print each token as it comes where there is no dataset.
                    'stream': False,
                    **given,
                    # For its args.json only.
                    'adapters': [str(checkpoint.path) for checkpoint in trained[:1]],
                    'val_dataset': list(val_dataset),
                    'result_path': result_path,
                    'max_batch_size': max_batch_size
                })
    except Exception as e:  # for users' mistakes: assertions, errors of hubs and networks, OSError, ValueError
        raise ValueError(f'ms-swift cannot use these arguments: {reason_of(e)}.{source}') from e


def _expanded(key: str, value: Any) -> Any:
    """Returns the value of an option with the user's home and variables in its paths."""
    # ms-swift reads a system prompt from a file of this kind.
    if isinstance(value, str) and (key in _PATHS or (key == 'system' and value.endswith('.txt'))):
        return expanded(value)
    if isinstance(value, (list, tuple)) and key in _PATHS:
        return [expanded(path) if isinstance(path, str) else path for path in value]
    return value


def _from_args_files(checkpoints: Sequence[AdapterCheckpoint], given: Mapping[str, Any],
                     tell: Callable[[str], None]) -> Dict[str, Any]:
    """Reads the args.json of adapters: whether they can be used, and whether they agree on what is not given.

    Args:
        checkpoints: Those that have one.
        given: What users gave.
        tell: Takes a sentence for each option on which they disagree.

    Returns:
        The plugins of the first one, by the names of options, by the places that they have here.

    Raises:
        ValueError: some cannot be read, with all of those, or the plugins of the first one are not here.
    """
    problems: List[str] = []
    first: Optional[AdapterCheckpoint] = None
    values: Dict[str, Any] = {}
    # Of each key: the first adapter that has another value, that value, and how many have others.
    others: Dict[str, Tuple[AdapterCheckpoint, Any, int]] = {}
    for checkpoint in checkpoints:
        try:
            found = _read(checkpoint, given)
        except (OSError, ValueError) as e:  # it vanished meanwhile, or is no args.json
            problems.append(f'{str(e).rstrip(".")}. Put it right, or {_WITHOUT}.')
            continue
        if first is None:
            first, values = checkpoint, found
            continue
        for key in values.keys() & found.keys():
            if values[key] == found[key] or key in _NO_MATTER:
                continue
            if _comparable(values[key]) != _comparable(found[key]):
                other, value, count = others.get(key, (checkpoint, found[key], 0))
                others[key] = other, value, count + 1
    if problems:
        raise ValueError('\n'.join(problems))
    if first is None:
        return {}
    for key in values:
        if key in others:
            tell(_disagreement(key, first, values[key], *others[key]))
    _check_plugins(first, values)
    return {key: values[key] for key in PLUGIN_OPTIONS if values.get(key)}


def _read(checkpoint: AdapterCheckpoint, given: Mapping[str, Any]) -> Dict[str, Any]:
    """Returns what ms-swift would take from the args.json of an adapter. Raises ValueError where it cannot be read."""
    from ..ms_swift import keys_of_args_file
    file = checkpoint.path / ARGS_NAME
    data = read_object(f'{checkpoint}:', file)
    version = data.get('swift_version')
    try:
        keys = keys_of_args_file(version)
    except (TypeError, ValueError) as e:
        raise ValueError(f'{checkpoint}: {file} is expected to have a version of ms-swift as its swift_version, found '
                         f'{short_repr(version)}') from e
    found = {key: data[key] for key in keys if key in data and given.get(key) in (None, [], ())}
    for key in found.keys() & set(PLUGIN_OPTIONS):
        files = [found[key]] if isinstance(found[key], str) else found[key]
        if isinstance(files, list):  # ms-swift tells other things
            found[key] = [_OWN_PLUGIN if _is_own(file) else file for file in files]
    return found


def _is_own(file: Any) -> bool:
    return os.path.basename(str(file)) == os.path.basename(_OWN_PLUGIN)


def _check_plugins(checkpoint: AdapterCheckpoint, values: Mapping[str, Any]) -> None:
    """Raises ValueError where a plugin that an args.json names is not here."""
    for key in PLUGIN_OPTIONS:
        for file in values[key] if isinstance(values.get(key), list) else ():
            if isinstance(file, str) and not os.path.isfile(os.path.expanduser(file)):
                raise ValueError(
                    f'{checkpoint}: {checkpoint.path / ARGS_NAME} says that it was trained with --{key} {file}, which '
                    f'is not here. Give --{key} with the place of the file, or {_WITHOUT}.')


def _disagreement(key: str, first: AdapterCheckpoint, taken: Any, other: AdapterCheckpoint, value: Any,
                  count: int) -> str:
    more = f', and {count - 1} more differ' if count > 1 else ''
    return (f'{first} was trained with {key}={short_repr(taken)}, but {other} with {key}={short_repr(value)}'
            f'{more}. All are answered with {short_repr(taken)}: give --{key} to decide it.')


def _comparable(value: Any) -> Any:
    """Returns a value of an args.json as what is equal where it means the same."""
    if value in (None, [], {}, ''):
        return None
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    if isinstance(value, str):
        return os.path.realpath(value) if os.path.exists(value) else value.removeprefix('torch.')
    return value
