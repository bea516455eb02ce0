"""What an engine needs: ms-swift's arguments, and one base model with all adapters loaded."""
from typing import TYPE_CHECKING, Any, Dict, Mapping, Sequence, Tuple, Union

from ..lora.checkpoint import AdapterCheckpoint
from .loading import load_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from swift.tuners import SwiftModel
    from torch import nn

    from ..ms_swift import BaseArguments


def swift_arguments(swift_args: Mapping[str, Any], checkpoints: Sequence[AdapterCheckpoint]) -> 'BaseArguments':
    """Builds ms-swift's arguments, with which models are loaded.

    Args:
        swift_args: What users gave. As in `swift infer`, the rest comes from the args.json of the first adapter that
            has one.
        checkpoints: What `find_checkpoints` returned.

    Raises:
        ValueError: If ms-swift cannot use them, or if this is one process of several.
    """
    from swift.utils import is_dist

    from ..ms_swift import BaseArguments
    if is_dist():
        raise ValueError('swift-patch runs in one process, but this is one of several, as of torchrun: start it by '
                         'itself (and split the dataset of an inference to use several).')
    # For its args.json only, from which ms-swift takes what is not given.
    trained = [str(checkpoint.path) for checkpoint in checkpoints if checkpoint.has_args][:1]
    try:
        return BaseArguments(adapters=trained, **swift_args)
    except Exception as e:  # for users' mistakes: assertions, errors of hubs and networks, OSError, ValueError
        raise ValueError(f'ms-swift cannot use these arguments: {type(e).__name__}: {e}') from e


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
        reason = ' '.join(str(e).split())
        raise ValueError(f'Cannot load the base model {args.model_dir}: {type(e).__name__}: {reason:.1000}') from e
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
