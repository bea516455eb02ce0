import copy
import gc
import pytest
import torch
import weakref
from models import (BUILDERS, SOURCES, WEIGHTS, activate, add, assert_close_deltas, deltas, fresh, layers, loras,
                    outputs, stock, swift_model, update)
from peft import PeftModel
from swift.tuners import SwiftModel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from swift_patch.compose.composer import FusionComposer
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


def in_one_buffer(parameters):
    """As ZeRO keeps parameters, and `torch.nn.utils.vector_to_parameters` makes them."""
    buffer = torch.cat([parameter.detach().flatten() for parameter in parameters])
    nn.utils.vector_to_parameters(buffer, parameters)
    return lambda: buffer.mul_(3)


def in_one_buffer_by_offsets(parameters):
    """As ZeRO keeps parameters, in another order than the model's, with room between them."""
    buffer, begin = torch.zeros(sum(parameter.numel() + 3 for parameter in parameters)), 0
    for parameter in reversed(parameters):
        place = buffer[begin:begin + parameter.numel()].view(parameter.shape)
        parameter.data = place.copy_(parameter.detach())
        begin += parameter.numel() + 3
    return lambda: buffer.mul_(3)


def in_a_buffer_for_each(parameters):
    """Of which each parameter is all, as where a framework allocates them."""
    buffers = [parameter.detach().flatten() for parameter in parameters]
    for parameter, buffer in zip(parameters, buffers):
        parameter.data = buffer.view(parameter.shape)
    return lambda: [buffer.mul_(3) for buffer in buffers]


def in_a_second_model(parameters):
    """That holds the same memory in parameters of its own."""
    second = nn.ParameterList([nn.Parameter(parameter.detach(), requires_grad=False) for parameter in parameters])
    return lambda: [parameter.data.mul_(3) for parameter in second]


def in_views(parameters):
    """Of a part of each parameter."""
    views = [parameter.detach()[1:] for parameter in parameters]
    return lambda: [view.mul_(3) for view in views]


def in_arrays(parameters):
    """That NumPy has of them."""
    arrays = [parameter.detach().numpy() for parameter in parameters]

    def write():
        for array in arrays:
            array *= 3

    return write


def in_arrays_that_numpy_allocated(parameters):
    """Whose memory torch has got from NumPy: it counts no other holder."""
    arrays = [parameter.detach().numpy().copy() for parameter in parameters]
    for parameter, array in zip(parameters, arrays):
        parameter.data = torch.from_numpy(array)

    def write():
        for array in arrays:
            array *= 3

    return write


def in_dlpack(parameters):
    """Through which other libraries get memory."""
    others = [torch.from_dlpack(parameter.detach()) for parameter in parameters]
    return lambda: [other.mul_(3) for other in others]


def in_storages(parameters):
    """Held without a tensor."""
    storages = [(parameter.untyped_storage(), parameter.dtype, parameter.device) for parameter in parameters]

    def write():
        for storage, dtype, device in storages:
            torch.tensor([], dtype=dtype, device=device).set_(storage).mul_(3)

    return write


HOLDERS = [
    in_one_buffer, in_one_buffer_by_offsets, in_a_buffer_for_each, in_a_second_model, in_views, in_arrays,
    in_arrays_that_numpy_allocated, in_dlpack, in_storages
]


def assert_writes_reach_the_model(model, name, write, oracle_write, oracle):
    """Asserts that a write by the holder of an adapter's memory does to a model what it does to its stock twin."""
    write()
    oracle_write()
    assert any(deltas(oracle, name))
    assert_close_deltas(model, name, oracle, oracle_adapter=name)


@pytest.mark.parametrize('share', HOLDERS)
@pytest.mark.parametrize('combination_type', ['linear', 'cat'])
def test_memory_that_others_hold_is_never_moved_away_from_them(build, share, combination_type):
    model, oracle = build(), build()
    write, oracle_write = share(of(model, 'l1')), share(of(oracle, 'l1'))
    before = [parameter.data_ptr() for parameter in of(model, 'l1')]
    with stock():
        oracle.add_weighted_adapter(['l1', 'l3'], [0.3, -0.6], 'fused', combination_type)
    add(model, ['l1', 'l3'], [0.3, -0.6], combination_type)
    update(model, ['l1'], [1.0], combination_type)
    update(model, ['l1', 'l3'], [0.3, -0.6], combination_type)
    assert [parameter.data_ptr() for parameter in of(model, 'l1')] == before
    assert_close_deltas(model, 'fused', oracle, oracle_adapter='fused')
    assert_writes_reach_the_model(model, 'l1', write, oracle_write, oracle)
    # What was written counts in the next merge.
    update(model, ['l1', 'l3'], [0.3, -0.6], combination_type)
    assert_close_deltas(model, 'fused', fresh(model, ['l1', 'l3'], [0.3, -0.6], combination_type))


@pytest.mark.parametrize('share', [in_one_buffer, in_views, in_arrays])
def test_memory_that_others_got_hold_of_later_is_never_moved_away_from_them(build, share):
    model, oracle = build(), build()
    composer = FusionComposer(model)
    composer.compose(['l1', 'l3'])
    composer.reserve()
    held = [(share(of(model, name)), share(of(oracle, name)), name) for name in ('l1', 'l2')]
    before = [parameter.data_ptr() for name in ('l1', 'l2') for parameter in of(model, name)]
    for sources in (['l1', 'l2'], ['l2'], ['l1', 'l2', 'l3']):
        composer.compose(sources)
    composer.reserve(max_sources=4)
    assert [parameter.data_ptr() for name in ('l1', 'l2') for parameter in of(model, name)] == before
    for write, oracle_write, name in held:
        assert_writes_reach_the_model(model, name, write, oracle_write, oracle)


def test_tensors_of_a_state_dict_that_is_kept_go_on_being_the_models(build):
    model, oracle = build(), build()
    kept, oracle_kept = (each.base_model.state_dict() for each in (model, oracle))
    FusionComposer(model).compose(['l0', 'l1'])
    for state_dict in (kept, oracle_kept):
        for name, tensor in state_dict.items():
            if '.l0.' in name:
                tensor.mul_(3)
    assert_close_deltas(model, 'l0', oracle, oracle_adapter='l0')


def test_an_optimizer_of_one_flat_buffer_goes_on_training_the_sources(build):
    models, results = [build(), build()], []
    for number, model in enumerate(models):
        parameters = of(model, 'l1')
        buffer = torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_()
        nn.utils.vector_to_parameters(buffer.data, parameters)
        optimizer = torch.optim.SGD([buffer], lr=1.0)
        for step in range(3):
            if number:
                FusionComposer(model).compose(['l1', 'l2'])
            buffer.grad = torch.full_like(buffer, 0.01 * (step + 1))
            optimizer.step()
        activate(model, 'l1')
        results.append(outputs(model))
    torch.testing.assert_close(*results)


def test_memory_that_is_shared_with_other_processes_is_left_where_it_is(build):
    model = build()
    for parameter in of(model, 'l1'):
        parameter.data = parameter.detach().clone().share_memory_()
    before = [parameter.data_ptr() for parameter in of(model, 'l1')]
    add(model, ['l1', 'l3'])
    update(model, ['l3', 'l1'], [0.5, 0.2], 'cat')
    assert [parameter.data_ptr() for parameter in of(model, 'l1')] == before
    assert all(parameter.is_shared() for parameter in of(model, 'l1'))


@pytest.fixture
def mesh():
    """One process alone, for DTensors."""
    distributed.init_process_group('gloo', rank=0, world_size=1, store=distributed.HashStore())
    yield init_device_mesh('cpu', (1, ))
    distributed.destroy_process_group()


def values(model):
    """All parameters, as objects and bit by bit; of a DTensor its local part."""
    return {
        name: (id(parameter), getattr(parameter, '_local_tensor', parameter).detach().clone())
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize('holder', ['l1', 'l3', 'fused'])
def test_distributed_tensors_are_merged_as_others_or_refused_by_name(build, mesh, holder):
    model = build(target_modules=['q_proj', 'down_proj'])
    add(model, ['l1', 'l3'], [0.5, 0.5], name='fused')
    for layer in layers(model).values():
        for container in (layer.lora_A, layer.lora_B):
            whole = container[holder].weight.detach()
            container[holder].weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]), requires_grad=False)
    before, names = values(model), [*loras(), 'fused']
    steps = [
        lambda: model.add_weighted_adapter(['l1', 'l3'], [0.3, 0.4], 'new', 'linear'),
        lambda: FusionComposer(model, adapter_name='new').compose(['l1', 'l3'])
    ] if holder != 'fused' else []
    steps += [
        lambda: update(model, ['l1', 'l3'], [0.3, 0.4], 'linear'),
        lambda: update(model, ['l1', 'l3'], [0.3, 0.4], 'cat'), lambda: FusionComposer(model).compose(['l1', 'l3']),
        lambda: FusionComposer(model).reserve()
    ]
    for step in steps:
        with pytest.raises(ValueError, match='DTensor'):
            step()
        assert list(model.adapters if isinstance(model, SwiftModel) else model.peft_config) == names
        now = values(model)
        assert now.keys() == before.keys()
        assert all(now[name][0] == before[name][0] and torch.equal(now[name][1], before[name][1]) for name in before)
