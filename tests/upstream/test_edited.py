"""An ms-swift with the parts, without swift_patch and beside it."""
import json
import os
import pytest
import subprocess
import sys
from pathlib import Path
from upstream_checkout import copy_of_ms_swift

from swift_patch.cli import main
from swift_patch.upstream.parts import PARTS, TESTS

ROOT = Path(__file__).parents[2]


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


def beside(folder):
    """The path on which both an edited ms-swift and this swift_patch are found first."""
    return os.pathsep.join([str(folder), str(ROOT)])


def passes_its_test(folder, part):
    """Whether the test of a part passes where importing swift_patch fails, as where it is not installed."""
    # By its path: a release of ms-swift installs a package named `tests`.
    code = ("import runpy, sys; sys.modules['swift_patch'] = None; sys.argv[1:] = []; "
            f"runpy.run_path('tests/tuners/{TESTS[part]}', run_name='__main__')")
    printed = run(folder, '-c', code, PYTHONPATH=str(folder))
    return 'OK' in printed and 'Ran 0 tests' not in printed


@pytest.mark.parametrize('part', PARTS)
def test_the_test_of_each_part_passes_with_the_others(edited_copy, part):
    assert passes_its_test(edited_copy, part)


@pytest.fixture(scope='module')
def mended_copy(tmp_path_factory):
    """A copy with the fix alone: what ms-swift does where it can do anything."""
    folder = copy_of_ms_swift(tmp_path_factory.mktemp('mended'))
    assert main(['upstream', '--repo', str(folder), '--part', 'fix']) == 0
    return folder


# The others alone need peft below 0.19, or the fix.
def test_the_test_of_the_fix_passes_alone(mended_copy):
    assert passes_its_test(mended_copy, 'fix')


def test_random_switching_leaves_what_it_left_without_the_parts(mended_copy, edited_copy, tmp_path):
    traces = []
    for folder in (mended_copy, edited_copy):
        trace = tmp_path / 'trace.json'
        script = Path(__file__).with_name('switching.py')
        run(tmp_path, str(script), str(folder), '3', str(trace), PYTHONPATH=str(folder))
        traces.append(json.loads(trace.read_text()))
    steps = [step for trace in traces[0] for step in trace]
    assert len(steps) > 300 and {kind for kind, _ in steps if isinstance(kind, int)} == set(range(10))
    assert traces[1] == traces[0]


# `make upstream-test` runs more of them.
@pytest.mark.parametrize('tests', ['model/test_activation.py', 'model/test_growth.py'])
def test_the_plugin_does_beside_them_what_it_does_alone(edited_copy, tests):
    printed = run(
        ROOT, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'tests/{tests}', PYTHONPATH=beside(edited_copy))
    assert ' passed' in printed and 'failed' not in printed


REPORT = '''
import swift
from pathlib import Path
assert Path(swift.__file__).parents[1] == Path.cwd(), swift.__file__
from swift_patch import patching
assert swift_patch.is_applied()
needless = {patch.target for patch in patching.needless()}
assert needless == {'LoraModel._create_new_module', 'LoraModel._create_and_replace', 'SwiftModel.load_state_dict'}
waiting = {patch.target for patch in patching.PATCHES if patch.after not in __import__('sys').modules}
assert len(patching.in_force()) + len(needless) + len(waiting) == len(patching.PATCHES)
from swift.tuners import SwiftModel
assert SwiftModel.update_weighted_adapter.__module__.startswith('swift_patch.')
swift_patch.revert()
for name in ('add_weighted_adapter', 'update_weighted_adapter', 'set_active_adapters', 'load_state_dict'):
    assert getattr(SwiftModel, name).__module__ == 'swift.tuners.base'
print('taken over and given back')
'''


@pytest.mark.parametrize('code', [
    'import swift_patch\nimport swift.tuners.base',
    'import swift.tuners.base\nimport swift_patch',
])
def test_the_plugin_takes_over_the_methods_and_mends_nothing(edited_copy, code):
    assert 'taken over and given back' in run(edited_copy, '-c', code + REPORT, PYTHONPATH=beside(edited_copy))
