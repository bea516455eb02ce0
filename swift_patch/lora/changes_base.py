"""Which ways to initialise a LoRA change the base layer's own weight. Imports no torch, unless PEFT is asked."""
import functools
import warnings
from dataclasses import fields
from typing import Any

# What is computed from data, but into A and B alone.
_OF_DATA = ('eva', )
_CONVERT = 'give the converted checkpoint'


def changes_base(init_lora_weights: Any) -> bool:
    """Returns whether a LoRA that is initialised so may change the base weights: they fit no other LoRA then."""
    return bool(why_changed_base(init_lora_weights))


def why_changed_base(init_lora_weights: Any) -> str:
    """Returns why base weights do not fit a LoRA that was initialised so, empty where they do.

    The installed PEFT is asked. Of a way that it does not know, and of one that needs data, it cannot be told, so that
    base weights are taken for changed.
    """
    # PEFT's default, and none at all.
    return _asked(init_lora_weights) if isinstance(init_lora_weights, str) else ''


@functools.lru_cache(maxsize=64)
def _asked(name: str) -> str:
    import torch
    from peft import LoraConfig, LoraModel
    from torch import nn

    # What PEFT has a config for.
    needs_more = f'{name.lower().replace("-", "_")}_config' in {field.name for field in fields(LoraConfig)}
    if needs_more and name.lower() not in _OF_DATA:
        return f'which changes the base model; {_CONVERT}'
    try:
        # Nobody's random numbers change. Some ways need an even rank, or one that is less than the sizes of the layer.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device('cpu'), torch.no_grad():
            warnings.simplefilter('ignore')
            base = nn.Linear(4, 4, bias=False, dtype=torch.float32)
            model, before = nn.Sequential(base), base.weight.clone()
            # By position, for ms-swift 3 replaces its constructor by one that takes no more.
            LoraModel(model, {'asked': LoraConfig(r=2, target_modules=['0'], init_lora_weights=name)}, 'asked')
            is_changed = not torch.equal(base.weight, before)
    except Exception as e:  # PEFT raises whatever comes
        return (f'of which the installed PEFT cannot say whether it changes the base model ({type(e).__name__}: '
                f'{" ".join(str(e).split()):.200}); {_CONVERT}, or install the PEFT that it was trained with')
    return f'which changes the base model; {_CONVERT}' if is_changed else ''
