"""What an engine needs: one base model, and all adapters loaded onto it."""
from typing import TYPE_CHECKING, Any, Dict, Sequence, Tuple, Union

from ..errors import reason_of
from ..lora.checkpoint import AdapterCheckpoint
from .loading import load_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from swift.tuners import SwiftModel
    from torch import nn

    from ..ms_swift import BaseArguments


def load_base_model(args: 'BaseArguments') -> 'Tuple[nn.Module, Any]':
    """Loads the base model alone, in evaluation mode, and its template.

    Args:
        args: ms-swift's arguments: model, template, dtype, device, ...

    Raises:
        ValueError: If the model cannot be loaded.
    """
    from ..ms_swift import load_base

    # The adapters are ours to load, so that none of them needs the name that ms-swift would give it.
    try:
        model, template = load_base(args)
    except Exception as e:  # no such device, no such attention implementation, out of memory, a damaged file, ...
        raise ValueError(f'Cannot load the base model {args.model_dir}: {reason_of(e)}') from e
    return model.eval(), template


def load_model(args: 'BaseArguments',
               checkpoints: Sequence[AdapterCheckpoint]) -> 'Tuple[Union[SwiftModel, PeftModel], Any, Dict[str, str]]':
    """Loads the base model and its adapters.

    Args:
        args: ms-swift's arguments: model, template, dtype, device, ...
        checkpoints: What `find_checkpoints` returned.

    Returns:
        The model, its template, and the alias of each adapter in it.

    Raises:
        ValueError: If the model cannot be loaded, or if an adapter does not fit it.
    """
    model, template = load_base_model(args)
    model, aliases = load_adapters(model, checkpoints)
    return model, template, aliases
