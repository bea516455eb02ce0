"""`swift-patch infer`: named and behaving like `swift infer`, with a composition of adapters for each sample."""
import argparse
import math
import os
import signal
import sys
from contextlib import nullcontext
from functools import partial
from rich.console import Console
from rich.table import Table
from typing import Dict, List, Optional, Sequence

from ..inference.config import ANSWER_OPTIONS, InferConfig, InferSummary, Stage, no_stage
from ..lora.paths import expanded
from ..quiet import without_info
from . import is_main
from .arguments import (COMPOSER_OPTIONS, MODEL_OPTIONS, add_adapters, add_bool, add_combination, add_generation,
                        add_merge_method, add_model_group, add_template_group, given, number)
from .progress import stage

_CONFIG_SUFFIXES = ('.json', '.yaml', '.yml')
SWIFT_OPTIONS = (*MODEL_OPTIONS, *ANSWER_OPTIONS, 'metric', 'stream')


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the `infer` command to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'infer',
        help='generate with a composition of LoRAs for each sample',
        description='Answer every sample of a dataset with its own composition of LoRAs. A line of a JSONL file is '
        '{"messages": [...], "adapters": ["a", "b"], "weights": [0.6, 0.4]}, with weights 1/k where none are given. '
        'Options that are not given have the values that swift infer would give them.',
        epilog='Every other option of swift infer is taken too (--val_dataset_sample, --columns, --max_model_len, '
        '--quant_bits, --external_plugins, --load_args, --infer_backend vllm, --vllm_..., ...), except where its '
        'task is another one: see the README. As there, NPROC_PER_NODE=2 swift-patch infer ... starts two processes.')
    parser.set_defaults(run=run, rest=[])

    group = parser.add_argument_group('input and output')
    add_adapters(group, required=True, help='the LoRAs that samples may name; what no sample names is not looked at')
    group.add_argument(
        '--val_dataset',
        nargs='+',
        required=True,
        metavar='DATASET',
        help='the samples: JSONL files, or any datasets of swift infer (FILE#N, CSV, JSON, ids on a hub)')
    group.add_argument(
        '--default_adapters',
        nargs='+',
        metavar='NAME[=WEIGHT]',
        help='the LoRAs of samples that name none, with weights 1/k where none are given')
    group.add_argument(
        '--result_path', metavar='FILE', help='the JSONL file to write (default: result/MODEL/infer_result/TIME.jsonl)')
    add_bool(group, '--resume', default=False, help='go on with an existing result file of the same run')
    add_bool(group, '--overwrite', default=False, help='replace an existing result file')
    add_bool(
        group,
        '--strict',
        default=True,
        help='end the run at a sample that cannot be answered (default: true); false writes a line with its `error` '
        'and goes on')
    add_bool(
        group, '--retry_errors', default=False, help='with --resume, try samples again whose lines have an `error`')
    group.add_argument(
        '--metric', choices=('acc', 'rouge'), help='how well responses agree with the labels, in the end')
    add_bool(group, '--verbose', default=False, help='show what ms-swift logs')

    group = parser.add_argument_group('composition')
    add_merge_method(group)
    add_combination(group, help="how fusion merges: one of PEFT's combination types (%(choices)s)")

    add_model_group(parser)

    add_template_group(parser)

    group = parser.add_argument_group('generation')
    add_generation(group)
    group.add_argument(
        '--seed', type=number(int, 0, 2**32 - 1), help='seeds sampling, for each batch anew (default: 42)')
    add_bool(group, '--stream', help='show each response on the terminal as it is generated, one sample after another')
    group.add_argument(
        '--max_batch_size',
        type=number(int, 1),
        default=InferConfig.max_batch_size,
        help='how many samples are answered together at most, each with its own composition (default: %(default)s)')


def with_config_file(argv: List[str]) -> List[str]:
    """Returns a command line with the arguments that a JSON or YAML file has, as `swift infer FILE` takes it.

    `deploy` takes one, too.

    Raises:
        ValueError: The file cannot be read, or the installed ms-swift reads none.
    """
    command, *arguments = argv or ['']
    if command not in ('infer', 'deploy') or not arguments or not arguments[0].endswith(_CONFIG_SUFFIXES):
        return argv
    with _shown()('Reading the options'):
        from swift.cli import main
        if not hasattr(main, 'parse_yaml_args'):
            raise ValueError(f'{arguments[0]}: the installed ms-swift reads no options from files.')
        read = [expanded(arguments[0]), *arguments[1:]]
        try:
            main.parse_yaml_args(read)
        except Exception as e:  # OSError, errors of YAML and JSON, and of files that hold something else
            raise ValueError(f'Cannot read the options in {arguments[0]}: {type(e).__name__}: {e}') from e
    return [command, *read]


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0; 1 where there are samples without a response, or where another process of the run ended; 2 after a user's
        mistake (told on stderr); 143 where it was to end, and did after what it was answering.
    """
    with nullcontext() if args.verbose else without_info():
        return _run(args, _shown())


def _run(args: argparse.Namespace, show: Stage) -> int:
    from ..inference.ranks import RankDied, Terminated, ToldByMain
    from ..inference.run import run_infer
    try:
        config = _config(args, show)
    except ValueError as e:
        if is_main():
            print(f'swift-patch infer: error: {e}', file=sys.stderr)
        return 2
    try:
        summary = run_infer(config, show)
    except ToldByMain:
        return 2
    except ValueError as e:
        # Of another process only where the first one cannot tell it.
        rank = '' if is_main() else f'rank {os.environ["RANK"]}: '
        print(f'swift-patch infer: error: {rank}{e}', file=sys.stderr)
        return 2
    except (RankDied, Terminated) as e:
        # The others would say the same.
        if is_main():
            print(f'swift-patch infer: error: {e}', file=sys.stderr)
        return 128 + signal.SIGTERM if isinstance(e, Terminated) else 1
    if is_main():
        _print_summary(summary)
    return 1 if summary.errors else 0


def _shown() -> Stage:
    return partial(stage, Console(stderr=True), redirects=True) if is_main() else no_stage


def _config(args: argparse.Namespace, show: Stage) -> InferConfig:
    from ..inference.checkpoints import parse_adapters
    swift_args = given(args, SWIFT_OPTIONS)
    if args.rest:
        with show('Reading the options'):
            from ..inference.options import parse_swift_options
            swift_args.update(parse_swift_options(args.rest))
    return InferConfig(
        adapters=parse_adapters(args.adapters),
        val_dataset=[expanded(dataset) for dataset in args.val_dataset],
        result_path=None if args.result_path is None else expanded(args.result_path),
        swift_args=swift_args,
        default_adapters=_default_adapters(args.default_adapters or ()),
        merge_method=args.merge_method,
        composer_args=given(args, COMPOSER_OPTIONS),
        max_batch_size=args.max_batch_size,
        compile_merging=args.compile_merging,
        strict=args.strict,
        resume=args.resume,
        retry_errors=args.retry_errors,
        overwrite=args.overwrite)


def _default_adapters(items: Sequence[str]) -> Dict[str, Optional[float]]:
    """Reads NAME and NAME=WEIGHT."""
    adapters: Dict[str, Optional[float]] = {}
    for item in items:
        name, separator, weight = item.partition('=')
        try:
            value = float(weight) if separator else None
        except ValueError:
            value = math.nan
        if not name or name in adapters or value is not None and not math.isfinite(value):
            raise ValueError('--default_adapters is expected to have each NAME once, alone or as NAME=WEIGHT with a '
                             f'finite number, found {item!r}.')
        adapters[name] = value
    return adapters


def _print_summary(summary: 'InferSummary') -> None:
    table = Table('', '', title='Results', title_justify='left', show_header=False)
    table.add_row('samples', f'{summary.samples:,}')
    if summary.resumed:
        table.add_row('finished before', f'{summary.resumed:,}')
    table.add_row('without a response', f'{summary.errors:,}')
    if summary.samples:
        table.add_row('samples/s', f'{summary.samples_per_second:,.2f}')
        table.add_row('tokens/s', f'{summary.tokens_per_second:,.1f} ({summary.tokens:,} tokens)')
        table.add_row('composing', f'{summary.seconds_composing:,.2f} s')
        table.add_row('generating', f'{summary.seconds_generating:,.2f} s')
        table.add_row('in all', f'{summary.seconds:,.2f} s')
    for name, value in summary.metric.items():
        table.add_row(name, f'{value:.4g}')
    console = Console()
    if not summary.samples:
        console.print('Nothing left to do: all samples are finished.')
    console.print(table)
    console.print(f'Wrote {summary.result_path}', soft_wrap=True, markup=False, highlight=False)
