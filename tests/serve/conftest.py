import pytest
from local import config_of, local


@pytest.fixture(scope='module')
def server(written):
    """A server of this process, of the small model and its LoRAs `l0` to `l4`, of which the last has a larger rank."""
    with local(config_of(written)) as found:
        yield found
