"""A server of this process with an engine of vLLM: one for all tests, for it takes long to start."""
import random
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

# What the tests of the server share.
sys.path.append(str(Path(__file__).parents[1] / 'serve'))

from local import HELLO, Local, config_of, local, number_in, until  # noqa: E402, F401

# How many answers are computed at a time, and how many compositions the workers keep.
PLACES = 4
KEPT = 4 * PLACES
KEY = 'secret'
VLLM = {'infer_backend': 'vllm', 'vllm_enforce_eager': True, 'vllm_max_model_len': 256}


class Deployed(Local):
    """The server, with its key.

    Attributes:
        engine: its engine.
        folder: the folder of adapters that may come while it runs.
    """

    def __init__(self, server: Local, folder: Path):
        super().__init__(server.deploy, server.url)
        self.http.headers['Authorization'] = f'Bearer {KEY}'
        self.engine = server.deploy.infer_engine
        self.folder = folder

    def come(self, name: str, source: str) -> Path:
        """Has a copy of an adapter come."""
        path = shutil.copytree(source, self.folder / name)
        response = self.http.post('/v1/load_lora_adapter', json={'lora_name': name, 'lora_path': str(path)})
        assert response.status_code == 200, response.text
        return path


@contextmanager
def deploying(written: Tuple[str, Dict[str, Dict[str, str]]], folder: Path) -> Iterator[Deployed]:
    """Within it, a server of the small model and its LoRAs `l0` to `l4` listens.

    Args:
        written: The folder of a model, and by format the folders of its LoRAs.
        folder: An empty folder, of which adapters may come.
    """
    config = config_of(
        written,
        max_batch_size=PLACES,
        adapter_folders=[str(folder)],
        limits={'max_waiting': 64},
        swift_args={
            **VLLM, 'api_key': KEY
        })
    with local(config) as server:
        try:
            found = Deployed(server, folder)
            # Now the engine is asked from the server's event loop.
            found.answer()
            yield found
        finally:
            server.deploy.close()


def drawn(count: int, seed: int) -> List[Dict[str, float]]:
    """Returns so many mixtures of one to three of `l0` to `l3`."""
    rng = random.Random(seed)
    return [{
        name: round(rng.uniform(-.5, 1.5), 3)
        for name in rng.sample(['l0', 'l1', 'l2', 'l3'], rng.randint(1, 3))
    } for _ in range(count)]


def is_idle(engine: Any) -> bool:
    """Returns whether vLLM has no request."""
    return not engine.engine.get_num_unfinished_requests()
