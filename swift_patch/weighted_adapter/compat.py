"""What one release of PEFT or ms-swift needs and another does not. Asked of the code itself, not of version numbers."""
import inspect
from functools import lru_cache
from peft.tuners.lora import LoraConfig, LoraModel
from torch import nn, no_grad
from types import SimpleNamespace
from typing import Any, Callable, Dict

# Before the names in a checkpoint of PEFT.
_PEFT_PREFIX = 'base_model.model.'


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


def load_embeddings(model: nn.Module, state_dict: Dict[str, Any], adapter_name: str) -> Dict[str, Any]:
    """Loads what a checkpoint has for the LoRA of embeddings, in ms-swift's format or in PEFT's.

    Returns:
        The rest of it, with what there is no embedding for in the model.
    """
    places = {}
    for key in state_dict:
        place = key[len(_PEFT_PREFIX):] if key.startswith(_PEFT_PREFIX) else key
        if place.endswith(('lora_embedding_A', 'lora_embedding_B')):
            place = f'{place}.{adapter_name}'
        if place.endswith((f'lora_embedding_A.{adapter_name}', f'lora_embedding_B.{adapter_name}')):
            places[key] = place
    if not places:
        return state_dict
    found = model.load_state_dict({place: state_dict[key] for key, place in places.items()}, strict=False)
    unplaced = set(found.unexpected_keys)
    return {key: value for key, value in state_dict.items() if key not in places or places[key] in unplaced}
