"""An engine of vLLM in this process, the mixtures that it is asked for, and what stock makes of them."""
import torch
from itertools import count
from models import fresh
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typing import Any, Dict, List, Sequence
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from swift_patch import AdapterLibrary
from swift_patch.vllm_plugin.mixtures import Mixtures

# By which vLLM knows an adapter, whatever is in its folder.
_numbers = count(1)

PROMPTS = [f'Question {number}: what is there to be said of everything that is?' for number in range(4)]


def engine_of(model_dir: str, **changes: Any) -> LLM:
    """An engine with two slots for adapters, which puts them out as soon as it can."""
    options = {'dtype': 'float32', 'max_loras': 2, 'max_cpu_loras': 2, 'max_lora_rank': 32, 'seed': 0}
    return LLM(
        model_dir, enable_lora=True, max_model_len=256, max_num_seqs=8, enforce_eager=True, **{
            **options,
            **changes
        })


def mixtures_of(engine: LLM, library: AdapterLibrary, **composer_args: Any) -> Mixtures:
    """Mixtures of a library for an engine."""
    config = engine.llm_engine.model_config
    return Mixtures(config.hf_config, config.dtype, library, **composer_args)


def answers(engine: LLM, requests: Sequence[Any], prompts: Sequence[str] = PROMPTS) -> List[Any]:
    """The tokens of the likeliest answers, one prompt for each request; the reason to end where that is an error."""
    settings = SamplingParams(temperature=0, max_tokens=12)
    found = engine.generate(list(prompts[:len(requests)]), settings, lora_request=list(requests), use_tqdm=False)
    return [
        'error' if answer.outputs[0].finish_reason == 'error' else list(answer.outputs[0].token_ids) for answer in found
    ]


class Stock:
    """What stock's `add_weighted_adapter` makes of adapters, in files that vLLM reads by itself.

    Args:
        model_dir: The model.
        adapters: The folder of each adapter.
        folder: Where to write.
    """

    def __init__(self, model_dir: str, adapters: Dict[str, str], folder: Path):
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        names = list(adapters)
        self._model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(adapters[name], name)
        self._folder = folder

    def request(self, sources: Sequence[str], weights: Sequence[float], combination_type: str,
                **options: Any) -> LoRARequest:
        """vLLM's request for what stock merges of them."""
        number = next(_numbers)
        folder = self._folder / str(number)
        oracle = fresh(self._model, sources, weights, combination_type, **options)
        oracle.save_pretrained(str(folder), selected_adapters=['oracle'])
        return LoRARequest(f'stock{number}', number, str(folder / 'oracle'))
