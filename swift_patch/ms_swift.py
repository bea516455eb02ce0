"""What is used of ms-swift besides its tuners, under its names in ms-swift 4, whichever release is installed.

What is used of its server is in `serve.stock`.

ms-swift itself is asked, not its version. Importing this module imports ms-swift.
"""
import dataclasses
import functools
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, Iterator, Optional

from .quiet import keeping

if TYPE_CHECKING or find_spec('swift.infer_engine') is not None:
    from swift.arguments import BaseArguments, DataArguments, InferArguments, SftArguments
    from swift.dataset import (DATASET_MAPPING, DatasetLoader, DatasetMeta, DatasetSyntax, HfDataset, RowPreprocessor,
                               load_dataset, sample_dataset)
    from swift.infer_engine import AdapterRequest, InferRequest, TransformersEngine
    from swift.metrics import compute_rouge_bleu
    from swift.pipelines.utils import prepare_model_template
    from swift.utils import safe_snapshot_download
else:  # ms-swift 3: all in one module, where some are called otherwise
    from swift.llm import (DATASET_MAPPING, AdapterRequest, BaseArguments, DatasetMeta, HfDataset, InferArguments,
                           InferRequest)
    from swift.llm import PtEngine as TransformersEngine
    from swift.llm import RowPreprocessor
    from swift.llm import TrainArguments as SftArguments
    from swift.llm import load_dataset, prepare_model_template, safe_snapshot_download, sample_dataset
    from swift.llm.argument.base_args.data_args import DataArguments
    from swift.llm.dataset.loader import DatasetLoader, DatasetSyntax
    from swift.plugin.metric import compute_rouge_bleu

__all__ = [
    'DATASET_MAPPING', 'TEMPLATE_MODE', 'TUNER_OPTION', 'AdapterRequest', 'BaseArguments', 'DataArguments',
    'DatasetMeta', 'DatasetSyntax', 'HfDataset', 'InferArguments', 'InferRequest', 'RowPreprocessor', 'SftArguments',
    'TransformersEngine', 'compute_rouge_bleu', 'get_engine', 'get_template', 'keys_of_args_file', 'load_base',
    'load_dataset', 'meta_of_rows', 'registering_datasets', 'safe_snapshot_download', 'sample_dataset', 'sft_main'
]

# ms-swift 3 said `train_type`.
TUNER_OPTION = 'tuner_type' if hasattr(BaseArguments, 'tuner_type') else 'train_type'
# What a template is told it encodes for: ms-swift 3 called transformers `pt`, after PyTorch.
TEMPLATE_MODE = 'transformers' if TransformersEngine.__name__ == 'TransformersEngine' else 'pt'


@functools.lru_cache(maxsize=16)
def keys_of_args_file(swift_version: Optional[str]) -> FrozenSet[str]:
    """Returns what ms-swift takes from the args.json of an adapter where it is not given, by the names of options.

    Args:
        swift_version: What the file says of the ms-swift that wrote it.

    Raises:
        TypeError, ValueError: It is no version.
    """
    # Which keys these are is known to this method alone, so it is shown a file that has all of them.
    probe = InferArguments.__new__(InferArguments)
    probe.load_data_args = False
    with tempfile.TemporaryDirectory() as folder:
        probe.ckpt_dir = folder
        with open(os.path.join(folder, 'args.json'), 'w', encoding='utf-8') as f:
            names = [field.name for field in dataclasses.fields(InferArguments)]
            json.dump({**dict.fromkeys(names, ''), 'swift_version': swift_version}, f)
        before = set(vars(probe))
        with keeping(lambda record: False):
            probe.load_args_from_ckpt()
    return frozenset(vars(probe)) - before


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


@contextmanager
def registering_datasets() -> Iterator[None]:
    """Within it, datasets are registered in `DATASET_MAPPING`; after it, ms-swift knows those that it knew before."""
    before = dict(DATASET_MAPPING)
    # What it has looked up in the mapping; ms-swift 3 never looks again.
    module: Any = sys.modules[DatasetSyntax.__module__]
    module._dataset_meta_mapping = None
    try:
        yield
    finally:
        DATASET_MAPPING.clear()
        DATASET_MAPPING.update(before)
        module._dataset_meta_mapping = None


def meta_of_rows(rows: HfDataset) -> DatasetMeta:
    """Returns what, in `DATASET_MAPPING` under a name, makes `load_dataset` take these rows for the dataset of it."""
    if 'loader' not in {field.name for field in dataclasses.fields(DatasetMeta)}:  # ms-swift 3
        return DatasetMeta(load_function=lambda *args, **kwargs: rows)

    class Loader(DatasetLoader):  # type: ignore[misc]  # ms-swift has no types

        def load(self, *args: Any, **kwargs: Any) -> HfDataset:
            return rows

    return DatasetMeta(loader=Loader)


def sft_main(arguments: Dict[str, Any]) -> Any:
    """Trains as `swift sft` does and returns what it returns."""
    # Not above, for it imports all of the trainers.
    if SftArguments.__name__ == 'SftArguments':
        from swift.pipelines import sft_main
    else:  # ms-swift 3
        from swift.llm import sft_main
    return sft_main(SftArguments(**arguments))
