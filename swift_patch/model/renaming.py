"""Which layers of one model the tensors of a file are for, whatever release of transformers named them."""
import tempfile
import torch
from pathlib import Path
from peft.tuners.lora import LoraConfig
from peft.utils import load_peft_weights
from torch import nn
from typing import Dict, List, Sequence

from ..errors import joined
from ..lora.checkpoint import PEFT_PREFIX, join_key, split_key
from ..lora.stored import StoredAdapter
from .new_adapter import NEW_NAME


def renamed_keys(model: nn.Module, config: LoraConfig, stored: StoredAdapter) -> Dict[str, str]:
    """Returns the keys of a file, each with the key that it has in PEFT's format for this very model.

    Models of several releases of transformers name their layers otherwise. PEFT knows how, and is asked: it loads and
    converts tensors that hold their own numbers.
    """
    keys: List[str] = []
    for key in stored.header.entries:
        parts = split_key(key)
        # ms-swift's format has the adapter's name in it, and no prefix.
        keys.append(PEFT_PREFIX + (key.removeprefix(PEFT_PREFIX) if parts is None else join_key(*parts[:2])))
    renamed: Dict[int, str] = {}
    told = f'{stored.checkpoint} is expected to have tensors that fit this base model as they are, found that PEFT'
    mend = 'load the adapter into the model and save it again'
    try:
        converted = _converted(model, config, keys)
    except Exception as e:  # PEFT converts matrices, of which these are none
        raise ValueError(f'{told} converts them ({" ".join(str(e).split()):.300}): {mend}.') from e
    for key, value in converted.items():
        if value.numel() == 1:
            renamed[int(value)] = key
    lost = [key for number, key in enumerate(stored.header.entries) if number not in renamed]
    if lost:
        raise ValueError(f'{told} converts {joined(lost)}: {mend}.')
    return {key: renamed[number] for number, key in enumerate(stored.header.entries)}


def _converted(model: nn.Module, config: LoraConfig, keys: Sequence[str]) -> Dict[str, torch.Tensor]:
    """Returns tensors that hold their own numbers under the keys that PEFT gives them when it loads them."""
    numbers = {key: torch.tensor([number], dtype=torch.float64, device='cpu') for number, key in enumerate(keys)}
    mapping = getattr(model, '_checkpoint_conversion_mapping', None)
    if mapping:
        from peft.utils import SAFETENSORS_WEIGHTS_NAME
        from safetensors.torch import save_file
        with tempfile.TemporaryDirectory() as folder:
            save_file(numbers, str(Path(folder, SAFETENSORS_WEIGHTS_NAME)))
            numbers = load_peft_weights(folder, device='cpu', key_mapping=mapping)
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # PEFT before 0.19, or transformers 4
        return numbers
    found: Dict[str, torch.Tensor] = convert_peft_adapter_state_dict_for_transformers(
        model=model, peft_config=config, adapter_state_dict=numbers, adapter_name=NEW_NAME)
    return found
