"""Models with many LoRAs of random values, in the shapes of real ones."""
import torch
from peft.tuners.lora import LoraLayer, LoraModel
from swift.tuners import LoRAConfig, SwiftModel
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from typing import Any, Dict, List, Sequence

import swift_patch  # noqa: F401 (applies the patch)

TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
SOURCES = ['lora_0', 'lora_1', 'lora_2']
NAMES = [f'lora_{i}' for i in range(14)]
# Of those types that sparsify.
DENSITY = 0.4

# Those with a name of a model are from its config.json. The vocabulary does not matter: no LoRA is on it.
SHAPES: Dict[str, Dict[str, int]] = {
    'tiny': {
        'hidden_size': 32,
        'intermediate_size': 64,
        'num_hidden_layers': 4,
        'num_attention_heads': 2,
        'num_key_value_heads': 1
    },
    'small': {
        'hidden_size': 256,
        'intermediate_size': 512,
        'num_hidden_layers': 24,
        'num_attention_heads': 4,
        'num_key_value_heads': 2
    },
    'Qwen2.5-1.5B': {
        'hidden_size': 1536,
        'intermediate_size': 8960,
        'num_hidden_layers': 28,
        'num_attention_heads': 12,
        'num_key_value_heads': 2
    },
    'Qwen2.5-7B': {
        'hidden_size': 3584,
        'intermediate_size': 18944,
        'num_hidden_layers': 28,
        'num_attention_heads': 28,
        'num_key_value_heads': 4
    },
}


def base_model(shape: str = 'small', dtype: torch.dtype = torch.float32, **changes: int) -> nn.Module:
    """Returns a Qwen2 of a shape, `changes` of its config aside, whose weights are zeros that take no memory."""
    with torch.device('meta'):
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=256, **{**SHAPES[shape], **changes}))
    return without_memory(model, dtype)


def without_memory(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replaces all parameters of a model by a single zero, expanded to their shapes."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    return model


def lora_config(rank: int = 8, targets: Sequence[str] = TARGETS) -> LoRAConfig:
    """Returns the config of a LoRA."""
    return LoRAConfig(r=rank, target_modules=list(targets))


def with_loras(model: nn.Module,
               names: Sequence[str] = NAMES,
               rank: int = 8,
               targets: Sequence[str] = TARGETS,
               dtype: torch.dtype = torch.float32) -> SwiftModel:
    """Returns a `SwiftModel` with LoRAs of random values."""
    model = SwiftModel(model, {name: lora_config(rank, targets) for name in names}, inference_mode=True)
    for name, parameter in model.named_parameters():
        if 'lora_' in name:
            parameter.data = torch.randn(parameter.shape, dtype=dtype) * 0.1
    return model


def build(shape: str = 'small', names: Sequence[str] = NAMES, **changes: int) -> SwiftModel:
    """Returns a `SwiftModel` of a shape, `changes` of its config aside, with LoRAs of rank 8."""
    return with_loras(base_model(shape, **changes), names)


def lora_layers(model: nn.Module) -> List[LoraLayer]:
    """Returns the LoRA layers of a model."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def elements(model: nn.Module, adapter: str) -> int:
    """Returns how many numbers an adapter holds."""
    return sum(
        getattr(layer, factor)[adapter].weight.numel() for layer in lora_layers(model)
        for factor in ('lora_A', 'lora_B'))


def random_weights() -> List[float]:
    """Returns a weight for each of `SOURCES`."""
    return torch.rand(len(SOURCES)).tolist()


def options(combination_type: str) -> Dict[str, Any]:
    """Returns what `add_weighted_adapter` needs besides for a type."""
    return {} if combination_type in ('linear', 'average', 'cat', 'svd') else {'density': DENSITY}


class Refill:
    """Refills a fused adapter with new random weights at each call. The adapter is made here, and refilled a few times.

    Args:
        model: the model.
        combination_type: how to merge.
        adapter: the fused adapter; may be one that exists.
    """

    def __init__(self, model: nn.Module, combination_type: str, adapter: str = 'fused'):
        self._model, self._type, self._adapter = model, combination_type, adapter
        model.add_weighted_adapter(SOURCES, random_weights(), adapter, combination_type, **options(combination_type))
        for _ in range(3):
            self()

    def __call__(self) -> None:
        self._model.update_weighted_adapter(SOURCES, random_weights(), self._adapter, self._type, **options(self._type))


class PeftMerge:
    """Merges as PEFT's `add_weighted_adapter` does, with new random weights at each call, and writes nothing.

    Args:
        model: the model.
        combination_type: how to merge.
    """

    def __init__(self, model: nn.Module, combination_type: str):
        self._layers, self._type = lora_layers(model), combination_type

    @torch.no_grad()
    def __call__(self) -> None:
        weights, density = random_weights(), options(self._type).get('density')
        for layer in self._layers:
            if self._type.endswith('svd'):
                rank = layer.r[SOURCES[0]]
                LoraModel._svd_generalized_task_arithmetic_weighted_adapter(None, self._type, SOURCES, weights, rank,
                                                                            layer, None, None, density, 'total')
            else:
                LoraModel._generalized_task_arithmetic_weighted_adapter(None, self._type, SOURCES, weights, layer,
                                                                        density, 'total')
