import copy
import logging
import math
import pytest
import torch
import torch._dynamo.testing
from models import (PEFT_TYPES, PROJECTIONS, AllKinds, activate, assert_close_deltas, assert_same_state, deltas, fresh,
                    layers, loras, outputs, peft_model, qwen2, reproducible_masks, state, stock, swift_model)
from peft import LoraConfig
from swift.tuners import LoRAConfig, Swift, SwiftModel

from swift_patch import merging

SOURCES, WEIGHTS = ['l2', 'l0', 'l1'], [0.5, 0.2, 0.3]
BUILDERS = {
    'swift': lambda **changes: swift_model(loras(**changes)),
    'peft': lambda **changes: peft_model(loras(cls=LoraConfig, **changes))
}


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


@pytest.fixture
def model(build):
    return build()


def config(model, name):
    return model.adapters[name].config if isinstance(model, SwiftModel) else model.peft_config[name]


def add(model, adapters=('l3', 'l1'), weights=(0.4, -0.7), combination_type='linear', name='fused', **options):
    model.add_weighted_adapter(list(adapters), list(weights), name, combination_type, **options)
    activate(model, name)


def update(model, adapters=SOURCES, weights=WEIGHTS, combination_type=None, name='fused', **options):
    with reproducible_masks():
        model.update_weighted_adapter(adapters, weights, name, combination_type, **options)


def assert_as_fresh(model, adapters, weights, combination_type, tolerance=1e-5, **options):
    oracle = fresh(model, adapters, weights, combination_type, **options)
    assert_close_deltas(model, 'fused', oracle, tolerance)
    torch.testing.assert_close(outputs(model), outputs(oracle), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_an_updated_adapter_is_what_stock_would_have_made(model, combination_type):
    options = PEFT_TYPES[combination_type]
    add(model)
    update(model, combination_type=combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)
    update(model, ['l1', 'l3'], [-0.8, 1.5], combination_type, **options)
    assert_as_fresh(model, ['l1', 'l3'], [-0.8, 1.5], combination_type, **options)


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_an_added_adapter_is_what_stock_would_have_made(model, combination_type):
    options = PEFT_TYPES[combination_type]
    with reproducible_masks():
        add(model, SOURCES, WEIGHTS, combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)
    oracle = fresh(model, SOURCES, WEIGHTS, combination_type, **options)
    assert config(model, 'fused').to_dict() == config(oracle, 'oracle').to_dict()


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_a_single_source_is_merged_as_stock_does(model, combination_type):
    add(model)
    update(model, ['l2'], [0.6], combination_type, **PEFT_TYPES[combination_type])
    assert_as_fresh(model, ['l2'], [0.6], combination_type, **PEFT_TYPES[combination_type])


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_no_type_means_the_one_last_used_with_its_options(model, combination_type):
    add(model, combination_type=combination_type, **PEFT_TYPES[combination_type])
    update(model)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **PEFT_TYPES[combination_type])
    if 'density' in PEFT_TYPES[combination_type]:
        update(model, density=0.9)
        assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, density=0.9)
        update(model)
        assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, density=0.9)


@pytest.mark.parametrize(
    'options', [{
        'svd_clamp': 0.9
    }, {
        'svd_rank': 2
    }, {
        'svd_rank': 2,
        'svd_full_matrices': False
    }, {
        'svd_clamp': 0.7,
        'svd_full_matrices': False
    }],
    ids=str)
def test_the_options_of_svd_do_what_they_do_in_stock(model, options):
    add(model)
    update(model, combination_type='svd', **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, 'svd', **options)


def test_frequency_elects_signs_as_in_stock(model):
    add(model)
    update(model, combination_type='ties', density=0.5, majority_sign_method='frequency')
    assert_as_fresh(model, SOURCES, WEIGHTS, 'ties', density=0.5, majority_sign_method='frequency')


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd', 'ties', 'magnitude_prune_svd', 'dare_ties_svd'])
@pytest.mark.parametrize(
    'changes', [
        {
            'use_rslora': [True, False]
        },
        {
            'use_rslora': [False, True]
        },
        {
            'lora_alpha': [8, 2, 5]
        },
        {
            'alpha_pattern': [{
                'q_proj': 3
            }, {}, {
                'up_proj': 1
            }]
        },
        {
            'rank_pattern': {
                'q_proj': 2,
                'down_proj': 6
            }
        },
        {
            'layers_to_transform': [[0], [0], [0], [0]]
        },
    ],
    ids=str)
def test_scalings_and_patterns_count_as_in_stock(build, changes, combination_type):
    model, options = build(**changes), PEFT_TYPES[combination_type]
    add(model)
    update(model, combination_type=combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)


@pytest.mark.parametrize('combination_type', ['cat', 'svd', 'ties_svd'])
def test_ranks_may_differ_where_the_type_allows_it(build, combination_type):
    model, options = build(r=[4, 2, 7, 4]), PEFT_TYPES[combination_type]
    add(model, ['l3', 'l0'])
    update(model, combination_type=combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)


def test_nothing_of_an_earlier_sample_is_left_in_layers_that_the_new_sources_do_not_touch(build):
    model = build(count=2)
    configs = {
        'narrow': LoRAConfig(r=4, target_modules=['q_proj']),
        'other': LoRAConfig(r=4, target_modules=['k_proj'])
    }
    if isinstance(model, SwiftModel):
        model = swift_model({**loras(2), **configs})
    else:
        model = peft_model({**loras(2, LoraConfig), **configs})
    add(model, ['l0', 'l1'])
    update(model, ['narrow', 'other'], [1.0, 0.5])
    assert {name.split('.')[-1] for name in deltas(model, 'fused')} == {'q_proj', 'k_proj'}
    assert_as_fresh(model, ['narrow', 'other'], [1.0, 0.5], 'linear')


def test_a_layer_that_the_adapter_lacks_is_added_and_logged_once(caplog):
    model = swift_model({**loras(2), 'narrow': LoRAConfig(r=4, target_modules=['q_proj'])})
    add(model, ['narrow'], [1.0])
    with caplog.at_level(logging.WARNING, 'swift_patch'):
        update(model, ['l0', 'l1'], [0.5, 0.5], 'linear')
    assert [record.message for record in caplog.records] == [
        "Adapter 'fused' grows from rank 4 to 4 and by 12 layers: its parameters there are new objects, which compiled "
        'or captured graphs do not know.'
    ]
    assert_as_fresh(model, ['l0', 'l1'], [0.5, 0.5], 'linear')


def test_a_larger_rank_makes_it_grow_once_and_a_smaller_one_is_padded(model, caplog):
    add(model)
    with caplog.at_level(logging.WARNING, 'swift_patch'):
        update(model, combination_type='cat')
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        update(model, ['l0', 'l1'], [1.0, 2.0], 'cat')
        update(model, ['l0', 'l1'], [1.0, 2.0], 'linear')
    assert len(caplog.records) == 1
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert_as_fresh(model, ['l0', 'l1'], [1.0, 2.0], 'linear')


def test_parameters_stay_the_same_objects_at_the_same_addresses(model):
    add(model, combination_type='cat', adapters=SOURCES, weights=WEIGHTS)
    before = {name: (id(p), p.data_ptr(), p.dtype, p.device) for name, p in model.named_parameters()}
    for combination_type, options in PEFT_TYPES.items():
        update(model, combination_type=combination_type, **options)
    assert {name: (id(p), p.data_ptr(), p.dtype, p.device) for name, p in model.named_parameters()} == before


def test_which_adapters_are_active_does_not_change(model):
    add(model)
    activate(model, 'l0')
    before = {name: list(layer.active_adapters) for name, layer in layers(model).items()}
    update(model)
    assert {name: list(layer.active_adapters) for name, layer in layers(model).items()} == before


def test_average_is_the_weighted_sum_of_the_factors_with_the_scaling_kept(build):
    model = build(lora_alpha=12)
    add(model, SOURCES, WEIGHTS, 'average')
    for layer in layers(model).values():
        for matrices in (layer.lora_A, layer.lora_B):
            expected = sum(weight * matrices[name].weight for name, weight in zip(SOURCES, WEIGHTS))
            torch.testing.assert_close(matrices['fused'].weight.detach(), expected.detach())
        assert layer.scaling['fused'] == 3.0
    added = deltas(model, 'fused')
    add(model, ['l3'], [1.0], name='other')
    update(model, SOURCES, WEIGHTS, 'average', name='other')
    for name, delta in deltas(model, 'other').items():
        torch.testing.assert_close(delta, added[name])


def test_average_keeps_each_sources_own_delta_where_scalings_differ(build):
    model = build(lora_alpha=[8, 2, 5])
    add(model, SOURCES, WEIGHTS, 'average')
    averaged = deltas(model, 'fused')
    for name, layer in layers(model).items():
        A = sum(w * math.sqrt(layer.scaling[s]) * layer.lora_A[s].weight.double() for s, w in zip(SOURCES, WEIGHTS))
        B = sum(w * math.sqrt(layer.scaling[s]) * layer.lora_B[s].weight.double() for s, w in zip(SOURCES, WEIGHTS))
        torch.testing.assert_close(averaged[name], (B @ A).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('combination_type', [name for name in PEFT_TYPES if not name.endswith('svd')] + ['average'])
@pytest.mark.parametrize('kind', ['embedding', 'linear', 'fan', 'conv1', 'conv2', 'point', 'grouped', 'conv3'])
def test_every_kind_of_layer_is_merged_as_in_stock(kind, combination_type):
    model = peft_model(loras(cls=LoraConfig, target_modules=[kind]), AllKinds())
    options = PEFT_TYPES.get(combination_type, {})
    add(model, combination_type='cat', adapters=SOURCES + ['l3'], weights=[1, 2, 3, 4])
    update(model, combination_type=combination_type, **options)
    if combination_type == 'average':
        add(model, SOURCES, WEIGHTS, 'average', name='oracle')
        assert_close_deltas(model, 'fused', model)
    else:
        assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)


@pytest.mark.parametrize('combination_type', [name for name in PEFT_TYPES if name.endswith('svd')])
@pytest.mark.parametrize('kind', ['embedding', 'linear', 'fan', 'conv2', 'point'])
def test_every_kind_of_layer_that_stock_can_decompose_is(kind, combination_type):
    model = peft_model(loras(cls=LoraConfig, target_modules=[kind]), AllKinds())
    add(model)
    update(model, combination_type=combination_type, **PEFT_TYPES[combination_type])
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **PEFT_TYPES[combination_type])


@pytest.mark.parametrize('kind, full_rank', [('conv1', 3), ('conv3', 2)])
def test_svd_also_works_where_stock_makes_nothing_that_runs(kind, full_rank):
    model = peft_model(loras(cls=LoraConfig, target_modules=[kind], r=2), AllKinds())
    with pytest.raises(RuntimeError):
        outputs(fresh(model, SOURCES, WEIGHTS, 'svd'))
    add(model)
    update(model, combination_type='svd', svd_rank=full_rank)
    [scaling] = {layer.scaling['l0'] for layer in layers(model).values()}
    for name, delta in deltas(model, 'fused').items():
        expected = sum(weight * scaling * deltas(model, source)[name] for source, weight in zip(SOURCES, WEIGHTS))
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['linear', 'fan'])
@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_every_kind_of_layer_that_ms_swift_can_merge_is_merged_as_in_stock(kind, combination_type):
    model = swift_model(loras(target_modules=[kind]), AllKinds())
    add(model)
    update(model, combination_type=combination_type, **PEFT_TYPES[combination_type])
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **PEFT_TYPES[combination_type])


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd', 'ties', 'ties_svd'])
def test_bfloat16_is_summed_in_float32_and_stays_bfloat16(combination_type):
    model = swift_model(loras(), qwen2().bfloat16()).bfloat16()
    options = PEFT_TYPES[combination_type]
    add(model)
    update(model, combination_type=combination_type, **options)
    assert {layer.lora_A['fused'].weight.dtype for layer in layers(model).values()} == {torch.bfloat16}
    assert_close_deltas(model, 'fused', fresh(model, SOURCES, WEIGHTS, combination_type, **options), 2e-2)


def test_float64_sees_the_weights_that_stock_sees():
    model = swift_model(loras(), qwen2().double()).double()
    add(model)
    update(model, SOURCES, [0.1, 0.2, 0.7], 'linear')
    assert_close_deltas(model, 'fused', fresh(model, SOURCES, [0.1, 0.2, 0.7], 'linear'), 1e-12)


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


def test_a_copied_model_has_a_fused_adapter_of_its_own(model):
    add(model)
    copied, before = copy.deepcopy(model), deltas(model, 'fused')
    update(copied)
    assert_as_fresh(copied, SOURCES, WEIGHTS, 'linear')
    for name, delta in deltas(model, 'fused').items():
        assert torch.equal(delta, before[name])


def test_it_works_in_inference_mode_and_outside_of_it_in_turn(model):
    with torch.inference_mode():
        add(model)
    update(model)
    with torch.inference_mode():
        update(model, ['l1'], [1.0])
    update(model)
    assert_as_fresh(model, SOURCES, WEIGHTS, 'linear')


def test_a_saved_fused_adapter_is_loaded_as_it_was(tmp_path):
    model = swift_model(loras(lora_alpha=[8, 2, 5], alpha_pattern=[{'q_proj': 3}, {}, {}]))
    add(model, ['l1', 'l0'], [1.0, 0.5], 'average')
    update(model, combination_type='cat')
    model.save_pretrained(str(tmp_path), adapter_name='fused')
    loaded = Swift.from_pretrained(qwen2(), str(tmp_path), adapter_name=['fused'])
    for name, delta in deltas(loaded, 'fused').items():
        torch.testing.assert_close(delta, deltas(model, 'fused')[name])


@pytest.mark.parametrize('combination_type', ['linear', 'svd'])
def test_sources_and_targets_that_were_offloaded_are_loaded_for_the_merge_and_put_back(combination_type):
    model = swift_model(loras())
    add(model)
    expected = fresh(model, SOURCES, WEIGHTS, combination_type)
    model.set_active_adapters('l3', offload='meta')
    update(model, combination_type=combination_type)
    for layer in layers(model).values():
        assert {name for name, module in layer.lora_A.items() if not module.weight.is_meta} == {'l3'}
    model.set_active_adapters(['fused', 'l0', 'l1', 'l2', 'l3'])
    model.set_active_adapters('fused')
    assert_close_deltas(model, 'fused', expected)


def bad_updates():
    nan, inf = float('nan'), float('inf')
    yield 'unknown source', dict(adapters=['l0', 'nobody']), ValueError, 'nobody'
    yield 'itself', dict(adapters=['l0', 'fused']), ValueError, 'fused'
    yield 'no sources', dict(adapters=[], weights=[]), ValueError, 'at least one'
    yield 'lengths', dict(adapters=['l0'], weights=[1.0, 2.0]), ValueError, '1 adapters'
    yield 'nan', dict(weights=[nan, 1.0]), ValueError, 'nan'
    yield 'inf', dict(weights=[inf, 1.0]), ValueError, 'inf'
    yield 'too large', dict(weights=[1e60, 1.0]), ValueError, '1e\\+60'
    yield 'huge', dict(weights=[10**400, 1.0]), ValueError, '1000'
    yield 'not numbers', dict(weights=['1', 1.0]), TypeError, "'1'"
    yield 'bools', dict(weights=[True, 1.0]), TypeError, 'True'
    yield 'a string', dict(adapters='l0', weights=[1.0]), TypeError, 'l0'
    yield 'no strings', dict(adapters=['l0', 1]), TypeError, '1'
    yield 'no weights', dict(weights=None), TypeError, 'None'
    yield 'a type that is none', dict(combination_type='mean'), ValueError, 'mean'
    yield 'no density', dict(combination_type='ties'), ValueError, 'density'
    yield 'a bad density', dict(combination_type='ties', density=-0.1), ValueError, '-0.1'
    yield 'nan density', dict(combination_type='ties', density=nan), ValueError, 'nan'
    yield 'ranks', dict(adapters=['l0', 'wide'], combination_type='linear'), ValueError, "'wide': 6"
    yield 'ranks of one layer', dict(adapters=['l0', 'patterned'], combination_type='linear'), ValueError, 'q_proj'
    yield 'ranks to average', dict(adapters=['l0', 'wide'], combination_type='average'), ValueError, "'wide': 6"
    yield 'a bad rank', dict(combination_type='svd', svd_rank=-1), ValueError, '-1'
    yield 'a bad clamp', dict(combination_type='svd', svd_clamp=1.5), ValueError, '1.5'
    yield 'a bad driver', dict(combination_type='svd', svd_driver='fast'), ValueError, 'fast'
    yield 'a driver on the CPU', dict(combination_type='svd', svd_driver='gesvd'), ValueError, 'gesvd'
    yield 'a bad method', dict(combination_type='ties', density=0.5, majority_sign_method='x'), ValueError, "'x'"
    yield 'an unknown target', dict(name='nobody'), ValueError, 'nobody'
    yield 'a trained target', dict(adapters=['l0', 'l1'], name='l2'), ValueError, 'trained'
    yield 'no name', dict(name=None), TypeError, 'None'
    yield 'mixed target modules', dict(adapters=['l0', 'regex']), ValueError, 'regular expressions'
    yield 'dora', dict(adapters=['dora', 'l0']), ValueError, 'use_dora'


@pytest.mark.parametrize(
    'arguments, error, message', [case[1:] for case in bad_updates()], ids=[case[0] for case in bad_updates()])
@pytest.mark.parametrize('cls', [LoRAConfig, LoraConfig])
def test_bad_input_is_refused_with_a_reason_and_changes_nothing(cls, arguments, error, message):
    configs = {
        **loras(3, cls), 'wide': cls(r=6, target_modules=PROJECTIONS),
        'patterned': cls(r=4, target_modules=PROJECTIONS, rank_pattern={'q_proj': 2}),
        'regex': cls(r=4, target_modules='.*q_proj'),
        'dora': cls(r=4, target_modules=['q_proj'], use_dora=True)
    }
    model = (swift_model if cls is LoRAConfig else peft_model)(configs)
    add(model, ['l0', 'l1'])
    before = state(model)
    arguments = {'adapters': ['l0', 'l1'], 'weights': [0.5, 0.5], 'combination_type': None, **arguments}
    with pytest.raises(error, match=message):
        update(model, **arguments)
    assert_same_state(state(model), before)
    update(model, ['l0', 'l1'], [0.3, 0.3], 'cat')
    assert_as_fresh(model, ['l0', 'l1'], [0.3, 0.3], 'cat')


@pytest.mark.parametrize('merged', ['fused', 'l1'])
def test_an_adapter_that_is_merged_into_the_base_weights_is_refused(model, merged):
    add(model)
    for layer in layers(model).values():
        layer.merge(adapter_names=[merged])
    before = state(model)
    with pytest.raises(ValueError, match='merged into the base weights'):
        update(model)
    assert_same_state(state(model), before)


def test_two_sources_with_a_module_of_their_own_are_refused(build):
    model = build(modules_to_save=[['lm_head']])
    # Stock cannot add an adapter while several of these are active, as they are in a new SwiftModel.
    activate(model, 'l3')
    add(model, ['l3'], [1.0])
    before = state(model)
    with pytest.raises(ValueError, match='modules_to_save'):
        update(model)
    assert_same_state(state(model), before)


@pytest.mark.parametrize('combination_type', ['linear', 'cat'])
@pytest.mark.parametrize('failing', [1, 5, 28])
def test_whatever_is_raised_while_writing_the_model_is_as_it_was(model, failing, combination_type, monkeypatch):
    add(model)
    before = state(model), config(model, 'fused').to_dict()
    copy_, calls = torch.Tensor.copy_, []

    def fail_once(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'copy_', fail_once)
    with pytest.raises(KeyboardInterrupt):
        update(model, combination_type=combination_type)
    monkeypatch.undo()
    assert_same_state(state(model), before[0])
    assert config(model, 'fused').to_dict() == before[1]
    update(model)
    assert_as_fresh(model, SOURCES, WEIGHTS, 'linear')


def test_an_add_that_fails_leaves_no_adapter(model, monkeypatch):
    before = state(model)

    def fail(*args):
        raise MemoryError

    monkeypatch.setitem(merging.COMBINATION_TYPES, 'cat', merging.CombinationType(fail, 'sum'))
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(SOURCES, WEIGHTS, 'fused', 'cat')
    monkeypatch.undo()
    assert_same_state(state(model), before)
    add(model, combination_type='cat')
    assert_as_fresh(model, ['l3', 'l1'], [0.4, -0.7], 'cat')


def test_a_trained_adapter_is_neither_replaced_nor_made_refillable_by_adding_one_of_its_name(model):
    before = deltas(model, 'l2')
    add(model, ['l0', 'l1'], [1.0, 1.0], name='l2')
    with pytest.raises(ValueError, match='trained'):
        update(model, ['l0', 'l1'], [1.0, 1.0], name='l2')
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model, 'l2').items())


def test_a_new_adapter_that_took_the_name_of_a_deleted_fused_one_is_never_overwritten():
    model = peft_model(loras(cls=LoraConfig))
    add(model)
    model.delete_adapter('fused')
    model.add_adapter('fused', LoraConfig(r=4, target_modules=PROJECTIONS))
    with pytest.raises(ValueError, match='trained'):
        update(model)


def test_svd_of_lora_factors_never_forms_a_dense_delta(model, monkeypatch):

    def refuse(*args):
        raise AssertionError('a dense delta was formed')

    monkeypatch.setattr(merging, '_dense_delta', refuse)
    add(model, combination_type='svd')
    update(model, combination_type='magnitude_prune_svd', density=1.0)
    update(model, combination_type='dare_linear_svd', density=1.0)
    update(model, combination_type='svd')
    assert_as_fresh(model, SOURCES, WEIGHTS, 'svd')


def test_updates_do_not_make_a_compiled_model_compile_again():
    model = swift_model(loras(count=3))
    add(model, ['l0', 'l1'], [0.5, 0.5], 'average')
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    outputs(compiled)
    frames = counter.frame_count
    for i in range(5):
        update(model, [f'l{i % 3}', f'l{(i + 1) % 3}'], [0.1 * i, 1.0])
        torch.testing.assert_close(outputs(compiled), outputs(model), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == frames > 0
