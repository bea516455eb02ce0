"""`swift-patch deploy`: named and behaving like `swift deploy`, with a composition of adapters for each request."""
import argparse
import sys
from contextlib import nullcontext
from functools import partial
from rich.console import Console

from ..inference.config import ANSWER_OPTIONS
from ..lora.paths import expanded
from ..quiet import without_info
from ..serve.config import DeployConfig, Limits
from .arguments import (COMPOSER_OPTIONS, MODEL_OPTIONS, add_adapters, add_bool, add_combination, add_generation,
                        add_merge_method, add_model_group, add_template_group, given, number)
from .progress import stage

_SERVER_OPTIONS = ('host', 'port', 'api_key', 'served_model_name')


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the `deploy` command to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'deploy',
        help='serve a composition of LoRAs for each request, by the API of OpenAI',
        description='Answer every request with its own composition of LoRAs, by the API of OpenAI: its `model` is '
        'a LoRA, or a=0.6,b=0.4, or its fields are `adapters` and `weights`. Requests that wait are answered together.',
        epilog='Every other option of swift deploy is taken too (--ssl_certfile, --log_level, --max_logprobs, '
        '--result_path, --infer_backend vllm and its --vllm_..., ...), except where its task is another one: see '
        'docs/serve.md.')
    parser.set_defaults(run=run, rest=[])

    group = parser.add_argument_group('server')
    add_adapters(group, required=True, help='the LoRAs that requests may name')
    group.add_argument('--host', help='the address to listen on; 0.0.0.0 for all (default: 127.0.0.1)')
    group.add_argument(
        '--port', type=number(int, 1, 65535), help='the port, or the next one that is free (default: 8000)')
    group.add_argument('--api_key', help='the key that requests must have')
    group.add_argument('--served_model_name', metavar='NAME', help="the base model's name (default: its folder's)")
    add_bool(group, '--ui', default=False, help='serve a page to try mixtures on, at /; it needs the extra `ui`')
    group.add_argument(
        '--adapter_folders',
        nargs='+',
        default=[],
        metavar='DIR',
        help='let requests with the API key add LoRAs from below these folders, and remove LoRAs')
    add_bool(
        group,
        '--verbose',
        default=False,
        help='show what ms-swift logs: all that is asked and answered, and, each --log_interval, how fast')

    group = parser.add_argument_group('limits')
    group.add_argument(
        '--max_batch_size',
        type=number(int, 1),
        default=DeployConfig.max_batch_size,
        help='how many requests are answered together at most (default: %(default)s)')
    for name, kind, low, help in (
        ('max_sources', int, 1, 'how many LoRAs one request may merge'),
        ('max_body_bytes', int, 1, "how large a request's body may be"),
        ('max_waiting', int, 1, 'how many requests may wait; more are refused with 429'),
        ('max_seconds', float, 0, 'how long one request may take'),
        ('max_shutdown_seconds', float, 0, 'how long requests may go on after SIGTERM'),
    ):  # yapf: disable
        group.add_argument(
            f'--{name}', type=number(kind, low), default=getattr(Limits, name), help=f'{help} (default: %(default)s)')
    group.add_argument(
        '--cache_bytes',
        type=number(int, 0),
        default=DeployConfig.cache_bytes,
        help='how much memory may hold LoRAs that were read, on each device (default: %(default)s)')

    group = parser.add_argument_group('composition')
    add_merge_method(group)
    add_combination(group, help="how fusion merges: one of PEFT's combination types (%(choices)s)")
    add_model_group(parser)
    add_template_group(parser)
    add_generation(parser.add_argument_group('generation, where a request does not say'))


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 where it was told to end by SIGTERM; 2 after a user's mistake (told on stderr).
    """
    from ..serve.run import run_deploy
    show = partial(stage, Console(stderr=True), redirects=True)
    try:
        with nullcontext() if args.verbose else without_info():
            run_deploy(_config(args), show)
    except ValueError as e:
        print(f'swift-patch deploy: error: {e}', file=sys.stderr)
        return 2
    return 0


def _config(args: argparse.Namespace) -> DeployConfig:
    from ..inference.checkpoints import parse_adapters
    swift_args = given(args, (*MODEL_OPTIONS, *ANSWER_OPTIONS, *_SERVER_OPTIONS))
    if args.rest:
        from ..inference.options import parse_swift_options
        from ..serve.stock import ServerArguments
        swift_args.update(parse_swift_options(args.rest, 'deploy', ServerArguments))
    # ms-swift's would be shown with each request.
    swift_args['verbose'] = args.verbose
    return DeployConfig(
        adapters=parse_adapters(args.adapters),
        swift_args=swift_args,
        merge_method=args.merge_method,
        composer_args=given(args, COMPOSER_OPTIONS),
        max_batch_size=args.max_batch_size,
        compile_merging=args.compile_merging,
        cache_bytes=args.cache_bytes,
        limits=Limits(args.max_sources, args.max_body_bytes, args.max_waiting, args.max_seconds,
                      args.max_shutdown_seconds),
        adapter_folders=[expanded(folder) for folder in args.adapter_folders],
        ui=args.ui)
