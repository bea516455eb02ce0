"""Each row of a batch is computed as the same sample alone; where rows cannot be told, nothing is computed."""
import copy
import pytest
import torch
from contextlib import nullcontext
from models import (PEFT_TYPES, PROJECTIONS, AllKinds, assert_same_state, fresh, layers, llava, loras, outputs,
                    peft_model, state, swift_model, update)
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from swift.tuners import LoRAConfig, SwiftModel
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from unittest import mock

from swift_patch import FusionComposer, RowsError
from swift_patch.model import rows as rows_module

# Of one and of several sources, in any order, with weights of any sign; with a row of the base model.
SAMPLES = [
    {
        'l0': 0.5,
        'l1': 0.5
    },
    ['l2'],
    (['l1', 'l3'], [0.2, -0.8]),
    ('l3', 'l0', 'l2'),
    None,
]
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
WAYS = {
    **{
        method: {
            'merge_method': method
        }
        for method in ('fusion', 'mixture', 'selection')
    },
    **{
        name: {
            'combination_type': name,
            **options
        }
        for name, options in PEFT_TYPES.items()
    },
}


@pytest.fixture(params=[False, True], ids=['rank of the adapter', 'rank of the batch'])
def rank_by_batch(request):
    return request.param


def wrapped(kind, model, targets):
    cls, wrap = (LoRAConfig, swift_model) if kind == 'swift' else (LoraConfig, peft_model)
    return wrap(loras(cls=cls, target_modules=targets), model)


def ids(count=len(SAMPLES), length=7):
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(3))


def logits(model, x, **kwargs):
    with torch.no_grad():
        found = model(x, **kwargs)
    return getattr(found, 'logits', found)


def compose(composer, sample, seed=None):
    """Composes one sample; None, which `compose` does not take, as a batch."""
    composer.compose_batch([sample], None if seed is None else [seed])


def alone(composer, model, x, samples=SAMPLES, seeds=None, run=logits):
    """What the model computes for each row where its sample is all that is composed."""
    found = []
    for number, sample in enumerate(samples):
        compose(composer, sample, seeds and seeds[number])
        found.append(run(model, x[number:number + 1]))
    return torch.cat(found)


def assert_rows(composer, model, x, samples=SAMPLES, run=logits, tolerance=1e-4, one=None):
    """Asserts that `composer` computes each row as `one`, by default itself, computes its sample alone."""
    seeds = list(range(len(samples)))
    expected = alone(one or composer, model, x, samples, seeds, run)
    composer.compose_batch(samples, seeds)
    torch.testing.assert_close(run(model, x), expected, rtol=tolerance, atol=tolerance)
    differing = [not torch.equal(expected[0], other) for other in expected[1:]]
    assert all(differing), 'or the test would see nothing'


@pytest.mark.parametrize('way', WAYS.values(), ids=list(WAYS))
def test_each_row_is_as_the_same_sample_alone(model, way, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch, **way)
    assert_rows(composer, model, ids(), one=FusionComposer(model, **way))


@pytest.mark.parametrize('way', ['mixture', 'selection', 'svd', 'ties_svd'])
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_ranks_scalings_and_layers_of_the_sources_may_differ(kind, way, rank_by_batch):
    cls, wrap = (LoRAConfig, swift_model) if kind == 'swift' else (LoraConfig, peft_model)
    configs = loras(cls=cls, r=[4, 2, 3, 1], lora_alpha=[8, 3, 6, 4])
    targets = [PROJECTIONS, ['q_proj', 'v_proj'], ['down_proj'], PROJECTIONS[2:]]
    for config, names in zip(configs.values(), targets):
        config.target_modules = set(names)
    model = wrap(configs)
    composer = FusionComposer(model, rank_by_batch=rank_by_batch, **WAYS[way])
    assert_rows(composer, model, ids(), one=FusionComposer(model, **WAYS[way]))


@pytest.mark.parametrize('way', ['fusion', 'mixture', 'selection'])
def test_layers_may_have_ranks_of_their_own(build, way, rank_by_batch):
    model = build(rank_pattern={'q_proj': 2, 'down_proj': 6})
    composer = FusionComposer(model, rank_by_batch=rank_by_batch, **WAYS[way])
    assert_rows(composer, model, ids(), one=FusionComposer(model, **WAYS[way]))


@pytest.mark.parametrize('rslora', [[False], [True], [True, False]])
def test_scalings_that_differ_between_rows_and_layers_are_kept(build, rslora):
    model = build(lora_alpha=[8, 2, 5, 1], use_rslora=rslora, alpha_pattern={'q_proj': 3})
    for way in ('fusion', 'mixture', 'selection', 'linear'):
        assert_rows(FusionComposer(model, adapter_name=f'fused_{way}', **WAYS[way]), model, ids())


@pytest.mark.parametrize('way', ['fusion', 'mixture', 'linear'])
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_embeddings_and_convolutions_have_rows_too(way, kind, rank_by_batch):
    targets = ['embedding', 'linear', 'fan', 'conv2', 'point', 'grouped']
    if kind == 'peft':
        targets += ['conv1', 'conv3']
    model = wrapped(kind, AllKinds(), targets)
    x = torch.randint(0, 11, (len(SAMPLES), 5), generator=torch.Generator().manual_seed(3))
    composer = FusionComposer(model, rank_by_batch=rank_by_batch, **WAYS[way])
    assert_rows(composer, model, x, one=FusionComposer(model, **WAYS[way]))


def test_equal_samples_serve_any_number_of_rows(model, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    expected = alone(composer, model, ids(3), [['l0', 'l1']] * 3)
    composer.compose_batch([['l0', 'l1']] * 2)
    torch.testing.assert_close(logits(model, ids(3)), expected)


def test_the_base_model_alone_is_a_row_like_any_other(model, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    with (model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()):
        if isinstance(model, SwiftModel):
            model.set_active_adapters([])
        expected = logits(model, ids(2))
    composer.compose_batch([None, None])
    assert torch.equal(logits(model, ids(2)), expected)
    # In a row that held another one before.
    composer.compose_batch([['l0'], ['l1']])
    composer.compose_batch([['l0'], None])
    assert torch.equal(logits(model, ids(2))[1], expected[1])


@pytest.mark.parametrize('options', [{'num_beams': 3}, {'num_beams': 3, 'num_return_sequences': 2}])
def test_rows_repeat_in_beams_and_sequences(model, options):

    def run(model, x):
        return model.generate(input_ids=x, generation_config=GREEDY, **options)

    composer = FusionComposer(model)
    expected = alone(composer, model, ids(), run=run)
    composer.compose_batch(SAMPLES)
    assert torch.equal(run(model, ids()), expected)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_prompts_may_be_padded_on_either_side(model, side):
    x, composer = ids(), FusionComposer(model)
    lengths = [7, 3, 5, 4, 6]
    expected = []
    for row, sample, length in zip(x, SAMPLES, lengths):
        compose(composer, sample)
        expected.append(logits(model, row[None, :length])[0, -1])
    padded, mask = torch.zeros_like(x), torch.zeros_like(x)
    for number, length in enumerate(lengths):
        place = slice(7 - length, None) if side == 'left' else slice(length)
        padded[number, place], mask[number, place] = x[number, :length], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    composer.compose_batch(SAMPLES)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)
    last = [-1 if side == 'left' else length - 1 for length in lengths]
    found = torch.stack([row[place] for row, place in zip(found, last)])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('beams', [1, 2])
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_an_encoder_and_a_decoder_have_rows(kind, beams):
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=2, vocab_size=64,
                 decoder_start_token_id=0)).eval()
    model = wrapped(kind, t5, ['q', 'v', 'wo'])

    def run(model, x):
        return model.generate(input_ids=x, generation_config=GREEDY, num_beams=beams)

    composer = FusionComposer(model)
    expected = alone(composer, model, ids(), run=run)
    composer.compose_batch(SAMPLES)
    assert torch.equal(run(model, ids()), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_rows_have_the_dtype_of_the_adapters(build, dtype):
    model = build().to(dtype)
    assert_rows(FusionComposer(model), model, ids(), tolerance=1e-9 if dtype == torch.float64 else 0.05)


def test_adapters_may_have_another_dtype_than_the_model(build):
    model = build()
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if 'lora_' in name:
            parameter.data = parameter.data.float()
    assert_rows(FusionComposer(model), model, ids(), tolerance=0.05)


def test_rows_work_under_autocast(model):

    def run(model, x):
        with torch.autocast('cpu', torch.bfloat16):
            return logits(model, x)

    assert_rows(FusionComposer(model), model, ids(), run=run, tolerance=0.05)


def test_a_compiled_model_is_not_compiled_again_for_other_rows(model):
    frames = []

    def backend(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    composer, x = FusionComposer(model), ids(3)
    composer.reserve(max_sources=3, max_rows=3)
    compiled = torch.compile(model, backend=backend)
    batches = [SAMPLES[:3], SAMPLES[1:4], [SAMPLES[3], SAMPLES[0], SAMPLES[1]]]
    expected = [alone(composer, model, x, samples) for samples in batches]
    composer.compose_batch(batches[0])
    logits(compiled, x)
    count = len(frames)
    for samples, rows in zip(batches, expected):
        composer.compose_batch(samples)
        torch.testing.assert_close(logits(compiled, x), rows, rtol=1e-4, atol=1e-4)
    assert count and len(frames) == count


# In place, and only as long as they are wanted.


def variant(model, name='fused'):
    return next(iter(layers(model).values())).lora_variant.get(name)


def addresses(model):
    return [(layer.lora_variant['fused'].A.data_ptr(), layer.lora_variant['fused'].B.data_ptr())
            for layer in layers(model).values()]


def test_rows_stay_where_they_are_and_fewer_are_read_where_fewer_are_composed(model, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    composer.reserve(max_sources=3, max_rows=5)
    composer.compose_batch(SAMPLES)
    before = addresses(model)
    for count in (2, 3, 5):
        composer.compose_batch(SAMPLES[:count])
        assert addresses(model) == before
        assert len(variant(model).A) == len(variant(model).B) == count
    composer.compose(['l0'])
    composer.compose_batch(SAMPLES)
    assert addresses(model) == before


def test_all_rows_are_one_piece_of_memory_as_large_as_that_many_fused_adapters(model):
    composer = FusionComposer(model)
    composer.compose_batch(SAMPLES)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in layers(model).values()
        for tensor in (layer.lora_variant['fused'].A, layer.lora_variant['fused'].B)
    }
    fused = sum(parameter.nbytes for name, parameter in model.named_parameters() if '.fused' in name)
    assert list(storages.values()) == [len(SAMPLES) * fused]


@pytest.mark.parametrize('how', ['compose', 'update'])
def test_one_sample_ends_the_rows(model, how):
    composer = FusionComposer(model, combination_type='linear')
    composer.compose(['l0', 'l1'])
    expected = outputs(model)
    composer.compose_batch(SAMPLES)
    if how == 'compose':
        composer.compose(['l0', 'l1'])
    else:
        update(model, ['l0', 'l1'], [0.5, 0.5])
    torch.testing.assert_close(outputs(model), expected)
    assert variant(model) is None


def test_rows_are_no_part_of_a_checkpoint(model, tmp_path):
    composer = FusionComposer(model)
    composer.compose(['l0', 'l1'])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    composer.compose_batch(SAMPLES)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.save_pretrained(str(tmp_path))
    with pytest.raises(RowsError, match='pickled.*compose one sample first'):
        torch.save(layers(model), tmp_path / 'model.pt')


def test_a_copied_model_has_rows_of_its_own(model, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    composer.compose_batch(SAMPLES)
    expected = logits(model, ids())
    copied = copy.deepcopy(model)
    composer.compose_batch(SAMPLES[::-1])
    torch.testing.assert_close(logits(copied, ids()), expected)
    assert_rows(FusionComposer(copied), copied, ids())
    torch.testing.assert_close(logits(model, ids().flip(0)), expected.flip(0), rtol=1e-4, atol=1e-4)


def test_a_model_that_is_cast_takes_its_rows_along(model, rank_by_batch):
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    composer.compose_batch(SAMPLES)
    expected = logits(model, ids())
    model.to(torch.float64)
    torch.testing.assert_close(logits(model, ids()).float(), expected, rtol=1e-4, atol=1e-4)
    assert_rows(composer, model, ids(), tolerance=1e-9)


def test_an_adapter_that_was_deleted_leaves_no_rows_to_the_next_of_its_name():
    model = peft_model(loras(cls=LoraConfig))
    composer = FusionComposer(model)
    composer.compose_batch(SAMPLES)
    model.delete_adapter('fused')
    expected = alone(FusionComposer(model, adapter_name='other'), model, ids(1), [['l0', 'l1']])
    composer.compose(['l0', 'l1'])
    torch.testing.assert_close(logits(model, ids(1)), expected)


def test_an_adapter_that_grows_loses_its_rows_and_says_so(build):
    model = build(r=[2, 2, 4, 4])
    composer = FusionComposer(model, 'mixture')
    composer.compose_batch([['l0'], ['l1']])
    composer.reserve()
    with pytest.raises(RowsError, match='lost when it grew.*Compose again'):
        outputs(model)
    composer.compose_batch([['l0'], ['l1']])
    outputs(model)


# In the rank of their batch.


def methods_of(composer):
    """A sample of each merge method, of the ranks 4, 16, 4, none and 8."""
    return [
        composer.composition({
            'l0': 0.6,
            'l1': -0.4
        }),
        composer.composition(['l0', 'l1', 'l2', 'l3'], [0.5, 0.2, -0.7, 0.3], 'mixture'),
        composer.composition(['l1', 'l3'], [0.3, 0.7], 'selection'),
        None,
        composer.composition(['l2', 'l3'], merge_method='mixture'),
    ]


def methods_by_stock(model, x):
    """What stock computes for each row of `methods_of`, on copies of a model that nothing was composed in."""
    weighted = [
        # Of parameters that are averaged: `linear` takes the roots.
        (['l0', 'l1'], [0.36, 0.16], 'linear'),
        (['l0', 'l1', 'l2', 'l3'], [0.5, 0.2, -0.7, 0.3], 'cat'),
        (['l3'], [1.0], 'linear'),
        (['l0'], [0.0], 'linear'),
        (['l2', 'l3'], [0.5, 0.5], 'cat'),
    ]
    found = []
    for number, way in enumerate(weighted):
        oracle = fresh(model, *way)
        if number == 0:
            for layer in layers(oracle).values():
                for of_side in (layer.lora_A, layer.lora_B):
                    of_side['oracle'].weight.data = 0.6 * of_side['l0'].weight.data - 0.4 * of_side['l1'].weight.data
                layer.scaling['oracle'] = layer.scaling['l0']
        found.append(logits(oracle, x[number:number + 1]))
    return torch.cat(found)


def of_fused(model):
    """What the fused adapter's parameters are, and hold."""
    return {name: value for name, value in state(model).items() if '.fused' in name}


def ranks(model):
    found = {(variant.A.shape[1], variant.B.shape[2])
             for variant in (layer.lora_variant['fused'] for layer in layers(model).values())}
    assert len(found) == 1
    return next(iter(found))


def storages(model):
    return {
        value.untyped_storage().data_ptr()
        for layer in layers(model).values()
        for value in (layer.lora_variant['fused'].A, layer.lora_variant['fused'].B)
    }


def test_each_row_may_have_a_merge_method_of_its_own(model, rank_by_batch):
    expected = methods_by_stock(model, ids())
    composer = FusionComposer(model, rank_by_batch=rank_by_batch)
    samples = methods_of(composer)
    # In any order: what was there before is not seen.
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 2], [1], [3], [2, 0], [1, 4, 0]):
        composer.compose_batch([samples[i] for i in order])
        torch.testing.assert_close(logits(model, ids()[order]), expected[order], rtol=1e-4, atol=1e-4)
    assert_rows(composer, model, ids(), samples)


def test_rows_have_the_rank_of_their_batch_and_the_fused_adapter_stays_as_it_is(model, caplog):
    composer = FusionComposer(model, rank_by_batch=True)
    fusion, mixture, selection, base, smaller = methods_of(composer)
    composer.compose_batch([fusion, selection])
    before = of_fused(model)
    assert ranks(model) == (4, 4)
    for samples, rank in (([fusion, mixture, base], 16), ([selection, fusion], 4), ([mixture], 16), ([fusion], 4),
                          ([smaller, base, selection], 8), ([base], 1), ([fusion, base], 4)):
        composer.compose_batch(samples)
        assert ranks(model) == (rank, rank)
        assert len(variant(model).A) == len(samples)
        assert_same_state(of_fused(model), before)
    assert not caplog.records


def test_a_batch_that_shares_one_composition_leaves_the_values_of_the_fused_adapter_too(model):
    composer = FusionComposer(model, rank_by_batch=True)
    composer.compose(['l0', 'l1'])
    before = of_fused(model)
    composer.compose_batch([['l2', 'l3']] * 3)
    assert_same_state(of_fused(model), before)
    # One sample that is no batch is still filled into it.
    composer.compose(['l2', 'l3'])
    assert variant(model) is None
    expected = outputs(model)
    composer.compose_batch([['l2', 'l3']] * 3)
    torch.testing.assert_close(outputs(model), expected)


def test_the_fused_adapter_gets_the_layers_of_a_batch_and_not_its_rank():
    model = swift_model({**loras(2, target_modules=['q_proj']), 'wide': loras(1, r=9)['l0']})
    composer = FusionComposer(model, rank_by_batch=True)
    composer.compose(['l0', 'l1'])
    composer.compose_batch([['l0'], ['wide']])
    assert {layer.r['fused'] for layer in layers(model).values()} == {4}
    assert ranks(model) == (9, 9)
    assert_rows(composer, model, ids(2), [['wide'], ['l1']], one=FusionComposer(model))


def test_rows_have_a_rank_that_the_groups_of_a_convolution_part():
    configs = loras(1, LoraConfig, target_modules=['linear', 'fan', 'grouped'])
    model = peft_model({**configs, 'odd': LoraConfig(r=3, target_modules=['linear', 'fan'])}, AllKinds())
    composer = FusionComposer(model, rank_by_batch=True)
    composer.compose(['l0'])
    x = torch.arange(10).reshape(2, 5)
    assert_rows(composer, model, x, [['odd'], None], one=FusionComposer(model))
    assert {len(layer.lora_variant['fused'].A[0]) for layer in layers(model).values() if layer.r.get('fused')} == {4}
    assert_rows(composer, model, x, [composer.composition(['odd', 'l0'], merge_method='mixture'), ['l0']])


def test_rows_of_any_rank_are_in_the_memory_that_was_reserved(model):
    composer = FusionComposer(model, rank_by_batch=True)
    composer.reserve(max_sources=2, max_rows=5)
    fusion, mixture, selection, base, smaller = methods_of(composer)
    composer.compose_batch([fusion, selection, base, base, fusion])
    before = storages(model)
    assert len(before) == 1
    for samples in ([mixture], [smaller, fusion], [base], [fusion] * 4 + [selection], [mixture]):
        composer.compose_batch(samples)
        assert storages(model) == before
    # Larger once, and for all that comes.
    composer.compose_batch([mixture, fusion])
    before = storages(model)
    for samples in ([smaller, base, fusion], [selection, fusion], [fusion, mixture]):
        composer.compose_batch(samples)
        assert storages(model) == before


def test_one_row_is_reserved_too(model):
    composer = FusionComposer(model, 'mixture', rank_by_batch=True)
    composer.reserve(max_sources=2, max_rows=1)
    with mock.patch.object(rows_module, 'Rows', side_effect=MemoryError):
        composer.compose_batch([['l0', 'l1']])
        with pytest.raises(MemoryError):
            composer.compose_batch([['l0', 'l1'], None])


def test_without_it_any_batch_is_in_the_same_tensors_of_the_same_shape(model):
    composer = FusionComposer(model)
    composer.compose_batch(methods_of(composer))
    before, places = of_fused(model), addresses(model)
    fusion, _, selection, base, smaller = methods_of(composer)
    for samples in ([fusion, selection, base, base, fusion], [fusion, smaller], [base, smaller, selection]):
        composer.compose_batch(samples)
        assert ranks(model) == (16, 16)
        assert addresses(model) == places
        assert_same_state(of_fused(model), before)


def test_what_all_rows_share_is_filled_into_the_fused_adapter_where_layers_cannot_have_rows(model):
    expected = methods_by_stock(model, ids())
    composer = FusionComposer(model, rank_by_batch=True)
    fusion, mixture, *_ = methods_of(composer)
    composer.compose_batch([fusion])
    with mock.patch.object(rows_module, 'reads_variants', lambda layer_class: False):
        for sample, row in ((mixture, 1), (fusion, 0)):
            composer.compose_batch([sample] * 3)
            assert variant(model) is None
            torch.testing.assert_close(logits(model, ids()[[row]]), expected[[row]], rtol=1e-4, atol=1e-4)
        before = state(model)
        for samples in ([fusion, mixture], [None]):
            with pytest.raises(RowsError, match='found a Linear'):
                composer.compose_batch(samples)
            assert_same_state(state(model), before)
        # The first one, too.
        first = FusionComposer(model, adapter_name='first', rank_by_batch=True)
        first.compose_batch([mixture])
        torch.testing.assert_close(logits(model, ids()[[1]]), expected[[1]], rtol=1e-4, atol=1e-4)


def test_layers_that_cannot_have_rows_are_still_those_that_the_fused_adapter_grows_by():
    model = swift_model({**loras(2, target_modules=['q_proj']), 'wide': loras(1, r=9)['l0']})
    composer = FusionComposer(model, 'mixture', rank_by_batch=True)
    composer.compose(['l0'])
    expected = outputs(fresh(model, ['wide', 'l1'], [0.5, 0.5], 'cat'))
    with mock.patch.object(rows_module, 'reads_variants', lambda layer_class: False):
        composer.compose_batch([['wide', 'l1']])
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_composition_draws_as_the_same_sample_alone(model):
    way = {'combination_type': 'dare_linear', 'density': 0.5}
    composer = FusionComposer(model, rank_by_batch=True, **way)
    sample, seeds = ['l0', 'l1'], [7]
    FusionComposer(model, **way).compose_batch([sample], seeds)
    expected = outputs(model)
    composer.compose_batch([sample], seeds)
    torch.testing.assert_close(outputs(model), expected)


# What cannot be told is refused.


def test_a_batch_of_another_size_is_refused_by_name(model):
    FusionComposer(model).compose_batch(SAMPLES)
    for count in (1, 3, 4, 7):
        with pytest.raises(
                RowsError, match=r"Layer '[\w.]*q_proj' is expected to get the 5 rows .*shape \(\d, 7, 32\)"):
            logits(model, ids(count))


class Experts(nn.Module):
    """A mixture of experts: an expert gets the tokens that were sent to it, of all rows in one heap."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        hidden = self.embedding(x).flatten(0, 1)
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (x.flatten() % 2 == number).nonzero()[:, 0]
            result[chosen] = expert(hidden[chosen])
        return result.unflatten(0, x.shape)


@pytest.mark.parametrize('x', [torch.arange(10).reshape(2, 5), torch.arange(12).reshape(2, 6)], ids=['odd', 'even'])
def test_layers_that_get_the_tokens_of_all_rows_in_one_heap_are_refused(x):
    model = peft_model(loras(cls=LoraConfig, target_modules=['0', '1']), Experts())
    composer = FusionComposer(model)
    composer.compose_batch(SAMPLES[:2])
    with pytest.raises(RowsError, match='experts.0.*tokens of all rows in one heap.*one by one'):
        logits(model, x)
    # A single sample is that of all tokens.
    composer.compose(SAMPLES[0])
    logits(model, x)


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_towers_for_something_else_than_text_are_refused_and_texts_alone_are_not(kind):
    model = wrapped(kind, llava(), ['q_proj', 'v_proj'])
    composer = FusionComposer(model)
    assert_rows(composer, model, ids())
    # Both images are in the first row: as many as there are rows, and not one for each.
    x = ids(2, 12)
    x[0, 1:9] = 63
    composer.compose_batch(SAMPLES[:2])
    with pytest.raises(RowsError, match="Layer '[\\w.]*vision_tower[\\w.]*' .*found another modality"):
        model(input_ids=x, pixel_values=torch.ones(2, 3, 8, 8))


def test_training_mode_is_refused(model):
    FusionComposer(model).compose_batch(SAMPLES)
    model.train()
    with pytest.raises(RowsError, match='evaluation mode.*found training mode'):
        logits(model, ids())
    model.eval()
    logits(model, ids())


def test_names_of_adapters_for_each_row_are_refused_beside_rows():
    model = peft_model(loras(cls=LoraConfig))
    FusionComposer(model).compose_batch(SAMPLES[:2])
    with pytest.raises(RowsError, match='adapter_names'):
        logits(model, ids(4), adapter_names=['fused', 'l0', 'fused', '__base__'])


def test_layers_of_another_kind_are_refused_before_anything_changes(model):
    composer = FusionComposer(model)
    composer.compose(['l0'])
    before = state(model)
    with mock.patch.object(rows_module, 'reads_variants', lambda layer_class: False):
        with pytest.raises(RowsError, match=r"Layer '[\w.]*q_proj' .* found a Linear"):
            composer.compose_batch(SAMPLES)
    assert_same_state(state(model), before)
    assert variant(model) is None


def test_a_layer_class_that_asks_for_no_variant_is_told():

    class Other(nn.Module, LoraLayer):

        def forward(self, x):
            return self.base_layer(x) + self.lora_B['a'](self.lora_A['a'](x))

    assert not rows_module.reads_variants(Other)
    for layer in layers(peft_model(loras(cls=LoraConfig))).values():
        assert rows_module.reads_variants(type(layer))


def test_models_that_put_the_sequence_first_and_embeddings_alone_are_refused(model):
    composer = FusionComposer(model)
    with mock.patch.object(type(model.config), 'model_type', 'chatglm'):
        with pytest.raises(RowsError, match="found 'chatglm', which puts the sequence there"):
            composer.compose_batch(SAMPLES)
    model = wrapped('peft', AllKinds(), ['embedding'])
    with pytest.raises(RowsError, match='found embeddings alone'):
        FusionComposer(model).compose_batch(SAMPLES)


def test_rows_of_an_adapter_with_a_magnitude_are_refused():
    model = peft_model(loras(cls=LoraConfig, use_dora=True))
    composer = FusionComposer(model)
    composer.compose(['l0'])
    with pytest.raises(RowsError, match='plain LoRA.*found a Dora'):
        composer.compose_batch(SAMPLES)
    composer.compose(['l1'])


def test_rows_are_neither_a_source_nor_merged_into_the_base_weights(model):
    FusionComposer(model).compose_batch(SAMPLES)
    with pytest.raises(ValueError, match="'fused' is expected to be one adapter.*compose one sample first"):
        model.add_weighted_adapter(['l0', 'fused'], [0.5, 0.5], 'another', 'linear')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RowsError, match='expected to be one fusion to be merged'):
        next(iter(layers(model).values())).merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# All or nothing.


@pytest.mark.parametrize('wrong', [['nobody'], {'l0': float('nan')}, (['l0', 'l1'], [1.0]), 3, [], 'l0'])
@pytest.mark.parametrize('first', [['l0'], None], ids=['after one sample', 'after a batch'])
def test_a_wrong_sample_is_told_by_its_number_and_nothing_changes(model, wrong, first):
    composer = FusionComposer(model)
    if first is None:
        composer.compose_batch(SAMPLES)
    else:
        composer.compose(first)
    x = ids()
    before, expected = state(model), logits(model, x)
    with pytest.raises((ValueError, TypeError), match='Sample 1: '):
        composer.compose_batch([['l0'], wrong])
    assert_same_state(state(model), before)
    assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize('samples', [[], {'l0': 1.0}, 3, None])
def test_what_is_no_batch_is_refused(model, samples):
    with pytest.raises((ValueError, TypeError), match='samples is expected'):
        FusionComposer(model).compose_batch(samples)


@pytest.mark.parametrize('seeds', [[1], [1, 2, 3], [1, 0.5], [1, -1], [1, 2**63], 7])
def test_wrong_seeds_are_refused_and_the_rows_stay(model, seeds):
    composer = FusionComposer(model, combination_type='dare_linear', density=0.5)
    composer.compose_batch(SAMPLES[:2])
    expected = logits(model, ids(2))
    with pytest.raises((TypeError, ValueError), match='seeds is expected to'):
        composer.compose_batch(SAMPLES[1:3], seeds)
    assert torch.equal(logits(model, ids(2)), expected)


@pytest.mark.parametrize('after', ['nothing', 'one sample', 'a batch'])
def test_an_error_in_the_middle_leaves_one_sample_as_it_was_and_no_half_written_rows(model, after, rank_by_batch):
    composer = FusionComposer(model, 'mixture', rank_by_batch=rank_by_batch)
    composer.reserve(max_sources=3)
    if after == 'one sample':
        composer.compose(['l0', 'l1'])
    elif after == 'a batch':
        composer.compose_batch(SAMPLES[::-1])
    before = state(model)
    merge, calls = rows_module.Rows.row, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError('no memory')
        return merge(*args)

    with mock.patch.object(rows_module.Rows, 'row', failing), pytest.raises(RuntimeError, match='no memory'):
        composer.compose_batch(SAMPLES)
    assert_same_state(state(model), before)
    if after == 'a batch':
        with pytest.raises(RowsError, match='half written. Compose again'):
            logits(model, ids())
    else:
        assert variant(model) is None
    assert_rows(composer, model, ids())


def test_rows_whose_activation_fails_are_not_read(model):
    composer = FusionComposer(model)
    composer.compose_batch(SAMPLES[::-1])
    with mock.patch.object(FusionComposer, '_activate', side_effect=RuntimeError('no')), pytest.raises(RuntimeError):
        composer.compose_batch(SAMPLES)
    with pytest.raises(RowsError, match='Compose again'):
        logits(model, ids())
    assert_rows(composer, model, ids())


def test_nothing_else_is_composed_within_a_block(model):
    composer = FusionComposer(model)
    with composer.fused_batch(SAMPLES):
        with composer.fused_batch(SAMPLES):
            pass
        with pytest.raises(RuntimeError, match='expected to keep 5 rows'):
            composer.compose(['l0'])
        with pytest.raises(RuntimeError, match='expected to keep 5 rows'):
            composer.compose_batch(SAMPLES[:3])
    composer.compose(['l0'])
