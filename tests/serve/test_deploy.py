"""A server of its own process: it ends as it is told to, finishes what runs, and says what it cannot do."""
import httpx
import pytest
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from local import HELLO, number_in, until
from serving import OPTIONS, serving_written

from swift_patch import cli


def ask(url, **body):
    return httpx.post(f'{url}/v1/chat/completions', json={'messages': HELLO, **body}, timeout=120)


def running(url):
    """Returns how many requests the server has, those that wait and those that are answered."""
    metrics = httpx.get(f'{url}/metrics').text
    return sum(number_in(metrics, f'swift_patch_requests_{name}') for name in ('waiting', 'running'))


def test_told_to_end_it_answers_what_it_has_and_takes_no_more(written):
    with serving_written(written, '--max_batch_size', '2') as server, ThreadPoolExecutor(6) as pool:
        calls = [
            pool.submit(ask, server.url, model='l0', max_tokens=300, stream=stream) for stream in [False, True] * 3
        ]
        until(lambda: running(server.url) == 6)
        server.process.send_signal(signal.SIGTERM)
        found = [call.result() for call in calls]
        assert server.process.wait(120) == 0
        assert [response.status_code for response in found] == [200] * 6
        assert all(response.text.endswith('data: [DONE]\n\n') for response in found[1::2])
        with pytest.raises(httpx.ConnectError):
            ask(server.url, model='l0')
        assert 'Traceback' not in server.errors


def test_what_goes_on_for_too_long_after_it_was_told_to_end_is_ended(written):
    with serving_written(written, '--max_shutdown_seconds', '1') as server, ThreadPoolExecutor(1) as pool:
        # As long as the model can.
        call = pool.submit(ask, server.url, model='l0', n=16, max_tokens=100_000, temperature=1)
        until(lambda: running(server.url) == 1)
        server.process.send_signal(signal.SIGTERM)
        try:
            assert call.result().status_code in (200, 500)
        except httpx.HTTPError:
            pass
        assert server.process.wait(120) == 0


@pytest.mark.parametrize(('options', 'told'), [
    (['--max_batch_size', '0'], '--max_batch_size'),
    (['--adapter_folders', '.'], '--api_key'),
    (['--api_key', ''], 'empty'),
    (['--api_key', 'schlüssel'], 'ASCII'),
    (['--api_key', 'k\n'], 'spaces'),
    (['--adapter_folders', 'nowhere', '--api_key', 'k'], 'nowhere'),
    (['--served_model_name', 'l0'], '--served_model_name'),
    (['--infer_backend', 'vllm'], 'infer_backend'),
    (['--task_type', 'embedding'], 'task_type'),
    (['--host', '192.0.2.1'], '192.0.2.1'),
    (['--nonsense', '1'], '--nonsense'),
])  # yapf: disable
def test_what_cannot_be_served_is_told(written, options, told, capsys):
    model, paths = written
    adapters = [f'{name}={path}' for name, path in paths['peft'].items()]
    arguments = ['deploy', '--model', model, '--adapters', *adapters, *OPTIONS, *options]
    try:
        code = cli.main(arguments)
    except SystemExit as e:
        code = e.code
    assert code == 2
    found = capsys.readouterr().err
    assert told in found and 'Traceback' not in found


def test_without_gradio_the_page_is_refused_in_one_line(written, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    model, paths = written
    assert cli.main(['deploy', '--model', model, '--adapters', f'l0={paths["peft"]["l0"]}', '--ui', *OPTIONS]) == 2
    assert "pip install 'swift-patch[ui]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_passed_over_and_an_interrupt_ends_it_as_other_commands(written):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serving_written(written, '--port', str(port)) as server:
            assert server.port != port and ask(server.url, model='l0', max_tokens=2).status_code == 200
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(120) == 130
