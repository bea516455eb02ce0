"""The page in a browser, before a server that does as told; and its parts. The real one: test_page_of_server.py."""
import asyncio
import contextlib
import json
import pytest
import subprocess
import sys
import threading
from browser import SECONDS, Page, open_browser, serving
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from functools import partial
from types import SimpleNamespace

from swift_patch.serve import page as page_module
from swift_patch.serve.page import _Answer, _answers, _message, _mixture, _names, _told, build_page, mount_page

pytest.importorskip('gradio')

BASE = 'base-model'
MARKUP = '<img src=x onerror="document.title=\'taken\'"> <b>bold</b> **stars** {{ 1 }} ${1}'


class Told:
    """A server with the page that answers what the question says, and what it was asked."""

    def __init__(self, url, names=('sql', 'math', 'poetry', 'chess'), key=None):
        self.names = [BASE, *names]
        self.bodies = []
        self.keys = set()
        self.left = threading.Semaphore(0)
        self.app = FastAPI()
        self.app.get('/v1/models')(self.models)
        self.app.post('/v1/chat/completions')(self.complete)
        self.end = mount_page(self.app, f'{url}/v1', key)

    async def models(self, limit: int = 1000, after: str = ''):
        start = self.names.index(after) + 1 if after else 0
        data = [{'id': name, 'object': 'model', 'created': 1, 'owned_by': 'x'} for name in self.names[start:]]
        return {'object': 'list', 'data': data[:limit], 'has_more': len(data) > limit}

    async def complete(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers['authorization'])
        if 'chess' in body.get('adapters', ()):
            error = {'message': "There is no 'chess' <b>here</b>.", 'type': 'x', 'param': 'adapters', 'code': None}
            return JSONResponse({'error': error}, 404)
        return StreamingResponse(self.stream(body), media_type='text/event-stream')

    async def stream(self, body):
        question = body['messages'][-1]['content']
        words = [MARKUP] if question == 'markup' else [f'{index} ' for index in range(300)]
        for word in words:
            yield self.chunk(body, [{'index': 0, 'delta': {'content': word}, 'finish_reason': None}])
            await asyncio.sleep(0)
        if question == 'endless':
            try:
                await asyncio.Event().wait()
            finally:
                self.left.release()
        timings = {'queued': 0.25, 'composing': 0.5, 'generating': 1.5, 'batch_size': 7}
        usage = {'prompt_tokens': 1, 'completion_tokens': 11, 'total_tokens': 12}
        yield self.chunk(body, [], usage=usage, timings=timings)
        yield 'data: [DONE]\n\n'

    def chunk(self, body, choices, **fields):
        model = f'<i>{list(body.get("adapters", ["none"]))}</i>'
        chunk = {
            'id': '1',
            'object': 'chat.completion.chunk',
            'created': 1,
            'model': model,
            'choices': choices,
            **fields
        }
        return f'data: {json.dumps(chunk)}\n\n'


@pytest.fixture(scope='module')
def driver():
    with open_browser() as driver:
        yield driver


@pytest.fixture
def server():
    """A function that starts a server with a page and returns it and its address."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(partial(Told, **options)))


def test_columns_are_asked_together_and_shown_side_by_side(driver, server):
    told, url = server()
    page = Page(driver, url)
    page.wait_until_loaded()
    assert driver.current_url == f'{url}/ui/'
    page.move('B', 1, -30)
    page.ask('Count.')
    page.wait_for('done', 'A', 'B')
    whole = ''.join(f'{index} ' for index in range(300))
    assert [page.answer('A'), page.answer('B')] == [whole, whole]
    for name, used in (('A', "<i>['sql']</i>"), ('B', "<i>['sql', 'math']</i>")):
        figures = ['queued 0.250 s', 'composing 0.500 s', 'generating 1.500 s', 'batch of 7', '11 tokens']
        assert page.told(name).splitlines() == [used, *figures]
    common = {
        'model': BASE,
        'messages': [{
            'role': 'user',
            'content': 'Count.'
        }],
        'max_tokens': 256,
        'temperature': 0,
        'stream': True,
        'stream_options': {
            'include_usage': True
        }
    }
    mixture = {'adapters': {'sql': 0.5, 'math': 0.2}, 'merge_method': 'fusion'}
    asked = [{**common, 'adapters': ['sql']}, {**common, **mixture}]
    assert sorted(told.bodies, key=str) == sorted(asked, key=str)
    assert '"adapters": {"sql": 0.5, "math": 0.2}' in page.request('B', 'curl')
    assert "'adapters': ['sql']" in page.request('A', 'python')
    assert all(address.startswith(url) for address in page.asked_for())


def test_what_a_model_writes_is_no_markup(driver, server):
    _, url = server()
    page = Page(driver, url)
    page.wait_until_loaded()
    page.ask('markup')
    page.wait_for('done', 'A')
    assert page.answer('A') == MARKUP
    assert not page.all('#result-A img, #told-A i, #told-A .used b')
    assert driver.title == 'Mixtures of LoRAs'


def test_an_error_is_shown_in_its_column_alone(driver, server):
    _, url = server()
    page = Page(driver, url)
    page.wait_until_loaded()
    page.pick('B', 'chess')
    page.ask('Count.', by_enter=True)
    page.wait_for('failed', 'B')
    page.wait_for('done', 'A')
    assert page.told('B') == "There is no 'chess' <b>here</b>."
    assert page.answer('B') == ''


def test_stop_ends_what_runs_and_the_page_asks_again(driver, server):
    told, url = server()
    page = Page(driver, url)
    page.wait_until_loaded()
    page.ask('endless')
    page.wait(lambda: '299' in page.answer('A') and '299' in page.answer('B'))
    page.one('#stop').click()
    page.wait_for('stopped', 'A', 'B')
    assert '299' in page.answer('A')
    assert told.left.acquire(timeout=SECONDS) and told.left.acquire(timeout=SECONDS)
    page.ask('markup')
    page.wait_for('done', 'A', 'B')


def test_a_page_that_is_closed_asks_no_further(driver, server):
    told, url = server()
    page = Page(driver, url)
    page.wait_until_loaded()
    page.ask('endless')
    page.wait(lambda: '299' in page.answer('A'))
    driver.get('about:blank')
    assert told.left.acquire(timeout=SECONDS) and told.left.acquire(timeout=SECONDS)


def test_a_server_that_ends_waits_for_answers_but_not_for_open_pages(driver):
    with serving(Told) as (told, url):
        page = Page(driver, url)
        page.wait_until_loaded()
        page.ask('Count.')
        page.wait(lambda: len(told.bodies) == 2)
    # Without its connections being cut, it has ended.
    page.wait_for('done', 'A', 'B')


def test_weights_start_anew_with_what_is_picked(driver, server):
    told, url = server()
    page = Page(driver, url)
    page.wait_until_loaded()
    assert page.weights('B') == ['sql=0.5', 'math=0.5']
    page.move('B', 0, 5)
    assert page.weights('B') == ['sql=0.55', 'math=0.5']
    page.pick('B', 'poetry')
    assert page.weights('B') == ['sql=0.33', 'math=0.33', 'poetry=0.33']
    page.unpick('B', 0)
    assert page.weights('B') == ['math=0.5', 'poetry=0.5']
    page.unpick('A', 0)
    page.ask('markup')
    page.wait_for('done', 'A', 'B')
    # None is the base model.
    assert [body.get('adapters') for body in sorted(told.bodies, key=len)] == [None, ['math', 'poetry']]


def test_there_are_up_to_four_columns(driver, server):
    told, url = server()
    page = Page(driver, url)
    page.wait_until_loaded()
    page.show_settings()
    page.show_columns(4)
    page.pick('D', 'math')
    page.pick('D', 'poetry')
    page.one('#method-D label:nth-of-type(2)').click()
    page.ask('markup')
    page.wait_for('done', *'ABCD')
    assert len(told.bodies) == 4
    assert [body['merge_method'] for body in told.bodies if 'poetry' in body.get('adapters', ())] == ['mixture']
    page.show_columns(2)
    page.ask('markup')
    page.wait(lambda: len(told.bodies) == 6)


def test_an_adapter_is_found_among_ten_thousand(driver, server):
    _, url = server(names=[f'lora-{index}-end' for index in range(10_000)])
    page = Page(driver, url)
    page.wait_until_loaded()
    page.pick('A', 'lora-9999-end')
    assert page.weights('A') == ['lora-0-end=0.5', 'lora-9999-end=0.5']


def test_with_a_key_the_page_asks_for_it(driver, server):
    told, url = server(key='s3cret')
    page = Page(driver, url)
    page.log_in('wrong')
    page.log_in('s3cret')
    page.wait_until_loaded()
    page.ask('markup')
    page.wait_for('done', 'A', 'B')
    assert told.keys == {'Bearer s3cret'}
    assert 'Bearer $API_KEY' in page.request('A', 'curl')


def test_without_the_key_nothing_of_the_page_is_told():
    client = TestClient(Told('http://127.0.0.1:9', key='s3cret é').app)
    assert client.get('/ui/config').status_code == 401
    for password in ('wrong', 's3cret', 's3cret é '):
        assert client.post('/ui/login', data={'username': 'me', 'password': password}).status_code == 400
    assert client.get('/ui/config').status_code == 401
    assert client.post('/ui/login', data={'username': 'me', 'password': 's3cret é'}).status_code == 200
    assert client.get('/ui/config').status_code == 200


def test_the_page_takes_no_files_and_loads_nothing_from_elsewhere():
    client = TestClient(Told('http://127.0.0.1:9').app)
    assert client.post('/ui/gradio_api/upload', files={'files': b'some text'}).status_code == 413
    answer = client.get('/')
    assert answer.url.path == '/ui/'
    assert "default-src 'self'" in answer.headers['content-security-policy']
    assert 'content-security-policy' not in client.get('/v1/models').headers
    assert client.get('/ui/gradio_api/info').json() == {'named_endpoints': {}, 'unnamed_endpoints': {}}


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ValueError, match=r"^The page needs Gradio: pip install 'swift-patch\[ui\]'\.$"):
        build_page('http://127.0.0.1:9/v1')


def test_gradio_is_imported_where_there_is_a_page_only():
    code = 'import sys, swift_patch.serve.page; print({"gradio", "openai", "torch"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], check=True, capture_output=True,
                          text=True).stdout.strip() == 'set()'


@pytest.mark.parametrize('count', [0, 1, 999, 1000, 1001, 2500])
def test_all_names_are_listed(count):
    names = [BASE, *(f'l{index}' for index in range(count))]
    with serving(partial(Told, names=names[1:])) as (_, url):
        assert asyncio.run(_names(page_module._client(f'{url}/v1', None))) == names


def test_a_mixture_has_weights_where_they_are_not_equal():
    # Equal ones are 1/k for the server, which no slider is at for three.
    assert _mixture(['a', 'b', 'c'], 'fusion', ['a', 'b', 'c'], 0.33, 0.33, 0.33, 1, 1) == {
        'adapters': ['a', 'b', 'c'],
        'merge_method': 'fusion'
    }
    assert _mixture(['a', 'b'], 'mixture', ['a', 'b'], 0.5, -1, 1) == {
        'adapters': {
            'a': 0.5,
            'b': -1
        },
        'merge_method': 'mixture'
    }
    assert _mixture([], 'fusion', [], 1, 1) == {}
    # One alone is merged with nothing.
    assert _mixture(['a'], 'mixture', ['a'], 1, 1) == {'adapters': ['a']}
    assert _mixture(['a'], 'mixture', ['a'], 0.7, 1) == {'adapters': {'a': 0.7}, 'merge_method': 'mixture'}
    # Sliders that do not follow yet have weights of other adapters.
    assert _mixture(['b', 'c'], 'fusion', ['a'], 0.7, 1) == {'adapters': ['b', 'c'], 'merge_method': 'fusion'}
    assert _mixture(['b'], 'fusion', ['a'], 0.7, 1) == {'adapters': ['b']}


class Slow:
    """In place of the client: an answer of one word, which ends when it may."""

    def __init__(self):
        self.chat = self.completions = self
        self.may_end = asyncio.Event()
        self.is_left = False

    async def create(self, **fields):
        return self

    async def __aenter__(self):
        return self

    async def __aexit__(self, *args):
        self.is_left = True

    async def __aiter__(self):
        delta = SimpleNamespace(delta=SimpleNamespace(content='word'))
        yield SimpleNamespace(model='m', choices=[delta], usage=None)
        await self.may_end.wait()


def test_the_end_of_an_answer_is_shown_where_it_comes_while_the_page_is_busy():

    async def ask():
        client, tasks, states = Slow(), [], []
        async for answer, in _answers(client, [{'model': 'm', 'messages': []}], tasks):
            states.append(answer.state)
            if answer.state == 'answering':
                client.may_end.set()
                await asyncio.wait(tasks)
        return states

    assert asyncio.run(ask()) == ['waiting', 'answering', 'done']


def test_an_answer_that_nobody_takes_is_read_no_further():

    async def ask():
        client, tasks = Slow(), []
        answers = _answers(client, [{'model': 'm', 'messages': []}], tasks)
        while (await anext(answers))[0].state != 'answering':
            pass
        await answers.aclose()
        await asyncio.wait(tasks, timeout=SECONDS)
        return client.is_left

    assert asyncio.run(ask())


def test_an_error_without_a_text_of_the_server_says_why():

    async def ask():
        await page_module._client('http://127.0.0.1:9/v1', None).models.list()

    with pytest.raises(Exception) as caught:
        asyncio.run(ask())
    assert 'onnect' in _message(caught.value)


@pytest.mark.parametrize('state', ['waiting', 'answering', 'done', 'failed', 'stopped'])
def test_what_is_told_is_text(state):
    text = '<script>x</script>&"'
    shown = _told(_Answer(model=text, error=text, state=state))
    assert shown.count('&lt;script&gt;x&lt;/script&gt;&amp;&quot;') == 2 and '<script>' not in shown
