"""What is built from pyproject.toml has all of the package, and says of it what is so."""
import ast
import pytest
import re
import sys
from importlib import metadata
from pathlib import Path

import swift_patch
from swift_patch.cli import command
from swift_patch.vllm_plugin.plugin import register

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'swift_patch'


@pytest.fixture(scope='module')
def project():
    """What pyproject.toml holds."""
    return tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))


def test_the_version_that_is_installed_is_the_packages():
    assert metadata.version('swift-patch') == swift_patch.__version__


def test_the_version_is_read_without_importing_the_package(project):
    """setuptools imports a package whose attribute is no literal, and where it is built there is no torch, no wrapt."""
    assert project['tool']['setuptools']['dynamic']['version'] == {'attr': 'swift_patch.__version__'}
    values = [
        node.value for node in ast.parse((PACKAGE / '__init__.py').read_text(encoding='utf-8')).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__version__'
    ]
    assert [ast.literal_eval(value) for value in values] == [swift_patch.__version__]


def test_the_command_is_the_packages():
    entry_point, = metadata.entry_points(group='console_scripts', name='swift-patch')
    assert entry_point.load() is command


def test_vllm_finds_the_plugin_which_needs_no_vllm_to_be_imported():
    entry_point, = metadata.entry_points(group='vllm.general_plugins', name='swift_patch')
    assert entry_point.load() is register


def test_every_file_of_the_package_is_shipped(project):
    """Modules are, in folders that are packages, and what `package-data` names: py.typed, and the plugin file."""
    patterns = project['tool']['setuptools']['package-data']['swift_patch']
    named = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert {PACKAGE / 'py.typed', PACKAGE / 'external_plugin' / 'swift_patch_plugin.py'} <= named
    files = {path for path in PACKAGE.rglob('*') if path.is_file() and '__pycache__' not in path.parts}
    modules = {path for path in files if path.suffix == '.py' and path.with_name('__init__.py') in files}
    assert files == modules | named


def test_what_manifest_in_names_is_there():
    lines = (ROOT / 'MANIFEST.in').read_text(encoding='utf-8').splitlines()
    names = [name for line in lines if line.startswith(('include ', 'graft ')) for name in line.split()[1:]]
    assert names and all((ROOT / name).exists() for name in names)


def test_types_are_checked_for_the_oldest_python(project):
    oldest = re.search(r'>=(3\.\d+)', project['project']['requires-python']).group(1)
    assert project['tool']['mypy']['python_version'] == oldest
    assert f'Programming Language :: Python :: {oldest}' in project['project']['classifiers']
