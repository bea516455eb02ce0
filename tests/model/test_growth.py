import copy
import logging
import pytest
import torch
from models import (AllKinds, add, assert_as_fresh, assert_close_deltas, assert_same_state, config, deltas, layers,
                    loras, peft_model, qwen2, state, stock, swift_model, update)
from peft import LoraConfig
from swift.tuners import LoRAConfig, Swift


def test_a_layer_that_the_adapter_lacks_is_added_and_logged_once(caplog):
    model = swift_model({**loras(2), 'narrow': LoRAConfig(r=4, target_modules=['q_proj'])})
    add(model, ['narrow'], [1.0])
    with caplog.at_level(logging.WARNING, 'swift_patch'):
        update(model, ['l0', 'l1'], [0.5, 0.5], 'linear')
    assert [record.message for record in caplog.records] == [
        "Adapter 'fused' grows, rank 4 -> 4, layers 2 -> 14: its parameters there are new objects, which compiled or "
        'captured graphs do not know.'
    ]
    assert_as_fresh(model, ['l0', 'l1'], [0.5, 0.5], 'linear')


def test_a_larger_rank_makes_it_grow_once_and_a_smaller_one_is_padded(model, caplog):
    add(model)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with caplog.at_level(logging.WARNING, 'swift_patch'):
        update(model, combination_type='cat')
        assert [parameter.requires_grad for parameter in model.parameters()] == trainable
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        update(model, ['l0', 'l1'], [1.0, 2.0], 'cat')
        update(model, ['l0', 'l1'], [1.0, 2.0], 'linear')
    assert len(caplog.records) == 1
    for layer in layers(model).values():
        assert layer.lora_A['fused'].out_features == layer.lora_B['fused'].in_features == layer.r['fused'] == 12
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert_as_fresh(model, ['l0', 'l1'], [1.0, 2.0], 'linear')


def test_a_fused_adapter_can_be_a_source_with_the_rank_that_it_uses(model):
    add(model, name='inner')
    update(model, combination_type='cat', name='inner')
    update(model, ['l0', 'l1'], [0.3, 0.4], 'linear', name='inner')
    add(model)
    update(model, ['inner', 'l2'], [0.5, 0.6], 'linear')
    with stock():
        oracle = copy.deepcopy(model)
        oracle.add_weighted_adapter(['l0', 'l1'], [0.3, 0.4], 'stock inner', 'linear')
        oracle.add_weighted_adapter(['stock inner', 'l2'], [0.5, 0.6], 'oracle', 'linear')
    assert_close_deltas(model, 'fused', oracle)


def test_a_saved_fused_adapter_is_loaded_as_it_was(tmp_path):
    model = swift_model(loras(lora_alpha=[8, 2, 5], alpha_pattern=[{'q_proj': 3}, {}, {}]))
    add(model, ['l1', 'l0'], [1.0, 0.5], 'average')
    update(model, combination_type='cat')
    model.save_pretrained(str(tmp_path), adapter_name='fused')
    loaded = Swift.from_pretrained(qwen2(), str(tmp_path), adapter_name=['fused'])
    for name, delta in deltas(loaded, 'fused').items():
        torch.testing.assert_close(delta, deltas(model, 'fused')[name])


def test_a_saved_fused_adapter_that_got_more_layers_is_loaded_as_it_was(tmp_path):
    model = swift_model({**loras(2), 'first': LoRAConfig(r=4, target_modules=['q_proj'], exclude_modules=['k_proj'])})
    add(model, ['first'], [1.0])
    update(model, ['l0', 'l1'], [0.5, 0.5])
    model.save_pretrained(str(tmp_path), adapter_name='fused')
    loaded = Swift.from_pretrained(qwen2(), str(tmp_path), adapter_name=['fused'])
    assert deltas(loaded, 'fused').keys() == deltas(model, 'fused').keys() == layers(model).keys()


def test_a_model_whose_growth_fails_is_as_it_was(model, monkeypatch):
    add(model)
    before = state(model), config(model, 'fused').to_dict()
    monkeypatch.setattr(torch.Tensor, 'zero_', None)
    monkeypatch.setattr(torch.Tensor, 'copy_', None)
    with pytest.raises(TypeError):
        update(model, combination_type='cat')
    monkeypatch.undo()
    assert_same_state(state(model), before[0])
    assert config(model, 'fused').to_dict() == before[1]


def test_a_grouped_convolution_grows_to_a_rank_that_its_groups_divide():
    configs = {
        'a': LoraConfig(r=2, target_modules=['linear', 'grouped']),
        'b': LoraConfig(r=2, target_modules=['linear', 'grouped']),
        'odd': LoraConfig(r=3, target_modules=['linear']),
    }
    model = peft_model(configs, AllKinds())
    add(model, ['a', 'b'], [1.0, 0.5])
    update(model, ['a', 'odd'], [0.3, 0.4], 'cat')
    assert config(model, 'fused').r == 6
    fused, a, odd = (deltas(model, name) for name in ('fused', 'a', 'odd'))
    torch.testing.assert_close(fused['base_model.model.grouped'], 0.3 * a['base_model.model.grouped'])
    torch.testing.assert_close(fused['base_model.model.linear'],
                               0.3 * a['base_model.model.linear'] + 0.4 * odd['base_model.model.linear'])


def test_a_model_that_fails_to_get_more_layers_is_as_it_was(monkeypatch):
    model = swift_model({**loras(2), 'narrow': LoRAConfig(r=4, target_modules=['q_proj'])})
    add(model, ['narrow'], [1.0])
    before = state(model), config(model, 'fused').to_dict()
    monkeypatch.setattr(torch.Tensor, 'copy_', None)
    with pytest.raises(TypeError):
        update(model, ['l0', 'l1'], [0.5, 0.5], 'cat')
    monkeypatch.undo()
    assert_same_state(state(model), before[0])
    assert config(model, 'fused').to_dict() == before[1]
