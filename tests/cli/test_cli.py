import os
import pytest
import subprocess
import sys

import swift_patch
from swift_patch import cli
from swift_patch.cli.doctor import PLUGIN
from swift_patch.patching import PATCHES


@pytest.mark.parametrize('arguments',
                         [['--help'], *([name, '--help'] for name in ('infer', 'bench', 'demo', 'doctor'))])
def test_help_needs_neither_torch_nor_ms_swift(arguments):
    code = f'''
import sys
from swift_patch.cli import main
try:
    main({arguments!r})
except SystemExit as e:
    assert e.code == 0, e.code
assert not {{'torch', 'swift', 'transformers', 'matplotlib'}} & set(sys.modules)
'''
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert 'swift-patch' in process.stdout


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        cli.main(['--version'])
    assert capsys.readouterr().out == f'swift-patch {swift_patch.__version__}\n'


def test_doctor_shows_the_plugin_the_versions_and_what_is_in_force(capsys):
    assert cli.main(['doctor']) == 0
    out = capsys.readouterr().out
    assert str(PLUGIN) in out and PLUGIN.is_file()
    for package in ('ms-swift', 'peft', 'torch'):
        assert package in out
    assert out.count('yes') + out.count('not needed') == len(PATCHES)


def test_doctor_fails_where_the_patch_is_not_in_force():
    process = subprocess.run([sys.executable, '-m', 'swift_patch.cli', 'doctor'],
                             env={
                                 **os.environ, 'SWIFT_PATCH_DISABLE': '1'
                             },
                             capture_output=True,
                             text=True)
    assert process.returncode == 1
    assert 'not applied' in process.stdout


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([])
    assert e.value.code == 2


@pytest.mark.parametrize('option', [[], ['--compile_merging']])
def test_infer_hands_the_option_compile_merging_on(monkeypatch, capsys, option):
    from swift_patch.inference import run

    def stop(config, stage):
        raise ValueError(f'stopped with {config.compile_merging}')

    monkeypatch.setattr(run, 'run_infer', stop)
    arguments = ['infer', '--adapters', 'a=none', '--val_dataset', 'none', '--result_path', 'none']
    assert cli.main([*arguments, *option]) == 2
    assert f'stopped with {bool(option)}' in capsys.readouterr().err
