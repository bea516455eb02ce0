"""The whole change: edits of ms-swift's modules, the new package, a test, the documentation, and a diff of all that."""
import difflib
import isort
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional
from yapf.yapflib.yapf_api import FormatCode

from ..files import check_writable, told_as
from .documentation import documented
from .edits import EDITS, PACKAGE, SOURCES, YAPF_STYLE, UnexpectedCode, edited

_FILES = Path(__file__).with_name('files')
_LICENCE = '# Copyright (c) ModelScope Contributors. All rights reserved.\n'
# ms-swift's, as in its setup.cfg.
_ISORT = isort.Config(
    line_length=120,
    multi_line_output=isort.wrap_modes.WrapModes.GRID,
    known_standard_library=frozenset({'setuptools'}),
    known_first_party=frozenset({'swift'}),
    known_third_party=frozenset({'json', 'yaml'}),
    no_lines_before=frozenset({'STDLIB', 'LOCALFOLDER'}),
    default_section='THIRDPARTY')
TEST = 'tests/tuners/test_weighted_adapter.py'


class FileChange(NamedTuple):
    """One file of the change.

    Attributes:
        path: where it is in the checkout.
        old: what it holds; None where it is new.
        new: what it is to hold.
    """
    path: str
    old: Optional[str]
    new: str

    @property
    def lines(self) -> 'tuple[int, int]':
        """How many lines are added and removed."""
        diff = [line[:1] for line in self.diff().splitlines() if line[:3] not in ('+++', '---')]
        return diff.count('+'), diff.count('-')

    def diff(self) -> str:
        """Returns the change in the format of `git diff`; empty where there is none."""
        if self.old == self.new:
            return ''
        old = (self.old or '').splitlines(keepends=True)
        names = f'a/{self.path}', f'b/{self.path}'
        lines = difflib.unified_diff(old, self.new.splitlines(keepends=True),
                                     '/dev/null' if self.old is None else names[0], names[1])
        # git marks a last line without a newline, difflib does not.
        body = ''.join(line if line.endswith('\n') else f'{line}\n\\ No newline at end of file\n' for line in lines)
        header = f'diff --git {names[0]} {names[1]}\n' + ('new file mode 100644\n' if self.old is None else '')
        return header + body


def change(repo: Path) -> List[FileChange]:
    """Returns what is to be changed in a checkout of ms-swift, or in a copy of its sources. Nothing is written.

    Args:
        repo: The folder that has `swift/tuners` in it.

    Raises:
        UnexpectedCode: the checkout is not one, or does not look as expected.
    """
    if not (repo / 'swift' / 'tuners').is_dir():
        raise UnexpectedCode(f'{repo} is expected to be a checkout of ms-swift, but has no folder swift/tuners.')
    files: Dict[str, str] = {}
    for path in EDITS:
        if not (repo / path).is_file():
            raise UnexpectedCode(f'{path} is expected in {repo}, but is not there. Is this a release of ms-swift that '
                                 'swift_patch supports?')
        files[path] = edited(path, _read(repo / path))
    for module in sorted(SOURCES.glob('*.py')):
        files[f'swift/tuners/{PACKAGE}/{module.name}'] = _styled(_LICENCE + _read(module))
    files[TEST] = _styled(_LICENCE + _read(_FILES / 'test_weighted_adapter.py'))
    files.update(documented(repo, _FILES))
    return [
        FileChange(path,
                   _read(repo / path) if (repo / path).is_file() else None, new) for path, new in sorted(files.items())
    ]


def write(repo: Path, changes: List[FileChange]) -> None:
    """Makes the changes in a checkout.

    Raises:
        ValueError: one of the files cannot be written. All of them are as they were.
    """
    changed = [item for item in changes if item.old != item.new]
    for item in changed:
        check_writable(repo / item.path)
    with ExitStack() as undo:
        for item in changed:
            path = repo / item.path
            with told_as(f'Cannot write {path}'):
                path.parent.mkdir(parents=True, exist_ok=True)
                if item.old is None:
                    undo.callback(path.unlink, missing_ok=True)
                else:
                    undo.callback(path.write_bytes, item.old.encode())
                path.write_bytes(item.new.encode())
        undo.pop_all()


@lru_cache(maxsize=None)
def _styled(source: str) -> str:
    """Returns a module in ms-swift's style. That takes seconds, and is the same for every checkout."""
    styled: str
    styled, _ = FormatCode(isort.code(source, config=_ISORT), style_config=YAPF_STYLE)
    return styled


def _read(path: Path) -> str:
    return path.read_bytes().decode()
