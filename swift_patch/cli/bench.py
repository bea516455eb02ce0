"""`swift-patch bench`: what composing costs on the user's own model and machine, stock against the patch."""
import argparse
import os
import sys
from functools import partial
from rich.console import Console

from ..files import check_replaceable, write_whole
from ..inference.checkpoints import parse_adapters
from .arguments import (COMBINATION_TYPES, COMPOSER_OPTIONS, MODEL_OPTIONS, add_adapters, add_combination,
                        add_model_group, file_path, given, number)
from .doctor import versions
from .progress import stage

# Stock has no `average`.
_COMPARABLE_TYPES = tuple(name for name in COMBINATION_TYPES if name != 'average')
_PICTURE_TYPES = ('.png', '.svg', '.pdf')
# What is no business of a model that is made here.
_OF_OTHER_MODELS = ('model', 'model_type', 'model_revision', 'use_hf')


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `bench` to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'bench',
        help='measure what composing costs on your model, stock against the patch',
        description='Compose the same random samples through the patch and through stock add_weighted_adapter, a new '
        'adapter for each, and show the seconds that each sample took. Only composing is measured, nothing is '
        'generated. The model is loaded twice, one after the other.')
    parser.set_defaults(run=run)

    group = parser.add_argument_group('what is measured')
    exclusive = group.add_mutually_exclusive_group(required=True)
    add_adapters(exclusive, required=False, help='the LoRAs to compose')
    exclusive.add_argument(
        '--synthetic',
        action='store_true',
        help='instead of a model and adapters of yours: a small Qwen2 of 8 layers with 14 LoRAs of rank 8, all random')
    group.add_argument(
        '--samples', type=number(int, 1, 100_000), default=30, help='how many samples (default: %(default)s)')
    group.add_argument(
        '--adapters_per_sample',
        type=number(int, 1),
        metavar='K',
        help='how many LoRAs each sample is composed of (default: 3, or all where there are fewer)')
    add_combination(
        group,
        choices=_COMPARABLE_TYPES,
        default='linear',
        help="how they are merged: one of PEFT's combination types (%(choices)s; default: %(default)s)")
    group.add_argument('--seed', type=int, default=42, help='which LoRAs and weights are drawn (default: %(default)s)')
    group.add_argument(
        '--stock_seconds',
        type=number(float, 0),
        default=120.,
        help='the stock path begins no further sample when composing took longer than this in sum; that it was cut is '
        'told (default: %(default)s)')

    group = parser.add_argument_group('output')
    group.add_argument('--picture', type=file_path, metavar='FILE', help='draw the seconds: a .png, .svg or .pdf')
    group.add_argument(
        '--json',
        type=file_path,
        metavar='FILE',
        help='write the settings, the machine, the samples and all seconds: schema_version 1')
    group.add_argument('--overwrite', action='store_true', help='replace existing files')

    add_model_group(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0, 2 after a user's mistake (told on stderr), or 130 where it was interrupted.
    """
    console = Console()
    try:
        _check_files(args)
        _check_synthetic(args)
        adapters = parse_adapters(args.adapters or [])
        console.print('Loading ms-swift ...')
        os.environ.setdefault('LOG_LEVEL', 'ERROR')
        from ..bench import report
        from ..bench.measure import BenchConfig, run_bench
        merge_args = given(args, COMPOSER_OPTIONS)
        config = BenchConfig(
            adapters=adapters,
            synthetic=args.synthetic,
            swift_args=given(args, MODEL_OPTIONS),
            samples=args.samples,
            adapters_per_sample=args.adapters_per_sample,
            combination_type=merge_args.pop('combination_type'),
            merge_args=merge_args,
            compile_merging=args.compile_merging,
            seed=args.seed,
            stock_seconds=args.stock_seconds)
        result = run_bench(config, partial(stage, console), console.print)
        found, headline = versions(), report.headline(result, config.combination_type)
        console.print(report.about_table(result, found))
        table = report.latency_table(result.stock, result.patch, report.headline(result, config.combination_type))
        console.print(table)
        if len(result.stock) < len(result.samples):
            console.print(f'Stock was cut after {len(result.stock)} of {len(result.samples)} samples (--stock_seconds '
                          f'{args.stock_seconds:g}): the sums are of those.')
        if args.picture:
            title = f'{headline}\n{report.about_machine(result)}\n{report.about_model(result)}'
            write_whole(args.picture, lambda path: report.draw_latency(result.stock, result.patch, path, title))
            console.print(f'Wrote {args.picture}', soft_wrap=True, markup=False, highlight=False)
        if args.json:
            data = report.to_json(config, result, found)
            write_whole(args.json, lambda path: report.write_json(data, path))
            console.print(f'Wrote {args.json}', soft_wrap=True, markup=False, highlight=False)
    except ValueError as e:
        print(f'swift-patch bench: error: {e}', file=sys.stderr)
        return 2
    return 0


def _check_files(args: argparse.Namespace) -> None:
    if args.picture and args.picture.suffix.lower() not in _PICTURE_TYPES:
        raise ValueError(f'--picture is expected to end in one of {", ".join(_PICTURE_TYPES)}, found '
                         f'{str(args.picture)!r}.')
    for option in ('picture', 'json'):
        path = getattr(args, option)
        if path:
            check_replaceable(option, path, args.overwrite)
    if args.picture and args.json and args.picture.resolve() == args.json.resolve():
        raise ValueError(f'--picture and --json are expected to be two files, found {args.json} twice.')


def _check_synthetic(args: argparse.Namespace) -> None:
    for option in given(args, _OF_OTHER_MODELS) if args.synthetic else ():
        raise ValueError(f'--synthetic makes a model of its own, so it takes no --{option}: leave one of them out.')
