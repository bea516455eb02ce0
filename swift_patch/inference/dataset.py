"""The input of `swift-patch infer`: samples, all of them checked before anything expensive is done, and JSON lines."""
import codecs
import difflib
import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import (Any, Callable, Collection, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple,
                    Union)

from ..errors import short_repr
from ..lora.numbers import equal_weights, is_finite_weight

# What ms-swift's own datasets accept.
ROLES = ('system', 'user', 'assistant', 'tool_call', 'tool_response', 'tool')
# A model answers these; ms-swift turns `tool_call` into an assistant message.
ANSWERED_ROLES = ('user', 'tool', 'tool_response')
# ms-swift serializes the content of these itself, so that it may be any JSON value.
JSON_ROLES = ('tool_call', 'tool_response', 'tool')
# The keys that a result line adds to its input line.
RESULT_KEYS = ('response', 'labels', 'logprobs', 'merge_method', 'line', 'error')

# What a misspelled key most likely stands for. Any other key that is unknown is the user's own.
_GUARDED_KEYS = ('adapters', 'weights')

# What ms-swift reads in another way than as it stands, besides and inside of `messages`.
_MEANT_KEYS = frozenset(('conversation', 'conversations', 'system', 'system_prompt', 'image', 'audio', 'video'))
_MEANT_ROLES = ('human', 'gpt', 'bot', 'function_call', 'function_response', 'observation', 'observations')
_SHAREGPT_KEYS = frozenset(('from', 'value', 'user', 'human', 'assistant', 'gpt', 'bot'))
_ANTHROPIC_PARTS = ('tool_use', 'tool_result')

# Problems that are told of one line, and that the message shows of a file: one line may have millions.
_MAX_SHOWN = 20
# Longer ones are no misspellings, and comparing them would take long.
_MAX_SPELLED = 100
# So often it is told how many lines have been read.
_LINES_TOLD = 1000

# An object and its number, counted from 1: of a line of a file, or of a row of a table.
Line = Tuple[int, Dict[str, Any]]
# A number of a line, and what is wrong there.
Problem = Tuple[int, str]


class DatasetError(ValueError):
    """Everything that is wrong with a dataset.

    Args:
        path: The dataset.
        problems: All of them in the order of the file.
        unit: What their numbers count: 'line', or 'row' of what is no JSON lines.

    Attributes:
        path: The dataset.
        problems: All of them in the order of the file (of one line, the first twenty), each as (line number counted
            from 1, description). The message of the exception shows the first twenty.
    """

    def __init__(self, path: Union[str, Path], problems: List[Problem], unit: str = 'line') -> None:
        self.path = str(path)
        self.problems = problems
        lines = [f'{path}: {len(problems)} {"problem" if len(problems) == 1 else "problems"}']
        lines += [f'  {unit} {number}: {text}' for number, text in problems[:_MAX_SHOWN]]
        if len(problems) > _MAX_SHOWN:
            lines.append(f'  ... and {len(problems) - _MAX_SHOWN} more')
        super().__init__('\n'.join(lines))

    @classmethod
    def joined(cls, errors: Sequence[ValueError]) -> ValueError:
        """Makes one error of those of several datasets, of which each names its own."""
        if len(errors) == 1:
            return errors[0]
        text = '\n'.join(map(str, errors))
        told = [error for error in errors if isinstance(error, cls)]
        if not told:
            return ValueError(text)
        joined = cls(', '.join(error.path for error in told), [problem for error in told for problem in error.problems])
        joined.args = (text, )
        return joined


@dataclass(frozen=True)
class Sample:
    """One checked line of a dataset.

    Attributes:
        dataset: The dataset as it was given, without the number of samples to take of it.
        line: The number of the line in the file, or of the row of what is no JSON lines, counted from 1.
        data: The object on the line, as it was read; `adapters` are added to one that names none.
        messages: What the model is asked: the line's messages without a trailing answer.
        label: The content of the trailing assistant message, None where there is none.
        adapters: The names of the adapters to compose, each once.
        weights: One finite number per adapter, 1/k each where the line gives none.
        unit: What `line` counts: 'line' or 'row'.
    """
    dataset: str
    line: int
    data: Dict[str, Any]
    messages: List[Dict[str, Any]]
    label: Any
    adapters: Tuple[str, ...]
    weights: Tuple[float, ...]
    unit: str = 'line'


def read_dataset(path: Union[str, Path],
                 names: Collection[str],
                 *,
                 default_adapters: Optional[Mapping[str, float]] = None,
                 convert: Optional[Callable[[List[Line]], Tuple[List[Line], List[Problem]]]] = None,
                 on_read: Callable[[int], Any] = lambda count: None) -> List[Sample]:
    """Reads a JSONL dataset and checks every line of it. Blank lines are skipped.

    Args:
        path: The file. Each line is `{"messages": [...], "adapters": [NAME, ...], "weights": [number, ...], ...}`;
            `weights` may be left out, other keys are kept.
        names: The adapters that a line may name.
        default_adapters: The weights of the adapters of lines that name none; what `check_default_adapters` returned.
        convert: Makes such lines of all objects that were read, and tells what is wrong with others.
        on_read: Called now and then with the number of lines read since the last call.

    Returns:
        The samples in the order of the file.

    Raises:
        DatasetError: If any line is wrong. It holds the problems of every line.
        ValueError: If the file cannot be read or has no samples.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as e:  # a path with a NUL in it is a ValueError, ~nobody a RuntimeError
        raise ValueError(f'Cannot read the dataset {path}: {getattr(e, "strerror", None) or e}.') from e
    lines: List[Line] = []
    problems: List[Problem] = []
    # Not `splitlines`: it also splits at characters that JSON allows inside of strings.
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).rstrip(b'\n').split(b'\n'), start=1):
        if line.strip():
            try:
                lines.append((number, parse(line)))
            except ValueError as e:
                problems.append((number, str(e)))
        if number % _LINES_TOLD == 0:
            on_read(_LINES_TOLD)
    on_read(number % _LINES_TOLD)
    if convert is not None:
        lines, refused = convert(lines)
        problems += refused
    return check_lines(str(path), lines, names, default_adapters=default_adapters, problems=problems)


def check_lines(dataset: str,
                lines: Iterable[Line],
                names: Collection[str],
                *,
                default_adapters: Optional[Mapping[str, float]] = None,
                problems: Iterable[Problem] = (),
                unit: str = 'line') -> List[Sample]:
    """Makes samples of objects that were read.

    Args:
        dataset: Where they are from.
        lines: The objects, with `messages` in ms-swift's own form.
        names: The adapters that they may name.
        default_adapters: The weights of the adapters of those that name none.
        problems: What is known to be wrong already.
        unit: What the numbers of the lines count: 'line' or 'row'.

    Returns:
        The samples in the order of the lines.

    Raises:
        DatasetError: If anything is wrong. It holds all problems.
        ValueError: If there are no samples.
    """
    samples: List[Sample] = []
    found = list(problems)
    for number, data in lines:
        # Where names are looked for that are like another, of ten thousand, only for those that are shown.
        is_shown = len(found) < _MAX_SHOWN
        all_wrong = itertools.chain(
            _check_messages(data), _check_adapters(data, names, is_shown, default_adapters), _check_keys(data))
        wrong = list(itertools.islice(all_wrong, _MAX_SHOWN))
        if wrong:
            found += [(number, problem) for problem in wrong]
        else:
            samples.append(_to_sample(dataset, number, data, default_adapters or {}, unit))
    if found:
        raise DatasetError(dataset, sorted(found, key=lambda problem: problem[0]), unit)
    if not samples:
        raise ValueError(f'The dataset {dataset} has no samples.')
    return samples


def check_default_adapters(default_adapters: Mapping[str, Optional[float]], names: Collection[str]) -> Dict[str, float]:
    """Checks the adapters of lines that name none.

    Args:
        default_adapters: The weight of each; None of all is 1/k.
        names: The adapters that there are.

    Returns:
        The weight of each.

    Raises:
        ValueError: If they are none that a line may have.
    """
    weights: Optional[List[Any]] = list(default_adapters.values())
    if all(weight is None for weight in default_adapters.values()):
        weights = None
    elif any(weight is None for weight in default_adapters.values()):
        raise ValueError('--default_adapters: expected weights for all of them or for none, found some without one.')
    # A line that names them has the same problems.
    data = {'adapters': list(default_adapters), 'weights': weights}
    problems = list(_check_adapters(data, names, is_shown=True, default_adapters=None))
    if problems:
        raise ValueError(f'--default_adapters: {"; ".join(problems[:_MAX_SHOWN])}.')
    return dict(zip(default_adapters, weights or equal_weights(len(default_adapters))))


def is_plain(lines: Iterable[Line]) -> bool:
    """Tells whether JSON lines are in ms-swift's own form, so that nothing of them needs a conversion.

    They are where lines have `messages`, and no line has what ms-swift reads in another way than as it stands: a
    sharegpt role, a `system` beside the messages, an Anthropic tool result, ...
    """
    has_messages = False
    for _, data in lines:
        if not _MEANT_KEYS.isdisjoint(map(str.lower, data)):
            return False
        messages = data.get('messages')
        if messages is None:
            continue
        has_messages = True
        if isinstance(messages, list) and any(map(_is_foreign, messages)):
            return False
    return has_messages


def _is_foreign(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    if 'role' not in message and 'content' not in message:
        return not _SHAREGPT_KEYS.isdisjoint(message)
    role, content = message.get('role'), message.get('content')
    return role in _MEANT_ROLES or isinstance(content, list) and any(
        isinstance(part, dict) and (part.get('type') in _ANTHROPIC_PARTS or 'source' in part) for part in content)


def parse(line: bytes) -> Dict[str, Any]:
    """Parses one line strictly.

    Raises:
        ValueError: If it is no JSON object, with a text that needs no context.
    """
    try:
        text = line.decode('utf-8')
    except UnicodeDecodeError as e:
        raise ValueError(f'not UTF-8: {e.reason} at byte {e.start + 1}') from e
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        # Half a surrogate pair and 1e999 can be read but not written; better to know now than after generating.
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode('utf-8')
    except json.JSONDecodeError as e:
        raise ValueError(f'not JSON: {e.msg} at column {e.colno}') from e
    except UnicodeEncodeError as e:
        raise ValueError(f'not Unicode: {e.object[e.start]!r} is half of a surrogate pair') from e
    except RecursionError as e:
        raise ValueError('not JSON that can be read: nested too deep') from e
    if not isinstance(data, dict):
        raise ValueError(f'must be a JSON object, got {_kind(data)}')
    return data


def _unique_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    data: Dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f'the key {short_repr(key)} occurs twice in one object')
        data[key] = value
    return data


def _no_constant(text: str) -> None:
    raise ValueError(f'not JSON: {text} is not a number of JSON')


def _check_messages(data: Dict[str, Any]) -> Iterator[str]:
    messages = data.get('messages')
    if not isinstance(messages, list) or not messages:
        yield _expected(data, 'messages', 'a non-empty list of messages')
        return
    well_formed = True
    for i, message in enumerate(messages):
        problem = _check_message(message, is_first=i == 0)
        if problem:
            well_formed = False
            yield f'messages[{i}]: {problem}'
    if well_formed:
        prompt, _ = _split_label(messages)
        if not prompt or prompt[-1]['role'] not in ANSWERED_ROLES:
            yield (f'`messages` has nothing to answer: apart from a trailing assistant message, which is the label, '
                   f'the last one must have one of the roles {", ".join(ANSWERED_ROLES)}')


def _check_message(message: Any, *, is_first: bool) -> Optional[str]:
    if not isinstance(message, dict):
        return f'must be an object with role and content, got {_kind(message)}'
    role = message.get('role')
    if role not in ROLES:
        return f'role must be one of {", ".join(ROLES)}, got {short_repr(role)}'
    if role == 'system' and not is_first:
        return 'only the first message may have the role system'
    content = message.get('content')
    if role == 'assistant' and message.get('tool_calls') and content is None:
        return None
    if content is None:
        return 'content is missing'
    if role in JSON_ROLES or isinstance(content, str):
        return None
    if not isinstance(content, list) or not content:
        return f'content must be a string or a non-empty list of parts, got {_kind(content)}'
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get('type'), str):
            return 'each part of content must be an object with a type'
        if part['type'] == 'text' and not isinstance(part.get('text'), str):
            return 'a part of the type text must have its text in `text`'
    return None


def _check_adapters(data: Dict[str, Any], names: Collection[str], is_shown: bool,
                    default_adapters: Optional[Mapping[str, float]]) -> Iterator[str]:
    adapters = data.get('adapters')
    if adapters is None and default_adapters:
        if data.get('weights') is not None:
            yield '`weights` are those of `adapters`, which are missing'
        return
    if not isinstance(adapters, list) or not adapters:
        problem = _expected(data, 'adapters', 'a non-empty list of adapter names')
        yield problem if 'adapters' in data else f'{problem}, or give --default_adapters'
        return
    seen: Set[str] = set()
    for i, name in enumerate(adapters):
        if not isinstance(name, str):
            yield f'adapters[{i}] must be a name, got {_kind(name)}'
        elif name not in names:
            yield f'unknown adapter {short_repr(name)}; {_suggest(name, names if is_shown else ()) or _known(names)}'
        elif name in seen:
            yield f'the adapter {short_repr(name)} is named twice; add up its weights instead'
        else:
            seen.add(name)
    # JSON that went through a table has null where a row has no value.
    weights = data.get('weights')
    if weights is None:
        return
    if not isinstance(weights, list):
        yield _expected(data, 'weights', 'a list of numbers')
        return
    if len(weights) != len(adapters):
        yield f'`weights` has {len(weights)} entries for {len(adapters)} adapters'
    wrong = [weight for weight in weights if not _is_finite_number(weight)]
    if wrong:
        yield (f'weights must be finite numbers of float32, got {", ".join(map(_kind, wrong[:3]))}'
               f'{", ..." if len(wrong) > 3 else ""}')
    elif weights and not any(weights):
        yield 'weights are all zero'


def _check_keys(data: Dict[str, Any]) -> Iterator[str]:
    for key in RESULT_KEYS:
        if key in data:
            yield f'the key {key!r} is one that result lines add; rename it'
    missing = tuple(key for key in _GUARDED_KEYS if key not in data)
    for key in data:
        meant = _meant(key.lower(), missing) if len(key) <= _MAX_SPELLED else None
        if meant:
            yield f'unknown key {key!r}; did you mean {meant!r}? (if not, rename it)'


# All lines of a file have the same few keys, and comparing took half of the time of reading it.
@functools.lru_cache(maxsize=1000)
def _meant(key: str, missing: Tuple[str, ...]) -> Optional[str]:
    return next(iter(difflib.get_close_matches(key, missing, n=1, cutoff=0.8)), None)


def _to_sample(dataset: str, number: int, data: Dict[str, Any], default_adapters: Mapping[str, float],
               unit: str) -> Sample:
    messages, label = _split_label(data['messages'])
    weights: Iterable[float]
    if data.get('adapters') is None:
        data = {**data, 'adapters': list(default_adapters)}
        weights = default_adapters.values()
    else:
        weights = data.get('weights') or equal_weights(len(data['adapters']))
    return Sample(
        dataset=dataset,
        line=number,
        data=data,
        messages=messages,
        label=label,
        adapters=tuple(data['adapters']),
        weights=tuple(float(weight) for weight in weights),
        unit=unit)


def _split_label(messages: List[Dict[str, Any]]) -> Tuple[List[Dict[str, Any]], Any]:
    """Takes a trailing assistant message off, as `InferRequest.remove_response` does; the list is left as it is."""
    if messages[-1]['role'] == 'assistant':
        return messages[:-1], messages[-1].get('content')
    return messages, None


def _is_finite_number(value: Any) -> bool:
    # JSON's true and false are integers to Python.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return is_finite_weight(float(value))
    except OverflowError:  # an integer beyond the range of floats
        return False


def _expected(data: Dict[str, Any], key: str, what: str) -> str:
    if key not in data:
        return f'`{key}` is missing; it must be {what}'
    return f'`{key}` must be {what}, got {_kind(data[key])}'


def _suggest(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, names) if len(name) <= _MAX_SPELLED else []
    return f'did you mean {" or ".join(map(short_repr, close))}?' if close else ''


def _known(names: Collection[str]) -> str:
    known = ', '.join(map(short_repr, itertools.islice(names, 10)))
    return f'known are {known}{", ..." if len(names) > 10 else ""}'


def _kind(value: Any) -> str:
    """Names a JSON value shortly enough for an error message."""
    if value is None or isinstance(value, (bool, int, float)):
        text = json.dumps(value)
        return text if len(text) <= 40 else 'a number that is too large'
    if isinstance(value, str):
        return f'the string {value!r}' if len(value) <= 40 else 'a long string'
    if not value:
        return 'an empty list' if isinstance(value, list) else 'an empty object'
    return 'a list' if isinstance(value, list) else 'an object'
