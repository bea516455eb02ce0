"""Whether there is a vLLM that requests with fusions of their own can be answered by."""
import os
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

from ..errors import reason_of

_GROUP, _PLUGIN, _LIST = 'vllm.general_plugins', 'swift_patch', 'VLLM_PLUGINS'
_INSTALL = "pip install 'swift-patch[vllm]'"


def check_installed() -> None:
    """Raises ValueError where there is no vLLM, or where it would not find the plugin in its own processes."""
    if find_spec('vllm') is None:
        raise ValueError(f'--infer_backend vllm needs vLLM, which is not installed: {_INSTALL}')
    if not any(entry.name == _PLUGIN for entry in entry_points(group=_GROUP)):
        raise ValueError(
            '--infer_backend vllm needs swift-patch as an installed package, for vLLM looks for the plugin '
            f'{_PLUGIN} in the group {_GROUP}: {_INSTALL}')
    listed = os.environ.get(_LIST)
    if listed is not None and _PLUGIN not in listed.split(','):
        raise ValueError(f'{_LIST} is expected to have {_PLUGIN} in it, found {listed!r}: add it, or unset {_LIST}.')


def import_vllm() -> None:
    """Imports what is used of vLLM. Raises ValueError where that is not there."""
    try:
        for module in ('vllm.lora.lora_model', 'vllm.lora.worker_manager', 'vllm.v1.engine.async_llm'):
            import_module(module)
        import_module('swift_patch.vllm_plugin.engine')
    except Exception as e:  # of another release, or broken by what is installed beside it
        raise ValueError(f'--infer_backend vllm cannot use the vLLM that is installed: {reason_of(e)}. {_INSTALL} '
                         'brings one that it can.') from e
