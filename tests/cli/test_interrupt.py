"""Ctrl-C at any moment ends a command with one line and exit code 130."""
import json
import os
import pytest
import signal
import subprocess
import sys

from swift_patch import cli

# Runs a command, and interrupts it when it begins to import a module.
SCRIPT = """
import os, signal, sys
from swift_patch.cli import command

module = sys.argv.pop(1)

class Finder:
    def find_spec(self, name, *args):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
command()
"""


@pytest.fixture(scope='module')
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list:
    """An inference that imports everything before it finds that there is no model."""
    folder = tmp_path_factory.mktemp('run')
    (folder / 'lora').mkdir()
    config = {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8, 'target_modules': ['q_proj']}
    (folder / 'lora' / 'adapter_config.json').write_text(json.dumps(config))
    (folder / 'lora' / 'adapter_model.bin').write_bytes(b'')
    (folder / 'data.jsonl').write_text(
        json.dumps({
            'messages': [{
                'role': 'user',
                'content': 'a'
            }],
            'adapters': ['lora']
        }))
    return [
        'infer', '--adapters',
        str(folder / 'lora'), '--val_dataset',
        str(folder / 'data.jsonl'), '--result_path',
        str(folder / 'r.jsonl'), '--model',
        str(folder / 'none')
    ]


@pytest.mark.parametrize('module', [
    'argparse', 'rich.table', 'swift_patch.inference.run', 'torch', 'torch.nn', 'numpy.random', 'transformers', 'peft',
    'datasets', 'pandas', 'swift.utils', 'swift.arguments', 'swift.infer_engine', 'swift.model'
])
def test_an_interrupt_while_something_is_imported_is_one_line(arguments: list, module: str) -> None:
    process = subprocess.run([sys.executable, '-c', SCRIPT, module, *arguments], capture_output=True, text=True)
    if process.returncode == 2:
        pytest.skip(f'{module} was imported before, or is not there')
    assert process.returncode == 130, process.stderr[-3000:]
    assert process.stderr.splitlines()[-1] == 'swift-patch infer: interrupted'
    assert 'Traceback' not in process.stderr


def test_errors_that_libraries_make_of_an_interrupt_are_interrupts(monkeypatch: pytest.MonkeyPatch,
                                                                   capsys: pytest.CaptureFixture) -> None:

    def library(arguments: list) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError('nothing came')
        except KeyboardInterrupt:
            raise ModuleNotFoundError('it cannot be imported')

    from swift_patch.cli import commands
    monkeypatch.setattr(commands, 'run', library)
    assert cli.main(['doctor']) == 130
    assert capsys.readouterr().err == 'swift-patch doctor: interrupted\n'


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from swift_patch.cli import commands
    monkeypatch.setattr(commands, 'run', lambda arguments: {}['missing'])
    with pytest.raises(KeyError):
        cli.main(['doctor'])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_to_be_ignored_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from swift_patch.cli import commands
    monkeypatch.setattr(commands, 'run', lambda arguments: os.kill(os.getpid(), signal.SIGINT) or 0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.main(['doctor']) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
