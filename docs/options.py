"""The table of the README that compares the options of `swift infer` with those of `swift-patch infer`.

`python docs/options.py README.md` writes it anew, from the parsers of both.
"""
import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Dict, List

from swift_patch.cli.infer import add_parser
from swift_patch.inference.options import MISSING, NOT_NEEDED, OF_VLLM, reason_in

_BEGIN, _END = '<!-- options: begin -->', '<!-- options: end -->'


def table() -> str:
    """Returns the table, for the installed release of ms-swift."""
    from swift_patch.ms_swift import InferArguments
    parser = argparse.ArgumentParser()
    infer = parser.add_subparsers()
    add_parser(infer)
    own = {action.dest for action in infer.choices['infer']._actions}
    rows: Dict[str, List[str]] = {'here': [], 'here, read by ms-swift': [], 'here, with `--infer_backend vllm`': []}
    for name in (field.name for field in fields(InferArguments)):
        not_needed, missing = reason_in(NOT_NEEDED, name), reason_in(MISSING, name)
        where = 'here, read by ms-swift'
        if name in own:
            where = 'here'
        elif missing is not None:
            where = f'missing: {missing}'
        elif not_needed is not None:
            where = f'not needed: {not_needed}'
        elif re.fullmatch(OF_VLLM, name):
            where = 'here, with `--infer_backend vllm`'
        rows.setdefault(where, []).append(name)
    lines = ['| options of `swift infer` | in `swift-patch infer` |', '| --- | --- |']
    # Those that are missing last.
    for where in sorted(rows, key=lambda where: where.startswith('missing')):
        lines.append(f'| {_joined(rows[where])} | {where} |')
    return '\n'.join(lines)


def _joined(names: List[str]) -> str:
    """Returns names, those of one backend as one pattern."""
    shown: Dict[str, List[str]] = {}
    for name in names:
        match = re.match('(vllm|sglang|lmdeploy|decision|packing)_', name)
        shown.setdefault(f'{match[1]}_*' if match else name, []).append(name)
    return ' '.join(f'`{found[0]}`' if len(found) == 1 else f'`{pattern}` ({len(found)})'
                    for pattern, found in shown.items())


def main(path: Path) -> None:
    text = path.read_text(encoding='utf-8')
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    path.write_text(f'{before}{_BEGIN}\n{table()}\n{_END}{after}', encoding='utf-8')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
