"""Random histories of one model through the patch, and of its twin through stock: after every step both are the same.

Stock cannot refill: there, for every update, a fresh adapter takes the old one's place. `make fuzz STEPS=...` says how
many steps are tried in each wrapper.
"""
import copy
import os
import pytest
import tempfile
from fuzzing import GATE_STEPS, tries
from histories import Histories, configs, offloads, which
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from models import outputs, peft_model, swift_model
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from swift.tuners import LoRAConfig, Swift, SwiftModel
from twins import factors_of

STEPS_PER_HISTORY = 14


class SwiftHistories(Histories):
    """The steps of a `SwiftModel`."""
    config_class = LoRAConfig

    def build(self, adapters, base):
        return swift_model(adapters, base)

    def wrap(self, side, name, new):
        side.wrappers.append(SwiftModel(side.wrappers[-1], {name: new}, inference_mode=True))

    def configure(self, model, name, new):
        model.adapters[name].config = new

    def load(self, model, folder, names):
        return Swift.from_pretrained(model, folder, adapter_name=names, inference_mode=True)

    def draw_names(self, data):
        names = [*self.sources, *self.frozen, *self.fused, 'nobody']
        return data.draw(st.lists(st.sampled_from(names), max_size=3), 'adapters')

    @rule(data=st.data(), index=which, offload=offloads)
    def set_active_adapters(self, data, index, offload):
        names = self.draw_names(data)
        self.both(lambda side: side.wrappers[index % len(side.wrappers)].set_active_adapters(names, offload=offload))

    @rule(data=st.data(), index=which)
    def activate_adapters(self, data, index):
        for name in self.draw_names(data):
            self.both(lambda side: side.wrappers[index % len(side.wrappers)].activate_adapter(name))

    @rule(data=st.data(), index=which, offload=offloads)
    def deactivate_adapters(self, data, index, offload):
        for name in self.draw_names(data):
            self.both(lambda side: side.wrappers[index % len(side.wrappers)].deactivate_adapter(name, offload))

    @rule(index=which)
    def disable_all_adapters_for_a_while(self, index):

        def step(side):
            with side.wrappers[index % len(side.wrappers)].disable_adapter():
                assert not any(layer.active_adapters for layer in side.layers().values())

        self.both(step)

    @rule(data=st.data(), index=st.integers(0, 9), is_active=st.booleans())
    def switch_a_layer_by_itself(self, data, index, is_active):
        name = data.draw(st.sampled_from([*self.sources, *self.fused]), 'adapter')

        def step(side):
            every = list(side.layers().values())
            layer = every[index % len(every)]
            pair = factors_of(layer, name)
            # Stock cannot add an adapter where one that is active is offloaded: it looks for another file.
            if pair is None or not pair.A.is_meta:
                layer.set_activation(name, is_active)

        self.both(step)


class PeftHistories(Histories):
    """The steps of a `PeftModel`.

    ms-swift has no LoRA for attention modules, and cannot activate adapters of which only some have `modules_to_save`.
    """
    config_class = LoraConfig
    may_be_nested = True
    may_save_modules = True
    ways_to_write = [*Histories.ways_to_write, 'set_peft_model_state_dict', 'load_adapter']

    def build(self, adapters, base):
        return peft_model(adapters, base)

    def wrap(self, side, name, new):
        side.wrappers[0].add_adapter(name, new)

    def configure(self, model, name, new):
        model.peft_config[name] = new

    def load(self, model, folder, names):
        loaded = PeftModel.from_pretrained(model, os.path.join(folder, names[0]), adapter_name=names[0])
        for name in names[1:]:
            loaded.load_adapter(os.path.join(folder, name), adapter_name=name)
        return loaded.eval()

    def write(self, side, name, values, how):
        if how not in ('set_peft_model_state_dict', 'load_adapter'):
            super().write(side, name, values, how)
            return
        model, before = side.wrappers[0], [parameter.detach().clone() for parameter in side.parameters(name)]
        super().write(side, name, values, 'copy_')
        with tempfile.TemporaryDirectory() as folder:
            if how == 'load_adapter':
                for parameter in side.parameters(name):
                    parameter.data = parameter.data.contiguous()
                model.save_pretrained(folder, selected_adapters=[name])
            kept = {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
            super().write(side, name, before, 'copy_')
            if how == 'load_adapter':
                model.load_adapter(os.path.join(folder, name), adapter_name=name)
            else:
                set_peft_model_state_dict(model, kept, adapter_name=name)

    @rule(data=st.data())
    def set_adapter(self, data):
        names = [*self.sources, *self.frozen, *self.fused]
        # PEFT activates no two adapters that have `modules_to_save`.
        most = 1 if self.saves_module else 2
        active = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=most, unique=True), 'adapters')
        self.both(lambda side: side.wrappers[0].base_model.set_adapter(active))

    @rule()
    def disable_all_adapters_for_a_while(self):

        def step(side):
            with side.wrappers[0].disable_adapter():
                outputs(side.wrappers[0])

        self.both(step)

    @precondition(lambda self: self.fused)
    @rule(data=st.data())
    def delete_a_fused_adapter(self, data):
        name = data.draw(st.sampled_from(sorted(self.fused)), 'fused adapter')
        if any(name in layer.merged_adapters for layer in self.patched.layers().values()):
            return
        if self.has_layers_of_zeros() or self.is_stuck(name):
            return
        self.both(lambda side: side.wrappers[0].delete_adapter(name))
        del self.fused[name]
        self.written.discard(name)

    def has_layers_of_zeros(self):
        """Whether PEFT, which activates the first adapter of the first layer after a deletion, finds another one.

        It does where a fused adapter has layers that a fresh one has not, which hold nothing but zeros.
        """
        others = [*self.frozen, *self.fused]
        return any(self.patched.factors(other).keys() != self.stock.factors(other).keys() for other in others)

    def is_stuck(self, name):
        """Whether PEFT, in stock too, fails to delete an adapter: it takes a saved module to have an active one."""
        return any(
            isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save and not module.active_adapters
            for module in self.stock.base().modules())

    @precondition(lambda self: len(self.sources) > 2 and not self.is_merged())
    @rule(data=st.data())
    def delete_a_source(self, data):
        name = data.draw(st.sampled_from(self.sources), 'source')
        if not self.has_layers_of_zeros() and not self.is_stuck(name):
            self.both(lambda side: self.delete(side.wrappers[0], name))
            self.sources.remove(name)

    @staticmethod
    def delete(model, name):
        model.delete_adapter(name)
        if name == model.active_adapter:
            # A PeftModel goes on with a name that is gone, and fails at whatever asks for its config.
            model.set_adapter(next(other for other in model.peft_config if other != name))

    # PEFT cannot unload a model with `modules_to_save` unless exactly one adapter that has them is active.
    @precondition(lambda self: not self.is_merged() and not self.saves_module and self.taken > 4)
    @rule(first=configs, second=configs)
    def unload_and_begin_anew(self, first, second):
        """The base model, with all layers that were put into it, goes on with other adapters."""
        self.frozen, self.fused, self.written, self.composed = [], {}, set(), None
        self.loads += 1
        new = self.new_configs(first, second)
        self.both(lambda side: side.renew([self.build(copy.deepcopy(new), side.wrappers[0].unload())]))


@pytest.mark.hypothesis
@pytest.mark.parametrize('histories', [SwiftHistories, PeftHistories])
def test_after_every_step_of_any_history_the_model_is_as_with_stock(histories, capsys):
    run_state_machine_as_test(
        histories,
        settings=settings(
            tries(GATE_STEPS // STEPS_PER_HISTORY), stateful_step_count=STEPS_PER_HISTORY, phases=[Phase.generate]))
    with capsys.disabled():
        print(f'\n{histories.__name__}: {histories.histories} histories, {histories.steps} steps, 0 differences')
