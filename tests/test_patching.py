import json
import os
import pytest
import subprocess
import sys
from peft.tuners.lora import LoraModel
from swift.tuners import LoRA, SwiftModel
from swift.tuners.utils import SwiftAdapter

import swift_patch
from swift_patch import patching
from swift_patch.cli.doctor import PLUGIN

OWNERS = {'LoraModel': LoraModel, 'SwiftModel': SwiftModel, 'LoRA': LoRA, 'SwiftAdapter': SwiftAdapter}
REPORT = '''
import json, sys
print(json.dumps({
    'torch': 'torch' in sys.modules,
    'swift': 'swift' in sys.modules,
    'in force': len(patching.in_force()),
    'all': len(patching.PATCHES),
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


def attributes():
    found = {}
    for patch in patching.PATCHES:
        owner, attribute = patch.target.split('.')
        found[patch.target] = vars(OWNERS[owner]).get(attribute)
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


@pytest.mark.parametrize('code', [
    'import swift_patch\nswift_patch.revert()\nfrom swift.tuners import SwiftModel',
    'import swift_patch\nfrom swift.tuners import SwiftModel\nswift_patch.revert()\nswift_patch.revert()',
])
def test_it_is_not_in_force_after_revert(code):
    report = run(code)
    assert report['in force'] == 0 and not report['is applied']


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
    assert stock['SwiftModel.update_weighted_adapter'] is None and stock['LoraModel.update_weighted_adapter'] is None
    assert stock['SwiftModel.set_active_adapters'].__module__ == 'swift.tuners.base'
    assert isinstance(stock['LoRA.activate_adapter'], staticmethod)
    swift_patch.apply()
    swift_patch.apply()
    assert all(attributes()[name] is not stock[name] for name in stock)
    swift_patch.revert()
    assert all(attributes()[name] is stock[name] for name in stock)


def test_every_replacement_takes_the_arguments_of_what_it_replaces():
    import inspect
    swift_patch.revert()
    stock = {
        patch.target: getattr(OWNERS[patch.target.split('.')[0]],
                              patch.target.split('.')[1], None)
        for patch in patching.PATCHES
    }
    swift_patch.apply()
    for target, function in stock.items():
        owner, attribute = target.split('.')
        new = list(inspect.signature(getattr(OWNERS[owner], attribute)).parameters.values())
        if function is None:
            function = vars(SwiftModel)['add_weighted_adapter']
        old = list(inspect.signature(function).parameters.values())
        assert [parameter.name for parameter in new] == [parameter.name for parameter in old]
        if attribute != 'update_weighted_adapter':
            assert [parameter.default for parameter in new] == [parameter.default for parameter in old]


@pytest.mark.parametrize('module', ['activation', 'adapters', 'compat', 'composer', 'lora_index', 'plan', 'weighted'])
def test_it_is_in_force_whichever_of_its_modules_is_imported_first(module):
    report = run(f'import swift_patch.{module}\nimport swift.tuners.base')
    assert report['in force'] == report['all']
