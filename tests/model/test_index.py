import copy
import gc
import io
import torch
import weakref
from models import loras, peft_model, qwen2, swift_model
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from swift_patch.model.layers import factors_of
from swift_patch.model.memory import Memory


def look(model):
    return Memory.of(model).look(model)


def walked(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def test_it_finds_the_lora_layers_in_the_order_of_named_modules():
    for model in (swift_model(loras()).model, peft_model(loras(cls=LoraConfig)).base_model.model):
        assert look(model).layers == walked(model)


def test_it_finds_lora_layers_inside_base_layers():
    attention = nn.Module()
    attention.attention = nn.MultiheadAttention(8, 2)
    model = peft_model({'a': LoraConfig(target_modules=['attention'])}, attention)
    assert [name for name, _ in look(model).layers] == [name for name, _ in walked(model)]
    assert any('base_layer' in name for name, _ in walked(model))


def test_it_does_not_grow_with_the_adapters():
    few, many = (look(swift_model(loras(count)).model) for count in (1, 8))
    assert len(few.modules) == len(many.modules)


def test_a_model_without_children_has_one_too():
    model = nn.Linear(2, 2)
    assert look(model).index is look(model).index
    assert look(model).layers == []


def test_it_is_kept_while_the_model_is_the_same():
    model = swift_model(loras()).model
    assert look(model).index is look(model).index
    index = look(model).index
    model.to(torch.bfloat16).load_state_dict(model.state_dict())
    assert look(model).index is index


def test_it_notices_a_layer_that_was_replaced_added_or_removed():
    model = swift_model(loras(target_modules=['q_proj'])).model
    look(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    assert look(model).layers == walked(model)
    attention.extra = copy.deepcopy(attention.q_proj)
    assert look(model).layers == walked(model)
    del model.model.layers[1]
    assert look(model).layers == walked(model)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    assert look(model).layers == walked(model)
    attention.q_proj.base_layer = nn.Sequential(attention.q_proj.base_layer)
    assert look(model).modules[-1] is list(model.modules())[-1]


def test_it_notices_layers_that_a_new_adapter_wraps():
    model = swift_model(loras(1, target_modules=['q_proj']))
    assert len(look(model.model).layers) == 2
    model = swift_model({'more': loras(1)['l0']}, model)
    assert look(model.model).layers == walked(model.model)


def test_a_copied_or_pickled_model_gets_an_index_of_its_own():
    model = swift_model(loras()).model
    look(model)
    copied = copy.deepcopy(model)
    assert look(copied).layers == walked(copied)
    model = nn.Sequential(nn.Linear(2, 2))
    look(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b'swift_patch' not in file.getvalue()


def test_it_notices_a_child_of_a_module_that_had_none():
    model = swift_model(loras(target_modules=['q_proj'])).model
    model.heads = nn.ModuleDict()
    look(model)
    model.heads['task'] = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    assert look(model).layers == walked(model)
    model.model.norm.extra = copy.deepcopy(model.heads['task'])
    assert look(model).layers == walked(model)


def test_it_notices_a_child_that_was_renamed_or_went_from_one_module_to_the_next():
    model = swift_model(loras(target_modules=['q_proj'])).model
    model.one, model.two = nn.ModuleDict({'a': nn.Linear(2, 2)}), nn.ModuleDict({'b': nn.Linear(2, 2)})
    assert 'one.a' in look(model).index.names
    model.one._modules['c'] = model.one._modules.pop('a')
    assert 'one.c' in look(model).index.names
    model.two._modules = {'c': model.one._modules.pop('c'), **model.two._modules}
    assert look(model).index.names[-4:] == ['one', 'two', 'two.c', 'two.b']


def test_it_keeps_no_module_alive():
    model = swift_model(loras(target_modules=['q_proj'])).model
    look(model)
    layer = weakref.ref(model.model.layers[0].self_attn.q_proj)
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    gc.collect()
    assert layer() is None
    assert look(model).layers == walked(model)


def test_factors_are_the_parameters_themselves_or_none():
    model = peft_model(loras(2, LoraConfig, target_modules=['q_proj']))
    layer = look(model).layers[0][1]
    assert factors_of(layer, 'l0').A is layer.lora_A['l0'].weight
    assert factors_of(layer, 'l0').B is layer.lora_B['l0'].weight
    assert factors_of(layer, 'nobody') is None
    model = peft_model({'a': LoraConfig(target_modules=['embed_tokens'])}, qwen2())
    layer = look(model).layers[0][1]
    assert factors_of(layer, 'a').A is layer.lora_embedding_A['a']


def test_a_layer_that_two_modules_share_is_found_once():
    model = swift_model(loras(1, target_modules=['q_proj'])).model
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    assert len(look(model).layers) == 1
    assert look(model).layers == walked(model)


def test_it_notices_that_a_model_keeps_its_children_elsewhere_now():
    model = swift_model(loras(1, target_modules=['q_proj'])).model
    look(model)
    model._modules = dict(model._modules)
    model.more = copy.deepcopy(model.model.layers[0])
    assert look(model).layers == walked(model)
