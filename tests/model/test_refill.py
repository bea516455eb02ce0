import copy
import math
import pytest
import torch
import torch._dynamo.testing
from models import (BUILDERS, PEFT_TYPES, SOURCES, WEIGHTS, AllKinds, activate, add, assert_as_fresh,
                    assert_close_deltas, assert_same_state, config, deltas, fresh, inputs, layers, loras, outputs,
                    peft_model, qwen2, reproducible_masks, state, stock, swift_model, update)
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from swift.tuners import LoRAConfig, NEFTuneConfig, SwiftModel
from transformers import LlamaConfig, LlamaForCausalLM

from swift_patch.compose.composer import FusionComposer
from swift_patch.lora import decomposed, formulas


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


@pytest.mark.parametrize('combination_type', [name for name in PEFT_TYPES if not name.endswith('svd')])
def test_a_clamp_is_for_svd_alone_as_in_stock(model, combination_type):
    options = {'svd_clamp': 0.5, **PEFT_TYPES[combination_type]}
    add(model)
    update(model, SOURCES, WEIGHTS, combination_type, **options)
    assert_as_fresh(model, SOURCES, WEIGHTS, combination_type, **options)


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


def test_a_single_source_is_averaged_by_its_weight_too(model):
    add(model, ['l0', 'l1'], combination_type='average')
    update(model, ['l2'], [0.6])
    for name, delta in deltas(model, 'fused').items():
        torch.testing.assert_close(delta, 0.6**2 * deltas(model, 'l2')[name])


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


@pytest.mark.parametrize('combination_type', [*PEFT_TYPES, 'average'])
@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('cls', [LoRAConfig, LoraConfig])
def test_loras_on_quantized_base_layers_are_merged_as_in_stock(cls, bits, combination_type):
    bitsandbytes = pytest.importorskip('bitsandbytes')
    base = qwen2(hidden=64)
    for layer in base.model.layers:
        weights = layer.mlp.up_proj.state_dict()
        layer.mlp.up_proj = (
            bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32)
            if bits == 4 else bitsandbytes.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False))
        layer.mlp.up_proj.load_state_dict(weights)
    setattr(base.to('cpu'), f'is_loaded_in_{bits}bit', True)
    model = (swift_model if cls is LoRAConfig else peft_model)(loras(cls=cls, target_modules=['up_proj']), base)
    assert {type(layer).__name__ for layer in layers(model).values()} == {{4: 'Linear4bit', 8: 'Linear8bitLt'}[bits]}
    add(model)
    options = PEFT_TYPES.get(combination_type, {})
    update(model, combination_type=combination_type, **options)
    if combination_type == 'average':
        add(model, SOURCES, WEIGHTS, 'average', name='oracle')
        assert_close_deltas(model, 'fused', model)
    else:
        assert_close_deltas(model, 'fused', fresh(model, SOURCES, WEIGHTS, combination_type, **options))
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd', 'ties', 'ties_svd'])
def test_bfloat16_is_summed_in_float32_and_stays_bfloat16(combination_type):
    model = swift_model(loras(), qwen2().bfloat16()).bfloat16()
    options = PEFT_TYPES[combination_type]
    add(model)
    update(model, combination_type=combination_type, **options)
    assert {layer.lora_A['fused'].weight.dtype for layer in layers(model).values()} == {torch.bfloat16}
    assert_close_deltas(model, 'fused', fresh(model, SOURCES, WEIGHTS, combination_type, **options), 2e-2)


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd', 'ties_svd'])
def test_float64_sees_the_weights_that_stock_sees(combination_type):
    model = swift_model(loras(), qwen2().double()).double()
    add(model)
    options = PEFT_TYPES[combination_type]
    update(model, SOURCES, [0.1, 0.2, 0.7], combination_type, **options)
    assert_close_deltas(model, 'fused', fresh(model, SOURCES, [0.1, 0.2, 0.7], combination_type, **options), 1e-12)


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


# `linear` copies the old A and B, and adds the second and third source to each; `cat` copies block by block.
@pytest.mark.parametrize('combination_type, operation, failing', [('linear', 'copy_', 1), ('linear', 'add_', 2),
                                                                  ('linear', 'add_', 4), ('cat', 'copy_', 1),
                                                                  ('cat', 'copy_', 5), ('cat', 'copy_', 8)])
def test_whatever_is_raised_while_writing_the_model_is_as_it_was(model, failing, operation, combination_type,
                                                                 monkeypatch):
    add(model)
    before = state(model), config(model, 'fused').to_dict()
    original, calls = getattr(torch.Tensor, operation), []

    def fail_once(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, operation, fail_once)
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

    monkeypatch.setitem(formulas._FORMULAS, 'cat', fail)
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(SOURCES, WEIGHTS, 'fused', 'cat')
    monkeypatch.undo()
    assert_same_state(state(model), before)
    add(model, combination_type='cat')
    assert_as_fresh(model, ['l3', 'l1'], [0.4, -0.7], 'cat')


@pytest.mark.parametrize('combination_type', ['dare_linear', 'dare_ties'])
def test_an_add_draws_the_random_numbers_of_stock(model, combination_type):
    with stock():
        oracle = copy.deepcopy(model)
        torch.manual_seed(5)
        oracle.add_weighted_adapter(SOURCES, WEIGHTS, 'oracle', combination_type, density=0.4)
    torch.manual_seed(5)
    model.add_weighted_adapter(SOURCES, WEIGHTS, 'fused', combination_type, density=0.4)
    assert_close_deltas(model, 'fused', oracle)


def test_svd_of_lora_factors_never_forms_a_dense_delta(model, monkeypatch):

    def refuse(*args):
        raise AssertionError('a dense delta was formed')

    monkeypatch.setattr(decomposed, '_dense_delta', refuse)
    add(model, combination_type='svd')
    update(model, combination_type='magnitude_prune_svd', density=1.0)
    update(model, combination_type='dare_linear_svd', density=1.0)
    update(model, combination_type='svd')
    assert_as_fresh(model, SOURCES, WEIGHTS, 'svd')


def test_a_hundred_updates_do_not_make_a_compiled_model_compile_again():
    model = swift_model(loras(count=3))
    add(model, ['l0', 'l1'], [0.5, 0.5], 'average')
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    outputs(compiled)
    frames = counter.frame_count
    for i in range(100):
        update(model, [f'l{i % 3}', f'l{(i + 1) % 3}'], [0.1 * i, 1.0], ['average', 'linear', 'svd'][i % 3])
        torch.testing.assert_close(outputs(compiled), outputs(model), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == frames > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs need a GPU, and none is at hand')
def test_a_hundred_updates_are_seen_by_a_captured_cuda_graph():
    model = swift_model(loras(count=3)).cuda()
    add(model, ['l0', 'l1'], [0.5, 0.5], 'average')
    ids = inputs().cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(ids).logits
        for i in range(100):
            update(model, [f'l{i % 3}', f'l{(i + 1) % 3}'], [0.1 * i, 1.0], ['average', 'linear', 'svd'][i % 3])
            graph.replay()
            torch.testing.assert_close(captured, model(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
@pytest.mark.parametrize('first', ['average', 'rslora', 'pattern'])
def test_a_refilled_adapter_is_a_source_like_a_new_one(build, first, combination_type):
    model = build(
        use_rslora=[first == 'rslora', False],
        rank_pattern=[{}, {
            'q_proj': 2
        } if first == 'pattern' else {}, {}, {
            'q_proj': 2
        } if first == 'pattern' else {}])
    add(model, ['l0', 'l2'], combination_type='average' if first == 'average' else 'linear', name='inner')
    update(model, ['l1', 'l3'], [0.7, 0.4], 'linear', name='inner')
    options = PEFT_TYPES[combination_type]
    others = ['l1'] if first == 'pattern' else ['l2']
    add(model)
    update(model, ['inner', *others], [0.5, 0.6], combination_type, **options)
    with stock():
        oracle = copy.deepcopy(model)
        oracle.add_weighted_adapter(['l1', 'l3'], [0.7, 0.4], 'new inner', 'linear')
        with reproducible_masks():
            oracle.add_weighted_adapter(['new inner', *others], [0.5, 0.6], 'oracle', combination_type, **options)
    # Factors that are kept in another scale round differently, and a decomposition passes it on.
    assert_close_deltas(model, 'fused', oracle, tolerance=1e-4 if combination_type.endswith('svd') else 1e-5)


def test_autocast_changes_neither_the_dtype_nor_the_values(model):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        add(model, combination_type='svd')
        update(model, combination_type='svd')
    assert_as_fresh(model, SOURCES, WEIGHTS, 'svd')


def test_a_bias_of_the_fused_adapter_is_zeroed():
    model = peft_model(loras(cls=LoraConfig, lora_bias=True, target_modules=['q_proj']))
    add(model)
    for layer in layers(model).values():
        torch.nn.init.ones_(layer.lora_B['fused'].bias)
    update(model)
    assert_as_fresh(model, SOURCES, WEIGHTS, 'linear')


@pytest.mark.parametrize('init', ['pissa', 'olora'])
def test_adding_never_changes_the_base_weights(init):
    model = peft_model(loras(cls=LoraConfig, init_lora_weights=init))
    before = [layer.get_base_layer().weight.clone() for layer in layers(model).values()]
    add(model)
    assert all(map(torch.equal, before, [layer.get_base_layer().weight for layer in layers(model).values()]))


def test_a_swift_add_that_cannot_be_activated_leaves_no_adapter(monkeypatch):
    model = swift_model(loras())
    before = state(model)
    monkeypatch.setattr(SwiftModel, 'set_active_adapters', None)
    with pytest.raises(TypeError):
        model.add_weighted_adapter(SOURCES, WEIGHTS, 'fused', 'linear')
    monkeypatch.undo()
    assert 'fused' not in model.adapters
    assert state(model).keys() == before.keys()


def test_adding_works_beside_tuners_that_are_not_lora():
    model = swift_model({**loras(2), 'noise': NEFTuneConfig()})
    add(model, ['l0', 'l1'], [0.5, 0.5])
    assert model.active_adapters == {'fused'}


def test_what_ms_swift_saves_of_a_fused_adapter_is_what_it_saves_of_stocks(tmp_path):
    model = swift_model(loras())
    add(model)
    with stock():
        oracle = swift_model(loras())
        oracle.add_weighted_adapter(['l3', 'l1'], [0.4, -0.7], 'fused', 'linear')
    saved = [each.state_dict(adapter_name='fused') for each in (model, oracle)]
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) == 28
    for key, value in saved[0].items():
        torch.testing.assert_close(value, saved[1][key])


def test_a_write_that_fails_into_an_offloaded_adapter_leaves_it_as_it_was(monkeypatch):
    model = swift_model(loras())
    add(model)
    before = deltas(model, 'fused')
    model.set_active_adapters('l3', offload='meta')
    add_, calls = torch.Tensor.add_, []

    def fail_once(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError
        return add_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'add_', fail_once)
    with pytest.raises(MemoryError):
        update(model)
    monkeypatch.undo()
    assert all(layer.lora_A['fused'].weight.is_meta for layer in layers(model).values())
    model.set_active_adapters('fused')
    assert deltas(model, 'fused').keys() == before.keys()
    assert all(torch.equal(delta, before[name]) for name, delta in deltas(model, 'fused').items())


def put_back(model, how, kept, folder):
    """Puts values of an earlier sample into the adapter `fused` by something else than a refill."""
    if how == 'load_adapter':
        model.load_adapter(str(folder / 'fused'), adapter_name='fused')
    elif how == 'set_peft_model_state_dict':
        set_peft_model_state_dict(model, get_peft_model_state_dict(kept, adapter_name='fused'), adapter_name='fused')
    elif how == 'load_state_dict':
        model.base_model.load_state_dict(
            {
                name: value
                for name, value in kept.base_model.state_dict().items() if '.fused.' in name
            }, strict=False)
    elif how == 'hotswap':
        hotswap_adapter(model, str(folder / 'fused'), adapter_name='fused')
    else:
        old = dict(kept.named_parameters())
        for name, parameter in model.named_parameters():
            if '.fused.' in name:
                if how == 'data':
                    parameter.data = old[name].data.clone()
                else:
                    parameter.data.copy_(old[name])


PUT_BACK = [('swift', how) for how in ('load_state_dict', 'data', 'data.copy_')]
PUT_BACK += [('peft', how) for how in ('load_state_dict', 'data', 'data.copy_', 'load_adapter',
                                       'set_peft_model_state_dict', 'hotswap')]


@pytest.mark.parametrize('build_by, how', PUT_BACK)
@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd'])
def test_a_fused_adapter_that_something_else_wrote_to_is_the_source_that_it_computes(
        build_by, how, combination_type, tmp_path):
    model = BUILDERS[build_by](target_modules=['q_proj', 'down_proj'])
    add(model, ['l0', 'l1', 'l2'], [1.0, 0.5, 0.7], 'cat')
    sample = outputs(model)
    kept = copy.deepcopy(model)
    if build_by == 'peft':
        model.save_pretrained(str(tmp_path), selected_adapters=['fused'])
    update(model, ['l0'], [1.0], 'cat')
    put_back(model, how, kept, tmp_path)
    torch.testing.assert_close(outputs(model), sample, rtol=1e-4, atol=1e-4)
    add(model, ['fused'], [1.0], combination_type, name='again')
    torch.testing.assert_close(outputs(model), sample, rtol=1e-4, atol=1e-4)
    if combination_type != 'linear':
        # With another one, which has less rank.
        with stock():
            oracle = copy.deepcopy(kept)
            oracle.add_weighted_adapter(['fused', 'l3'], [0.5, 0.4], 'oracle', combination_type)
        add(model, ['fused', 'l3'], [0.5, 0.4], combination_type, name='with another')
        assert_close_deltas(model, 'with another', oracle)
    # It goes on being a fused adapter.
    activate(model, 'fused')
    update(model, ['l1', 'l3'], [0.5, 0.4], 'linear')
    assert_as_fresh(model, ['l1', 'l3'], [0.5, 0.4], 'linear')
    add(model, ['fused', 'l0'], [0.5, 0.4], 'linear', name='last')
    with stock():
        oracle = copy.deepcopy(kept)
        oracle.add_weighted_adapter(['l1', 'l3'], [0.5, 0.4], 'inner', 'linear')
        oracle.add_weighted_adapter(['inner', 'l0'], [0.5, 0.4], 'oracle', 'linear')
    assert_close_deltas(model, 'last', oracle)


@pytest.mark.parametrize('how', ['data', 'data.copy_', 'load_state_dict'])
def test_layers_that_something_else_wrote_to_are_part_of_the_source(build, how, tmp_path):
    model = build(target_modules=['q_proj', 'down_proj'], layers_to_transform=[None, [0], None, None])
    add(model, ['l0', 'l2'], [1.0, 0.5], 'linear')
    kept, sample = copy.deepcopy(model), outputs(model)
    update(model, ['l1'], [1.0], 'linear')
    put_back(model, how, kept, tmp_path)
    torch.testing.assert_close(outputs(model), sample, rtol=1e-4, atol=1e-4)
    add(model, ['fused'], [1.0], 'linear', name='again')
    torch.testing.assert_close(outputs(model), sample, rtol=1e-4, atol=1e-4)


def everything(model):
    """All that an add that is refused may not change: what PEFT does besides LoRA layers, too."""
    names = list(model.adapters if isinstance(model, SwiftModel) else model.peft_config)
    wrappers = [(name, getattr(module, 'token_indices', None)
                 and dict(module.token_indices), list(getattr(module, 'modules_to_save', ())
                                                      or ()), type(module).__name__)
                for name, module in model.named_modules()]
    active = sorted(model.active_adapters)
    return names, list(model.state_dict()), wrappers, active, [config(model, name).to_dict() for name in names]


def refused(model, sources, error=ValueError, match=None, weight=3e38):
    """Adds an adapter in vain, by `add_weighted_adapter` and by a composer; the model is as it was, bit for bit."""
    before, values, results = everything(model), state(model), outputs(model)
    for step in (lambda: model.add_weighted_adapter(sources, [weight] * len(sources), 'fused', 'svd'),
                 lambda: FusionComposer(model, combination_type='svd').compose(sources, [weight] * len(sources))):
        with pytest.raises(error, match=match):
            step()
        assert everything(model) == before
        assert_same_state(state(model), values)
        assert torch.equal(outputs(model), results)


def test_an_add_that_is_refused_leaves_no_trace_in_trainable_tokens(tmp_path):
    changes = {'r': 4, 'target_modules': ['q_proj']}
    model = peft_model({
        'first': LoraConfig(**changes, trainable_token_indices=[1, 5]),
        'second': LoraConfig(**changes, trainable_token_indices=[2, 5]),
        'plain': LoraConfig(**changes)
    })
    refused(model, ['first', 'second'])
    refused(model, ['first', 'plain'])
    with stock():
        oracle = copy.deepcopy(model)
        oracle.add_weighted_adapter(['second'], [1.0], 'fused', 'linear')
    add(model, ['second'], [1.0])
    activate(oracle, 'fused')
    # The token indices are those of `second`, and nothing of `first`.
    assert [values for values in everything(model)[2]
            if values[1]] == [values for values in everything(oracle)[2] if values[1]]
    torch.testing.assert_close(outputs(model), outputs(oracle))
    model.save_pretrained(str(tmp_path), selected_adapters=['fused'])
    loaded = PeftModel.from_pretrained(qwen2(), str(tmp_path / 'fused')).eval()
    torch.testing.assert_close(outputs(loaded), outputs(oracle))


def test_adapters_that_replicate_layers_are_refused_by_name_before_anything_is_replicated():
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64)).eval()
    replicated = LoraConfig(r=4, target_modules=['q_proj'], layer_replication=[[0, 1], [0, 2]])
    model = peft_model({'first': replicated, 'second': LoraConfig(r=4, target_modules=['q_proj'])}, base)
    refused(model, ['first', 'second'], match='layer_replication', weight=0.5)
    add(model, ['second'], [0.5], name='other')
    before, values = everything(model), state(model)
    with pytest.raises(ValueError, match='layer_replication'):
        update(model, ['first', 'second'], [0.5, 0.5], 'cat', name='other')
    assert everything(model) == before
    assert_same_state(state(model), values)


def test_a_layer_that_no_source_has_is_refused_as_in_stock(build):
    # Of the first one's layers and both ones' target modules, v_proj is one that nobody had.
    model = build(count=2, target_modules=['q_proj'], layers_to_transform=[None, [1]])
    config(model, 'l1').target_modules = {'q_proj', 'v_proj'}
    with pytest.raises(ValueError):
        fresh(model, ['l0', 'l1'], [0.5, 0.5], 'svd')
    refused(model, ['l0', 'l1'], weight=0.5)


def test_an_add_that_is_refused_leaves_no_layer_wrapped(build):
    """PEFT wraps v_proj of layer 0 for the new adapter alone, before it finds that there is nothing to merge."""
    cls = LoRAConfig if isinstance(build(count=1), SwiftModel) else LoraConfig
    model = (swift_model if cls is LoRAConfig else peft_model)({
        'first':
        cls(r=4, target_modules=['q_proj'], lora_dropout=0.0),
        'second':
        cls(r=4, target_modules=['v_proj'], lora_dropout=0.0, layers_to_transform=[1])
    })
    activate(model, 'first')
    refused(model, ['first', 'second'])
    refused(model, ['first', 'second'], weight=0.5)


def test_an_add_that_is_refused_leaves_no_module_to_save():
    # In a SwiftModel, stock cannot activate adapters of which only some have one.
    model = peft_model(loras(4, LoraConfig, modules_to_save=[['lm_head'], None, None, None]))
    refused(model, ['l0', 'l1'])
    refused(model, ['l1', 'l0'])
