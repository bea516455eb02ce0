"""What is used of ms-swift besides its tuners, under its names in ms-swift 4, whichever release is installed.

ms-swift itself is asked, not its version. Importing this module imports ms-swift.
"""
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Dict

if TYPE_CHECKING or find_spec('swift.infer_engine') is not None:
    from swift.arguments import BaseArguments, SftArguments
    from swift.infer_engine import AdapterRequest, InferRequest, TransformersEngine
    from swift.pipelines.utils import prepare_model_template
    from swift.utils import safe_snapshot_download
else:  # ms-swift 3: all in one module, where some are called otherwise
    from swift.llm import AdapterRequest, BaseArguments, InferRequest
    from swift.llm import PtEngine as TransformersEngine
    from swift.llm import TrainArguments as SftArguments
    from swift.llm import prepare_model_template, safe_snapshot_download

__all__ = [
    'BATCHES_STREAMS', 'TEMPLATE_MODE', 'TUNER_OPTION', 'AdapterRequest', 'BaseArguments', 'InferRequest',
    'SftArguments', 'TransformersEngine', 'get_engine', 'get_template', 'load_base', 'safe_snapshot_download',
    'sft_main'
]

# ms-swift 3 said `train_type`.
TUNER_OPTION = 'tuner_type' if hasattr(BaseArguments, 'tuner_type') else 'train_type'
# What a template is told it encodes for: ms-swift 3 called transformers `pt`, after PyTorch.
TEMPLATE_MODE = 'transformers' if TransformersEngine.__name__ == 'TransformersEngine' else 'pt'
# ms-swift 3 ends the streams of a batch where one of them has nothing to say.
BATCHES_STREAMS = TransformersEngine.__name__ == 'TransformersEngine'


def load_base(args: BaseArguments) -> Any:
    """Returns the model of `args` without its adapters, and its template."""
    adapters, args.adapters = args.adapters, []
    try:
        # Not by its argument `adapters`, which came with ms-swift 3.10.
        return prepare_model_template(args)
    finally:
        args.adapters = adapters


def get_template(args: BaseArguments) -> Any:
    """Returns the template of `args`, for which no model is loaded."""
    # Only ms-swift 4 gets the processor by itself.
    return args.get_template(args.get_model_processor(load_model=False)[1])


def get_engine(model: Any, template: Any, **options: Any) -> TransformersEngine:
    """Returns ms-swift's engine around a model that is loaded."""
    if hasattr(TransformersEngine, 'from_model_template'):  # ms-swift 3: its constructor loads the model
        return TransformersEngine.from_model_template(model, template, **options)
    return TransformersEngine(model, template=template, **options)


def sft_main(arguments: Dict[str, Any]) -> Any:
    """Trains as `swift sft` does and returns what it returns."""
    # Not above, for it imports all of the trainers.
    if SftArguments.__name__ == 'SftArguments':
        from swift.pipelines import sft_main
    else:  # ms-swift 3
        from swift.llm import sft_main
    return sft_main(SftArguments(**arguments))
