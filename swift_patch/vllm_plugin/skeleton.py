"""The base model without its values: which layers it has, so that adapters can be compared with it and merged."""
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from typing import Any

from ..errors import reason_of


def skeleton_of(config: Any, dtype: torch.dtype) -> nn.Module:
    """Returns Transformers' model of a config on the meta device, where it takes no memory.

    Args:
        config: a config of Transformers, as vLLM keeps it.
        dtype: the dtype that its weights have.

    Raises:
        ValueError: Transformers has no such model.
    """
    # Of models for images and text, the automatic class knows the text alone.
    architectures = getattr(config, 'architectures', None) or ()
    model_class: Any = next(filter(None, (getattr(transformers, name, None) for name in architectures)), None)
    try:
        with torch.device('meta'):
            if model_class is not None:
                model: nn.Module = model_class._from_config(config, dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=True)
    except Exception as e:  # code of models raises whatever comes
        raise ValueError(f'A model that Transformers has is expected, found {list(architectures)}, for which it makes '
                         f'none: {reason_of(e)}') from e
    return model.eval()
