"""What a plain server of vLLM does: the model that a request names may be a mixture of a library's adapters."""
import logging
import wrapt
from contextvars import ContextVar
from typing import Any, Callable, Optional, Tuple

from .settings import ADAPTERS, Settings

# vLLM shows what its own loggers say, and those below them.
logger = logging.getLogger(f'vllm.{__name__}')

# How vLLM calls the resolver.
_NAME = 'swift_patch'
# Where the user does not say how many adapters are computed at a time: each slot takes memory of its own.
_MAX_LORAS = 16
# The attribute of vLLM's list of models that finds mixtures.
_RESOLVER = '_swift_patch_resolver'
# What the request that is being answered asks for. vLLM asks twice: whether there is such a model, then for it.
_resolved: 'ContextVar[Tuple[Optional[str], Any]]' = ContextVar('_resolved', default=(None, None))


def install_options(module: Any) -> None:
    """Has vLLM start with what the library needs.

    Args:
        module: `vllm.engine.arg_utils`.
    """
    wrapt.wrap_function_wrapper(module, 'EngineArgs.create_engine_config', _configure)


def install_models(module: Any) -> None:
    """Has vLLM's list of models know the library.

    Args:
        module: `vllm.entrypoints.openai.models.serving`.
    """
    wrapt.wrap_function_wrapper(module, 'OpenAIServingModels.__init__', _create)
    wrapt.wrap_function_wrapper(module, 'OpenAIServingModels.show_available_models', _show)
    wrapt.wrap_function_wrapper(module, 'OpenAIServingModels.model_name', _name)


def install_serving(module: Any) -> None:
    """Has vLLM's handlers of requests ask for mixtures.

    Args:
        module: `vllm.entrypoints.serve.engine.serving`.
    """
    wrapt.wrap_function_wrapper(module, 'BaseServing._check_model', _check)
    wrapt.wrap_function_wrapper(module, 'BaseServing._maybe_get_adapters', _get)


def install_metrics(module: Any) -> None:
    """Has vLLM's metrics keep nothing of mixtures that are gone.

    Args:
        module: `vllm.v1.metrics.loggers`.
    """
    wrapt.wrap_function_wrapper(module, 'PrometheusStatLogger.record', _record)


def _configure(wrapped: Callable[..., Any], engine_args: Any, args: Any, kwargs: Any) -> Any:
    """Checks the adapters, and sets what vLLM needs for them where the user did not."""
    from .mixtures import Mixtures, lora_options
    settings = Settings.from_environment()
    if settings is None:
        return wrapped(*args, **kwargs)
    model = engine_args.create_model_config()
    mixtures = Mixtures(model.hf_config, model.dtype, settings.library, **settings.composer_args)
    mixtures.composer.check()
    rank, default = mixtures.served_rank(max_sources=settings.max_sources), type(engine_args)
    if engine_args.max_lora_rank != default.max_lora_rank and engine_args.max_lora_rank < rank:
        raise ValueError(f'--max-lora-rank is expected to be {rank} for the adapters of {ADAPTERS}, of which a request '
                         f'merges {settings.max_sources} at most, found {engine_args.max_lora_rank}.')
    max_loras = engine_args.max_loras
    if max_loras == default.max_loras:
        max_loras = min(engine_args.max_num_seqs or _MAX_LORAS, _MAX_LORAS)
    options = lora_options(max(engine_args.max_lora_rank, rank), max_loras)
    if engine_args.max_cpu_loras is not None:
        options['max_cpu_loras'] = engine_args.max_cpu_loras
    vars(engine_args).update(options, enable_lora=True)
    logger.info('Requests merge %d adapters of %s: %s', len(settings.library), ADAPTERS, options)
    return wrapped(*args, **kwargs)


def _create(wrapped: Callable[..., Any], models: Any, args: Any, kwargs: Any) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    from .resolver import MixtureResolver
    settings = Settings.from_environment()
    engine, bases = [*args, *kwargs.values()][:2]
    if settings is not None:
        for module in kwargs.get('lora_modules') or ():
            if module.name in settings.library:
                raise ValueError(
                    f'--lora-modules has an adapter {module.name!r}, but so has {ADAPTERS}: give it another '
                    'name.')
        resolver = MixtureResolver(engine, [base.name for base in bases], settings)
        setattr(models, _RESOLVER, resolver)
        LoRAResolverRegistry.register_resolver(_NAME, resolver)
    wrapped(*args, **kwargs)


def _name(wrapped: Callable[..., Any], models: Any, args: Any, kwargs: Any) -> str:
    """Returns what answers call the model: of a mixture, what asks for the same again."""
    from .mixtures import shown_name
    lora_request = args[0] if args else kwargs.get('lora_request')
    name: str = wrapped(*args, **kwargs) if lora_request is None else shown_name(lora_request)
    return name


async def _show(wrapped: Callable[..., Any], models: Any, args: Any, kwargs: Any) -> Any:
    """Lists the adapters of the library beside what vLLM lists."""
    from vllm.entrypoints.serve.engine.protocol import ModelCard
    found = await wrapped(*args, **kwargs)
    resolver = getattr(models, _RESOLVER, None)
    if resolver is not None:
        found.data += [
            ModelCard(id=name, parent=models.base_model_paths[0].name) for name in resolver.names
            if name not in models.lora_requests
        ]
    return found


async def _check(wrapped: Callable[..., Any], serving: Any, args: Any, kwargs: Any) -> Any:
    """Finds and loads the mixture that a request names, so that its adapter is there when the engine gets it."""
    from vllm.exceptions import VLLMClientError
    [request] = args or kwargs.values()
    models, name = serving.models, request.model
    _resolved.set((None, None))
    resolver = getattr(models, _RESOLVER, None)
    if resolver is not None and name and not models.is_base_model(name) and name not in models.lora_requests:
        try:
            found = await resolver.loaded(name)
        except VLLMClientError as e:
            return serving.create_error_response(e)
        if found is not None:
            _resolved.set((name, found))
            return None
    return await wrapped(*args, **kwargs)


def _get(wrapped: Callable[..., Any], serving: Any, args: Any, kwargs: Any) -> Any:
    """Returns what `_check` found for the request."""
    name, found = _resolved.get()
    request = args[0] if args else kwargs['request']
    return found if found is not None and request.model == name else wrapped(*args, **kwargs)


def _record(wrapped: Callable[..., Any], stats: Any, args: Any, kwargs: Any) -> Any:
    """Forgets which adapters ran before: vLLM has a time series for each set of their names, for ever."""
    if stats.gauge_lora_info is not None:
        stats.gauge_lora_info.clear()
    return wrapped(*args, **kwargs)
