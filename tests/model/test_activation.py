import pytest
import threading
import torch
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from models import layers, loras, outputs, qwen2, stock, swift_model
from swift.tuners import LoRAConfig, NEFTuneConfig, PromptConfig, Swift, SwiftModel
from swift.tuners import utils as swift_utils
from swift.tuners.lora_layers import LoRALayer
from swift.tuners.part import PartConfig
from swift.tuners.utils import OffloadHelper, SwiftAdapter
from torch import nn

from swift_patch.model import activation

NAMES = ['l0', 'l1', 'l2', 'nobody']


@pytest.fixture
def garbage(monkeypatch):
    """Counts the collections; stock's, one per layer, are left out."""
    collected = []
    monkeypatch.setattr(activation, 'gc_collect', lambda: collected.append(None))
    monkeypatch.setattr(swift_utils, 'gc_collect', lambda: None)
    return collected


def observed(model):
    """All that activation can change, as the calling thread sees it."""
    found = {'active': model.active_adapters}
    for name, module in model.base_model.named_modules():
        if isinstance(module, swift_utils.ActivationMixin):
            found[name] = set(module.get_activated_adapters())
        if hasattr(module, 'activated') or hasattr(module, 'nef_activated'):
            found[f'{name} flag'] = getattr(module, 'activated', None), getattr(module, 'nef_activated', None)
        found[f'{name} origin'] = module.__dict__.get('origin_device')
    for name, parameter in model.base_model.named_parameters():
        found[f'{name} parameter'] = parameter.device, parameter.requires_grad
    return found


class Both:
    """One model through the patch and its twin through stock; every step must leave both the same."""

    def __init__(self, build):
        self.patched, self.stock = build(), build()
        # ms-swift's files are named by adapter and layer alone: two models in a process would share them.
        self.helpers = {id(self.patched): OffloadHelper(), id(self.stock): OffloadHelper()}

    def do(self, step):
        self.step(self.patched, step)
        with stock():
            self.step(self.stock, step)
        assert observed(self.patched) == observed(self.stock)

    def step(self, model, step):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SwiftAdapter, 'offload_helper', self.helpers[id(model)])
            step(model)


names = st.lists(st.sampled_from(NAMES), max_size=3)
steps = st.one_of(
    st.tuples(st.just('set'), names, st.sampled_from([None, None, 'cpu', 'meta'])),
    st.tuples(st.just('activate'), st.sampled_from(NAMES)),
    st.tuples(st.just('deactivate'), st.sampled_from(NAMES), st.sampled_from([None, None, 'cpu', 'meta'])),
    st.tuples(st.just('switch a layer'), st.integers(0, 6), st.sampled_from(NAMES[:3]), st.booleans()),
    st.tuples(st.just('another wrapper'), names),
    st.tuples(st.just('disable')),
    st.tuples(st.just('another thread'), names),
)


def perform(model, step):
    kind, *arguments = step
    if kind == 'set':
        model.set_active_adapters(arguments[0], offload=arguments[1])
    elif kind == 'activate':
        model.activate_adapter(*arguments)
    elif kind == 'deactivate':
        model.deactivate_adapter(*arguments)
    elif kind == 'switch a layer':
        list(layers(model).values())[arguments[0]].set_activation(*arguments[1:])
    elif kind == 'another wrapper':
        SwiftModel(model, {}, inference_mode=True).set_active_adapters(arguments[0])
    elif kind == 'disable':
        with model.disable_adapter():
            pass
    elif kind == 'another thread':
        thread = threading.Thread(target=model.set_active_adapters, args=arguments)
        thread.start()
        thread.join()


@pytest.mark.parametrize('unique_thread', ['0', '1'])
@tries(60)
@given(history=st.lists(steps, max_size=8))
def test_after_any_history_the_state_is_stocks(unique_thread, history):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('USE_UNIQUE_THREAD', unique_thread)
        patch.setattr(activation, 'gc_collect', lambda: None)
        patch.setattr(swift_utils, 'gc_collect', lambda: None)
        both = Both(lambda: swift_model(loras(3), qwen2(layers=1)))
        for step in history:
            both.do(lambda model: perform(model, step))


def test_a_call_that_changes_nothing_touches_nothing(monkeypatch):
    model = swift_model(loras())
    model.set_active_adapters('l1')
    for cls in {type(layer) for layer in layers(model).values()}:
        monkeypatch.setattr(cls, 'set_activation', None)
    monkeypatch.setattr(nn.Module, 'named_modules', None)
    model.set_active_adapters('l1')
    model.activate_adapter('l1')
    model.deactivate_adapter('l2')


def test_switching_never_walks_the_model(monkeypatch):
    model = swift_model(loras())
    model.set_active_adapters('l1')
    monkeypatch.setattr(nn.Module, 'named_modules', None)
    model.set_active_adapters(['l2', 'l3'])
    model.activate_adapter('l0')
    model.deactivate_adapter('l2')
    monkeypatch.undo()
    assert model.active_adapters == {'l0', 'l3'}
    assert all(set(layer.active_adapters) == {'l0', 'l3'} for layer in layers(model).values())


def test_threads_keep_their_own_active_adapters_as_in_ms_swift(monkeypatch):
    monkeypatch.setenv('USE_UNIQUE_THREAD', '0')
    model = swift_model(loras())
    expected, found = {}, {}
    for name in loras():
        model.set_active_adapters(name)
        expected[name] = outputs(model)
    start = threading.Barrier(len(expected))

    def switch_and_run(name):
        start.wait()
        for other in expected:
            model.set_active_adapters(other)
            model.set_active_adapters(name)
            found.setdefault(name, []).append(outputs(model))

    threads = [threading.Thread(target=switch_and_run, args=[name]) for name in expected]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for name, results in found.items():
        assert len(results) == 4
        assert all(torch.equal(result, expected[name]) for result in results)


def test_a_new_thread_starts_with_nothing_active_as_in_ms_swift(monkeypatch):
    monkeypatch.setenv('USE_UNIQUE_THREAD', '0')
    both = Both(lambda: swift_model(loras()))
    both.do(lambda model: model.set_active_adapters('l1'))

    def in_new_thread():
        both.do(lambda model: None)
        both.do(lambda model: model.set_active_adapters('l1'))
        assert all(layer.active_adapters == ['l1'] for layer in layers(both.patched).values())

    failures = []

    def guarded():
        try:
            in_new_thread()
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert not failures


def test_two_wrappers_around_one_model_do_not_mislead_each_other():
    both = Both(lambda: swift_model(loras()))
    wrappers = [SwiftModel(model, {}, inference_mode=True) for model in (both.patched, both.stock)]
    both.do(lambda model: model.set_active_adapters('l0'))
    wrappers[0].set_active_adapters('l1')
    with stock():
        wrappers[1].set_active_adapters('l1')
    both.do(lambda model: model.set_active_adapters('l0'))
    assert all(layer.active_adapters == ['l0'] for layer in layers(both.patched).values())


def test_modules_to_save_are_switched_as_in_stock(garbage):
    both = Both(lambda: swift_model(loras(3, modules_to_save=[['lm_head']])))
    for name in ('l1', 'l0', [], 'l2'):
        both.do(lambda model: model.set_active_adapters(name))
    for offload in ('cpu', 'meta'):
        both.do(lambda model: model.set_active_adapters('l0', offload=offload))
        both.do(lambda model: model.set_active_adapters([], offload=offload))
    both.do(lambda model: model.deactivate_adapter('l0'))
    both.do(lambda model: model.activate_adapter('l1'))


@pytest.mark.parametrize(
    'config', [
        NEFTuneConfig(),
        PartConfig(target_modules=r'.*layers\.0\.mlp\.up_proj'),
        PromptConfig(dim=32, target_modules=r'.*layers\.1$', embedding_pos=0, prompt_length=2),
    ],
    ids=lambda config: config.swift_type)
def test_tuners_that_are_not_lora_are_switched_as_in_stock(config):
    both = Both(lambda: swift_model({**loras(2), 'other': config}))
    for name in ('l1', 'other', ['other', 'l0'], [], 'other', 'l0'):
        both.do(lambda model: model.set_active_adapters(name))


def test_merged_linear_layers_are_switched_as_in_stock():
    configs = {
        'a': LoRAConfig(r=2, target_modules=['q_proj'], use_merged_linear=True, enable_lora=[True]),
        **loras(1, target_modules=['up_proj'])
    }
    both = Both(lambda: swift_model(configs))
    assert any(isinstance(module, LoRALayer) for module in both.patched.modules())
    for name in ('a', 'l0', [], ['a', 'l0']):
        both.do(lambda model: model.set_active_adapters(name))


def test_offloading_collects_garbage_once_per_call_and_only_if_something_moved(garbage):
    model = swift_model(loras())
    model.set_active_adapters('l0', offload='meta')
    assert len(garbage) == 1
    model.set_active_adapters('l0', offload='meta')
    assert len(garbage) == 1
    model.set_active_adapters('l1', offload='meta')
    assert len(garbage) == 2
    model.deactivate_adapter('l1', offload='meta')
    assert len(garbage) == 3


def test_an_inactive_adapter_that_is_not_offloaded_yet_is_offloaded(garbage):
    model = swift_model(loras())
    model.set_active_adapters('l0')
    model.set_active_adapters('l0', offload='meta')
    for layer in layers(model).values():
        assert {name for name, module in layer.lora_A.items() if module.weight.is_meta} == {'l1', 'l2', 'l3'}


def test_what_was_offloaded_comes_back_as_it_was(garbage):
    model = swift_model(loras())
    model.set_active_adapters('l1')
    expected = outputs(model)
    model.set_active_adapters('l0', offload='meta')
    model.set_active_adapters('l1', offload='meta')
    assert torch.equal(outputs(model), expected)


def test_an_unknown_place_to_offload_to_is_refused_and_nothing_moves(garbage):
    model = swift_model(loras())
    with pytest.raises(NotImplementedError, match='nvme'):
        model.set_active_adapters('l0', offload='nvme')


def test_switching_works_after_loading_from_disk(tmp_path):
    model = swift_model(loras())
    model.save_pretrained(str(tmp_path))
    both = Both(lambda: Swift.from_pretrained(qwen2(), str(tmp_path)))
    for name in ('l1', 'l3', []):
        both.do(lambda model: model.set_active_adapters(name))
        model.set_active_adapters(name)
        assert torch.equal(outputs(both.patched), outputs(model))
