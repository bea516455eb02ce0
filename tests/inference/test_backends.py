"""A backend that is not there, or cannot do what is asked, is told in one line before anything is loaded."""
import pytest
import sys
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List

from swift_patch import cli
from swift_patch.inference.backends import check_backend, import_backend
from swift_patch.inference.config import InferConfig
from swift_patch.vllm_plugin import installed


def config(swift_args: Dict[str, Any], **changes: Any) -> InferConfig:
    return InferConfig({}, 'data.jsonl', swift_args=swift_args, **changes)


@pytest.fixture
def has_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is something that is called vllm, and the plugin for it."""
    monkeypatch.setattr(installed, 'find_spec', lambda name: True)
    monkeypatch.setattr(installed, 'entry_points', lambda group: [EntryPoint('swift_patch', 'a:b', group)])
    monkeypatch.delenv('VLLM_PLUGINS', raising=False)


@pytest.mark.skipif(find_spec('vllm') is not None, reason='vLLM is installed')
@pytest.mark.parametrize('command', ['infer', 'deploy'])
def test_without_vllm_a_command_says_how_to_install_it(command: str, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture) -> None:
    arguments: List[str] = [command, '--adapters', 'a=nowhere', '--infer_backend', 'vllm']
    assert cli.main(arguments + ['--val_dataset', 'nowhere'] * (command == 'infer')) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("--infer_backend vllm needs vLLM, which is not installed: pip install 'swift-patch[vllm]'")


def test_a_package_that_vllm_cannot_find_the_plugin_of_is_told(has_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, 'entry_points', lambda group: [EntryPoint('other', 'a:b', group)])
    with pytest.raises(ValueError, match='installed package'):
        check_backend(config({'infer_backend': 'vllm'}))


@pytest.mark.parametrize('listed', ['', 'swift_uembed', 'swift_patch2,other'])
def test_a_list_of_plugins_without_this_one_is_told(has_vllm: None, monkeypatch: pytest.MonkeyPatch,
                                                    listed: str) -> None:
    monkeypatch.setenv('VLLM_PLUGINS', listed)
    with pytest.raises(ValueError, match='VLLM_PLUGINS is expected to have swift_patch in it'):
        check_backend(config({'infer_backend': 'vllm'}))
    monkeypatch.setenv('VLLM_PLUGINS', f'{listed},swift_patch')
    check_backend(config({'infer_backend': 'vllm'}))


def test_a_vllm_that_lacks_something_is_told_with_what_it_lacks(has_vllm: None,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'vllm', ModuleType('vllm'))
    for name in ('vllm.lora', 'vllm.lora.lora_model'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=r"cannot use the vLLM that is installed: .*vllm.*\. pip install 'swift"):
        import_backend(config({'infer_backend': 'vllm'}))


@pytest.mark.parametrize(('swift_args', 'changes', 'told'), [
    ({'num_beams': 2}, {}, '--num_beams'),
    ({}, {'compile_merging': True}, '--compile_merging'),
    ({}, {'max_batch_size': 0}, '--max_batch_size'),
])  # yapf: disable
def test_what_vllm_cannot_do_is_told(has_vllm: None, swift_args: Dict[str, Any], changes: Dict[str, Any],
                                     told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_backend(config({'infer_backend': 'vllm', **swift_args}, **changes))
    if told != '--max_batch_size':
        check_backend(config(swift_args, **changes))
