"""The tests would notice: each of these deliberate defects, put into a copy of the package, makes some test fail."""
import forkserver
import pytest
import shutil
import sys
from pathlib import Path
from typing import List, NamedTuple, Tuple

TESTS = Path(__file__).parent
DEADLINE = 300


class Defect(NamedTuple):
    """One defect.

    Attributes:
        words: what it breaks.
        module: the file of the package.
        old: what stands there, once.
        new: what to put there.
        caught_by: the file of tests, and which of them (as `-k`), that must fail.
    """
    words: str
    module: str
    old: str
    new: str
    caught_by: Tuple[str, str]


DEFECTS = [
    Defect('linear loses the sign of a weight', 'weighted_adapter/merging.py', 'sign = 1.0 if weight >= 0 else -1.0',
           'sign = 1.0',
           ('weighted_adapter/test_weighted.py', 'updated_adapter_is_what_stock and linear and not dare')),
    Defect('linear weighs A and B by the weight instead of its root', 'weighted_adapter/merging.py',
           '_as_float32(math.sqrt(abs(weight)))', '_as_float32(abs(weight))',
           ('weighted_adapter/test_weighted.py', 'updated_adapter_is_what_stock and linear and not dare')),
    Defect('cat leaves the scaling out', 'weighted_adapter/merging.py',
           'torch.mul(source.A, source.weight * source.scaling, out=rows)',
           'torch.mul(source.A, source.weight, out=rows)', ('weighted_adapter/test_merging.py', 'cat_makes')),
    Defect('svd counts the scaling once instead of twice', 'weighted_adapter/merging.py',
           '[_as_float32(source.weight * source.scaling) * source.scaling for',
           '[_as_float32(source.weight * source.scaling) for',
           ('weighted_adapter/test_merging.py', 'svd_of_the_factors')),
    Defect('average ignores that scalings differ', 'weighted_adapter/merging.py',
           'math.sqrt(abs(source.scaling) / reference)', '1.0',
           ('weighted_adapter/test_merging.py', 'average_does_not_depend')),
    Defect('layers that the new sources do not touch keep the earlier sample', 'weighted_adapter/weighted.py',
           "zeros = [factor for place in unwritten for factor in target.formed(place, place + 1, 'layer')]",
           'zeros = []', ('weighted_adapter/test_weighted.py', 'nothing_of_an_earlier_sample')),
    Defect('rank that is not needed keeps the earlier sample', 'weighted_adapter/lora_index.py',
           'new.A.new_zeros(slot.A.shape), new.B.new_zeros(slot.B.shape)', 'slot.A.clone(), slot.B.clone()',
           ('weighted_adapter/test_growth.py', 'smaller_one_is_padded')),
    Defect('the bias is not zeroed', 'weighted_adapter/weighted.py',
           'zeros += [layer.lora_B[adapter_name].bias for layer in layout.biased]', 'pass',
           ('weighted_adapter/test_weighted.py', 'bias_of_the_fused')),
    Defect('what was written is not undone', 'weighted_adapter/undo.py', 'self.callback(tensor.data.copy_, values)',
           'pass', ('weighted_adapter/test_weighted.py', 'whatever_is_raised_while_writing and linear')),
    Defect('where the factors lie is looked at once', 'weighted_adapter/packing.py',
           'list(map(Tensor.data_ptr, parameters)) == self.addresses', 'True',
           ('weighted_adapter/test_packing.py', 'whatever_moved')),
    Defect('memory that others hold, too, is packed', 'weighted_adapter/packing.py', ' and _is_own(parameters)', '',
           ('weighted_adapter/test_packing.py', 'others_hold')),
    Defect('what is written in one operation counts as written once', 'weighted_adapter/weighted.py',
           'torch.autograd.graph.increment_version(target.parameters)', 'pass',
           ('weighted_adapter/test_packing.py', 'counts_as_written')),
    Defect('memory for what is overwritten is handed to two at a time', 'weighted_adapter/undo.py',
           'spare.pop(device, None)', 'spare.get(device)', ('weighted_adapter/test_undo.py', 'two_at_a_time')),
    Defect('what has grown is not undone', 'weighted_adapter/growth.py',
           'undo.callback(_restore, container, name, old)', 'pass',
           ('weighted_adapter/test_growth.py', 'whose_growth_fails')),
    Defect('an add that fails leaves parameters frozen or trainable that were not', 'weighted_adapter/weighted.py',
           'undo.callback(parameter.requires_grad_, parameter.requires_grad)', 'pass',
           ('weighted_adapter/test_weighted.py', 'an_add_that_fails')),
    Defect(
        'the target is checked after it was written', 'weighted_adapter/weighted.py', """\
        check_target(loaded, plan, adapters, adapter_name)
        places = loaded.blocks(adapter_name).layout.places
        lacking = {name: batch.like for batch in plan.batches for name in batch.names if name not in places}
        grow(loaded, adapter_name, max(rank for rank, _ in plan.fresh.values()), lacking, undo)
        _write(loaded, adapter_name, _pruned_at_random(loaded, plan), partial(_merge, plan), undo)
        loaded.remember(adapter_name, options, plan.config, plan.fresh)
        undo.commit()
""", """\
        places = loaded.blocks(adapter_name).layout.places
        lacking = {name: batch.like for batch in plan.batches for name in batch.names if name not in places}
        grow(loaded, adapter_name, max(rank for rank, _ in plan.fresh.values()), lacking, undo)
        _write(loaded, adapter_name, _pruned_at_random(loaded, plan), partial(_merge, plan), undo)
        loaded.remember(adapter_name, options, plan.config, plan.fresh)
        undo.commit()
        check_target(loaded, plan, adapters, adapter_name)
""", ('weighted_adapter/test_plan.py', 'bad_input and (itself or dora)')),
    Defect('a trained adapter of a fused one\'s name is taken for it', 'weighted_adapter/adapters.py',
           'record is not None and record.config is self.configs.get(name)', 'record is not None',
           ('weighted_adapter/test_plan.py', 'took_the_name')),
    Defect('the index of layers never goes stale', 'weighted_adapter/lora_index.py',
           'isinstance(index, cls) and index._is_current(model)', 'isinstance(index, cls)',
           ('weighted_adapter/test_lora_index.py', 'notices')),
    Defect('the composer does not see that a source was written to', 'weighted_adapter/composer.py',
           "list(map(attrgetter('_version'), found.parameters))", '[]',
           ('weighted_adapter/test_composer.py', 'is_done_where_a_source_changed')),
    Defect('the composer does not see that a source has other data', 'weighted_adapter/composer.py',
           'layout.names, layout.addresses, ', '',
           ('weighted_adapter/test_composer.py', 'is_done_where_a_source_changed')),
    Defect('the composer does not see that a source was written to through `.data`', 'weighted_adapter/composer.py',
           'map(torch.equal, last.values, _samples(sources, loaded))', '[]',
           ('weighted_adapter/test_composer.py', 'written_through_data')),
    Defect('a `fused` block does not hold the lock', 'weighted_adapter/composer.py', 'with self._model_lock.lock:',
           'with ExitStack():', ('weighted_adapter/test_composer.py', 'another_threads_compose_waits')),
    Defect('composers of one model have a lock each', 'weighted_adapter/composer.py',
           '_locks.setdefault(loaded.model, _ModelLock())', '_ModelLock()',
           ('weighted_adapter/test_composer.py', 'another_threads_compose_waits')),
    Defect('which adapters are active is asked per model instead of per thread', 'weighted_adapter/activation.py',
           'states = layer._thread_inf.get(thread, {})', 'states = next(iter(layer._thread_inf.values()), {})',
           ('weighted_adapter/test_activation.py', 'threads_keep_their_own or new_thread_starts')),
    Defect('the wrapper is asked what is active instead of the layers', 'weighted_adapter/activation.py',
           'switch_adapters(self.base_model, active & loras, loras - active, offload)',
           'switch_adapters(self.base_model, active & loras, loras & set(self.active_adapters) - active, offload)',
           ('weighted_adapter/test_activation.py', 'two_wrappers')),
    Defect(
        'only adapters that were active are offloaded', 'weighted_adapter/activation.py',
        'for name in [name for name, is_active in states.items() if is_active and name in deactivate]:',
        'deactivate = {name for name, is_active in states.items() if is_active and name in deactivate}\n'
        '        for name in deactivate:',
        ('weighted_adapter/test_activation.py', 'inactive_adapter_that_is_not_offloaded')),
    Defect('revert leaves what was replaced', 'patching.py', 'setattr(owner, attribute, original)', 'pass',
           ('test_patching.py', 'puts_back_the_very_objects')),
]


def run_tests(package: Path, selections: List[Tuple[str, str]]) -> None:
    """Runs tests on a copy of the package and exits like the first pytest that does not pass."""
    import os
    assert 'swift_patch' not in sys.modules
    # Before the directory of the editable installation, and for the processes that tests start, too.
    sys.path.insert(0, str(package.parent))
    os.environ['PYTHONPATH'] = str(package.parent)
    os.chdir(package.parent)
    for file, expression in selections:
        code = pytest.main([str(TESTS / file), '-k', expression, '-x', '-q', '-p', 'no:cacheprovider', '-W', 'ignore'])
        loaded = {name: module.__file__ for name, module in sys.modules.items() if name.split('.')[0] == 'swift_patch'}
        assert loaded and all(Path(str(path)).is_relative_to(package) for path in loaded.values()), loaded
        if code:
            sys.exit(code)


def outcome(root: Path, selections: List[Tuple[str, str]]) -> Tuple[int, str]:
    """The exit code of `run_tests` on the copy in `root`, and what was printed."""
    log = root / 'log.txt'
    process = forkserver.start(run_tests, log, root / 'swift_patch', selections)
    process.join(DEADLINE)
    assert process.exitcode is not None, log.read_text()[-3000:]
    return process.exitcode, log.read_text()


def copy_package(root: Path) -> Path:
    return shutil.copytree(
        TESTS.parent / 'swift_patch', root / 'swift_patch', ignore=shutil.ignore_patterns('__pycache__'))


@pytest.mark.parametrize('file', dict.fromkeys(defect.caught_by[0] for defect in DEFECTS))
def test_without_a_defect_the_tests_pass(file, tmp_path):
    copy_package(tmp_path)
    code, printed = outcome(tmp_path, list(dict.fromkeys(d.caught_by for d in DEFECTS if d.caught_by[0] == file)))
    assert code == 0, printed[-3000:]


@pytest.mark.parametrize('defect', DEFECTS, ids=lambda defect: defect.words)
def test_a_defect_is_caught(defect, tmp_path):
    module = copy_package(tmp_path) / defect.module
    source = module.read_text(encoding='utf-8')
    assert source.count(defect.old) == 1, f'bring `old` up to date with {defect.module}: {defect.old!r}'
    module.write_text(source.replace(defect.old, defect.new), encoding='utf-8')
    code, printed = outcome(tmp_path, [defect.caught_by])
    # Not 2 to 5, where tests could not be collected or there were none.
    assert code == 1 and ' failed' in printed.splitlines()[-1], printed[-3000:]
