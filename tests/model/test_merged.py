"""What is merged elsewhere is what stock's new adapter holds, also where the model has no values."""
import pytest
import torch
from models import (PEFT_TYPES, SOURCES, WEIGHTS, assert_same_state, deltas, fresh, loras, peft_model, qwen2,
                    reproducible_masks, state, swift_model)
from peft import LoraConfig, PeftModel
from swift.tuners import LoRAConfig

from swift_patch import AdapterLibrary, FusionComposer

TARGETS = [['q_proj', 'v_proj'], ['down_proj', 'q_proj'], ['q_proj', 'k_proj', 'v_proj', 'o_proj']]


def loaded(kind, **changes):
    cls, wrap = (LoRAConfig, swift_model) if kind == 'swift' else (LoraConfig, peft_model)
    return wrap(loras(cls=cls, **changes))


def library_of(model, folder):
    model.save_pretrained(str(folder))
    return AdapterLibrary.from_folder(folder)


def skeleton():
    return qwen2().to('meta')


def deltas_of(found):
    """By layer, of what `merged` returned, in both ways to look at it."""
    layout = found.layout
    assert all(
        torch.equal(one, other) for place, pair in enumerate(found.every())
        for one, other in zip(pair, found.factors(place)))
    return {
        name: B.double() @ A.double() * scaling
        for name, (A, B), scaling in zip(layout.names, found.every(), found.scalings)
    }


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).norm() < 1e-5 * delta.norm(), name


def of_oracle(model, adapter):
    """By layer of the base model, whatever wraps it."""
    return deltas(model.get_base_model() if isinstance(model, PeftModel) else model.base_model, adapter)


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_every_combination_type_is_stocks(kind, combination_type, tmp_path):
    options, other = PEFT_TYPES[combination_type], loaded(kind)
    composer = FusionComposer(
        skeleton(), library=library_of(other, tmp_path), combination_type=combination_type, **options)
    with reproducible_masks():
        found = composer.merged(composer.composition(SOURCES, WEIGHTS))
    oracle = fresh(other, SOURCES, WEIGHTS, combination_type, **options)
    assert_close(deltas_of(found), of_oracle(oracle, 'oracle'))


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_mixtures_of_sources_of_other_ranks_scalings_and_layers_are_stocks(kind, tmp_path):
    other = loaded(kind, r=[4, 2, 3, 1], lora_alpha=[8, 3, 6, 4])
    composer = FusionComposer(skeleton(), 'mixture', library=library_of(other, tmp_path))
    found = composer.merged(composer.composition(SOURCES, [0.5, -0.2, 0.3]))
    assert found.layout.rank == 9
    assert_close(deltas_of(found), of_oracle(fresh(other, SOURCES, [0.5, -0.2, 0.3], 'cat'), 'oracle'))


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_sources_in_other_layers_are_merged_where_they_are(kind, tmp_path):
    other = loaded(kind, target_modules=['q_proj'])
    library = library_of(other, tmp_path / 'narrow')
    wide = loaded(kind)
    wide.save_pretrained(str(tmp_path / 'wide'))
    library.add('wide', tmp_path / 'wide' / 'l1')
    model = qwen2()
    in_model = FusionComposer(model, library=library)
    composer = FusionComposer(skeleton(), library=library)
    for sample in ({'l0': 0.4, 'wide': 0.6}, {'wide': 0.3, 'l2': 0.3}, {'l2': 1.2}):
        in_model.compose(sample)
        assert_close(deltas_of(composer.merged(composer.composition(sample))), deltas(model, 'fused'))


def test_fusion_is_the_average_of_the_parameters_with_the_scaling_of_the_sources(tmp_path):
    other = loaded('peft')
    composer = FusionComposer(skeleton(), library=library_of(other, tmp_path))
    found = composer.merged(composer.composition(['l0', 'l3'], [0.25, 0.75]))
    layer = other.base_model.model.model.layers[1].mlp.up_proj
    place = found.layout.places['model.layers.1.mlp.up_proj']
    assert found.scalings[place] == layer.scaling['l0']
    for factor, side in zip(found.factors(place), (layer.lora_A, layer.lora_B)):
        torch.testing.assert_close(factor, 0.25 * side['l0'].weight.detach() + 0.75 * side['l3'].weight.detach())


def test_what_was_merged_before_does_not_matter_and_stays_as_it_is(tmp_path):
    library = library_of(loaded('peft'), tmp_path)
    composer = FusionComposer(skeleton(), library=library)
    first = composer.merged(composer.composition(['l0', 'l1']))
    before = {kind: memory.clone() for kind, memory in first.memory.items()}
    composer.merged(composer.composition(['l2', 'l1'], [3, 4]))
    again = composer.merged(composer.composition(['l0', 'l1']))
    for kind, memory in before.items():
        assert torch.equal(memory, first.memory[kind]) and torch.equal(memory, again.memory[kind])


@pytest.mark.parametrize('build', [peft_model, swift_model])
def test_a_model_with_adapters_stays_as_it_is(build, tmp_path):
    model = build(loras(cls=LoraConfig if build is peft_model else LoRAConfig))
    composer = FusionComposer(model)
    before = state(model)
    found = composer.merged(composer.composition(['l0', 'l1'], [0.3, 0.7]))
    assert_same_state(state(model), before)
    composer.compose(['l0', 'l1'], [0.3, 0.7])
    assert_close(deltas_of(found), of_oracle(model, 'fused'))


def test_random_masks_come_from_the_seed_alone(tmp_path):
    composer = FusionComposer(
        skeleton(), library=library_of(loaded('peft'), tmp_path), combination_type='dare_linear', density=0.5)
    composition = composer.composition(['l0', 'l1'])
    state_before = torch.random.get_rng_state()
    first, again, other = (composer.merged(composition, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state_before)
    [values], [same], [others] = (list(found.memory.values()) for found in (first, again, other))
    assert torch.equal(values, same) and not torch.equal(values, others)


def test_without_values_no_tensors_are_read_and_all_else_is_checked(tmp_path):
    library = library_of(loaded('peft', r=[4, 4, 2]), tmp_path)
    composer = FusionComposer(skeleton(), library=library)
    found = composer.merged(composer.composition(['l0', 'l1']), with_values=False)
    assert found.layout.rank == 4 and all(memory.is_meta for memory in found.memory.values())
    assert library.stats.misses == 0
    with pytest.raises(ValueError, match='expects adapters of one rank'):
        composer.merged(composer.composition(['l0', 'l2']), with_values=False)
    (tmp_path / 'l1' / 'adapter_model.safetensors').write_bytes(b'no tensors')
    with pytest.raises(ValueError, match='l1'):
        composer.merged(composer.composition(['l1']), with_values=False)


def test_the_largest_rank_is_that_of_the_worst_composition(tmp_path):
    library = library_of(loaded('peft', r=[4, 2, 3, 1]), tmp_path)
    of_method = {
        method: FusionComposer(skeleton(), method, library=library)
        for method in ('fusion', 'mixture', 'selection')
    }
    assert [composer.largest_rank(max_sources=2) for composer in of_method.values()] == [4, 7, 4]
    assert of_method['mixture'].largest_rank() == 10
    assert of_method['mixture'].largest_rank(['l1', 'l3'], 5) == 3
    with pytest.raises(ValueError, match='nobody'):
        of_method['fusion'].largest_rank(['nobody'])
