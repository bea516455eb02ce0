"""The entries of the new method in `Use-tuners.md`, in both languages."""
from pathlib import Path
from typing import Dict, List

from .edits import UnexpectedCode

# By folder of the documentation, the entry.
_ENTRIES = {'docs/source': 'use_tuners_zh.md', 'docs/source_en': 'use_tuners_en.md'}
_PREDECESSOR = '- `SwiftModel.add_weighted_adapter('


def documented(repo: Path, entries: Path) -> Dict[str, str]:
    """Returns by path the pages with the new entry after that of `add_weighted_adapter`.

    Where there is no folder `docs` at all, as in a copy of the installed package, there are none.

    Args:
        repo: The checkout.
        entries: The folder of the entries.

    Raises:
        UnexpectedCode: there is not one page in each language with the entry of `add_weighted_adapter`.
    """
    pages: Dict[str, str] = {}
    for folder, name in _ENTRIES.items() if (repo / 'docs').is_dir() else ():
        # By what it says: the Chinese page had a Chinese name in ms-swift 3.
        found = [
            page for page in sorted((repo / folder).rglob('*.md')) if any(
                line.startswith(_PREDECESSOR) for line in page.read_text(encoding='utf-8').splitlines())
        ]
        if len(found) != 1:
            raise UnexpectedCode(f'{folder} is expected to have one page with an entry {_PREDECESSOR + "...)`"!r}, '
                                 f'found {[str(page.relative_to(repo)) for page in found]}.')
        [page] = found
        entry = (entries / name).read_text(encoding='utf-8')
        pages[page.relative_to(repo).as_posix()] = _with_entry(page.read_bytes().decode(), entry)
    return pages


def _with_entry(page: str, entry: str) -> str:
    """Returns a page with the entry in its place, instead of one for the same method."""
    items = _items(page.splitlines(keepends=True))
    heading = entry.split('(')[0]
    items = [item for item in items if not item.startswith(heading)]
    place = next(i for i, item in enumerate(items) if item.startswith(_PREDECESSOR)) + 1
    return ''.join([*items[:place], f'{entry.strip()}\n\n', *items[place:]])


def _items(lines: List[str]) -> List[str]:
    """Returns the lines in parts, of which each begins with a heading or an item at the margin."""
    items: List[str] = []
    for line in lines:
        if not items or line.startswith(('- ', '#')):
            items.append('')
        items[-1] += line
    return items
