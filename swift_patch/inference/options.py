"""The options of `swift infer`, by ms-swift's own parser, and which of them have no place in `swift-patch infer`."""
import argparse
import re
from dataclasses import fields
from typing import Any, Dict, Mapping, Optional, Sequence

# Options without which nothing is lost, and why, by patterns of their names. They are taken and passed over.
NOT_NEEDED = {
    'tuner_backend|tuner_type|use_swift_lora': 'told by the files of each adapter',
    'merge_lora|safe_serialization|max_shard_size': 'adapters are merged for each sample, in memory',
    'write_batch_size': 'each line is written as soon as its sample and those before it are done',
    'remove_unused_columns': 'what a sample has besides is kept in its line',
    'ignore_args_error': 'for notebooks, which call `run_infer`',
    'vllm_use_async_engine': 'always, for each request has adapters of its own',
    'packing.*|lazy_tokenize|interleave_prob|stopping_strategy|shuffle_buffer_size': 'of training',
    'decision_.*|.*loss_scale|padding_free|sequence_parallel_size|init_strategy': 'of training',
}
# Options that are missing, and why, by patterns of their names.
MISSING = {
    '(sglang|lmdeploy)_.*': 'swift-patch generates by transformers or vLLM',
    'reranker_.*|num_labels|problem_type|task_type': 'for models that generate no text',
    'dataset|split_dataset_ratio|load_data_args': 'give the samples by --val_dataset',
    'cached_(val_)?dataset': 'they hold tokens, which name no adapters',
    'streaming': 'a run that goes on must find each sample by its place',
    'use_ray|ray_exp_name|device_groups': 'several processes are started by NPROC_PER_NODE or torchrun',
}
# Options that nothing but vLLM has.
OF_VLLM = 'vllm_.*|structured_outputs_regex'
# Values of missing options that ask for what there is, besides ms-swift's defaults.
_NEUTRAL = {'task_type': ('causal_lm', )}
_TRANSFORMERS = ('transformers', 'pt')


def reason_in(table: Mapping[str, str], name: str) -> Optional[str]:
    """Returns the reason that a table has for an option of `swift infer`, None where it does not have the option."""
    return next((reason for pattern, reason in table.items() if re.fullmatch(pattern, name)), None)


def parse_swift_options(arguments: Sequence[str],
                        command: str = 'infer',
                        arguments_class: Optional[type] = None) -> Dict[str, Any]:
    """Reads options of `swift infer` as it does, or those of another command.

    Args:
        arguments: The part of a command line that `swift-patch` has no words of its own for.
        command: The command.
        arguments_class: ms-swift's class of its options, by default that of `swift infer`.

    Returns:
        The values of those that are given, by name.

    Raises:
        ValueError: One is unknown, or asks for what there is not. (A wrong value ends the process with usage and exit
            code 2, as argparse has it.)
    """
    from transformers import HfArgumentParser

    from ..ms_swift import InferArguments
    kind: Any = arguments_class or InferArguments
    parser = HfArgumentParser(kind, prog=f'swift-patch {command}', usage='%(prog)s [options]', add_help=False)
    parser.allow_abbrev = False
    defaults = {field.name: parser.get_default(field.name) for field in fields(kind)}
    for action in parser._actions:
        # So that what is not given is told from what is given as its default.
        action.default = argparse.SUPPRESS
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(f'unrecognized arguments: {" ".join(unknown)}')
    given: Dict[str, Any] = vars(namespace)
    refused = []
    backend = given.get('infer_backend')
    if backend in _TRANSFORMERS:
        del given['infer_backend']
    elif backend not in (None, 'vllm'):
        refused.append(f'--infer_backend {backend} is missing here: swift-patch generates by transformers or vLLM.')
    for name, value in list(given.items()):
        reason = reason_in(MISSING, name)
        if reason is not None and value != defaults[name] and value not in _NEUTRAL.get(name, ()):
            refused.append(f'--{name} {value} is missing here: {reason}.')
        if reason is not None or reason_in(NOT_NEEDED, name) is not None:
            del given[name]
        elif backend != 'vllm' and re.fullmatch(OF_VLLM, name):
            refused.append(f'--{name} {value} is of another backend: give --infer_backend vllm, too.')
    if refused:
        raise ValueError(' '.join(refused))
    return given
