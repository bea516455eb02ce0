import copy
import pytest
import torch
from models import (PEFT_TYPES, PROJECTIONS, SOURCES, WEIGHTS, Nested, activate, add, assert_as_fresh,
                    assert_close_deltas, assert_same_state, config, deltas, fresh, layers, loras, outputs, peft_model,
                    qwen2, state, stock, swift_model, update)
from peft import LoraConfig
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from swift.tuners import LoRAConfig, Swift
from torch import nn

from swift_patch.compose.composer import FusionComposer
from swift_patch.lora.combination import MergeOptions
from swift_patch.lora.composition import Composition


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


def test_a_trained_adapter_is_neither_replaced_nor_made_refillable_by_adding_one_of_its_name(model):
    before = deltas(model, 'l2')
    add(model, ['l0', 'l1'], [1.0, 1.0], name='l2')
    with pytest.raises(ValueError, match='trained'):
        update(model, ['l0', 'l1'], [1.0, 1.0], name='l2')
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model, 'l2').items())


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda found: found])
def test_a_new_adapter_of_a_copied_config_of_a_fused_one_is_never_overwritten(copied):
    model, other = peft_model(loras(cls=LoraConfig)), peft_model(loras(cls=LoraConfig))
    add(model)
    other.add_adapter('fused', copied(model.peft_config['fused']))
    with pytest.raises(ValueError, match='trained'):
        update(other)
    if copied(model.peft_config['fused']) is not model.peft_config['fused']:
        found = copied(model.peft_config['fused'])
        model.delete_adapter('fused')
        model.add_adapter('fused', found)
        with pytest.raises(ValueError, match='trained'):
            update(model)


def test_a_new_adapter_that_took_the_name_of_a_deleted_fused_one_is_never_overwritten():
    model = peft_model(loras(cls=LoraConfig))
    add(model)
    model.delete_adapter('fused')
    model.add_adapter('fused', LoraConfig(r=4, target_modules=PROJECTIONS))
    with pytest.raises(ValueError, match='trained'):
        update(model)


@pytest.mark.parametrize(
    'weights', [[1, 0.5],
                (1, 0.5), torch.tensor([1, 0.5]),
                torch.tensor([1, 0.5]).numpy(),
                iter([1, 0.5])],
    ids=lambda weights: type(weights).__name__)
def test_weights_may_be_any_list_of_numbers(weights):
    assert Composition.of(['a', 'b'], weights, MergeOptions()).weights == (1.0, 0.5)


def test_a_scaling_of_zero_is_refused(model):
    add(model)
    list(layers(model).values())[0].scaling['fused'] = 0.0
    with pytest.raises(ValueError, match='scaling'):
        update(model)


@pytest.mark.parametrize('combination_type', ['', 0, False, []])
def test_only_none_means_the_last_type(model, combination_type):
    add(model)
    with pytest.raises(ValueError, match='combination_type'):
        update(model, combination_type=combination_type)


@pytest.mark.parametrize('name, error', [('', ValueError), ('a.b', ValueError), (None, TypeError), (3, TypeError)])
def test_a_name_that_no_adapter_can_have_is_refused(model, name, error):
    with pytest.raises(error, match='adapter_name'):
        model.add_weighted_adapter(['l0', 'l1'], [1.0, 1.0], name, 'linear')


def test_loras_that_ms_swift_loaded_from_disk_can_be_merged(tmp_path):
    trained = swift_model(loras())
    trained.save_pretrained(str(tmp_path))
    model = Swift.from_pretrained(qwen2(), str(tmp_path))
    # JSON has no sets, and stock takes nothing else.
    assert isinstance(config(model, 'l0').target_modules, list)
    with pytest.raises(TypeError, match='list'):
        fresh(model, SOURCES, WEIGHTS, 'linear')
    add(model)
    update(model)
    add(trained)
    update(trained)
    assert_as_fresh(trained, SOURCES, WEIGHTS, 'linear')
    for name, delta in deltas(trained, 'fused').items():
        assert torch.equal(deltas(model, 'fused')[name], delta)


@pytest.mark.parametrize('combination_type', [name for name, options in PEFT_TYPES.items() if 'density' in options])
def test_every_type_that_prunes_needs_a_density(combination_type):
    model = swift_model(loras(2, target_modules=['q_proj']))
    with pytest.raises(ValueError, match='density'):
        model.add_weighted_adapter(['l0', 'l1'], [1.0, 1.0], 'fused', combination_type)


def test_target_modules_that_are_regular_expressions_are_joined_as_in_stock():
    model = swift_model({
        'q': LoRAConfig(r=4, target_modules='.*q_proj'),
        'up': LoRAConfig(r=4, target_modules='.*up_proj')
    })
    add(model, ['q', 'up'], [1.0, 0.5])
    oracle = fresh(model, ['q', 'up'], [1.0, 0.5], 'linear')
    assert config(model, 'fused').target_modules == config(oracle, 'oracle').target_modules
    assert_as_fresh(model, ['q', 'up'], [1.0, 0.5], 'linear')


def test_sources_of_other_shapes_in_one_layer_are_refused(model):
    add(model)
    before = state(model)
    list(layers(model).values())[3].lora_A['l0'].weight.data = torch.zeros(4, 7)
    with pytest.raises(ValueError, match='of one shape in layer'):
        update(model)
    fused = {name: values for name, values in before.items() if '.fused.' in name}
    assert_same_state({name: state(model)[name] for name in fused}, fused)


@pytest.mark.parametrize('cls', [LoRAConfig, LoraConfig])
def test_a_fused_dora_is_refilled_from_doras_but_does_not_grow(cls):
    model = (swift_model if cls is LoRAConfig else peft_model)({
        **loras(3, cls, use_dora=True, target_modules=['q_proj']), 'wide':
        cls(r=4, use_dora=True, target_modules=['q_proj', 'up_proj'])
    })
    add(model, ['l0', 'l1'])
    update(model)
    assert_close_deltas(model, 'fused', fresh(model, SOURCES, WEIGHTS, 'linear'))
    before = state(model)
    with pytest.raises(ValueError, match='cannot grow'):
        update(model, ['wide'], [1.0])
    assert_same_state(state(model), before)


def test_sources_whose_settings_leave_a_layer_without_any_of_them_are_refused_as_in_stock(build):
    # The first one's layers are taken, and the target modules of both: down_proj of layer 0 would be new.
    model = build(
        count=2,
        target_modules=PROJECTIONS[:2],
        layers_to_transform=[[0], [1]],
    )
    config(model, 'l0').target_modules = {*PROJECTIONS[:2], 'down_proj'}
    with pytest.raises((ValueError, IndexError)):
        fresh(model, ['l0', 'l1'], WEIGHTS[:2], 'cat')
    before = state(model)
    for combination_type in ('linear', 'cat', 'svd'):
        with pytest.raises(ValueError, match='but none does'):
            model.add_weighted_adapter(['l0', 'l1'], WEIGHTS[:2], 'fused', combination_type)
    assert_same_state(state(model), before)


def nested(**changes):
    """A `PeftModel` (ms-swift has no LoRA for attention modules) with LoRA layers inside of others."""
    targets = ['q_proj', 'attention']
    return peft_model(
        {
            'first': LoraConfig(r=4, target_modules=targets, **changes),
            'second': LoraConfig(r=4, target_modules=targets),
            'narrow': LoraConfig(r=4, target_modules=['q_proj'])
        }, Nested())


RESTRICTIONS = [{}, {
    'modules_to_save': ['lm_head']
}, {
    'exclude_modules': ['nothing']
}, {
    'exclude_modules': '.*down_proj'
}, {
    'layers_to_transform': [0, 1]
}, {
    'layers_to_transform': [0]
}, {
    'exclude_modules': ['layers.0.attention']
}]


@pytest.mark.parametrize('changes', RESTRICTIONS, ids=str)
@pytest.mark.parametrize(
    'sources, combination_type', [(['first', 'second'], 'cat'), (['second', 'first'], 'linear'), (['first'], 'linear'),
                                  (['first', 'second'], 'svd')],
    ids=str)
def test_a_lora_layer_inside_another_is_fused_with_it_whatever_restricts_a_source(changes, sources, combination_type):
    weights = [0.5, 0.3][:len(sources)]
    model = nested(**changes)
    add(model, sources, weights, combination_type)
    assert_as_fresh(model, sources, weights, combination_type)
    grown = nested(**changes)
    add(grown, ['narrow'], [1.0])
    update(grown, sources, weights, combination_type)
    assert_as_fresh(grown, sources, weights, combination_type)
    composed = nested(**changes)
    FusionComposer(composed, combination_type=combination_type).compose(sources, weights)
    assert_as_fresh(composed, sources, weights, combination_type)


def with_less_described_than_there_is(build):
    """Sources whose configs say less than they have: stock passes over the layers that a new adapter would not get."""
    model = build(target_modules=['q_proj', 'down_proj'])
    for name in ('l0', 'l1', 'l2'):
        config(model, name).target_modules = {'q_proj'}
    return model, ['l0', 'l1']


def with_layers_that_only_the_second_source_has(build):
    """Of the first source's settings, those hold for all: a layer that they exclude is passed over."""
    model = build(count=4, target_modules=['q_proj', 'down_proj'], layers_to_transform=[[0], None, [0], [0]])
    return model, ['l0', 'l1']


def with_excluded_modules(build):
    """As the one before, by name."""
    model = build(count=4, target_modules=['q_proj', 'down_proj'], exclude_modules=['down_proj', None, None, None])
    return model, ['l0', 'l1']


def with_a_layer_put_where_no_config_says(build):
    """A LoRA layer that somebody put elsewhere as well, under a name that no target module matches."""
    model = build(target_modules=['q_proj'])
    named = dict(model.named_modules())
    [name] = [name for name in layers(model) if 'layers.0' in name]
    owner = named[name.rpartition('.')[0]]
    owner.k_proj_of_mine = copy.deepcopy(owner.q_proj)
    return model, ['l0', 'l1']


@pytest.mark.parametrize('make', [
    with_less_described_than_there_is, with_layers_that_only_the_second_source_has, with_excluded_modules,
    with_a_layer_put_where_no_config_says
])
@pytest.mark.parametrize('combination_type, earlier', [('linear', None), ('linear', ['l2']), ('cat', ['l1', 'l3']),
                                                       ('svd', ['l3'])])
def test_layers_that_a_new_adapter_would_not_get_are_passed_over_whatever_came_before(
        build, make, combination_type, earlier):
    model, sources = make(build)
    composer = FusionComposer(model, combination_type=combination_type)
    if earlier:
        composer.compose(earlier)
    composer.compose(sources, [0.5, 0.3])
    assert_as_fresh(model, sources, [0.5, 0.3], combination_type)
    add(model, sources, [0.5, 0.3], combination_type, name='anew')
    assert_close_deltas(model, 'anew', fresh(model, sources, [0.5, 0.3], combination_type))


def with_tied_embeddings():
    """PEFT ties an adapter of `embed_tokens` to `lm_head`, but only the first one's."""
    tied = LoraConfig(r=4, target_modules=['q_proj', 'embed_tokens'], ensure_weight_tying=True)
    base = qwen2()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return peft_model({name: copy.deepcopy(tied) for name in ('l0', 'l1', 'l2')}, base)


class Expert(nn.Module):
    """A module with a parameter of its own and a layer inside."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, hidden):
        return torch.tanh(self.inner(hidden)) @ self.weight


def with_a_parameter_targeted_later():
    """The layer inside of a module that PEFT wraps later, for an adapter of one of its parameters."""
    base = Nested()
    base.heads['expert'] = Expert()
    return peft_model(
        {
            'l0': LoraConfig(r=4, target_modules=['q_proj', 'inner']),
            'l1': LoraConfig(r=4, target_modules=['q_proj', 'inner']),
            'l2': LoraConfig(r=4, target_modules=['q_proj']),
            'of a parameter': LoraConfig(r=4, target_modules=['q_proj'], target_parameters=['expert.weight'])
        }, base)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('make', [with_tied_embeddings, with_a_parameter_targeted_later])
@pytest.mark.parametrize('combination_type, earlier', [('linear', None), ('cat', ['l2']), ('linear', ['l1'])])
def test_layers_that_peft_gives_no_second_adapter_are_passed_over_whatever_came_before(make, combination_type, earlier):
    model, weights = make(), [0.5, 0.3]
    # What is active is the fused adapter alone: a parameter's adapter goes without what PEFT does for it.
    composer = FusionComposer(model, combination_type=combination_type)
    if earlier:
        composer.compose(earlier)
    composer.compose(['l0', 'l1'], weights)
    with stock():
        # Built anew: a tied adapter cannot be copied.
        oracle = make()
        oracle.add_weighted_adapter(['l0', 'l1'], weights, 'oracle', combination_type)
        oracle.set_adapter('oracle')
    torch.testing.assert_close(outputs(model), outputs(oracle), rtol=1e-4, atol=1e-4)


def padded_to(rank):

    def change(model, configs):
        prepare_model_for_compiled_hotswap(model, target_rank=rank)

    return change


def padded_with_its_configs(model, configs):
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=configs)


def swapped_for_a_larger_rank(model, configs):
    """The config of `l0` says 4 still."""
    for number, layer in enumerate(layers(model).values()):
        generator = torch.Generator().manual_seed(number)
        for side, container in (('A', layer.lora_A), ('B', layer.lora_B)):
            old = container['l0'].weight
            shape = (6, old.shape[1]) if side == 'A' else (old.shape[0], 6)
            container['l0'].weight = nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)


@pytest.mark.parametrize('change', [padded_to(6), padded_to(4), padded_with_its_configs, swapped_for_a_larger_rank])
@pytest.mark.parametrize('combination_type, sources', [('linear', ['l0', 'l1']), ('linear', ['l0']), ('cat', ['l0']),
                                                       ('svd', ['l0', 'l1']), ('svd', ['l0']),
                                                       ('magnitude_prune', ['l0', 'l1'])])
def test_sources_are_taken_with_the_rank_that_their_tensors_have(build, change, combination_type, sources):
    model = build(target_modules=['q_proj', 'down_proj'])
    change(model, {name: config(model, name) for name in loras()})
    weights, options = [0.5, 0.3][:len(sources)], {}
    if combination_type == 'magnitude_prune':
        options['density'] = 0.5
    try:
        oracle = fresh(model, sources, weights, combination_type, **options)
    except RuntimeError:
        # Of one rank by their configs, but not by their tensors.
        with pytest.raises(ValueError):
            add(model, sources, weights, combination_type, **options)
        return
    add(model, sources, weights, combination_type, **options)
    assert_close_deltas(model, 'fused', oracle)
    add(model, ['l2'], [1.0], name='earlier')
    update(model, sources, weights, combination_type, name='earlier', **options)
    assert_close_deltas(model, 'earlier', oracle)
    torch.testing.assert_close(outputs(model), outputs(oracle), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('change', [padded_to(6), swapped_for_a_larger_rank])
def test_a_source_is_selected_with_the_rank_that_its_tensors_have(build, change):
    model = build(target_modules=['q_proj', 'down_proj'])
    change(model, None)
    FusionComposer(model, 'selection').compose({'l0': 0.9, 'l1': 0.1})
    assert_close_deltas(model, 'fused', model, oracle_adapter='l0')
