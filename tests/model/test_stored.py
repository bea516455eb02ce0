"""Adapters that stay on disk are merged as the same adapters loaded into the model, and as stock merges those."""
import copy
import inspect
import json
import pytest
import torch
from models import (PEFT_TYPES, PROJECTIONS, SOURCES, WEIGHTS, AllKinds, assert_close_deltas, assert_same_state, deltas,
                    fresh, layers, llava, loras, outputs, peft_model, qwen2, reproducible_masks, state, swift_model)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from swift.tuners import LoRAConfig, SwiftModel
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from swift_patch import AdapterLibrary, FusionComposer
from swift_patch.model import kinds, new_adapter
from swift_patch.model.memory import Memory

OPTIONS = {**PEFT_TYPES, 'average': {}}
EVERY_KIND = ['embedding', 'linear', 'fan', 'conv2', 'point', 'grouped']
NARROW = [PROJECTIONS, ['q_proj', 'v_proj'], ['down_proj'], PROJECTIONS[2:]]


def loaded(kind, model=None, targets=None, **changes):
    """A model with LoRAs in it, as PEFT or as ms-swift has them."""
    cls, wrap = (LoRAConfig, swift_model) if kind == 'swift' else (LoraConfig, peft_model)
    configs = loras(cls=cls, **changes)
    for number, config in enumerate(configs.values()):
        if targets is not None:
            config.target_modules = set(targets[number % len(targets)])
    return wrap(configs, model)


def library_of(model, folder):
    """The LoRAs of a model, saved in the format of its wrapper."""
    model.save_pretrained(str(folder))
    return AdapterLibrary.from_folder(folder)


def without_adapters(wrapper, model=None):
    """A model that has none of them: a plain one, a `SwiftModel` without any, or a `PeftModel` with another one."""
    model = qwen2() if model is None else model
    if wrapper == 'swift':
        return SwiftModel(model, {}, inference_mode=True)
    if wrapper == 'peft':
        return get_peft_model(model, LoraConfig(r=2, target_modules=['q_proj']), 'other').eval()
    return model


def bare(model):
    """The base model, whose layers have the same names whatever wraps it."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.base_model if isinstance(model, SwiftModel) else model


def assert_as_loaded(composer, model, other, tolerance=0.0):
    """Asserts that a composer of a library makes what a composer of loaded adapters does, for any samples."""
    samples = [(SOURCES, WEIGHTS), ['l1'], {'l3': 0.4, 'l2': -0.7}, ['l0', 'l1', 'l2', 'l3']]
    # Of the same name, for a fused adapter that exists keeps its dtype.
    twin = FusionComposer(other, composer.merge_method, adapter_name=composer.adapter_name)
    for sample in samples:
        names, weights = sample if isinstance(sample, tuple) else (sample, None)
        composer.compose(names, weights)
        twin.compose(names, weights)
        torch.testing.assert_close(outputs(model), outputs(other), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('combination_type', OPTIONS)
@pytest.mark.parametrize('wrapper', ['plain', 'swift', 'peft'])
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_every_combination_type_is_stocks(kind, wrapper, combination_type, tmp_path):
    options = OPTIONS[combination_type]
    other = loaded(kind)
    model = without_adapters(wrapper)
    composer = FusionComposer(model, library=library_of(other, tmp_path), combination_type=combination_type, **options)
    # One that is made, and one that is refilled.
    for sources, weights in ((['l3', 'l1'], [0.4, -0.7]), (SOURCES, WEIGHTS)):
        with reproducible_masks():
            composer.compose(sources, weights)
        if combination_type == 'average':
            FusionComposer(other).compose(sources, weights)
            assert_close_deltas(bare(model), 'fused', bare(other), 1e-6, 'fused')
            continue
        oracle = fresh(other, sources, weights, combination_type, **options)
        assert_close_deltas(bare(model), 'fused', bare(oracle))
        torch.testing.assert_close(outputs(model), outputs(oracle), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'way', [
        *({
            'merge_method': method
        } for method in ('fusion', 'mixture', 'selection')), *({
            'combination_type': name,
            **options
        } for name, options in PEFT_TYPES.items())
    ],
    ids=lambda way: next(iter(way.values())))
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_each_row_of_a_batch_is_as_the_same_sample_alone(kind, way, tmp_path):
    library, model = library_of(loaded(kind), tmp_path), qwen2()
    composer = FusionComposer(model, library=library, **way)
    samples = [{'l0': 0.5, 'l1': 0.5}, ['l2'], (['l1', 'l3'], [0.2, -0.8]), ('l3', 'l0', 'l2'), None]
    ids = torch.randint(3, 60, (len(samples), 7), generator=torch.Generator().manual_seed(3))
    seeds, expected = list(range(len(samples))), []
    with torch.no_grad():
        for number, sample in enumerate(samples):
            composer.compose_batch([sample], [seeds[number]])
            expected.append(model(ids[number:number + 1]).logits)
        composer.compose_batch(samples, seeds)
        torch.testing.assert_close(model(ids).logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected[-1], qwen2()(ids[-1:]).logits)


@pytest.mark.parametrize('method', ['mixture', 'selection'])
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_ranks_scalings_and_layers_of_the_sources_may_differ(kind, method, tmp_path):
    other = loaded(kind, targets=NARROW, r=[4, 2, 3, 1], lora_alpha=[8, 3, 6, 4], use_rslora=[False, True])
    model = qwen2()
    assert_as_loaded(FusionComposer(model, method, library=library_of(other, tmp_path)), model, other, 1e-5)


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_patterns_of_ranks_and_alphas_are_the_files(kind, tmp_path):
    changes = {'rank_pattern': {'q_proj': 2, 'down_proj': 6}, 'alpha_pattern': {'v_proj': 5}, 'lora_alpha': [8, 3]}
    other, model = loaded(kind, **changes), qwen2()
    library = library_of(other, tmp_path)
    for method in ('fusion', 'mixture', 'selection'):
        composer = FusionComposer(model, method, library=library, adapter_name=f'fused_{method}')
        assert_as_loaded(composer, model, other, 1e-5)


@pytest.mark.parametrize('method', ['fusion', 'mixture'])
@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_embeddings_and_convolutions_are_merged_from_files_too(kind, method, tmp_path):
    targets = EVERY_KIND + (['conv1', 'conv3'] if kind == 'peft' else [])
    other, model = loaded(kind, AllKinds(), target_modules=targets), AllKinds()
    assert_as_loaded(FusionComposer(model, method, library=library_of(other, tmp_path)), model, other, 1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('file_dtype', [torch.float32, torch.bfloat16])
def test_values_have_the_dtype_that_they_would_have_in_the_model(dtype, file_dtype, tmp_path):
    source = loaded('peft')
    source.save_pretrained(str(tmp_path))
    for path in tmp_path.glob('*/adapter_model.safetensors'):
        # Both in one file, where the dtypes differ.
        save_file(
            {
                key: tensor.to(file_dtype if 'q_proj' in key else torch.float32)
                for key, tensor in load_file(path).items()
            }, path)
    model, other = qwen2().to(dtype), None
    for name in loras():
        if other is None:
            other = PeftModel.from_pretrained(qwen2().to(dtype), tmp_path / name, name)
        else:
            other.load_adapter(tmp_path / name, name)
    for method in ('fusion', 'mixture'):
        composer = FusionComposer(
            model, method, adapter_name=f'fused_{method}', library=AdapterLibrary.from_folder(tmp_path))
        # PEFT 0.18 rounds all but the first to the dtype of the model when it loads them, and casts them back then.
        is_exact = 'autocast_adapter_dtype' in inspect.signature(PeftModel.add_adapter).parameters
        assert_as_loaded(composer, model, other, 0 if is_exact or dtype == torch.float64 else 5e-2)
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if '.fused_fusion.' in name}
    assert dtypes == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize('has_room', [False, True])
def test_layers_that_only_later_sources_have_are_added_when_they_are_needed_or_reserved(has_room, tmp_path, caplog):
    other, model = loaded('peft', targets=NARROW, r=[4, 2, 3, 1]), qwen2()
    composer = FusionComposer(model, 'mixture', library=library_of(other, tmp_path))
    if has_room:
        composer.reserve(max_sources=4)
    caplog.clear()
    for sources in (['l2'], ['l1', 'l2'], ['l0', 'l3'], ['l2', 'l1', 'l0', 'l3'], ['l1']):
        composer.compose(sources)
        FusionComposer(other, 'mixture', adapter_name='twin').compose(sources)
        torch.testing.assert_close(outputs(model), outputs(other), rtol=1e-5, atol=1e-5)
    assert ("'fused' grows" in caplog.text) is not has_room


def test_trainings_that_differ_in_no_more_than_their_names_and_the_order_of_sets_are_one_kind(tmp_path, monkeypatch):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    for number, file in enumerate(sorted(tmp_path.glob('*/adapter_config.json'))):
        config = json.loads(file.read_text())
        targets = sorted(config['target_modules'])
        config.update(base_model_name_or_path=f'model-{number}', target_modules=targets[number:] + targets[:number])
        file.write_text(json.dumps(config))
    injected = []
    monkeypatch.setattr(kinds, 'injected_copy', lambda *args: injected.append(1) or new_adapter.injected_copy(*args))
    FusionComposer(model, library=library).check()
    assert len(injected) == 1


def test_reserve_reads_no_tensors(tmp_path):
    library, model = library_of(loaded('peft', targets=NARROW), tmp_path), qwen2()
    for file in tmp_path.glob('*/adapter_model.safetensors'):
        file.unlink()
    FusionComposer(model, library=library).reserve()
    # What it reserves is zero.
    assert torch.equal(outputs(model), outputs(qwen2()))
    assert len(layers(model)) == 2 * len(PROJECTIONS)


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_sources_of_the_library_and_of_the_model_go_together(kind, tmp_path):
    other = loaded(kind)
    library = library_of(other, tmp_path)
    model = copy.deepcopy(other)
    for name in ('l0', 'l2'):
        library.remove(name)
    for layer in layers(model).values():
        # Those of the library come first, so that these are not taken.
        for name in ('l1', 'l3'):
            layer.lora_B[name].weight.data.zero_()
    for method in ('fusion', 'mixture', 'selection'):
        composer = FusionComposer(model, method, adapter_name=f'fused_{method}', library=library)
        assert_as_loaded(composer, model, other, 1e-5)


def test_names_that_a_module_could_not_have_are_names_in_a_library(tmp_path):
    other, model = loaded('peft'), qwen2()
    other.save_pretrained(str(tmp_path))
    library = AdapterLibrary({f'team/{name}.v1': tmp_path / name for name in loras()})
    FusionComposer(model, library=library).compose(['team/l0.v1', 'team/l2.v1'])
    FusionComposer(other).compose(['l0', 'l2'])
    assert torch.equal(outputs(model), outputs(other))


def test_layers_that_another_release_of_transformers_named_otherwise_are_found_as_peft_finds_them(tmp_path):
    targets = r'.*language_model.*\.(q_proj|v_proj)'
    source = peft_model(loras(cls=LoraConfig, target_modules=targets), llava())
    source.save_pretrained(str(tmp_path / 'new'))
    for path in (tmp_path / 'new').glob('*/adapter_model.safetensors'):
        old = tmp_path / 'old' / path.parent.name
        old.mkdir(parents=True)
        (old / 'adapter_config.json').write_text((path.parent / 'adapter_config.json').read_text())
        renamed = {
            key.replace('.model.model.language_model.', '.model.language_model.model.'): tensor
            for key, tensor in load_file(path).items()
        }
        assert not renamed.keys() & load_file(path).keys()
        save_file(renamed, old / path.name)
    expected = deltas(bare(source), 'l0')
    other = PeftModel.from_pretrained(llava(), tmp_path / 'old' / 'l0', 'l0')
    found = deltas(bare(other), 'l0')
    is_found = all(name in found and torch.equal(delta, found[name]) for name, delta in expected.items())
    for names in ('new', 'old'):
        model = llava()
        composer = FusionComposer(model, 'selection', library=AdapterLibrary.from_folder(tmp_path / names))
        if names == 'old' and not is_found:
            # PEFT 0.18 with transformers 5 logs it, and goes on with what is not the file's.
            with pytest.raises(ValueError, match='8 tensors of the file have no place in this base model'):
                composer.compose(['l0'])
            continue
        composer.compose(['l0'])
        assert_close_deltas(model, 'fused', bare(source), 1e-6, 'l0')


@pytest.mark.parametrize('is_tied', [False, True])
def test_adapters_of_embeddings_are_merged_where_the_base_weights_saved_with_them_are_the_models(is_tied, tmp_path):

    def base():
        model = qwen2()
        if is_tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    other = loaded('peft', base(), target_modules=['embed_tokens', 'lm_head', 'q_proj'])
    other.save_pretrained(str(tmp_path), save_embedding_layers=True)
    keys = load_file(tmp_path / 'l0' / 'adapter_model.safetensors').keys()
    assert any(key.endswith('base_layer.weight') for key in keys), 'or the test would see nothing'
    model = base()
    assert_as_loaded(FusionComposer(model, library=AdapterLibrary.from_folder(tmp_path)), model, other, 1e-5)
    with torch.no_grad():
        changed = base()
        changed.lm_head.weight[0, 0] += 1
    before = outputs(changed)
    with pytest.raises(ValueError, match=r"adapter 'l0' .*base weights of its own, .*base_layer\.weight.*trained"):
        FusionComposer(changed, library=AdapterLibrary.from_folder(tmp_path)).compose(['l0'])
    assert torch.equal(outputs(changed), before) and not layers(changed)


def test_a_model_whose_first_composition_fails_is_as_it_was(tmp_path):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    path = tmp_path / 'l1' / 'adapter_model.safetensors'
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float('nan')
    save_file(tensors, path)
    before, modules = state(model), [(name, id(module)) for name, module in model.named_modules()]
    composer = FusionComposer(model, library=library)
    for sample in (['l0', 'l1'], ['nowhere'], ['l0', 'nowhere']):
        with pytest.raises(ValueError):
            composer.compose(sample)
        with pytest.raises(ValueError):
            composer.compose_batch([['l0'], sample])
        assert_same_state(state(model), before)
        assert [(name, id(module)) for name, module in model.named_modules()] == modules
        assert not hasattr(model, 'peft_config')
    # The next one is right.
    composer.compose(['l0', 'l2'])
    assert any(isinstance(module, LoraLayer) for module in model.modules())


def test_a_refill_that_fails_leaves_what_was_composed(tmp_path):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    composer = FusionComposer(model, library=library)
    composer.compose(['l0', 'l2'])
    before = state(model)
    path = tmp_path / 'l1' / 'adapter_model.safetensors'
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="adapter 'l1' .*not written to its end"):
        composer.compose(['l0', 'l1'])
    assert_same_state(state(model), before)


def test_composers_of_one_plain_model_share_its_adapters(tmp_path):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    first, second = (FusionComposer(model, library=library, adapter_name=name) for name in ('one', 'two'))
    first.compose(['l0'])
    expected = outputs(model)
    second.compose(['l1'])
    assert not torch.equal(outputs(model), expected)
    first.activate()
    assert torch.equal(outputs(model), expected)
    # A fused adapter of one is a source of the other.
    second.compose(['one'])
    torch.testing.assert_close(outputs(model), expected)


@pytest.mark.parametrize('make, error, told', [
    (lambda model, library: FusionComposer(model), TypeError, 'any model with a library'),
    (lambda model, library: FusionComposer('model', library=library), TypeError, 'any model with a library'),
    (lambda model, library: FusionComposer(model, library={'l0': 'x'}), TypeError, 'library is expected'),
    (lambda model, library: FusionComposer(model, library=library, adapter_name='l0'), ValueError, 'choose another'),
])
def test_what_no_composer_can_be_made_of_is_told(make, error, told, tmp_path):
    with pytest.raises(error, match=told):
        make(qwen2(), library_of(loaded('peft'), tmp_path))


def test_all_problems_of_adapters_are_told_at_once(tmp_path):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    tensors = load_file(tmp_path / 'l1' / 'adapter_model.safetensors')
    key = next(iter(tensors))
    save_file({**tensors, key: torch.zeros(0)}, tmp_path / 'l1' / 'adapter_model.safetensors')
    save_file({
        **tensors, 'base_model.model.model.norm.weight': torch.ones(3)
    }, tmp_path / 'l2' / 'adapter_model.safetensors')
    (tmp_path / 'l3' / 'adapter_model.safetensors').unlink()
    with pytest.raises(ValueError) as info:
        FusionComposer(model, library=library).check()
    told = str(info.value).splitlines()
    assert len(told) == 3
    assert "'l1'" in told[0] and key in told[0] and 'ZeRO-3' in told[0]
    assert "'l2'" in told[1] and 'norm.weight is not a tensor of a LoRA' in told[1]
    assert "'l3'" in told[2] and 'no adapter_model.safetensors' in told[2]


def test_deltas_of_the_test_models_differ(tmp_path):
    found = deltas(loaded('peft'), 'l0')
    assert found and not any(torch.equal(delta, deltas(loaded('peft'), 'l1')[name]) for name, delta in found.items())


def test_a_model_that_is_cast_is_noticed_and_nothing_else_is_looked_at_twice(tmp_path, monkeypatch):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    composer = FusionComposer(model, library=library)
    composer.reserve()
    composer.compose(['l0', 'l1'])
    looked = []
    monkeypatch.setattr(kinds, 'injected_copy', lambda *args: looked.append(args) or new_adapter.injected_copy(*args))
    composer.compose(['l2', 'l3'])
    composer.compose_batch([['l1'], ['l2', 'l0']])
    assert not looked
    model.to(torch.float64)
    composer.compose(['l0', 'l1'])
    assert len(looked) == 1
    other = PeftModel.from_pretrained(qwen2().to(torch.float64), tmp_path / 'l0', 'l0')
    other.load_adapter(tmp_path / 'l1', 'l1')
    FusionComposer(other).compose(['l0', 'l1'])
    torch.testing.assert_close(outputs(model), outputs(other), rtol=1e-12, atol=1e-12)


def edited(folder, name, **changes):
    """Changes options in the config of an adapter."""
    file = folder / name / 'adapter_config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_of_patterns_the_first_that_matches_counts_whatever_was_seen_before(tmp_path):
    other = loaded('peft', r=2, alpha_pattern={'q_proj': 32, 'layers.0.self_attn.q_proj': 64})
    library, model = library_of(other, tmp_path), qwen2()
    edited(tmp_path, 'l1', alpha_pattern={'layers.0.self_attn.q_proj': 64, 'q_proj': 32})
    composer = FusionComposer(model, 'selection', library=library)
    for name in ('l0', 'l1', 'l0'):
        composer.compose([name])
        expected = PeftModel.from_pretrained(qwen2(), tmp_path / name, 'expected')
        assert_close_deltas(model, 'fused', bare(expected), 1e-6, 'expected')


def test_options_that_are_null_are_not_given(tmp_path):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    edited(tmp_path, 'l1', use_dora=None, rank_pattern=None, alpha_pattern=None, use_rslora=None, bias=None)
    composer = FusionComposer(model, library=library)
    for sample in (['l0'], ['l1'], ['l0', 'l1'], ['l1', 'l0']):
        composer.compose(sample)
        assert deltas(model, 'fused')


def test_a_fused_adapter_of_another_kind_is_not_refilled_from_a_library(tmp_path):
    library = library_of(loaded('peft'), tmp_path)
    model = get_peft_model(qwen2(), LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=True), 'dora').eval()
    composer = FusionComposer(model, library=library)
    composer.compose(['dora'])
    for compose in (lambda: composer.compose(['l1']), lambda: composer.compose_batch([['l1'], ['l2']])):
        with pytest.raises(ValueError, match="use_dora=True, as it was made, found use_dora=None of source 'l1'"):
            compose()


def test_layers_that_are_cast_one_by_one_are_noticed(tmp_path):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    composer = FusionComposer(model, library=library)
    composer.compose(['l0', 'l1'])
    for layer in model.model.layers:
        layer.double()
    composer.compose(['l0', 'l1'])
    kind = next(iter(Memory.of(model).stored.values())).kind
    assert {dtype for dtype, _ in kind.layout.sizes} == {torch.float64}


def test_base_weights_that_are_offloaded_are_not_compared(tmp_path):
    other = loaded('peft', target_modules=['embed_tokens', 'q_proj'])
    other.save_pretrained(str(tmp_path), save_embedding_layers=True)
    model = qwen2()
    model.model.embed_tokens.to('meta')
    with pytest.raises(ValueError, match="'l0' .*base weights of its own.*offloaded.*save_embedding_layers=False"):
        FusionComposer(model, library=AdapterLibrary.from_folder(tmp_path)).check(['l0'])


def test_a_name_that_is_nowhere_is_told_with_where_it_was_looked_for(tmp_path):
    composer = FusionComposer(qwen2(), library=library_of(loaded('peft'), tmp_path))
    with pytest.raises(ValueError, match=r"adapters of the library \(4\) or the model, \[\], found 'l9'"):
        composer.compose(['l0', 'l9'])


def test_a_composer_that_composed_nothing_leaves_a_plain_model_as_it_was(tmp_path):
    library, model = library_of(loaded('peft'), tmp_path), qwen2()
    before = dict(vars(model))
    with pytest.raises(ValueError):
        FusionComposer(model, 'nonsense', library=library)
    composers = [FusionComposer(model, library=library, adapter_name=name) for name in ('one', 'two')]
    assert vars(model) == before
    for composer in composers:
        composer.compose(['l0'])
    assert list(model.peft_config) == ['one', 'two']


def test_a_model_without_parameters_is_told_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match='does not fit this base model'):
        FusionComposer(nn.Module(), library=library_of(loaded('peft'), tmp_path)).compose(['l0'])


def test_weights_that_peft_converts_are_told_with_their_adapter(tmp_path):
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=64)
    model = MixtralForCausalLM(config).eval()
    folder = tmp_path / 'moe'
    LoraConfig(r=2, target_modules=['w1', 'w2', 'w3'], task_type='CAUSAL_LM').save_pretrained(str(folder))
    sizes = {'w1': (32, 48), 'w2': (48, 32), 'w3': (32, 48)}
    tensors = {}
    for name, (ins, outs) in sizes.items():
        for expert in range(2):
            prefix = f'base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}'
            tensors[f'{prefix}.lora_A.weight'] = torch.ones(2, ins)
            tensors[f'{prefix}.lora_B.weight'] = torch.ones(outs, 2)
    save_file(tensors, folder / 'adapter_model.safetensors')
    composer, before = FusionComposer(model, library=AdapterLibrary({'moe': folder})), state(model)
    try:
        composer.compose(['moe'])
    except ValueError as e:
        # Where experts are parameters, in transformers 5.
        assert "adapter 'moe'" in str(e)
        assert_same_state(state(model), before)
    else:
        assert deltas(model, 'fused')
