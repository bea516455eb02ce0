import torch
from models import fresh, layers, loras, swift_model

from swift_patch.weighted_adapter.compat import sign_on_both_factors


def test_the_sign_of_a_negative_weight_is_where_the_installed_peft_puts_it():
    oracle = fresh(swift_model(loras()), ['l0'], [-1.0], 'linear')
    for layer in layers(oracle).values():
        assert torch.all(layer.lora_A['oracle'].weight * layer.lora_A['l0'].weight <= 0)
        product = layer.lora_B['oracle'].weight * layer.lora_B['l0'].weight
        assert torch.all(product <= 0 if sign_on_both_factors() else product >= 0)
