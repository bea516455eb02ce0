"""`swift-patch infer`: named and behaving like `swift infer`, with a composition of adapters for each sample."""
import argparse
import sys
from typing import TYPE_CHECKING

from ..inference.config import ANSWER_OPTIONS, InferConfig
from .arguments import (COMPOSER_OPTIONS, MODEL_OPTIONS, add_adapters, add_bool, add_combination, add_model_group,
                        given, number)

if TYPE_CHECKING:
    from swift_patch.inference.config import InferSummary

SWIFT_OPTIONS = (*MODEL_OPTIONS, *ANSWER_OPTIONS)


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the `infer` command to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'infer',
        help='generate with a composition of LoRAs for each sample',
        description='Answer every line of a JSONL file with its own composition of LoRAs. A line is '
        '{"messages": [...], "adapters": ["a", "b"], "weights": [0.6, 0.4]}, with weights 1/k where none are given. '
        'Options that are not given have the values that swift infer would give them.')
    parser.set_defaults(run=run)

    group = parser.add_argument_group('input and output')
    add_adapters(group, required=True, help='the LoRAs that samples may name; what no sample names is not looked at')
    group.add_argument('--val_dataset', required=True, metavar='FILE', help='the JSONL file with the samples')
    group.add_argument('--result_path', required=True, metavar='FILE', help='the JSONL file to write')
    group.add_argument('--resume', action='store_true', help='go on with an existing result file of the same run')
    group.add_argument('--overwrite', action='store_true', help='replace an existing result file')

    group = parser.add_argument_group('composition')
    group.add_argument(
        '--merge_method',
        choices=('fusion', 'mixture', 'selection'),
        default='fusion',
        help='average parameters, average outputs, or take the heaviest adapter alone (default: %(default)s)')
    add_combination(group, help="how fusion merges: one of PEFT's combination types (%(choices)s)")

    add_model_group(parser)

    group = parser.add_argument_group('template')
    group.add_argument('--template', help="ms-swift's dialogue template")
    group.add_argument('--system', help='the system prompt, or a .txt file with it')
    group.add_argument('--max_length', type=number(int, 1), help='the largest number of tokens of a prompt')
    group.add_argument(
        '--truncation_strategy', choices=('delete', 'left', 'right'), help='what to do with a prompt that is longer')
    group.add_argument('--response_prefix', help='what every response starts with')
    add_bool(group, '--enable_thinking', help='turn the thinking mode on or off')

    group = parser.add_argument_group('generation')
    group.add_argument('--max_new_tokens', type=number(int, 1), help='the largest number of tokens of a response')
    group.add_argument(
        '--temperature', type=number(float, 0), help='the sampling temperature; 0 takes the likeliest token')
    group.add_argument(
        '--top_k', type=number(int, -1), help='sample from the k likeliest tokens; 0 or -1 is all of them')
    group.add_argument(
        '--top_p', type=number(float, 0, 1), help='sample from the likeliest tokens with this probability in sum')
    group.add_argument('--repetition_penalty', type=number(float, 0), help='the penalty for repeated tokens; 1 is none')
    group.add_argument('--num_beams', type=number(int, 1), help='the number of beams; 1 is no beam search')
    group.add_argument('--stop_words', nargs='+', help='texts that end a response, besides the end of a turn')
    add_bool(group, '--logprobs', help='write the log probabilities of the tokens')
    group.add_argument('--top_logprobs', type=number(int, 0), help='how many log probabilities for each position')
    group.add_argument('--seed', type=int, help='seeds sampling, for each batch anew (default: 42)')
    group.add_argument(
        '--max_batch_size',
        type=number(int, 1),
        default=InferConfig.max_batch_size,
        help='how many samples are answered together at most, each with its own composition (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0, 2 after a user's mistake (told on stderr), or 130 where it was interrupted.
    """
    from swift_patch.inference.checkpoints import parse_adapters
    from swift_patch.inference.run import run_infer
    try:
        config = InferConfig(
            adapters=parse_adapters(args.adapters),
            val_dataset=args.val_dataset,
            result_path=args.result_path,
            swift_args=given(args, SWIFT_OPTIONS),
            merge_method=args.merge_method,
            composer_args=given(args, COMPOSER_OPTIONS),
            max_batch_size=args.max_batch_size,
            compile_merging=args.compile_merging,
            resume=args.resume,
            overwrite=args.overwrite)
        summary = run_infer(config)
    except ValueError as e:
        print(f'swift-patch infer: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        # `run_infer` tells how to go on, once there is something to go on with.
        print(f'swift-patch infer: interrupted{"; " if e.args else ""}{e}', file=sys.stderr)
        return 130
    _print_summary(summary, args.result_path)
    return 0


def _print_summary(summary: 'InferSummary', result_path: str) -> None:
    if summary.samples:
        resumed = f' ({summary.resumed} finished before)' if summary.resumed else ''
        print(f'{_samples(summary.samples)}{resumed}, {summary.samples_per_second:.2f} samples/s: '
              f'{summary.seconds_composing:.2f} s composing, {summary.seconds_generating:.2f} s generating')
    else:
        finished = 'the only sample is' if summary.resumed == 1 else f'all {summary.resumed} samples are'
        print(f'nothing left to do: {finished} finished')
    print(f'results: {result_path}')


def _samples(count: int) -> str:
    return f'{count} sample' if count == 1 else f'{count} samples'
