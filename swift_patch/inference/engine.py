"""Engines, and what they need: one base model, and all adapters loaded onto it or in a library."""
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Sequence, Tuple, Union

from ..errors import reason_of
from ..lora.checkpoint import AdapterCheckpoint
from ..quiet import without_bars
from .loading import load_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from swift.tuners import SwiftModel
    from torch import nn

    from ..compose.requests import Engine
    from ..lora.library import AdapterLibrary
    from ..ms_swift import BaseArguments, InferArguments


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


def load_engine(args: 'InferArguments',
                library: 'AdapterLibrary',
                *,
                max_batch_size: int,
                max_sources: int,
                composer_args: Mapping[str, Any],
                max_compositions: Optional[int] = None,
                cache_bytes: Optional[int] = None) -> 'Engine':
    """Loads the base model into an engine that composes, from adapters that stay on disk.

    Args:
        args: ms-swift's arguments, which say by what the model is run.
        library: The adapters.
        max_batch_size: How many requests are answered together at most.
        max_sources: How many adapters one of them merges at most.
        composer_args: Arguments of `FusionComposer`.
        max_compositions: How many different compositions there are at most, None where that is not known.
        cache_bytes: How much memory the workers of vLLM keep of adapters; otherwise that is the library's to say.

    Raises:
        ValueError: The model cannot be loaded, or an adapter does not fit it.
    """
    if args.infer_backend == 'vllm':
        from ..ms_swift import get_template
        from ..vllm_plugin.engine import VllmFusionEngine
        return VllmFusionEngine.of_arguments(
            args,
            get_template(args),
            library,
            max_loras=max_compositions,
            max_sources=max_sources,
            cache_bytes=cache_bytes,
            composer_args=composer_args)
    import torch

    from ..compose.engine import FusionEngine

    # The embeddings of new tokens are drawn.
    torch.manual_seed(args.seed)
    with without_bars():
        model, template = load_base_model(args)
    engine = FusionEngine(
        model,
        template,
        max_batch_size=max_batch_size,
        library=library,
        adapter_name=_free_name(library),
        **composer_args)
    engine.composer.check(list(library))
    engine.reserve(list(library), max_sources)
    return engine


def _free_name(library: 'AdapterLibrary') -> str:
    """Returns a name for the fused adapter that none of the library has."""
    name = 'fused'
    while name in library:
        name += '_'
    return name
