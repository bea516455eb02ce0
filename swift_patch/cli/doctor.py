"""`swift-patch doctor`: which versions there are, what is in force, and the file for `--external_plugins`."""
import argparse
import importlib
import platform
from pathlib import Path
from rich.console import Console
from rich.table import Table
from typing import Dict

from swift_patch import patching, releases

PLUGIN = Path(__file__).resolve().parent.parent / 'external_plugin' / 'swift_patch_plugin.py'
_PACKAGES = ('swift-patch', 'ms-swift', 'peft', 'transformers', 'torch')


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `doctor` to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'doctor',
        help='show the versions found, what the patch replaces, and the file for --external_plugins',
        description='Show the versions found, what is in force, and the file that applies the patch in '
        "ms-swift's own commands: swift infer --external_plugins FILE.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 where the whole patch is in force, else 1.
    """
    console = Console()
    table = Table('package', 'version', 'supported', title='Versions', title_justify='left')
    for package, version in versions().items():
        table.add_row(package, version, str(releases.SUPPORTED.get(package, '')))
    console.print(table)

    reason = patching.why_not_applied()
    if releases.unsupported() is None:
        for module in dict.fromkeys(patch.after for patch in patching.PATCHES):
            importlib.import_module(module)

    in_force, needless = patching.in_force(), patching.needless()
    patches = Table('of', 'replaced', 'by', 'in force', title='Patch', title_justify='left')
    for patch in patching.PATCHES:
        patches.add_row(
            patch.module.split('.')[0], patch.target, f'{patch.source.split(":")[0].split(".")[-1]}.py',
            'yes' if patch in in_force else 'not needed' if patch in needless else 'no')
    console.print(patches)
    if reason is not None:
        console.print(f'The patch is not applied. {reason}', soft_wrap=True, highlight=False)
    # Not wrapped at the width of the console, to be copied whole.
    console.print(f'swift infer --external_plugins {PLUGIN}', soft_wrap=True, highlight=False)
    return 0 if reason is None and {*in_force, *needless} == set(patching.PATCHES) else 1


def versions() -> Dict[str, str]:
    """Returns the versions of Python and of the packages that matter here."""
    return {
        'python': platform.python_version(),
        **{
            package: releases.installed(package) or 'not installed'
            for package in _PACKAGES
        }
    }
