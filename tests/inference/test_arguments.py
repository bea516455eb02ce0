"""ms-swift's arguments are those of `swift infer`: an args.json has what is not given, and what disagrees is told."""
import json
import logging
import os
import pytest
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List

from swift_patch.cli.doctor import PLUGIN as PLUGIN_PATH
from swift_patch.inference.arguments import swift_arguments
from swift_patch.inference.checkpoints import find_checkpoints
from swift_patch.ms_swift import InferArguments, keys_of_args_file

# What a run of `swift-patch infer` gives.
RUN = {'val_dataset': ['data.jsonl'], 'result_path': 'results/out.jsonl', 'max_batch_size': 7}
PLUGIN = 'import os\nos.environ["SWIFT_PATCH_TEST_PLUGIN"] = {!r}\n'


@pytest.fixture
def trained_with(checkpoints: Dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """Copies an adapter, with other values in its args.json; None takes one out."""

    def copy(name: str, kind: str = 'peft', **changes: Any) -> str:
        path = shutil.copytree(checkpoints[kind], tmp_path / name)
        data = {**json.loads((path / 'args.json').read_text()), **changes}
        (path / 'args.json').write_text(json.dumps(data))
        return str(path)

    return copy


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], List[str]]:
    """Returns what this package warned of."""
    return lambda: [
        record.getMessage() for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith('swift_patch')
    ]


def arguments_of(adapters: Dict[str, str], **swift_args: Any) -> Any:
    return swift_arguments(swift_args, find_checkpoints(adapters), **RUN)


def test_they_are_those_of_swift_infer_which_asks_nobody_and_makes_no_folder(checkpoints: Dict[str, str],
                                                                             model_dir: str, tmp_path: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = arguments_of({'a': checkpoints['swift'], 'b': checkpoints['peft']}, max_model_len=64, quant_method=None)
    assert type(args) is InferArguments
    assert (args.model_dir, args.max_model_len, args.max_batch_size) == (model_dir, 64, 7)
    assert not args.stream and not args.eval_human
    assert os.listdir(tmp_path) == []


def test_a_command_without_a_dataset_needs_nothing_else(checkpoints: Dict[str, str], model_dir: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = swift_arguments({'template': 'dummy'}, find_checkpoints({'a': checkpoints['peft']}))
    assert (args.model_dir, args.template) == (model_dir, 'dummy')
    assert not args.stream
    assert os.listdir(tmp_path) == []


def test_what_ms_swift_does_not_know_is_told_with_where_the_rest_came_from(checkpoints: Dict[str, str]) -> None:
    with pytest.raises(
            ValueError,
            match=r"^ms-swift cannot use these arguments: TypeError: .*'nonsense'.* What is not "
            rf"given is that of adapter 'a' .*{checkpoints['peft']}/args.json"):
        arguments_of({'a': checkpoints['peft']}, nonsense=1)


def test_args_files_that_disagree_are_told_by_each_option_with_both_adapters_and_values(
        trained_with: Callable[..., str], told: Callable[[], List[str]], model_dir: str) -> None:
    paths = {
        'a': trained_with('1', system='You are one.'),
        'same': trained_with('2', system='You are one.'),
        'b': trained_with('3', system='You are two.', torch_dtype='float16', learning_rate=7., output_dir='/other'),
        'c': trained_with('4', 'swift', system=None),
    }
    args = arguments_of(paths)
    assert (args.system, args.model_dir) == ('You are one.', model_dir)
    system, = (text for text in told() if 'system' in text)
    assert system == (f"adapter 'a' ({paths['a']}) was trained with system='You are one.', but adapter 'b' "
                      f"({paths['b']}) with system='You are two.', and 1 more differ. All are answered with "
                      "'You are one.': give --system to decide it.")
    dtype, = (text for text in told() if 'torch_dtype' in text)
    assert "torch_dtype='float16'" in dtype and 'more' not in dtype
    assert len(told()) == 2


def test_what_is_given_is_no_disagreement(trained_with: Callable[..., str], told: Callable[[], List[str]]) -> None:
    paths = {'a': trained_with('1', system='one'), 'b': trained_with('2', system='two', response_prefix='x')}
    assert arguments_of(paths, system='mine', response_prefix='').system == 'mine'
    assert told() == []


def test_two_paths_of_one_model_agree_and_another_model_does_not(trained_with: Callable[..., str], model_dir: str,
                                                                 told: Callable[[], List[str]], tmp_path: Path) -> None:
    (tmp_path / 'link').symlink_to(model_dir)
    paths = {'a': trained_with('1'), 'b': trained_with('2', model=str(tmp_path / 'link'), torch_dtype='torch.float32')}
    arguments_of(paths)
    assert told() == []
    paths['c'] = trained_with('3', model='owner/model')
    arguments_of(paths)
    assert [text.split('=')[0].split()[-1] for text in told()] == ['model']


def test_how_and_where_adapters_were_trained_is_no_disagreement(trained_with: Callable[..., str],
                                                                told: Callable[[], List[str]]) -> None:
    arguments_of({
        'a': trained_with('1'),
        'b': trained_with('2', attn_impl='eager', seed=3, lora_rank=2, adapters=['x'])
    })
    assert told() == []


@pytest.mark.parametrize('value', [5, [], [1], {'a': None}, [[]], 1.5, True, 'text'])
def test_values_of_any_type_are_compared(trained_with: Callable[..., str], told: Callable[[], List[str]],
                                         value: Any) -> None:
    everything = {key: value for key in keys_of_args_file(None)}
    arguments_of({'a': trained_with('1'), 'b': trained_with('2', **everything)})
    assert any('template' in text for text in told())


@pytest.mark.parametrize(('changes', 'reason'), [
    ({'model': ['x']}, 'ms-swift cannot use these arguments: '),
    ({'external_plugins': 5}, 'ms-swift cannot use these arguments: '),
    ({'swift_version': {}}, 'is expected to have a version of ms-swift as its swift_version, found {}'),
])  # yapf: disable
def test_values_that_ms_swift_cannot_use_are_told_with_their_file(trained_with: Callable[..., str],
                                                                  changes: Dict[str, Any], reason: str) -> None:
    path = trained_with('1', **changes)
    with pytest.raises(ValueError) as e:
        arguments_of({'a': path})
    assert reason in str(e.value)
    assert f"adapter 'a' ({path})" in str(e.value) and f'{path}/args.json' in str(e.value)


def test_args_files_that_cannot_be_read_are_told_at_once_with_what_to_do(checkpoints: Dict[str, str],
                                                                         trained_with: Callable[..., str]) -> None:
    contents = {'cut': '{"model": ', 'list': '[1]', 'binary': '\udcff', 'deep': '[' * 100_000}
    paths = {name: trained_with(name) for name in contents}
    for name, content in contents.items():
        Path(paths[name], 'args.json').write_text(content, errors='surrogateescape')
    with pytest.raises(ValueError) as e:
        arguments_of({'good': checkpoints['peft'], **paths})
    lines = str(e.value).splitlines()
    assert len(lines) == len(paths)
    for (name, path), line in zip(paths.items(), lines):
        assert line.startswith(f"adapter '{name}' ({path}): ") and f'{path}/args.json' in line
        assert line.endswith('. Put it right, or give --load_args false, and --model and the rest yourself.')


def test_without_args_files_nothing_of_them_is_read_and_the_model_is_asked_for(model_dir: str,
                                                                               trained_with: Callable[..., str],
                                                                               told: Callable[[], List[str]]) -> None:
    paths = {'a': trained_with('1', system='one'), 'b': trained_with('2')}
    Path(paths['b'], 'args.json').write_text('{')
    with pytest.raises(ValueError, match='^A base model is expected with --load_args false, found none: give --model'):
        arguments_of(paths, load_args=False)
    args = arguments_of(paths, load_args=False, model=model_dir, model_type='qwen2', template='chatml')
    assert (args.model_dir, args.system, told()) == (model_dir, None, [])


def test_where_no_adapter_has_an_args_file_the_model_is_asked_for(trained_with: Callable[..., str]) -> None:
    path = trained_with('1')
    Path(path, 'args.json').unlink()
    with pytest.raises(ValueError, match='^A base model is expected where no adapter has an args.json, found none: '):
        arguments_of({'a': path})


def test_a_plugin_that_is_not_here_is_told_with_its_adapter_and_both_ways_out(model_dir: str,
                                                                              trained_with: Callable[..., str],
                                                                              tmp_path: Path) -> None:
    paths = {'a': trained_with('1', external_plugins=['/gone/plugin.py'])}
    with pytest.raises(ValueError) as e:
        arguments_of(paths)
    assert str(e.value) == (
        f"adapter 'a' ({paths['a']}): {paths['a']}/args.json says that it was trained with --external_plugins "
        '/gone/plugin.py, which is not here. Give --external_plugins with the place of the file, or give --load_args '
        'false, and --model and the rest yourself.')
    here = tmp_path / 'here.py'
    here.write_text(PLUGIN.format('here'))
    arguments_of(paths, external_plugins=[str(here)])
    assert os.environ['SWIFT_PATCH_TEST_PLUGIN'] == 'here'
    arguments_of(paths, load_args=False, model=model_dir, model_type='qwen2', template='chatml')


def test_the_plugin_of_an_args_file_is_imported_unless_another_one_is_given(trained_with: Callable[..., str],
                                                                            tmp_path: Path) -> None:
    plugins = [tmp_path / 'first.py', tmp_path / 'second.py']
    for plugin in plugins:
        plugin.write_text(PLUGIN.format(plugin.stem))
    paths = {'a': trained_with('1', external_plugins=str(plugins[0]))}
    arguments_of(paths, external_plugins=[str(plugins[1])])
    assert os.environ['SWIFT_PATCH_TEST_PLUGIN'] == 'second'
    arguments_of(paths)
    assert os.environ['SWIFT_PATCH_TEST_PLUGIN'] == 'first'


def test_the_plugin_of_swift_patch_is_the_one_that_is_here(trained_with: Callable[..., str],
                                                           told: Callable[[], List[str]], tmp_path: Path) -> None:
    other = tmp_path / 'other.py'
    other.write_text(PLUGIN.format('other'))
    own = f'/gone/{PLUGIN_PATH.name}'
    paths = {'a': trained_with('1', external_plugins=own), 'b': trained_with('3', external_plugins=[f'/other{own}'])}
    assert arguments_of(paths).external_plugins == [str(PLUGIN_PATH)]
    assert told() == []
    args = arguments_of({'a': trained_with('2', external_plugins=[str(other), own])})
    assert args.external_plugins == [str(other), str(PLUGIN_PATH)]
    assert os.environ['SWIFT_PATCH_TEST_PLUGIN'] == 'other'


def test_the_home_and_variables_are_put_into_paths(checkpoints: Dict[str, str], model_dir: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', os.path.dirname(model_dir))
    monkeypatch.setenv('THERE', str(tmp_path))
    (tmp_path / 'system.txt').write_text('Be brief.')
    (tmp_path / 'tilde.py').write_text(PLUGIN.format('tilde'))
    for home in ('~', '$HOME'):
        args = arguments_of({'a': checkpoints['peft']},
                            model=f'{home}/{os.path.basename(model_dir)}',
                            system='$THERE/system.txt',
                            external_plugins=['$THERE/tilde.py'])
        assert (args.model_dir, args.system) == (model_dir, 'Be brief.')
    assert os.environ['SWIFT_PATCH_TEST_PLUGIN'] == 'tilde'
    assert arguments_of({'a': checkpoints['peft']}, system='It costs $HOME.').system == 'It costs $HOME.'


def test_what_ms_swift_takes_of_an_args_file_is_asked_of_it() -> None:
    old, new = keys_of_args_file('3.11.2'), keys_of_args_file('4.6.0')
    for keys in (old, new):
        assert {
            'model', 'template', 'system', 'torch_dtype', 'external_plugins', 'response_prefix', 'truncation_strategy',
            'new_special_tokens', 'rope_scaling', 'task_type'
        } <= keys
        assert not {'seed', 'adapters', 'max_new_tokens', 'val_dataset', 'load_args'} & keys
    assert new - old in (frozenset(), frozenset({'model_type'}))


def test_one_process_of_several_joins_the_others_for_a_dataset_alone(checkpoints: Dict[str, str], tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist
    for key, value in {
            'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost',
            'MASTER_PORT': '0'
    }.items():  # yapf: disable
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match='runs in one process, but this is one of several'):
        swift_arguments({}, find_checkpoints({'a': checkpoints['peft']}))
    assert not dist.is_initialized()
    arguments_of({'a': checkpoints['peft']})
    try:
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()
