import gc
import math
import psutil
import pytest
import threading
import torch
import weakref
from models import (add, assert_close_deltas, assert_same_state, config, deltas, fresh, layers, loras, outputs, qwen2,
                    state, stock, swift_model, update)
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from swift.tuners import SwiftModel
from torch import nn

from swift_patch.compose.composer import FusionComposer
from swift_patch.lora import merging


def active(model):
    found = {tuple(layer.active_adapters) for layer in layers(model).values()}
    assert len(found) == 1
    return list(found.pop())


def test_fusion_is_the_average_of_the_parameters_and_the_only_active_adapter(model):
    composer = FusionComposer(model)
    for sources in (['l0', 'l1', 'l2'], ['l3', 'l1']):
        assert composer.compose(sources) == 'fused'
        assert active(model) == ['fused']
        for layer in layers(model).values():
            for matrices in (layer.lora_A, layer.lora_B):
                expected = sum(matrices[name].weight.detach() for name in sources) / len(sources)
                torch.testing.assert_close(matrices['fused'].weight.detach(), expected)
            assert layer.scaling['fused'] == layer.scaling['l0']


def test_mixture_is_the_average_of_the_outputs(model):
    FusionComposer(model, 'mixture').compose({'l0': 0.7, 'l2': 0.3})
    assert_close_deltas(model, 'fused', fresh(model, ['l0', 'l2'], [0.7, 0.3], 'cat'))
    for name, delta in deltas(model, 'fused').items():
        torch.testing.assert_close(delta, 0.7 * deltas(model, 'l0')[name] + 0.3 * deltas(model, 'l2')[name])


def test_selection_is_the_heaviest_source_alone_as_it_is(model):
    composer = FusionComposer(model, 'selection')
    for weights, heaviest in (([0.2, 0.5, 0.3], 'l1'), ([0.6, 0.2, 0.2], 'l0'), (None, 'l0')):
        composer.compose(['l0', 'l1', 'l2'], weights)
        assert active(model) == ['fused']
        assert_close_deltas(model, 'fused', model, oracle_adapter=heaviest)


def of_methods(composer):
    """A composition of each merge method."""
    names, weights = ['l0', 'l2'], [0.7, 0.3]
    return {method: composer.composition(names, weights, method) for method in ('fusion', 'mixture', 'selection')}


@pytest.mark.parametrize('rank_by_batch', [False, True])
@pytest.mark.parametrize('composer_args', [{}, {
    'merge_method': 'mixture'
}, {
    'merge_method': 'selection'
}, {
    'combination_type': 'ties',
    'density': 0.3
}])
def test_a_composition_has_a_merge_method_of_its_own_whatever_that_of_its_composer(model, composer_args, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch, **composer_args)
    for method, composition in of_methods(composer).items():
        FusionComposer(model, method).compose({'l0': 0.7, 'l2': 0.3})
        expected = outputs(model)
        composer.compose(['l3', 'l1'])
        assert composer.compose_batch([composition]) == 'fused'
        assert active(model) == ['fused']
        torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
        composer.compose(['l3', 'l1'])
        with composer.fused_batch([composition, composition]):
            torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)


def test_a_composition_is_that_of_its_composer_by_default(model):
    composer = FusionComposer(model, 'mixture')
    assert composer.composition(['l0', 'l1']) == composer.composition({'l0': 0.5, 'l1': 0.5}, merge_method='mixture')
    assert composer.composition(['l0', 'l1']) != composer.composition(['l0', 'l1'], merge_method='fusion')
    by_type = FusionComposer(model, combination_type='svd', svd_rank=3)
    assert by_type.composition(['l0', 'l1']).options.svd_rank == 3
    by_type.compose_batch([by_type.composition(['l0', 'l2'], [0.7, 0.3])])
    assert_close_deltas(model, 'fused', fresh(model, ['l0', 'l2'], [0.7, 0.3], 'svd', svd_rank=3))


@pytest.mark.parametrize('merge_method', ['mixture', 'selection'])
def test_a_composition_means_the_outputs_also_with_rslora(build, merge_method):
    model = build(use_rslora=True)
    composer = FusionComposer(model)
    composer.compose_batch([composer.composition({'l0': 0.7, 'l2': 0.3}, merge_method=merge_method)])
    for name, delta in deltas(model, 'fused').items():
        l0, l2 = deltas(model, 'l0')[name], deltas(model, 'l2')[name]
        expected = l0 if merge_method == 'selection' else 0.7 * l0 + 0.3 * l2
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('arguments, error, message', [
    ((['l0'], None, 'blend'), ValueError, "one of .*'mixture'.* found 'blend'"),
    ((['l0'], None, 'cat'), ValueError, "found 'cat'"),
    ((['l0'], None, 3), ValueError, 'found 3'),
    (([], None, 'mixture'), ValueError, 'at least one'),
    (('l0', None, 'mixture'), TypeError, 'list of adapter names'),
    ((['l0', 'l1'], [1.0], 'mixture'), ValueError, 'of one length'),
    ((['l0'], [math.inf], 'mixture'), ValueError, 'finite'),
    (({
        'l0': 1.0
    }, [1.0], 'mixture'), TypeError, 'left out'),
])
def test_what_is_no_composition_is_refused_at_once(model, arguments, error, message):
    with pytest.raises(error, match=message):
        FusionComposer(model).composition(*arguments)


@pytest.mark.parametrize('rank_by_batch', [False, True])
@pytest.mark.parametrize('merge_method', ['fusion', 'mixture', 'selection'])
def test_a_composition_of_what_does_not_exist_is_refused_by_its_number_where_it_is_composed(
        model, merge_method, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    composer.compose_batch([['l1', 'l2'], ['l3']])
    before, expected = state(model), outputs(model)
    wrong = composer.composition(['l0', 'nobody'], merge_method=merge_method)
    with pytest.raises(ValueError, match="Sample 1: .*'nobody'"):
        composer.compose_batch([['l0'], wrong])
    with pytest.raises(ValueError, match="'nobody'"), composer.fused_batch([wrong]):
        pass
    assert_same_state(state(model), before)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize('rank_by_batch', [False, True])
def test_a_block_holds_compositions_by_their_merge_methods_too(model, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    of_method = of_methods(composer)
    for batch in ([of_method['mixture']], [of_method['mixture'], of_method['fusion']]):
        with composer.fused_batch(batch):
            expected = outputs(model)
            with composer.fused_batch(batch):
                assert torch.equal(outputs(model), expected)
            with pytest.raises(RuntimeError, match='expected to keep'):
                composer.compose_batch([of_method['selection'], *batch[1:]])
            assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize('combination_type, options', [('linear', {}), ('svd', {
    'svd_rank': 3
}), ('ties', {
    'density': 0.3
})])
def test_any_other_combination_type_is_stocks(model, combination_type, options):
    composer = FusionComposer(model, combination_type=combination_type, **options)
    composer.compose(['l3'])
    composer.compose(['l0', 'l2'], [0.7, 0.3])
    assert_close_deltas(model, 'fused', fresh(model, ['l0', 'l2'], [0.7, 0.3], combination_type, **options))


@pytest.mark.parametrize('merge_method', ['fusion', 'mixture', 'selection'])
def test_the_first_sample_and_a_later_one_are_the_same_computation(build, merge_method):
    first, later = build(), build()
    FusionComposer(first, merge_method).compose(['l1', 'l2'], [0.3, 0.7])
    composer = FusionComposer(later, merge_method)
    for sources in (['l0', 'l1', 'l3'], ['l3'], ['l2', 'l0'], ['l1', 'l2']):
        composer.compose(sources, [0.3, 0.7] if sources == ['l1', 'l2'] else None)
    for name, delta in deltas(first, 'fused').items():
        assert torch.equal(delta, deltas(later, 'fused')[name])


def test_composing_the_same_twice_gives_the_same_bit_by_bit(model):
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    before = deltas(model, 'fused')
    composer.compose(['l0', 'l1'])
    composer.compose({'l0': 0.5, 'l1': 0.5})
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model, 'fused').items())


def write(parameter):
    with torch.no_grad():
        parameter.copy_(parameter * 2)


def replace_data(parameter):
    parameter.data = parameter.data * 2


def test_composing_the_same_again_is_done_where_a_source_was_rescaled(model):
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    for layer in layers(model).values():
        layer.set_scale('l0', 3)
    composer.compose(['l0', 'l1'])
    found = deltas(model, 'fused')
    FusionComposer(model, adapter_name='new').compose(['l0', 'l1'])
    for name, delta in deltas(model, 'new').items():
        torch.testing.assert_close(found[name], delta)


@pytest.mark.parametrize('change', [write, replace_data])
def test_composing_the_same_again_is_done_where_a_source_changed(model, change):
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    change(list(layers(model).values())[3].lora_B['l1'].weight)
    composer.compose(['l0', 'l1'])
    for layer in layers(model).values():
        torch.testing.assert_close(layer.lora_B['fused'].weight,
                                   (layer.lora_B['l0'].weight + layer.lora_B['l1'].weight) / 2)


def test_composing_the_same_again_is_done_where_another_filled_the_adapter_or_switched(model):
    composer, other = FusionComposer(model), FusionComposer(model, 'mixture')
    composer.compose(['l0', 'l1'])
    expected = deltas(model, 'fused')
    other.compose(['l2', 'l3'])
    composer.compose(['l0', 'l1'])
    for name, delta in deltas(model, 'fused').items():
        torch.testing.assert_close(delta, expected[name])
    (model.set_active_adapters if isinstance(model, SwiftModel) else model.set_adapter)('l0')
    composer.compose(['l0', 'l1'])
    assert active(model) == ['fused']


def test_another_threads_compose_waits_while_the_adapter_is_held(model):
    composer, other = FusionComposer(model), FusionComposer(model, adapter_name='other')
    held, done = threading.Event(), []
    with composer.fused(['l0', 'l1']) as name:
        expected = outputs(model)

        def compose_elsewhere():
            held.set()
            other.compose(['l2', 'l3'])
            done.append(True)

        thread = threading.Thread(target=compose_elsewhere)
        thread.start()
        held.wait()
        assert name == 'fused'
        for _ in range(20):
            assert torch.equal(outputs(model), expected) and not done
    thread.join()
    assert done and active(model) == ['other']


def test_with_activation_by_thread_each_thread_gets_the_fused_adapter(monkeypatch):
    monkeypatch.setenv('USE_UNIQUE_THREAD', '0')
    model = swift_model(loras())
    composer = FusionComposer(model)
    expected, wrong = {}, []
    for name in loras():
        composer.compose([name, 'l0'] if name != 'l0' else ['l0'])
        expected[name] = outputs(model)

    def work(name):
        for _ in range(10):
            with composer.fused([name, 'l0'] if name != 'l0' else ['l0']):
                if not torch.equal(outputs(model), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=[name]) for name in expected]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize('merge_method, rank', [('fusion', 4), ('mixture', 12), ('selection', 4)])
def test_after_reserving_nothing_grows_and_no_address_changes(model, merge_method, rank, caplog):
    composer = FusionComposer(model, merge_method)
    before = active(model)
    composer.reserve(max_sources=3)
    assert active(model) == before
    caplog.clear()
    addresses = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
    for sources in (['l0'], ['l0', 'l1', 'l2'], ['l3', 'l2']):
        composer.compose(sources)
    assert [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()] == addresses
    assert {layer.r['fused'] for layer in layers(model).values()} == {rank}
    assert not caplog.records


def test_reserving_covers_the_layers_of_all_adapters_and_changes_no_output(caplog):
    model = swift_model({
        **loras(2, target_modules=['q_proj']),
        'wide': loras(1, r=9)['l0'],
    })
    composer = FusionComposer(model, 'mixture')
    composer.compose(['l0', 'l1'])
    expected = outputs(model)
    composer.reserve()
    torch.testing.assert_close(outputs(model), expected)
    caplog.clear()
    composer.compose(['l0', 'l1', 'wide'])
    assert not caplog.records
    assert_close_deltas(model, 'fused', fresh(model, ['l0', 'l1', 'wide'], [1 / 3] * 3, 'cat'))


@pytest.mark.parametrize('arguments, error, message', [
    (dict(merge_method='blend'), ValueError, 'blend'),
    (dict(combination_type='blend'), ValueError, 'blend'),
    (dict(combination_type='ties'), ValueError, 'density'),
    (dict(merge_method='selection', combination_type='cat'), ValueError, 'selection'),
    (dict(adapter_name='l0'), ValueError, 'trained'),
    (dict(density=-1), ValueError, '-1'),
])
def test_bad_arguments_are_refused_at_once(model, arguments, error, message):
    with pytest.raises(error, match=message):
        FusionComposer(model, **arguments)


@pytest.mark.parametrize('sources, weights, error', [
    (['l0', 'nobody'], None, ValueError),
    ([], None, ValueError),
    ({}, None, ValueError),
    ('l0', None, TypeError),
    (None, None, TypeError),
    (['l0'], [1, 2], ValueError),
    ({
        'l0': 1.0
    }, [1.0], TypeError),
    ({
        'l0': math.nan
    }, None, ValueError),
    (['l0', 'fused'], None, ValueError),
])
def test_bad_sources_are_refused_and_change_nothing(model, sources, weights, error):
    composer = FusionComposer(model)
    composer.compose(['l1', 'l2'])
    before = state(model)
    with pytest.raises(error):
        composer.compose(sources, weights)
    assert_same_state(state(model), before)


def test_a_model_without_adapters_or_patch_is_refused():
    with pytest.raises(TypeError, match='Qwen2ForCausalLM'):
        FusionComposer(qwen2())
    model = swift_model(loras())
    composer = FusionComposer(model)
    with stock():
        with pytest.raises(RuntimeError, match='apply'):
            FusionComposer(model)
        with pytest.raises(RuntimeError, match='apply'):
            composer.compose(['l0'])


def test_a_hundred_compositions_do_not_make_a_compiled_model_compile_again():
    model = swift_model(loras())
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    composer = FusionComposer(compiled, 'mixture')
    composer.reserve(max_sources=3)
    composer.compose(['l0'])
    outputs(compiled)
    frames = counter.frame_count
    for i in range(100):
        composer.compose([f'l{(i + j) % 4}' for j in range(1 + i % 3)], [0.1 * i, 1.0, -0.3][:1 + i % 3])
        torch.testing.assert_close(outputs(compiled), outputs(model), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == frames > 0


def test_ten_thousand_compositions_leave_no_more_tensors_modules_or_memory(build):
    model = build(target_modules=['q_proj'])
    composer = FusionComposer(model)
    names = list(loras())

    def count():
        gc.collect()
        found = gc.get_objects()
        return [sum(isinstance(thing, kind) for thing in found) for kind in (torch.Tensor, nn.Module)]

    for i in range(1000):
        composer.compose([names[i % 4], names[(i + 1) % 4]], [i + 1, 1.0])
    before, grown = count(), []
    # What else there is in this process may take some memory meanwhile, but not each time.
    while not grown or (min(grown) >= 2**23 and len(grown) < 3):
        memory = psutil.Process().memory_info().rss
        for i in range(10_000):
            composer.compose([names[i % 4], names[(i + 1) % 4]], [i + 1, 1.0])
        grown.append(psutil.Process().memory_info().rss - memory)
    assert count() == before
    assert min(grown) < 2**23, grown


def test_a_dropped_model_is_collected():
    model = swift_model(loras())
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    reference = weakref.ref(model.model)
    del model, composer
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize('merge_method', ['mixture', 'selection'])
def test_mixture_and_selection_mean_the_outputs_also_with_rslora(build, merge_method):
    model = build(use_rslora=True, r=[4, 4, 4, 4])
    FusionComposer(model, merge_method).compose({'l0': 0.7, 'l2': 0.3})
    for name, delta in deltas(model, 'fused').items():
        l0, l2 = deltas(model, 'l0')[name], deltas(model, 'l2')[name]
        expected = l0 if merge_method == 'selection' else 0.7 * l0 + 0.3 * l2
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def test_a_whole_adapter_that_was_written_through_data_is_noticed(model):
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    for layer in layers(model).values():
        layer.lora_A['l0'].weight.data.copy_(layer.lora_A['l3'].weight)
        layer.lora_B['l0'].weight.data.copy_(layer.lora_B['l3'].weight)
    composer.compose(['l0', 'l1'])
    for layer in layers(model).values():
        torch.testing.assert_close(layer.lora_A['fused'].weight,
                                   (layer.lora_A['l3'].weight + layer.lora_A['l1'].weight) / 2)


def test_what_a_block_holds_stays_where_the_same_is_composed_inside_of_it(model):
    composer = FusionComposer(model, combination_type='dare_linear', density=0.5)
    with composer.fused(['l0', 'l1']):
        expected = outputs(model)
        with composer.fused(['l0', 'l1']):
            assert torch.equal(outputs(model), expected)
        composer.compose(['l0', 'l1'])
        assert torch.equal(outputs(model), expected)


def test_what_a_block_holds_cannot_be_replaced_inside_of_it(model):
    composer = FusionComposer(model)
    with composer.fused(['l0', 'l1']):
        expected = outputs(model)
        with composer.fused(['l0', 'l1']):
            pass
        with pytest.raises(RuntimeError, match='l0.*l1'):
            composer.compose(['l2', 'l3'])
        with pytest.raises(RuntimeError), FusionComposer(model, adapter_name='other').fused(['l2']):
            pass
        assert torch.equal(outputs(model), expected)
    composer.compose(['l2', 'l3'])


def test_a_model_with_an_adapter_merged_into_the_base_weights_is_refused(model):
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    for layer in layers(model).values():
        layer.merge(adapter_names=['l3'])
    with pytest.raises(ValueError, match='unmerge'):
        composer.compose(['l0', 'l1'])


def test_a_first_composition_that_cannot_be_activated_leaves_no_adapter(model, monkeypatch):
    composer = FusionComposer(model)
    monkeypatch.setattr(FusionComposer, '_activate', lambda self, adapters: {}['interrupted'])
    with pytest.raises(KeyError):
        composer.compose(['l0', 'l1'])
    monkeypatch.undo()
    assert not [name for name in state(model) if 'fused' in name]
    composer.compose(['l0', 'l1'])
    assert active(model) == ['fused']


def test_a_later_composition_that_cannot_be_activated_leaves_the_earlier_one(model, monkeypatch):
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    before, expected = state(model), outputs(model)
    monkeypatch.setattr(FusionComposer, '_activate', lambda self, adapters: {}['interrupted'])
    with pytest.raises(KeyError):
        composer.compose(['l2', 'l3'], [0.7, 0.1])
    monkeypatch.undo()
    assert_same_state(state(model), before)
    assert torch.equal(outputs(model), expected)
    composer.compose(['l2', 'l3'])
    assert_close_deltas(model, 'fused', fresh(model, ['l2', 'l3'], [0.25, 0.25], 'linear'))


def test_reserving_with_a_source_that_is_offloaded_makes_layers_that_have_values():
    model = swift_model(loras(target_modules=['q_proj']))
    model = SwiftModel(model, {'wide': loras(1, target_modules=['q_proj', 'v_proj'])['l0']}, inference_mode=True)
    model.set_active_adapters('l0', offload='meta')
    composer = FusionComposer(model)
    composer.reserve()
    for layer in layers(model).values():
        assert not layer.lora_A['fused'].weight.is_meta and not hasattr(layer.lora_A['fused'], 'origin_device')
    composer.compose(['wide'])


def test_merging_leaves_the_random_numbers_of_its_user_alone(model):
    merging._is_sign_on_both_factors.cache_clear()
    composer = FusionComposer(model, combination_type='linear')
    composer.reserve()
    before = torch.get_rng_state()
    composer.compose(['l0', 'l1'])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_composed_adapter_is_frozen_with_its_magnitudes(build):
    model = build(use_dora=True)
    FusionComposer(model, 'mixture').compose(['l0', 'l1'])
    assert not [name for name, parameter in model.named_parameters() if '.fused' in name and parameter.requires_grad]


def test_reserving_with_an_offloaded_fused_adapter_keeps_it(monkeypatch):
    model = swift_model(loras())
    composer = FusionComposer(model, 'mixture')
    composer.compose(['l0', 'l1'])
    expected = outputs(model)
    model.set_active_adapters('l3', offload='meta')
    composer.reserve(max_sources=3)
    model.set_active_adapters('fused')
    torch.testing.assert_close(outputs(model), expected)


def test_sources_that_stay_offloaded_can_be_composed_again_and_again():
    model = swift_model(loras())
    composer = FusionComposer(model)
    composer.compose(['l2'])
    model.set_active_adapters('fused', offload='meta')
    for sources in (['l0', 'l1'], ['l0', 'l1'], ['l1', 'l3'], ['l0', 'l1']):
        composer.compose(sources)
    model.set_active_adapters(['l0', 'l1'])
    for layer in layers(model).values():
        assert layer.lora_A['l3'].weight.is_meta
        torch.testing.assert_close(layer.lora_B['fused'].weight,
                                   (layer.lora_B['l0'].weight + layer.lora_B['l1'].weight) / 2)


def test_reserving_leaves_layers_that_were_switched_directly(monkeypatch):
    model = swift_model(loras())
    model.set_active_adapters('l1')
    list(layers(model).values())[2].set_activation('l2', True)
    before = [layer.active_adapters for layer in layers(model).values()]
    FusionComposer(model).reserve()
    assert [layer.active_adapters for layer in layers(model).values()] == before


def test_reserving_for_svd_covers_a_single_source_too(model, caplog):
    composer = FusionComposer(model, combination_type='svd', svd_rank=2)
    composer.reserve()
    caplog.clear()
    composer.compose(['l0', 'l1'])
    composer.compose(['l2'])
    assert not caplog.records


@pytest.mark.parametrize('arguments, error', [
    (dict(adapters=['l0', 'nobody']), ValueError),
    (dict(adapters='l0'), TypeError),
    (dict(adapters=[]), ValueError),
    (dict(max_sources=0), ValueError),
    (dict(max_sources='x'), ValueError),
])
def test_bad_arguments_to_reserve_are_refused_and_change_nothing(model, arguments, error):
    before = state(model)
    with pytest.raises(error):
        FusionComposer(model).reserve(**arguments)
    assert_same_state(state(model), before)


def prepared(model, **options):
    """Makes scalings tensors, as one does before compiling a model whose adapters are swapped."""
    prepare_model_for_compiled_hotswap(model, **options)
    return model


def rescale_in_place(model, name, factor):
    """Changes scalings that are tensors, as `hotswap_adapter` does."""
    for layer in layers(model).values():
        layer.scaling[name].mul_(factor)


@pytest.mark.parametrize('merge_method', ['fusion', 'mixture', 'selection'])
def test_scalings_that_are_tensors_are_composed_as_numbers_are(build, merge_method):
    model, plain = prepared(build(lora_alpha=[8, 2, 6, 3])), build(lora_alpha=[8, 2, 6, 3])
    for each in (model, plain):
        composer = FusionComposer(each, merge_method)
        composer.reserve(max_sources=3)
        for sources in (['l0', 'l1'], ['l2'], ['l3', 'l1', 'l0']):
            composer.compose(sources, [0.3, 0.5, 0.2][:len(sources)])
    for name, delta in deltas(plain, 'fused').items():
        torch.testing.assert_close(deltas(model, 'fused')[name], delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(model), outputs(plain))


@pytest.mark.parametrize('merge_method', ['fusion', 'mixture', 'selection'])
def test_composing_the_same_again_is_done_where_a_scaling_that_is_a_tensor_was_changed(build, merge_method):
    model = prepared(build())
    composer = FusionComposer(model, merge_method)
    composer.compose({'l0': 0.6, 'l1': 0.4})
    rescale_in_place(model, 'l0', 3)
    composer.compose({'l0': 0.6, 'l1': 0.4})
    found = deltas(model, 'fused')
    FusionComposer(model, merge_method, adapter_name='new').compose({'l0': 0.6, 'l1': 0.4})
    for name, delta in deltas(model, 'new').items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)
    if merge_method == 'mixture':
        assert_close_deltas(model, 'fused', fresh(model, ['l0', 'l1'], [0.6, 0.4], 'cat'))


def test_scalings_of_the_fused_adapter_that_became_tensors_stay_so_and_are_right(build):
    model = build()
    composer = FusionComposer(model, 'mixture')
    composer.reserve(max_sources=2)
    composer.compose(['l0'])
    prepared(model)
    scalings = [layer.scaling['fused'] for layer in layers(model).values()]
    for change in (lambda: None, lambda: rescale_in_place(model, 'fused', 4)):
        change()
        composer.compose(['l0', 'l1'])
        assert_close_deltas(model, 'fused', fresh(model, ['l0', 'l1'], [0.5, 0.5], 'cat'))
    # A compiled graph reads the tensors that it saw.
    assert all(new.scaling['fused'] is old for new, old in zip(layers(model).values(), scalings))


def written_through_data(model):
    for name, parameter in model.named_parameters():
        if '.fused.' in name:
            parameter.data.copy_(torch.ones(parameter.shape))


def written_in_one_layer_through_data(model):
    list(layers(model).values())[1].lora_B['fused'].weight.data.mul_(3)


def written_in_place(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if '.fused.' in name:
                parameter.add_(1)


def loaded_by_state_dict(model):
    inner = model.base_model
    inner.load_state_dict(
        {
            name: torch.ones_like(value)
            for name, value in inner.state_dict().items() if '.fused.' in name
        }, strict=False)


def rescaled_by_its_layers(model):
    for layer in layers(model).values():
        layer.scaling['fused'] = layer.scaling['fused'] * 3


@pytest.mark.parametrize('change', [
    written_through_data, written_in_one_layer_through_data, written_in_place, loaded_by_state_dict,
    rescaled_by_its_layers
])
@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
def test_composing_the_same_again_is_done_where_the_fused_adapter_was_written_to(model, change, merge_method):
    composer = FusionComposer(model, merge_method)
    composer.compose(['l0', 'l1'])
    right, expected = outputs(model), deltas(model, 'fused')
    change(model)
    assert not torch.equal(outputs(model), right)
    composer.compose(['l0', 'l1'])
    torch.testing.assert_close(outputs(model), right)
    for name, delta in deltas(model, 'fused').items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)


def test_composing_the_same_again_is_done_where_one_layer_of_a_source_was_written_through_data(model):
    composer = FusionComposer(model, 'mixture')
    composer.compose(['l0', 'l1'])
    for layer in list(layers(model).values())[1:3]:
        layer.lora_B['l0'].weight.data.mul_(3)
    composer.compose(['l0', 'l1'])
    assert_close_deltas(model, 'fused', fresh(model, ['l0', 'l1'], [0.5, 0.5], 'cat'))


@pytest.mark.parametrize('merge_method, combination_type', [('fusion', 'linear'), ('mixture', 'linear'),
                                                            ('selection', 'linear'), ('mixture', 'cat')])
def test_reserving_leaves_a_fused_adapter_the_source_that_it_was(model, merge_method, combination_type):
    for name, later in (('plain', False), ('reserved', True)):
        add(model, ['l0', 'l1'], [0.5, 0.3], 'linear', name=name)
        if later:
            composer = FusionComposer(model, merge_method, adapter_name=name)
            composer.reserve(max_sources=3)
    add(model, ['plain', 'l2'], [0.5, 0.4], combination_type, name='expected')
    add(model, ['reserved', 'l2'], [0.5, 0.4], combination_type, name='again')
    assert_close_deltas(model, 'again', model, oracle_adapter='expected')
    assert config(model, 'again').r == config(model, 'expected').r
    update(model, ['l3', 'l0'], [0.2, 0.4], 'linear', name='reserved')
    update(model, ['reserved', 'l2'], [0.5, 0.4], combination_type, name='again')
    update(model, ['l3', 'l0'], [0.2, 0.4], 'linear', name='plain')
    update(model, ['plain', 'l2'], [0.5, 0.4], combination_type, name='expected')
    assert_close_deltas(model, 'again', model, oracle_adapter='expected')


def test_reserving_leaves_a_fused_adapter_the_layers_that_it_merges_as_a_source():
    model = swift_model({
        **loras(2, target_modules=['q_proj']), 'wide':
        loras(1, target_modules=['q_proj', 'up_proj'])['l0']
    })
    add(model, ['l0', 'l1'], [0.5, 0.3], name='plain')
    add(model, ['l0', 'l1'], [0.5, 0.3], name='reserved')
    FusionComposer(model, 'mixture', adapter_name='reserved').reserve(['l0', 'wide'])
    for name, sources in (('expected', ['plain', 'l0']), ('again', ['reserved', 'l0'])):
        add(model, sources, [0.5, 0.4], name=name)
    assert config(model, 'again').target_modules == config(model, 'expected').target_modules
    assert_close_deltas(model, 'again', model, oracle_adapter='expected')
