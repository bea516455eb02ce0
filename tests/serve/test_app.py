"""Every request of a server has its own fusion, and what goes wrong with one stays with it."""
import asyncio
import json
import pytest
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from local import BASE, HELLO, config_of, local, until
from types import SimpleNamespace
from unittest import mock

from swift_patch.ms_swift import InferRequest

MIXTURE = {'l0': .6, 'l1': .4}
# Of each merge method, with one adapter, and with none; by what a request says.
ASKED = [
    {'adapters': MIXTURE},
    {'adapters': MIXTURE, 'merge_method': 'mixture'},
    {'adapters': MIXTURE, 'merge_method': 'selection'},
    {'model': 'l2'},
    {},
    {'model': 'l3=0.9,l1=-0.5'},
]  # yapf: disable


@contextmanager
def busy(server):
    """Within it, the engine answers nobody: what comes meanwhile waits."""
    started, go_on = threading.Event(), threading.Event()
    answered = type(server.deploy.infer_engine)._answered

    def waiting(self, *args, **kwargs):
        started.set()
        assert go_on.wait(60)
        return answered(self, *args, **kwargs)

    with mock.patch.object(type(server.deploy.infer_engine), '_answered', waiting), ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post)
        assert started.wait(60)
        try:
            yield
        finally:
            go_on.set()
            first.result()


def together(server, asked, method='answer', **more):
    """Asks all at one moment and returns the answers."""
    with ThreadPoolExecutor(len(asked)) as pool:
        with busy(server):
            calls = [pool.submit(getattr(server, method), **{**each, **more}) for each in asked]
            until(lambda: server.deploy._waiting() == len(asked))
        return [call.result() for call in calls]


def events(text):
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {')]


def streamed(text):
    """Returns what the events of a stream say."""
    return ''.join(event['choices'][0]['delta']['content'] or '' for event in events(text))


def test_all_ways_of_asking_for_a_mixture_answer_the_same_and_as_the_engine_does(server):
    engine = server.deploy.infer_engine
    [expected] = engine.infer([InferRequest(messages=HELLO)],
                              server.deploy.args.get_request_config(),
                              compositions=[MIXTURE],
                              use_tqdm=False)
    ways = [{'adapters': MIXTURE}, {'adapters': ['l0', 'l1'], 'weights': [.6, .4]}, {'model': 'l0=0.6,l1=0.4'}]
    found = [server.post(**way).json() for way in ways]
    assert {each['choices'][0]['message']['content'] for each in found} == {expected.choices[0].message.content}
    assert {each['model'] for each in found} == {'l0=0.6,l1=0.4'}
    lora = [{'name': name, 'scale': scale} for name, scale in MIXTURE.items()]
    assert server.answer(lora=lora) == server.answer(adapters=MIXTURE, merge_method='mixture')


def test_requests_of_all_kinds_make_one_batch_in_which_each_is_answered_as_alone(server):
    alone = [server.answer(**each) for each in ASKED]
    assert len(set(alone)) > 3, 'or the test would see nothing'
    found = [response.json() for response in together(server, ASKED, 'post')]
    assert [each['choices'][0]['message']['content'] for each in found] == alone
    assert {each['timings']['batch_size'] for each in found} == {len(ASKED)}


def test_streams_make_one_batch_too(server):
    # ms-swift streams texts that are no text in another way than it answers them.
    alone = [streamed(server.post(**each, stream=True).text) for each in ASKED]
    assert len(set(alone)) > 3, 'or the test would see nothing'
    found = [response.text for response in together(server, ASKED, 'post', stream=True)]
    assert [streamed(text) for text in found] == alone
    last = [events(text)[-1] for text in found]
    assert {each['timings']['batch_size'] for each in last} == {len(ASKED)}
    assert [each['model'] for each in last][:2] == ['l0=0.6,l1=0.4', 'l0=0.6,l1=0.4,merge_method=mixture']
    assert all(text.endswith('data: [DONE]\n\n') for text in found)


def test_text_completions_have_fusions_too(server):
    found = server.post('/v1/completions', messages=None, prompt='hello', adapters=MIXTURE).json()
    assert found['choices'][0]['text'] == server.answer(adapters=MIXTURE)
    assert found['model'] == 'l0=0.6,l1=0.4' and found['timings']['batch_size'] == 1


def test_what_is_null_is_as_left_out(server):
    null = {name: None for name in ('n', 'stream', 'logprobs', 'stop', 'presence_penalty', 'num_beams', 'adapters')}
    assert server.answer(**null) == server.answer()


def test_a_message_that_calls_tools_may_have_no_content(server):
    call = {'id': '1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}
    messages = [
        *HELLO, {
            'role': 'assistant',
            'content': None,
            'tool_calls': [call]
        }, {
            'role': 'tool',
            'tool_call_id': '1',
            'content': '2'
        }
    ]
    found = server.post(messages=messages).json()
    # This model's template is one without tools, which is all that is wrong.
    assert 'error' not in found or 'agent_template' in found['error']['message']
    assert server.post(messages=[{'role': 'user', 'content': None}]).status_code == 400


@pytest.mark.parametrize('stream', [False, True])
def test_a_text_that_reads_as_a_call_of_a_tool_is_a_text(server, stream):
    call = {'name': 'f', 'arguments': '{}'}
    with mock.patch.object(type(server.deploy.infer_engine), '_get_toolcall', return_value=[call]):
        response = server.post('/v1/completions', messages=None, prompt='hello', stream=stream)
    assert response.status_code == 200 and 'error' not in response.text


def test_what_is_asked_and_answered_is_written_nowhere_unless_told(server):
    assert server.deploy.jsonl_writer is None


def test_what_is_asked_and_answered_is_written_where_the_operator_wants_it(written, tmp_path):
    path = tmp_path / 'results.jsonl'
    with local(config_of(written, swift_args={'result_path': str(path)})) as server:
        answers = [server.answer(adapters=MIXTURE), streamed(server.post(model='l2', stream=True).text)]
        # What cannot be encoded is no failure of the server.
        body = json.dumps({'model': BASE, 'messages': [{'role': 'user', 'content': '\ud800'}]})
        headers = {'Content-Type': 'application/json'}
        assert server.http.post('/v1/chat/completions', content=body, headers=headers).status_code in (200, 400)
    lines = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert [line['response'] for line in lines[:2]] == answers
    assert [line['model'] for line in lines[:2]] == ['l0=0.6,l1=0.4', 'l2']
    assert lines[0]['infer_request']['messages'] == HELLO


def test_the_oldest_request_is_answered_first_whatever_others_ask_for(written):
    with local(config_of(written, max_batch_size=2)) as server, ThreadPoolExecutor(5) as pool:
        order = []
        with busy(server):
            calls = []
            # Of two settings, so that the second waits for nobody of the first.
            for number, tokens in enumerate([4, 5, 4, 4, 5]):
                calls.append(pool.submit(server.answer, max_tokens=tokens))
                calls[-1].add_done_callback(lambda _, number=number: order.append(number))
                # It is encoded in a thread, where one that came later may pass it.
                until(lambda: server.deploy.infer_engine._queue.qsize() == number + 1)
        for call in calls:
            call.result()
        assert [set(order[:2]), set(order[2:4]), order[4:]] == [{0, 2}, {1, 4}, [3]]


def test_a_seed_draws_the_same_answer_again(server):
    settings = {'temperature': 1., 'seed': 7, 'adapters': MIXTURE, 'max_tokens': 8}
    first = server.answer(**settings)
    assert server.answer(**settings) == first
    assert {server.answer(**{**settings, 'seed': seed}) for seed in range(4)} != {first}


@pytest.mark.parametrize(('body', 'status', 'param', 'told'), [
    ({'model': 'nobody'}, 404, 'model', 'nobody'),
    ({'adapters': {'nobody': 1}}, 404, 'adapters', 'nobody'),
    ({'adapters': ['l0'], 'weights': [1, 2]}, 400, 'weights', '1 adapters'),
    ({'adapters': {'l0': 'much'}}, 400, 'adapters', 'much'),
    ({'adapters': ['l0'] * 9}, 400, 'adapters', 'At most 8'),
    # Their parameters have no average.
    ({'adapters': ['l0', 'l4']}, 400, 'adapters', "{'l0': 4, 'l4': 8}"),
    ({'temperature': -1}, 400, 'temperature', '-1'),
    ({'top_p': 2}, 400, 'top_p', '2'),
    ({'max_tokens': 0}, 400, 'max_tokens', '0'),
    ({'n': 17}, 400, 'n', '16'),
    ({'n': 2, 'temperature': 0, 'stream': False}, 400, None, 'num_return_sequences'),
    ({'n': 2, 'stream': True}, 400, 'n', 'stream'),
    ({'messages': []}, 400, None, 'found none'),
    ({'messages': [{'role': 'nobody', 'content': 'x'}]}, 400, 'messages', 'nobody'),
    ({'messages': [{'role': 'user', 'content': 'x' * 20_000}]}, 400, 'messages', 'max_length'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image', 'image': '/etc/hosts'}]}]}, 400, None, '/etc/hosts'),
    ({'images': ['/etc/passwd']}, 400, None, '/etc/passwd'),
    ({'tools': [{}], 'tool_choice': {}}, 400, None, 'tools'),
    ({'logprobs': True, 'top_logprobs': 99}, 400, None, '99'),
])  # yapf: disable
@pytest.mark.parametrize('stream', [False, True])
def test_a_mistake_is_told_as_openai_tells_it_with_the_offender(server, body, status, param, told, stream):
    response = server.post(**{'stream': stream, **body})
    error = response.json()['error']
    assert (response.status_code, error['param']) == (status, param)
    assert told in error['message'] and error['type'] in ('invalid_request_error', 'not_found_error')
    assert 'Traceback' not in response.text and 'site-packages' not in response.text
    assert server.answer(adapters=MIXTURE)


@pytest.mark.parametrize(('content', 'status'), [(b'{', 400), (b'', 400), (b'\xff', 400), (b'[]', 400),
                                                 (b'{"model": "\\ud800", "messages": []}', 400)])
def test_a_body_that_is_no_request_is_refused(server, content, status):
    response = server.http.post('/v1/chat/completions', content=content, headers={'Content-Type': 'application/json'})
    assert response.status_code == status and response.json()['error']['message']


def test_a_body_without_its_header_is_told_of_it(server):
    response = server.http.post('/v1/chat/completions', content=json.dumps({'model': BASE, 'messages': HELLO}))
    # Older releases of FastAPI read it.
    assert response.status_code == 200 or 'Content-Type' in response.json()['error']['message']


def test_a_prompt_that_is_too_long_is_told_as_openai_tells_it(server):
    error = server.post(messages=[{'role': 'user', 'content': 'hello' * 1000}]).json()['error']
    assert error['code'] == 'context_length_exceeded' and '512' in error['message']


def test_a_body_that_is_nested_deeply_is_refused(server):
    response = server.post(tools=json.loads('[{"a":' * 200 + '1' + '}]' * 200))
    assert response.status_code == 400


@pytest.mark.parametrize('stream', [False, True])
def test_what_the_server_does_wrong_is_told_by_a_number_alone_and_the_next_request_works(server, stream, caplog):
    engine = server.deploy.infer_engine
    with mock.patch.object(engine, '_generate', side_effect=RuntimeError('secret of the server')):
        response = server.post(adapters=MIXTURE, stream=stream)
    error = response.json()['error']
    assert response.status_code == 500 and error['type'] == 'server_error'
    assert 'secret' not in response.text and error['code'] in caplog.text
    assert 'secret of the server' in caplog.text and 'Traceback' in caplog.text
    assert server.answer(adapters=MIXTURE)


def test_an_error_in_the_midst_of_a_stream_is_its_last_event(server):
    generate = server.deploy.infer_engine._generate

    def failing(*args, streamer=None, **kwargs):
        put = streamer.put
        values = []

        def put_some(value):
            values.append(value)
            put(value)
            if len(values) > 6:
                raise RuntimeError('secret of the server')

        streamer.put = put_some
        return generate(*args, streamer=streamer, **kwargs)

    with mock.patch.object(server.deploy.infer_engine, '_generate', failing):
        # It answers with line breaks, which are streamed at once.
        found = events(server.post(stream=True).text)
    assert found[0]['choices'] and 'secret' not in json.dumps(found)
    assert found[-1]['error']['type'] == 'server_error' and found[-1]['object'] == 'error'


def test_files_that_were_damaged_meanwhile_are_no_mistake_of_the_request(written, tmp_path):
    model, paths = written
    copy = tmp_path / 'damaged'
    copy.mkdir()
    for file in ('adapter_config.json', 'adapter_model.safetensors'):
        (copy / file).write_bytes(open(f'{paths["peft"]["l0"]}/{file}', 'rb').read())
    with local(config_of(written, adapters={'damaged': str(copy)}, cache_bytes=0)) as server:
        assert server.answer(model='damaged') == server.answer(model='l0')
        (copy / 'adapter_model.safetensors').write_bytes(b'nothing')
        response = server.post(model='damaged')
        assert response.status_code == 500 and str(tmp_path) not in response.text
        assert server.answer(model='l0')


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_away_while_it_waits_is_not_answered(server, stream):
    gone, sizes = server.counted('swift_patch_requests_total{outcome="499"}'), []
    with mock.patch.object(server.deploy.infer_engine, 'on_batch', sizes.append):
        with busy(server):
            with socket_of(server, stream) as client:
                until(server.deploy._waiting)
                client.close()
                until(lambda: not server.deploy._waiting())
        assert server.answer()
    assert sizes == [1, 1], 'the one that was busy, and the one after it'
    assert server.counted('swift_patch_requests_total{outcome="499"}') == gone + 1


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_away_while_it_is_answered_ends_its_row(server, stream):
    engine, lengths = server.deploy.infer_engine, []
    started, go_on = threading.Event(), threading.Event()
    generate = engine._generate

    def watched(*args, stopping_criteria=(), **kwargs):

        def slow(input_ids, scores, **_):
            started.set()
            assert go_on.wait(60)
            return input_ids[:, 0] < 0

        found = generate(*args, stopping_criteria=type(stopping_criteria)([slow, *stopping_criteria]), **kwargs)
        sequences = found['sequences'] if hasattr(found, 'keys') else found
        lengths.append(sequences.shape[1] - kwargs['input_ids'].shape[1])
        return found

    with mock.patch.object(engine, '_generate', watched), socket_of(server, stream) as client:
        assert started.wait(60)
        client.close()
        until(lambda: not server.deploy._calls)
        go_on.set()
        until(lambda: lengths)
    assert lengths[0] < 200
    assert server.answer(model='l0')


@contextmanager
def socket_of(server, stream):
    """Asks over a socket that a test may close whenever it likes."""
    host, port = server.url.removeprefix('http://').split(':')
    body = json.dumps({'model': 'l0', 'messages': HELLO, 'stream': stream, 'max_tokens': 200}).encode()
    head = (f'POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n'
            f'Content-Length: {len(body)}\r\n\r\n')
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + body)
        yield client


def test_a_queue_that_is_full_refuses_and_says_when_to_come_again(written):
    with local(config_of(written, limits={'max_waiting': 2})) as server, ThreadPoolExecutor(2) as pool:
        with busy(server):
            calls = [pool.submit(server.answer) for _ in range(2)]
            until(lambda: server.deploy._waiting() == 2)
            response = server.post()
        assert response.status_code == 429 and response.json()['error']['code'] == 'queue_full'
        assert int(response.headers['Retry-After']) >= 1
        assert all(call.result() for call in calls) and server.answer()


@pytest.mark.parametrize('stream', [False, True])
def test_a_request_that_takes_too_long_is_ended(written, stream):
    with local(config_of(written, limits={'max_seconds': 2.})) as server:
        with busy(server):
            response = server.post(stream=stream)
            assert response.status_code == 504 and 'waited' in response.json()['error']['message']
            assert not server.deploy._waiting()


@pytest.mark.parametrize('is_told', [True, False])
def test_a_body_that_is_too_large_is_refused(written, is_told):
    with local(config_of(written, limits={'max_body_bytes': 1000})) as server:
        body = json.dumps({'model': BASE, 'messages': [{'role': 'user', 'content': 'x' * 1000}]}).encode()
        content = body if is_told else iter([body[:500], body[500:]])
        response = server.http.post(
            '/v1/chat/completions', content=content, headers={'Content-Type': 'application/json'})
        assert response.status_code == 413 and '1,000 bytes' in response.json()['error']['message']
        assert server.answer()


def test_a_body_that_does_not_come_is_waited_for_as_long_as_a_request_may_take(written):
    with local(config_of(written, limits={'max_seconds': .5})) as server:
        host, port = server.url[len('http://'):].split(':')
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
                           b'Content-Length: 100\r\n\r\n{')
            found = client.makefile('rb').read()
        assert found.startswith(b'HTTP/1.1 408') and b'part of one' in found
        assert server.counted('swift_patch_requests_total{outcome="408"}') == 1


def test_without_the_key_nothing_is_told_but_what_there_is(written):
    with local(config_of(written, swift_args={'api_key': 'secret'})) as server:
        for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 'secret'}):
            server.http.headers = headers
            response = server.post()
            assert response.status_code == 401 and response.json()['error']['code'] == 'invalid_api_key'
            assert response.headers['WWW-Authenticate'] == 'Bearer'
            for path in ('/metrics', '/docs', '/openapi.json', '/v1/models/l0', '/ui', '/nothing'):
                assert server.http.get(path).status_code == 401
            for path in ('/health', '/v1/models'):
                assert server.http.get(path).status_code == 200
        server.http.headers = {'Authorization': 'Bearer secret'}
        assert server.answer() and server.http.get('/metrics').status_code == 200


def test_the_key_is_never_shown(written, caplog):
    caplog.set_level('DEBUG')
    with local(config_of(written, swift_args={'api_key': 'open-sesame', 'verbose': True})) as server:
        server.http.headers = {'Authorization': 'Bearer open-sesame'}
        assert server.answer()
    assert 'args: ' in caplog.text and 'open-sesame' not in caplog.text


def test_media_that_do_not_come_keep_nobody_else_waiting(server, monkeypatch):
    monkeypatch.setenv('SWIFT_ALLOW_INTERNAL_URL', '1')
    with ThreadPoolExecutor(1) as pool:
        with socket.create_server(('127.0.0.1', 0)) as elsewhere:
            url = f'http://127.0.0.1:{elsewhere.getsockname()[1]}/picture.png'
            content = [{'type': 'image_url', 'image_url': {'url': url}}, {'type': 'text', 'text': 'hello'}]
            call = pool.submit(server.post, messages=[{'role': 'user', 'content': content}])
            asked, _ = elsewhere.accept()
            with asked:
                assert server.answer()
                assert not call.done()
        # There is nothing at that address any more.
        assert call.result().status_code == 400
        assert call.result().json()['error']['param'] == 'messages'


def test_models_are_listed_in_pages_and_never_what_was_asked_for(written):
    with local(config_of(written)) as server:
        assert server.answer(model='l0=0.3,l1=0.7')
        first = server.http.get('/v1/models').json()
        assert [(each['id'], each['parent']) for each in first['data']] == [(BASE, None),
                                                                            *((f'l{i}', BASE) for i in range(5))]
        assert first['object'] == 'list' and first['has_more'] is False
        for number in range(10_000):
            server.deploy.library.add(f'more{number}', 'nowhere')
        names, after = [], ''
        while True:
            page = server.http.get(f'/v1/models?limit=4000{after}').json()
            names += [each['id'] for each in page['data']]
            if not page['has_more']:
                break
            after = f'&after={names[-1]}'
        assert len(names) == len(set(names)) == 10_006
        assert len(server.http.get('/v1/models').json()['data']) == 1000
        for query in ('limit=0', 'limit=x', 'after=nobody'):
            assert server.http.get(f'/v1/models?{query}').status_code in (400, 404)
        assert server.http.get('/v1/models/l0,l1').json()['id'] == 'l0=0.5,l1=0.5'
        assert server.http.get('/v1/models/nobody').status_code == 404


def test_what_happens_is_counted(written):
    with local(config_of(written)) as server:
        together(server, ASKED)
        server.answer(adapters=MIXTURE)
        server.post(model='nobody')
        assert server.counted('swift_patch_requests_total{outcome="200"}') == len(ASKED) + 2
        assert server.counted('swift_patch_requests_total{outcome="404"}') == 1
        assert server.counted(f'swift_patch_batch_size_bucket{{le="{float(4)}"}}') == 2
        assert server.counted('swift_patch_batch_size_sum') == len(ASKED) + 2
        for part in ('queued', 'composing', 'generating'):
            assert server.counted(f'swift_patch_{part}_seconds_count') == len(ASKED) + 2
        assert server.counted('swift_patch_tokens_total{kind="generated"}') > len(ASKED)
        assert server.counted('swift_patch_adapter_reads_total{source="disk"}') == 4
        assert server.counted('swift_patch_adapter_reads_total{source="memory"}') > 0
        assert server.counted('swift_patch_cached_bytes{device="cpu"}') > 0
        assert server.counted('swift_patch_adapters') == 5
        assert server.counted('process_resident_memory_bytes') > 1e6
        assert server.counted('swift_patch_requests_waiting') == server.counted('swift_patch_requests_running') == 0


def test_text_never_names_a_file(server, tmp_path):
    picture = tmp_path / 'picture.png'
    picture.touch()
    messages = [{'role': 'user', 'content': f'<img>{picture}</img>'}]
    stock = SimpleNamespace(images=[], messages=[dict(message) for message in messages])
    type(server.deploy.template)._replace_image_tags(stock)
    assert stock.images == [str(picture)], 'or ms-swift reads nothing'
    ours = SimpleNamespace(images=[], messages=messages)
    server.deploy.infer_engine.template._replace_image_tags(ours)
    assert ours.images == [] and ours.messages[0]['content'] == f'<img>{picture}</img>'


def test_a_server_that_answers_nobody_any_more_is_not_healthy(server):
    assert server.answer() and server.http.get('/health').status_code == 200
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()
    with mock.patch.object(server.deploy.infer_engine, '_task_thread', ended):
        assert [server.http.get(path).status_code for path in ('/health', '/ping')] == [503, 503]


def test_an_adapter_with_the_name_of_the_base_model_is_refused(written):
    from swift_patch.serve.run import make_server
    with pytest.raises(ValueError, match='served_model_name'):
        make_server(config_of(written, swift_args={'served_model_name': 'l0'}))


def test_a_client_that_does_not_read_is_left_in_the_end():
    from swift_patch.serve.app import Call, _Stream
    call, stack, closed = Call(None, BASE, 0, time.monotonic() - 1), ExitStack(), []
    stack.callback(closed.append, True)

    async def events():
        yield 'data'

    async def never(*message):
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(_Stream(call, events(), stack)({'type': 'http'}, never, never), 60))
    assert closed and call.outcome == 504


def test_media_that_hang_keep_no_text_waiting(server):
    go_on, encoded = threading.Event(), type(server.deploy)._encoded_with_media

    def hanging(self, infer_request):
        if infer_request.images:
            assert go_on.wait(60)
        return encoded(self, infer_request)

    with mock.patch.object(type(server.deploy), '_encoded_with_media', hanging), ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(server.post, images=['data:image/png;base64,AAAA']) for _ in range(40)]
        until(lambda: server.deploy._waiting() == 40)
        assert server.answer()
        go_on.set()
        assert {call.result().status_code for call in calls} <= {200, 400}
