"""The sub-commands of `swift-patch`: each is a module with `add_parser`; none imports torch before it runs."""
import argparse
import sys
from rich_argparse import RichHelpFormatter
from typing import List

import swift_patch
from ..patching.releases import unsupported
from . import bench, demo, deploy, doctor, infer, upstream
from .launch import launched

# Commands of which ms-swift reads the options that are not ours.
_TAKING_MORE = ('infer', 'deploy')


def run(argv: List[str]) -> int:
    """Runs `swift-patch`.

    Args:
        argv: The arguments.

    Returns:
        The exit code: 0, or what the command says; 2 after a user's mistake, which is told on stderr.
    """
    parser = argparse.ArgumentParser(
        prog='swift-patch',
        description='Fuse LoRAs per sample at a flat cost.',
        formatter_class=RichHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('--version', action='version', version=f'swift-patch {swift_patch.__version__}')
    subparsers = parser.add_subparsers(required=True, dest='command', metavar='COMMAND')
    for command in (infer, deploy, bench, demo, doctor, upstream):
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.formatter_class = RichHelpFormatter
        subparser.allow_abbrev = False
    try:
        argv = infer.with_config_file(argv)
        args, rest = parser.parse_known_args(argv)
        if rest and args.command not in _TAKING_MORE:
            # Not by `parse_args`, which would show the usage of `swift-patch`.
            subparsers.choices[args.command].error(f'unrecognized arguments: {" ".join(rest)}')
        args.rest = rest
        # Before the command imports what would fail in some way of its own.
        reason = unsupported() if args.command in ('infer', 'deploy', 'bench', 'demo') else None
        if reason is not None:
            raise ValueError(reason)
        code = launched(argv, args.verbose) if args.command == 'infer' else None
    except ValueError as e:
        print(f'swift-patch {argv[0]}: error: {e}', file=sys.stderr)
        return 2
    if code is None:
        code = args.run(args)
    return code
