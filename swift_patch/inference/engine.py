"""ms-swift's own engine around one base model with all adapters loaded."""
from typing import TYPE_CHECKING, Dict, Sequence, Tuple

from .adapters import AdapterCheckpoint, load_adapters

if TYPE_CHECKING:
    from swift.arguments import BaseArguments
    from swift.infer_engine import TransformersEngine


def load_engine(args: 'BaseArguments',
                checkpoints: Sequence[AdapterCheckpoint]) -> 'Tuple[TransformersEngine, Dict[str, str]]':
    """Loads the base model and its adapters.

    Args:
        args: ms-swift's arguments: model, template, dtype, device, ...
        checkpoints: What `find_checkpoints` returned.

    Returns:
        The engine, whose `model` is a `SwiftModel` or a `PeftModel`, and the alias of each adapter in it.

    Raises:
        ValueError: If the model cannot be loaded, or if an adapter does not fit it.
    """
    from swift.infer_engine import TransformersEngine
    from swift.pipelines.utils import prepare_model_template

    # The adapters are ours to load, so that none of them needs the name that ms-swift would give it.
    try:
        model, template = prepare_model_template(args, adapters=[])
    except Exception as e:  # no such device, no such attention implementation, out of memory, a damaged file, ...
        reason = ' '.join(str(e).split())
        raise ValueError(f'Cannot load the base model {args.model_dir}: {type(e).__name__}: {reason:.1000}') from e
    model, aliases = load_adapters(model, checkpoints)
    return TransformersEngine(model, template=template, max_batch_size=1), aliases
