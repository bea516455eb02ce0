"""A model and adapters with random values, for those who have none at hand: `swift-patch bench --synthetic`."""
import torch
from pathlib import Path
from typing import Any, Dict, Tuple

from ..quiet import silenced
from .tiny_model import MODEL_TYPE, build_tiny_qwen2

NUM_ADAPTERS, RANK = 14, 8


def write_synthetic(folder: Path) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Writes a Qwen2 with 8 layers and 14 LoRAs of rank 8 on all their projections, in ms-swift's format.

    Args:
        folder: Where to write.

    Returns:
        The arguments of ms-swift for the model, and the checkpoint of each adapter.
    """
    from swift.tuners import LoRAConfig, SwiftModel
    from transformers import AutoModelForCausalLM
    model_dir = build_tiny_qwen2(folder / 'model')
    # Of one length: ms-swift looks for an adapter's name anywhere in the names of tensors when it saves.
    names = [f'random_{i:02}' for i in range(NUM_ADAPTERS)]
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    with silenced(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        configs = {name: LoRAConfig(r=RANK, target_modules=targets) for name in names}
        model = SwiftModel(AutoModelForCausalLM.from_pretrained(model_dir), configs)
        for name, parameter in model.named_parameters():
            # Zero in a new LoRA.
            if 'lora_B' in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(folder / 'adapters'))
    swift_args = {'model': model_dir, 'model_type': MODEL_TYPE, 'torch_dtype': 'float32'}
    return swift_args, {name: str(folder / 'adapters' / name) for name in names}
