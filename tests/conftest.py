"""What all tests share. The environment comes first: it must be set before anything imports torch."""
import logging
import os

# Small models are fastest on one thread, and what runs beside does not slow them down.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import pointed  # noqa: E402
import pytest  # noqa: E402
from unittest import mock  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        '--ms-swift',
        metavar='PATH',
        help='run tests/weighted_adapter on an ms-swift that `swift-patch upstream` edited, without swift_patch')


def pytest_configure(config):
    if config.getoption('--ms-swift'):
        pointed.point_at(config.getoption('--ms-swift'))


@pytest.fixture(autouse=True)
def environment():
    """What commands and ms-swift set in the environment (LOG_LEVEL, for one) is gone after the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def seen_by_pytest(request, caplog):
    """Whatever an edited ms-swift logs, which ms-swift keeps from the handlers of others with each `get_logger`."""
    if not request.config.getoption('--ms-swift'):
        yield
        return
    logger = logging.getLogger(pointed.THEIRS)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


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
