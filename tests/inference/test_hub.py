"""Adapters that a hub has are fetched as `swift infer` does, from the hub's cache where there is no network."""
import json
import os
import pytest
import shutil
import subprocess
import sys
from pathlib import Path
from test_run import command_line, make_config, read
from typing import Dict, NamedTuple

from swift_patch.inference.config import InferConfig
from swift_patch.inference.run import run_infer

ITEMS = ['A=owner/name', 'default=owner/name:runs/last']
# All in one process, for it takes long to import ms-swift: what is found by the ids, what is told of others, and two
# commands. Hugging Face's client reads its settings when it is imported.
SCRIPT = """
import json, sys
from swift_patch import cli
from swift_patch.inference import hub
from swift_patch.inference.checkpoints import find_checkpoints, parse_adapters

items, infer, bench = map(json.loads, sys.argv[1:])
# As though the first one that is not there had been waited for.
hub._PATIENCE = -1
found, told = [str(checkpoint.path) for checkpoint in find_checkpoints(parse_adapters(items), {'use_hf': True})], None
try:
    find_checkpoints(parse_adapters(['a=none/one', *items, 'b=none/two', 'c=none']), {'use_hf': True})
except ValueError as e:
    told = str(e)
codes = [cli.main(arguments) for arguments in (infer, bench)]
print()
print(json.dumps([found, told, codes]))
"""


class Done(NamedTuple):
    """What came of `SCRIPT`: its output, and that of a run with the same adapters by their paths."""
    found: list
    told: str
    codes: list
    log: str
    config: InferConfig
    expected: InferConfig


@pytest.fixture(scope='module')
def done(model_dir: str, checkpoints: Dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Runs it where there is no network, and Hugging Face's cache has an adapter and another one in a folder of it."""
    folder, by_path = tmp_path_factory.mktemp('by_id'), tmp_path_factory.mktemp('by_path')
    repository = folder / 'hf' / 'hub' / 'models--owner--name'
    snapshot = repository / 'snapshots' / ('0' * 40)
    shutil.copytree(checkpoints['peft'], snapshot)
    shutil.copytree(checkpoints['swift2'], snapshot / 'runs' / 'last')
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('0' * 40)

    config, expected = make_config(model_dir, checkpoints, folder), make_config(model_dir, checkpoints, by_path)
    run_infer(expected)
    infer = ['infer', *command_line(config), '--use_hf', 'true']
    begin = infer.index('--adapters') + 1
    infer[begin:begin + len(config.adapters)] = [f'lora={checkpoints["swift"]}', *ITEMS, 'unused=none/one']
    bench = [
        'bench', '--adapters', *ITEMS, '--use_hf', 'true', '--samples', '1', '--stock_seconds', '0', '--device', 'cpu'
    ]
    process = subprocess.run([sys.executable, '-c', SCRIPT, *map(json.dumps, (ITEMS, infer, bench))],
                             env={
                                 **os.environ, 'HF_HOME': str(folder / 'hf'),
                                 'HF_HUB_OFFLINE': '1'
                             },
                             cwd=folder,
                             capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return Done(*json.loads(process.stdout.splitlines()[-1]), process.stdout + process.stderr, config, expected)


def test_what_was_fetched_before_is_found_without_a_network(done: Done) -> None:
    name, last = done.found
    assert name.endswith(f'models--owner--name/snapshots/{"0" * 40}') and last == f'{name}/runs/last'


def test_of_all_that_is_not_there_is_told_that_it_is_no_path_either(done: Done) -> None:
    reason = 'the path does not exist, and nothing can be fetched from a hub by it: LocalEntryNotFoundError: '
    a, b, c = done.told.splitlines()
    assert a.startswith(f"adapter 'a' (none/one): {reason}") and 'HF_HUB_OFFLINE=0' in a
    # Looked for in the cache alone, for the one before was waited for.
    assert b.startswith(f"adapter 'b' (none/two): {reason}") and 'local_files_only=False' in b
    assert c == "adapter 'c' (none): the path does not exist."
    assert "adapter 'a': the path none/one does not exist, so it is looked for on a hub." in done.log


def test_an_adapter_of_a_hub_answers_as_by_its_path(done: Done) -> None:
    assert done.codes[0] == 0, done.log[-3000:]
    assert read(done.config) == read(done.expected)
    old, new = (
        json.loads(Path(f'{config.result_path}.args.json').read_text()) for config in (done.expected, done.config))
    assert old == new
    assert 'unused' not in done.log


def test_the_benchmark_fetches_as_well(done: Done) -> None:
    assert done.codes[1] == 0 and 'Composing 2 of 2 LoRAs' in done.log, done.log[-3000:]
