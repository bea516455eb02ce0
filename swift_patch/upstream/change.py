"""Files that change: their diffs, and how they are written."""
import difflib
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from ..files import check_writable, os_errors_as
from .parts import changed, read


class FileChange(NamedTuple):
    """One file of a change.

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
        """Returns the change in the format of `git diff`."""
        old = (self.old or '').splitlines(keepends=True)
        names = f'a/{self.path}', f'b/{self.path}'
        lines = difflib.unified_diff(old, self.new.splitlines(keepends=True),
                                     '/dev/null' if self.old is None else names[0], names[1])
        # git marks a last line without a newline, difflib does not.
        body = ''.join(line if line.endswith('\n') else f'{line}\n\\ No newline at end of file\n' for line in lines)
        header = f'diff --git {names[0]} {names[1]}\n' + ('new file mode 100644\n' if self.old is None else '')
        # By this line alone git knows an empty file.
        return header + (body or 'index 000000000..e69de29bb\n')


def changes(repo: Path, parts: Sequence[str]) -> Dict[str, List[FileChange]]:
    """Returns by part what is to be changed, each on top of those before it. Nothing is written.

    Args:
        repo: The checkout.
        parts: Some of `parts.PARTS`.

    Raises:
        UnexpectedCode: the checkout is not one, or does not look as expected.
    """
    now: Dict[str, str] = {}
    found: Dict[str, List[FileChange]] = {}
    for part in parts:
        files = changed(repo, part, now)
        old = {path: now.get(path, read(repo / path) if (repo / path).is_file() else None) for path in files}
        found[part] = [FileChange(path, old[path], new) for path, new in sorted(files.items()) if new != old[path]]
        now.update(files)
    return found


def together(of_parts: Dict[str, List[FileChange]]) -> List[FileChange]:
    """Returns one change for each file that some parts change."""
    files: Dict[str, FileChange] = {}
    for change in (change for of_part in of_parts.values() for change in of_part):
        files[change.path] = files.get(change.path, change)._replace(new=change.new)
    return [files[path] for path in sorted(files)]


def write(repo: Path, files: Sequence[FileChange]) -> None:
    """Makes the changes in a checkout.

    Raises:
        ValueError: one of the files cannot be written. All of them are as they were.
    """
    for change in files:
        check_writable(repo / change.path)
    with ExitStack() as undo:
        for change in files:
            path = repo / change.path
            with os_errors_as(f'Cannot write {path}'):
                path.parent.mkdir(parents=True, exist_ok=True)
                if change.old is None:
                    undo.callback(path.unlink, missing_ok=True)
                else:
                    undo.callback(path.write_bytes, change.old.encode())
                path.write_bytes(change.new.encode())
        undo.pop_all()
