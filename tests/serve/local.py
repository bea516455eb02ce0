"""A server in this process, on a port of its own, whose engine a test can see."""
import httpx
import threading
import uvicorn
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Tuple

from swift_patch.serve.config import DeployConfig, Limits
from swift_patch.serve.run import make_server
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE

BASE = 'model'
HELLO = [{'role': 'user', 'content': 'hello'}]


def config_of(written: Tuple[str, Dict[str, Dict[str, str]]], **changes: Any) -> DeployConfig:
    """Returns the config of a server of the small model and its LoRAs `l0` to `l4`."""
    model_dir, paths = written
    swift_args = {
        'model': model_dir,
        'model_type': MODEL_TYPE,
        'template': TEMPLATE,
        'torch_dtype': 'float32',
        'max_new_tokens': 8,
        'temperature': 0.,
        'log_interval': -1,
        **changes.pop('swift_args', {})
    }
    limits = Limits(**changes.pop('limits', {}))
    return DeployConfig({**paths['peft'], **changes.pop('adapters', {})}, swift_args, limits=limits, **changes)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Within it, an application listens; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level='error'))
    ready = threading.Event()
    startup = server.startup

    async def told(sockets: Any = None) -> None:
        await startup(sockets)
        ready.set()

    server.startup = told
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(60)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f'http://127.0.0.1:{port}'
    finally:
        server.should_exit = True
        thread.join()


class Local:
    """A server of this process and a client of it.

    Attributes:
        deploy: the server.
        url: where it listens.
        http: a client.
    """

    def __init__(self, deploy: Any, url: str):
        self.deploy, self.url = deploy, url
        self.http = httpx.Client(base_url=url, timeout=120)

    def post(self, path: str = '/v1/chat/completions', **body: Any) -> httpx.Response:
        """Asks, by default for an answer to a greeting by the base model."""
        return self.http.post(path, json={'model': BASE, 'messages': HELLO, **body})

    def answer(self, **body: Any) -> str:
        """Returns what is answered."""
        response = self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()['choices'][0]['message']['content']

    def counted(self, name: str) -> float:
        """Returns a number of `/metrics`, 0 where it is not there yet."""
        return number_in(self.http.get('/metrics').text, name)


@contextmanager
def local(config: DeployConfig) -> Iterator[Local]:
    """Within it, a server of this process listens."""
    deploy = make_server(config)
    with serving(deploy.app) as url:
        yield Local(deploy, url)


def number_in(metrics: str, name: str) -> float:
    """Returns a number of what `/metrics` shows, 0 where it is not there yet."""
    lines = dict(line.rsplit(' ', 1) for line in metrics.splitlines() if line[:1] != '#')
    return float(lines.get(name, 0))


def until(is_so: Callable[[], Any]) -> None:
    """Waits until something is so, as long as a test may take."""
    for _ in range(10_000):
        if is_so():
            return
        threading.Event().wait(.005)
    raise AssertionError('It never came.')
