"""The arguments that commands share, and types for argparse."""
import argparse
import math
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

from ..lora import combination
from ..lora.paths import expanded

# Handed to ms-swift as they are; one that is not given is left to ms-swift.
MODEL_OPTIONS = ('model', 'model_type', 'model_revision', 'use_hf', 'torch_dtype', 'device_map', 'attn_impl')
COMBINATION_TYPES = tuple(combination.COMBINATION_TYPES)
COMPOSER_OPTIONS = ('combination_type', 'density', 'svd_rank', 'majority_sign_method')


def add_adapters(group: argparse._ActionsContainer, *, required: bool, help: str) -> None:
    """Adds `--adapters`."""
    group.add_argument(
        '--adapters',
        nargs='+',
        # Not the last one alone, where it is given several times.
        action='extend',
        required=required,
        metavar='NAME=PATH|DIR|@FILE',
        help=f'{help}. Any mixture of: NAME=PATH, a checkpoint; DIR, a checkpoint or a folder of checkpoints, by '
        'the names of their folders; @FILE, a manifest with a line {"name": ..., "path": ...} for each checkpoint, or '
        "one JSON object of names and paths. Checkpoints are those of swift sft, in ms-swift's or in PEFT's format; "
        'PATH and DIR may be ids on a hub')


def add_model_group(parser: argparse.ArgumentParser) -> None:
    """Adds the group of `MODEL_OPTIONS`."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', metavar='DIR_OR_ID', help="the base model (default: the adapters' args.json)")
    group.add_argument('--model_type', help="ms-swift's type of the model, where it cannot be told from its files")
    group.add_argument('--model_revision', help='the revision of a model from a hub')
    add_bool(group, '--use_hf', help='fetch models from Hugging Face instead of ModelScope')
    group.add_argument('--torch_dtype', choices=('bfloat16', 'float16', 'float32'), help='the dtype of the weights')
    group.add_argument(
        '--device',
        '--device_map',
        dest='device_map',
        metavar='DEVICE',
        help='cpu, cuda:0, auto or a device map as JSON')
    group.add_argument('--attn_impl', help='the attention implementation: sdpa, eager, flash_attention_2, ...')


def add_template_group(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ms-swift's dialogue template."""
    group = parser.add_argument_group('template')
    group.add_argument('--template', help="ms-swift's dialogue template")
    group.add_argument('--system', help='the system prompt, or a .txt file with it')
    group.add_argument('--max_length', type=number(int, 1), help='the largest number of tokens of a prompt')
    group.add_argument(
        '--truncation_strategy', choices=('delete', 'left', 'right'), help='what to do with a prompt that is longer')
    group.add_argument('--response_prefix', help='what every response starts with')
    add_bool(group, '--enable_thinking', help='turn the thinking mode on or off')


def add_generation(group: argparse._ActionsContainer) -> None:
    """Adds the options that say how a response is generated."""
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


def add_merge_method(group: argparse._ActionsContainer) -> None:
    """Adds `--merge_method`."""
    group.add_argument(
        '--merge_method',
        choices=tuple(combination.MERGE_METHODS),
        default='fusion',
        help='average parameters, average outputs, or take the heaviest adapter alone (default: %(default)s)')


def add_combination(group: argparse._ActionsContainer,
                    *,
                    help: str,
                    choices: Sequence[str] = COMBINATION_TYPES,
                    default: Optional[str] = None) -> None:
    """Adds `COMPOSER_OPTIONS` and `--compile_merging`."""
    group.add_argument('--combination_type', choices=choices, default=default, metavar='TYPE', help=help)
    group.add_argument(
        '--density', type=number(float, 0, 1), help='the share of values that pruning combination types keep')
    group.add_argument(
        '--svd_rank', type=number(int, 1), help='the rank of the fused adapter for svd combination types')
    group.add_argument(
        '--majority_sign_method', choices=('total', 'frequency'), help='how ties combination types elect signs')
    add_bool(
        group,
        '--compile_merging',
        default=False,
        help='merge by a kernel that torch.compile makes (linear and average): a pause, then about half the time in '
        'half precision')


def add_bool(group: argparse._ActionsContainer, name: str, *, help: str, default: Optional[bool] = None) -> None:
    """Adds a switch in ms-swift's manner: `--name`, `--name true` or `--name false`."""
    group.add_argument(name, type=_bool, nargs='?', const=True, default=default, metavar='BOOL', help=help)


def given(args: argparse.Namespace, names: Tuple[str, ...]) -> Dict[str, Any]:
    """Returns those of the options that were given, by name."""
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def file_path(text: str) -> Path:
    """A type for argparse: a path, in which the user's home and variables stand for what they are."""
    return Path(expanded(text))


def number(kind: Callable[[str], Union[int, float]],
           low: int,
           high: float = math.inf) -> Callable[[str], Union[int, float]]:
    """Makes a type for argparse that takes finite numbers from `low` to `high`."""
    expected = f'{"an integer" if kind is int else "a number"} ' + (f'of at least {low}'
                                                                    if high == math.inf else f'from {low} to {high}')

    def to_number(text: str) -> Union[int, float]:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f'must be {expected}, got {text!r}')
        return value

    return to_number


def _bool(text: str) -> bool:
    value: Optional[bool] = {'true': True, '1': True, 'false': False, '0': False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f'must be true or false, got {text!r}')
    return value
