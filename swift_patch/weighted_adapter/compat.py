"""What one release of PEFT or ms-swift needs and another does not. Asked of the code itself, not of version numbers."""
import inspect
from contextlib import contextmanager
from functools import lru_cache, partial, wraps
from peft.tuners.lora import Embedding, LoraConfig, LoraLayer, LoraModel
from torch import nn, no_grad
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, Optional


@lru_cache(maxsize=None)
def sign_on_both_factors() -> bool:
    """Returns whether PEFT puts a negative sign on both factors (up to 0.18), where it cancels, or on A alone."""
    A, B = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with no_grad():
        A.weight.fill_(1.0)
        B.weight.fill_(1.0)
    layer = SimpleNamespace(lora_A={'a': A}, lora_B={'a': B}, lora_embedding_A={}, scaling={'a': 1.0})
    _, merged_B = LoraModel._generalized_task_arithmetic_weighted_adapter(None, 'linear', ['a'], [-1.0], layer, None,
                                                                          'total')
    return bool(merged_B.item() < 0)


def layer_arguments(method: Callable[..., Any], config: LoraConfig) -> Dict[str, Any]:
    """Returns what PEFT demands of those who make or extend a LoRA layer, and ms-swift 4.6 and older do not give.

    Since PEFT 0.19 that is the config, from which a layer reads what were arguments before; in PEFT 0.14 to 0.18 it is
    `lora_bias`, of the second adapter of an embedding or a convolution (False: ms-swift leaves it out elsewhere, too).

    Args:
        method: `__init__` or `update_layer` of a LoRA layer.
        config: The config of the adapter that the layer is to have.
    """
    parameters = inspect.signature(method).parameters
    return {
        name: value
        for name, value in (('config', config), ('lora_bias', False))
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }


def create_new_module(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `LoraModel._create_new_module` of ms-swift that gives PEFT's LoRA layers all arguments they demand.

    Needed by ms-swift up to 4.6 with PEFT 0.19 and later; `original` itself is returned where it is not.
    """
    demanded = layer_arguments(Embedding.__init__, LoraConfig())
    if not demanded:
        return original

    @wraps(original)
    def create(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        return original(lora_config, adapter_name, target, **{
            **layer_arguments(Embedding.__init__, lora_config),
            **kwargs
        })

    return create


def create_and_replace(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `LoraModel._create_and_replace` of ms-swift that gives `update_layer` all arguments it demands.

    Needed by ms-swift up to 4.6 with PEFT 0.14 and later; `original` itself is returned where it is not.
    """
    if not layer_arguments(Embedding.update_layer, LoraConfig()):
        return original

    @wraps(original)
    def create(self: Any, lora_config: LoraConfig, adapter_name: str, target: nn.Module, *args: Any,
               **kwargs: Any) -> None:
        with _completed(target, lora_config):
            original(self, lora_config, adapter_name, target, *args, **kwargs)

    return create


@contextmanager
def _completed(target: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Within it, `update_layer` of a LoRA layer need not be given what `layer_arguments` returns."""
    if not isinstance(target, LoraLayer):
        yield
        return
    target.__dict__['update_layer'] = partial(target.update_layer, **layer_arguments(target.update_layer, config))
    try:
        yield
    finally:
        del target.__dict__['update_layer']


def load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a `SwiftModel.load_state_dict` that loads the LoRAs of embeddings.

    Needed by ms-swift up to 4.6, which takes their names for those of a PEFT checkpoint, puts the adapter's name in a
    second time and then passes over them; `original` itself is returned where it does not.
    """
    loaded: Dict[str, Any] = {}
    stand_in = SimpleNamespace(
        adapters={'a': SimpleNamespace(config=None, load_state_dict_callback=None)},
        base_model=SimpleNamespace(load_state_dict=lambda state_dict, strict: loaded.update(state_dict)))
    original(stand_in, {'lora_embedding_A.a': None}, adapter_name='a')
    if 'lora_embedding_A.a' in loaded:
        return original

    @wraps(original)
    def load(self: Any, state_dict: Dict[str, Any], strict: bool = True, adapter_name: Optional[str] = None) -> None:
        if adapter_name is not None:
            state_dict = load_embeddings(self.base_model, state_dict, adapter_name)
        original(self, state_dict, strict, adapter_name)

    return load


def load_embeddings(model: nn.Module, state_dict: Dict[str, Any], adapter_name: str) -> Dict[str, Any]:
    """Loads what a checkpoint of ms-swift has for the LoRA of embeddings, and returns the rest of it."""
    ends = tuple(f'lora_embedding_{side}.{adapter_name}' for side in 'AB')
    embeddings = {key: value for key, value in state_dict.items() if key.endswith(ends)}
    model.load_state_dict(embeddings, strict=False)
    return {key: value for key, value in state_dict.items() if key not in embeddings}
