"""What one release of PEFT or ms-swift needs and another does not. Asked of the code itself, not of version numbers."""
from functools import lru_cache
from peft.tuners.lora import LoraModel
from torch import nn, no_grad
from types import SimpleNamespace


@lru_cache(maxsize=None)
def sign_on_both_factors() -> bool:
    """Returns whether PEFT puts a negative sign on both factors (0.18), where it cancels, or on A alone (0.20)."""
    A, B = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with no_grad():
        A.weight.fill_(1.0)
        B.weight.fill_(1.0)
    layer = SimpleNamespace(lora_A={'a': A}, lora_B={'a': B}, lora_embedding_A={}, scaling={'a': 1.0})
    _, merged_B = LoraModel._generalized_task_arithmetic_weighted_adapter(None, 'linear', ['a'], [-1.0], layer, None,
                                                                          'total')
    return bool(merged_B.item() < 0)
