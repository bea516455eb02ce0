"""Every dataset that `swift infer` reads gives the samples that `swift infer` would take, with their adapters."""
import csv
import json
import logging
import numpy as np
import os
import pytest
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

from swift_patch.inference.dataset import DatasetError, Sample
from swift_patch.inference.samples import read_samples
from swift_patch.ms_swift import DATASET_MAPPING
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE

NAMES = ('a', 'b', 'c')


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder. Neither hub answers, so that whoever asks one fails at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    return tmp_path


def user(content: str) -> Dict[str, str]:
    return {'role': 'user', 'content': content}


def assistant(content: str) -> Dict[str, str]:
    return {'role': 'assistant', 'content': content}


def write_lines(name: str, rows: List[Dict[str, Any]]) -> str:
    Path(name).write_text('\n'.join(map(json.dumps, rows)))
    return name


def write_array(name: str, rows: List[Dict[str, Any]]) -> str:
    Path(name).write_text(json.dumps(rows, indent=2))
    return name


def write_csv(name: str, rows: List[Dict[str, Any]]) -> str:
    with open(name, 'w', newline='', encoding='utf-8-sig') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name


def write_folder(name: str, rows: List[Dict[str, Any]]) -> str:
    Path(name).mkdir()
    write_lines(f'{name}/train.jsonl', rows)
    return name


WRITERS: Dict[str, Callable[[str, List[Dict[str, Any]]], str]] = {
    'lines.jsonl': write_lines,
    'lines.json': write_lines,
    'lines.txt': write_lines,
    'array.json': write_array,
    'folder': write_folder,
}
FORMATS = {
    'query': ({
        'query': 'q',
        'response': 'r',
        'system': 's',
        'history': [['h', 'i']]
    }, [{
        'role': 'system',
        'content': 's'
    }, user('h'), assistant('i'), user('q')], 'r'),
    'alpaca': ({
        'instruction': 'do',
        'input': 'it',
        'output': 'done'
    }, [user('do\nit')], 'done'),
    'sharegpt': ({
        'conversations': [{
            'from': 'human',
            'value': 'h'
        }, {
            'from': 'gpt',
            'value': 'g'
        }, {
            'from': 'human',
            'value': 'i'
        }]
    }, [user('h'), assistant('g'), user('i')], None),
    'messages of sharegpt': ({
        'messages': [{
            'from': 'human',
            'value': 'h'
        }]
    }, [user('h')], None),
    'messages with other roles': ({
        'messages': [{
            'role': 'human',
            'content': 'h'
        }]
    }, [user('h')], None),
    'messages with a system beside them': ({
        'messages': [user('h')],
        'system': 's'
    }, [{
        'role': 'system',
        'content': 's'
    }, user('h')], None),
    'messages': ({
        'messages': [user('h'), assistant('g')]
    }, [user('h')], 'g'),
}  # yapf: disable


# Lines of any name are read by one reader.
KINDS_OF_FORMATS = [(kind, form) for kind in WRITERS for form in FORMATS
                    if kind in ('lines.jsonl', 'array.json') or form in ('query', 'messages')]


@pytest.mark.parametrize(('kind', 'form'), KINDS_OF_FORMATS)
def test_every_format_in_every_kind_of_file_keeps_its_adapters_and_keys(kind: str, form: str) -> None:
    row, messages, label = FORMATS[form]
    own = {'id': 'x1', 'adapters': ['a', 'b'], 'weights': [0.25, 0.75], 'dataset': 'mine'}
    name = WRITERS[kind](kind, [{**row, **own}, {**row, 'id': 'x2', 'adapters': ['c'], 'dataset': 'mine'}])
    first, second = read_samples([name], NAMES)
    for sample in (first, second):
        assert (sample.dataset, sample.messages, sample.label) == (kind, messages, label)
    assert (first.line, first.adapters, first.weights) == (1, ('a', 'b'), (0.25, 0.75))
    assert (second.line, second.adapters, second.weights) == (2, ('c', ), (1.0, ))
    answer = [] if label is None else [assistant(label)]
    assert first.data == {'messages': messages + answer, **own}


def test_a_table_of_strings_has_adapters_and_weights_in_cells() -> None:
    rows = [
        {'query': 'q1', 'response': 'r', 'adapters': '["a", "b"]', 'weights': '[0.5, 0.25]'},
        {'query': 'q2', 'response': '', 'adapters': 'a, b', 'weights': '2,-1'},
        {'query': 'q3', 'response': 'r', 'adapters': 'c', 'weights': ''},
    ]  # yapf: disable
    samples = read_samples([write_csv('table.csv', rows)], NAMES)
    assert [sample.messages for sample in samples] == [[user('q1')], [user('q2')], [user('q3')]]
    assert [sample.adapters for sample in samples] == [('a', 'b'), ('a', 'b'), ('c', )]
    assert [sample.weights for sample in samples] == [(0.5, 0.25), (2.0, -1.0), (1.0, )]
    assert samples[1].data['weights'] == [2.0, -1.0] and 'weights' not in samples[2].data


def test_cells_that_are_all_numbers_are_names_and_weights_too() -> None:
    rows = [{'query': 'q', 'adapters': name, 'weights': 2} for name in (1, 2)]
    samples = read_samples([write_csv('table.csv', rows)], ('1', '2'))
    assert [(sample.adapters, sample.weights) for sample in samples] == [(('1', ), (2.0, )), (('2', ), (2.0, ))]


def test_cells_that_are_all_numbers_are_texts_of_messages() -> None:
    rows = [{'query': 1, 'response': 2}, {'query': 30, 'response': 4.5}]
    samples = read_samples([write_csv('table.csv', rows)], 'A', default_adapters={'A': None})
    texts = [(sample.messages[-1]['content'], sample.label) for sample in samples]
    # An older `datasets` makes all columns alike.
    assert texts in ([('1', '2.0'), ('30', '4.5')], [('1.0', '2.0'), ('30.0', '4.5')])


def test_wrong_cells_are_told_with_their_rows() -> None:
    rows = [
        {'query': 'q', 'adapters': '["a"', 'weights': ''},
        {'query': 'q', 'adapters': 'a', 'weights': 'much'},
        {'query': 'q', 'adapters': '', 'weights': ''},
        {'query': 'q', 'adapters': 'a,d', 'weights': ''},
    ]  # yapf: disable
    with pytest.raises(DatasetError) as e:
        read_samples([write_csv('table.csv', rows)], NAMES)
    assert [number for number, _ in e.value.problems] == [1, 2, 3, 4]
    for text in ('row 1: `adapters` must be', "row 2: weights must be finite numbers of float32, got the string 'much'",
                 'row 3: `adapters` is missing', "row 4: unknown adapter 'd'"):
        assert text in str(e.value)


def test_lines_in_another_format_keep_their_numbers_and_every_wrong_one_is_told() -> None:
    lines = [{'query': 'q', 'adapters': ['a']}, {'query': None, 'adapters': ['a']}, {'query': 'q', 'adapters': ['d']}]
    texts = ['', *map(json.dumps, lines), '', '{"query": NaN}', json.dumps({**lines[0], 'history': [1]})]
    Path('data.jsonl').write_text('\n'.join(texts))
    with pytest.raises(DatasetError) as e:
        read_samples(['data.jsonl'], NAMES)
    assert [number for number, _ in e.value.problems] == [3, 4, 6, 7]
    assert 'line 3: ms-swift cannot use it: AssertionError' in str(e.value)
    assert "line 4: unknown adapter 'd'" in str(e.value) and 'line 6: not JSON: NaN' in str(e.value)
    Path('data.jsonl').write_text('\n'.join(texts[:2] + ['', *texts[1:2]]))
    assert [sample.line for sample in read_samples(['data.jsonl'], NAMES)] == [2, 4]


@pytest.mark.parametrize('kind', ['lines.jsonl', 'array.json', 'folder'])
def test_rows_that_ms_swift_cannot_use_are_left_out_where_that_is_asked_for(kind: str,
                                                                            caplog: pytest.LogCaptureFixture) -> None:
    rows = [{'query': query, 'adapters': ['a']} for query in ('q1', None, 'q3', None)]
    name = WRITERS[kind](kind, rows)
    with caplog.at_level(logging.WARNING):
        samples = read_samples([name], NAMES, strict=False)
    assert [sample.line for sample in samples] == [1, 3]
    [record] = [record for record in caplog.records if record.name.startswith('swift')]
    assert f'{kind}: 2 of 4 samples are left out' in record.getMessage() and 'the first is 2: ' in record.getMessage()
    with pytest.raises(DatasetError) as e:
        read_samples([name], NAMES)
    assert [number for number, _ in e.value.problems] == [2, 4]


def test_a_dataset_of_which_ms_swift_can_use_nothing_is_told() -> None:
    name = write_array('array.json', [{'query': None, 'adapters': ['a']}] * 2)
    with pytest.raises(DatasetError) as e:
        read_samples([name], NAMES)
    assert [number for number, _ in e.value.problems] == [1, 2]
    with pytest.raises(ValueError, match='array.json has no samples'):
        read_samples([name], NAMES, strict=False)


@pytest.mark.parametrize('kind', WRITERS)
def test_rows_with_and_without_messages_do_not_go_together(kind: str) -> None:
    """swift infer drops those without."""
    rows = [{'messages': [user('u')], 'adapters': ['a']}, {'query': 'q', 'adapters': ['a']}]
    with pytest.raises(DatasetError) as e:
        read_samples([WRITERS[kind](kind, rows)], NAMES)
    assert [number for number, _ in e.value.problems] == [2]
    assert 'messages' in e.value.problems[0][1]


@pytest.mark.parametrize('kind', ['lines.jsonl', 'array.json'])
def test_a_row_is_what_its_line_was(kind: str) -> None:
    tools = [{'type': 'function', 'function': {'name': 'f', 'parameters': {}}}]
    rows = [
        {'query': '<image>q', 'images': ['x.png', 'y.png'], 'adapters': ['a'], 'when': '2024-01-31T10:20:30'},
        {'query': 'q', 'image': 'z.png', 'adapters': ['a'], 'note': 'n'},
    ]  # yapf: disable
    if kind == 'lines.jsonl':
        rows[1]['tools'] = tools
        del rows[1]['image']
    first, second = read_samples([WRITERS[kind](kind, rows)], NAMES)
    assert first.data['when'] == '2024-01-31T10:20:30' and 'note' not in first.data
    if kind == 'lines.jsonl':
        assert first.data['images'] == ['x.png', 'y.png']
        assert second.data['tools'] == tools and 'images' not in second.data
    json.dumps([first.data, second.data], allow_nan=False)
    assert second.data['note'] == 'n'


def test_an_image_is_a_path_again() -> None:
    rows = [{'query': '<image>q', 'image': 'z.png', 'adapters': ['a']}]
    [sample] = read_samples([write_array('array.json', rows)], NAMES)
    assert sample.data['images'] == ['z.png']


SAMPLED: List[Tuple[List[str], Dict[str, Any]]] = [
    (['m.jsonl'], {}),
    (['m.jsonl#5'], {}),
    (['m.jsonl#5', 'q.csv', 'q.json#3', 'm.jsonl#11'], {}),
    (['m.jsonl', 'q.csv'], {'val_dataset_sample': 7}),
    (['m.jsonl', 'q.csv'], {'val_dataset_sample': 50}),
    (['m.jsonl', 'q.csv'], {'val_dataset_sample': 7, 'dataset_shuffle': False}),
    (['m.jsonl#4', 'q.json'], {'val_dataset_shuffle': True}),
    (['q.jsonl#4', 'q.json'], {'val_dataset_shuffle': True, 'data_seed': 7, 'val_dataset_sample': 9}),
    (['m.jsonl', 'm.jsonl'], {'val_dataset_shuffle': True}),
]  # yapf: disable


@pytest.fixture(scope='module')
def swift_infer(model_dir: str) -> Callable[..., List[Any]]:
    """Returns the messages of what `swift infer` would answer."""
    try:
        from swift.pipelines.infer.infer import SwiftInfer
    except ImportError:  # ms-swift 3
        from swift.llm.infer.infer import SwiftInfer

    def prepare(**options: Any) -> List[Any]:
        model = {'model': model_dir, 'model_type': MODEL_TYPE, 'template': TEMPLATE, 'result_path': 'out.jsonl'}
        made.args = SwiftInfer.args_class(**model, **options)
        made.random_state = np.random.RandomState(made.args.data_seed)
        rows = made._prepare_val_dataset()
        return [[(message['role'], message['content']) for message in row['messages']] for row in rows]

    # All of it but the model, which it does not need for this.
    made = SwiftInfer.__new__(SwiftInfer)
    return prepare


@pytest.mark.parametrize(('datasets', 'options'), SAMPLED)
def test_the_samples_are_those_of_swift_infer_in_its_order(swift_infer: Callable[..., List[Any]], datasets: List[str],
                                                           options: Dict[str, Any]) -> None:
    queries = [{'query': f'q{i}', 'adapters': ['a']} for i in range(12)]
    write_lines('m.jsonl', [{'messages': [user(f'm{i}'), assistant('r')], 'adapters': ['a']} for i in range(11)])
    write_lines('q.jsonl', queries)
    write_array('q.json', queries)
    write_csv('q.csv', [{**row, 'adapters': 'a'} for row in queries])
    samples = read_samples(datasets, NAMES, options=options)
    found = [[(message['role'], message['content']) for message in sample.data['messages']] for sample in samples]
    assert found == swift_infer(val_dataset=datasets, **options)
    for sample in samples:
        # Its number is that in the dataset, whatever was taken of it.
        assert sample.data['messages'][0]['content'][1:] == str(sample.line - 1)
        assert sample.dataset in {dataset.partition('#')[0] for dataset in datasets}


@pytest.mark.parametrize('count', ['0', '-1', '3', 'x', ''])
def test_a_number_of_samples_that_cannot_be_taken_is_told(count: str) -> None:
    name = write_lines('m.jsonl', [{'messages': [user('u')], 'adapters': ['a']}] * 2)
    with pytest.raises(ValueError, match=f'm.jsonl#{count}: expected '):
        read_samples([f'{name}#{count}'], NAMES)


@pytest.mark.parametrize('total', [0, -1])
def test_at_least_one_sample_is_taken(total: int) -> None:
    with pytest.raises(ValueError, match='--val_dataset_sample: expected at least 1, found '):
        read_samples(['m.jsonl'], NAMES, options={'val_dataset_sample': total})


def test_a_file_with_a_number_sign_in_its_name_is_a_file() -> None:
    for name in ('m#1', 'm#1.jsonl'):
        write_lines(name, [{'messages': [user('u')], 'adapters': ['a']}] * 2)
        assert [sample.dataset for sample in read_samples([name], NAMES)] == [name] * 2
        assert [sample.dataset for sample in read_samples([f'{name}#1'], NAMES)] == [name]


def test_all_datasets_are_read_before_it_is_told_what_is_wrong_with_each() -> None:
    good = write_lines('good.jsonl', [{'messages': [user('u')], 'adapters': ['a']}])
    wrong = write_lines('wrong.jsonl', [{'messages': [user('u')], 'adapters': ['d']}])
    table = write_csv('table.csv', [{'query': 'q', 'adapters': ''}])
    with pytest.raises(DatasetError) as e:
        read_samples([wrong, f'{good}#2', 'none.csv', table, wrong], NAMES)
    assert len(e.value.problems) == 2
    for text in ('wrong.jsonl: 1 problem\n', 'good.jsonl#2: expected 1 to 1', 'the dataset none.csv: No such file',
                 'table.csv: 1 problem\n'):
        assert str(e.value).count(text) == 1
    with pytest.raises(ValueError, match='none.csv: No such file.*\n.*none.json: No such file') as other:
        read_samples(['none.csv', good, 'none.json'], NAMES)
    assert not isinstance(other.value, DatasetError), 'no line of them is wrong'


@pytest.mark.parametrize(('name', 'content', 'problem'), [
    ('empty.csv', '', 'Cannot read the dataset empty.csv'),
    ('header.csv', 'query,adapters\n', 'Cannot read the dataset header.csv'),
    ('cut.json', '[{"query": "q"', 'Cannot read the dataset cut.json'),
    ('data.tsv', 'query\tadapters\n', 'data.tsv: expected JSON lines, or a file named .jsonl, .json, .csv'),
    ('empty.jsonl', '\n', 'The dataset empty.jsonl has no samples'),
    ('text.txt', 'hello\n', 'text.txt: 2 problems\n  row 1: `messages` has nothing to answer'),
    ('types.jsonl', '{"query": "q", "id": 1}\n{"query": "q", "id": "x"}', "found others in 'id'"),
])  # yapf: disable
def test_a_file_that_cannot_be_read_is_told(name: str, content: str, problem: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(ValueError) as e:
        read_samples([name], NAMES)
    assert problem in str(e.value) and name in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize('name', ['none.jsonl', 'no/folder/none', './none', '/none', '~/none', '~nobody/x', 'a\0b.csv'])
def test_a_missing_file_is_not_looked_for_on_a_hub(name: str) -> None:
    with pytest.raises(ValueError, match='Cannot read the dataset'):
        read_samples([name], NAMES)


def test_an_empty_folder_and_no_name_are_told() -> None:
    Path('empty').mkdir()
    with pytest.raises(ValueError, match='Cannot read the dataset empty: '):
        read_samples(['empty'], NAMES)
    for names in ([], [' ']):
        with pytest.raises(ValueError, match='--val_dataset: expected '):
            read_samples(names, NAMES)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everywhere')
def test_a_folder_without_permission_is_told() -> None:
    Path('locked').mkdir(mode=0)
    for name in ('locked', 'locked/data.jsonl'):
        with pytest.raises(ValueError, match=f'Cannot read the dataset {name}: Permission denied'):
            read_samples([name], NAMES)


@pytest.mark.parametrize(('given', 'weights'), [
    ({'a': None, 'b': None}, (0.5, 0.5)),
    ({'a': 0.25, 'b': 2}, (0.25, 2.0)),
])  # yapf: disable
def test_default_adapters_are_those_of_lines_that_name_none(given: Dict[str, Any], weights: Tuple[float, ...]) -> None:
    lines: List[Dict[str, Any]] = [{}, {'adapters': None, 'weights': None}, {'adapters': ['c']}]
    name = write_lines('m.jsonl', [{'messages': [user('u')], **line} for line in lines])
    samples = read_samples([name], NAMES, default_adapters=given)
    assert [sample.adapters for sample in samples] == [('a', 'b'), ('a', 'b'), ('c', )]
    assert [sample.weights for sample in samples] == [weights, weights, (1.0, )]
    assert [sample.data['adapters'] for sample in samples] == [['a', 'b'], ['a', 'b'], ['c']], 'a result line has them'
    table = write_csv('table.csv', [{'query': 'q', 'adapters': ''}, {'query': 'q', 'adapters': 'c'}])
    samples = read_samples([table], NAMES, default_adapters=given)
    assert [sample.adapters for sample in samples] == [('a', 'b'), ('c', )]


@pytest.mark.parametrize(('given', 'problem'), [
    ({'d': None}, "--default_adapters: unknown adapter 'd'; known are 'a', 'b', 'c'."),
    ({'a': 1, 'b': None}, '--default_adapters: expected weights for all of them or for none'),
    ({'a': 0, 'b': 0.}, '--default_adapters: weights are all zero.'),
    ({'a': float('nan')}, '--default_adapters: weights must be finite numbers of float32'),
])  # yapf: disable
def test_wrong_default_adapters_are_told_once(given: Dict[str, Any], problem: str) -> None:
    name = write_lines('m.jsonl', [{'messages': [user('u')]}] * 3)
    with pytest.raises(ValueError) as e:
        read_samples([name], NAMES, default_adapters=given)
    assert str(e.value).startswith(problem)


def test_weights_without_adapters_are_wrong_with_default_adapters_too() -> None:
    name = write_lines('m.jsonl', [{'messages': [user('u')], 'weights': [1]}])
    with pytest.raises(DatasetError, match='`weights` are those of `adapters`, which are missing'):
        read_samples([name], NAMES, default_adapters={'a': None})


@pytest.mark.parametrize('kind', ['array.json', 'folder', 'lines.jsonl'])
def test_a_changed_file_is_never_answered_from_a_cache(kind: str, folder: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` knows a file by its path and time."""
    monkeypatch.setenv('MODELSCOPE_CACHE', str(folder / 'cache'))
    for query in ('old', 'new'):
        file = Path(kind, 'train.jsonl') if kind == 'folder' else Path(kind)
        if file.exists():
            write_lines(str(file), [{'query': query, 'adapters': ['a']}])
        else:
            WRITERS[kind](kind, [{'query': query, 'adapters': ['a']}])
        os.utime(file, (1_000_000_000, 1_000_000_000))
        [sample] = read_samples([kind], NAMES, options={'load_from_cache_file': True})
        assert sample.messages == [user(query)]
    assert not (folder / 'cache').exists(), 'nobody needs it a second time'
    assert os.environ['MODELSCOPE_CACHE'] == str(folder / 'cache')


def test_columns_are_those_of_the_option() -> None:
    rows = [{'text1': 't', 'query': 'q', 'who': ['a'], 'messages': [user('m')]}]
    options = {'columns': '{"text1": "query", "query": "other", "who": "adapters", "messages": "talk"}'}
    for kind in ('lines.jsonl', 'array.json'):
        [sample] = read_samples([WRITERS[kind](kind, rows)], NAMES, options=options)
        assert (sample.messages, sample.adapters) == ([user('t')], ('a', ))
    with pytest.raises(ValueError, match='--columns: expected a JSON object'):
        read_samples(['lines.jsonl'], NAMES, options={'columns': '["text1"]'})


def test_files_that_the_user_has_registered_are_read_as_registered(folder: Path) -> None:
    """And ms-swift's arguments, which register them again, can do so."""
    rows = [{'ask': 'q', 'adapters': ['a'], 'query': 'other'}]
    Path('info.json').write_text(
        json.dumps([{
            'dataset_path': str(folder / name),
            'columns': {
                'ask': 'query',
                'query': 'other'
            }
        } for name in ('lines.jsonl', 'array.json')]))
    for kind in ('lines.jsonl', 'array.json'):
        known = dict(DATASET_MAPPING)
        WRITERS[kind](kind, rows)
        [sample] = read_samples([str(folder / kind)], NAMES, options={'custom_dataset_info': ['info.json']})
        assert (sample.messages, sample.data['other']) == ([user('q')], 'other')
        assert DATASET_MAPPING == known


PLUGIN = '''
from swift_patch.ms_swift import DATASET_MAPPING, DatasetMeta, RowPreprocessor


class Own(RowPreprocessor):

    def preprocess(self, row):
        return None if row['ask'] == 'skip' else {'messages': [{'role': 'user', 'content': row['ask']}]}


DATASET_MAPPING['own data'] = DatasetMeta(dataset_path='own.json', preprocess_func=Own())
'''


def test_a_dataset_of_a_plugin_is_read_by_its_preprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'path', list(sys.path))
    Path('own_plugin.py').write_text(PLUGIN)
    options = {'external_plugins': ['own_plugin.py']}
    with mock.patch.dict(DATASET_MAPPING):
        write_array('own.json', [{'ask': 'q1'}, {'ask': 'q2'}])
        samples = read_samples(['own data'], NAMES, default_adapters={'a': None}, options=options)
        assert [(sample.line, sample.messages) for sample in samples] == [(1, [user('q1')]), (2, [user('q2')])]
        write_array('own.json', [{'ask': 'skip'}, {'ask': 'q2'}])
        with pytest.raises(ValueError, match='1 of 2 rows are left out, and the preprocessor of this dataset does not'):
            read_samples(['own data'], NAMES, default_adapters={'a': None}, options=options)
    with pytest.raises(ValueError, match='ms-swift cannot use these arguments: '):
        read_samples(['own data'], NAMES, options={'external_plugins': ['no/such/plugin.py']})


def test_lines_are_counted_while_they_are_read() -> None:
    read: List[int] = []
    name = write_lines('m.jsonl', [{'messages': [user('u')], 'adapters': ['a']}] * 2500)
    read_samples([name, write_array('array.json', [{'query': 'q', 'adapters': ['a']}] * 3)], NAMES, on_read=read.append)
    assert read == [1000, 1000, 500, 3]


def test_streaming_is_refused() -> None:
    with pytest.raises(ValueError, match='--streaming'):
        read_samples(['m.jsonl'], NAMES, options={'streaming': True})


def test_lines_in_ms_swift_own_form_need_no_ms_swift() -> None:
    write_lines('m.jsonl', [{'messages': [user('u')], 'adapters': ['a'], 'images': ['x.png'], 'tools': []}])
    write_lines('wrong.jsonl', [{'messages': [{'role': 'u'}], 'adapters': ['a']}])
    code = '\n'.join([
        'import sys',
        'from swift_patch.inference.samples import read_samples',
        'read_samples(["m.jsonl", "m.jsonl"], ["a"])',
        'try:',
        '    read_samples(["wrong.jsonl", "none.csv"], ["a"])',
        'except ValueError:',
        '    print(sorted({"torch", "swift", "datasets", "numpy"} & sys.modules.keys()))',
    ])
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, check=True, env=env)
    assert done.stdout == '[]\n'


def test_a_sample_says_what_its_number_counts() -> None:
    row = {'query': 'q', 'adapters': ['a']}
    samples: List[Sample] = read_samples([write_lines('m.jsonl', [row]), write_array('array.json', [row])], NAMES)
    assert [sample.unit for sample in samples] == ['line', 'row']
