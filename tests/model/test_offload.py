"""Layers that accelerate offloads, and adapters that ms-swift offloads: a new adapter is where its layers compute."""
import copy
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from models import BUILDERS, add, fresh, layers, loras, outputs, peft_model, qwen2, swift_model
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from swift_patch.compose.composer import FusionComposer
from swift_patch.lora.library import AdapterLibrary
from swift_patch.model.adapters import Adapters
from swift_patch.model.offload import device_of, plain_tensors

NAMES, WEIGHTS = ['l2', 'l1'], [0.3, 0.9]


@pytest.fixture(params=['cpu', 'disk'])
def offload(request, tmp_path):
    """Offloads the weights of a layer to memory or to files, from where they are fetched for each forward."""
    if request.param == 'cpu':
        return lambda module: cpu_offload(module, execution_device='cpu')
    return lambda module: disk_offload(module, str(tmp_path / str(id(module))), execution_device='cpu')


def offload_bases(model, offload, kind=nn.Module):
    for layer in layers(model).values():
        if isinstance(layer.base_layer, kind):
            offload(layer.base_layer)
            assert all(parameter.is_meta for parameter in layer.base_layer.parameters())


def devices_of(model, name):
    return {parameter.device.type for key, parameter in model.named_parameters() if name in key.split('.')}


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd', 'average'])
def test_a_new_adapter_in_offloaded_layers_is_that_of_layers_that_are_not(model, offload, combination_type):
    if combination_type == 'average':
        add(oracle := copy.deepcopy(model), NAMES, WEIGHTS, 'average', 'oracle')
    else:
        oracle = fresh(model, NAMES, WEIGHTS, combination_type)
    offload_bases(model, offload)
    add(model, NAMES, WEIGHTS, combination_type)
    assert devices_of(model, 'fused') == {'cpu'}
    torch.testing.assert_close(outputs(model), outputs(oracle))
    model.update_weighted_adapter(['l0'], [1.0], 'fused')
    model.update_weighted_adapter(NAMES, WEIGHTS, 'fused')
    torch.testing.assert_close(outputs(model), outputs(oracle))


def test_a_composed_adapter_in_offloaded_layers_is_that_of_layers_that_are_not(model, offload):
    oracle, other = fresh(model, NAMES, WEIGHTS, 'linear'), fresh(model, ['l0'], [1.0], 'linear')
    offload_bases(model, offload)
    composer = FusionComposer(model, combination_type='linear')
    # Of zeros at first.
    composer.compose_batch([(NAMES, WEIGHTS), (['l0'], [1.0])])
    torch.testing.assert_close(outputs(model), torch.stack([outputs(oracle)[0], outputs(other)[1]]))
    composer.compose(NAMES, WEIGHTS)
    torch.testing.assert_close(outputs(model), outputs(oracle))
    assert devices_of(model, 'fused') == {'cpu'}


def test_a_library_is_composed_in_offloaded_layers_as_in_others(written, tmp_path):
    folder, paths = written
    library = AdapterLibrary({name: paths['peft'][name] for name in NAMES})
    found = []
    for is_offloaded in (False, True):
        if is_offloaded:
            rest = ('model.embed_tokens', 'model.norm', 'model.rotary_emb', 'lm_head')
            devices = {'model.layers.0': 'disk', 'model.layers.1': 'cpu', **dict.fromkeys(rest, 'cpu')}
            model = AutoModelForCausalLM.from_pretrained(folder, device_map=devices, offload_folder=str(tmp_path))
            assert {parameter.device.type for parameter in model.parameters()} == {'cpu', 'meta'}
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        composer = FusionComposer(model, combination_type='linear', library=library)
        composer.compose(NAMES, WEIGHTS)
        found.append(outputs(model))
        composer.compose_batch([(NAMES, WEIGHTS), None])
        torch.testing.assert_close(outputs(model)[0], found[-1][0])
        assert devices_of(model, 'fused') == {'cpu'}
    torch.testing.assert_close(*found)


def test_an_adapter_that_grows_into_offloaded_layers_is_that_of_layers_that_are_not(written, offload):
    library, found = AdapterLibrary({'stored': written[1]['peft']['l1']}), []
    for is_offloaded in (False, True):
        model = peft_model(loras(1, LoraConfig, target_modules=['q_proj']))
        if is_offloaded:
            for module in model.modules():
                if type(module) is nn.Linear and min(module.weight.shape) > 4:
                    offload(module)
        composer = FusionComposer(model, combination_type='linear', library=library)
        composer.compose(['l0'])
        # PEFT makes it in the layers that no adapter of the model has.
        composer.compose(['stored'])
        assert devices_of(model, 'fused') == {'cpu'}
        found.append(outputs(model))
    torch.testing.assert_close(*found)


def test_an_adapter_with_values_of_offloaded_weights_is_refused_by_name():
    model = BUILDERS['peft'](use_dora=True)
    offload_bases(model, lambda module: cpu_offload(module, execution_device='cpu'))
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match="'fused' is expected to be a plain LoRA where base layers are offloaded"):
        add(model, NAMES, WEIGHTS, 'linear')
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert 'fused' not in model.peft_config


@pytest.mark.parametrize('combination_type', ['linear', 'cat'])
def test_a_new_adapter_is_the_same_where_others_are_offloaded(combination_type):
    found = []
    for offload in (None, 'meta'):
        model = swift_model(loras(), qwen2().to(torch.bfloat16))
        model.set_active_adapters(NAMES, offload=offload)
        add(model, NAMES, WEIGHTS, combination_type)
        found.append([(parameter.dtype, parameter.detach()) for name, parameter in model.named_parameters()
                      if 'fused' in name])
    for (dtype, values), (other_dtype, other) in zip(*found):
        assert dtype == other_dtype == torch.bfloat16
        assert torch.equal(values, other)


def test_the_device_of_a_layer_is_that_of_its_weights_or_of_a_hook():
    model = BUILDERS['peft']()
    name, layer = next(iter(layers(model.base_model.model).items()))

    def found():
        return device_of(Adapters.of(model.base_model).view, name)

    assert found() == torch.device('cpu')
    layer.base_layer.to('meta')
    assert found() is None
    # What loads all of a block for its forward.
    block = model.get_submodule('base_model.model.model.layers.0')
    add_hook_to_module(block, AlignDevicesHook('cuda:1', offload=True, place_submodules=True, weights_map={}))
    assert found() == torch.device('cuda:1')
    cpu_offload(layer.base_layer, execution_device='cuda:2', state_dict={})
    assert isinstance(layer.base_layer._hf_hook, SequentialHook)
    assert found() == torch.device('cuda:2')


def test_nothing_is_cast_on_the_device_that_offloaded_layers_compute_on():
    model = BUILDERS['peft']()
    offload_bases(model, lambda module: cpu_offload(module, execution_device='cuda'))
    is_enabled = torch.is_autocast_enabled('cuda')
    torch.set_autocast_enabled('cuda', True)
    try:
        with plain_tensors(Adapters.of(model.base_model)):
            assert not torch.is_autocast_enabled('cuda')
    finally:
        torch.set_autocast_enabled('cuda', is_enabled)
