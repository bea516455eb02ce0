"""Samples per second against the batch size: with a fusion for each row, and what there is besides.

By `generate` alone. `make figures` draws its picture from these; how long they take is nowhere a bound.
"""
import pytest
import random
import time
import torch
from measure import Ratio, interleaved, ratio
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from typing import Any, Callable, Dict, List, Tuple
from workloads import NAMES, TARGETS, build, elements, lora_layers

from swift_patch import FusionComposer

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# By hidden size, what else a Qwen2 has, and how many tokens are generated.
SHAPES: Dict[int, Tuple[Dict[str, int], int]] = {
    256: (dict(intermediate_size=512, num_attention_heads=4, num_key_value_heads=2), 32),
    896: (dict(intermediate_size=2432, num_attention_heads=14, num_key_value_heads=2), 12),
}
PROMPT = 24
Sample = Tuple[List[str], List[float]]


def peft_model(hidden: int) -> PeftModel:
    """Returns a Qwen2 of 24 layers with 14 LoRAs of rank 8, all of random values."""
    torch.manual_seed(0)
    shape, _ = SHAPES[hidden]
    base = Qwen2ForCausalLM(Qwen2Config(hidden_size=hidden, num_hidden_layers=24, vocab_size=2048, **shape))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(base, config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


@torch.inference_mode()
def generate(model: PeftModel, tokens: int, prompts: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Returns what the model adds to prompts."""
    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config,
        **kwargs)[:, prompts.shape[1]:]


class Ways:
    """What answers a batch of samples, each way by its name.

    Args:
        hidden: the hidden size of the model.
    """

    def __init__(self, hidden: int):
        self.model = peft_model(hidden)
        self._tokens = SHAPES[hidden][1]
        self._composer = FusionComposer(self.model)
        self._composer.reserve(max_sources=3, max_rows=max(BATCH_SIZES))
        # How long composing took, of what `rows` answered last.
        self.seconds_composing = 0.

    def one_by_one(self, prompts: torch.Tensor, samples: List[Sample]) -> torch.Tensor:
        """Composes and generates sample by sample."""
        found = []
        for prompt, sample in zip(prompts.split(1), samples):
            self._composer.compose(*sample)
            found.append(generate(self.model, self._tokens, prompt))
        return torch.cat(found)

    def mixed(self, prompts: torch.Tensor, samples: List[Sample]) -> torch.Tensor:
        """PEFT's mixed batch: a fused adapter for each row, refilled, and their names."""
        names = [f'slot_{i}' for i in range(len(samples))]
        for name, sample in zip(names, samples):
            if name in self.model.peft_config:
                self.model.update_weighted_adapter(*sample, name)
            else:
                self.model.add_weighted_adapter(*sample, name, combination_type='average')
        return generate(self.model, self._tokens, prompts, adapter_names=names)

    def rows(self, prompts: torch.Tensor, samples: List[Sample]) -> torch.Tensor:
        """A fusion for each row."""
        start = time.perf_counter()
        self._composer.compose_batch(samples)
        self.seconds_composing = time.perf_counter() - start
        return generate(self.model, self._tokens, prompts)

    def plain(self, prompts: torch.Tensor, samples: List[Sample]) -> torch.Tensor:
        """One LoRA for all rows."""
        self._composer.compose([NAMES[0]])
        return generate(self.model, self._tokens, prompts)

    def base(self, prompts: torch.Tensor, samples: List[Sample]) -> torch.Tensor:
        """The base model."""
        with self.model.disable_adapter():
            return generate(self.model, self._tokens, prompts)


WAYS: Dict[str, Callable[..., torch.Tensor]] = {
    'one by one': Ways.one_by_one,
    "PEFT's mixed batch": Ways.mixed,
    'swift_patch': Ways.rows,
    'one LoRA for all': Ways.plain,
    'base model': Ways.base,
}


def batch(size: int, seed: int = 0) -> Tuple[torch.Tensor, List[Sample]]:
    """Returns prompts, and three of the LoRAs with weights for each."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    samples = [(rng.sample(NAMES, 3), [0.5, 0.3, 0.2]) for _ in range(size)]
    return torch.randint(3, 2048, (size, PROMPT), generator=generator), samples


@pytest.mark.benchmark(group='batches')
@pytest.mark.parametrize('hidden', SHAPES)
def test_samples_per_second(benchmark: Any, hidden: int) -> None:
    ways = Ways(hidden)
    found: Dict[str, Dict[int, float]] = {name: {} for name in WAYS}
    composing: Dict[int, float] = {}
    for size in BATCH_SIZES:
        prompts, samples = batch(size)
        answers = {}
        for name, way in WAYS.items():
            if name == 'one by one' and size > 4:
                # It is as slow for many as for a few.
                found[name][size] = found[name][4]
                continue
            way(ways, prompts[:1], samples[:1])
            way(ways, prompts, samples)
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                answers[name] = way(ways, prompts, samples)
                seconds.append(time.perf_counter() - start)
            # The other one may have met Python's garbage collector.
            found[name][size] = size / min(seconds)
            if name == 'swift_patch':
                composing[size] = ways.seconds_composing / (seconds[-1] - ways.seconds_composing)
        assert torch.equal(answers['swift_patch'], answers["PEFT's mixed batch"])
    benchmark.extra_info.update(
        subject='batches', case=hidden, tokens=SHAPES[hidden][1], samples_per_second=found, composing=composing)
    benchmark.pedantic(lambda: ways.rows(*batch(max(BATCH_SIZES))), rounds=1)


@pytest.mark.gate
@pytest.mark.benchmark(group='rows')
def test_composing_rows_costs_less_than_composing_them_one_by_one(gate: Callable, benchmark: Any) -> None:
    composer = FusionComposer(build())
    composer.reserve(max_sources=3, max_rows=16)
    rng = random.Random(0)

    def sample() -> List[str]:
        return rng.sample(NAMES, 3)

    candidates = {
        '16 rows': lambda: composer.compose_batch([sample() for _ in range(16)]),
        'one': lambda: composer.compose(sample())
    }
    benchmark.pedantic(candidates['16 rows'], rounds=20, warmup_rounds=3)
    gate('rows', '16 rows', lambda: ratio(interleaved(candidates, rounds=40, warmup=5)))


@pytest.mark.gate
@pytest.mark.benchmark(group='rows')
def test_the_memory_of_rows_is_that_of_as_many_fused_adapters(gate: Callable, benchmark: Any) -> None:
    model = build(num_hidden_layers=8)
    composer = FusionComposer(model)
    composer.reserve(max_sources=3)
    benchmark.pedantic(lambda: composer.compose_batch([[name] for name in NAMES]), rounds=1)

    def over_adapters() -> Ratio:
        storages = {}
        for layer in lora_layers(model):
            for tensor in (layer.lora_variant['fused'].A, layer.lora_variant['fused'].B):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return Ratio(sum(storages.values()) / (len(NAMES) * 4 * elements(model, 'fused')))

    gate('row memory', '14 rows', over_adapters)
