"""Small models with many LoRAs, and the oracle: stock, on an untouched copy."""
import copy
import torch
from contextlib import contextmanager
from pathlib import Path
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from swift.tuners import LoRAConfig, SwiftModel
from torch import Tensor, nn
from transformers import (AutoModelForCausalLM, CLIPVisionConfig, Conv1D, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM)
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

# Applies the patch, for all tests that build a model.
import swift_patch  # noqa: F401
from swift_patch.patching import reverted as stock

SOURCES, WEIGHTS = ['l2', 'l0', 'l1'], [0.5, 0.2, 0.3]
PROJECTIONS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']

# PEFT's eleven types, with options under which they are not random.
PEFT_TYPES = {
    'linear': {},
    'cat': {},
    'svd': {},
    'ties': {
        'density': 0.4
    },
    'ties_svd': {
        'density': 0.4
    },
    'dare_linear': {
        'density': 0.4
    },
    'dare_ties': {
        'density': 0.4
    },
    'dare_linear_svd': {
        'density': 0.4
    },
    'dare_ties_svd': {
        'density': 0.4
    },
    'magnitude_prune': {
        'density': 0.4
    },
    'magnitude_prune_svd': {
        'density': 0.4
    },
}


def qwen2(layers: int = 2, hidden: int = 32) -> nn.Module:
    """A Qwen2 with random weights."""
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        tie_word_embeddings=False)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def llava() -> nn.Module:
    """A Llava with random weights: two layers of text, whose token 63 stands for an image."""
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


class AllKinds(nn.Module):
    """One layer of every kind that LoRA knows, of widths that differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 6)
        self.fan = Conv1D(10, 6)
        self.conv1 = nn.Conv1d(1, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.conv3 = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.fan(torch.tanh(self.linear(self.embedding(ids))))
        hidden = self.conv1(hidden.flatten(0, 1).unsqueeze(1)).unflatten(0, ids.shape)
        hidden = self.grouped(torch.tanh(self.point(torch.tanh(self.conv2(hidden.transpose(1, 2))))))
        return self.conv3(hidden.unsqueeze(1)).flatten(1)


class Nested(nn.Module):
    """A model with attention whose output projection is, with LoRA, a LoRA layer inside another one's base layer.

    `heads` is an empty container, to put layers into later.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(64, width)
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({
                'q_proj': nn.Linear(width, width),
                'attention': nn.MultiheadAttention(width, 2, batch_first=True),
                'down_proj': nn.Linear(width, width)
            }) for _ in range(2))
        self.heads = nn.ModuleDict()
        self.lm_head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            inner = torch.tanh(layer['q_proj'](hidden))
            inner = inner + layer['attention'](inner, inner, inner, need_weights=False)[0]
            hidden = hidden + layer['down_proj'](torch.tanh(inner))
        for head in self.heads.values():
            hidden = hidden + head(torch.tanh(hidden))
        return self.lm_head(hidden)


def swift_model(configs: Dict[str, LoRAConfig], model: nn.Module = None) -> SwiftModel:
    """A `SwiftModel` with LoRAs that have random values."""
    model = SwiftModel(qwen2() if model is None else model, configs, inference_mode=True)
    return randomised(model)


def peft_model(configs: Dict[str, LoraConfig], model: nn.Module = None) -> PeftModel:
    """A `PeftModel` with LoRAs that have random values."""
    peft = None
    for name, config in configs.items():
        if peft is None:
            peft = get_peft_model(qwen2() if model is None else model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    return randomised(peft.eval())


def loras(count: int = 4, cls: type = LoRAConfig, **changes: Any) -> Dict[str, Any]:
    """Configs of LoRAs `l0`, `l1`, … ; values in `changes` that are lists differ by LoRA."""
    defaults = {'r': 4, 'lora_alpha': 8, 'target_modules': PROJECTIONS, 'lora_dropout': 0.0, **changes}
    return {
        f'l{i}':
        cls(
            **{
                key: value[i % len(value)] if isinstance(value, list) and key != 'target_modules' else value
                for key, value in defaults.items()
            })
        for i in range(count)
    }


BUILDERS: Dict[str, Callable[..., nn.Module]] = {
    'swift': lambda **changes: swift_model(loras(**changes)),
    'peft': lambda **changes: peft_model(loras(cls=LoraConfig, **changes)),
}


def write_checkpoints(folder: Path,
                      count: int = 5,
                      hidden_size: int = 32,
                      **changes: Any) -> Tuple[str, Dict[str, Dict[str, str]]]:
    """Writes a Qwen2 of two layers, and LoRAs in ms-swift's format (`swift`) and in PEFT's (`peft`).

    Returns:
        The folder of the model, and by format the folder of each LoRA by its name.
    """
    from swift_patch.synthetic.tiny_model import build_tiny_qwen2
    model_dir = build_tiny_qwen2(folder / 'model', hidden_size=hidden_size, num_layers=2, num_heads=2, num_kv_heads=1)
    paths = {}
    for kind, build, cls in (('swift', swift_model, LoRAConfig), ('peft', peft_model, LoraConfig)):
        configs = loras(count, cls, **changes)
        model = build(configs, AutoModelForCausalLM.from_pretrained(model_dir))
        model.save_pretrained(str(folder / kind))
        paths[kind] = {name: str(folder / kind / name) for name in configs}
    return model_dir, paths


def swift_arguments(model_dir: str, **changes: Any) -> Any:
    """ms-swift's arguments for a model of `write_checkpoints`, which takes the likeliest tokens."""
    from swift_patch.ms_swift import BaseArguments
    from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE
    arguments = {'model_type': MODEL_TYPE, 'template': TEMPLATE, 'torch_dtype': 'float32', 'temperature': 0}
    return BaseArguments(model=model_dir, **{**arguments, 'max_new_tokens': 8, **changes})


def randomised(model: nn.Module) -> nn.Module:
    """Gives all LoRAs random values; new ones do nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'lora_' in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@contextmanager
def reproducible_masks() -> Iterator[None]:
    """Within it, `dare_*` draws the same masks whenever the same tensors come in the same order.

    A new adapter draws its initial values first, so that a seed alone would not do.
    """
    bernoulli, drawn = torch.bernoulli, []

    def mask(probabilities: Tensor) -> Tensor:
        drawn.append(None)
        return bernoulli(probabilities, generator=torch.Generator().manual_seed(len(drawn)))

    torch.bernoulli = mask
    try:
        yield
    finally:
        torch.bernoulli = bernoulli


def fresh(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], combination_type: str,
          **options: Any) -> nn.Module:
    """A copy of `model` to which stock has added and activated the adapter `oracle`."""
    with stock():
        oracle = copy.deepcopy(model)
        with reproducible_masks():
            oracle.add_weighted_adapter(list(adapters), list(weights), 'oracle', combination_type, **options)
        activate(oracle, 'oracle')
    return oracle


def activate(model: nn.Module, name: str) -> None:
    """Makes `name` the only active adapter."""
    if isinstance(model, SwiftModel):
        model.set_active_adapters(name)
    else:
        model.set_adapter(name)


def layers(model: nn.Module) -> Dict[str, LoraLayer]:
    """The LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def deltas(model: nn.Module, adapter: str) -> Dict[str, Tensor]:
    """B · A · scaling of `adapter` by layer, zero where the adapter is not or not more than zero."""
    found = {}
    for name, layer in layers(model).items():
        if adapter in layer.lora_A:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        groups = getattr(layer.get_base_layer(), 'groups', 1)
        A = A.detach().double().flatten(1).unflatten(0, (groups, -1))
        B = B.detach().double().flatten(1).unflatten(0, (groups, -1))
        found[name] = (B @ A).flatten(0, 1) * layer.scaling[adapter]
    return {name: delta for name, delta in found.items() if delta.any()}


def state(model: nn.Module) -> Dict[str, Any]:
    """All that an update may not change when it fails: values, addresses, devices, ranks, scalings, activation."""
    found: Dict[str, Any] = {
        name: (id(parameter), parameter.data_ptr(), parameter.device, parameter.dtype, parameter.requires_grad,
               parameter.detach().clone())
        for name, parameter in model.named_parameters()
    }
    for name, layer in layers(model).items():
        found[f'{name} layer'] = (dict(layer.r), dict(layer.lora_alpha), dict(layer.scaling),
                                  list(layer.active_adapters))
    return found


def assert_same_state(new: Dict[str, Any], old: Dict[str, Any]) -> None:
    """Asserts that nothing changed, bit by bit."""
    assert new.keys() == old.keys()
    for name, values in old.items():
        for new_value, value in zip(new[name], values):
            if isinstance(value, Tensor):
                assert torch.equal(new_value, value), name
            else:
                assert new_value == value, name


def inputs() -> Tensor:
    """Token ids for all of these models."""
    return torch.arange(10).reshape(2, 5)


def outputs(model: nn.Module) -> Tensor:
    """What the model computes for `inputs`."""
    with torch.no_grad():
        result = model(inputs())
    return getattr(result, 'logits', result)


def assert_close_deltas(model: nn.Module,
                        adapter: str,
                        oracle: nn.Module,
                        tolerance: float = 1e-5,
                        oracle_adapter: str = 'oracle') -> None:
    """Asserts that an adapter makes the same deltas as the oracle's, in the same layers."""
    new, old = deltas(model, adapter), deltas(oracle, oracle_adapter)
    assert new.keys() == old.keys()
    for name, delta in old.items():
        difference = (new[name] - delta).norm() / delta.norm()
        assert difference < tolerance, f'{name}: {difference}'


def config(model: nn.Module, name: str) -> LoraConfig:
    """The config of an adapter."""
    return model.adapters[name].config if isinstance(model, SwiftModel) else model.peft_config[name]


def add(model: nn.Module,
        adapters: Sequence[str] = ('l3', 'l1'),
        weights: Sequence[float] = (0.4, -0.7),
        combination_type: str = 'linear',
        name: str = 'fused',
        **options: Any) -> None:
    """Adds and activates a fused adapter."""
    model.add_weighted_adapter(list(adapters), list(weights), name, combination_type, **options)
    activate(model, name)


def update(model: nn.Module,
           adapters: Sequence[str] = SOURCES,
           weights: Sequence[float] = WEIGHTS,
           combination_type: str = None,
           name: str = 'fused',
           **options: Any) -> None:
    """Refills a fused adapter, with the random masks of `fresh`."""
    with reproducible_masks():
        model.update_weighted_adapter(adapters, weights, name, combination_type, **options)


def assert_as_fresh(model: nn.Module,
                    adapters: Sequence[str],
                    weights: Sequence[float],
                    combination_type: str,
                    tolerance: float = 1e-5,
                    **options: Any) -> None:
    """Asserts that the active adapter `fused` is what stock would make now."""
    oracle = fresh(model, adapters, weights, combination_type, **options)
    assert_close_deltas(model, 'fused', oracle, tolerance)
    torch.testing.assert_close(outputs(model), outputs(oracle), rtol=1e-4, atol=1e-4)
