import copy
import gc
import pytest
import torch
import weakref
from models import BUILDERS, SOURCES, WEIGHTS, add, assert_close_deltas, fresh, layers, loras, swift_model, update
from peft import PeftModel
from torch import nn

from swift_patch.model import adapters as adapters_module
from swift_patch.model.adapters import Adapters
from swift_patch.model.layers import factors_of
from swift_patch.model.packing import Layout
from swift_patch.model.undo import Undo

SPARSE = ('ties', 'magnitude_prune', 'dare_linear')


@pytest.fixture(params=BUILDERS)
def model(request):
    return BUILDERS[request.param]()


def loaded(model):
    return Adapters.of(model.base_model if isinstance(model, PeftModel) else model)


def layout(model, name) -> Layout:
    return loaded(model).factors(name).layout


def of(model, name):
    return [parameter for layer in layers(model).values() for parameter in factors_of(layer, name) or ()]


def pack_nothing(monkeypatch):
    """From now on parameters stay where they are."""
    monkeypatch.setattr(adapters_module, 'pack', lambda *_: None)


def test_a_merge_packs_sources_and_the_fused_adapter_and_nothing_else(model):
    add(model, SOURCES, WEIGHTS)
    before = {name: [parameter.data_ptr() for parameter in of(model, name)] for name in ('l0', 'l1', 'l2', 'l3')}
    for name in ('fused', *SOURCES):
        assert layout(model, name).is_one_run and layout(model, name).is_packed
        assert len({parameter.untyped_storage().data_ptr() for parameter in of(model, name)}) == 2
    others = {'l0', 'l1', 'l2', 'l3'} - set(SOURCES)
    assert others and not any(layout(model, name).is_packed for name in others)
    update(model)
    assert before == {name: [parameter.data_ptr() for parameter in of(model, name)] for name in before}


def test_parameters_stay_the_same_objects_with_the_same_values_when_they_are_packed(model):
    before = [(parameter, parameter.detach().clone()) for parameter in of(model, 'l0')]
    with Undo() as undo:
        loaded(model).pack('l0', undo)
        undo.commit()
    assert layout(model, 'l0').is_one_run
    for (old, values), new in zip(before, of(model, 'l0')):
        assert old is new and torch.equal(new, values) and new.is_contiguous()


def test_packing_is_undone(model):
    before = [(parameter.data_ptr(), parameter.detach().clone()) for parameter in of(model, 'l0')]
    with pytest.raises(MemoryError), Undo() as undo:
        loaded(model).pack('l0', undo)
        raise MemoryError
    for (address, values), parameter in zip(before, of(model, 'l0')):
        assert parameter.data_ptr() == address and torch.equal(parameter, values)


@pytest.mark.parametrize('combination_type', ['linear', 'cat', 'svd', *SPARSE])
@pytest.mark.parametrize('packed', [('l1', 'l3', 'fused'), ('l1', ), ('l3', ), ('fused', ), ()], ids=str)
def test_packed_or_not_the_result_is_what_stock_would_have_made(model, packed, combination_type, monkeypatch):
    options = {'density': 0.5} if combination_type in SPARSE else {}
    oracle = fresh(model, ['l1', 'l3'], [0.3, -0.6], combination_type, **options)
    pack_nothing(monkeypatch)
    add(model, ['l0', 'l2'], [1.0, 2.0], combination_type, **options)
    monkeypatch.undo()
    with Undo() as undo:
        for name in packed:
            loaded(model).pack(name, undo)
        undo.commit()
    pack_nothing(monkeypatch)
    assert all(layout(model, name).is_one_run == (name in packed) for name in ('l1', 'l3', 'fused'))
    update(model, ['l1', 'l3'], [0.3, -0.6], combination_type, **options)
    assert_close_deltas(model, 'fused', oracle)


def moved(model):
    for parameter in of(model, 'l1'):
        parameter.data = parameter.data.clone()


def cast(model):
    model.double().float()


def replaced(model):
    for layer in layers(model).values():
        layer.lora_A['l1'].weight = nn.Parameter(layer.lora_A['l1'].weight.detach().clone() * 2)


def one_replaced(model):
    layer = list(layers(model).values())[-1]
    layer.lora_B['l1'] = copy.deepcopy(layer.lora_B['l1'])
    layer.lora_B['l1'].weight.data *= 3


def reloaded(model):
    inner = loaded(model).model
    state = {name: parameter.detach() * 2 for name, parameter in inner.named_parameters() if '.l1.' in name}
    assert state
    inner.load_state_dict(state, strict=False, assign=True)


def reshaped(model):
    for layer in layers(model).values():
        layer.lora_A['l1'].weight.data = layer.lora_A['l1'].weight.data.flip(0)


@pytest.mark.parametrize('change', [moved, cast, replaced, one_replaced, reloaded, reshaped])
@pytest.mark.parametrize('combination_type', ['linear', 'cat'])
def test_whatever_moved_an_adapter_the_merge_is_of_what_the_model_holds(model, change, combination_type):
    add(model, SOURCES, WEIGHTS, combination_type)
    change(model)
    oracle = fresh(model, ['l1', 'l3'], [0.3, -0.6], combination_type)
    update(model, ['l1', 'l3'], [0.3, -0.6], combination_type)
    assert_close_deltas(model, 'fused', oracle)


def test_memory_that_others_hold_too_is_left_where_it_is(model):
    # One tensor for two adapters, as of a checkpoint that was split: others may write through it.
    for layer in layers(model).values():
        both = torch.randn(2, *layer.lora_A['l1'].weight.shape)
        layer.lora_A['l1'].weight.data, layer.lora_A['l3'].weight.data = both
    before = [parameter.data_ptr() for name in ('l1', 'l3') for parameter in of(model, name)]
    oracle = fresh(model, ['l1', 'l3'], [0.3, -0.6], 'linear')
    add(model, ['l1', 'l3'], [0.3, -0.6], 'linear')
    assert before == [parameter.data_ptr() for name in ('l1', 'l3') for parameter in of(model, name)]
    assert_close_deltas(model, 'fused', oracle)


def test_every_parameter_counts_as_written(model):
    add(model)
    before = [parameter._version for parameter in of(model, 'fused')]
    update(model)
    assert all(new._version > old for new, old in zip(of(model, 'fused'), before))


def test_the_memory_of_an_adapter_that_is_deleted_is_free_at_once(model):
    add(model, SOURCES, WEIGHTS)
    parameters = [weakref.ref(parameter) for parameter in of(model, SOURCES[0])]
    for layer in layers(model).values():
        for container in (layer.lora_A, layer.lora_B):
            del container[SOURCES[0]]
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)


def test_a_fused_adapter_of_more_rank_is_filled_kind_by_kind_too(monkeypatch):
    model = swift_model(loras())
    add(model, ['l0', 'l1', 'l2'], [1.0, 1.0, 1.0], 'cat')
    oracle = fresh(model, ['l1', 'l3'], [0.3, -0.6], 'linear')
    copies, copy_ = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, 'copy_', lambda self, *args: (copies.append(None), copy_(self, *args))[1])
    update(model, ['l1', 'l3'], [0.3, -0.6], 'linear')
    monkeypatch.undo()
    assert len(copies) < 2 * len(layers(model)) * 2
    assert_close_deltas(model, 'fused', oracle)
