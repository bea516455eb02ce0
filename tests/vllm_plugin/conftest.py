"""What the tests with a real vLLM share; without one there are none. `make vllm-test` has one."""
import os
import pytest
import shutil
from importlib.util import find_spec

_spec = find_spec('vllm')
# A folder that happens to have the name has no file.
if _spec is None or _spec.origin is None:
    collect_ignore_glob = ['test_*.py']
else:
    from vllm_server import ENVIRONMENT
    for _name, _value in ENVIRONMENT.items():
        # Before anything imports vllm.
        os.environ.setdefault(_name, _value)


@pytest.fixture(scope='session')
def written(tmp_path_factory):
    """As for the other tests, but wide enough: vLLM's attention on a CPU wants heads of 32 and more."""
    from models import write_checkpoints
    return write_checkpoints(tmp_path_factory.mktemp('written'), r=[4, 4, 4, 4, 8], hidden_size=64)


@pytest.fixture(scope='session')
def folder(written, tmp_path_factory):
    """The adapters of `server`: `l0` to `l3` of rank 4, `l4` of rank 8; `spoiled0`, ... are for tests to spoil."""
    found = tmp_path_factory.mktemp('adapters') / 'all'
    _, paths = written
    for name, path in paths['peft'].items():
        shutil.copytree(path, found / name)
    for number in range(3):
        shutil.copytree(paths['peft'][f'l{number}'], found / f'spoiled{number}')
    return found


@pytest.fixture(scope='session')
def server(written, folder):
    """A server of them, as plain vLLM starts it: `SWIFT_PATCH_ADAPTERS` is all that there is to set."""
    from vllm_server import SMALL, serving_vllm
    with serving_vllm(written[0], *SMALL, '--max-lora-rank', '16', SWIFT_PATCH_ADAPTERS=folder) as server:
        yield server


@pytest.fixture(scope='session')
def oracle(written):
    """What each mixture is to answer."""
    from vllm_oracle import Oracle
    model, paths = written
    return Oracle(model, paths['peft'])


@pytest.fixture(scope='session')
def deployed(written, tmp_path_factory):
    """A server of this process with vLLM, whose engine a test can see; see `vllm_deployed.deploying`."""
    from vllm_deployed import deploying
    with deploying(written, tmp_path_factory.mktemp('deployed')) as found:
        yield found


@pytest.fixture(scope='session')
def alone(written):
    """Answers a question by ms-swift's engine, see `serving.alone`."""
    import vllm_deployed  # noqa: F401
    from serving import alone
    return alone(written)
