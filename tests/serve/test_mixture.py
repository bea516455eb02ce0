"""A request says what it asks for in several ways, of which each means one thing or is refused with the reason."""
import pytest
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from types import SimpleNamespace

from swift_patch.serve.errors import RequestError
from swift_patch.serve.mixture import Mixture, asked_for

NAMES = ['sql', 'math', 'a=b', 'x,y', 'merge_method=fusion']


def asked(model='base', **fields):
    return asked_for(model, 'base', NAMES, **fields)


def lora(**scales):
    return [SimpleNamespace(name=name, scale=scale) for name, scale in scales.items()]


@pytest.mark.parametrize(('found', 'expected'), [
    (lambda: asked(), Mixture()),
    (lambda: asked(adapters=[]), Mixture()),
    (lambda: asked('sql'), Mixture(('sql', ))),
    (lambda: asked('sql,math'), Mixture(('sql', 'math'))),
    (lambda: asked('sql=0.6, math=-.4'), Mixture(('sql', 'math'), (.6, -.4))),
    (lambda: asked('sql=0.6,math=0.4,merge_method=mixture'), Mixture(('sql', 'math'), (.6, .4), 'mixture')),
    (lambda: asked('sql,math', merge_method='selection'), Mixture(('sql', 'math'), None, 'selection')),
    (lambda: asked(adapters={'sql': 1, 'math': 2}), Mixture(('sql', 'math'), (1., 2.))),
    (lambda: asked(adapters=['sql', 'math'], weights=[1, 2]), Mixture(('sql', 'math'), (1., 2.))),
    (lambda: asked(lora=lora(sql=.5, math=1)), Mixture(('sql', 'math'), (.5, 1.), 'mixture')),
    (lambda: asked(lora=lora(sql=.5), merge_method='fusion'), Mixture(('sql', ), (.5, ), 'fusion')),
    # Names may be anything, and are that before they are anything else.
    (lambda: asked('a=b'), Mixture(('a=b', ))),
    (lambda: asked('x,y'), Mixture(('x,y', ))),
    (lambda: asked('merge_method=fusion'), Mixture(('merge_method=fusion', ))),
    (lambda: asked('a=b=2,sql=1'), Mixture(('a=b', 'sql'), (2., 1.))),
])  # yapf: disable
def test_each_way_of_asking_means_one_thing(found, expected):
    assert found() == expected


@pytest.mark.parametrize(('found', 'status', 'param', 'told'), [
    (lambda: asked('nobody'), 404, 'model', 'nobody'),
    (lambda: asked('sql=1,nobody=2'), 404, 'model', 'nobody'),
    (lambda: asked(adapters=['nobody']), 404, 'adapters', 'nobody'),
    (lambda: asked('sql=1,math'), 400, 'model', 'a weight for each'),
    (lambda: asked('sql=one'), 400, 'model', 'finite numbers'),
    (lambda: asked('sql=nan'), 400, 'model', 'finite numbers'),
    (lambda: asked('sql=1e999'), 400, 'model', 'finite numbers'),
    (lambda: asked('sql,'), 400, 'model', 'a=0.6,b=0.4'),
    (lambda: asked('merge_method=mixture'), 400, 'model', 'a=0.6,b=0.4'),
    (lambda: asked('sql,math,merge_method=stir'), 400, 'model', 'stir'),
    (lambda: asked('sql,math,merge_method=fusion', merge_method='mixture'), 400, 'merge_method', 'once'),
    (lambda: asked('sql', adapters=['math']), 400, 'model', "'sql'"),
    (lambda: asked('nobody', adapters=['math']), 404, 'model', "'nobody'"),
    (lambda: asked(weights=[1]), 400, 'weights', 'no adapters'),
    (lambda: asked(adapters={'sql': 1}, weights=[1]), 400, 'weights', 'left out'),
    (lambda: asked(lora=lora(sql=1), weights=[1]), 400, 'weights', 'lora'),
    (lambda: asked(lora=lora(sql=1), adapters=['sql']), 400, 'lora', 'both'),
])  # yapf: disable
def test_what_means_nothing_is_refused_with_the_offender(found, status, param, told):
    with pytest.raises(RequestError, match='.') as caught:
        found()
    assert (caught.value.status, caught.value.param) == (status, param)
    assert told in str(caught.value)


@tries(50)
@given(
    weights=st.lists(st.floats(-100, 100), min_size=1, max_size=2),
    merge_method=st.sampled_from([None, 'fusion', 'mixture', 'selection']))
def test_the_model_that_an_answer_tells_asks_for_the_same_again(weights, merge_method):
    mixture = Mixture(('sql', 'math')[:len(weights)], tuple(weights), merge_method)
    again = asked(mixture.named('base'))
    assert again.adapters == mixture.adapters
    assert (again.weights or (1., )) == mixture.weights
    assert again.merge_method == merge_method


@given(st.text())
@tries(200)
def test_any_text_as_a_model_is_a_mixture_or_is_refused(text):
    try:
        asked(text)
    except RequestError as e:
        assert e.status in (400, 404)
