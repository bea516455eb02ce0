"""What each part changes in the sources of ms-swift: a table of lines that are there, and of what takes their place.

What is new and longer than a few lines is the code of `fix.py`, `activation.py` and `refill.py`, word for word.
"""
import ast
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

_BASE, _LORA, _LAYERS, _UTILS = (f'swift/tuners/{name}.py' for name in ('base', 'lora', 'lora_layers', 'utils'))


class UnexpectedCode(ValueError):
    """A checkout does not look as expected, so that an edit has no place."""


class Edit(NamedTuple):
    """One place that is changed.

    Attributes:
        path: the file in the checkout.
        old: the whole lines that are there, once.
        new: the lines that take their place.
    """
    path: str
    old: str
    new: str

    def applied(self, source: str) -> str:
        """Returns the file with the edit.

        Raises:
            UnexpectedCode: the lines are not there, or more than once.
        """
        # From the margin on: another line may end in the same way.
        result, found = re.subn(f'(?m)^{re.escape(self.old)}', lambda _: self.new, source)
        if found != 1:
            raise UnexpectedCode(f'{self.path} is expected to have these lines once, found them {found} times. Is this '
                                 f'a release of ms-swift that swift_patch supports?\n{self.old}')
        return result


class Concern(NamedTuple):
    """Edits that are made together, or not at all.

    Attributes:
        path: the file that tells whether ms-swift has it already.
        done: a pattern that is found there if so, also after the edits.
        edits: the edits.
    """
    path: str
    done: str
    edits: Tuple[Edit, ...]


def _after(path: str, line: str, more: str) -> Edit:
    return Edit(path, line, line + more)


def _before(path: str, line: str, more: str) -> Edit:
    return Edit(path, line, more + line)


def _code(module: str, name: str) -> str:
    """Returns the code of a function of a module beside this one, or what is in a class of it."""
    source = Path(__file__).with_name(f'{module}.py').read_text(encoding='utf-8')
    [node] = [node for node in ast.parse(source).body if getattr(node, 'name', '') == name]
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.end_lineno is not None
    begin = node.lineno - (not isinstance(node, ast.ClassDef))
    return '\n'.join(source.splitlines()[begin:node.end_lineno]).strip('\n') + '\n'


def _embedding(side: str) -> Edit:
    name = f'lora_embedding_{side}'
    return Edit(
        _BASE, f"                if f'{name}.{{adapter_name}}.' not in key and '{name}' in key:\n"
        '                    state_dict.pop(key, None)\n'
        f"                    key = key.replace('{name}.', f'{name}.{{adapter_name}}.')\n",
        f"                if key.endswith('{name}'):\n"
        '                    state_dict.pop(key, None)\n'
        "                    key = f'{key}.{adapter_name}'\n")


# In calls that make a layer, and in those that extend one: peft's config.
_MAKES, _EXTENDS = r'new_module = \w+\([^)]*\bconfig=|get_compat_kwargs\(_Emb', r'update_layer\([^)]*(\bconfig=|\*\*)'

# By part, in the order in which they are sent.
CONCERNS: Dict[str, Tuple[Concern, ...]] = {
    'fix': (
        Concern(_LAYERS, rf'(?s)\A(?=.*({_MAKES}))(?=.*({_EXTENDS}))',
                (_before(_LAYERS, 'from itertools import chain\n', 'from inspect import Parameter, signature\n'),
                 _before(_LAYERS, 'class LoraModel(_LoraModel):\n',
                         _code('fix', 'get_compat_kwargs') + '\n\n'))),
        Concern(_LAYERS, _MAKES,
                (_after(_LAYERS, "        current_key = kwargs.pop('current_key')\n",
                        '        kwargs.update(get_compat_kwargs(_Embedding.__init__, lora_config))\n'), )),
        Concern(_LAYERS, _EXTENDS, (Edit(
            _LAYERS, '                use_dora=lora_config.use_dora,\n            )\n',
            '                use_dora=lora_config.use_dora,\n'
            '                **get_compat_kwargs(target.update_layer, lora_config),\n            )\n'), )),
        Concern(_BASE, r'endswith\([^\n]*lora_embedding', (_embedding('A'), _embedding('B'))),
    ),
    'activation': (
        Concern(_BASE, r'get_activated_adapters\(\)', (
            Edit(_BASE, 'from .utils import SwiftConfig, SwiftOutput\n',
                 'from .utils import ActivationMixin, ModulesToSaveWrapper, SwiftAdapter, SwiftConfig, SwiftOutput\n'),
            Edit(
                _BASE, '        for adapter_name in (set(self.adapters.keys()) - adapter_names):\n'
                '            self.deactivate_adapter(adapter_name, offload)\n',
                '        inactive = set(self.adapters.keys()) - adapter_names\n'
                '        if not offload:\n'
                '            inactive -= self._get_inactive_loras()\n'
                '        with SwiftAdapter.collect_garbage_once():\n'
                '            for adapter_name in inactive:\n'
                '                self.deactivate_adapter(adapter_name, offload)\n'),
            _before(_BASE, '    def activate_adapter(self, adapter_name: str):\n',
                    _code('activation', 'SwiftModel') + '\n'),
            Edit(
                _BASE, '        SWIFT_MAPPING[self.adapters[adapter_name].config.swift_type][1]\\\n'
                '            .activate_adapter(self.base_model, adapter_name, False, offload=offload)\n',
                '        with SwiftAdapter.collect_garbage_once():\n'
                '            SWIFT_MAPPING[self.adapters[adapter_name].config.swift_type][1]\\\n'
                '                .activate_adapter(self.base_model, adapter_name, False, offload=offload)\n'),
            _before(_UTILS, 'from dataclasses import asdict, dataclass, field\n',
                    'from contextlib import contextmanager\n'),
            _after(_UTILS, '    offload_helper = None\n', _code('activation', 'SwiftAdapter')),
            Edit(
                _UTILS, '            raise NotImplementedError\n        gc_collect()\n',
                '            raise NotImplementedError\n'
                "        if hasattr(SwiftAdapter._offloading, 'has_garbage'):\n"
                '            SwiftAdapter._offloading.has_garbage = True\n'
                '        else:\n'
                '            gc_collect()\n'),
        )),
        Concern(_LORA, r'list\(module\.modules\(\)\)', (
            Edit(
                _LORA, '        set_adapter(module, adapter_name, activate, offload)\n'
                '        for sub_module in module.modules():\n', '        sub_modules = list(module.modules())\n'
                '        set_adapter(sub_modules, adapter_name, activate, offload)\n'
                '        for sub_module in sub_modules:\n'),
            Edit(_UTILS,
                 'def set_adapter(model, adapter_name, activate, offload):\n    for module in model.modules():\n',
                 'def set_adapter(modules, adapter_name, activate, offload):\n    for module in modules:\n'),
        )),
    ),
    'refill': (Concern(_BASE, r'def update_weighted_adapter\(', (
        _before(_BASE, 'import os\n', 'import math\n'),
        _after(_BASE, 'from copy import copy\n', 'from dataclasses import replace\n'),
        _after(_BASE, '            optimizer_group_callback=None,\n', '            weighted=True,\n'),
        _before(_BASE, '    def save_pretrained(self,\n',
                _code('refill', 'SwiftModel') + '\n'),
        _after(_UTILS, '        load_callback (`FunctionType`): A callback used to load trained model.\n',
               '        weighted (`bool`): Made by `SwiftModel.add_weighted_adapter`, which may be refilled.\n'),
        _after(_UTILS, '    load_callback: FunctionType = None\n', '    weighted: bool = False\n'),
    )), ),
}


def edits(part: str, sources: Dict[str, str]) -> List[Edit]:
    """Returns the edits of a part that a checkout needs.

    Args:
        part: One of `CONCERNS`.
        sources: What the files of the checkout hold, by path.
    """
    return [
        edit for concern in CONCERNS[part] if not re.search(concern.done, sources[concern.path])
        for edit in concern.edits
    ]


def paths(part: str) -> List[str]:
    """Returns the files that a part is about."""
    return sorted({edit.path for concern in CONCERNS[part] for edit in concern.edits})


def is_in(part: str, sources: Dict[str, str]) -> bool:
    """Whether a checkout has the code of a part, and not something else instead of all of it."""
    return any(all(edit.new in sources[edit.path] for edit in concern.edits) for concern in CONCERNS[part])
