"""Loading the checkpoints of adapters onto one model.

A user's NAME may be anything, but inside a model it becomes the name of a module and a part of parameter names. So
every adapter is loaded under an alias of ours, and the names of tensors are built segment by segment, never by
replacing text.
"""
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, Sequence, Tuple, Union

from ..errors import joined, printable, short_repr
from ..lora.checkpoint import CONFIG_NAME, AdapterCheckpoint, join_key, split_key

if TYPE_CHECKING:
    from peft import PeftModel
    from swift.tuners import SwiftModel
    from torch import Tensor, nn


def load_adapters(model: 'nn.Module',
                  checkpoints: Sequence[AdapterCheckpoint]) -> 'Tuple[Union[SwiftModel, PeftModel], Dict[str, str]]':
    """Loads all adapters onto a base model, through ms-swift.

    If all are in ms-swift's format the result is one `SwiftModel`, otherwise a `PeftModel`, for which those in
    ms-swift's format are converted in a temporary folder.

    Args:
        model: The base model, without adapters.
        checkpoints: What `find_checkpoints` returned.

    Returns:
        The wrapped model in evaluation mode, and the alias under which each name was loaded.

    Raises:
        ValueError: If an adapter does not fit the model, or if a tensor of its file did not arrive in the model or the
            other way around.
    """
    from swift.tuners import SwiftModel

    # Of one length, as ms-swift and PEFT here and there look for an adapter's name anywhere in a parameter's name.
    digits = len(str(len(checkpoints)))
    aliases = {checkpoint.name: f'adapter_{i:0{digits}}' for i, checkpoint in enumerate(checkpoints)}
    load_all = _load_as_swift if all(checkpoint.is_swift for checkpoint in checkpoints) else _load_as_peft
    wrapped = load_all(model, [(checkpoint, aliases[checkpoint.name]) for checkpoint in checkpoints])
    # Not told by `peft_config`: a SwiftModel forwards to its base model, which PEFT gives one as well.
    base_model = wrapped.base_model if isinstance(wrapped, SwiftModel) else wrapped.get_base_model()
    for checkpoint in checkpoints:
        _check_arrived(base_model, checkpoint, aliases[checkpoint.name])
    return wrapped, aliases


def _load_as_swift(model: 'nn.Module', checkpoints: Sequence[Tuple[AdapterCheckpoint, str]]) -> 'SwiftModel':
    from swift.tuners import SwiftModel
    from swift.tuners.utils import SwiftConfig
    for checkpoint, alias in checkpoints:
        with _names_adapter(checkpoint):
            config = SwiftConfig.from_pretrained(str(checkpoint.folder))
            for option in ('target_modules', 'exclude_modules'):
                # JSON has no sets, and PEFT's `add_weighted_adapter` takes nothing else.
                if isinstance(getattr(config, option), list):
                    setattr(config, option, set(getattr(config, option)))
            wrapped = SwiftModel(model, {alias: config}, inference_mode=True)
            tensors = {lora_parameter_name(key, alias): tensor for key, tensor in _load_tensors(checkpoint).items()}
            # Not `SwiftModel.load_state_dict`, which replaces text in the keys.
            wrapped.base_model.load_state_dict(tensors, strict=False)
            model = wrapped
    return model


def _load_as_peft(model: 'nn.Module', checkpoints: Sequence[Tuple[AdapterCheckpoint, str]]) -> 'PeftModel':
    from swift.tuners import Swift
    for checkpoint, alias in checkpoints:
        with _names_adapter(checkpoint), _peft_folder(checkpoint) as folder:
            model = Swift.from_pretrained(model, str(folder), alias)
    return model


@contextmanager
def _names_adapter(checkpoint: AdapterCheckpoint) -> Iterator[None]:
    """Turn what torch, PEFT and ms-swift raise about an adapter that does not fit into a ValueError that names it."""
    try:
        yield
    except Exception as e:  # a config may hold values of any type, and then raises whatever comes
        # Torch lists every tensor that does not fit; the first one says enough.
        reason = printable(' '.join(line.strip() for line in str(e).splitlines()[:2]))
        raise ValueError(f'{checkpoint} cannot be loaded onto this base model: {reason:.1000}') from e


@contextmanager
def _peft_folder(checkpoint: AdapterCheckpoint) -> Iterator[Path]:
    """Yield a folder with the checkpoint in PEFT's format, converted by ms-swift where it is in ms-swift's."""
    if not checkpoint.is_swift:
        yield checkpoint.folder
        return
    from swift.tuners import Swift
    stored_names = {(split_key(key) or ('', '', ''))[2] for key in _load_tensors(checkpoint)}
    if len(stored_names) != 1:
        raise ValueError(f'its tensors are of several adapters: {sorted(stored_names)}.')
    stored_name = stored_names.pop()
    with tempfile.TemporaryDirectory() as tmp:
        # Converted in place, so that nothing but the adapter is copied: a checkpoint may hold an optimizer, too.
        folder = Path(tmp, stored_name)
        folder.mkdir()
        for file in (checkpoint.folder / CONFIG_NAME, checkpoint.weights_file):
            shutil.copy(file, folder)
        Swift.save_to_peft_format(tmp, tmp)
        # ms-swift moves an adapter called `default` one level up.
        yield folder if folder.exists() else Path(tmp)


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
    return join_key(module, segment, alias)


def _load_tensors(checkpoint: AdapterCheckpoint) -> 'Dict[str, Tensor]':
    """Reads the tensors to the CPU, keyed as in the file. Raises ValueError where the file is damaged."""
    from peft.utils import load_peft_weights
    try:
        tensors: Dict[str, Tensor] = load_peft_weights(str(checkpoint.folder), device='cpu')
        return tensors
    except Exception as e:  # safetensors and pickle have errors of their own
        raise ValueError(f'{checkpoint}: cannot read {checkpoint.weights_file} ({type(e).__name__}). Copy it again, or '
                         'save the adapter again.') from e


def _check_arrived(base_model: 'nn.Module', checkpoint: AdapterCheckpoint, alias: str) -> None:
    """Compare the file with the model; ms-swift and PEFT at most log what does not match."""
    import torch
    expected = {}
    for name, parameter in base_model.named_parameters():
        parts = split_key(name)
        if parts is not None and parts[2] == alias:
            expected[name] = parameter
    homeless = []
    for key, tensor in _load_tensors(checkpoint).items():
        if split_key(key) is None:
            raise ValueError(f'{checkpoint}: {printable(key)} is not a tensor of a LoRA and cannot be fused: save '
                             f'{checkpoint.weights_file} without it.')
        if not tensor.isfinite().all():
            raise ValueError(f'{checkpoint}: tensor {short_repr(key)} of {checkpoint.weights_file} is expected to hold '
                             'finite values, found infinite ones or NaN: train it again.')
        arrived = expected.pop(lora_parameter_name(key, alias), None)
        if arrived is None or not torch.equal(arrived, tensor.to(arrived)):
            homeless.append(key)
    if homeless:
        raise ValueError(f'{checkpoint}: {len(homeless)} tensors of the file have no place in this base model: '
                         f'{joined(homeless)}.')
    if expected:
        raise ValueError(f'{checkpoint}: the file has no tensors for {len(expected)} of the parameters that its config '
                         f'asks for in this base model: {joined(list(expected))}.')
