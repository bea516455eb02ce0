"""Every line of a dataset is checked, and everything that is wrong is told with its line number."""
import json
import math
import pytest
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple, Union

from swift_patch.inference.dataset import ROLES, DatasetError, read_dataset

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
    (line(adapters=...), 'must be a non-empty list of adapter names, or give --default_adapters'),
    (line(adapters=[]), '`adapters` must be a non-empty list of adapter names, got an empty list'),
    (line(adapters='A'), "`adapters` must be a non-empty list of adapter names, got the string 'A'"),
    (line(adapters=['A', 1]), 'adapters[1] must be a name, got 1'),
    (line(adapters=['defautl']), "unknown adapter 'defautl'; did you mean 'default'?"),
    (line(adapters=['xyz']), "unknown adapter 'xyz'; known are 'lora', 'A', 'default'"),
    (line(adapters=['A', 'A']), "the adapter 'A' is named twice"),
    (line(weights=1), '`weights` must be a list of numbers, got 1'),
    (line(weights=[1]), '`weights` has 1 entries for 2 adapters'),
    (line(weights=[]), '`weights` has 0 entries for 2 adapters'),
    (line(weights=[1, '2']), "weights must be finite numbers of float32, got the string '2'"),
    (line(weights=[1, True]), 'weights must be finite numbers of float32, got true'),
    (line(weights=[1, 10**400]), 'weights must be finite numbers of float32, got a number that is too large'),
    (line(weights=[1, 1e39]), 'weights must be finite numbers of float32, got 1e+39'),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
    | st.sampled_from([*NAMES, *ROLES, 10**400, 1e39]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(['role', 'content', 'type', 'text', 'tool_calls']) | st.text(), inner, max_size=3),
    max_leaves=8)
KEYS = st.sampled_from(['messages', 'adapters', 'weights', 'adaptors', 'response', 'images', 'tools'])


def assert_read_or_told(path: Path, num_lines: int) -> None:
    """Whatever a file holds: it is read, or what is wrong is told shortly and with the number of its line."""
    try:
        samples = read_dataset(path, NAMES)
    except DatasetError as e:
        assert all(1 <= number <= num_lines for number, _ in e.problems)
        assert all(len(text) < 500 for _, text in e.problems) and len(str(e)) < 12_000
        assert str(path) in str(e) and f'line {e.problems[0][0]}: {e.problems[0][1]}' in str(e)
    except ValueError as e:
        assert str(path) in str(e) and 'has no samples' in str(e)
    else:
        for sample in samples:
            assert 1 <= sample.line <= num_lines
            assert sample.adapters and set(sample.adapters) <= set(NAMES)
            assert len(sample.weights) == len(sample.adapters) and all(map(math.isfinite, sample.weights))
            # It can be written again.
            json.dumps(sample.data, ensure_ascii=False, allow_nan=False).encode()


@tries(150)
@given(lines=st.lists(st.dictionaries(KEYS, JSON, max_size=3), min_size=1, max_size=3))
def test_lines_of_any_shape_are_read_or_told(tmp_path: Path, lines: List[Dict[str, Any]]) -> None:
    texts = [json.dumps({**json.loads(line()), **changes}) for changes in lines]
    assert_read_or_told(write(tmp_path, *texts), len(lines))


@tries(150)
@given(data=st.data())
def test_lines_with_any_bytes_in_them_and_any_left_out_are_read_or_told(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray('\n'.join([line(), line(weights=[0.5, -1], id='ü𝄞'), line(messages=[USER, USER])]).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = start + data.draw(st.sampled_from([0, 0, 1, 5, len(content)]))
        content[start:end] = data.draw(st.binary(max_size=4) | st.sampled_from([b'\n', b'\0', b'"', b'\xff\xfe', b'{']))
    assert_read_or_told(write(tmp_path, bytes(content)), content.count(b'\n') + 1)


def test_names_that_are_like_an_unknown_one_are_looked_for_where_they_are_shown(tmp_path: Path) -> None:
    """Among ten thousand they take a while, and in the wrong folder all of them are unknown."""
    path = write(tmp_path, *(line(adapters=['lore']) for _ in range(30)))
    told = [text for _, text in problems_of(path)]
    assert set(told[:20]) == {"unknown adapter 'lore'; did you mean 'lora'?"}
    assert set(told[20:]) == {"unknown adapter 'lore'; known are 'lora', 'A', 'default'"}


@pytest.mark.parametrize('cut', range(1, len(line()), 7))
def test_a_line_that_is_cut_off_is_told(tmp_path: Path, cut: int) -> None:
    [(number, text)] = problems_of(write(tmp_path, line(), line()[:cut]))
    assert number == 2 and text.startswith('not JSON: ')


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32', 'utf-8-sig'])
def test_only_utf_8_is_read_with_or_without_a_bom(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, line().encode(encoding))
    if encoding == 'utf-8-sig':
        assert len(read_dataset(path, NAMES)) == 1
    else:
        assert problems_of(path)[0] == (1, 'not UTF-8: invalid start byte at byte 1')


LONG, HUGE = 'x' * 1_000_000, 'x' * 100_000_000


@pytest.mark.parametrize(('make', 'problem'), [
    (lambda: line(id=LONG)[:-2], 'not JSON: Unterminated string'),
    (lambda: line(adapters=LONG), '`adapters` must be a non-empty list of adapter names, got a long string'),
    (lambda: line(messages=[{'role': LONG, 'content': ''}]), "got 'xxx"),
    (lambda: line(messages=[{'role': 'user', 'content': {LONG: 1}}]), 'got an object'),
    (lambda: line(**{LONG: 1}, adapters=..., adaptors=['A']), "unknown key 'adaptors'"),
    (lambda: '{"%s": 1, "%s": 2}' % (LONG, LONG), 'occurs twice'),
    (lambda: '[' * 1_000_000, 'nested too deep'),
    (lambda: '{"x": "%s"}' % ('\\ud800' * 200_000), "'\\ud800' is half of a surrogate pair"),
    (lambda: '{"x": %s}' % ('9' * 1_000_000), 'Exceeds the limit'),
    (lambda: line(weights=[None] * 200_000), 'weights must be finite numbers of float32, got null, null, null, ...'),
    (lambda: line(adapters=['A'] * 200_000), "the adapter 'A' is named twice"),
    (lambda: line(messages=[1] * 400_000), 'messages[19]: must be an object'),
], ids=['cut off', 'string', 'role', 'content', 'key', 'keys', 'nested', 'surrogates', 'digits', 'weights', 'adapters',
        'messages'])  # yapf: disable
def test_what_is_wrong_with_a_long_line_is_told_shortly(tmp_path: Path, make: Callable, problem: str) -> None:
    assert_told_shortly(write(tmp_path, line(), make()), problem)


@pytest.mark.parametrize(('make', 'problem'), [
    (lambda: HUGE, 'not JSON: Expecting value at column 1'),
    (lambda: line(adapters=[HUGE]), "unknown adapter 'xxx"),
], ids=['no JSON', 'adapter'])  # yapf: disable
def test_what_is_wrong_with_a_line_of_100_mb_is_told_shortly(tmp_path: Path, make: Callable, problem: str) -> None:
    assert_told_shortly(write(tmp_path, line(), make()), problem)


def assert_told_shortly(path: Path, problem: str) -> None:
    with pytest.raises(DatasetError) as e:
        read_dataset(path, NAMES)
    assert {number for number, _ in e.value.problems} == {2}
    assert any(problem in text for _, text in e.value.problems)
    assert len(e.value.problems) <= 20 and len(str(e.value)) < 5000


def test_a_line_of_100_mb_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, line(messages=[{'role': 'user', 'content': HUGE}]), line())
    first, _ = read_dataset(path, NAMES)
    assert first.messages[0]['content'] == HUGE
