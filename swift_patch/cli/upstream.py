"""`swift-patch upstream`: three small changes to a checkout of ms-swift."""
import argparse
import re
import sys
from functools import partial
from pathlib import Path
from rich.console import Console
from rich.table import Table

from ..files import check_replaceable, write_whole
from ..upstream.change import changes, together, write
from ..upstream.parts import PARTS, text
from ..upstream.series import series
from .arguments import file_path

_AUTHOR = 'swift_patch authors <swift_patch@example.invalid>'


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `upstream` to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'upstream',
        help='make the pull requests: three small changes to a checkout of ms-swift',
        description='Edit a checkout of ms-swift, or write that as a diff or as patches. "fix" mends LoRA tuners with '
        'recent releases of peft, "activation" deactivates only what is active, "refill" adds '
        'SwiftModel.update_weighted_adapter. Each has its test.')
    parser.set_defaults(run=run)
    parser.add_argument(
        '--repo', type=file_path, required=True, metavar='PATH', help='a checkout of ms-swift, of a supported release')
    parser.add_argument(
        '--part', choices=PARTS, action='append', help='make this change; may be given again (default: all three)')
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        '--diff',
        type=file_path,
        metavar='FILE',
        help='write a diff for `git apply` to FILE and leave the checkout alone')
    output.add_argument(
        '--series',
        type=file_path,
        metavar='DIR',
        help='write a patch for `git am` for each part, with its text, to DIR and leave the checkout alone')
    parser.add_argument('--author', default=_AUTHOR, metavar='"NAME <EMAIL>"', help='who the patches are from')
    parser.add_argument(
        '--pull_request', type=file_path, metavar='FILE', help='write the text of the one --part to FILE (Markdown)')
    parser.add_argument('--overwrite', action='store_true', help='replace existing files')


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0, or 2 after a user's mistake or where the checkout does not look as expected, told on stderr.
    """
    console = Console()
    parts = [part for part in PARTS if part in (args.part or PARTS)]
    try:
        if not re.fullmatch(r'[^<>\n]+ <[^<>\s]+>', args.author):
            raise ValueError(f'--author is expected to be "NAME <EMAIL>", found {args.author!r}.')
        if args.pull_request and len(parts) != 1:
            raise ValueError('--pull_request is the text of one part: give one --part. (--series has those of all.)')
        of_parts = changes(args.repo, parts)
        # By option, what is written to which file.
        outputs = []
        if args.diff:
            outputs.append(('diff', args.diff, ''.join(change.diff() for change in together(of_parts))))
        for name, patch in (series(of_parts, args.author) if args.series else {}).items():
            outputs.append(('series', args.series / name, patch))
        if args.pull_request:
            outputs.append(('pull_request', args.pull_request, text(parts[0]).markdown()))
        for option, path, _ in outputs:
            check_replaceable(option, path, args.overwrite)
        if args.diff and args.pull_request and args.diff.resolve() == args.pull_request.resolve():
            raise ValueError(f'--diff and --pull_request are both {args.diff}: give two files.')
        if not args.diff and not args.series:
            write(args.repo, together(of_parts))
        for _, path, content in outputs:
            write_whole(path, partial(Path.write_bytes, data=content.encode()))
    except ValueError as e:
        print(f'swift-patch upstream: error: {e}', file=sys.stderr)
        return 2
    table = Table('part', 'file', 'added', 'removed', title='Changed files', title_justify='left')
    for part, of_part in of_parts.items():
        for change in of_part:
            added, removed = change.lines
            table.add_row(part, change.path, str(added), str(removed))
    console.print(table if table.rows else 'The checkout has all of it already: nothing was changed.')
    if 'refill' in parts and not (args.repo / 'docs').is_dir():
        console.print('There is no folder docs in it: the entries of Use-tuners.md were left out.')
    for _, path, _ in outputs:
        console.print(f'Wrote {path}', soft_wrap=True, markup=False, highlight=False)
    return 0
