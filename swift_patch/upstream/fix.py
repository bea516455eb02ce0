"""The part `fix`: the function that it adds to ms-swift's `lora_layers.py`, in ms-swift's manner.

`edits.py` puts its text there, and makes the methods of `LoraModel` call it.
"""
from inspect import Parameter, signature


def get_compat_kwargs(method, lora_config):
    """Returns what a method of a LoRA layer demands besides, depending on the version of peft: `config` since 0.19,
    before that `lora_bias` of embeddings and convolutions."""
    parameters = signature(method).parameters
    kwargs = {'config': lora_config, 'lora_bias': False}
    return {
        key: value
        for key, value in kwargs.items() if key in parameters and parameters[key].default is Parameter.empty
    }
