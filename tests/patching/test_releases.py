"""What is said and done where ms-swift or PEFT is of a release that is not supported."""
import os
import pytest
import subprocess
import sys
from importlib import metadata
from packaging.requirements import Requirement
from pathlib import Path
from types import SimpleNamespace

import swift_patch
from swift_patch import cli, patching
from swift_patch.patching import releases

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[2] / 'pyproject.toml'
# Claims a release before anything asks for it.
CLAIM = '''
import swift_patch
from swift_patch import patching
from swift_patch.patching import releases
installed = releases.installed
releases.installed = lambda package: {claimed!r}.get(package) or installed(package)
'''


def claim(monkeypatch, **claimed):
    installed = releases.installed
    monkeypatch.setattr(releases, 'installed',
                        lambda package: claimed.get(package.replace('-', '_'), installed(package)))


def run(claimed, code):
    process = subprocess.run([sys.executable, '-c', CLAIM.format(claimed=claimed) + code],
                             capture_output=True,
                             text=True,
                             env={
                                 key: value
                                 for key, value in os.environ.items() if key != 'SWIFT_PATCH_DISABLE'
                             })
    assert process.returncode == 0, process.stderr
    return process


def test_pyproject_says_the_same():
    project = tomllib.loads(PYPROJECT.read_text())['project']
    required = {requirement.name: requirement.specifier for requirement in map(Requirement, project['dependencies'])}
    assert {package: required[package] for package in releases.SUPPORTED} == releases.SUPPORTED


def test_what_is_installed_here_is_supported():
    assert releases.unsupported() is None and swift_patch.is_applied()


def test_what_is_imported_counts_before_what_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'swift', SimpleNamespace(__version__='9.0'))
    assert 'does not support ms-swift 9.0' in releases.unsupported()
    monkeypatch.delitem(sys.modules, 'swift')
    assert releases.installed('ms-swift') == metadata.version('ms-swift')
    assert releases.installed('no-such-package') is None


@pytest.mark.parametrize('package, version, expected', [
    ('ms_swift', '3.10.3', False),
    ('ms_swift', '3.11.2', True),
    ('ms_swift', '4.6.0.dev0', True),
    ('ms_swift', '4.6.9', True),
    ('ms_swift', '4.7.0.dev0', False),
    ('ms_swift', '4.7.0', False),
    ('ms_swift', 'unknown', False),
    ('ms_swift', None, True),
    ('peft', '0.17.1', False),
    ('peft', '0.18.0', True),
    ('peft', '0.20.9', True),
    ('peft', '0.21.0', False),
])
def test_the_range_is_from_the_lowest_to_before_the_next_release(monkeypatch, package, version, expected):
    claim(monkeypatch, **{package: version})
    assert (releases.unsupported() is None) == expected
    assert swift_patch.is_applied() == expected


def test_the_text_names_what_is_found_and_what_is_supported(monkeypatch):
    claim(monkeypatch, ms_swift='9.0', peft='0.1')
    reason = releases.unsupported()
    assert 'ms-swift 9.0 and peft 0.1' in reason
    for package, specifier in releases.SUPPORTED.items():
        assert f'pip install "{package}{specifier}"' in reason or f'"{package}{specifier}"' in reason


@pytest.mark.parametrize('claimed', [{'ms-swift': '9.0'}, {'peft': '0.1'}])
def test_an_unsupported_release_is_told_once_and_ms_swift_works_unpatched(claimed):
    process = run(
        claimed, '''
import sys
print('no word yet', file=sys.stderr)
from swift.tuners import LoRA, SwiftModel
from peft.tuners.lora import LoraModel
assert not swift_patch.is_applied() and not patching.in_force()
assert not hasattr(SwiftModel, 'update_weighted_adapter') and not hasattr(LoraModel, 'update_weighted_adapter')
assert not any(name.startswith('swift_patch.weighted_adapter') for name in sys.modules)
import torch
from swift.tuners import LoraConfig, Swift
# Not a SwiftModel: without the fixes, there is none with some of the releases that are supported.
Swift.prepare_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=['0']))
''')
    [(package, version)] = claimed.items()
    before, after = process.stderr.split('no word yet')
    assert package not in before
    assert after.count(f'does not support {package} {version}') == 1


def test_what_cannot_work_raises_an_error_that_says_what_was_found(monkeypatch):
    claim(monkeypatch, peft='0.1')
    for name in ('FusionComposer', 'compile_merging'):
        with pytest.raises(ImportError, match='does not support peft 0.1'):
            getattr(swift_patch, name)


@pytest.mark.parametrize('arguments', [['demo', '--output_dir', 'none'], ['bench', '--synthetic'],
                                       ['infer', '--adapters', 'a=b', '--val_dataset', 'a', '--result_path', 'b']])
def test_commands_that_need_the_patch_refuse(monkeypatch, capsys, arguments):
    claim(monkeypatch, ms_swift='9.0')
    assert cli.main(arguments) == 2
    assert f'swift-patch {arguments[0]}: error: swift_patch does not support ms-swift 9.0' in capsys.readouterr().err


def test_doctor_tells(monkeypatch, capsys):
    claim(monkeypatch, ms_swift='9.0')
    in_force = patching.in_force()
    assert cli.main(['doctor']) == 1
    out = capsys.readouterr().out
    assert 'does not support ms-swift 9.0' in out
    assert all(str(specifier) in out for specifier in releases.SUPPORTED.values())
    assert patching.in_force() == in_force
