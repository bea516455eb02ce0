"""What a mixture is to answer: stock PEFT on an untouched copy, in transformers."""
import copy
import math
import torch
from models import activate, fresh, layers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing import Any, Mapping, NamedTuple, Tuple

from swift_patch.patching import reverted as stock

# What the merge methods of the server are among the types of `add_weighted_adapter`; `average` is not PEFT's.
TYPES = {'fusion': 'average', 'mixture': 'cat', 'linear': 'linear'}


class Answer(NamedTuple):
    """The likeliest tokens.

    Attributes:
        tokens: their ids.
        margin: by how much each was at least likelier than the next one, in logits: what rounding can turn around is
            no test.
    """
    tokens: Tuple[int, ...]
    margin: float


class Oracle:
    """Answers like a server of the model and the adapters.

    Args:
        model_dir: the folder of the base model.
        adapters: the folder of each adapter, in PEFT's format.
    """

    def __init__(self, model_dir: str, adapters: Mapping[str, str]):
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        with stock():
            for name, path in adapters.items():
                if isinstance(model, PeftModel):
                    model.load_adapter(path, name)
                else:
                    model = PeftModel.from_pretrained(model, path, name)
        self._model = model

    def answer(self,
               prompt: str,
               mixture: Mapping[str, float],
               merge_method: str = 'fusion',
               max_tokens: int = 12) -> Answer:
        """Returns the likeliest tokens after a prompt.

        Args:
            prompt: the text.
            mixture: the weight of each adapter, none for the base model.
            merge_method: `fusion`, `mixture` or `selection`, or `linear`.
            max_tokens: how many tokens at most.
        """
        inputs = self._tokenizer(prompt, return_tensors='pt')
        with torch.no_grad():
            found = self._fused(mixture, merge_method).generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True)
        best = torch.cat(found.logits).topk(2).values
        tokens = found.sequences[0, inputs['input_ids'].shape[1]:].tolist()
        return Answer(tuple(tokens), (best[:, 0] - best[:, 1]).min().item())

    def _fused(self, mixture: Mapping[str, float], merge_method: str) -> Any:
        if not mixture:
            return copy.deepcopy(self._model).unload()
        if merge_method == 'selection':
            mixture, merge_method = {max(mixture, key=mixture.get): 1.0}, 'linear'
        adapters, weights = list(mixture), list(mixture.values())
        if TYPES[merge_method] != 'average':
            return fresh(self._model, adapters, weights, TYPES[merge_method])
        model = copy.deepcopy(self._model)
        with stock():
            # Of the same shape, and with 1 for its scaling.
            model.add_weighted_adapter(adapters[:1], [1.], 'oracle', 'linear')
        with torch.no_grad():
            for layer in layers(model).values():
                for factors in (layer.lora_A, layer.lora_B):
                    factors['oracle'].weight.copy_(
                        sum(weight * math.sqrt(layer.scaling[name]) * factors[name].weight
                            for name, weight in mixture.items()))
        activate(model, 'oracle')
        return model
