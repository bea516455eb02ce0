"""What the model is run by: transformers, or vLLM."""
from importlib import import_module
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from ..serve.config import DeployConfig
    from .config import InferConfig


def is_vllm(config: 'Union[InferConfig, DeployConfig]') -> bool:
    """Returns whether a run or a server is to have vLLM."""
    return config.swift_args.get('infer_backend') == 'vllm'


def check_backend(config: 'Union[InferConfig, DeployConfig]') -> None:
    """Raises ValueError where what shall run the model is not there, or cannot do what is asked. Imports nothing."""
    if config.max_batch_size < 1:
        raise ValueError(f'--max_batch_size is expected to be 1 or more, found {config.max_batch_size}.')
    if not is_vllm(config):
        return
    from ..vllm_plugin.installed import check_installed
    check_installed()
    if config.compile_merging:
        raise ValueError('--compile_merging is for transformers: with --infer_backend vllm, leave it out.')
    if config.swift_args.get('num_beams', 1) > 1:
        raise ValueError('--num_beams is for transformers: with --infer_backend vllm, leave it out.')


def import_backend(config: 'Union[InferConfig, DeployConfig]') -> None:
    """Imports ms-swift, and what runs the model. Raises ValueError where the vLLM that is installed cannot."""
    import_module('swift_patch.ms_swift')
    if is_vllm(config):
        from ..vllm_plugin.installed import import_vllm
        import_vllm()
