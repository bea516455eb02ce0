"""The page of `swift-patch deploy --ui`, in a browser, with a real model behind it."""
import pytest
from browser import Page, open_browser
from contextlib import contextmanager
from server import serving

from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE

pytest.importorskip('gradio')

QUESTION = 'How many?'


@pytest.fixture(scope='module')
def driver():
    with open_browser() as driver:
        yield driver


@contextmanager
def serving_page(written, *options):
    """Serves three LoRAs, with a page; yields the address. It ends well with the page open, or this raises."""
    model_dir, paths = written
    adapters = {name: paths['swift'][name] for name in ('l0', 'l1', 'l2')}
    with serving(model_dir, adapters, '--model_type', MODEL_TYPE, '--template', TEMPLATE, '--max_sources', '2', '--ui',
                 *options) as server:
        yield server.url


@pytest.fixture(scope='module')
def url(written, driver):
    with serving_page(written) as url:
        yield url


def text_of(url, **fields):
    """What the server answers to any other client."""
    import openai
    client = openai.OpenAI(base_url=f'{url}/v1', api_key='none')
    base = client.models.list().data[0].id
    messages = [{'role': 'user', 'content': QUESTION}]
    answer = client.chat.completions.create(
        model=base, messages=messages, max_tokens=256, temperature=0, extra_body=fields)
    return answer.choices[0].message.content, answer.model


def test_a_slider_is_moved_and_the_answers_are_those_of_the_mixtures(driver, url):
    page = Page(driver, url)
    page.wait_until_loaded()
    assert (page.picked('A'), page.weights('B')) == (['l0'], ['l0=0.5', 'l1=0.5'])
    page.unpick('A', 0)
    page.pick('A', 'l2')
    page.move('B', 1, 40)
    page.ask(QUESTION)
    page.wait_for('done', 'A', 'B')
    mixture = {'adapters': {'l0': 0.5, 'l1': 0.9}, 'merge_method': 'fusion'}
    for name, fields in (('A', {'adapters': ['l2']}), ('B', mixture)):
        text, model = text_of(url, **fields)
        # A text field has one kind of line ends.
        assert page.answer(name) == text.replace('\r\n', '\n').replace('\r', '\n')
        used, *figures = page.told(name).splitlines()
        assert used == model
        assert [figure.split(' ')[0] for figure in figures[:4]] == ['queued', 'composing', 'generating', 'batch']
        assert figures[4].endswith(' tokens')


def test_an_error_of_the_server_is_shown_in_its_column_alone(driver, url):
    page = Page(driver, url)
    page.wait_until_loaded()
    page.pick('B', 'l2')
    page.ask(QUESTION, by_enter=True)
    page.wait_for('failed', 'B')
    page.wait_for('done', 'A')
    assert page.told('B') == 'At most 2 adapters are expected in one request, found 3.'


def test_with_a_key_the_page_asks_for_it_and_the_server_for_all_else(driver, written):
    import openai
    with serving_page(written, '--api_key', 's3cret') as url:
        page = Page(driver, url)
        page.log_in('s3cret')
        page.wait_until_loaded()
        page.ask(QUESTION)
        page.wait_for('done', 'A', 'B')
        with pytest.raises(openai.AuthenticationError):
            text_of(url)
