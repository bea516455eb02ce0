"""A library knows its adapters by name, and looks at their files when they are used."""
import json
import os
import pytest
import random
import shutil
import threading
import torch
from checkpoint_files import CONFIG, WEIGHTS, encoded
from file_faults import between_calls
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from pathlib import Path
from safetensors.torch import load_file, save_file
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, Tuple

from swift_patch import AdapterLibrary
from swift_patch.lora import reading
from swift_patch.lora.header import Header
from swift_patch.lora.library import StoredAdapter
from swift_patch.lora.reading import Kind, Placed, Reading

KIND: Kind = (torch.float32, torch.device('cpu'))


def checkpoint(folder: Path, tensors: Dict[str, torch.Tensor]) -> str:
    """All that a library itself asks of a checkpoint."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({'peft_type': 'LORA'}))
    (folder / WEIGHTS).write_bytes(encoded(tensors))
    for file in folder.iterdir():
        os.utime(file, (0, 10**9))
    return str(folder)


def whole(header: Header) -> Reading:
    placed, end = [], 0
    for key, entry in header.entries.items():
        placed.append(Placed(key, KIND, end))
        end += torch.Size(entry.shape).numel()
    return Reading(header, placed)


_readings: Dict[Header, Reading] = {}


def reading_of(stored: StoredAdapter) -> Reading:
    """One for all files of one header, as a model has it."""
    return _readings.setdefault(stored.header, whole(stored.header))


def values(library: AdapterLibrary, name: str) -> torch.Tensor:
    return library.looked_at(name, lambda stored: library.read(stored, reading_of(stored)))[KIND]


# What there is.


def test_nothing_is_looked_at_until_it_is_used(tmp_path: Path) -> None:
    there = checkpoint(tmp_path / 'there', {'a': torch.ones(3)})
    with between_calls(tmp_path, {}) as calls:
        library = AdapterLibrary({'there': there, 'missing': tmp_path / 'missing'})
        library.add('none', tmp_path / 'none')
        library.remove('none')
        assert ('there' in library, 'none' in library, len(library), list(library)) == \
            (True, False, 2, ['there', 'missing'])
        assert library.path('missing') == tmp_path / 'missing' and repr(library)
    assert not calls
    assert torch.equal(values(library, 'there'), torch.ones(3))
    with pytest.raises(ValueError, match=rf"^adapter 'missing' \({tmp_path}/missing\): the path does not exist.$"):
        values(library, 'missing')
    assert checkpoint(tmp_path / 'missing', {'a': torch.zeros(3)})
    assert torch.equal(values(library, 'missing'), torch.zeros(3))


def test_a_library_says_what_it_has() -> None:
    library = AdapterLibrary()
    assert (len(library), list(library), repr(library)) == (0, [], 'AdapterLibrary(0 adapters: )')
    library = AdapterLibrary({f'l{number}': '/nowhere' for number in range(10_000)})
    assert repr(library) == 'AdapterLibrary(10000 adapters: l0, l1, l2, l3, l4, ...)'


@pytest.mark.parametrize(('do', 'error', 'told'), [
    (lambda _: AdapterLibrary(['/a']), TypeError, 'adapters is expected to be a mapping from names to paths'),
    (lambda _: AdapterLibrary('/a'), TypeError, 'use `AdapterLibrary.from_folder`'),
    (lambda _: AdapterLibrary({'a': None}), TypeError, "path of adapter 'a' is expected to be a path, found None"),
    (lambda _: AdapterLibrary({1: '/a'}), TypeError, 'name of an adapter is expected to be a string, found 1'),
    (lambda _: AdapterLibrary({'': '/a'}), ValueError, "is expected not to be empty, found '' for /a"),
    (lambda _: AdapterLibrary(cache_bytes=-1), ValueError, 'cache_bytes is expected not to be negative, found -1'),
    (lambda _: AdapterLibrary(cache_bytes=1e9), TypeError, 'cache_bytes is expected to be an integer'),
    (lambda _: AdapterLibrary(cache_bytes=True), TypeError, 'cache_bytes is expected to be an integer'),
    (lambda of: of.add('x', '/y'), ValueError, "Adapter 'x' is expected to be new in the library, found that it is /x"),
    (lambda of: of.add('y', b'/y'), TypeError, 'is expected to be a path'),
    (lambda of: of.remove('y'), ValueError, "The library is expected to have adapter 'y', but does not: add it."),
    (lambda of: of.path('y'), ValueError, "The library is expected to have adapter 'y', but does not: add it."),
    (lambda of: of.checkpoint('y'), ValueError, "The library is expected to have adapter 'y', but does not: add it."),
    (lambda of: of.stored('y'), ValueError, "The library is expected to have adapter 'y', but does not: add it."),
    (lambda of: values(of, 'y'), ValueError, "The library is expected to have adapter 'y', but does not: add it."),
])  # yapf: disable
def test_what_is_wrong_is_told_and_changes_nothing(do: Callable[[AdapterLibrary], Any], error: type, told: str) -> None:
    library = AdapterLibrary({'x': '/x'})
    with pytest.raises(error) as e:
        do(library)
    assert told in str(e.value)
    assert list(library) == ['x'] and str(library.path('x')) == '/x'


# Folders and manifests.


def test_a_folder_has_an_adapter_in_each_of_its_folders(tmp_path: Path) -> None:
    for name in ('b', 'a.b', 'checkpoint-10', '.hidden'):
        (tmp_path / 'all' / name).mkdir(parents=True)
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'all' / 'linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'all' / 'broken').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'all' / 'loop').symlink_to(tmp_path / 'all' / 'loop')
    (tmp_path / 'all' / 'file').write_text('')
    library = AdapterLibrary.from_folder(tmp_path / 'all', cache_bytes=0)
    assert list(library) == ['a.b', 'b', 'checkpoint-10', 'linked']
    assert library.path('b') == tmp_path / 'all' / 'b'


def test_what_is_no_folder_of_checkpoints_is_told(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / '.hidden').mkdir()
    (tmp_path / 'one' / 'default').mkdir(parents=True)
    (tmp_path / 'one' / CONFIG).write_text('{}')
    for name, told in (('none', 'No such file or directory'), ('file', 'Not a directory'), ('empty', 'found no folder'),
                       ('one', 'found that it is a checkpoint: give the folder above')):
        with pytest.raises(ValueError) as e:
            AdapterLibrary.from_folder(tmp_path / name)
        assert str(tmp_path / name) in str(e.value) and told in str(e.value)


def manifest(tmp_path: Path, content: Any) -> AdapterLibrary:
    file = tmp_path / 'manifest'
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return AdapterLibrary.from_manifest(file)


LINES = ['{"name": "a", "path": "x/a"}', '{"path": "/y/b", "name": "b", "note": 1}']


@pytest.mark.parametrize('content', [
    '{"a": "x/a", "b": "/y/b"}',
    '{\n  "a": "x/a",\n  "b": "/y/b"\n}\n',
    '\ufeff{"a": "x/a", "b": "/y/b"}',
    '\n'.join(LINES),
    '\ufeff' + '\n'.join(LINES) + '\n',
    '\r\n'.join(['', LINES[0], '', '  ', LINES[1], '', '']),
])
def test_a_manifest_is_an_object_or_lines_with_paths_beside_it(tmp_path: Path, content: str) -> None:
    library = manifest(tmp_path, content)
    assert {name: library.path(name) for name in library} == {'a': tmp_path / 'x' / 'a', 'b': Path('/y/b')}


def test_one_line_alone_is_that_of_an_adapter(tmp_path: Path) -> None:
    assert list(manifest(tmp_path, LINES[0])) == ['a']
    assert list(manifest(tmp_path, '{"name": "x"}')) == ['name']
    assert list(manifest(tmp_path, '{"name": "x", "path": "y", "b": "z"}')) == ['name', 'path', 'b']


def test_a_path_may_begin_at_home_or_beside_a_relative_manifest(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv('HOME', '/home/of/a/user')
    monkeypatch.chdir(tmp_path)
    assert manifest(tmp_path, '{"a": "~/a"}').path('a') == Path('/home/of/a/user/a')
    assert AdapterLibrary.from_manifest('manifest').path('a') == Path('/home/of/a/user/a')
    Path('manifest').write_text('{"a": "b"}')
    library = AdapterLibrary.from_manifest('manifest')
    monkeypatch.chdir('/')
    assert library.path('a') == tmp_path / 'b'


@pytest.mark.parametrize(('content', 'told'), [
    ('', 'is expected to list adapters, found none'),
    ('\n \n', 'is expected to list adapters, found none'),
    ('{}', 'is expected to list adapters, found none'),
    (b'\xff', 'cannot be read'),
    ('{"a": "x", "a": "y"}', "names adapter 'a' twice, again of 'a'"),
    (LINES[0] + '\n\n' + LINES[0], "names adapter 'a' twice, again in line 3"),
    ('{"a": 1}', "is expected to have a name and a path of 'a', found 'a' and 1"),
    ('{"a": ["x"]}', "is expected to have a name and a path of 'a', found 'a' and ['x']"),
    ('{"a": {"path": "x"}}', "is expected to have a name and a path of 'a', found 'a' and"),
    ('{"": "x"}', "is expected to have a name and a path of '', found '' and 'x'"),
    ('{"a": ""}', "is expected to have a name and a path of 'a', found 'a' and ''"),
    ('{"name": "a", "path": null}', "is expected to have a name and a path in line 1, found 'a' and None"),
    (LINES[0] + '\n{"name": 1, "path": "x"}', "is expected to have a name and a path in line 2, found 1 and 'x'"),
    (LINES[0] + '\n{"name": "b"}', 'found \'{"name": "b"}\' in line 2'),
    (LINES[0] + '\n\nb=x', "found 'b=x' in line 3"),
    (LINES[0] + '\n["b", "x"]', 'in line 2'),
    (LINES[0] + '\nnull', "found 'null' in line 2"),
    ('{"a": "x"', 'in line 1'),
    ('a', "found 'a' in line 1"),
    ('7', "found '7' in line 1"),
    ('[]', "found '[]' in line 1"),
    ('["a", "x"]', 'in line 1'),
    # Two letters are no name and path, and pairs are no object.
    ('["ax", "by"]', 'in line 1'),
    ('[["a", "x"], ["b", "y"]]', 'in line 1'),
    ('[{"name": "a", "path": "x"}]', 'in line 1'),
    ('[' * 100_000, 'in line 1'),
])  # yapf: disable
def test_what_is_no_manifest_is_told(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(ValueError) as e:
        manifest(tmp_path, content)
    assert str(e.value).startswith(f'The manifest {tmp_path}/manifest ') and told in str(e.value)
    assert len(str(e.value)) < 500 + len(str(tmp_path))


def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for path, told in ((tmp_path / 'none', 'No such file or directory'), (tmp_path, 'Is a directory')):
        with pytest.raises(ValueError, match=f'^The manifest {path} cannot be read: {told}.$'):
            AdapterLibrary.from_manifest(path)


@tries(100)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=['Cs']), min_size=1), st.text('ab./é\u2028 ', min_size=1),
                    min_size=1, max_size=5), st.booleans(), st.booleans())  # yapf: disable
def test_whatever_names_there_are_both_manifests_have_them(paths, is_lines, is_ascii):
    if is_lines:
        lines = [{'name': name, 'path': path} for name, path in paths.items()]
        content = '\n'.join(json.dumps(line, ensure_ascii=is_ascii) for line in lines)
    elif paths.keys() == {'name', 'path'}:
        return
    else:
        content = json.dumps(paths, ensure_ascii=is_ascii)
    with TemporaryDirectory() as folder:
        library = manifest(Path(folder), content)
        assert {name: library.path(name) for name in library} == {name: Path(folder, paths[name]) for name in paths}


# What is remembered.


@pytest.fixture
def made(tmp_path: Path) -> Tuple[Dict[str, str], Dict[str, torch.Tensor]]:
    """Checkpoints of one header, of 400 bytes each, and what is in them."""
    expected = {f'l{number}': torch.full([100], float(number)) for number in range(20)}
    return {name: checkpoint(tmp_path / name, {'a': tensor}) for name, tensor in expected.items()}, expected


def nbytes(library: AdapterLibrary) -> int:
    return sum(library._cache.nbytes.values())


@pytest.mark.parametrize('cache_bytes', [0, 399, 400, 4000, 2**20])
def test_however_small_the_cache_what_is_read_is_right(made: Any, cache_bytes: int) -> None:
    (paths, expected), chance = made, random.Random(0)
    library = AdapterLibrary(paths, cache_bytes=cache_bytes)
    held = []
    for _ in range(300):
        name = chance.choice(list(paths))
        held = [*held[-5:], (values(library, name), expected[name])]
        assert all(torch.equal(found, tensor) for found, tensor in held)
        assert nbytes(library) <= cache_bytes
    assert nbytes(library) >= min(cache_bytes, 8000) // 400 * 400 or cache_bytes < 4000


def test_what_was_read_before_is_not_read_again(made: Any) -> None:
    paths, _ = made
    library = AdapterLibrary(paths)
    with between_calls(Path(paths['l1']), {}) as first:
        found = values(library, 'l1')
    with between_calls(Path(paths['l1']), {}) as second:
        assert values(library, 'l1').data_ptr() == found.data_ptr()
    assert 'preadv' in first and set(second) == {'stat'}


def test_files_of_one_header_share_what_was_made_of_it(made: Any, tmp_path: Path) -> None:
    paths, _ = made
    library = AdapterLibrary({**paths, 'other': checkpoint(tmp_path / 'other', {'b': torch.ones(100)})})
    found = {library.stored(name).header for name in paths}
    assert len(found) == 1 and library.stored('other').header not in found


def test_what_is_removed_is_forgotten(made: Any) -> None:
    paths, expected = made
    library = AdapterLibrary(paths, cache_bytes=8000)
    for _ in range(2):
        for name in paths:
            values(library, name)
    kept = values(library, 'l1')
    assert nbytes(library) == 8000
    library.remove('l1')
    assert 'l1' not in library and 'l1' not in list(library) and len(library) == 19
    with pytest.raises(ValueError, match='add it'):
        values(library, 'l1')
    assert 'l1' not in library._stored
    # Somebody may still compute with it.
    library.add('l1', paths['l2'])
    assert torch.equal(values(library, 'l1'), expected['l2']) and torch.equal(kept, expected['l1'])
    for name in list(library):
        library.remove(name)
    # A little memory waits to be filled again.
    assert not library._cache._first.entries and not library._cache._again.entries and nbytes(library) <= 1000


def test_what_is_put_takes_the_place_of_one_of_its_name_at_once(made: Any) -> None:
    paths, expected = made
    library = AdapterLibrary({'l0': paths['l0']})
    values(library, 'l0')
    for name, wanted in (('l0', 'l1'), ('new', 'l2')):
        library.put(name, paths[wanted])
        assert torch.equal(values(library, name), expected[wanted])
    with pytest.raises(ValueError, match='empty'):
        library.put('l0', '')
    assert torch.equal(values(library, 'l0'), expected['l1']) and list(library) == ['l0', 'new']


def test_what_is_removed_while_it_is_read_is_not_remembered(made: Any) -> None:
    paths, expected = made
    library = AdapterLibrary({'x': paths['l1']})

    def removed(stored: StoredAdapter) -> Reading:
        library.remove('x')
        return reading_of(stored)

    tensors = library.looked_at('x', lambda stored: library.read(stored, removed(stored)))
    assert torch.equal(tensors[KIND], expected['l1'])
    assert not library._stored and not nbytes(library)


def test_what_another_path_is_given_while_it_is_read_is_that_of_the_path(made: Any) -> None:
    paths, expected = made
    library = AdapterLibrary({'x': paths['l1']})

    def moved(stored: StoredAdapter) -> Reading:
        library.remove('x')
        library.add('x', paths['l2'])
        return reading_of(stored)

    tensors = library.looked_at('x', lambda stored: library.read(stored, moved(stored)))
    assert torch.equal(tensors[KIND], expected['l1'])
    assert torch.equal(values(library, 'x'), expected['l2'])


@pytest.mark.parametrize('path', ['l2', None])
def test_what_is_removed_while_it_is_looked_at_is_not_remembered(made: Any, path: Any) -> None:
    paths, expected = made
    first, happened = 0, [True]
    while happened:
        happened.clear()
        library = AdapterLibrary({'x': paths['l1']})

        def replace(library: AdapterLibrary = library) -> None:
            happened.append(True)
            library.remove('x')
            if path is not None:
                library.add('x', paths[path])

        with between_calls(Path(paths['l1']), {first: replace}):
            try:
                found = values(library, 'x')
            except ValueError as e:
                assert path is None and 'add it' in str(e)
            else:
                assert any(torch.equal(found, expected[name]) for name in ('l1', path) if name is not None)
        if not happened:
            return
        if path is None:
            assert not library._stored and not library._cache._first.entries and not library._cache._again.entries
        else:
            assert torch.equal(values(library, 'x'), expected[path])
        first += 1


def test_headers_and_looks_do_not_pile_up(tmp_path: Path) -> None:
    from swift_patch.lora.stored import _MAX_HEADERS
    paths = {f'l{number}': checkpoint(tmp_path / f'l{number}', {f't{number}': torch.ones(1)}) for number in range(300)}
    library = AdapterLibrary(paths)
    for name in paths:
        library.stored(name)
    assert len(library._files._headers) == _MAX_HEADERS < 300
    assert all(torch.equal(values(library, name), torch.ones(1)) for name in paths)


# From several threads.


def run(works: List[Callable[[], None]]) -> None:
    """Runs all at once, each in a thread, and raises what any of them raised."""
    failures: List[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_add_remove_ask_and_read_at_the_same_time(made: Any) -> None:
    paths, expected = made
    # So small that they push each other's out all the time.
    library = AdapterLibrary(paths, cache_bytes=5 * 400)

    def changes(thread: int) -> None:
        for number in range(300):
            name = f'{thread} {number}'
            library.add(name, paths['l3'])
            assert name in library
            if number % 3 == 0:
                assert torch.equal(values(library, name), expected['l3'])
            if number % 10:
                library.remove(name)
                assert name not in library

    def asks(_: int) -> None:
        for _ in range(300):
            found = list(library)
            assert set(paths) <= set(found) and len(found) == len(set(found))
            assert len(library) >= len(paths) and repr(library)

    def reads(thread: int) -> None:
        chance, held = random.Random(thread), []
        for _ in range(300):
            name = chance.choice(list(paths))
            held = [*held[-2:], (values(library, name), expected[name])]
            assert all(torch.equal(found, tensor) for found, tensor in held)

    run([lambda work=work, thread=thread: work(thread) for work in (changes, asks, reads) for thread in range(3)])
    assert set(library) == {*paths, *(f'{thread} {number}' for thread in range(3) for number in range(0, 300, 10))}
    assert nbytes(library) <= 5 * 400


def test_one_name_is_added_by_one_thread_alone(made: Any) -> None:
    paths, _ = made
    library, added = AdapterLibrary(), []

    def adds() -> None:
        for number in range(200):
            try:
                library.add(str(number), paths['l1'])
                added.append(number)
            except ValueError as e:
                assert 'is expected to be new' in str(e)

    run([adds] * 4)
    assert sorted(added) == list(range(200))


def test_files_of_the_same_tensors_share_a_header_whatever_else_they_say(tmp_path: Path) -> None:
    paths = {name: checkpoint(tmp_path / name, {'t': torch.ones(3)}) for name in 'ab'}
    for number, path in enumerate(paths.values()):
        file = Path(path, WEIGHTS)
        save_file(load_file(file), file, metadata={'run': str(number)})
    library = AdapterLibrary(paths)
    a, b = map(library.stored, paths)
    assert a.header is b.header
    assert Path(a.file).read_bytes() != Path(b.file).read_bytes()


def test_a_file_that_is_rewritten_between_two_reads_is_read_again(tmp_path: Path, monkeypatch: Any) -> None:
    path = Path(checkpoint(tmp_path / 'a', {'t': torch.ones(1000)}), WEIGHTS)
    library, new = AdapterLibrary({'a': tmp_path / 'a'}), encoded({'t': torch.full([1000], 2.)})
    preadv, calls = os.preadv, []

    def half(fd: int, views: List[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            with open(path, 'r+b') as file:
                file.write(new)
        return preadv(fd, [views[0][:2000]], offset)

    monkeypatch.setattr(reading.os, 'preadv', half)
    assert values(library, 'a').unique().tolist() == [2.]
    assert len(calls) >= 4


def test_a_pickle_is_converted_again_where_its_temporary_file_is_gone(tmp_path: Path) -> None:
    path = Path(checkpoint(tmp_path / 'a', {'t': torch.ones(3)}))
    path.joinpath(WEIGHTS).unlink()
    torch.save({'t': torch.ones(3)}, path / 'adapter_model.bin')
    library = AdapterLibrary({'a': path}, cache_bytes=0)
    for remove in (os.unlink, lambda file: shutil.rmtree(Path(file).parent), lambda file: None):
        assert values(library, 'a').tolist() == [1, 1, 1]
        remove(library.stored('a').file)
    # PEFT takes the other file once there is one.
    path.joinpath(WEIGHTS).write_bytes(encoded({'t': torch.full([3], 2.)}))
    assert values(library, 'a').tolist() == [2, 2, 2]
