"""What ms-swift cannot do with some releases of PEFT, or at all, until it is mended."""
import inspect
import pytest
import torch
from models import AllKinds, inputs, loras, outputs, swift_arguments, swift_model
from peft.tuners.lora import Embedding, Linear, LoraConfig
from swift.tuners import SwiftModel
from swift.tuners.lora_layers import LoraModel
from types import SimpleNamespace

from swift_patch import patching
from swift_patch.ms_swift import AdapterRequest, InferRequest, get_engine, load_base
from swift_patch.patching import fixes
from swift_patch.patching.fixes import layer_arguments, load_embeddings

TARGETS = ['embedding', 'linear', 'fan', 'conv2', 'point', 'grouped']


@pytest.mark.parametrize(
    'changes', [{}, {
        'use_rslora': True
    }, {
        'lora_dtype': 'bfloat16'
    }, {
        'use_dora': True,
        'target_modules': ['embedding', 'linear', 'fan', 'conv2', 'point']
    }],
    ids=['plain', 'rslora', 'lora_dtype', 'dora'])
def test_several_loras_of_every_kind_of_layer_are_made_saved_and_loaded(changes, tmp_path):
    configs = loras(3, **{'target_modules': TARGETS, **changes})
    model = swift_model(configs, AllKinds())
    for name in configs['l0'].target_modules:
        layer = model.get_submodule(name)
        held = layer.lora_embedding_A if name == 'embedding' else layer.lora_A
        assert set(held) == set(configs)
        if 'lora_dtype' in changes:
            assert all(value.dtype == torch.bfloat16 for value in held.parameters())
        if 'use_rslora' in changes:
            assert layer.scaling == {adapter: 4.0 for adapter in configs}
        if 'use_dora' in changes:
            assert set(layer.lora_magnitude_vector) == set(configs)
    model.save_pretrained(str(tmp_path))
    loaded = SwiftModel.from_pretrained(AllKinds(), str(tmp_path))
    for active in ('l0', 'l1', ['l0', 'l2']):
        for each in (model, loaded):
            each.set_active_adapters(active)
        assert torch.equal(outputs(loaded), outputs(model))
    loaded.set_active_adapters([])
    assert not torch.equal(outputs(loaded), outputs(model))


def test_a_lora_that_is_loaded_under_another_name_has_its_embedding(tmp_path):
    model = swift_model(loras(1, target_modules=['embedding']), AllKinds())
    model.save_pretrained(str(tmp_path))
    loaded = SwiftModel.from_pretrained(AllKinds(), str(tmp_path), adapter_name={'l0': 'other'})
    assert torch.equal(loaded.embedding.lora_embedding_B['other'], model.embedding.lora_embedding_B['l0'])
    assert inputs().shape == outputs(loaded).shape[:1] + inputs().shape[1:]


@pytest.mark.parametrize('prefix', ['', 'base_model.model.'])
@pytest.mark.parametrize('suffix', ['', '.l0'])
def test_the_embeddings_of_a_checkpoint_are_loaded_in_either_format(prefix, suffix):
    model = swift_model(loras(1, target_modules=['embedding']), AllKinds())
    layer = model.embedding
    new = {
        side: torch.rand_like(held['l0'])
        for side, held in (('A', layer.lora_embedding_A), ('B', layer.lora_embedding_B))
    }
    model.load_state_dict({f'{prefix}embedding.lora_embedding_{side}{suffix}': new[side]
                           for side in new},
                          adapter_name='l0')
    assert torch.equal(layer.lora_embedding_A['l0'], new['A']) and torch.equal(layer.lora_embedding_B['l0'], new['B'])


def test_what_there_is_no_embedding_for_is_left_for_ms_swift_to_tell():
    model = swift_model(loras(1, target_modules=['embedding']), AllKinds())
    state_dict = {'elsewhere.lora_embedding_A.l0': torch.zeros(1), 'linear.lora_A.l0.weight': torch.zeros(1)}
    assert load_embeddings(model.base_model, state_dict, 'l0') == state_dict


def test_nothing_is_given_that_peft_does_not_demand():
    assert layer_arguments(lambda self, adapter_name, r: None, LoraConfig()) == {}
    assert layer_arguments(lambda self, lora_bias=False, config=None: None, LoraConfig()) == {}


def test_all_that_peft_demands_is_given():
    config = LoraConfig()
    given = {
        'self', 'base_layer', 'adapter_name', 'r', 'lora_alpha', 'lora_dropout', 'init_lora_weights', 'use_rslora',
        'use_dora'
    }
    for method in (Embedding.__init__, Embedding.update_layer):
        demanded = {
            name
            for name, parameter in inspect.signature(method).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        assert demanded - given == set(layer_arguments(method, config))


def stock_create_new_module():
    """What ms-swift has itself, whether it is mended or not."""
    [patch] = [patch for patch in patching.PATCHES if patch.source == 'patching.fixes:create_new_module']
    return inspect.unwrap(vars(LoraModel)[patch.target.split('.')[1]].__func__)


def given_by_the_caller(*args, **kwargs):
    return stock_create_new_module()(*args, **{'config': args[0], **kwargs})


def given_to_the_layer(lora_config, adapter_name, target, current_key, **kwargs):
    for name in ('fan_in_fan_out', 'loaded_in_8bit', 'loaded_in_4bit'):
        kwargs.pop(name)
    return Linear(target, adapter_name, config=lora_config, **kwargs)


needs_mending = pytest.mark.skipif(
    not layer_arguments(Embedding.__init__, LoraConfig()), reason='this release of PEFT demands nothing more')


@needs_mending
@pytest.mark.parametrize('original', [given_by_the_caller, given_to_the_layer])
def test_an_ms_swift_that_gives_the_config_itself_is_left_alone(original):
    assert fixes.create_new_module(original) is original


@needs_mending
def test_an_ms_swift_that_does_not_is_mended_and_no_random_number_is_used():
    before = torch.random.get_rng_state()
    assert fixes.create_new_module(stock_create_new_module()) is not stock_create_new_module()
    assert torch.equal(torch.random.get_rng_state(), before)


@needs_mending
def test_a_config_that_is_given_besides_goes_before_the_mended_one():
    seen = []

    def original(lora_config, adapter_name, target, **kwargs):
        seen.append(kwargs)
        raise TypeError

    with pytest.raises(TypeError):
        fixes.create_new_module(original)(LoraConfig(), 'l0', None, config='its own')
    assert seen[-1] == {'config': 'its own'}


def test_an_ms_swift_that_loads_embeddings_is_left_alone():

    def mended(self, state_dict, strict=True, adapter_name=None):
        self.base_model.load_state_dict(state_dict, False)

    assert fixes.load_state_dict(mended) is mended


def test_an_ms_swift_that_extends_layers_rightly_is_left_alone():
    if not layer_arguments(Embedding.update_layer, LoraConfig()):
        pytest.skip('this release of PEFT demands nothing more')

    def mended(self, lora_config, adapter_name, target, target_name, parent, current_key):
        target.update_layer(adapter_name, 1, **layer_arguments(target.update_layer, lora_config))

    def lacking(self, lora_config, adapter_name, target, target_name, parent, current_key):
        target.update_layer(adapter_name, 1)

    assert fixes.create_and_replace(mended) is mended
    assert fixes.create_and_replace(lacking) is not lacking


def test_an_update_that_fails_leaves_the_layer_as_it_was():
    model = swift_model(loras(1, target_modules=['linear']), AllKinds())

    def original(self, lora_config, adapter_name, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fixes.create_and_replace(original)(SimpleNamespace(), LoraConfig(), 'l1', model.linear)
    assert 'update_layer' not in vars(model.linear)


@pytest.mark.parametrize('beams', [1, 2])
def test_a_batch_with_an_adapter_is_answered_by_ms_swifts_own_engine_as_its_requests_alone(written, beams):
    model_dir, paths = written
    args = swift_arguments(model_dir, max_new_tokens=6, num_beams=beams)
    model, template = load_base(args)
    engine = get_engine(model, template, max_batch_size=8)
    config = args.get_request_config()
    requests = [InferRequest(messages=[{'role': 'user', 'content': text}]) for text in ('a', 'a longer one', 'q')]

    def answers(*asked, **kwargs):
        return [each.choices[0].message.content for each in engine.infer(list(asked), config, **kwargs)]

    base = answers(*requests)
    for adapter in ('l0', 'l1'):
        asked = {'adapter_request': AdapterRequest(adapter, paths['peft'][adapter])}
        expected = [answers(each, **asked)[0] for each in requests]
        assert answers(*requests, **asked) == expected != base
    # There are adapters now, and none is named.
    assert answers(*requests) == base
