"""Every option of `swift infer` is read as it does, passed over, or refused with a reason."""
import argparse
import pytest
from dataclasses import fields
from typing import Any, Dict, List

from swift_patch.cli.infer import add_parser
from swift_patch.inference.options import MISSING, NOT_NEEDED, parse_swift_options, reason_in
from swift_patch.ms_swift import InferArguments

NAMES = [field.name for field in fields(InferArguments)]


@pytest.mark.parametrize(('given', 'expected'), [
    ([], {}),
    (['--quant_bits', '4', '--quant_method', 'bnb'], {'quant_bits': 4, 'quant_method': 'bnb'}),
    (['--max_model_len=2048'], {'max_model_len': 2048}),
    (['--max-model-len', '2048'], {'max_model_len': 2048}),
    (['--load_args', 'false'], {'load_args': False}),
    (['--infer_backend', 'vllm', '--vllm_max_model_len', '5'], {'infer_backend': 'vllm', 'vllm_max_model_len': 5}),
    (['--external_plugins', 'a.py', 'b.py'], {'external_plugins': ['a.py', 'b.py']}),
    (['--columns', '{"a": "query"}'], {'columns': '{"a": "query"}'}),
    (['--val_dataset_sample', '3', '--val_dataset_shuffle'], {'val_dataset_sample': 3, 'val_dataset_shuffle': True}),
])  # yapf: disable
def test_options_are_read_as_ms_swift_does_and_those_that_are_not_given_are_left_out(
        given: List[str], expected: Dict[str, Any]) -> None:
    assert parse_swift_options(given) == expected


@pytest.mark.parametrize('given', [
    '--infer_backend pt', '--merge_lora false', '--merge_lora true', '--write_batch_size 10', '--use_swift_lora true',
    '--streaming false', '--load_data_args false', '--task_type causal_lm', '--tuner_backend peft',
    '--sglang_tp_size 1'
])  # yapf: disable
def test_what_asks_for_what_there_is_anyway_is_passed_over(given: str) -> None:
    assert parse_swift_options(given.split()) == {}


@pytest.mark.parametrize(('given', 'reason'), [
    ('--infer_backend sglang', 'by transformers or vLLM'),
    ('--sglang_context_length 5', 'by transformers or vLLM'),
    ('--vllm_max_model_len 5', '--infer_backend vllm'),
    ('--infer_backend lmdeploy --vllm_max_model_len 5', 'by transformers or vLLM'),
    ('--task_type embedding', 'generate no text'),
    ('--load_data_args true', '--val_dataset'),
    ('--dataset a b', '--val_dataset'),
    ('--streaming', 'by its place'),
])  # yapf: disable
def test_what_is_missing_is_told_with_a_reason(given: str, reason: str) -> None:
    with pytest.raises(ValueError) as e:
        parse_swift_options(given.split())
    assert str(e.value).startswith(given.split()[0]) and reason in str(e.value)


@pytest.mark.parametrize('given', ['--max_model', '--quant', '--unknown 3'])
def test_what_is_unknown_or_shortened_is_told(given: str) -> None:
    with pytest.raises(ValueError, match=f'unrecognized arguments: {given}'):
        parse_swift_options(given.split())


def test_a_wrong_value_is_told_with_its_option(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e:
        parse_swift_options(['--quant_bits', 'many'])
    told = capsys.readouterr().err
    assert e.value.code == 2 and '--quant_bits' in told and len(told.splitlines()) == 2


def test_no_option_is_both_taken_and_refused() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    add_parser(commands)
    own = {action.dest for action in commands.choices['infer']._actions}
    assert own & {*NAMES}, 'or the test would see nothing'
    for name in NAMES:
        reasons = [reason_in(table, name) is not None for table in (NOT_NEEDED, MISSING)]
        assert sum(reasons) <= (name not in own), name


@pytest.mark.parametrize('table', [NOT_NEEDED, MISSING], ids=['not needed', 'missing'])
def test_every_reason_is_that_of_an_option(table: Dict[str, str]) -> None:
    if 'decision_shuffle_fields' not in NAMES:
        pytest.skip('an older ms-swift does not have them all')
    for pattern in table:
        assert any(reason_in({pattern: ''}, name) is not None for name in NAMES), pattern
