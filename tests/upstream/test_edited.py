"""An ms-swift with the edit, without swift_patch and beside it."""
import os
import pytest
import shutil
import subprocess
import sys
from pathlib import Path, PurePath

from swift_patch.upstream.change import TEST

TESTS = Path(__file__).parent.parent


def run(folder, *command, **environ):
    process = subprocess.run([sys.executable, *command],
                             cwd=folder,
                             env={
                                 **os.environ,
                                 **environ
                             },
                             capture_output=True,
                             text=True)
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    return process.stdout + process.stderr


def beside(edited_copy, code):
    """Runs code where the edited ms-swift is the one that is imported, and returns what it prints."""
    return run(edited_copy, '-c', code, PYTHONPATH=str(edited_copy))


def test_the_test_that_it_adds_passes(edited_copy):
    # Where importing swift_patch fails, as where it is not installed.
    code = ("import sys, unittest; sys.modules['swift_patch'] = None; "
            f"unittest.main(module=None, argv=['unittest', 'discover', {str(PurePath(TEST).parent)!r}])")
    printed = beside(edited_copy, code)
    assert 'OK' in printed and 'Ran 0 tests' not in printed


# `make upstream-test` runs all of them.
@pytest.mark.parametrize('tests', ['test_activation.py', 'test_growth.py', 'test_undo.py'])
def test_the_suite_pointed_at_it_passes(edited_copy, tests):
    printed = run(TESTS.parent, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'tests/weighted_adapter/{tests}',
                  '--ms-swift', str(edited_copy))
    assert ' passed' in printed and 'failed' not in printed


def test_where_it_is_installed_the_edit_still_changes_nothing_more(edited_copy):
    code = f"from swift_patch.cli import main; main(['upstream', '--repo', {str(edited_copy)!r}])"
    assert 'nothing was changed' in beside(edited_copy, code)


def test_a_folder_that_another_branch_left_is_no_edit(edited_copy, tmp_path):
    from swift_patch.stepping_aside import ms_swift_has_it
    left = tmp_path / 'swift' / 'tuners' / 'weighted_adapter'
    shutil.copytree(edited_copy / 'swift' / 'tuners' / 'weighted_adapter', left)
    for folder in (left.parent.parent, left.parent):
        (folder / '__init__.py').touch()
    (left.parent / 'base.py').write_text('class SwiftModel:\n    pass\n')
    code = f'from {ms_swift_has_it.__module__} import ms_swift_has_it; print(ms_swift_has_it())'
    assert 'True' in beside(edited_copy, code)
    assert 'False' in beside(tmp_path, code)


REPORT = '''
from swift_patch import patching
assert swift_patch.is_applied()
assert [patch.module.split('.')[0] for patch in patching.in_force()] == ['peft', 'peft']
assert len(patching.in_force()) + len(patching.needless()) == len(patching.PATCHES)
from swift.tuners import SwiftModel, LoRA
from swift.tuners.weighted_adapter import activation, composer, weighted
from peft.tuners.lora import LoraModel
import swift_patch.weighted_adapter.weighted
assert swift_patch.weighted_adapter.weighted is weighted and weighted.__spec__.name == weighted.__name__
assert swift_patch.FusionComposer is composer.FusionComposer
assert LoraModel.update_weighted_adapter is weighted.update_weighted_adapter
assert SwiftModel.set_active_adapters.__module__ == 'swift.tuners.base'
swift_patch.revert()
assert SwiftModel.set_active_adapters.__module__ == 'swift.tuners.base'
print('stepped aside')
'''


@pytest.mark.parametrize('code', [
    'import swift_patch\nimport swift.tuners.base',
    'import swift.tuners.base\nimport swift_patch',
    'import swift_patch\nimport peft\nimport swift.tuners.base',
    'import swift_patch\nimport swift_patch.weighted_adapter.plan\nimport swift.tuners.base',
    'import swift_patch\nimport swift.tuners.weighted_adapter.composer\nimport swift.tuners.base',
])
def test_the_plugin_steps_aside_whichever_is_imported_first(edited_copy, code):
    assert 'stepped aside' in beside(edited_copy, code + REPORT)


def test_importing_the_plugin_beside_it_imports_nothing(edited_copy):
    beside(edited_copy, "import swift_patch, sys; assert not {'swift', 'torch', 'peft'} & set(sys.modules)")


def test_peft_alone_is_patched_beside_it(edited_copy):
    code = 'import swift_patch, peft; peft.tuners.lora.LoraModel.update_weighted_adapter'
    beside(edited_copy, code)


def test_there_is_no_stock_to_compare_with(edited_copy):
    code = ('import swift_patch.patching as p\ntry:\n    p.reverted().__enter__()\nexcept ValueError as e:\n'
            "    print('refused:', e)")
    assert 'refused: The installed ms-swift has' in beside(edited_copy, code)
