"""The command `swift-patch`. Each sub-command is a module with `add_parser`; none imports torch before it runs."""
import argparse
import sys
from rich_argparse import RichHelpFormatter
from typing import List, Optional

import swift_patch
from ..patching.releases import unsupported
from . import bench, demo, doctor, infer, upstream


def main(argv: Optional[List[str]] = None) -> int:
    """Runs `swift-patch`.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, or 2 after a user's mistake, which is told on stderr.
    """
    parser = argparse.ArgumentParser(
        prog='swift-patch',
        description='Fuse LoRAs per sample at a flat cost.',
        formatter_class=RichHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('--version', action='version', version=f'swift-patch {swift_patch.__version__}')
    subparsers = parser.add_subparsers(required=True, dest='command', metavar='COMMAND')
    for command in (infer, bench, demo, doctor, upstream):
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.formatter_class = RichHelpFormatter
        subparser.allow_abbrev = False
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # Not by `parse_args`, which would show the usage of `swift-patch` itself.
        subparsers.choices[args.command].error(f'unrecognized arguments: {" ".join(unknown)}')
    reason = unsupported() if args.command in ('infer', 'bench', 'demo') else None
    if reason is not None:
        # Before the command imports what would fail in some way of its own.
        print(f'swift-patch {args.command}: error: {reason}', file=sys.stderr)
        return 2
    code: int = args.run(args)
    return code
