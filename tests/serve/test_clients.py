"""A server is asked by clients that others wrote: `openai`, ms-swift's own and `curl`."""
import asyncio
import json
import openai
import pytest
import subprocess
from requests.exceptions import HTTPError
from serving import alone, serving_written

from swift_patch.ms_swift import InferRequest, TransformersEngine

try:
    from swift.infer_engine import InferClient, RequestConfig
except ImportError:  # ms-swift 3
    from swift.llm import InferClient, RequestConfig

KEY, LENGTH, WAITING, BODY = 'not-for-all', 8, 24, 5000
# As a client may say it in `model`, and what an engine is asked for.
MIXTURES = {
    'model': None,
    'l0': ['l0'],
    'l0=0.6,l1=0.4': {
        'l0': 0.6,
        'l1': 0.4
    },
    'l2,l3': ['l2', 'l3'],
    'l3=-0.5,l0=1.25,l2=0.5': {
        'l3': -0.5,
        'l0': 1.25,
        'l2': 0.5
    },
}
# The base model says nothing but line breaks, some of which the streams of ms-swift 3 lose.
STREAMED = [name for name in MIXTURES if TransformersEngine.__name__ != 'PtEngine' or name != 'model']
QUESTIONS = ['hello', 'what is a fusion of LoRAs?']


def messages(text):
    return [{'role': 'user', 'content': text}]


@pytest.fixture(scope='module')
def server(written):
    options = ('--api_key', KEY, '--max_waiting', str(WAITING), '--max_body_bytes', str(BODY))
    with serving_written(written, *options, '--max_new_tokens', str(LENGTH)) as server:
        yield server
        assert 'Traceback' not in server.errors


@pytest.fixture(scope='module')
def expected(written):
    """What an engine without a server answers to each question by each mixture; no two are the same."""
    answer = alone(written, max_new_tokens=LENGTH)
    found = {(name, text): answer(text, mixture) for name, mixture in MIXTURES.items() for text in QUESTIONS}
    assert len(set(found.values())) > len(MIXTURES), 'or the tests would see nothing'
    found['mixture', QUESTIONS[0]] = answer(QUESTIONS[0], MIXTURES['l0=0.6,l1=0.4'], 'mixture')
    assert found['mixture', QUESTIONS[0]] not in list(found.values())[:-1]
    return found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f'{server.url}/v1', api_key=KEY, max_retries=0) as client:
        yield client


def streamed(chunks):
    """Returns the text of a stream, and its last chunk."""
    chunks = list(chunks)
    return ''.join(chunk.choices[0].delta.content or '' for chunk in chunks if chunk.choices), chunks[-1]


# openai


@pytest.mark.parametrize('name', MIXTURES)
@pytest.mark.parametrize('text', QUESTIONS)
def test_openai_asks_a_mixture_by_the_name_of_the_model(client, expected, name, text):
    found = client.chat.completions.create(model=name, messages=messages(text))
    assert found.choices[0].message.content == expected[name, text]
    assert found.choices[0].finish_reason in ('stop', 'length')
    assert found.usage.completion_tokens == LENGTH
    again = client.chat.completions.create(model=found.model, messages=messages(text))
    assert again.choices[0].message.content == expected[name, text], 'the model of an answer asks for the same'
    assert set(found.timings) == {'queued', 'composing', 'generating', 'batch_size'}


@pytest.mark.parametrize('fields', [{
    'adapters': {
        'l0': 0.6,
        'l1': 0.4
    }
}, {
    'adapters': ['l0', 'l1'],
    'weights': [0.6, 0.4]
}])
@pytest.mark.parametrize('merge_method', [None, 'mixture'])
def test_openai_asks_a_mixture_by_extra_fields(client, expected, fields, merge_method):
    found = client.chat.completions.create(
        model='model', messages=messages(QUESTIONS[0]), extra_body={
            **fields, 'merge_method': merge_method
        })
    assert found.choices[0].message.content == expected[merge_method or 'l0=0.6,l1=0.4', QUESTIONS[0]]
    assert found.model == 'l0=0.6,l1=0.4' + (',merge_method=mixture' if merge_method else '')


def test_openai_asks_a_mixture_in_the_form_of_llama_cpp(client, expected):
    lora = [{'name': 'l0', 'scale': 0.6}, {'name': 'l1', 'scale': 0.4}]
    found = client.chat.completions.create(model='model', messages=messages(QUESTIONS[0]), extra_body={'lora': lora})
    assert found.choices[0].message.content == expected['mixture', QUESTIONS[0]]


@pytest.mark.parametrize('name', STREAMED)
def test_openai_streams(client, expected, name):
    with client.chat.completions.create(
            model=name, messages=messages(QUESTIONS[1]), stream=True, stream_options={'include_usage': True}) as stream:
        text, last = streamed(stream)
    assert text == expected[name, QUESTIONS[1]]
    assert last.usage.completion_tokens == LENGTH
    assert last.timings['batch_size'] == 1


def test_openai_completes_text(client, expected):
    name = 'l0=0.6,l1=0.4'
    found = client.completions.create(model=name, prompt=QUESTIONS[0])
    assert found.choices[0].text == expected[name, QUESTIONS[0]]
    chunks = list(client.completions.create(model=name, prompt=QUESTIONS[0], stream=True))
    assert ''.join(chunk.choices[0].text for chunk in chunks) == expected[name, QUESTIONS[0]]


@pytest.mark.parametrize('stream', [False, True])
def test_what_openai_asks_at_once_is_answered_as_alone(server, expected, stream):
    asked = [(name, text) for name in (STREAMED if stream else MIXTURES) for text in QUESTIONS]

    async def ask(client, name, text):
        found = await client.chat.completions.create(model=name, messages=messages(text), stream=stream)
        if not stream:
            return found.choices[0].message.content, found.timings['batch_size']
        text, last = streamed([chunk async for chunk in found])
        return text, last.timings['batch_size']

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f'{server.url}/v1', api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *each) for each in asked * 2))

    found = asyncio.run(ask_all())
    assert [text for text, _ in found] == [expected[each] for each in asked * 2]
    if not stream:
        assert max(size for _, size in found) > 1, 'they make batches'


def test_openai_lists_models_and_finds_mixtures(client):
    listed = client.models.list()
    assert [(model.id, model.parent) for model in listed] == [('model', None)] + [(f'l{i}', 'model') for i in range(5)]
    assert client.models.retrieve('l3').parent == 'model'
    mixture = client.models.retrieve('l0=0.6,l1=0.4')
    assert (mixture.id, mixture.parent) == ('l0=0.6,l1=0.4', 'model')
    with pytest.raises(openai.NotFoundError, match='l9'):
        client.models.retrieve('l9')


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('error, param, told, fields', [
    (openai.NotFoundError, 'model', 'l9', {'model': 'l9'}),
    (openai.NotFoundError, 'model', 'l9', {'model': 'l0=0.5,l9=0.5'}),
    (openai.NotFoundError, 'adapters', 'l9', {'extra_body': {'adapters': {'l9': 1}}}),
    (openai.BadRequestError, 'model', 'l1=x', {'model': 'l0=0.5,l1=x'}),
    (openai.BadRequestError, 'adapters', 'rank', {'model': 'l0=0.5,l4=0.5'}),
    (openai.BadRequestError, 'weights', '3', {'extra_body': {'adapters': ['l0', 'l1'], 'weights': [1, 2, 3]}}),
    (openai.BadRequestError, 'merge_method', 'sum', {'extra_body': {'adapters': ['l0'], 'merge_method': 'sum'}}),
    (openai.BadRequestError, 'temperature', '9', {'temperature': 9}),
    (openai.APIStatusError, None, '5,000', {'user': 'u' * 6000}),
])  # yapf: disable
def test_openai_raises_its_own_exceptions(client, error, param, told, fields, stream):
    with pytest.raises(error, match=told) as raised:
        client.chat.completions.create(**{'model': 'model', 'messages': messages('a'), 'stream': stream, **fields})

    assert raised.value.param == param
    assert client.chat.completions.create(model='l0', messages=messages('a')).model == 'l0', 'the next one is answered'


def test_openai_without_the_key_is_told_so(server):
    with openai.OpenAI(base_url=f'{server.url}/v1', api_key='another', max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match='API key') as raised:
            client.chat.completions.create(model='l0', messages=messages('a'))
    assert raised.value.code == 'invalid_api_key'


def test_openai_is_told_when_too_many_wait_and_goes_on_by_itself(server, expected):
    name, text = 'l0', QUESTIONS[0]

    async def ask_all(max_retries):
        async with openai.AsyncOpenAI(base_url=f'{server.url}/v1', api_key=KEY, max_retries=max_retries) as client:
            asked = (client.chat.completions.create(model=name, messages=messages(text)) for _ in range(4 * WAITING))
            return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(ask_all(0))
    refused = [error for error in found if isinstance(error, openai.RateLimitError)]
    assert refused and all(error.response.headers['Retry-After'].isdigit() for error in refused)
    answered = [response for response in found if not isinstance(response, openai.RateLimitError)]
    assert len(answered) >= WAITING
    assert {response.choices[0].message.content for response in answered} == {expected[name, text]}
    # As the header tells it, it asks again, until there is room.
    found = asyncio.run(ask_all(8))
    assert [response.choices[0].message.content for response in found] == [expected[name, text]] * len(found)


# ms-swift


@pytest.fixture
def swift_client(server):
    return InferClient(host='127.0.0.1', port=server.port, api_key=KEY)


@pytest.mark.parametrize('name', MIXTURES)
def test_ms_swifts_client_asks_a_mixture(swift_client, expected, name):
    requests = [InferRequest(messages=messages(text)) for text in QUESTIONS]
    found = swift_client.infer(requests, RequestConfig(max_tokens=LENGTH, temperature=0), model=name, use_tqdm=False)
    assert [each.choices[0].message.content for each in found] == [expected[name, text] for text in QUESTIONS]


def test_ms_swifts_client_streams(swift_client, expected):
    name, config = 'l0=0.6,l1=0.4', RequestConfig(max_tokens=LENGTH, temperature=0, stream=True)
    # One alone: ms-swift 3 may run two in one loop, of which the second hangs.
    [found] = swift_client.infer([InferRequest(messages=messages(QUESTIONS[1]))], config, model=name, use_tqdm=False)
    assert streamed(found)[0] == expected[name, QUESTIONS[1]]


def test_ms_swifts_client_lists_models(swift_client):
    assert [model.id for model in swift_client.get_model_list().data] == ['model', *(f'l{i}' for i in range(5))]


@pytest.mark.parametrize('name, told', [('l9', 'l9'), ('l0=0.5,l1', 'weight')])
def test_ms_swifts_client_is_told_what_is_wrong(swift_client, name, told):
    with pytest.raises(HTTPError, match=told):
        swift_client.infer([InferRequest(messages=messages('a'))], model=name, use_tqdm=False)


# curl


def curl(server, path, *options, key=KEY):
    """Returns the status and the body of a response."""
    command = [
        'curl', '--silent', '--show-error', '--write-out', '\n%{http_code}', '--header', f'Authorization: Bearer {key}',
        '--header', 'Content-Type: application/json', *options, f'{server.url}{path}'
    ]
    body, _, status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition('\n')
    return int(status), body


def body_of(name, text, **fields):
    return json.dumps({'model': name, 'messages': messages(text), **fields})


@pytest.mark.parametrize('name', MIXTURES)
def test_curl_asks_a_mixture(server, expected, name):
    status, body = curl(server, '/v1/chat/completions', '--data', body_of(name, QUESTIONS[0]))
    assert status == 200
    assert json.loads(body)['choices'][0]['message']['content'] == expected[name, QUESTIONS[0]]


def test_curl_reads_a_stream_line_by_line(server, expected):
    name = 'l0=0.6,l1=0.4'
    status, body = curl(server, '/v1/chat/completions', '--no-buffer', '--data',
                        body_of(name, QUESTIONS[1], stream=True))
    assert status == 200
    *events, done = [event.removeprefix('data:').strip() for event in body.split('\n\n') if event.strip()]
    assert done == '[DONE]'
    deltas = [choice['delta'].get('content') for event in events for choice in json.loads(event)['choices']]
    assert ''.join(filter(None, deltas)) == expected[name, QUESTIONS[1]]


@pytest.mark.parametrize('expected_status, options', [
    (400, ['--data', '{"model": "l0", "messages": ']),
    (400, ['--data', '{"model": "l0"}']),
    (404, ['--data', body_of('l9', 'a')]),
    (405, ['--request', 'DELETE']),
    (413, ['--data', body_of('l0', 'a' * 6000)]),
    (413, ['--header', 'Transfer-Encoding: chunked', '--data',
           body_of('l0', 'a' * 6000)]),
])
def test_curl_is_told_what_is_wrong(server, expected_status, options):
    status, body = curl(server, '/v1/chat/completions', *options)
    assert status == expected_status
    assert set(json.loads(body)['error']) == {'message', 'type', 'param', 'code'}
    assert curl(server, '/v1/chat/completions', '--data', body_of('l0', 'a'))[0] == 200


def test_curl_without_the_key_is_told_so(server):
    status, body = curl(server, '/v1/chat/completions', '--data', body_of('l0', 'a'), key='another')
    assert (status, json.loads(body)['error']['type']) == (401, 'authentication_error')
    assert curl(server, '/v1/nothing')[0] == 404
