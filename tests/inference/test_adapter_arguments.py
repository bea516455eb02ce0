"""`--adapters` takes checkpoints, folders of them, manifests and ids on a hub, in any mixture; none is opened."""
import json
import pytest
import shutil
from pathlib import Path
from test_run import parse
from typing import Any, Dict, List

from swift_patch.inference.checkpoints import find_checkpoints, parse_adapters


@pytest.fixture
def folder(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with LoRAs: `flat` (PEFT's format) and `nested` (ms-swift's), and `many` with both."""
    paths = written[1]
    shutil.copytree(paths['peft']['l0'], tmp_path / 'flat')
    shutil.copytree(paths['swift']['l1'], tmp_path / 'nested' / 'default')
    for name in ('flat', 'nested'):
        shutil.copytree(tmp_path / name, tmp_path / 'many' / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest(file: Path, paths: Dict[str, str], is_json: bool = False) -> str:
    """Writes a manifest and returns the argument that names it."""
    lines = (json.dumps({'name': name, 'path': path}) + '\n' for name, path in paths.items())
    file.write_text(json.dumps(paths) if is_json else ''.join(lines))
    return f'@{file}'


def test_a_name_and_a_path_are_told_apart_at_the_first_sign() -> None:
    assert parse_adapters(['a=/x', 'b=./y=z', 'c d=e']) == {'a': '/x', 'b': './y=z', 'c d': 'e'}


@pytest.mark.parametrize('name', ['flat', 'nested'])
def test_a_checkpoint_of_either_format_has_the_name_of_its_folder(folder: Path, name: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_adapters([name]) == {name: name}
    assert parse_adapters([f'./{name}/']) == {name: f'./{name}/'}
    assert parse_adapters([f'many/{name}']) == {name: f'many/{name}'}
    monkeypatch.chdir(folder / name)
    assert parse_adapters(['.']) == {name: '.'}
    # What is written beside the adapter does not make it a folder of several.
    for beside in ('runs', 'images', '.git'):
        (folder / name / beside).mkdir()
    assert parse_adapters(['.']) == {name: '.'}


def test_a_folder_holds_checkpoints_by_the_names_of_their_folders(folder: Path, written: Any) -> None:
    (folder / 'many' / '.hidden').mkdir()
    (folder / 'many' / 'README.md').write_text('')
    assert parse_adapters(['many']) == {'flat': 'many/flat', 'nested': 'many/nested'}
    # What several adapters of one model were saved to.
    for paths in written[1].values():
        assert parse_adapters([str(Path(paths['l0']).parent)]) == paths
        assert len(find_checkpoints(paths)) == 5


@pytest.mark.parametrize('broken', ['flat', 'nested'])
def test_a_broken_checkpoint_in_a_folder_is_no_matter_until_it_is_used(folder: Path, broken: str) -> None:
    [config] = (folder / 'many' / broken).rglob('adapter_config.json')
    config.write_text('{')
    found = parse_adapters(['many'])
    assert list(found) == ['flat', 'nested']
    with pytest.raises(ValueError, match=rf"^adapter '{broken}' \(many/{broken}\): cannot read many/{broken}/"):
        find_checkpoints(found)
    del found[broken]
    find_checkpoints(found)


@pytest.mark.parametrize('is_json', [False, True])
def test_the_paths_of_a_manifest_are_relative_to_its_folder(folder: Path, is_json: bool) -> None:
    paths = {'a': 'flat', 'b': '../nested', 'c': str(folder / 'nested'), 'd': 'none'}
    found = parse_adapters([manifest(folder / 'many' / 'm', paths, is_json)])
    assert list(found) == list(paths)
    assert [Path(path).resolve() for path in found.values()] == [
        folder / 'many' / 'flat', folder / 'nested', folder / 'nested', folder / 'many' / 'none'
    ]  # yapf: disable


def test_any_mixture_comes_in_its_order_and_by_several_options(folder: Path) -> None:
    listed = manifest(folder / 'm', {'b': 'flat', 'a': 'flat'})
    args = parse('--adapters', 'z=flat', 'many', '--val_dataset', 'd', '--result_path', 'r', '--adapters', listed,
                 '--adapters', 'owner/name', 'y=owner/name')
    assert list(parse_adapters(args.adapters)) == ['z', 'flat', 'nested', 'b', 'a', 'name', 'y']


def test_the_home_and_variables_are_put_into_paths_of_all_forms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(folder))
    monkeypatch.setenv('MANY', 'many')
    manifest(folder / 'm', {'c': '$MANY/flat', 'd': '~/flat'})
    found = parse_adapters(['a=~/flat', 'b=$HOME/${MANY}/flat', '~/$MANY', '@~/m'])
    assert found == {
        'a': f'{folder}/flat',
        'b': f'{folder}/many/flat',
        'flat': f'{folder}/many/flat',
        'nested': f'{folder}/many/nested',
        'c': f'{folder}/many/flat',
        'd': f'{folder}/flat',
    }


def test_a_path_that_is_there_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', 'elsewhere')
    for name in ('$HOME', '~', 'a=b'):
        shutil.copytree('flat', name)
        assert parse_adapters([name]) == {name: name}
    assert parse_adapters(['x=$HOME', 'y=~']) == {'x': '$HOME', 'y': '~'}
    found = parse_adapters([manifest(folder / 'm', {'z': '$HOME'})])
    assert found == {'z': f'{folder}/$HOME'}


@pytest.mark.parametrize(('items', 'told'), [
    (['=x'], "got '=x'."),
    (['a='], "got 'a='."),
    ([''], "got '': the path does not exist."),
    (['none'], "got 'none': the path does not exist."),
    (['none/of/these'], "got 'none/of/these': the path does not exist."),
    (['many/none'], "got 'many/none': the path does not exist, nor is it looked for on a hub, as 'many' is here."),
    (['m'], "got 'm': this is a file; a manifest is given as @m, and a checkpoint as its folder."),
    (['empty'], 'empty is expected to have checkpoints in it, found no folder.'),
    (['@none'], 'The manifest none cannot be read: '),
    (['@many'], 'The manifest many cannot be read: '),
    (['a=x', 'b=y', 'a=z'], "--adapters names 'a' twice: x and z."),
    (['flat', 'many'], "--adapters names 'flat' twice: flat and many/flat."),
    (['many', '@m'], "--adapters names 'flat' twice: many/flat and x."),
    (['@m', 'owner/flat'], "--adapters names 'flat' twice: x and owner/flat."),
])  # yapf: disable
def test_other_forms_and_names_that_come_twice_are_refused(folder: Path, items: List[str], told: str) -> None:
    (folder / 'empty').mkdir()
    manifest(folder / 'm', {'flat': 'x'})
    with pytest.raises(ValueError) as e:
        parse_adapters(items)
    assert told in str(e.value)
    assert told.startswith(('The', 'empty')) or str(e.value).startswith('--adapters ')


@pytest.mark.parametrize(('item', 'name', 'hub_id'), [
    ('owner/name', 'name', 'owner/name'),
    ('a=owner/name', 'a', 'owner/name'),
    ('owner/name-v1.5:runs/last/', 'last', 'owner/name-v1.5:runs/last/'),
    ('a=owner/name:last', 'a', 'owner/name:last'),
])  # yapf: disable
def test_what_is_no_path_may_be_the_id_of_an_adapter_on_a_hub(folder: Path, item: str, name: str, hub_id: str) -> None:
    assert parse_adapters([item]) == {name: hub_id}


def test_a_manifest_may_have_ids_wherever_it_is(folder: Path) -> None:
    paths = {'a': 'owner/name', 'b': 'flat/name', 'c': 'owner/name:last'}
    expected = {'a': 'owner/name', 'b': f'{folder}/many/flat/name', 'c': 'owner/name:last'}
    assert parse_adapters([manifest(folder / 'many' / 'm', paths)]) == expected
    # What is in the working directory is not meant, so that neither is what only seems to be an id there.
    (folder / 'owner').mkdir()
    expected = {name: f'{folder}/many/{path}' for name, path in paths.items()}
    assert parse_adapters(['@many/m']) == {name: f'many/{path}' for name, path in paths.items()}
    assert parse_adapters([f'@{folder}/many/m']) == expected


def test_a_mistyped_path_is_told_as_one_without_asking_a_hub(folder: Path) -> None:
    with pytest.raises(ValueError) as e:
        find_checkpoints(parse_adapters(['a=many/none', 'b=none', 'c=many/flat', 'd=~none/x']))
    assert str(e.value).splitlines() == [
        "adapter 'a' (many/none): the path does not exist, nor is it looked for on a hub, as 'many' is here.",
        "adapter 'b' (none): the path does not exist.",
        "adapter 'd' (~none/x): the path does not exist.",
    ]
