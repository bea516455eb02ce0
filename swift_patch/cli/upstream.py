"""`swift-patch upstream`: the same functions as a change to a checkout of ms-swift."""
import argparse
import sys
from pathlib import Path
from rich.console import Console
from rich.table import Table

from ..files import check_replaceable, write_whole


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `upstream` to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'upstream',
        help='make the pull request: the same functions as a change to a checkout of ms-swift',
        description='Edit a checkout of ms-swift so that it has what the import of swift_patch gives, or write that as '
        'a diff. Needs the extra "upstream" of this package: libcst, isort and yapf.')
    parser.set_defaults(run=run)
    parser.add_argument(
        '--repo', type=Path, required=True, metavar='PATH', help='a checkout of ms-swift, of a supported release')
    parser.add_argument(
        '--diff', type=Path, metavar='FILE', help='write a diff for `git apply` to FILE and leave the checkout alone')
    parser.add_argument(
        '--pull_request',
        type=Path,
        metavar='FILE',
        help='write the text of the pull request to FILE (Markdown): what, why, figures, how it was tested')
    parser.add_argument(
        '--figures',
        type=Path,
        metavar='FILE',
        help='the figures of that text, as `swift-patch bench --json FILE` writes them (default: those of '
        '`swift-patch bench --synthetic` at the release of this package)')
    parser.add_argument('--overwrite', action='store_true', help='replace existing files')


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0, or 2 after a user's mistake or where the checkout does not look as expected, told on stderr.
    """
    console = Console()
    try:
        for option in ('diff', 'pull_request'):
            path = getattr(args, option)
            if path:
                check_replaceable(option, path, args.overwrite)
        if args.diff and args.pull_request and args.diff.resolve() == args.pull_request.resolve():
            raise ValueError(f'--diff and --pull_request are both {args.diff}: give two files.')
        try:
            from ..upstream.change import change, write
            from ..upstream.pull_request import pull_request
        except ModuleNotFoundError as e:
            raise ValueError(f'{e.name} is needed here, but is not installed: pip install libcst isort yapf') from e
        changes = change(args.repo)
        text = pull_request(args.figures)
        if args.diff:
            write_whole(args.diff, lambda path: path.write_bytes(''.join(item.diff() for item in changes).encode()))
        else:
            write(args.repo, changes)
        table = Table('file', 'added', 'removed', title='Changed files', title_justify='left')
        changed = [item for item in changes if item.new != item.old]
        for item in changed:
            added, removed = item.lines
            table.add_row(item.path, str(added), str(removed))
        console.print(table if changed else 'The checkout has all of it already: nothing was changed.')
        if not any(item.path.startswith('docs/') for item in changes):
            console.print('There is no folder docs in it: the entries of Use-tuners.md were left out.')
        if args.pull_request:
            write_whole(args.pull_request, lambda path: path.write_text(text, encoding='utf-8'))
        for path in (args.diff, args.pull_request):
            if path:
                console.print(f'Wrote {path}', soft_wrap=True, markup=False, highlight=False)
    except ValueError as e:
        print(f'swift-patch upstream: error: {e}', file=sys.stderr)
        return 2
    return 0
