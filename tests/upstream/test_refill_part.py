"""The part `refill` as a second implementation: what it makes is what stock and the plugin make."""
import copy
import pytest
import torch
from models import (PEFT_TYPES, SOURCES, WEIGHTS, AllKinds, assert_as_fresh, assert_close_deltas, assert_same_state,
                    deltas, layers, loras, qwen2, reproducible_masks, state, stock, swift_model)
from peft.tuners.lora import LoraModel
from swift.tuners import LoRAConfig, NEFTuneConfig, SwiftModel
from swift.tuners.utils import SwiftOutput

from swift_patch.upstream import refill

KINDS = ['embedding', 'linear', 'fan', 'conv2', 'point', 'grouped']
# Of the part; `SwiftModel.update_weighted_adapter` is the plugin's.
refilled = refill.SwiftModel.update_weighted_adapter


@pytest.fixture(autouse=True)
def with_the_part(monkeypatch):
    """ms-swift has what the method of the part needs."""
    monkeypatch.setattr(SwiftOutput, 'weighted', False, raising=False)
    monkeypatch.setattr(SwiftModel, '_get_lora_weights', vars(refill.SwiftModel)['_get_lora_weights'], raising=False)


def add(model, adapters=('l3', 'l1'), weights=(0.4, -0.7), combination_type='linear', **options):
    """Adds and activates the adapter `fused` as stock with the part does."""
    with stock():
        model.add_weighted_adapter(list(adapters), list(weights), 'fused', combination_type, **options)
    model.adapters['fused'].weighted = True


def update(model, adapters=SOURCES, weights=WEIGHTS, combination_type='linear', **options):
    with reproducible_masks():
        refilled(model, adapters, weights, 'fused', combination_type, **options)


def of_all_kinds(count=4, targets=KINDS, **changes):
    return swift_model(loras(count, target_modules=targets, **changes), AllKinds())


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_a_refilled_adapter_is_what_stock_and_the_plugin_make(combination_type):
    model, options = swift_model(loras()), PEFT_TYPES[combination_type]
    add(model, SOURCES, WEIGHTS, 'cat')
    update(model, combination_type=combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)
    update(model, ['l1', 'l3'], [-0.8, 1.5], combination_type, **options)
    assert_as_fresh(model, ['l1', 'l3'], [-0.8, 1.5], combination_type, **options)

    by_the_plugin = swift_model(loras())
    by_the_plugin.add_weighted_adapter(['l3', 'l1'], [0.4, -0.7], 'fused', 'linear')
    with reproducible_masks():
        by_the_plugin.update_weighted_adapter(['l1', 'l3'], [-0.8, 1.5], 'fused', combination_type, **options)
    assert_close_deltas(model, 'fused', by_the_plugin, oracle_adapter='fused')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_every_kind_of_layer_is_refilled_as_stock_fills_a_new_one(kind, combination_type):
    if kind == 'grouped' and combination_type.endswith('svd'):
        pytest.skip('stock has no delta of a convolution in groups to decompose')
    model, options = of_all_kinds(targets=[kind]), PEFT_TYPES[combination_type]
    # Of more rank than is needed.
    add(model, SOURCES, WEIGHTS, 'cat')
    update(model, combination_type=combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_a_single_source_is_merged_as_in_stock(combination_type):
    model = swift_model(loras())
    add(model)
    update(model, ['l2'], [0.6], combination_type, **PEFT_TYPES[combination_type])
    assert_as_fresh(model, ['l2'], [0.6], combination_type, **PEFT_TYPES[combination_type])


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd', 'ties', 'dare_ties_svd'])
@pytest.mark.parametrize(
    'changes', [{
        'use_rslora': [True, False]
    }, {
        'use_rslora': True
    }, {
        'lora_alpha': [8, 2, 5]
    }, {
        'alpha_pattern': [{
            'q_proj': 3
        }, {}]
    }, {
        'layers_to_transform': [[0], [0], [0], [0]]
    }],
    ids=str)
def test_scalings_and_restrictions_count_as_in_stock(changes, combination_type):
    model, options = swift_model(loras(**changes)), PEFT_TYPES[combination_type]
    add(model, SOURCES, WEIGHTS, 'cat')
    update(model, combination_type=combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)


@pytest.mark.parametrize('combination_type', ['cat', 'svd', 'ties_svd'])
def test_ranks_may_differ_where_the_type_allows_it(combination_type):
    model, options = swift_model(loras(r=[4, 2, 7, 4])), PEFT_TYPES[combination_type]
    add(model, ['l0', 'l1', 'l2', 'l3'], [1] * 4, 'cat')
    update(model, combination_type=combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)


@pytest.mark.parametrize(
    'options', [{
        'svd_clamp': 0.9
    }, {
        'svd_rank': 2
    }, {
        'svd_rank': 2,
        'svd_full_matrices': False
    }], ids=str)
def test_the_options_of_svd_do_what_they_do_in_stock(options):
    model = swift_model(loras())
    add(model)
    update(model, combination_type='svd', **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, 'svd', **options)


def test_frequency_elects_signs_as_in_stock():
    model, options = swift_model(loras()), {'density': 0.5, 'majority_sign_method': 'frequency'}
    add(model)
    update(model, combination_type='ties', **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, 'ties', **options)


def test_layers_that_the_sources_do_not_touch_are_zeroed():
    narrow = {name: LoRAConfig(r=4, target_modules=[target]) for name, target in (('n0', 'q_proj'), ('n1', 'k_proj'))}
    model = swift_model({**loras(), **narrow})
    add(model)
    update(model, ['n0', 'n1'], [1.0, 0.5])
    assert {name.split('.')[-1] for name in deltas(model, 'fused')} == {'q_proj', 'k_proj'}
    assert_as_fresh(model, ['n0', 'n1'], [1.0, 0.5], 'linear')


def test_layers_that_the_first_source_keeps_a_new_adapter_from_are_zeroed():
    restricted = LoRAConfig(r=4, target_modules=['q_proj', 'k_proj'], layers_to_transform=[0])
    model = swift_model({**loras(), 'restricted': restricted})
    add(model)
    update(model, ['restricted', 'l0'], [1.0, 0.5])
    assert {name.split('.layers.')[1][0] for name in deltas(model, 'fused')} == {'0'}
    assert_as_fresh(model, ['restricted', 'l0'], [1.0, 0.5], 'linear')


def test_nothing_but_values_of_the_adapter_changes():
    model = of_all_kinds()
    add(model, SOURCES, WEIGHTS, 'cat')
    model.set_active_adapters('l0')
    before = state(model)
    update(model)
    after = state(model)
    for name, values in before.items():
        is_fused = 'fused' in name.split('.')
        assert after[name][:-1] == values[:-1] and (is_fused or name.endswith('layer')
                                                    or torch.equal(after[name][-1], values[-1]))
    assert model.active_adapters == {'l0'}


def test_a_copied_model_has_a_fused_adapter_of_its_own_that_can_be_refilled():
    model = swift_model(loras())
    add(model)
    copied, before = copy.deepcopy(model), deltas(model, 'fused')
    update(copied)
    assert_as_fresh(copied, SOURCES, WEIGHTS, 'linear')
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model, 'fused').items())


def test_a_bias_of_the_sources_is_not_merged():
    model = swift_model(loras(lora_bias=True, target_modules=['q_proj']))
    if next(iter(layers(model).values())).lora_B['l0'].bias is None:
        pytest.skip('this release of ms-swift makes no bias')
    with torch.no_grad():
        for layer in layers(model).values():
            for name in SOURCES:
                layer.lora_B[name].bias.fill_(1.0)
    add(model)
    update(model)
    assert_as_fresh(model, SOURCES, WEIGHTS, 'linear')


@pytest.mark.parametrize('arguments, error, message', [
    ((['l0'], [1.0], 'l1'), ValueError, 'made by `add_weighted_adapter`'),
    ((['l0'], [1.0], 'nowhere'), ValueError, 'made by `add_weighted_adapter`'),
    ((['l0', 'nowhere'], [1.0, 1.0], 'fused'), ValueError, 'nowhere'),
    ((['l0', 'noise'], [1.0, 1.0], 'fused'), ValueError, 'noise'),
    ((['l0', 'fused'], [1.0, 1.0], 'fused'), ValueError, 'other adapters'),
    (('l0', [1.0], 'fused'), ValueError, 'finite weight for each'),
    ((['l0', 'l1'], [1.0], 'fused'), ValueError, 'finite weight for each'),
    (([], [], 'fused'), ValueError, 'finite weight for each'),
    ((['l0'], [float('nan')], 'fused'), ValueError, 'finite weight for each'),
    ((['l0'], [float('inf')], 'fused'), ValueError, 'finite weight for each'),
    ((['l0'], ['1'], 'fused'), TypeError, ''),
    ((None, [1.0], 'fused'), TypeError, ''),
    ((['l0', 'l1'], None, 'fused'), TypeError, ''),
    (([['l0']], [1.0], 'fused'), (TypeError, ValueError), ''),
    ((['l0', 'l1'], [1.0, 1.0], 'fused', 'no type'), ValueError, 'no type'),
    ((['l0', 'l1'], [1.0, 1.0], 'fused', 'no svd'), ValueError, 'no svd'),
    ((['l0', 'l1'], [1.0, 1.0], 'fused', 'ties'), TypeError, ''),
    ((['l0', 'l1'], [1.0, 1.0], 'fused', 'svd', -1), ValueError, 'svd_rank'),
    ((['l0', 'l1'], [1.0, 1.0], 'fused', 'cat'), ValueError, 'rank of at most 4'),
    ((['l0', 'l1'], [1.0, 1.0], 'fused', 'svd', 5), ValueError, 'rank of at most 4'),
    ((['l0', 'wide'], [1.0, 1.0], 'fused'), ValueError, 'to be in model.layers.0.mlp.gate_proj'),
    ((['dora'], [1.0], 'fused'), ValueError, 'DoRA'),
])
def test_what_is_refused_changes_nothing(arguments, error, message):
    narrow = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    model = swift_model({
        **loras(target_modules=narrow), 'wide': LoRAConfig(r=4, target_modules=[*narrow, 'gate_proj']),
        'dora': LoRAConfig(r=4, target_modules=narrow, use_dora=True),
        'noise': NEFTuneConfig()
    })
    # Stock adds nothing beside another tuner that is active.
    model.set_active_adapters('l0')
    add(model)
    before = state(model)
    with pytest.raises(error, match=message):
        refilled(model, *arguments)
    assert_same_state(state(model), before)


def test_an_adapter_that_is_merged_into_the_base_weights_is_refused():
    model = swift_model(loras())
    add(model)
    for layer in layers(model).values():
        layer.merge(adapter_names=['fused'])
    before = state(model)
    with pytest.raises(ValueError, match='not merged'):
        update(model)
    assert_same_state(state(model), before)


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd'])
@pytest.mark.parametrize('offloaded', ['fused', 'l0'])
def test_what_is_on_the_meta_device_is_refused_and_nothing_changes(offloaded, combination_type):
    model = swift_model(loras(2))
    add(model, ['l0', 'l1'])
    before = deltas(model, 'fused')
    model.set_active_adapters([name for name in ('l0', 'l1', 'fused') if name != offloaded])
    model.deactivate_adapter(offloaded, offload='meta')
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        update(model, ['l0'], [2.0], combination_type)
    model.set_active_adapters('fused')
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model, 'fused').items())


@pytest.mark.parametrize('combination_type, helper', [('ties', '_generalized_task_arithmetic_weighted_adapter'),
                                                      ('svd', '_svd_generalized_task_arithmetic_weighted_adapter')])
def test_whatever_is_raised_in_the_last_layer_leaves_all_as_it_was(combination_type, helper, monkeypatch):
    model = swift_model(loras())
    add(model)
    before, original, calls = state(model), getattr(LoraModel, helper), []

    def fail_at_last(*args, **kwargs):
        calls.append(None)
        if len(calls) == len(layers(model)):
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(LoraModel, helper, fail_at_last)
    with pytest.raises(MemoryError):
        update(model, combination_type=combination_type, density=0.5)
    assert len(calls) == len(layers(model)) == 14
    assert_same_state(state(model), before)


def test_bfloat16_stays_bfloat16():
    model = swift_model(loras(), qwen2().bfloat16()).bfloat16()
    add(model)
    update(model)
    assert {layer.lora_A['fused'].weight.dtype for layer in layers(model).values()} == {torch.bfloat16}
