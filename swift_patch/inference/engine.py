"""What an engine needs: ms-swift's arguments, and one base model with all adapters loaded."""
from typing import TYPE_CHECKING, Any, Dict, Mapping, Sequence, Tuple, Union

from .checkpoints import AdapterCheckpoint
from .loading import load_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from swift.tuners import SwiftModel

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
    # For their args.json only: ms-swift takes what is not given from the first of these.
    trained = [str(checkpoint.path) for checkpoint in checkpoints if checkpoint.has_args]
    try:
        return BaseArguments(adapters=trained, **swift_args)
    except Exception as e:  # for users' mistakes: assertions, errors of hubs and networks, OSError, ValueError
        raise ValueError(f'ms-swift cannot use these arguments: {type(e).__name__}: {e}') from e


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
    from ..ms_swift import load_base

    # The adapters are ours to load, so that none of them needs the name that ms-swift would give it.
    try:
        model, template = load_base(args)
    except Exception as e:  # no such device, no such attention implementation, out of memory, a damaged file, ...
        reason = ' '.join(str(e).split())
        raise ValueError(f'Cannot load the base model {args.model_dir}: {type(e).__name__}: {reason:.1000}') from e
    model, aliases = load_adapters(model, checkpoints)
    return model, template, aliases
