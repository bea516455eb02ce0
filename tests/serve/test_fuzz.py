"""Whatever a request is, a server never fails: it answers, or says what is wrong with it, and answers the next one."""
import asyncio
import dataclasses
import httpx
import json
import pytest
from fuzzing import tries
from hypothesis import assume, example, given
from hypothesis import strategies as st
from local import config_of
from urllib.parse import quote

from swift_patch.serve.protocol import ChatRequest, TextRequest
from swift_patch.serve.run import make_server

KEY = 'not-for-all'
HEADERS = {'Authorization': f'Bearer {KEY}', 'Content-Type': 'application/json'}
CHAT, TEXT, LOAD, UNLOAD = (f'/v1/{name}'
                            for name in ('chat/completions', 'completions', 'load_lora_adapter', 'unload_lora_adapter'))
ASKED = {'model': 'l0=0.6,l1=0.4', 'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 3}

# What is often forgotten, besides anything.
ODD = st.sampled_from([
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400,
    float('nan'),
    float('inf'), '', ' ', '\0', '\ud800', '=', ',', '=,=', 'l0=', 'l0=1e999', 'l0=nan', 'l0,l0', 'l0=1,l0=-1', 'l9',
    'merge_method=', '../l0', '/etc/passwd', 'data:,', 'file:///etc/passwd', [], {}, [[]], [{}], [None], ['l0'],
    ['l0', 'l4'], {
        'l0': 1
    }, {
        'l0': None
    }, {
        'name': 'l0'
    }, [{
        'name': 'l0',
        'scale': 0
    }], 'assistant', 'system', 'tool', [{
        'type': 'text',
        'text': 'a'
    }], [{
        'type': 'text'
    }], [{
        'type': 'image_url',
        'image_url': {
            'url': '/etc/passwd'
        }
    }], {
        'type': 'json_object'
    }, {
        'type': 'function',
        'function': {
            'name': 'a'
        }
    }
])
JSON = ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8)
WORDS = st.sampled_from(['role', 'content', 'type', 'text', 'name', 'scale', 'tool_calls']) | st.text(max_size=8)


@pytest.fixture(scope='module')
def served(written):
    """Sends a request to a server in this process, and returns the response."""
    folder = written[1]['peft']['l0'].removesuffix('/l0')
    config = config_of(
        written,
        swift_args={
            'api_key': KEY,
            'max_new_tokens': 4
        },
        max_batch_size=4,
        limits={'max_sources': 4},
        adapter_folders=[folder])
    deploy = make_server(config)
    loop = asyncio.new_event_loop()
    # A server of ASGI would close the connection, after the response with 500 that is looked at here.
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(deploy.app, raise_app_exceptions=False), base_url='http://server')

    def ask(method, path, headers=HEADERS, **kwargs):
        return loop.run_until_complete(client.request(method, path, headers=headers, **kwargs))

    yield ask, folder
    loop.run_until_complete(client.aclose())
    loop.close()


@pytest.fixture(scope='module')
def check(served):
    """Sends a request, and says whether the server did well."""
    ask, folder = served

    def answered():
        found = ask('POST', CHAT, json=ASKED)
        assert found.status_code == 200, found.text
        return found.json()['choices'][0]['message']['content']

    expected = answered()

    def checked(*args, **kwargs):
        found = ask(*args, **kwargs)
        assert found.status_code < 500, found.text
        if found.status_code >= 400:
            assert_error(found.text)
        for event in found.text.split('\n\n') if 'event-stream' in found.headers.get('Content-Type', '') else ():
            if '"error":' in event:
                assert_error(event.removeprefix('data: '))
        sent = args[1] + str(kwargs.get('content'))
        assert folder in sent or folder not in found.text, 'where adapters are is not told'
        assert answered() == expected
        return found

    return checked


def assert_error(text):
    """Asserts that it is an error as OpenAI's, and none of the server."""
    error = json.loads(text)['error']
    assert set(error) == {'message', 'type', 'param', 'code'}
    assert error['message'] and isinstance(error['message'], str)
    assert error['type'] != 'server_error', text


def changed(draw, value):
    """Returns a value of JSON with another one in it somewhere."""
    inside = isinstance(value, (dict, list)) and value and draw(st.booleans())
    if inside and isinstance(value, dict):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(draw, value[key])}
    if inside:
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(draw, value[place]), *value[place + 1:]]
    if isinstance(value, dict) and draw(st.booleans()):
        return {**value, draw(WORDS): draw(JSON)}
    return draw(st.just([value]) | st.just({'a': value}) | JSON)


@st.composite
def bodies(draw, folder):
    """A route, and a body for it of which one or a few things are not as they should be."""
    route = draw(st.sampled_from([CHAT, CHAT, CHAT, TEXT, TEXT, LOAD, UNLOAD]))
    body, fields = {
        CHAT: (ASKED, [field.name for field in dataclasses.fields(ChatRequest)]),
        TEXT: ({
            'model': 'l0',
            'prompt': 'hello',
            'max_tokens': 3
        }, [field.name for field in dataclasses.fields(TextRequest)]),
        LOAD: ({
            'lora_name': 'l5',
            'lora_path': f'{folder}/l1'
        }, ['lora_name', 'lora_path', 'load_inplace']),
        UNLOAD: ({
            'lora_name': 'l5'
        }, ['lora_name']),
    }[route]
    if route in (CHAT, TEXT) and draw(st.booleans()):
        body = {**body, 'stream': True}
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(fields)) | st.sampled_from(sorted(fields)) | WORDS)
        if key in body and draw(st.booleans()):
            body = {name: value for name, value in body.items() if name != key}
        else:
            body = {**body, key: changed(draw, body.get(key))}
    # What is asked afterwards must still be there.
    assume(route not in (LOAD, UNLOAD) or body.get('lora_name') not in ('l0', 'l1'))
    return route, draw(st.just(body) | st.just(body) | st.just(body) | st.just([body]) | JSON)


def test_no_body_makes_a_server_fail(served, check):

    @tries(100)
    @given(bodies(served[1]))
    def run(case):
        route, body = case
        check('POST', route, content=json.dumps(body))

    run()


def test_no_bytes_and_no_headers_make_a_server_fail(check):
    names = st.sampled_from(
        ['Content-Type', 'Content-Length', 'Content-Encoding', 'Authorization', 'Accept', 'Host', 'X-Request-Id'])
    values = st.binary(max_size=20).filter(lambda value: not {0, 10, 13} & set(value))
    values |= values.map(b'Bearer '.__add__)
    types = st.sampled_from(['', 'text/plain', 'application/json; charset=utf-16', 'multipart/form-data', 'a/b'])

    @tries(40)
    @given(
        st.sampled_from([CHAT, TEXT, LOAD, UNLOAD]),
        st.sampled_from(['POST', 'POST', 'POST', 'PUT', 'GET', 'DELETE', 'OPTIONS', 'FETCH']),
        st.binary(max_size=40) | st.sampled_from([b'[' * 100_000, b'{"a":' * 50_000, b'\xef\xbb\xbf{}', b'1' * 5000])
        | st.just(json.dumps(ASKED).encode()), st.dictionaries(names, values | types.map(str.encode), max_size=3),
        st.booleans())
    @example(CHAT, 'POST', b'{}', {'Authorization': b'Bearer \xff'}, False)
    def run(path, method, content, headers, has_key):
        headers = {**(HEADERS if has_key else {}), **headers}
        check(method, path, content=content, headers=list(headers.items()))

    run()


def test_no_query_makes_a_server_fail(check):
    numbers = st.integers().map(str) | st.text(max_size=10)
    names = st.sampled_from(['model', 'l0', 'l4', 'l9']) | st.text(max_size=20)

    @tries(40)
    @given(
        st.dictionaries(st.sampled_from(['limit', 'after']) | st.text(max_size=5), numbers | names, max_size=3),
        st.none() | names | ODD.filter(lambda value: isinstance(value, str)))
    def run(query, model):
        query = {key: value.encode('utf-8', 'surrogatepass') for key, value in query.items()}
        path = '' if model is None else '/' + quote(model.encode('utf-8', 'surrogatepass'), safe='')
        pairs = '&'.join(f'{quote(key.encode("utf-8", "surrogatepass"), safe="")}={quote(value, safe="")}'
                         for key, value in query.items())
        check('GET', f'/v1/models{path}?{pairs}')

    run()
