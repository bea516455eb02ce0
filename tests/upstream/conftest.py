import pytest
import shutil
from upstream_checkout import add_docs, copy_of_ms_swift, git


@pytest.fixture(scope='session')
def stock_copy(tmp_path_factory):
    return copy_of_ms_swift(tmp_path_factory.mktemp('stock'))


@pytest.fixture
def repo(stock_copy, tmp_path):
    """A checkout of ms-swift: its tuners, and the documentation."""
    shutil.copytree(stock_copy / 'swift' / 'tuners', tmp_path / 'repo' / 'swift' / 'tuners')
    add_docs(tmp_path / 'repo')
    git(tmp_path, 'init', '-q', 'repo')
    git(tmp_path / 'repo', 'add', '.')
    git(tmp_path / 'repo', 'commit', '-qm', 'ms-swift')
    return tmp_path / 'repo'


@pytest.fixture(scope='session')
def edited_copy(tmp_path_factory):
    """A copy of the installed ms-swift with all three parts."""
    from swift_patch.cli import main
    folder = copy_of_ms_swift(tmp_path_factory.mktemp('edited'))
    assert main(['upstream', '--repo', str(folder)]) == 0
    return folder
