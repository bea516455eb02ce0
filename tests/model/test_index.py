import copy
import gc
import io
import pytest
import subprocess
import sys
import torch
import warnings
import weakref
import zipfile
from contextlib import nullcontext
from models import (Nested, activate, add, assert_as_fresh, assert_close_deltas, config, fresh, layers, loras, outputs,
                    peft_model, qwen2, randomised, stock, swift_model, update)
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from swift.tuners import LoRAConfig, Swift, SwiftModel
from torch import nn

from swift_patch.compose.composer import FusionComposer
from swift_patch.model.layers import factors_of
from swift_patch.model.memory import Memory


def look(model):
    return Memory.of(model).look(model)


def walked(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def test_it_finds_the_lora_layers_in_the_order_of_named_modules():
    for model in (swift_model(loras()).model, peft_model(loras(cls=LoraConfig)).base_model.model):
        assert look(model).layers == walked(model)


def test_it_finds_lora_layers_inside_base_layers():
    attention = nn.Module()
    attention.attention = nn.MultiheadAttention(8, 2)
    model = peft_model({'a': LoraConfig(target_modules=['attention'])}, attention)
    assert [name for name, _ in look(model).layers] == [name for name, _ in walked(model)]
    assert any('base_layer' in name for name, _ in walked(model))


def test_it_does_not_grow_with_the_adapters():
    few, many = (look(swift_model(loras(count)).model) for count in (1, 8))
    assert len(few.modules) == len(many.modules)


def test_a_model_without_children_has_one_too():
    model = nn.Linear(2, 2)
    assert look(model).index is look(model).index
    assert look(model).layers == []


def test_it_is_kept_while_the_model_is_the_same():
    model = swift_model(loras()).model
    assert look(model).index is look(model).index
    index = look(model).index
    model.to(torch.bfloat16).load_state_dict(model.state_dict())
    assert look(model).index is index


def test_it_notices_a_layer_that_was_replaced_added_or_removed():
    model = swift_model(loras(target_modules=['q_proj'])).model
    look(model)
    attention = model.model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    assert look(model).layers == walked(model)
    attention.extra = copy.deepcopy(attention.q_proj)
    assert look(model).layers == walked(model)
    del model.model.layers[1]
    assert look(model).layers == walked(model)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    assert look(model).layers == walked(model)
    attention.q_proj.base_layer = nn.Sequential(attention.q_proj.base_layer)
    assert look(model).modules[-1] is list(model.modules())[-1]


def test_it_notices_layers_that_a_new_adapter_wraps():
    model = swift_model(loras(1, target_modules=['q_proj']))
    assert len(look(model.model).layers) == 2
    model = swift_model({'more': loras(1)['l0']}, model)
    assert look(model.model).layers == walked(model.model)


def test_a_copied_or_pickled_model_gets_an_index_of_its_own():
    model = swift_model(loras()).model
    look(model)
    copied = copy.deepcopy(model)
    assert look(copied).layers == walked(copied)
    model = nn.Sequential(nn.Linear(2, 2))
    look(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b'swift_patch' not in file.getvalue()


def test_it_notices_a_child_of_a_module_that_had_none():
    model = swift_model(loras(target_modules=['q_proj'])).model
    model.heads = nn.ModuleDict()
    look(model)
    model.heads['task'] = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    assert look(model).layers == walked(model)
    model.model.norm.extra = copy.deepcopy(model.heads['task'])
    assert look(model).layers == walked(model)


def test_it_notices_a_child_that_was_renamed_or_went_from_one_module_to_the_next():
    model = swift_model(loras(target_modules=['q_proj'])).model
    model.one, model.two = nn.ModuleDict({'a': nn.Linear(2, 2)}), nn.ModuleDict({'b': nn.Linear(2, 2)})
    assert 'one.a' in look(model).index.names
    model.one._modules['c'] = model.one._modules.pop('a')
    assert 'one.c' in look(model).index.names
    model.two._modules = {'c': model.one._modules.pop('c'), **model.two._modules}
    assert look(model).index.names[-4:] == ['one', 'two', 'two.c', 'two.b']


def test_it_keeps_no_module_alive():
    model = swift_model(loras(target_modules=['q_proj'])).model
    look(model)
    layer = weakref.ref(model.model.layers[0].self_attn.q_proj)
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    gc.collect()
    assert layer() is None
    assert look(model).layers == walked(model)


def test_factors_are_the_parameters_themselves_or_none():
    model = peft_model(loras(2, LoraConfig, target_modules=['q_proj']))
    layer = look(model).layers[0][1]
    assert factors_of(layer, 'l0').A is layer.lora_A['l0'].weight
    assert factors_of(layer, 'l0').B is layer.lora_B['l0'].weight
    assert factors_of(layer, 'nobody') is None
    model = peft_model({'a': LoraConfig(target_modules=['embed_tokens'])}, qwen2())
    layer = look(model).layers[0][1]
    assert factors_of(layer, 'a').A is layer.lora_embedding_A['a']


def test_a_layer_that_two_modules_share_is_found_once():
    model = swift_model(loras(1, target_modules=['q_proj'])).model
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    assert len(look(model).layers) == 1
    assert look(model).layers == walked(model)


def test_it_notices_that_a_model_keeps_its_children_elsewhere_now():
    model = swift_model(loras(1, target_modules=['q_proj'])).model
    look(model)
    model._modules = dict(model._modules)
    model.more = copy.deepcopy(model.model.layers[0])
    assert look(model).layers == walked(model)


def unload(model):
    """Returns the base model without its LoRA layers."""
    if isinstance(model, PeftModel):
        return model.unload()
    # By hand: ms-swift's own fails with recent releases of PEFT.
    base = model.base_model
    for name, layer in layers(base).items():
        parent, _, attribute = name.rpartition('.')
        setattr(base.get_submodule(parent), attribute, layer.get_base_layer())
    return base


def merge_and_unload(model):
    """Returns the base model into which the active adapter is merged."""
    if isinstance(model, PeftModel):
        return model.merge_and_unload()
    Swift.merge(model.base_model)
    return unload(model)


def used(build):
    """A model on which everything was done that something is remembered of."""
    model = build()
    composer = FusionComposer(model, 'mixture')
    composer.compose(['l0', 'l1'])
    composer.reserve(max_sources=4)
    composer.compose(['l2', 'l3', 'l1'])
    composer.compose_batch([['l0'], ['l1', 'l2'], None])
    composer.compose(['l1', 'l2'])
    add(model, name='another')
    update(model, name='another')
    activate(model, 'fused')
    return model


def live_bytes(but):
    """The memory of all tensors that there are, except for what `but` has."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # Tensors that compiling (meta), vmap (batched: transformers' masks) and sparse ones left behind have no memory.
        tensors = [
            thing for thing in gc.get_objects()
            if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, nn.Parameter) and not thing.is_meta
            and thing.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(thing)
        ]
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*but.parameters(), *but.buffers())}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(nbytes for address, nbytes in storages.items() if address not in of_model)


@pytest.mark.parametrize('leave', [unload, merge_and_unload])
def test_a_base_model_that_was_unloaded_keeps_nothing_of_its_adapters(build, leave):
    used(build)  # What is made once, for all models.
    before = live_bytes(qwen2())
    model = used(build)
    alive = [
        weakref.ref(thing) for name, thing in (*model.named_parameters(), *model.named_modules()) if 'lora_' in name
    ]
    base = leave(model)
    del model
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)
    assert live_bytes(base) <= before
    # The first two are stock's.
    more = vars(base).keys() - vars(qwen2()).keys() - {'peft_config', 'model_frozen'}
    assert not more


@pytest.mark.parametrize('leave', [unload, lambda model: model], ids=['unload', 'as it is'])
def test_what_is_pickled_of_a_model_is_what_stock_pickles(build, leave, tmp_path):
    sizes = []
    for is_stock in (True, False):
        with stock() if is_stock else nullcontext():
            model = build()
            model.add_weighted_adapter(['l0', 'l1'], [0.5, 0.3], 'fused', 'linear')
            activate(model, 'fused')
            outputs(model)
            base = leave(model)
            # ms-swift's own wrapper has a function in it that cannot be pickled.
            torch.save(base.base_model if isinstance(base, SwiftModel) else base, tmp_path / 'base.pt')
        sizes.append((tmp_path / 'base.pt').stat().st_size)
        with zipfile.ZipFile(tmp_path / 'base.pt') as file:
            assert not any(b'swift_patch' in file.read(name) for name in file.namelist())
    # The values are the same in number; what the pickle says besides differs by a few bytes, as addresses do.
    assert sizes[1] <= sizes[0] * 1.01
    if isinstance(base, SwiftModel):
        # What ms-swift puts into layers cannot be loaded again.
        return
    program = f'''
import sys
sys.modules['swift_patch'] = None
import torch
model = torch.load({str(tmp_path / 'base.pt')!r}, weights_only=False)
with torch.no_grad():
    result = model(torch.arange(10).reshape(2, 5)).logits
torch.save(result, {str(tmp_path / 'result.pt')!r})
'''
    subprocess.run([sys.executable, '-c', program], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / 'result.pt'), outputs(base))


def test_nothing_is_remembered_of_adapters_that_were_deleted():
    model, deleted = peft_model(loras(cls=LoraConfig, target_modules=['q_proj'])), []
    for i in range(10):
        name = f'sample{i}'
        model.add_weighted_adapter(['l0', 'l1'], [0.5, 0.5], name, 'linear')
        model.update_weighted_adapter(['l1', 'l2'], [0.5, 0.5], name)
        deleted.append(weakref.ref(config(model, name)))
        model.delete_adapter(name)
    gc.collect()
    # The last one may be remembered until somebody asks for another.
    assert not any(reference() is not None for reference in deleted[:-1])


def with_a_head(model, cls):
    """Puts a new layer into a container that had none, and adds an adapter `late` that targets it, too."""
    base = model.base_model.model if isinstance(model, PeftModel) else model.base_model
    torch.manual_seed(1)
    base.heads['task'] = nn.Linear(8, 8)
    late = cls(r=4, target_modules=['q_proj', 'task'], lora_dropout=0.0)
    if isinstance(model, PeftModel):
        model.add_adapter('late', late)
    else:
        model = SwiftModel(model, {'late': late}, inference_mode=True)
    return randomised(model.eval())


@pytest.mark.parametrize('build_model, cls', [(swift_model, LoRAConfig), (peft_model, LoraConfig)])
@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd'])
def test_layers_put_into_a_module_that_had_no_children_are_fused_and_switched(build_model, cls, combination_type):
    model = build_model(loras(3, cls, target_modules=['q_proj']), Nested())
    composer = FusionComposer(model, combination_type=combination_type)
    composer.compose(['l0', 'l1'], [0.5, 0.3])
    activate(model, 'l2')
    model = with_a_head(model, cls)
    sources, weights = ['l0', 'late'], [0.5, 0.3]
    add(model, sources, weights, combination_type, name='new')
    oracle = fresh(model, sources, weights, combination_type)
    assert_close_deltas(model, 'new', oracle)
    torch.testing.assert_close(outputs(model), outputs(oracle), rtol=1e-4, atol=1e-4)
    for each in (composer, FusionComposer(model, combination_type=combination_type)):
        each.compose(sources, weights)
        assert_as_fresh(model, sources, weights, combination_type)
    for name in ('late', 'l0', 'late', 'new'):
        activate(model, name)
        for layer_name, layer in layers(model).items():
            assert list(layer.active_adapters) == [name], layer_name


@pytest.mark.parametrize('build_model, cls', [(swift_model, LoRAConfig), (peft_model, LoraConfig)])
@pytest.mark.parametrize('container', [nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.Module])
def test_layers_put_into_any_empty_module_are_switched_as_with_stock(build_model, cls, container):
    results = []
    for is_stock in (True, False):
        with stock() if is_stock else nullcontext():
            base = Nested()
            base.more = container()
            model = build_model(loras(3, cls, target_modules=['q_proj']), base)
            for name in ('l0', 'l1'):
                activate(model, name)
            base.more.add_module('0', nn.ModuleDict({'q_proj': copy.deepcopy(base.model.layers[0]['q_proj'])}))
            results.append([])
            for name in ('l1', 'l0', 'l2'):
                activate(model, name)
                results[-1].append([list(layer.active_adapters) for layer in layers(model).values()])
    assert results[0] == results[1] and len(results[0][0]) == 3
