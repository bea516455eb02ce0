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
    Defect('linear loses the sign of a weight', 'lora/merging.py', 'sign = 1.0 if weight >= 0 else -1.0', 'sign = 1.0',
           ('model/test_refill.py', 'updated_adapter_is_what_stock and linear and not dare')),
    Defect('linear weighs A and B by the weight instead of its root', 'lora/merging.py',
           'as_float32(math.sqrt(abs(weight)))', 'as_float32(abs(weight))',
           ('model/test_refill.py', 'updated_adapter_is_what_stock and linear and not dare')),
    Defect('cat leaves the scaling out', 'lora/merging.py',
           'torch.mul(source.A, source.weight * source.scaling, out=rows)',
           'torch.mul(source.A, source.weight, out=rows)', ('lora/test_merging.py', 'cat_makes')),
    Defect('svd counts the scaling once instead of twice', 'lora/decomposed.py',
           '[as_float32(source.weight * source.scaling) * source.scaling for',
           '[as_float32(source.weight * source.scaling) for', ('lora/test_merging.py', 'svd_of_the_factors')),
    Defect('average ignores that scalings differ', 'lora/merging.py', 'math.sqrt(abs(source.scaling) / reference)',
           '1.0', ('lora/test_merging.py', 'average_does_not_depend')),
    Defect('layers that the new sources do not touch keep the earlier sample', 'model/write.py',
           'for name in layout.places.keys() - plan.layers.keys():', 'for name in ():',
           ('model/test_refill.py', 'nothing_of_an_earlier_sample')),
    Defect('rank that is not needed keeps the earlier sample', 'lora/factors.py',
           'new.A.new_zeros(target.A.shape), new.B.new_zeros(target.B.shape)', 'target.A.clone(), target.B.clone()',
           ('model/test_growth.py', 'smaller_one_is_padded')),
    Defect('the bias is not zeroed', 'model/write.py', 'for place in layout.biased:', 'for place in ():',
           ('model/test_refill.py', 'bias_of_the_fused')),
    Defect('what was written is not undone', 'model/undo.py', 'self.callback(_put_back, tensor, values)', 'pass',
           ('model/test_refill.py', 'whatever_is_raised_while_writing and linear')),
    Defect('where the factors lie is looked at once', 'model/packing.py',
           'list(map(Tensor.data_ptr, parameters)) == self.addresses', 'True',
           ('model/test_packing.py', 'whatever_moved')),
    Defect('memory that other tensors hold, too, is packed', 'model/packing.py', 'return used == tensors',
           'return True', ('model/test_packing.py', 'others_hold')),
    Defect('memory that others hold in Python is packed', 'model/packing.py', 'if references > ALONE:', 'if False:',
           ('model/test_packing.py', 'others_hold and in_storages')),
    Defect('what is written in one operation counts as written once', 'model/write.py',
           '_increment_versions(target.parameters)', 'pass', ('model/test_packing.py', 'counts_as_written')),
    Defect('memory for what is overwritten is handed to two at a time', 'model/undo.py', '        spare.clear()\n', '',
           ('model/test_undo.py', 'two_at_a_time')),
    Defect('what has grown is not undone', 'model/growth.py', 'undo.callback(_restore, container, name, old)', 'pass',
           ('model/test_growth.py', 'whose_growth_fails')),
    Defect('a key of alpha_pattern matches other layers, too', 'model/growth.py',
           'if any(end in plain for end in _ends(name)):', 'if False:',
           ('model/test_growth.py', 'names_end_with_others')),
    Defect('an add that fails leaves what PEFT did besides', 'model/new_adapter.py', 'undo.callback(tree.restore)',
           'pass', ('model/test_refill.py', 'an_add_that_fails')),
    Defect(
        'a new adapter gets all layers of its sources', 'model/plan.py',
        'for layer_name in sources.adapters.in_order(wanted):',
        'for layer_name in sources.adapters.in_order({one for name in names for one in sources.layout(name).names}):',
        ('model/test_plan.py', 'passed_over_whatever_came_before')),
    Defect('a fused adapter that something else wrote to is cut to its record', 'model/sources.py',
           'return record if intact else None', 'return record',
           ('model/test_refill.py', 'something_else_wrote_to_is_the_source')),
    Defect('the target is checked after it was written', 'model/refill.py', """\
        check_target(adapters, plan.config, plan.layers.keys(), names, name)
""", '', ('model/test_plan.py', 'bad_input and (itself or dora)')),
    Defect('a trained adapter of a fused one\'s name is taken for it', 'model/memory.py', 'found.config() is config',
           'True', ('model/test_plan.py', 'copied_config')),
    Defect('the index of layers never goes stale', 'model/index.py', 'if not is_same:', 'if False:',
           ('model/test_index.py', 'notices')),
    Defect(
        'the index of layers does not look into modules that had no children', 'model/index.py',
        '                self._parents.append(place)\n',
        '                if not children:\n                    continue\n                self._parents.append(place)\n',
        ('model/test_index.py', 'had_none')),
    Defect(
        'a `fused` block does not hold the lock', 'compose/composer.py', """\
        with self._model_lock.lock:
            self._compose(compositions, seeds, rank_by_batch)
            before""", """\
        if True:
            self._compose(compositions, seeds, rank_by_batch)
            before""", ('compose/test_composer.py', 'another_threads_compose_waits')),
    Defect('composers of one model have a lock each', 'compose/locks.py', '_locks.setdefault(model, ModelLock())',
           'ModelLock()', ('compose/test_composer.py', 'another_threads_compose_waits')),
    Defect('which adapters are active is asked per model instead of per thread', 'model/activation.py',
           'states = layer._thread_inf.get(thread, {})', 'states = next(iter(layer._thread_inf.values()), {})',
           ('model/test_activation.py', 'threads_keep_their_own or new_thread_starts')),
    Defect('the wrapper is asked what is active instead of the layers', 'model/activation.py',
           'switch_adapters(view, active & loras, loras - active, offload)',
           'switch_adapters(view, active & loras, loras & set(model.active_adapters) - active, offload)',
           ('model/test_activation.py', 'two_wrappers')),
    Defect(
        'only adapters that were active are offloaded', 'model/activation.py',
        'for name in [name for name, is_active in states.items() if is_active and name in deactivate]:',
        'deactivate = {name for name, is_active in states.items() if is_active and name in deactivate}\n'
        '        for name in deactivate:', ('model/test_activation.py', 'inactive_adapter_that_is_not_offloaded')),
    Defect('a row is computed with the B of another one', 'model/variant.py', 'torch.baddbmm(result, low, B.mT,',
           'torch.baddbmm(result, low, B.mT.roll(1, 0),', ('model/test_rows.py', 'same_sample_alone and fusion')),
    Defect('a batch of another size is computed', 'model/variant.py', 'or x.shape[0] % len(A)):', 'or False):',
           ('model/test_rows.py', 'another_size')),
    Defect('layers that get all tokens in one heap are computed', 'model/variant.py',
           'x.ndim < (2 if is_embedding else 3)', 'False', ('model/test_rows.py', 'one_heap')),
    Defect('towers for something else than text are computed', 'model/rows.py',
           'variant.is_in_text = is_in_text(variant.name)', 'pass', ('model/test_rows.py', 'towers')),
    Defect('rows that an error left half written are read', 'model/refill.py', '        own.callback(rows.hide)\n', '',
           ('model/test_rows.py', 'error_in_the_middle')),
    Defect('the base model keeps an earlier sample in its row', 'model/refill.py', 'rows.clear(number)', 'pass',
           ('model/test_rows.py', 'base_model_alone')),
    Defect('one sample leaves the rows of a batch', 'model/refill.py', '''\
        uninstall(adapters, name, own)
        adapters = grow''', '''\
        adapters = grow''', ('model/test_rows.py', 'one_sample_ends')),
    Defect('requests of other settings are in one batch', 'compose/engine.py', 'item[1] == settings', 'True',
           ('compose/test_engine.py', 'settings_that_differ')),
    Defect('a batch begins where the finished samples end', 'inference/batches.py',
           'begins = sorted({number // window * window for number in numbers})', 'begins = sorted(numbers)[::window]',
           ('inference/test_batches.py', 'as_if_undisturbed')),
    Defect('two runs write to one file', 'inference/results.py',
           'fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)', 'pass',
           ('inference/test_results.py', 'second_is_refused')),
    Defect('the old results go before a new line is there', 'inference/results.py',
           'if self._locked is not None and self._is_replaced:', 'if False:',
           ('inference/test_results.py', 'overwritten_stays')),
    Defect('errors are tried again without being asked', 'inference/results.py',
           'retried = errors if config.retry_errors else []', 'retried = errors',
           ('inference/test_results.py', 'errors_are_finished')),
    Defect('values that are not finite are merged', 'lora/stored.py', 'if not reading.is_finite(buffer):', 'if False:',
           ('model/test_stored.py', 'first_composition_fails')),
    Defect('a file that was not written to its end is read', 'lora/header.py', 'if self.nbytes != size:', 'if False:',
           ('model/test_stored.py', 'refill_that_fails')),
    Defect('a file that changed while it was read is taken', 'lora/stored.py',
           'if signature_of(os.fstat(fd)) != stored.signatures[-1] or not stored.is_current():', 'if False:',
           ('lora/test_library.py', 'between_two_reads')),
    Defect('memory that somebody holds is filled again', 'lora/cache.py', ' and not is_held(memory)', '',
           ('lora/test_cache.py', 'hold')),
    Defect('what is used once puts others out', 'lora/cache.py', '(self._again if key in self._seen else self._first)',
           'self._again', ('lora/test_cache.py', 'once')),
    Defect('values of a file keep its dtype', 'model/new_adapter.py',
           '            _take_dtype_of_base(layer, NEW_NAME)\n', '            pass\n',
           ('model/test_stored.py', 'dtype_that_they_would_have')),
    Defect('base weights in a file are taken for those of the model', 'model/stored.py',
           'if not torch.equal(value.to(part), part):', 'if False:', ('model/test_stored.py', 'of_embeddings')),
    Defect('adapters of the model come before those of the library', 'model/sources.py',
           '(library is not None and name in library)',
           '(library is not None and name in library and name not in self.adapters.configs)',
           ('model/test_stored.py', 'library_and_of_the_model')),
    Defect('a layer that PEFT adds while a fused adapter grows is not undone', 'model/new_adapter.py',
           'undo.callback(tree.restore)', 'undo.callback(tree.restore) if name not in adapters.configs else None',
           ('model/test_faults.py', 'from_files and mixture and True')),
    Defect('revert leaves what was replaced', 'patching/apply.py', 'setattr(owner, attribute, original)', 'pass',
           ('patching/test_apply.py', 'puts_back_the_very_objects')),
    Defect('who went away while it waited is answered', 'compose/engine.py',
           'self._waiting = [item for item in self._waiting if not _is_abandoned(item[0])]', 'pass',
           ('compose/test_engine.py', 'who_went_away')),
    Defect('a long prompt takes the room for tokens from others', 'compose/engine.py', 'fits = not batch or',
           'fits = True or', ('compose/test_engine.py', 'takes_no_room')),
    Defect('a row ends for which somebody waits', 'compose/tickets.py',
           'found.repeat_interleave(len(input_ids) // len(ended))', 'found.repeat(len(input_ids) // len(ended))',
           ('compose/test_engine.py', 'nobody_waits_ends')),
    Defect('scales of outputs are taken for weights of parameters', 'serve/mixture.py', "merge_method or 'mixture'",
           'merge_method', ('serve/test_mixture.py', 'means_one_thing')),
    Defect('a client is told what went wrong inside the server', 'serve/app.py',
           "f'The server failed; its log says why at {number}.'", "f'{error} {number}'",
           ('serve/test_app.py', 'told_by_a_number')),
    Defect('the key is not looked at', 'serve/guards.py', 'self._check(Request(scope))', 'False',
           ('serve/test_app.py', 'without_the_key')),
    Defect('the masks of a mixture differ from worker to worker', 'model/merged.py',
           'torch.default_generator.manual_seed(own)', 'pass', ('model/test_merged.py', 'random_masks')),
    Defect('a mixture is taken whose files are no tensors', 'model/merged.py', 'Sources(adapters).check(name)', 'pass',
           ('model/test_merged.py', 'without_values')),
    Defect('a link leads out of the folders', 'serve/runtime.py', 'path = Path(text).resolve()',
           'path = Path(text).absolute()', ('serve/test_runtime.py', 'leads_out')),
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
