"""Many threads on one model: each sees what it would see alone."""
import pytest
import random
import sys
import threading
import torch
from models import add, deltas, fresh, layers, loras, outputs, qwen2, swift_model

from swift_patch.compose.composer import FusionComposer

THREADS = 8
OPERATIONS = 250  # in each thread
SOURCES = list(loras())
COMPOSITIONS = [{'l0': 0.7, 'l1': 0.3}, {'l2': 1.0}, {'l3': 0.5, 'l0': 0.5}, {'l1': -0.4, 'l2': 0.2, 'l3': 0.9}]


@pytest.fixture(autouse=True)
def switch_often():
    """Lets the interpreter change threads a hundred times as often as it does, to meet what is rare."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 100)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(params=['0', '1'], ids=['activation by thread', 'activation for all threads'])
def model(request, monkeypatch):
    """A small `SwiftModel`, with activation as in ms-swift's `USE_UNIQUE_THREAD`."""
    monkeypatch.setenv('USE_UNIQUE_THREAD', request.param)
    return small_model()


def small_model():
    return swift_model(loras(target_modules=['q_proj', 'down_proj']), qwen2(1, 16))


def run(work, count=THREADS):
    """Runs `work(i)` in `count` threads that start together, and raises what any of them raised."""
    start, failures = threading.Barrier(count), []

    def guarded(i):
        start.wait()
        try:
            work(i)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=[i]) for i in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if failures:
        raise failures[0]


def test_threads_that_switch_and_run_see_their_own_adapters_alone(monkeypatch):
    monkeypatch.setenv('USE_UNIQUE_THREAD', '0')
    model, expected = small_model(), {}
    choices = [(), ('l0', ), ('l1', ), ('l3', ), ('l0', 'l2'), ('l1', 'l2', 'l3')]
    for names in choices:
        model.set_active_adapters(list(names))
        expected[names] = outputs(model)

    def work(i):
        chance = random.Random(i)
        for _ in range(OPERATIONS):
            names = chance.choice(choices)
            how = chance.randrange(3)
            if how == 0:
                model.set_active_adapters(list(names))
            elif how == 1:
                # The wrapper's own set is everybody's: these two ask and change the layers alone.
                for name in SOURCES:
                    model.activate_adapter(name) if name in names else model.deactivate_adapter(name)
            else:
                for name in SOURCES:
                    for layer in layers(model).values():
                        layer.set_activation(name, name in names)
                model.set_active_adapters(list(names))
            # In whatever order they were activated and are added up.
            torch.testing.assert_close(outputs(model), expected[names], rtol=1e-4, atol=1e-5)

    run(work)


def test_a_new_thread_with_the_identity_of_one_that_ended_gets_what_it_asks_for(monkeypatch):
    monkeypatch.setenv('USE_UNIQUE_THREAD', '0')
    model, identities = small_model(), []

    def work(_):
        names = SOURCES[len(identities) % 4:][:2]
        identities.append(threading.get_ident())
        model.set_active_adapters(names)
        assert all(set(layer.active_adapters) == set(names) for layer in layers(model).values())

    for _ in range(40):
        run(work, count=1)
    assert len(set(identities)) < len(identities)


@pytest.mark.parametrize('composers', [1, 3])
def test_no_torn_adapter_is_ever_seen_while_it_is_held(model, composers):
    every = [
        FusionComposer(model, method, adapter_name=f'fused_{method}')
        for method in ['fusion', 'mixture', 'selection'][:composers]
    ]
    expected = {}
    for composer in every:
        composer.reserve()
        for number, composition in enumerate(COMPOSITIONS):
            composer.compose(composition)
            expected[composer, number] = outputs(model), deltas(model, composer.adapter_name)

    def work(i):
        chance = random.Random(i)
        for _ in range(OPERATIONS):
            composer, number = chance.choice(every), chance.randrange(len(COMPOSITIONS))
            if chance.random() < 0.2:
                composer.compose(chance.choice(COMPOSITIONS))
                continue
            with composer.fused(COMPOSITIONS[number]) as name:
                logits, values = expected[composer, number]
                assert torch.equal(outputs(model), logits)
                found = deltas(model, name)
                assert all(torch.equal(found[layer], value) for layer, value in values.items())

    run(work)


def test_threads_that_refill_adapters_of_their_own_do_not_disturb_each_other(model):
    for i in range(THREADS):
        add(model, ['l0'], [1.0], name=f'fused{i}')
    expected = {
        (name, kind): deltas(fresh(model, [name, 'l0'], [0.6, 0.5], kind), 'oracle')
        for name in ('l1', 'l2', 'l3')
        for kind in ('linear', 'svd')
    }

    def work(i):
        chance = random.Random(i)
        for _ in range(OPERATIONS // 5):
            name, kind = chance.choice(list(expected))
            model.update_weighted_adapter([name, 'l0'], [0.6, 0.5], f'fused{i}', kind)
            for layer, delta in deltas(model, f'fused{i}').items():
                torch.testing.assert_close(delta, expected[name, kind][layer], rtol=1e-4, atol=1e-5)

    run(work)


def test_threads_that_meet_a_model_for_the_first_time_find_all_its_layers():
    for _ in range(20):
        model = small_model()

        def work(i, model=model):
            model.set_active_adapters(SOURCES[0])
            assert all(layer.active_adapters == ['l0'] for layer in layers(model).values())

        run(work)


def test_reserving_waits_with_its_look_at_the_model_for_a_thread_that_fuses(model):
    early, late = FusionComposer(model, adapter_name='other'), FusionComposer(model)
    with early.fused(['l2']):
        thread = threading.Thread(target=late.reserve)
        thread.start()
        # Until it waits for the model; that it does takes far less.
        thread.join(0.5)
        # What this thread makes meanwhile was not there when the other one came.
        add(model, ['l0', 'l1'], [0.7, 0.3], 'linear', name='fused')
        expected = deltas(model, 'fused')
    thread.join()
    assert expected and deltas(model, 'fused').keys() == expected.keys()
    for name, delta in deltas(model, 'fused').items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)


def test_reserving_beside_a_thread_that_composes_never_zeroes_what_it_composed(build):
    for _ in range(5):
        model = build(target_modules=['q_proj'])
        early, late = FusionComposer(model), FusionComposer(model)
        # Within this block the other two wait, both having come before there was a fused adapter.
        with FusionComposer(model, adapter_name='other').fused(['l2']):
            threads = [
                threading.Thread(target=late.reserve),
                threading.Thread(target=early.compose, args=[['l0', 'l1']])
            ]
            [thread.start() for thread in reversed(threads)]
            [thread.join(0.1) for thread in threads]
        [thread.join() for thread in threads]
        found = deltas(model, 'fused')
        early.compose(['l3'])
        early.compose(['l0', 'l1'])
        assert found.keys() == deltas(model, 'fused').keys() and found
        for name, delta in deltas(model, 'fused').items():
            torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def test_threads_with_batches_of_their_own_see_their_own_rows(model):
    rng = random.Random(0)
    batches = [[rng.choice([*COMPOSITIONS, None]) for _ in range(2)] for _ in range(6)] + [[COMPOSITIONS[0]] * 2]
    expected = []
    composer = FusionComposer(model)
    for batch in batches:
        rows = []
        for number, sample in enumerate(batch):
            composer.compose_batch([sample])
            rows.append(outputs(model)[number])
        expected.append(torch.stack(rows))

    def work(i):
        chance = random.Random(i)
        # Two composers of one model, as two users of it would make.
        mine = composer if i % 2 else FusionComposer(model, adapter_name='another')
        for _ in range(OPERATIONS // 5):
            number = chance.randrange(len(batches))
            with mine.fused_batch(batches[number]):
                torch.testing.assert_close(outputs(model), expected[number], rtol=1e-4, atol=1e-5)

    run(work)
