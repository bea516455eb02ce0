"""What all tests share. The environment comes first: it must be set before anything imports torch."""
import os

# Small models are fastest on one thread, and what runs beside does not slow them down.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import pytest  # noqa: E402
from unittest import mock  # noqa: E402


@pytest.fixture(autouse=True)
def environment():
    """What commands and ms-swift set in the environment (LOG_LEVEL, for one) is gone after the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(params=['swift', 'peft'])
def build(request):
    """Builds a model with LoRAs `l0` to `l3`, in both wrappers."""
    from models import BUILDERS
    return BUILDERS[request.param]


@pytest.fixture
def model(build):
    """A model with LoRAs `l0` to `l3`, in both wrappers."""
    return build()


@pytest.fixture(scope='session')
def written(tmp_path_factory):
    """The folder of a small model, and those of its LoRAs `l0` to `l4` in both formats; `l4` has a larger rank."""
    from models import write_checkpoints
    return write_checkpoints(tmp_path_factory.mktemp('written'), r=[4, 4, 4, 4, 8])
