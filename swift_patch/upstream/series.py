"""Patches for `git am`, one for each part."""
from email.utils import formatdate
from typing import Dict, List

from .change import FileChange
from .parts import text

# How `git format-patch` begins a mail.
_SEPARATOR = f'From {"0" * 40} Mon Sep 17 00:00:00 2001\n'


def series(of_parts: Dict[str, List[FileChange]], author: str) -> Dict[str, str]:
    """Returns patches by their file names. Parts that change nothing have none.

    Args:
        of_parts: By part, what it changes.
        author: `NAME <EMAIL>`.
    """
    parts = [part for part in of_parts if of_parts[part]]
    return {
        f'{number:04}-{part}.patch': _mail(part, of_parts[part], author, f'PATCH {number}/{len(parts)}')
        for number, part in enumerate(parts, 1)
    }


def _mail(part: str, files: List[FileChange], author: str, prefix: str) -> str:
    title, body = text(part)
    return (f'{_SEPARATOR}From: {author}\nDate: {formatdate()}\nSubject: [{prefix}] {title}\nMIME-Version: 1.0\n'
            'Content-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n'
            f'{body.strip()}\n---\n{_stat(files)}\n{"".join(change.diff() for change in files)}-- \n2.0\n\n')


def _stat(files: List[FileChange]) -> str:
    lines = [
        f' {change.path}: {added} added, {removed} removed' for change in files for added, removed in [change.lines]
    ]
    return '\n'.join(lines) + '\n'
