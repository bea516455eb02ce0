"""Whatever a result file and its settings hold: a run goes on after the finished lines, or tells what is wrong."""
import json
import pytest
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from pathlib import Path
from typing import Any, Callable

from swift_patch.inference import results
from swift_patch.inference.config import Answer, InferConfig
from swift_patch.inference.dataset import read_dataset
from swift_patch.inference.results import ResultFile

SETTINGS = {'model': 'm', 'temperature': 1.0, 'adapter A': '0123'}
LONG = 'x' * 1_000_000


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ResultFile]:
    """Resumes a run of three samples, all of them finished, without ms-swift."""
    dataset, path = tmp_path / 'data.jsonl', tmp_path / 'out.jsonl'
    sample = {'messages': [{'role': 'user', 'content': 'hello'}], 'adapters': ['A']}
    dataset.write_text('\n'.join(json.dumps({**sample, 'id': i}) for i in range(3)))
    config = InferConfig(adapters={'A': 'a'}, val_dataset=[str(dataset)], result_path=str(path), resume=True)
    samples = read_dataset(dataset, config.adapters)
    with open(path, 'wb') as file:
        for finished in samples:
            results.write_line(file, results.result_line(config, finished, Answer('answer')))
    Path(f'{path}.args.json').write_text(json.dumps(SETTINGS))
    monkeypatch.setattr(results, '_settings', lambda *args: SETTINGS)
    return lambda: ResultFile(path, config, None, samples, [])


def assert_resumed_or_told(resume: Callable[[], ResultFile], *files: Path) -> None:
    before = [file.read_bytes() for file in files]
    try:
        results = resume()
    except ValueError as e:
        assert type(e) is ValueError and str(e).startswith(f'Cannot resume {files[0]}: ') and len(str(e)) < 2000
        assert '--overwrite' in str(e)
    else:
        assert results.num_finished == before[0].count(b'\n')
    assert [file.read_bytes() for file in files] == before


@tries(300)
@given(data=st.data())
def test_a_result_file_with_any_bytes_in_it_and_any_left_out(resume: Callable[[], ResultFile], tmp_path: Path,
                                                             data: st.DataObject) -> None:
    files = [tmp_path / 'out.jsonl', tmp_path / 'out.jsonl.args.json']
    whole = {file: file.read_bytes() for file in files}
    spoilt = {file: bytearray(whole[file]) for file in data.draw(st.sampled_from([files[:1], files[1:], files]))}
    for content in spoilt.values():
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(content)))
            end = start + data.draw(st.sampled_from([0, 0, 1, 20, len(content)]))
            content[start:end] = data.draw(st.binary(max_size=4) | st.sampled_from([b'\n', b'\0', b'[]', b'1', b'"']))
    # Nothing is drawn from here on, so that the next example finds the files whole.
    try:
        for file, content in spoilt.items():
            file.write_bytes(content)
        assert_resumed_or_told(resume, *files)
    finally:
        for file in files:
            file.write_bytes(whole[file])


@pytest.mark.parametrize(('line', 'told'), [
    (b'[' * 100_000, "line 1 is not a result line, found b'[[["),
    (b'{"x": ' + b'9' * 5000 + b'}', 'line 1 is not a result line'),
    (b'\xff\xfe', "line 1 is not a result line, found b'\\xff\\xfe'"),
    (b'[]', "line 1 is not a result line, found b'[]'"),
    (b'3', "line 1 is not a result line, found b'3'"),
    (b'""', 'line 1 is not a result line'),
    (b'null', 'line 1 is not a result line'),
    (b'', "line 1 is not a result line, found b''"),
    (b'{}', "line 1 is not a result line, found b'{}'"),
    (b'{"response": 1}', 'line 1 is not a result line'),
    (b'{"response": "", "logprobs": null}', 'in its line 1, messages is not that of line 1 of the dataset'),
    (LONG.encode(), "line 1 is not a result line, found b'xxx"),
], ids=['nested', 'digits', 'no text', 'list', 'number', 'string', 'null', 'empty', 'object', 'no logprobs',
        'few keys', 'long'])  # yapf: disable
def test_what_is_no_result_line_is_told(resume: Callable[[], ResultFile], tmp_path: Path, line: bytes,
                                        told: str) -> None:
    (tmp_path / 'out.jsonl').write_bytes(line + b'\n')
    with pytest.raises(ValueError) as e:
        resume()
    assert told in str(e.value) and len(str(e.value)) < 1000


def test_a_key_too_many_is_told_shortly(resume: Callable[[], ResultFile], tmp_path: Path) -> None:
    path = tmp_path / 'out.jsonl'
    first, rest = path.read_text().split('\n', 1)
    path.write_text(json.dumps({**json.loads(first), LONG: 1}) + '\n' + rest)
    with pytest.raises(ValueError, match='in its line 1, xxx.* is not that of line 1 of the dataset') as e:
        resume()
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize(('settings', 'told'), [
    ([], 'are expected to be an object, found []'),
    (None, 'are expected to be an object, found None'),
    ('x', "are expected to be an object, found 'x'"),
    ([LONG], 'are expected to be an object'),
    ({}, 'model was not given and is now "m"'),
    ({**SETTINGS, 'model': LONG}, 'model was "xxx'),
    ({**SETTINGS, LONG: 1}, 'xxx was 1 and is now not given'),
    ({**SETTINGS, **dict.fromkeys(map(str, range(10_000)), 1)}, '0 was 1 and is now not given'),
], ids=['list', 'null', 'string', 'long list', 'empty', 'long', 'long key', 'many'])  # yapf: disable
def test_settings_of_another_shape_are_told_shortly(resume: Callable[[], ResultFile], tmp_path: Path, settings: Any,
                                                    told: str) -> None:
    (tmp_path / 'out.jsonl.args.json').write_text(json.dumps(settings))
    with pytest.raises(ValueError, match='^Cannot resume ') as e:
        resume()
    assert told in str(e.value) and len(str(e.value)) < 1500


@pytest.mark.parametrize('content', [b'', b'{', b'\xff', b'[' * 100_000], ids=['empty', 'cut', 'no text', 'nested'])
def test_settings_that_cannot_be_read_are_told(resume: Callable[[], ResultFile], tmp_path: Path,
                                               content: bytes) -> None:
    (tmp_path / 'out.jsonl.args.json').write_bytes(content)
    with pytest.raises(ValueError, match=r'^Cannot resume .*: its settings in .*\.args\.json cannot be read: '):
        resume()
