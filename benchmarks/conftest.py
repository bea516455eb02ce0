"""What all benchmarks share: the number of threads, and the gate."""
import os
import pytest
from gate import Gate
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, Iterator

# Two, unless somebody wants to see that the bounds hold with another number.
THREADS = int(os.environ.get('BENCH_THREADS', '2'))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Gate(Path(__file__).with_name('gate.toml')), 'gate')


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Dict[str, Any]) -> None:
    machine_info['packages'] = {name: version(name) for name in ('torch', 'peft', 'ms-swift')}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many threads on every machine: bounds are for this number."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For what is Python more than arithmetic: a second thread adds nothing but noise."""
    import torch
    torch.set_num_threads(1)


@pytest.fixture
def compiled_only_here() -> Iterator[None]:
    """For what compiles merging: the next one finds it as it was."""
    yield
    import swift_patch
    swift_patch.compile_merging(False)
