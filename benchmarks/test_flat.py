"""How flat the cost per sample is. Run it by `make bench`.

The numbers are ratios within one run: the last hundred compositions over the first hundred of a thousand, and a model
with many LoRAs over one with few.
"""
import gc
import os
import psutil
import pytest
import random
import statistics
import time
import torch
from peft.tuners.lora import LoraLayer
from swift.tuners import LoRAConfig, SwiftModel
from transformers import Qwen2Config, Qwen2ForCausalLM
from typing import Sequence, Tuple

import swift_patch

TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
NAMES = [f'lora_{i}' for i in range(14)]


def build(layers: int, names: Sequence[str] = NAMES) -> SwiftModel:
    """A Qwen2 with 7 LoRA layers in each of its layers and random LoRAs of rank 8."""
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256)
    configs = {name: LoRAConfig(r=8, target_modules=TARGETS) for name in names}
    model = SwiftModel(Qwen2ForCausalLM(config), configs, inference_mode=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for B in module.lora_B.values():
                torch.nn.init.normal_(B.weight, std=0.1)
    return model


@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
def test_a_thousand_compositions_cost_the_same_from_first_to_last(merge_method: str) -> None:
    torch.set_num_threads(1)
    rng, process = random.Random(0), psutil.Process(os.getpid())
    # The young one composes only while the first and the last hundred are measured, by turns with the old one: how the
    # machine itself got slower or faster in between is in both.
    old, young = (swift_patch.FusionComposer(build(layers=24), merge_method) for _ in range(2))

    def compose(composer: swift_patch.FusionComposer) -> float:
        sources = rng.sample(NAMES, 3)
        start = time.perf_counter()
        composer.compose(sources)
        return time.perf_counter() - start

    def medians() -> Tuple[float, float]:
        pairs = [(compose(old), compose(young)) for _ in range(100)]
        return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)

    for composer in (old, young):
        composer.reserve(max_sources=3)
        for _ in range(50):
            compose(composer)
    for attempt in range(3):
        gc.collect()
        memory = process.memory_info().rss
        first, first_of_young = medians()
        for _ in range(800):
            compose(old)
        last, last_of_young = medians()
        gc.collect()
        growth = process.memory_info().rss - memory
        drift = last_of_young / first_of_young
        print(f'\n{merge_method}, attempt {attempt + 1}: medians of the first and the last hundred of a thousand '
              f'{first * 1e3:.2f} ms, {last * 1e3:.2f} ms: {last / first:.3f} times; the machine {drift:.3f} times; '
              f'corrected {last / first / drift:.3f} times; memory grew by {growth / 2**20:.2f} MiB')
        assert growth < 2**22
        # A cost that grows does so in every attempt, what else the machine is doing does not.
        if abs(last / first / drift - 1) < 0.05:
            return
    pytest.fail('the cost per sample is not flat')


def test_a_composition_costs_the_same_however_many_loras_are_loaded() -> None:
    torch.set_num_threads(1)
    counts = (4, 64)
    composers = [swift_patch.FusionComposer(build(8, [f'lora_{i}' for i in range(count)])) for count in counts]
    for attempt in range(3):
        seconds = [[], []]
        for i in range(300):
            for of_one, composer in zip(seconds, composers):
                start = time.perf_counter()
                composer.compose(['lora_0', 'lora_1', 'lora_2'], [i + 1, 1, 1])
                of_one.append(time.perf_counter() - start)
        few, many = (statistics.median(of_one[100:]) for of_one in seconds)
        ratio = f'{counts[0]} LoRAs {few * 1e3:.2f} ms, {counts[1]} LoRAs {many * 1e3:.2f} ms: {many / few:.3f} times'
        print(f'\nattempt {attempt + 1}: {ratio}')
        if many / few < 1.1:
            return
    pytest.fail('the cost depends on the number of LoRAs')
