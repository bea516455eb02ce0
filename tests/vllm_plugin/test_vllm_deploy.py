"""`swift-patch deploy --infer_backend vllm` serves what it serves by transformers, all requests in one batch."""
import httpx
import json
import psutil
import pytest
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from vllm_deployed import HELLO, PLACES, VLLM, drawn, is_idle, number_in, until

from serving import serving_written  # isort: skip


def test_requests_of_any_settings_are_answered_together_each_as_it_is_alone(deployed, alone):
    mixtures = drawn(12, seed=5)
    with ThreadPoolExecutor(16) as pool:
        # One that goes on for long, and others that end soon, none of which waits for it.
        long = pool.submit(deployed.post, adapters={'l0': 1.}, max_tokens=200)
        until(lambda: deployed.counted('swift_patch_requests_running') >= 1)
        found = [
            pool.submit(deployed.post, adapters=mixture, max_tokens=8, temperature=0, top_p=1 - number / 100)
            for number, mixture in enumerate(mixtures)
        ]
        responses = [each.result().json() for each in found]
        long = long.result().json()
    assert [each['choices'][0]['message']['content']
            for each in responses] == [alone('hello', mixture) for mixture in mixtures]
    assert max(each['timings']['batch_size'] for each in responses) > 1
    assert long['usage']['completion_tokens'] == 200
    assert long['timings']['generating'] > max(each['timings']['generating'] for each in responses)


def test_every_way_to_ask_is_answered_and_told_as_what_was_asked_for(deployed, alone):
    for body, expected in (
        ({}, alone('hello')),
        ({'model': 'l1'}, alone('hello', {'l1': 1.})),
        ({'model': 'l1=0.25,l2=0.75'}, alone('hello', {'l1': .25, 'l2': .75})),
        ({'model': 'l1=2.0,l2=1.0,merge_method=selection'}, alone('hello', {'l1': 1.})),
        ({'adapters': ['l1', 'l2'], 'weights': [.25, .75]}, alone('hello', {'l1': .25, 'l2': .75})),
    ):  # yapf: disable
        response = deployed.post(**body).json()
        assert response['choices'][0]['message']['content'] == expected
        assert response['model'] == body.get('model', response['model'])
        timings = response['timings']
        assert timings['queued'] >= 0 and timings['composing'] >= 0 and timings['generating'] > 0


def test_a_stream_has_the_same_text_and_its_timings_at_its_end(deployed, alone):
    body = {'model': 'model', 'messages': HELLO, 'adapters': {'l0': .5, 'l1': .5}, 'stream': True}
    text = deployed.http.post('/v1/chat/completions', json=body).text
    events = [line.removeprefix('data: ') for line in text.splitlines() if line]
    assert events.pop() == '[DONE]'
    chunks = list(map(json.loads, events))
    assert ''.join(chunk['choices'][0]['delta']['content'] for chunk in chunks) == alone('hello', {'l0': .5, 'l1': .5})
    assert chunks[-1]['timings']['batch_size'] == 1 and chunks[-1]['choices'][0]['finish_reason']


def test_a_seed_is_kept_and_several_answers_are_several(deployed):
    body = {'adapters': {'l0': .5, 'l1': .5}, 'temperature': 1, 'seed': 7}
    assert deployed.answer(**body) == deployed.answer(**body) != deployed.answer(**{**body, 'seed': 8})
    response = deployed.post(**body, n=3).json()
    assert len({choice['message']['content'] for choice in response['choices']}) == 3
    assert deployed.answer(**{**body, 'seed': None}) != deployed.answer(**{**body, 'seed': None})


@pytest.mark.parametrize(('body', 'status', 'param', 'told'), [
    ({'model': 'nobody'}, 404, 'model', 'nobody'),
    ({'adapters': ['l0', 'l4']}, 400, 'adapters', 'rank'),
    ({'adapters': ['l0', 'l1', 'l2'], 'merge_method': 'mixture'}, 400, 'adapters', 'of 16'),
    ({'num_beams': 2}, 400, None, 'num_beams'),
    ({'n': PLACES + 1}, 400, 'n', str(PLACES)),
    ({'messages': [{'role': 'user', 'content': 'a' * 300}]}, 400, 'messages', '256'),
    ({'top_p': 0.}, 400, None, 'top_p'),
])  # yapf: disable
def test_what_is_wrong_is_told_as_by_transformers(deployed, body, status, param, told):
    response = deployed.post(**body)
    assert response.status_code == status, response.text
    error = response.json()['error']
    assert told in error['message'] and error['param'] == param
    assert deployed.http.get('/health').status_code == 200


def test_an_adapter_that_comes_in_the_place_of_another_one_answers_from_then_on(deployed, written, alone):
    _, paths = written
    path = deployed.come('coming', paths['peft']['l0'])
    assert deployed.answer(model='coming') == alone('hello', {'l0': 1.})
    path.rename(deployed.folder / 'before')
    other = deployed.folder / 'other'
    other.mkdir()
    for file in (deployed.folder.parent / paths['peft']['l1']).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    body = {'lora_name': 'coming', 'lora_path': str(other), 'load_inplace': True}
    assert deployed.http.post('/v1/load_lora_adapter', json=body).status_code == 200
    assert deployed.answer(model='coming') == alone('hello', {'l1': 1.})
    assert deployed.http.post('/v1/unload_lora_adapter', json={'lora_name': 'coming'}).status_code == 200
    assert deployed.post(model='coming').status_code == 404


@pytest.mark.parametrize('stream', [False, True])
def test_what_nobody_waits_for_any_more_is_ended_in_vllm(deployed, stream):
    # The base model answers in whole lines, of which a stream is told at once.
    body = {'model': 'model', 'messages': HELLO, 'max_tokens': 200, 'stream': stream}
    gone = deployed.counted('swift_patch_requests_total{outcome="499"}')
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=deployed.url, headers=deployed.http.headers))
        if stream:
            response = stack.enter_context(client.stream('POST', '/v1/chat/completions', json=body))
            next(response.iter_lines())
        else:
            thread = threading.Thread(target=lambda: pytest.raises(
                httpx.HTTPError, client.post, '/v1/chat/completions', json=body, timeout=.1))
            thread.start()
            thread.join()
    until(lambda: is_idle(deployed.engine))
    until(lambda: deployed.counted('swift_patch_requests_total{outcome="499"}') == gone + 1)


def test_what_waits_is_counted_and_bounded(deployed):
    with ThreadPoolExecutor(100) as pool:
        calls = [pool.submit(deployed.post, adapters={'l0': 1.}, max_tokens=100) for _ in range(100)]
        statuses = [call.result().status_code for call in calls]
    assert set(statuses) == {200, 429}
    assert deployed.counted('swift_patch_requests_waiting') == 0
    assert deployed.counted('swift_patch_batch_size_count') > 0
    metrics = deployed.http.get('/metrics').text
    # Of the workers, of which nothing is known here.
    assert 'swift_patch_adapter_reads' not in metrics and number_in(metrics, 'swift_patch_adapters') >= 5


def test_the_command_says_where_its_engine_ended_and_leaves_no_process(written):
    options = [text for key, value in VLLM.items() for text in (f'--{key}', str(value))]
    with serving_written(written, *options, '--max_batch_size', str(PLACES)) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        body = {'model': 'l0', 'messages': HELLO, 'max_tokens': 4}
        assert httpx.post(f'{server.url}/v1/chat/completions', json=body, timeout=60).status_code == 200
        [engine] = [child for child in family if 'EngineCore' in ' '.join([child.name(), *child.cmdline()])]
        engine.kill()
        until(lambda: httpx.get(f'{server.url}/health').status_code == 503)
        assert httpx.post(f'{server.url}/v1/chat/completions', json=body, timeout=60).status_code == 500
        assert server.end() == 0
        psutil.wait_procs(family, 30)
        assert not [child for child in family if child.is_running()]


def test_told_to_end_the_command_answers_what_it_has_and_leaves_no_process(written):
    options = [text for key, value in VLLM.items() for text in (f'--{key}', str(value))]
    with serving_written(written, *options, '--max_batch_size', '2') as server, ThreadPoolExecutor(4) as pool:
        family = psutil.Process(server.process.pid).children(recursive=True)
        body = {'model': 'l0', 'messages': HELLO, 'max_tokens': 200}
        calls = [pool.submit(httpx.post, f'{server.url}/v1/chat/completions', json=body, timeout=60) for _ in range(4)]
        until(lambda: number_in(httpx.get(f'{server.url}/metrics').text, 'swift_patch_requests_running') == 2)
        assert server.end() == 0
        assert [call.result().status_code for call in calls] == [200] * 4
        psutil.wait_procs(family, 30)
        assert not [child for child in family if child.is_running()]
