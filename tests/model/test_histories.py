"""Random histories of one model through the patch, and of its twin through stock: after every step both are the same.

Stock cannot refill: there, for every update, a fresh adapter takes the old one's place. `make fuzz STEPS=...` says how
many steps are tried in each wrapper.
"""
import copy
import logging
import os
import pytest
import tempfile
import torch
from contextlib import contextmanager
from fuzzing import GATE_STEPS, tries
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, precondition, rule,
                                 run_state_machine_as_test)
from models import activate, config, deltas, layers, outputs, peft_model, qwen2, reproducible_masks, stock, swift_model
from peft import LoraConfig, PeftModel
from swift.tuners import LoRAConfig, Swift, SwiftModel
from swift.tuners import utils as swift_utils
from swift.tuners.utils import OffloadHelper, SwiftAdapter
from torch import nn

from swift_patch.compose.composer import FusionComposer
from swift_patch.model import activation
from swift_patch.model.layers import adapter_containers, factors_of

STEPS_PER_HISTORY = 14
SPARSE = ['ties', 'dare_linear', 'dare_ties', 'magnitude_prune']
TYPES = ['linear', 'average', 'cat', 'svd', *SPARSE, *(f'{name}_svd' for name in SPARSE)]

configs = st.fixed_dictionaries(
    {
        'r': st.sampled_from([2, 2, 2, 3]),
        'lora_alpha': st.sampled_from([4, 4, 1]),
        'target_modules': st.sampled_from([['q_proj', 'v_proj'], ['q_proj', 'up_proj', 'down_proj'], ['down_proj']]),
    },
    optional={
        'use_rslora': st.just(True),
        'alpha_pattern': st.just({'q_proj': 6}),
        'rank_pattern': st.just({'down_proj': 2}),
    })
# The same for all adapters: where they differ, stock refuses or crashes.
restrictions = st.sampled_from([{}, {}, {'layers_to_transform': [0]}, {'layers_to_transform': [1]}])
offloads = st.sampled_from([None, None, 'cpu', 'meta'])
which = st.integers(0, 3)


class Side:
    """One of the twins.

    Attributes:
        wrappers: the model, and the further wrappers around it in the order in which they were made.
        helper: the files of what is offloaded. ms-swift names them by adapter and layer alone, for all models.
        composer: a composer of the model, on the patched side.
    """

    def __init__(self, model):
        self.wrappers, self.helper, self.composer = [model], OffloadHelper(), None

    def layers(self):
        return layers(self.wrappers[0])

    def factors(self, adapter):
        """By layer."""
        found = {name: factors_of(layer, adapter) for name, layer in self.layers().items()}
        return {name: pair for name, pair in found.items() if pair is not None}

    def is_offloaded(self):
        return any(parameter.is_meta for parameter in self.wrappers[0].parameters())

    @contextmanager
    def loaded(self, adapters):
        """Within it, what is offloaded of the adapters is on its device."""
        offloaded = [(layer, adapter) for layer in self.layers().values() for adapter in dict.fromkeys(adapters)
                     if (pair := factors_of(layer, adapter)) is not None and pair.A.is_meta]
        for layer, adapter in offloaded:
            layer.save_memory(adapter, True)
        try:
            yield
        finally:
            for layer, adapter in offloaded:
                if factors_of(layer, adapter) is not None:
                    layer.save_memory(adapter, False, 'meta')


class Histories(RuleBasedStateMachine):
    """The steps, for either wrapper.

    Attributes:
        config_class: the class of the configs.
        histories: how many there were, of ten steps or more.
        steps: how many steps there were.
    """
    config_class = None
    histories = 0
    steps = 0

    def __init__(self):
        super().__init__()
        self.environment = pytest.MonkeyPatch()
        # What thousands of histories would log.
        logging.disable()
        # Stock collects garbage per layer, which would be nearly all of the time.
        self.environment.setattr(activation, 'gc_collect', lambda: None)
        self.environment.setattr(swift_utils, 'gc_collect', lambda: None)
        self.sources, self.fused = [], {}
        # Fused adapters that come from a decomposition, whose vectors have any sign: their delta is stock's, their A
        # and B may not be.
        self.decomposed = set()
        # Adapters that were saved and loaded after they had been fused. They may have more rank than fresh ones.
        self.frozen, self.loads = [], 0
        self.dtype, self.is_coarse = torch.float32, False
        self.taken = 0

    def teardown(self):
        type(self).histories += self.taken >= 10
        logging.disable(logging.NOTSET)
        self.environment.undo()

    def config(self, changes):
        return self.config_class(lora_dropout=0.0, **changes, **self.restriction)

    # How both sides take a step.

    def on(self, side, step):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SwiftAdapter, 'offload_helper', side.helper)
            return step(side)

    def both(self, step):
        self.on(self.patched, step)
        with stock():
            self.on(self.stock, step)

    def merge(self, name, sources, weights, kind, options, step):
        """Takes a step that merges, and has stock's fresh adapter take the place of `name`; unless it is refused."""
        merged = {adapter for layer in self.patched.layers().values() for adapter in layer.merged_adapters}
        if not merged.isdisjoint([*sources, name]):
            with pytest.raises(ValueError):
                self.on(self.patched, step)
            return False
        if kind == 'average':
            # Of weights that are not negative, `average` is what stock's `linear` makes of their squares.
            if config(self.stock.wrappers[0], sources[0]).use_rslora:
                # Its stand-in would have √r in its scaling.
                return False
            weights = [weight**2 for weight in weights]
        try:
            with stock():
                self.on(self.stock, lambda side: self.replace(side, name, sources, weights, kind, options))
        except (ValueError, RuntimeError):
            # RuntimeError: where ranks differ in single layers.
            with pytest.raises(ValueError):
                self.on(self.patched, step)
            return False
        self.on(self.patched, step)
        is_decomposed = kind.endswith('svd') or not self.decomposed.isdisjoint(sources)
        (self.decomposed.add if is_decomposed else self.decomposed.discard)(name)
        return True

    def replace(self, side, name, sources, weights, kind, options):
        kind = 'linear' if kind == 'average' else kind
        with side.loaded([name, *sources]), reproducible_masks():
            twin = copy.deepcopy(side.wrappers[0])
            twin.add_weighted_adapter(sources, weights, 'fresh', kind, **options)
        if name not in self.fused:
            with side.loaded(sources), reproducible_masks():
                side.wrappers[0].add_weighted_adapter(sources, weights, name, kind, **options)
            return
        with side.loaded([name]):
            for layer_name, layer in side.layers().items():
                containers = adapter_containers(layer)
                for attribute, container in adapter_containers(layers(twin)[layer_name]).items():
                    if 'fresh' in container:
                        containers[attribute][name] = container['fresh']
                    elif name in containers.get(attribute, ()):
                        del containers[attribute][name]
        self.configure(side.wrappers[0], name, config(twin, 'fresh'))

    def make_savable(self, side, name):
        """Mends what stock leaves of a fused adapter: tensors that cannot be saved, one rank for all layers."""
        described = config(side.wrappers[0], name)
        described.rank_pattern, described.alpha_pattern = {}, {}
        for layer_name, pair in side.factors(name).items():
            rank, scaling = pair.A.shape[0], side.layers()[layer_name].scaling[name]
            key = layer_name[layer_name.index('model.layers'):]
            described.rank_pattern[key] = rank
            described.alpha_pattern[key] = scaling * (rank**0.5 if described.use_rslora else rank)
            for parameter in pair:
                parameter.data = parameter.data.contiguous()

    def draw_merge(self, data, name):
        kind = data.draw(st.sampled_from(TYPES), 'combination type')
        candidates = [
            *self.sources,
            # As a source, an average has its own scaling, and its stand-in has 1, which matters to the others.
            *(other for other, (other_kind, _) in self.fused.items()
              if other != name and (other_kind != 'average' or kind in ('linear', 'average', 'cat')) and
              (other not in self.decomposed or kind == 'cat' or kind.endswith('svd')))
        ]
        if kind == 'cat':
            candidates += self.frozen
        elif self.is_coarse and kind.startswith(tuple(SPARSE)):
            # In bfloat16 many values are equal, and rounding decides which of them a sparse type keeps.
            candidates = self.sources
        sources = data.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=3), 'sources')
        # Never two that cancel out: what is left then is rounding.
        numbers = [0.5, 0.3, 1.0, 0.0] if kind == 'average' else [0.5, 0.3, 1.0, 0.0, -0.7]
        weights = [data.draw(st.sampled_from(numbers)) for _ in sources]
        options = {}
        if kind.startswith(tuple(SPARSE)):
            options['density'] = data.draw(st.sampled_from([0.3, 0.7, 1.0]))
        if 'ties' in kind and data.draw(st.booleans()):
            options['majority_sign_method'] = 'frequency'
        # Of a larger rank than a layer has features, stock makes an adapter that does not run.
        is_too_wide = max(config(self.stock.wrappers[0], source).r for source in sources) > 8
        if kind.endswith('svd') and (is_too_wide or data.draw(st.booleans())):
            options['svd_rank'] = data.draw(st.integers(1, 4))
        return sources, weights, kind, options

    # The steps.

    @initialize(first=configs, second=configs, restriction=restrictions)
    def begin(self, first, second, restriction):
        self.sources, self.restriction = ['l0', 'l1'], restriction
        self.patched, self.stock = (
            Side(self.build({
                'l0': self.config(first),
                'l1': self.config(second)
            })) for _ in range(2))

    @precondition(lambda self: len(self.sources) < 5)
    @rule(changes=configs, seed=st.integers(0, 9))
    def wrap_again_with_a_new_adapter(self, changes, seed):
        name = f'l{len(self.sources)}'

        def step(side):
            self.wrap(side, name, self.config(changes))
            generator = torch.Generator().manual_seed(seed)
            for pair in side.factors(name).values():
                for parameter in pair:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

        self.both(step)
        self.sources.append(name)

    @precondition(lambda self: len(self.fused) < 3)
    @rule(data=st.data())
    def add_weighted_adapter(self, data):
        name = f'f{type(self).steps}'
        sources, weights, kind, options = self.draw_merge(data, name)

        def step(side):
            with reproducible_masks():
                side.wrappers[0].add_weighted_adapter(sources, weights, name, kind, **options)

        if self.merge(name, sources, weights, kind, options, step):
            self.fused[name] = (kind, options)

    @precondition(lambda self: self.fused)
    @rule(data=st.data())
    def update_weighted_adapter(self, data):
        name = data.draw(st.sampled_from(sorted(self.fused)), 'fused adapter')
        sources, weights, kind, options = self.draw_merge(data, name)

        def step(side):
            with reproducible_masks():
                side.wrappers[-1].update_weighted_adapter(sources, weights, name, kind, **options)

        if self.merge(name, sources, weights, kind, options, step):
            self.fused[name] = (kind, options)

    @precondition(lambda self: self.fused)
    @rule(data=st.data())
    def update_as_before_with_other_sources(self, data):
        name = data.draw(st.sampled_from(sorted(self.fused)), 'fused adapter')
        kind, options = self.fused[name]
        sources = data.draw(st.lists(st.sampled_from(self.sources), min_size=1, max_size=3), 'sources')
        weights = [data.draw(st.sampled_from([0.5, 0.3])) for _ in sources]

        def step(side):
            with reproducible_masks():
                side.wrappers[-1].update_weighted_adapter(sources, weights, name)

        self.merge(name, sources, weights, kind, options, step)

    @precondition(lambda self: len(self.fused) < 4)
    @rule(sources=st.lists(st.integers(0, 4), min_size=1, max_size=3), repeat=st.booleans())
    def compose(self, sources, repeat):
        sources = [self.sources[index % len(self.sources)] for index in sources]
        weights = [0.5, 0.3, 0.7][:len(sources)]
        if any(layer.merged for layer in self.patched.layers().values()):
            # Stricter than an update: nothing that is composed takes effect in a merged layer.
            return

        name = f'composed{self.loads}'

        def step(side):
            if side.composer is None:
                side.composer = FusionComposer(side.wrappers[0], combination_type='cat', adapter_name=name)
            for _ in range(1 + repeat):
                side.composer.compose(sources, weights)

        if self.merge(name, sources, weights, 'cat', {}, step):
            self.fused[name] = ('cat', {})
            with stock():
                self.on(self.stock, lambda side: activate(side.wrappers[0], name))

    @rule(data=st.data(), how=st.sampled_from(['copy_', 'data', 'parameter', 'load', 'assign']), seed=st.integers(0, 9))
    def change_the_values_of_a_source(self, data, how, seed):
        name = data.draw(st.sampled_from(self.sources), 'source')

        def step(side):
            generator = torch.Generator().manual_seed(seed)
            model, values = side.wrappers[0].base_model, {}
            for key, parameter in list(model.named_parameters()):
                if f'.{name}.' not in key or parameter.is_meta:
                    continue
                values[key] = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
                if how == 'copy_':
                    with torch.no_grad():
                        parameter.copy_(values[key])
                elif how == 'data':
                    parameter.data = values[key]
                elif how == 'parameter':
                    module, _, attribute = key.rpartition('.')
                    setattr(
                        model.get_submodule(module), attribute,
                        nn.Parameter(values[key], requires_grad=parameter.requires_grad))
            if how in ('load', 'assign'):
                model.load_state_dict(values, strict=False, assign=how == 'assign')

        self.both(step)

    @rule(data=st.data(), factor=st.sampled_from([0.5, 2.0]))
    def change_the_scaling_of_a_source(self, data, factor):
        name = data.draw(st.sampled_from(self.sources), 'source')
        self.both(
            lambda side: [layer.set_scale(name, factor) for layer in side.layers().values() if name in layer.scaling])

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.float64, torch.bfloat16]))
    def cast(self, dtype):
        self.both(lambda side: side.wrappers[0].to(dtype))
        self.dtype, self.is_coarse = dtype, self.is_coarse or dtype == torch.bfloat16

    @rule()
    def deepcopy(self):

        def step(side):
            side.wrappers, side.composer = copy.deepcopy(side.wrappers), None

        self.both(step)

    @precondition(lambda self: not self.patched.is_offloaded() and not any(layer.merged
                                                                           for layer in self.patched.layers().values()))
    @rule()
    def save_and_load(self):
        names = [*self.sources, *self.frozen, *self.fused]

        def step(side):
            if side is self.stock:
                for name in self.fused:
                    self.make_savable(side, name)
            with tempfile.TemporaryDirectory() as folder:
                side.wrappers[0].save_pretrained(folder)
                side.wrappers, side.composer = [self.load(qwen2(2, 16).to(self.dtype), folder, names)], None
            for name in names:
                # Stock cannot merge what it has loaded, since its target modules are a list then.
                config(side.wrappers[0], name).target_modules = set(config(side.wrappers[0], name).target_modules)

        self.both(step)
        self.frozen, self.fused, self.loads = [*self.frozen, *self.fused], {}, self.loads + 1

    @precondition(lambda self: not self.patched.is_offloaded())
    @rule()
    def merge_into_the_base_weights(self):
        if any(
                self.patched.factors(name).keys() != self.stock.factors(name).keys()
                for name in [*self.fused, *self.frozen]):
            # A layer into which nothing but zeros is merged is merged all the same: PEFT ignores other adapters there.
            return
        self.both(lambda side: Swift.merge(side.wrappers[0].base_model))

    @rule()
    def unmerge(self):
        self.both(lambda side: Swift.unmerge(side.wrappers[0].base_model))

    # What must hold.

    @invariant()
    def both_are_the_same(self):
        if not self.sources:
            return
        self.taken += 1
        type(self).steps += 1
        patched, oracle = self.patched.wrappers, self.stock.wrappers
        assert [model.active_adapters for model in patched] == [model.active_adapters for model in oracle]
        for (name, layer), other in zip(self.patched.layers().items(), self.stock.layers().values()):
            assert set(layer.active_adapters) == set(other.active_adapters), name
            assert layer.merged_adapters == other.merged_adapters, name
        for adapter in [*self.sources, *self.frozen, *self.fused]:
            old, new = self.stock.factors(adapter), self.patched.factors(adapter)
            # Where the fused adapter has layers that a fresh one has not, they are zero.
            assert old.keys() <= new.keys()
            # Whether a fresh adapter is frozen or offloaded is stock's business; an update leaves it as it is.
            for layer, pair in old.items() if adapter not in self.fused else ():
                for parameter, other in zip(new[layer], pair):
                    assert parameter.device == other.device, (adapter, layer)
                    assert parameter.requires_grad == other.requires_grad, (adapter, layer)
            if not any(pair.A.is_meta for pair in (*old.values(), *new.values())):
                new_deltas, old_deltas = deltas(patched[0], adapter), deltas(oracle[0], adapter)
                for layer in new_deltas.keys() | old_deltas.keys():
                    self.assert_close(new_deltas.get(layer), old_deltas.get(layer), (adapter, layer))
        results = []
        for model in (patched[0], oracle[0]):
            try:
                results.append(outputs(model))
            except Exception as e:
                # The layer of an adapter that was offloaded only where it was inactive.
                results.append(str(e))
        if isinstance(results[1], str):
            assert results[0] == results[1]
        else:
            # In bfloat16, the same delta in factors that are scaled by 1.3 and 1 / 1.3 changes outputs by up to 11 %.
            self.assert_close(*results, 'outputs', coarse=0.25)

    def assert_close(self, new, old, what, coarse=0.05):
        new, old = (value if value is not None else torch.zeros(()) for value in (new, old))
        assert (new - old).norm() <= (coarse if self.is_coarse else 1e-4) * old.norm() + 1e-6, what


class SwiftHistories(Histories):
    """The steps of a `SwiftModel`."""
    config_class = LoRAConfig

    def build(self, adapters):
        return swift_model(adapters, qwen2(2, 16))

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
    """The steps of a `PeftModel`."""
    config_class = LoraConfig

    def build(self, adapters):
        return peft_model(adapters, qwen2(2, 16))

    def wrap(self, side, name, new):
        side.wrappers[0].add_adapter(name, new)

    def configure(self, model, name, new):
        model.peft_config[name] = new

    def load(self, model, folder, names):
        loaded = PeftModel.from_pretrained(model, os.path.join(folder, names[0]), adapter_name=names[0])
        for name in names[1:]:
            loaded.load_adapter(os.path.join(folder, name), adapter_name=name)
        return loaded.eval()

    @rule(data=st.data())
    def set_adapter(self, data):
        names = [*self.sources, *self.frozen, *self.fused]
        active = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True), 'adapters')
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
        others = [*self.frozen, *self.fused]
        if any(self.patched.factors(other).keys() != self.stock.factors(other).keys() for other in others):
            # PEFT activates the first adapter of the first layer then, also where it holds nothing but zeros there.
            return
        self.both(lambda side: side.wrappers[0].delete_adapter(name))
        del self.fused[name]


@pytest.mark.hypothesis
@pytest.mark.parametrize('histories', [SwiftHistories, PeftHistories])
def test_after_every_step_of_any_history_the_model_is_as_with_stock(histories, capsys):
    run_state_machine_as_test(
        histories,
        settings=settings(
            tries(GATE_STEPS // STEPS_PER_HISTORY), stateful_step_count=STEPS_PER_HISTORY, phases=[Phase.generate]))
    with capsys.disabled():
        print(f'\n{histories.__name__}: {histories.histories} histories, {histories.steps} steps, 0 differences')
