"""A server of `swift-patch deploy` in a process of its own, which tests and benchmarks ask."""
import asyncio
import httpx
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Iterator, List, Mapping, Optional, Sequence

# A server that says nothing in this time hangs: it is killed.
_SECONDS_TO_BEGIN = 300
_SECONDS_TO_END = 120
# What is not answered in this time hangs.
_SECONDS_TO_ANSWER = 600
_READY = re.compile(r'Serving (.*) and [\d,]+ adapters at (https?://\S+)$')


@dataclass(eq=False)
class Server:
    """A server that listens.

    Attributes:
        process: its process.
        base: the name of the base model.
        url: where it is, without a path.
        log: what it wrote to stderr.
    """
    process: 'subprocess.Popen[str]'
    base: str
    url: str
    log: IO[str]

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.url.rpartition(':')[2])

    @property
    def errors(self) -> str:
        """What it wrote to stderr until now."""
        return Path(self.log.name).read_text()

    def end(self) -> int:
        """Has it end as an operator would, and returns the status of its process."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_SECONDS_TO_END)


def posted_at_once(url: str, bodies: Sequence[Mapping[str, Any]]) -> List[httpx.Response]:
    """Sends all bodies at once, and returns the responses, each where its body is."""

    async def post_all() -> List[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=_SECONDS_TO_ANSWER, limits=limits) as client:
            return await asyncio.gather(*(client.post(url, json=body) for body in bodies))

    return asyncio.run(post_all())


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return int(found.getsockname()[1])


@contextmanager
def serving(model: str,
            adapters: Mapping[str, str],
            *options: str,
            environment: Optional[Mapping[str, str]] = None) -> Iterator[Server]:
    """Starts a server and waits until it says that it serves. At the end of the block it is told to end.

    Args:
        model: the folder of its model.
        adapters: the folder of each adapter.
        *options: further options of `swift-patch deploy`.
        environment: its environment, that of this process by default.

    Raises:
        RuntimeError: It did not begin to serve, or the status with which it ended was another than 0; not where the
            block has ended it.
    """
    command = [
        sys.executable, '-m', 'swift_patch.cli', 'deploy', '--model', model, '--adapters',
        *(f'{name}={path}' for name, path in adapters.items()), '--host', '127.0.0.1', '--port',
        str(free_port()), *options
    ]
    with tempfile.NamedTemporaryFile(
            'w+', suffix='.log') as log, subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(_SECONDS_TO_BEGIN, process.kill)
        watchdog.start()
        try:
            found = next(filter(None, map(_READY.match, process.stdout)), None)
            watchdog.cancel()
            server = Server(process, '', '', log) if found is None else Server(process, *found.groups(), log)
            if found is None:
                raise RuntimeError(f'The server ended with {process.wait()} instead of serving:\n{server.errors}')
            # What else it prints is read, so that it never waits for that.
            reader = threading.Thread(target=process.stdout.read, daemon=True)
            reader.start()
            yield server
            if process.poll() is None and server.end() != 0:
                raise RuntimeError(f'The server ended with {process.returncode}:\n{server.errors}')
        finally:
            watchdog.cancel()
            process.kill()
