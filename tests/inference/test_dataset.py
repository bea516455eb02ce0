"""Every line of a dataset is checked, and everything that is wrong is told with its line number."""
import json
import pytest
from pathlib import Path
from typing import Any, Dict, List, Tuple, Union

from swift_patch.inference.dataset import DatasetError, read_dataset

USER = {'role': 'user', 'content': 'hello'}
NAMES = ('lora', 'A', 'default')


def line(**changes: Any) -> str:
    data: Dict[str, Any] = {'messages': [USER], 'adapters': ['lora', 'A'], **changes}
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def write(tmp_path: Path, *lines: Union[str, bytes]) -> Path:
    path = tmp_path / 'data.jsonl'
    path.write_bytes(b'\n'.join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def problems_of(path: Path) -> List[Tuple[int, str]]:
    with pytest.raises(DatasetError) as e:
        read_dataset(path, NAMES)
    return e.value.problems


def test_a_sample_has_what_its_line_has(tmp_path: Path) -> None:
    path = write(tmp_path, line(weights=[0.6, 0.4], id=7))
    [sample] = read_dataset(path, NAMES)
    assert (sample.line, sample.messages, sample.label) == (1, [USER], None)
    assert (sample.adapters, sample.weights) == (('lora', 'A'), (0.6, 0.4))
    assert sample.data['id'] == 7


@pytest.mark.parametrize('weights', [..., None], ids=['left out', 'null'])
def test_weights_default_to_one_over_k(tmp_path: Path, weights: Any) -> None:
    path = write(tmp_path, line(weights=weights))
    assert read_dataset(path, NAMES)[0].weights == (0.5, 0.5)


def test_a_trailing_assistant_message_is_the_label(tmp_path: Path) -> None:
    path = write(tmp_path, line(messages=[USER, {'role': 'assistant', 'content': 'gold'}]))
    [sample] = read_dataset(path, NAMES)
    assert (sample.messages, sample.label) == ([USER], 'gold')
    assert len(sample.data['messages']) == 2, 'the line itself is left as it was'


def test_blank_lines_a_bom_and_crlf_are_no_problem_and_lines_are_counted_with_them(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf' + line().encode() + b'\r', '', '  \r', line(), '')
    assert [sample.line for sample in read_dataset(path, NAMES)] == [1, 4]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    content = 'a\u2028b\x85c'
    data = {'messages': [{'role': 'user', 'content': content}], 'adapters': ['A']}
    path = write(tmp_path, json.dumps(data, ensure_ascii=False))
    assert read_dataset(path, NAMES)[0].messages[0]['content'] == content


def test_content_may_be_what_ms_swift_takes(tmp_path: Path) -> None:
    call = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': '{}'}}]}
    parts = {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]}
    answer = {'role': 'tool', 'content': {'answer': 42}}
    system = {'role': 'system', 'content': ''}
    path = write(tmp_path, line(messages=[parts]), line(messages=[USER, call, answer]), line(messages=[system, USER]))
    assert len(read_dataset(path, NAMES)) == 3


@pytest.mark.parametrize(('wrong', 'problem'), [
    ('{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
    (b'"\xff"', 'not UTF-8: invalid start byte at byte 2'),
    ('[1]', 'must be a JSON object, got a list'),
    ('null', 'must be a JSON object, got null'),
    ('{"a": 1, "a": 2}', "the key 'a' occurs twice in one object"),
    ('{"x": {"a": 1, "a": 2}}', "the key 'a' occurs twice in one object"),
    ('{"x": NaN}', 'not JSON: NaN is not a number of JSON'),
    ('{"x": 1e999}', 'Out of range float values are not JSON compliant'),
    ('{"x": "\\ud800"}', "not Unicode: '\\ud800' is half of a surrogate pair"),
    ('[' * 100000, 'not JSON that can be read: nested too deep'),
    (line(messages=...), '`messages` is missing; it must be a non-empty list of messages'),
    (line(messages=[]), '`messages` must be a non-empty list of messages, got an empty list'),
    (line(messages='hi'), "`messages` must be a non-empty list of messages, got the string 'hi'"),
    (line(messages=['hi']), "messages[0]: must be an object with role and content, got the string 'hi'"),
    (line(messages=[{'content': 'a'}]), 'role must be one of'),
    (line(messages=[{'role': 'human', 'content': 'a'}]), "got 'human'"),
    (line(messages=[USER, {'role': 'system', 'content': 'a'}]), 'only the first message may have the role system'),
    (line(messages=[{'role': 'user'}]), 'messages[0]: content is missing'),
    (line(messages=[{'role': 'user', 'content': 3}]), 'content must be a string or a non-empty list of parts, got 3'),
    (line(messages=[{'role': 'user', 'content': ['a']}]), 'each part of content must be an object with a type'),
    (line(messages=[{'role': 'user', 'content': [{'type': 'text'}]}]), 'must have its text in `text`'),
    (line(messages=[{'role': 'assistant', 'content': 'a'}]), '`messages` has nothing to answer'),
    (line(messages=[{'role': 'system', 'content': 'a'}]), '`messages` has nothing to answer'),
    (line(adapters=...), '`adapters` is missing; it must be a non-empty list of adapter names'),
    (line(adapters=[]), '`adapters` must be a non-empty list of adapter names, got an empty list'),
    (line(adapters='A'), "`adapters` must be a non-empty list of adapter names, got the string 'A'"),
    (line(adapters=['A', 1]), 'adapters[1] must be a name, got 1'),
    (line(adapters=['defautl']), "unknown adapter 'defautl'; did you mean 'default'?"),
    (line(adapters=['xyz']), "unknown adapter 'xyz'; known are 'lora', 'A', 'default'"),
    (line(adapters=['A', 'A']), "the adapter 'A' is named twice"),
    (line(weights=1), '`weights` must be a list of numbers, got 1'),
    (line(weights=[1]), '`weights` has 1 entries for 2 adapters'),
    (line(weights=[]), '`weights` has 0 entries for 2 adapters'),
    (line(weights=[1, '2']), "weights must be finite numbers, got the string '2'"),
    (line(weights=[1, True]), 'weights must be finite numbers, got true'),
    (line(weights=[1, 10**400]), 'weights must be finite numbers, got a number that is too large'),
    (line(weights=[0, 0.0]), 'weights are all zero'),
    (line(wieghts=[0.6, 0.4]), "unknown key 'wieghts'; did you mean 'weights'?"),
    (line(Weight=[0.6, 0.4]), "unknown key 'Weight'; did you mean 'weights'?"),
    (line(response='a'), "the key 'response' is one that result lines add; rename it"),
])  # yapf: disable
def test_a_wrong_line_is_told_with_its_number(tmp_path: Path, wrong: Union[str, bytes], problem: str) -> None:
    [(number, text)] = problems_of(write(tmp_path, line(), '', wrong, line()))
    assert number == 3
    assert problem in text


def test_a_misspelled_adapters_is_told_and_a_key_beside_the_right_one_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, line(adapters=..., adaptors=['A']), line(weights=[1, 2], weight=3, adapter='x', height=4))
    assert [number for number, _ in problems_of(path)] == [1, 1]
    assert "unknown key 'adaptors'; did you mean 'adapters'?" in problems_of(path)[1][1]


def test_every_problem_of_every_line_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, line(adapters=['B', 'C'], weights=[0, 0], messages=[]), line(), 'x')
    assert [number for number, _ in problems_of(path)] == [1, 1, 1, 1, 3]


def test_the_message_shows_twenty_problems_and_counts_the_rest(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as e:
        read_dataset(write(tmp_path, *['x'] * 25), NAMES)
    shown = str(e.value).splitlines()
    assert shown[0].endswith('data.jsonl: 25 problems')
    assert (len(shown), shown[-1]) == (22, '  ... and 5 more')
    assert len(e.value.problems) == 25


def test_a_file_without_samples_and_no_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='has no samples'):
        read_dataset(write(tmp_path, '', ''), NAMES)
    with pytest.raises(ValueError, match='Cannot read the dataset .*No such file'):
        read_dataset(tmp_path / 'none.jsonl', NAMES)
