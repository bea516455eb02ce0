"""The requests that the page shows for copying are the requests that a server gets: they are run for real."""
import json
import os
import pytest
import shlex
import shutil
import subprocess
import sys
import threading
from fuzzing import tries
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from hypothesis import given
from hypothesis import strategies as st

from swift_patch.serve.snippets import as_curl, as_python

KEY = 'k$`"\'ey'
WEIRD = '\'"$HOME `id` \\ \n\r\t! # @x {{a}} ${b} é 漢字 🙂 \x00\x7f\u2028'
BODY = {
    'model': 'base',
    'messages': [{
        'role': 'user',
        'content': 'How many?'
    }],
    'adapters': {
        'sql': 0.6,
        'math': 0.4
    },
    'merge_method': 'mixture',
    'max_tokens': 16,
    'temperature': 0.0
}


@pytest.fixture(scope='module')
def server():
    """A server that answers with what it got, as OpenAI's; with the list of those requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            requests.append((self.path, self.headers['Authorization'], self.headers['Content-Type'], body))
            message = {'role': 'assistant', 'content': json.dumps(body)}
            choices = [{'index': 0, 'finish_reason': 'stop', 'message': message}]
            answer = json.dumps({
                'id': '1',
                'object': 'chat.completion',
                'created': 1,
                'model': 'm',
                'choices': choices
            })
            self.send_response(200)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}/v1', requests
        httpd.shutdown()
        thread.join()


def run_curl(text):
    if shutil.which('curl') is None:
        pytest.skip('there is no curl')
    return subprocess.run(['bash', '-c', text],
                          env={
                              **os.environ, 'API_KEY': KEY,
                              'no_proxy': '*'
                          },
                          check=True,
                          capture_output=True)


def run_python(text):
    return subprocess.run([sys.executable, '-c', text],
                          env={
                              **os.environ, 'API_KEY': 'key',
                              'no_proxy': '*'
                          },
                          check=True,
                          capture_output=True,
                          text=True)


@pytest.mark.parametrize('has_key', [False, True])
def test_curl_sends_the_request(server, has_key):
    url, requests = server
    run_curl(as_curl(url, BODY, has_key))
    assert requests.pop() == ('/v1/chat/completions', f'Bearer {KEY}' if has_key else None, 'application/json', BODY)


@tries(20)
@given(st.text() | st.sampled_from([WEIRD]), st.dictionaries(st.text(), st.floats(-1, 2)))
def test_curl_sends_any_text_as_it_is(server, text, adapters):
    url, requests = server
    body = {**BODY, 'messages': [{'role': 'user', 'content': text}], 'adapters': adapters}
    run_curl(as_curl(url, body, False))
    assert requests.pop()[-1] == body


@pytest.mark.parametrize('has_key', [False, True])
@pytest.mark.parametrize('adapters', [{}, {'adapters': ['sql', WEIRD], 'merge_method': 'fusion'}])
def test_python_sends_the_request_and_prints_the_answer(server, has_key, adapters):
    url, requests = server
    body = {**{key: BODY[key] for key in ('model', 'max_tokens', 'temperature')}, **adapters}
    body['messages'] = [{'role': 'user', 'content': WEIRD}]
    printed = run_python(as_python(url, body, has_key)).stdout
    path, key, _, sent = requests.pop()
    assert (path, key, sent) == ('/v1/chat/completions', 'Bearer key' if has_key else 'Bearer none', body)
    assert json.loads(printed) == body


@tries(200)
@given(st.text(), st.dictionaries(st.text(), st.floats(-1, 2)))
def test_python_has_any_text_as_it_is(text, adapters):
    """Its call is run with a stand-in for the package, which takes a second to import."""
    body = {**BODY, 'messages': [{'role': 'user', 'content': text}], 'adapters': adapters}
    sent = {}

    class OpenAI:

        def __init__(self, base_url, api_key):
            self.chat = self.completions = self
            self.message = self

        content = None

        def create(self, extra_body, **fields):
            sent.update(fields, **extra_body)
            self.choices = [self]
            return self

    code = as_python('http://x/v1', body, False).replace('from openai import OpenAI', '')
    exec(code, {'OpenAI': OpenAI, 'print': lambda *_: None})
    assert sent == body


@tries(100)
@given(st.text())
def test_an_address_is_quoted(address):
    assert shlex.split(as_curl(address, BODY, False))[1] == address + '/chat/completions'
