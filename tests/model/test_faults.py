"""Every tensor operation fails in turn, and each time the model is as it was, bit for bit, and goes on working."""
import copy
import pytest
import torch
from models import (PEFT_TYPES, add, assert_same_state, config, deltas, layers, loras, peft_model, qwen2, state,
                    swift_model, update)
from peft import LoraConfig
from swift.tuners import SwiftModel
from swift.tuners.utils import OffloadHelper, SwiftAdapter
from torch.utils._python_dispatch import TorchDispatchMode

from swift_patch import AdapterLibrary
from swift_patch.compose.composer import FusionComposer
from swift_patch.model import activation

TARGETS = ['q_proj', 'down_proj']
TYPES = {'average': {}, **PEFT_TYPES}
# As small as can be: there are as many copies as operations.
BUILDERS = {
    'swift': lambda **changes: swift_model(loras(**changes), qwen2(1, 16)),
    'peft': lambda **changes: peft_model(loras(cls=LoraConfig, **changes), qwen2(1, 16)),
}


class Fault(BaseException):
    """As an interrupt from the keyboard, it is not an `Exception`."""


class FailingAt(TorchDispatchMode):
    """Within it, the n-th tensor operation fails; with 0, none does. It counts them."""

    def __init__(self, number):
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise Fault(f'{function} ({self.number})')
        return function(*args, **(kwargs or {}))


def everything(model):
    """What may not change, with the adapters that there are and how they are described."""
    names = model.adapters if isinstance(model, SwiftModel) else getattr(model, 'peft_config', ())
    return {**state(model), 'configs': [(name, config(model, name).to_dict()) for name in names]}


def fail_everywhere(model, step):
    """Takes a step on copies of a model, failing at each of its tensor operations in turn; returns how many."""
    # Once before: what is found out about PEFT is remembered.
    step(copy.deepcopy(model))
    untroubled = copy.deepcopy(model)
    with FailingAt(0) as counter:
        step(untroubled)
    expected = deltas(untroubled, 'fused')
    for number in range(1, counter.count + 1):
        trial = copy.deepcopy(model)
        before = everything(trial)
        with pytest.raises(Fault), FailingAt(number):
            step(trial)
        assert_same_state(everything(trial), before)
        step(trial)
        after = deltas(trial, 'fused')
        assert after.keys() == expected.keys()
        assert all(torch.equal(after[name], delta) for name, delta in expected.items()), number
    return counter.count


@pytest.mark.parametrize('combination_type', TYPES)
@pytest.mark.parametrize('wrapper', BUILDERS)
def test_an_update_that_fails_anywhere_changes_nothing(wrapper, combination_type):
    model = BUILDERS[wrapper](target_modules=TARGETS)
    add(model)
    assert fail_everywhere(
        model, lambda model: update(model, combination_type=combination_type, **TYPES[combination_type])) > 10


@pytest.mark.parametrize('wrapper', BUILDERS)
def test_an_update_that_fails_anywhere_while_it_grows_changes_nothing(wrapper):
    model = BUILDERS[wrapper](target_modules=TARGETS, r=[4, 3, 2, 4])
    add(model, ['l0'], [1.0])
    fail_everywhere(model, lambda model: update(model, ['l0', 'l1'], [0.5, 0.3], 'cat'))
    # The layers of v_proj are new, and those of q_proj are zeroed.
    model = BUILDERS[wrapper](count=3, target_modules=['v_proj'])
    name = 'narrow'
    narrow = copy.deepcopy(config(model, 'l0'))
    narrow.target_modules = {'q_proj'}
    model = SwiftModel(model, {name: narrow}) if wrapper == 'swift' else (model.add_adapter(name, narrow) or model)
    add(model, [name], [1.0])
    fail_everywhere(model, lambda model: update(model, ['l0', 'l1'], [0.5, 0.3], 'svd'))


@pytest.mark.parametrize('combination_type', ['linear', 'svd', 'cat'])
@pytest.mark.parametrize('wrapper', BUILDERS)
def test_an_add_that_fails_anywhere_leaves_no_adapter(wrapper, combination_type):
    model = BUILDERS[wrapper](count=3, target_modules=TARGETS)
    fail_everywhere(model,
                    lambda model: model.add_weighted_adapter(['l2', 'l0'], [0.4, 0.7], 'fused', combination_type))


@pytest.mark.parametrize('merge_method', ['fusion', 'mixture', 'selection'])
@pytest.mark.parametrize('wrapper', BUILDERS)
def test_a_composition_that_fails_anywhere_changes_nothing(wrapper, merge_method):
    model = BUILDERS[wrapper](count=3, target_modules=TARGETS)
    fail_everywhere(model, lambda model: FusionComposer(model, merge_method).compose(['l0', 'l1']))
    FusionComposer(model, merge_method).compose(['l0', 'l1'])
    fail_everywhere(model, lambda model: FusionComposer(model, merge_method).compose({'l2': 0.6, 'l1': 0.5}))


@pytest.mark.parametrize('wrapper', BUILDERS)
def test_a_reservation_that_fails_anywhere_changes_nothing(wrapper):
    model = BUILDERS[wrapper](count=3, target_modules=TARGETS, r=[2, 4, 2])
    FusionComposer(model, 'mixture').compose(['l0'])
    fail_everywhere(model, lambda model: FusionComposer(model, 'mixture').reserve())


def test_an_update_of_what_is_offloaded_fails_as_a_whole_or_is_done_as_a_whole(monkeypatch):
    monkeypatch.setattr(activation, 'gc_collect', lambda: None)
    number, results = 0, set()
    while True:
        number += 1
        # The files are named by adapter and layer alone, so a copy of the model would share them.
        monkeypatch.setattr(SwiftAdapter, 'offload_helper', OffloadHelper())
        model = BUILDERS['swift'](target_modules=TARGETS)
        add(model)
        update(model, ['l2'], [1.0])
        old = deltas(model, 'fused')
        model.set_active_adapters('l3', offload='meta')
        try:
            with FailingAt(number):
                update(model)
            break
        except Fault:
            pass
        model.set_active_adapters('fused')
        found = deltas(model, 'fused')
        # Only while an adapter goes back to its file, the update is already done.
        is_old = all(torch.equal(found[name], delta) for name, delta in old.items())
        results.add(is_old)
        update(model)
        new = deltas(model, 'fused')
        assert is_old or all(torch.equal(found[name], delta) for name, delta in new.items()), number
    assert number > 30 and True in results
    assert all(layer.lora_A['fused'].weight.is_meta for layer in layers(model).values())


@pytest.mark.parametrize('is_wide', [False, True])
@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
def test_a_composition_from_files_that_fails_anywhere_changes_nothing(merge_method, is_wide, tmp_path):
    BUILDERS['peft'](count=3, target_modules=TARGETS).save_pretrained(str(tmp_path / 'narrow'))
    library = AdapterLibrary.from_folder(tmp_path / 'narrow', cache_bytes=0)
    model = qwen2(1, 16)
    # The first one wraps the layers of a plain model, in each copy anew.
    fail_everywhere(model, lambda model: FusionComposer(model, merge_method, library=library).compose(['l0', 'l1']))
    FusionComposer(model, merge_method, library=library).compose(['l0', 'l1'])
    sample = {'l2': 0.6, 'l1': 0.5}
    if is_wide:
        # In layers that no LoRA was in before, and of a larger rank.
        wide = BUILDERS['peft'](count=1, target_modules=['v_proj', *TARGETS], r=6)
        wide.save_pretrained(str(tmp_path / 'wide'))
        library.add('wide', tmp_path / 'wide' / 'l0')
        sample = ['wide']
    fail_everywhere(model, lambda model: FusionComposer(model, merge_method, library=library).compose(sample))
