"""Whatever is passed, only the documented exceptions come, they name what was wrong, and nothing has changed."""
import collections
import copy
import numpy as np
import pytest
import reprlib
import torch
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from models import (BUILDERS, SOURCES, WEIGHTS, activate, add, assert_same_state, config, deltas, layers, loras, qwen2,
                    state, stock, swift_model, update)
from numbers import Integral, Real
from peft import PromptTuningConfig, get_peft_model
from swift.tuners import SwiftModel
from torch import nn

from swift_patch.compose.composer import FusionComposer
from swift_patch.model.adapters import Adapters


class Boom(Exception):
    """What a hostile object raises."""


def hostile(*methods):
    """An object of which these methods raise."""

    def boom(*args):
        raise Boom

    return type('Hostile', (), {'__hash__': lambda self: hash('l0'), **dict.fromkeys(methods, boom)})()


class Drawn:
    """A drawn value, so that hypothesis never prints or compares what is hostile."""

    def __init__(self, value, label=None):
        self.value, self.label = value, label or reprlib.repr(value)

    def __repr__(self):
        return f'Drawn({self.label})'


METHODS = ('__repr__', '__eq__', '__ne__', '__hash__', '__bool__', '__len__', '__iter__', '__getitem__', '__contains__',
           '__float__', '__int__', '__index__', '__lt__', '__le__', '__getattr__', '__mul__', '__rmul__')
# By label, what hypothesis would not make.
ODD = {
    **{
        f'hostile {method}': hostile(method)
        for method in METHODS
    },
    'hostile': hostile(*METHODS),
    'hostile iterator': hostile('__repr__', '__next__'),
    'an int beyond floats': 10**400,
    'a negative int beyond floats': -10**400,
    'an int without a repr': 10**5000,
    'a rank beyond memory': 10**9,
    'infinity': 1e400,
    'nan': float('nan'),
    'a long string': 'x' * 10**6,
    'a string of a dot': 'l0.l1',
    'nearly a name': 'l0 ',
    'nearly a type': 'Linear',
    'half a surrogate pair': '\ud800',
    'a name of torch': 'keys',
    'long bytes': b'x' * 10**6,
    'many lists': [[]] * 10**5,
    'a wide dict': dict.fromkeys(range(10**5)),
    'a mapping of a name that is none': {
        'nobody': 0.5
    },
    'an empty dict': {},
    'an empty set': set(),
    'an empty iterator': iter(()),
    'a range': range(3),
    'an object': object(),
    'a function': len,
    'a class': SwiftModel,
    'a module': nn.Linear(1, 1),
    'an exception': ValueError('x'),
    'ellipsis': ...,
    'a deque of nothing': collections.deque(),
    'np complex': np.complex128(1 + 1j),
    'np bool': np.True_,
    'np string': np.str_('0.5'),
    'np date': np.datetime64('2020'),
    'np of none': np.array(None),
    'np of a string': np.array('a'),
    'np of three': np.zeros(3),
    'np empty': np.zeros((0, )),
    'np matrix': np.ones((2, 2)),
    'np large': np.ones(10**6),
    'tensor of three': torch.zeros(3),
    'tensor of one': torch.ones(1),
    'tensor empty': torch.zeros(0),
    'tensor matrix': torch.ones(2, 2),
    'tensor bool': torch.tensor(True),
    'tensor complex': torch.tensor(1j),
    'tensor without values': torch.tensor(0.5, device='meta'),
    'tensor nan': torch.tensor(float('nan')),
}
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.decimals(),
                    st.fractions(), st.binary(max_size=20), TEXT)
# No dict of more than one key: messages sort them.
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(TEXT, inner, max_size=1),
    max_leaves=6)
JUNK = st.one_of(st.sampled_from(sorted(ODD)).map(lambda label: Drawn(ODD[label], label)), NESTED.map(Drawn))

# PEFT multiplies with float32.
MAX = float(np.finfo(np.float32).max)


def is_number(value, low=float('-inf'), high=float('inf')):
    """Whether `value` is one of the numbers that shall work."""
    try:
        if isinstance(value, (np.ndarray, torch.Tensor)) and value.shape == ():
            value = value.item()
        return isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high
    except Exception:
        return False


def is_weights(value):
    """Whether `value` are two weights that shall work."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(is_number(item, -MAX, MAX) for item in value)


def is_new_name(value):
    """Whether a new adapter may have the name `value`."""
    return isinstance(value, str) and value != '' and '.' not in value and value != 'keys'


# By argument, what is not wrong.
RIGHT = {
    'adapters':
    lambda value: False,
    'weights':
    is_weights,
    'combination_type':
    lambda value: isinstance(value, str) and value in ('svd', 'linear'),
    'svd_rank':
    lambda value: value is None or
    (isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value <= 2**16),
    'svd_clamp':
    lambda value: value is None or is_number(value, 0, 1),
    'svd_full_matrices':
    lambda value: isinstance(value, bool),
    'svd_driver':
    lambda value: value is None,
    'density':
    lambda value: value is None or is_number(value, 0, 2**31),
    'majority_sign_method':
    lambda value: isinstance(value, str) and value in ('total', 'frequency'),
}
# Of `update_weighted_adapter`, None is the type of before.
UPDATE = {
    **RIGHT,
    'adapter_name': lambda value: isinstance(value, str) and value == 'fused',
    'combination_type': lambda value: value is None or RIGHT['combination_type'](value),
}
ADD = {**RIGHT, 'adapter_name': is_new_name}
OPTIONS = {name: RIGHT[name] for name in RIGHT if name not in ('adapters', 'weights', 'svd_full_matrices')}
OPTIONS['combination_type'] = UPDATE['combination_type']
CONSTRUCTOR = {
    **OPTIONS,
    'merge_method': lambda value: isinstance(value, str) and value in ('fusion', 'mixture', 'selection'),
    'adapter_name': is_new_name,
}
COMPOSE = {'adapters': RIGHT['adapters'], 'weights': lambda value: value is None or is_weights(value)}
RESERVE = {
    'adapters': lambda value: value is None,
    'max_sources': lambda value: value is None or isinstance(value, Integral) and value is not True and value > 0,
}


def junk_but(is_right):
    """Values that are wrong."""
    return JUNK.filter(lambda junk: not is_right(junk.value))


def wrong(arguments, at_once=1):
    """By name, some of the arguments, each with a wrong value."""
    names = st.lists(st.sampled_from(sorted(arguments)), min_size=at_once, max_size=at_once, unique=True)
    values = names.flatmap(lambda names: st.fixed_dictionaries({name: junk_but(arguments[name]) for name in names}))
    return values.map(lambda values: Drawn({name: drawn.value for name, drawn in values.items()}, values))


def is_named(argument, value, message):
    """Whether the message tells the argument and what was found."""
    word = 'adapter' if argument.startswith('adapter') else argument
    return word in message.lower() and any(text in message for text in texts(value))


def texts(value):
    """What a message may show of a value: the begin of its repr or of an item's, or how many items there are."""
    for found in (value, *items(value)):
        try:
            text = repr(found)
        except Exception:
            text = type(found).__name__
        yield text if isinstance(found, (str, float, bool)) and len(text) <= 80 else text[:6]
    yield f'{len(items(value))} weights'
    if not items(value):
        yield 'found none in'


def items(value):
    """The items of what has any."""
    try:
        return [] if isinstance(value, (str, bytes)) else list(value)
    except Exception:
        return []


def everything(model):
    """All that a refused call may not change."""
    loaded = Adapters.of(model if isinstance(model, SwiftModel) else model.base_model)
    return {
        **state(model),
        'configs': [(name, id(config), repr(config)) for name, config in loaded.configs.items()],
        'records': {
            name: loaded.record_or_none(name)
            for name in loaded.configs
        },
        'active': list(model.active_adapters),
        'training': [module.training for module in model.modules()],
    }


class Untouched:
    """A model with a fused adapter, which no test changes.

    Not a tuple with all that it holds, which hypothesis would print.
    """

    def __init__(self, build):
        self.build = build
        self.renew()

    def renew(self):
        """Makes the model anew."""
        self.model = self.build()
        add(self.model)
        self.before = everything(self.model)

    def refuses(self, call, wrong):
        """Asserts that a call is refused as documented, for one of the wrong arguments, and changes nothing."""
        try:
            with pytest.raises((TypeError, ValueError)) as e:
                call()
            message = str(e.value)
            # Not by something that happens to be a ValueError, like one of Unicode.
            assert e.type in (TypeError, ValueError), repr(e.value)
            assert len(message) < 1500
            assert any(is_named(name, value, message) for name, value in wrong.items()), message
            self.is_unchanged()
        except BaseException:
            # What this test changed shall fail no other.
            self.renew()
            raise

    def is_unchanged(self):
        """Asserts that the model holds what it held."""
        assert_same_state(everything(self.model), self.before)


@pytest.fixture(scope='module', params=['swift', 'peft'])
def shared(request):
    """The model of all tests that change nothing, in both wrappers."""
    return Untouched(BUILDERS[request.param])


VALID = {'adapters': ['l0', 'l1'], 'weights': [0.5, 0.5]}
MANY, SOME = tries(80), tries(30)
COMPOSERS = st.sampled_from(['fusion', 'mixture', 'selection'])


@MANY
@given(wrong=wrong(UPDATE))
def test_a_wrong_argument_of_update_is_refused(shared, wrong):
    arguments = {**VALID, 'adapter_name': 'fused', 'combination_type': 'svd', **wrong.value}
    shared.refuses(lambda: shared.model.update_weighted_adapter(**arguments), wrong.value)


@MANY
@given(wrong=wrong(UPDATE))
def test_a_wrong_argument_of_update_with_the_type_of_before_is_refused(shared, wrong):
    arguments = {**VALID, 'adapter_name': 'fused', **wrong.value}
    shared.refuses(lambda: shared.model.update_weighted_adapter(**arguments), wrong.value)


@MANY
@given(wrong=wrong(ADD))
def test_a_wrong_argument_of_add_is_refused(shared, wrong):
    arguments = {**VALID, 'adapter_name': 'new', **wrong.value}
    shared.refuses(lambda: shared.model.add_weighted_adapter(**arguments), wrong.value)


@SOME
@given(wrong=wrong(RIGHT, 4))
def test_several_wrong_arguments_are_refused(shared, wrong):
    arguments = {**VALID, **wrong.value}
    shared.refuses(lambda: shared.model.update_weighted_adapter(adapter_name='fused', **arguments), wrong.value)
    shared.refuses(lambda: shared.model.add_weighted_adapter(adapter_name='new', **arguments), wrong.value)


# What chance would seldom draw, and what looks right.
NEARLY_RIGHT = [
    ('adapters', b'l0'),
    ('adapters', ('l0', 'L1')),
    ('adapters', {
        'l0': 0.5
    }),
    ('weights', {
        0.5: 'l0',
        0.25: 'l1'
    }),
    ('weights', {0.5, 0.25}),
    ('weights', [0.5, True]),
    ('weights', [0.5, np.True_]),
    ('weights', [0.5, torch.tensor(True)]),
    ('weights', [0.5, np.complex64(1)]),
    ('weights', [0.5, Decimal('0.5')]),
    ('weights', [0.5, MAX * 1.01]),
    ('weights', [0.5, Fraction(10**400)]),
    ('weights', [0.5, torch.tensor(float('inf'))]),
    ('adapter_name', 'keys'),
    ('adapter_name', 'T_destination'),
    ('adapter_name', 'new.one'),
    ('adapter_name', ''),
    ('combination_type', 'SVD'),
    ('svd_rank', 10**9),
    ('svd_rank', 2**16 + 1),
    ('svd_rank', True),
    ('svd_rank', 2.0),
    ('svd_clamp', 1 + 1e-9),
    ('svd_clamp', True),
    ('svd_full_matrices', 1),
    ('svd_driver', 'cpu'),
    ('density', -1e-300),
    ('density', 10**400),
    ('majority_sign_method', 'Total'),
]


@pytest.mark.parametrize('argument, value', NEARLY_RIGHT, ids=lambda value: reprlib.repr(value))
def test_what_is_nearly_right_is_refused(shared, argument, value):
    arguments = {**VALID, 'adapter_name': 'new', argument: value}
    shared.refuses(lambda: shared.model.add_weighted_adapter(**arguments), {argument: value})
    if argument != 'adapter_name':
        arguments['adapter_name'] = 'fused'
        shared.refuses(lambda: shared.model.update_weighted_adapter(**arguments), {argument: value})
    if argument in CONSTRUCTOR:
        shared.refuses(lambda: FusionComposer(shared.model, **{argument: value}), {argument: value})


@pytest.mark.parametrize('max_sources', [0, -1, True, 1.0, '1', float('inf')])
def test_a_number_of_sources_that_is_none_is_refused(shared, max_sources):
    composer = FusionComposer(shared.model, 'mixture', adapter_name='other')
    shared.refuses(lambda: composer.reserve(max_sources=max_sources), {'max_sources': max_sources})


@MANY
@given(wrong=wrong(CONSTRUCTOR))
def test_a_wrong_argument_of_the_composer_is_refused(shared, wrong):
    shared.refuses(lambda: FusionComposer(shared.model, **wrong.value), wrong.value)


@SOME
@given(junk=JUNK)
def test_what_is_no_model_with_loras_is_refused(shared, junk):
    with pytest.raises(TypeError, match=f'model is expected to be .*found {type(junk.value).__name__}'):
        FusionComposer(junk.value)
    shared.is_unchanged()


@pytest.mark.parametrize('make, found', [
    (lambda: qwen2(), 'Qwen2ForCausalLM'),
    (lambda: SwiftModel, 'type'),
    (lambda: get_peft_model(qwen2(), PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=2)), 'PeftModel'),
])
def test_what_is_nearly_a_model_with_loras_is_refused(make, found):
    with pytest.raises(TypeError, match=f'model is expected to be .*found {found}'):
        FusionComposer(make())


@MANY
@given(method=COMPOSERS, name=st.sampled_from(['fused', 'other']), wrong=wrong(COMPOSE))
def test_a_wrong_argument_of_compose_is_refused(shared, method, name, wrong):
    composer = FusionComposer(shared.model, method, adapter_name=name)
    arguments = {**VALID, **wrong.value}
    # Weights that are right are wrong beside a mapping.
    named = arguments if isinstance(arguments['adapters'], dict) else wrong.value
    shared.refuses(lambda: composer.compose(**arguments), named)
    shared.refuses(lambda: composer.fused(**arguments).__enter__(), named)


@SOME
@given(method=COMPOSERS, junk=junk_but(lambda value: is_number(value, -MAX, MAX)))
def test_a_wrong_weight_or_name_in_a_mapping_or_a_list_is_refused(shared, method, junk):
    composer = FusionComposer(shared.model, method, adapter_name='other')
    shared.refuses(lambda: composer.compose({'l0': 0.5, 'l1': junk.value}), {'weights': junk.value})
    shared.refuses(lambda: composer.compose(['l0', 'l1'], [0.5, junk.value]), {'weights': junk.value})
    shared.refuses(lambda: composer.compose(['l0', junk.value]), {'adapters': junk.value})
    shared.refuses(lambda: composer.compose({'l0': 0.5}, weights=[junk.value]), {'weights': [junk.value]})


@SOME
@given(junk=JUNK)
def test_without_weights_and_without_sources_is_refused_too(shared, junk):
    composer = FusionComposer(shared.model)
    named = {'adapters': junk.value}
    if isinstance(junk.value, dict):
        named['weights'] = list(junk.value.values())
    shared.refuses(lambda: composer.compose(junk.value), named)


@MANY
@given(method=COMPOSERS, name=st.sampled_from(['fused', 'other']), wrong=wrong(RESERVE))
def test_a_wrong_argument_of_reserve_is_refused(shared, method, name, wrong):
    composer = FusionComposer(shared.model, method, adapter_name=name)
    shared.refuses(lambda: composer.reserve(**wrong.value), wrong.value)


def test_a_refused_fused_block_is_held_by_nobody(shared):
    composer = FusionComposer(shared.model)
    with pytest.raises(ValueError, match='nobody'):
        composer.fused(['nobody']).__enter__()
    with pytest.raises(ValueError, match='someone'):
        composer.compose(['someone'])
    shared.is_unchanged()


@pytest.mark.parametrize('name', ['SwiftModel', 'PeftModel'])
def test_an_unknown_source_of_a_selection_is_refused_though_another_is_taken(shared, name):
    composer = FusionComposer(shared.model, 'selection')
    shared.refuses(lambda: composer.compose({'l0': 0.9, name: 0.1}), {'adapters': name})


@pytest.mark.parametrize('combination_type', ['svd', 'dare_linear_svd'])
def test_weights_whose_sum_is_not_finite_cannot_be_decomposed(shared, combination_type):
    options = {'density': 1.0} if 'dare' in combination_type else {}
    for weights in ([3e38, 1.0], [3e38, -3e38]):
        for method, name in ((shared.model.update_weighted_adapter, 'fused'), (shared.model.add_weighted_adapter,
                                                                               'new')):
            shared.refuses(lambda: method(['l0', 'l1'], weights, name, combination_type, **options),
                           {'weights': weights})


# What is odd, but right.

ODD_LISTS = {
    'tuple': tuple,
    'iterator': iter,
    'generator': lambda values: (value for value in values),
    'dict view': lambda values: {
        i: value
        for i, value in enumerate(values)
    }.values(),
    'deque': collections.deque,
    'map': lambda values: map(lambda value: value, values),
    'numpy': np.array,
}
ODD_NUMBERS = {
    'np.float16': np.float16,
    'np.float32': np.float32,
    'np.float64': np.float64,
    'np.longdouble': np.longdouble,
    'numpy without dimensions': np.array,
    'tensor': torch.tensor,
    'bfloat16': lambda value: torch.tensor(value, dtype=torch.bfloat16),
    'parameter': lambda value: nn.Parameter(torch.tensor(value)),
    'Fraction': Fraction,
}


@pytest.mark.parametrize('odd', [*ODD_LISTS, *ODD_NUMBERS])
def test_any_list_of_names_and_any_kind_of_numbers_is_right(odd):
    # Exact in all of them.
    weights = [0.5, -0.25, 2.0]
    as_list, as_number = ODD_LISTS.get(odd, list), ODD_NUMBERS.get(odd, float)
    models = [BUILDERS['peft'](), BUILDERS['peft']()]
    for model, names, numbers, rank, density in ((models[0], SOURCES, weights, 3, 0.5),
                                                 (models[1], as_list(SOURCES),
                                                  as_list([as_number(weight)
                                                           for weight in weights]), np.int64(3), as_number(0.5))):
        model.add_weighted_adapter(
            names, numbers, 'fused', 'ties_svd', svd_rank=rank, density=density, svd_clamp=density)
        assert type(config(model, 'fused').r) is int
    for name, delta in deltas(models[0], 'fused').items():
        assert torch.equal(deltas(models[1], 'fused')[name], delta)
    composer = FusionComposer(models[1], combination_type='magnitude_prune', density=as_number(0.5))
    composer.compose(as_list(SOURCES), as_list([as_number(weight) for weight in weights]))
    composer.reserve(as_list(SOURCES), max_sources=np.int64(2))
    update(models[0], SOURCES, weights, 'magnitude_prune', density=0.5)
    for name, delta in deltas(models[0], 'fused').items():
        assert torch.equal(deltas(models[1], 'fused')[name], delta)


def test_views_of_a_mapping_are_names_and_weights(model):
    weights = dict(zip(SOURCES, WEIGHTS))
    composer = FusionComposer(model)
    composer.compose(collections.OrderedDict(weights))
    expected = deltas(model, 'fused')
    composer.compose(['l3'])
    composer.compose(weights.keys(), weights.values())
    for name, delta in deltas(model, 'fused').items():
        assert torch.equal(delta, expected[name])


def test_odd_names_of_new_adapters_are_right(model):
    add(model, SOURCES, WEIGHTS)
    expected = deltas(model, 'fused')
    for name in ('weight', 'lora_A', 'base_layer', '0', ' ', 'ü', '\ud800', 'a/b', 'x' * 300):
        add(model, ['l3'], [1.0], name=name)
        update(model, SOURCES, WEIGHTS, name=name)
        found = deltas(model, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[layer], delta) for layer, delta in expected.items())


# Activation: what stock does.

NAMES = st.one_of(
    JUNK,
    st.lists(st.sampled_from(['l0', 'l1', 'fused', 'nobody', 'L0', 'l0 ', '', None, 3]), max_size=3).map(Drawn))
OFFLOADS = st.one_of(st.just(Drawn(None)), junk_but(lambda value: isinstance(value, str) and value in ('cpu', 'meta')))


@pytest.fixture(scope='module')
def twins():
    """Two equal `SwiftModel`s, for the patch and for stock."""
    model = swift_model(loras())
    add(model)
    return model, copy.deepcopy(model)


def outcome(model, call):
    """The exception of a call, and what is active then."""
    try:
        call()
        error = None
    except Exception as e:
        error = type(e)
    return error, set(model.active_adapters), [set(layer.active_adapters) for layer in layers(model).values()]


@MANY
@given(method=st.sampled_from(['set_active_adapters', 'activate_adapter', 'deactivate_adapter']), names=NAMES)
def test_unknown_names_are_activated_as_in_stock(twins, method, names):
    found = []
    for model, applied in zip(twins, (nullcontext, stock)):
        activate(model, 'fused')
        with applied():
            found.append(outcome(model, lambda: getattr(model, method)(names.value)))
    assert found[0] == found[1]


@SOME
@given(names=st.lists(st.sampled_from(['l0', 'l1', 'nobody']), max_size=3), offload=OFFLOADS)
def test_where_adapters_cannot_be_offloaded_to_is_refused_as_in_stock_and_nothing_changes(twins, names, offload):
    for method in ('set_active_adapters', 'deactivate_adapter'):
        for arguments in (names, ) if method == 'set_active_adapters' else ('l0', 'fused', 'nobody'):
            found = []
            for model, applied in zip(twins, (nullcontext, stock)):
                activate(model, ['fused', 'l0'])
                before = everything(model)
                with applied():
                    found.append(outcome(model, lambda: getattr(model, method)(arguments, offload=offload.value)))
                if applied is nullcontext and found[0][0] is not None:
                    assert_same_state(everything(model), before)
            assert found[0][0] == found[1][0]
            if found[0][0] is None:
                assert found[0] == found[1]


def test_the_message_about_offload_names_it(twins):
    with pytest.raises(NotImplementedError, match="offload is expected to be 'cpu' or 'meta', found 'gpu'"):
        twins[0].set_active_adapters(['l0'], offload='gpu')
    with pytest.raises(NotImplementedError) as e:
        twins[0].deactivate_adapter('l0', offload='x' * 10**6)
    assert len(str(e.value)) < 500
