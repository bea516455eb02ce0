"""A part whole: its edits, its test, its documentation, and its text."""
import ast
from pathlib import Path
from typing import Dict, Mapping, NamedTuple

from .documentation import documented
from .edits import CONCERNS, UnexpectedCode, edits, is_in, paths

PARTS = tuple(CONCERNS)
_FILES = Path(__file__).with_name('files')
_FOLDER = 'tests/tuners'
# By part, its test, and in the checkout the same.
TESTS = {'fix': 'test_lora_compat.py', 'activation': 'test_activation.py', 'refill': 'test_weighted_adapter.py'}


class Text(NamedTuple):
    """What goes with a part: the text of its pull request, and the message of its patch."""
    title: str
    body: str

    def markdown(self) -> str:
        """Returns it as a page."""
        return f'# {self.title}\n\n{self.body}'


def text(part: str) -> Text:
    """Returns the text of a part."""
    title, _, body = (_FILES / f'{part}.md').read_text(encoding='utf-8').partition('\n\n')
    return Text(title.lstrip('# '), body)


def changed(repo: Path, part: str, before: Mapping[str, str]) -> Dict[str, str]:
    """Returns by path what the files that a part is about are to hold. Nothing is written.

    Args:
        repo: The checkout, or a copy of its sources: the folder that has `swift/tuners` in it.
        part: One of `PARTS`.
        before: What other parts changed before, by path; all else is read.

    Raises:
        UnexpectedCode: the checkout is not one, or does not look as expected.
    """
    if not (repo / 'swift' / 'tuners').is_dir():
        raise UnexpectedCode(f'{repo} is expected to be a checkout of ms-swift, but has no folder swift/tuners.')

    def current(path: str) -> str:
        if path in before:
            return before[path]
        if not (repo / path).is_file():
            raise UnexpectedCode(f'{path} is expected in {repo}, but is not there. Is this a release of ms-swift that '
                                 'swift_patch supports?')
        return read(repo / path)

    files = {path: current(path) for path in paths(part)}
    for edit in edits(part, files):
        files[edit.path] = edit.applied(files[edit.path])
    for path, source in files.items():
        try:
            ast.parse(source)
        except SyntaxError as e:
            raise UnexpectedCode(f'{path} is expected to be Python, but cannot be parsed: {e}') from e
    if not is_in(part, files):
        # ms-swift has it in a way of its own, which this test and these pages are not about.
        return {}
    if f'{_FOLDER}/__init__.py' not in before and not (repo / _FOLDER / '__init__.py').is_file():
        files[f'{_FOLDER}/__init__.py'] = ''
    files[f'{_FOLDER}/{TESTS[part]}'] = read(_FILES / TESTS[part])
    if part == 'refill':
        files.update(documented(repo, _FILES))
    return files


def read(path: Path) -> str:
    """Returns what a file holds, its line ends as they are."""
    return path.read_bytes().decode()
