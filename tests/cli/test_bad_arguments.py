"""Whatever is on the command line or in the files that it names: exit code 2 and a message, never a traceback."""
import contextlib
import io
import json
import pytest
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from pathlib import Path
from typing import List, Tuple

from swift_patch import cli

REQUIRED = ['infer', '--adapters', 'a=none', '--val_dataset', 'none.jsonl', '--result_path', 'none/out.jsonl']
# What takes numbers, besides the seed.
NUMBERS = [
    '--density', '--svd_rank', '--max_length', '--max_new_tokens', '--temperature', '--top_k', '--top_p',
    '--repetition_penalty', '--num_beams', '--top_logprobs'
]
OPTIONS = [
    *NUMBERS, '--merge_method', '--combination_type', '--majority_sign_method', '--torch_dtype', '--seed', '--use_hf',
    '--logprobs', '--truncation_strategy', '--samples', '--stock_seconds', '--resume', '--overwrite', '--val_dataset',
    '--result_path', '--adapters', '--adapters_per_sample', '--picture', '--json', '--synthetic', '--unknown'
]
ODD = [
    '', ' ', '=', 'a=', '=b', 'a=b=c', 'nan', '-inf', '1e400', '9' * 5000, '-1', '0x10', 'true', 'None', '[', '{}',
    '%s', '[red]', '\udcff', 'x' * 5000, '--', '-', '/', '..', '/dev/null', '\u202e'
]
# No process is passed a NUL, and help is no mistake.
TEXT = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=20)
VALUES = st.sampled_from(ODD) | TEXT.filter(lambda text: text not in ('-h', '--help'))


def run(arguments: List[str]) -> Tuple[int, str]:
    """The exit code, and what was written to stderr as it is there."""
    # Also where Python would not print it: as of a process.
    stderr = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', errors='backslashreplace')
    with contextlib.redirect_stderr(stderr):
        try:
            code = cli.main(arguments)
        except SystemExit as e:
            code = e.code
    stderr.seek(0)
    return code, stderr.read()


@tries(100)
@given(arguments=st.lists(VALUES | st.sampled_from(OPTIONS), max_size=5))
def test_any_arguments_are_refused_without_a_traceback(arguments: List[str]) -> None:
    # Beside what is right but for the files, which do not exist; and what comes last is in force.
    for command, last in ((REQUIRED, []), (['infer'], []), (['deploy', '--adapters', 'a=none'], []), (['deploy'], []),
                          (['bench'], ['--samples', '0']), (['demo'], ['--samples', '0']), (['nothing'], []), ([], [])):
        code, told = run([*command, *arguments, *last])
        assert code == 2
        assert 'error: ' in told and 'Traceback' not in told
        assert not Path('none').exists()


@tries(100)
@given(option=st.sampled_from(NUMBERS), value=VALUES)
def test_a_wrong_number_is_told_with_its_option(option: str, value: str) -> None:
    code, told = run([*REQUIRED, f'{option}={value}'])
    assert code == 2
    # Where it is a number, what is wrong is the dataset.
    assert f'argument {option}: ' in told or 'Cannot read the dataset none.jsonl: No such file' in told
    if value in ('nan', '-inf', '1e400', '', 'None', 'true'):
        assert f'argument {option}: must be ' in told and f'got {value!r}' in told


@pytest.mark.parametrize(('arguments', 'told'), [
    (['--samples', '0'], '--samples is expected to be from 1 to 100000, found 0.'),
    (['--samples', '-1'], 'found -1.'),
    (['--samples', '1000000000000'], 'found 1000000000000.'),
    (['--samples', '9' * 4000], 'found 9999'),
    (['--samples', '9' * 5000], 'argument --samples: invalid int value'),
    (['--samples', '1e3'], "argument --samples: invalid int value: '1e3'"),
    (['--stock_seconds', 'nan'], '--stock_seconds is expected to be 0 or more, found nan.'),
    (['--stock_seconds', '-1'], 'found -1.0.'),
    (['--stock_seconds', 'long'], "argument --stock_seconds: invalid float value: 'long'"),
    (['--output_dir', '/dev/null/x'], '--output_dir cannot be made: '),
    (['--output_dir', 'x' * 300], '--output_dir cannot be made: '),
])  # yapf: disable
def test_wrong_arguments_of_the_demo_are_told(arguments: List[str], told: str) -> None:
    code, found = run(['demo', *arguments])
    assert code == 2 and told in found


@pytest.mark.parametrize('arguments', [['x'], ['--x'], ['--samples', '3']])
def test_doctor_takes_no_arguments(arguments: List[str]) -> None:
    code, found = run(['doctor', *arguments])
    assert code == 2 and f'unrecognized arguments: {" ".join(arguments)}' in found


def test_a_wrong_line_is_told_with_file_line_and_offender(tmp_path: Path) -> None:
    dataset = tmp_path / 'data.jsonl'
    message = {'role': 'user', 'content': 'a'}
    wrong = [{'messages': [message], 'adapters': ['b']}, {'messages': [message], 'adapters': ['a'], 'weights': ['x']}]
    dataset.write_text('\n'.join(map(json.dumps, wrong)))
    code, told = run(['infer', '--adapters', 'a=none', '--val_dataset', str(dataset), '--result_path', 'none/out'])
    assert code == 2
    assert told.splitlines() == [
        f'swift-patch infer: error: {dataset}: 2 problems',
        "  line 1: unknown adapter 'b'; known are 'a'",
        "  line 2: weights must be finite numbers of float32, got the string 'x'",
    ]


CONFIG = {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8, 'target_modules': ['q_proj']}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*CONFIG, 'swift_type', 'bias', 'use_dora', 'init_lora_weights']), inner),
    max_leaves=6)


@tries(150)
@given(config=st.binary(max_size=20) | JSON.map(lambda data: json.dumps(data).encode())
       | st.sampled_from([b'[' * 100_000, b'{"r": ' + b'9' * 5000 + b'}', b'\xff\xfe', b'', b'{"peft_type": "LORA"']),
       weights=st.binary(max_size=20) | st.just(b'\xff' * 8) | st.none(),
       is_below=st.booleans())  # yapf: disable
def test_a_checkpoint_of_anything_is_told_with_its_name(tmp_path: Path, config: bytes, weights: bytes,
                                                        is_below: bool) -> None:
    dataset, folder = tmp_path / 'data.jsonl', tmp_path / 'checkpoint'
    dataset.write_text(json.dumps({'messages': [{'role': 'user', 'content': 'a'}], 'adapters': ['it']}))
    below = folder / 'default'
    below.mkdir(parents=True, exist_ok=True)
    for file in folder.rglob('adapter_*'):
        file.unlink()
    place = below if is_below else folder
    (place / 'adapter_config.json').write_bytes(config)
    if weights is not None:
        (place / 'adapter_model.safetensors').write_bytes(weights)
    code, told = run(
        ['infer', '--adapters', f'it={folder}', '--val_dataset',
         str(dataset), '--result_path', 'none/out'])
    assert code == 2
    assert f"adapter 'it' ({folder}):" in told and len(told) < 2000


def test_a_checkpoint_whose_path_no_file_can_have_is_told(tmp_path: Path) -> None:
    dataset = tmp_path / 'data.jsonl'
    dataset.write_text(json.dumps({'messages': [{'role': 'user', 'content': 'a'}], 'adapters': ['it']}))
    for path in ('x' * 300, '/dev/null/x', '\udcff'):
        code, told = run(
            ['infer', '--adapters', f'it={path}', '--val_dataset',
             str(dataset), '--result_path', 'no/out'])
        assert code == 2 and "error: adapter 'it' (" in told
