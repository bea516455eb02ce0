import copy
import io
import torch
from models import loras, peft_model, qwen2, swift_model
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from swift_patch.weighted_adapter.lora_index import LoraIndex, factors


def walked(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def test_it_finds_the_lora_layers_in_the_order_of_named_modules():
    for model in (swift_model(loras()).model, peft_model(loras(cls=LoraConfig)).base_model.model):
        assert LoraIndex.of(model).layers() == walked(model)


def test_it_finds_lora_layers_inside_base_layers():
    attention = nn.Module()
    attention.attention = nn.MultiheadAttention(8, 2)
    model = peft_model({'a': LoraConfig(target_modules=['attention'])}, attention)
    assert [name for name, _ in LoraIndex.of(model).layers()] == [name for name, _ in walked(model)]
    assert any('base_layer' in name for name, _ in walked(model))


def test_it_does_not_grow_with_the_adapters():
    few, many = (LoraIndex.of(swift_model(loras(count)).model) for count in (1, 8))
    assert len(few.modules) == len(many.modules)


def test_a_model_without_children_has_one_too():
    model = nn.Linear(2, 2)
    assert LoraIndex.of(model) is LoraIndex.of(model)
    assert LoraIndex.of(model).layers() == []


def test_it_is_kept_while_the_model_is_the_same():
    model = swift_model(loras()).model
    assert LoraIndex.of(model) is LoraIndex.of(model)
    index = LoraIndex.of(model)
    model.to(torch.bfloat16).load_state_dict(model.state_dict())
    assert LoraIndex.of(model) is index


def test_it_notices_a_layer_that_was_replaced_added_or_removed():
    model = swift_model(loras(target_modules=['q_proj'])).model
    LoraIndex.of(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    assert LoraIndex.of(model).layers() == walked(model)
    attention.extra = copy.deepcopy(attention.q_proj)
    assert LoraIndex.of(model).layers() == walked(model)
    del model.model.layers[1]
    assert LoraIndex.of(model).layers() == walked(model)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    assert LoraIndex.of(model).layers() == walked(model)
    attention.q_proj.base_layer = nn.Sequential(attention.q_proj.base_layer)
    assert LoraIndex.of(model).modules[-1][1] is list(model.modules())[-1]


def test_it_notices_layers_that_a_new_adapter_wraps():
    model = swift_model(loras(1, target_modules=['q_proj']))
    assert len(LoraIndex.of(model.model).layers()) == 2
    model = swift_model({'more': loras(1)['l0']}, model)
    assert LoraIndex.of(model.model).layers() == walked(model.model)


def test_a_copied_or_pickled_model_gets_an_index_of_its_own():
    model = swift_model(loras()).model
    LoraIndex.of(model)
    copied = copy.deepcopy(model)
    assert LoraIndex.of(copied).layers() == walked(copied)
    model = nn.Sequential(nn.Linear(2, 2))
    LoraIndex.of(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b'swift_patch' not in file.getvalue()


def test_factors_are_the_parameters_themselves_or_none():
    model = peft_model(loras(2, LoraConfig, target_modules=['q_proj']))
    layer = LoraIndex.of(model).layers()[0][1]
    assert factors(layer, 'l0').A is layer.lora_A['l0'].weight
    assert factors(layer, 'l0').B is layer.lora_B['l0'].weight
    assert factors(layer, 'nobody') is None
    model = peft_model({'a': LoraConfig(target_modules=['embed_tokens'])}, qwen2())
    layer = LoraIndex.of(model).layers()[0][1]
    assert factors(layer, 'a').A is layer.lora_embedding_A['a']


def test_a_layer_that_two_modules_share_is_found_once():
    model = swift_model(loras(1, target_modules=['q_proj'])).model
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    assert len(LoraIndex.of(model).layers()) == 1
    assert LoraIndex.of(model).layers() == walked(model)


def test_it_notices_that_a_model_keeps_its_children_elsewhere_now():
    model = swift_model(loras(1, target_modules=['q_proj'])).model
    LoraIndex.of(model)
    model._modules = dict(model._modules)
    model.more = copy.deepcopy(model.model.layers[0])
    assert LoraIndex.of(model).layers() == walked(model)
