"""A real vLLM that serves on 127.0.0.1 in processes of its own, which tests and benchmarks ask."""
import httpx
import os
import psutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from server import Server, free_port
from typing import Any, Iterator, List

# A server that is not up in this time hangs: it is killed.
_SECONDS_TO_BEGIN = 300
BASE = 'base'
# For small models, which are fastest on one thread. Of the plugins only ours: the one that comes with ms-swift needs
# torchvision. Nothing is told to anybody.
ENVIRONMENT = {
    'VLLM_PLUGINS': 'swift_patch',
    'VLLM_CPU_KVCACHE_SPACE': '1',
    'VLLM_CPU_OMP_THREADS_BIND': 'nobind',
    'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
    'VLLM_NO_USAGE_STATS': '1',
    'DO_NOT_TRACK': '1',
    'OMP_NUM_THREADS': '1',
    'HF_HUB_OFFLINE': '1',
}
# Options for these: nothing is compiled, which takes longer than it saves, and answers are as exact as can be.
SMALL = ('--dtype', 'float32', '--max-model-len', '256', '--enforce-eager', '--enable-lora', '--max-num-seqs', '64',
         '--max-loras', '8', '--max-cpu-loras', '16')


class VllmServer(Server):
    """A vLLM that listens."""

    @property
    def processes(self) -> List[psutil.Process]:
        """Its processes: the API's, the engine's, the workers'."""
        of_api = psutil.Process(self.process.pid)
        return [of_api, *of_api.children(recursive=True)]


@contextmanager
def serving_vllm(model: str, *options: str, **environment: Any) -> Iterator[VllmServer]:
    """Starts a vLLM and waits until it is healthy. At the end of the block it is told to end.

    Args:
        model: the folder of its model.
        *options: further options of `vllm serve`.
        **environment: what its environment has besides `ENVIRONMENT`.

    Raises:
        RuntimeError: It did not begin to serve; with all that it said.
    """
    url = f'http://127.0.0.1:{free_port()}'
    command = [
        sys.executable, '-m', 'vllm.entrypoints.openai.api_server', '--model', model, '--served-model-name', BASE,
        '--host', '127.0.0.1', '--port',
        url.rpartition(':')[2], *options
    ]
    variables = {**os.environ, **ENVIRONMENT, **{name: str(value) for name, value in environment.items()}}
    with tempfile.NamedTemporaryFile(
            'w+', suffix='.log') as log, subprocess.Popen(
                command, stdout=log, stderr=log, text=True, env=variables) as process:
        server = VllmServer(process, BASE, url, log)
        processes: List[psutil.Process] = []
        watchdog = threading.Timer(_SECONDS_TO_BEGIN, process.kill)
        watchdog.start()
        try:
            while not _is_healthy(url):
                if process.poll() is not None:
                    raise RuntimeError(f'vLLM ended with {process.returncode} instead of serving:\n{server.errors}')
                threading.Event().wait(.1)
            watchdog.cancel()
            processes = server.processes
            yield server
            if process.poll() is None:
                server.end()
        finally:
            watchdog.cancel()
            process.kill()
            # Those that it started end with it, unless they hang.
            for other in psutil.wait_procs(processes, timeout=30)[1]:
                other.kill()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f'{url}/health', timeout=5).status_code == 200
    except httpx.TransportError:
        return False
