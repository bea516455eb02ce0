import copy
import logging
import pytest
import torch
from models import (AllKinds, activate, add, assert_as_fresh, assert_close_deltas, assert_same_state, config, deltas,
                    fresh, layers, loras, outputs, peft_model, qwen2, state, stock, swift_model, update)
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from swift.tuners import LoRAConfig, Swift
from torch import nn

from swift_patch.compose.composer import FusionComposer
from swift_patch.model import growth


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
    padded, grown = growth.padded, []

    def fail_in_the_third_layer(*args):
        grown.append(args)
        if len(grown) == 3:
            raise MemoryError
        return padded(*args)

    monkeypatch.setattr(growth, 'padded', fail_in_the_third_layer)
    with pytest.raises(MemoryError):
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


def test_a_fused_adapter_whose_scalings_became_tensors_grows(build):
    model = build(r=[4, 4, 4, 6], lora_alpha=[8, 8, 8, 5])
    add(model, ['l0'], [1.0], 'cat')
    prepare_model_for_compiled_hotswap(model)
    for combination_type in ('svd', 'cat'):
        update(model, ['l0', 'l3'], [0.5, 0.3], combination_type)
        assert_as_fresh(model, ['l0', 'l3'], [0.5, 0.3], combination_type)


def test_an_average_whose_scalings_became_tensors_grows(build):
    model = build(r=[4, 4, 4, 6], lora_alpha=[8, 8, 8, 5])
    add(model, ['l0', 'l1'], [0.5, 0.5], 'average')
    prepare_model_for_compiled_hotswap(model)
    update(model, ['l3'], [1.0], 'average')
    assert_close_deltas(model, 'fused', model, oracle_adapter='l3')
    right = outputs(model)
    activate(model, 'l3')
    torch.testing.assert_close(right, outputs(model), rtol=1e-4, atol=1e-4)


def test_a_fused_adapter_that_was_padded_is_refilled_and_grows(build):
    model = build()
    add(model, ['l0'], [1.0])
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    for sources in (['l0', 'l1'], ['l2'], ['l0', 'l1', 'l2']):
        weights = [0.5, 0.3, 0.2][:len(sources)]
        update(model, sources, weights, 'linear')
        assert_close_deltas(model, 'fused', fresh(model, sources, weights, 'linear'))


class Suffixes(nn.Module):
    """Layers whose names end with the names of others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 8)
        self.model = nn.Module()
        for owner in (self, self.model):
            owner.block = nn.ModuleList(nn.ModuleDict({'proj': nn.Linear(8, 8)}) for _ in range(2))
            owner.proj, owner.my_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        hidden = self.embed(ids)
        for owner in (self.model, self):
            for block in owner.block:
                hidden = torch.tanh(block['proj'](hidden))
            hidden = owner.my_proj(torch.tanh(owner.proj(hidden)))
        return hidden


PATTERNS = [{
    'alpha_pattern': {
        '^proj': 16
    }
}, {
    'alpha_pattern': {
        'model.proj': 16,
        'my_proj': 2
    }
}, {
    'alpha_pattern': {
        '^block.0.proj': 16,
        '^model.proj': 1
    }
}, {
    'alpha_pattern': {
        'block.1.proj': 16
    },
    'use_rslora': True
}, {
    'rank_pattern': {
        '^proj': 6
    },
    'alpha_pattern': {
        '^proj': 16
    }
}, {
    'rank_pattern': {
        'model.proj': 6
    }
}]


@pytest.mark.parametrize('patterns', PATTERNS, ids=str)
@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
def test_a_saved_fused_adapter_is_loaded_as_it_was_where_names_end_with_others(patterns, merge_method, tmp_path):
    configs = {
        name: LoraConfig(r=4, lora_alpha=4, target_modules=['proj', 'my_proj'], **copy.deepcopy(patterns))
        for name in ('first', 'second')
    }
    model = peft_model(configs, Suffixes())
    FusionComposer(model, merge_method).compose(['first', 'second'])
    right = outputs(model)
    model.save_pretrained(str(tmp_path), selected_adapters=['fused'])
    loaded = PeftModel.from_pretrained(Suffixes(), str(tmp_path / 'fused'), adapter_name='fused').eval()
    for name, delta in deltas(model, 'fused').items():
        torch.testing.assert_close(deltas(loaded, 'fused')[name], delta)
    torch.testing.assert_close(outputs(loaded), right)


@pytest.mark.parametrize('scaled', ['proj', 'block.0.proj', 'my_proj', 'model.proj'])
@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
def test_a_fused_adapter_that_ms_swift_saved_is_loaded_as_it_was_where_names_end_with_others(
        scaled, merge_method, tmp_path):
    changes = {'r': 4, 'lora_alpha': 4, 'target_modules': ['proj', 'my_proj'], 'lora_dropout': 0.0}
    model = swift_model({name: LoRAConfig(**changes) for name in ('first', 'second')}, Suffixes())
    for name in ('first', 'second'):
        model.base_model.get_submodule(scaled).set_scale(name, 3)
    FusionComposer(model, merge_method).compose(['first', 'second'])
    right = outputs(model)
    model.save_pretrained(str(tmp_path), adapter_name='fused')
    loaded = Swift.from_pretrained(Suffixes(), str(tmp_path), adapter_name=['fused'], inference_mode=True)
    torch.testing.assert_close(outputs(loaded), right)
