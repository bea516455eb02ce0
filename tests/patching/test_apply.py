import importlib
import inspect
import json
import os
import pytest
import subprocess
import sys
from peft.tuners.lora import LoraModel
from swift.tuners import LoRA, SwiftModel

import swift_patch
from swift_patch import patching
from swift_patch.cli.doctor import PLUGIN

REPORT = '''
import json, sys
print(json.dumps({
    'torch': 'torch' in sys.modules,
    'swift': 'swift' in sys.modules,
    'in force': len(patching.in_force()) + len(patching.needless()),
    # The others wait for their modules.
    'all': sum(patch.after in sys.modules for patch in patching.PATCHES),
    'table': len(patching.PATCHES),
    'is applied': swift_patch.is_applied(),
}))
'''


def run(code, **environ):
    """Runs `code` in a new process and returns what it reports."""
    process = subprocess.run(
        [sys.executable, '-c', code + '\nimport swift_patch\nfrom swift_patch import patching\n' + REPORT],
        env={
            **os.environ,
            **environ
        },
        capture_output=True,
        text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def applied_at_the_end():
    yield
    swift_patch.apply()


def owner_and_name(patch):
    owner, attribute = patch.target.split('.')
    return getattr(importlib.import_module(patch.module), owner), attribute


def attributes():
    found = {}
    for patch in patching.PATCHES:
        owner, attribute = owner_and_name(patch)
        found[patch] = vars(owner).get(attribute)
    return found


def test_importing_it_imports_neither_ms_swift_nor_torch():
    report = run('')
    assert not report['torch'] and not report['swift']
    assert report['is applied'] and report['in force'] == 0


@pytest.mark.parametrize('code', [
    'import swift_patch\nfrom swift.tuners import SwiftModel',
    'from swift.tuners import SwiftModel\nimport swift_patch',
    'import swift\nimport swift_patch\nswift_patch.apply()\nfrom swift.tuners import SwiftModel\nswift_patch.apply()',
    'import swift_patch\nswift_patch.revert()\nfrom swift.tuners import SwiftModel\nswift_patch.apply()',
    'import swift_patch\nfrom swift.tuners import SwiftModel\nswift_patch.revert()\nswift_patch.apply()',
])
def test_it_is_in_force_whichever_is_imported_first(code):
    report = run(code)
    assert report['in force'] == report['all'] and report['is applied']


def test_the_engine_of_ms_swift_is_patched_when_it_is_imported():
    report = run('import swift_patch\nfrom swift_patch.ms_swift import TransformersEngine')
    assert report['in force'] == report['all'] == report['table']


@pytest.mark.parametrize('code', [
    'import swift_patch\nswift_patch.revert()\nfrom swift.tuners import SwiftModel',
    'import swift_patch\nfrom swift.tuners import SwiftModel\nswift_patch.revert()\nswift_patch.revert()',
])
def test_it_is_not_in_force_after_revert(code):
    report = run(code)
    assert report['in force'] == 0 and not report['is applied']


def test_the_public_names_are_those_of_the_package():
    from swift_patch.compose import composer
    from swift_patch.lora import compiled
    assert swift_patch.FusionComposer is composer.FusionComposer
    assert swift_patch.compile_merging is compiled.compile_merging


def test_peft_alone_is_patched_without_ms_swift():
    report = run('import swift_patch\nimport peft')
    assert report['in force'] == 2 and not report['swift']


def test_the_environment_can_switch_it_off():
    report = run('import swift_patch\nfrom swift.tuners import SwiftModel', SWIFT_PATCH_DISABLE='1')
    assert report['in force'] == 0 and not report['is applied']


def test_the_external_plugin_of_ms_swift_applies_it():
    report = run(f'from swift.utils import import_external_file\nfrom swift.tuners import SwiftModel\n'
                 f'import_external_file({str(PLUGIN)!r})\nassert "swift_patch" in __import__("sys").modules')
    assert report['in force'] == report['all']


def test_revert_puts_back_the_very_objects_and_removes_what_was_added():
    swift_patch.apply()

    swift_patch.revert()
    stock = attributes()
    assert 'update_weighted_adapter' not in {**vars(SwiftModel), **vars(LoraModel)}
    assert SwiftModel.set_active_adapters.__module__ == 'swift.tuners.base'
    assert isinstance(vars(LoRA)['activate_adapter'], staticmethod)
    swift_patch.apply()
    swift_patch.apply()
    applied = attributes()
    assert {patch for patch in stock if applied[patch] is stock[patch]} == set(patching.needless())
    swift_patch.revert()
    assert all(attributes()[patch] is stock[patch] for patch in stock)


def test_where_stock_is_wanted_what_it_cannot_run_without_stays():
    swift_patch.revert()
    stock = attributes()
    swift_patch.apply()
    needed = set(patching.in_force())
    with patching.reverted():
        assert not swift_patch.is_applied()
        changed = {patch for patch, value in attributes().items() if value is not stock[patch]}
        assert changed == {patch for patch in needed if patch.is_fix}
    assert swift_patch.is_applied() and set(patching.in_force()) == needed


def test_every_replacement_takes_the_arguments_of_what_it_replaces():
    swift_patch.revert()
    stock = {}
    for patch in patching.PATCHES:
        owner, attribute = owner_and_name(patch)
        stock[patch] = getattr(owner, attribute, vars(owner).get('add_weighted_adapter'))
    swift_patch.apply()
    for patch, function in stock.items():
        new = list(inspect.signature(getattr(*owner_and_name(patch))).parameters.values())
        old = list(inspect.signature(function).parameters.values())
        assert [parameter.name for parameter in new] == [parameter.name for parameter in old]
        if not patch.target.endswith('update_weighted_adapter'):
            assert [parameter.default for parameter in new] == [parameter.default for parameter in old]


@pytest.mark.parametrize('call', [swift_patch.apply, swift_patch.revert, swift_patch.is_applied])
def test_what_takes_no_arguments_takes_none(call):
    with pytest.raises(TypeError):
        call(False)
    assert swift_patch.is_applied() and {*patching.in_force(), *patching.needless()} == set(patching.PATCHES)


@pytest.mark.parametrize('module', [
    'model.activation', 'model.adapters', 'model.index', 'model.methods', 'model.plan', 'compose.composer',
    'lora.merging', 'patching.fixes'
])
def test_it_is_in_force_whichever_of_its_modules_is_imported_first(module):
    report = run(f'import swift_patch.{module}\nimport swift.tuners.base')
    assert report['in force'] == report['all']
