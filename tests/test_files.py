"""A file that a user names is written whole or not at all, and what would fail is told before."""
import os
import pytest
from pathlib import Path

from swift_patch.files import check_writable, os_errors_as, write_whole


def test_a_file_is_put_in_place_whole_with_its_folders(tmp_path: Path) -> None:
    path, seen = tmp_path / 'new' / 'newer' / 'a.txt', []

    def write(tmp: Path) -> None:
        seen.append(path.exists())
        assert (tmp.parent, tmp.suffix) == (path.parent, path.suffix)
        tmp.write_text('all of it')

    write_whole(path, write)
    assert path.read_text() == 'all of it' and seen == [False]
    write_whole(path, lambda tmp: [tmp.write_text('new'), None][-1])
    assert path.read_text() == 'new' and os.listdir(path.parent) == ['a.txt']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / 'a.txt'
    path.write_text('old')

    def write(tmp: Path) -> None:
        tmp.write_text('half')
        raise error

    with pytest.raises((ValueError, KeyboardInterrupt)) as e:
        write_whole(path, write)
    if isinstance(error, OSError):
        assert str(e.value) == f'Cannot write {path}: No space left on device.'
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['a.txt']


def test_what_can_be_written_is_not_touched(tmp_path: Path) -> None:
    check_writable(tmp_path / 'new' / 'newer' / 'a.txt')
    assert not os.listdir(tmp_path)


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    file = tmp_path / 'file'
    file.write_text('')
    for path, told in ((tmp_path, 'it is a folder'), (file / 'a' / 'b', f'{file} is not a folder'),
                       (tmp_path / ('x' * 300), 'File name too long')):
        with pytest.raises(ValueError, match=f'^Cannot write {path}: {told}'):
            check_writable(path)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=f'no permission to write to {tmp_path}'):
        check_writable(tmp_path / 'a')


def test_an_error_without_a_text_of_the_system_is_told() -> None:
    with pytest.raises(ValueError, match='^Cannot do it: no reason.$'), os_errors_as('Cannot do it'):
        raise OSError('no reason')
