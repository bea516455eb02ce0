"""A worker of vLLM merges in memory what stock merges; what it cannot merge fails its own requests alone."""
import os
import pytest
import shutil
import subprocess
import sys
from engines import PROMPTS, Stock, answers, engine_of, mixtures_of
from models import PEFT_TYPES, reproducible_masks
from pathlib import Path
from safetensors.torch import load_file, save_file
from unittest import mock

from swift_patch import AdapterLibrary
from swift_patch.vllm_plugin.mixtures import shown_name
from swift_patch.vllm_plugin.stored_mixture import StoredMixture

WEIGHTS = 'adapter_model.safetensors'


@pytest.fixture(scope='module')
def engine(written):
    with mock.patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING='0'):
        return engine_of(written[0])


@pytest.fixture
def adapters(written, tmp_path):
    """The folders of the adapters, which a test may damage."""
    shutil.copytree(Path(written[1]['peft']['l0']).parent, tmp_path / 'adapters')
    return tmp_path / 'adapters'


@pytest.fixture
def library(adapters):
    return AdapterLibrary.from_folder(adapters)


@pytest.mark.parametrize('combination_type', PEFT_TYPES)
def test_every_combination_type_is_as_stocks_adapter_from_a_folder(engine, written, tmp_path, combination_type):
    options, sources = PEFT_TYPES[combination_type], ['l2', 'l0', 'l1']
    library = AdapterLibrary(written[1]['peft'])
    mixtures = mixtures_of(engine, library, combination_type=combination_type, **options)
    composition = mixtures.composer.composition(sources, [0.5, -0.2, 0.3])
    expected = Stock(*_of(written), tmp_path).request(sources, [0.5, -0.2, 0.3], combination_type, **options)
    with reproducible_masks():
        assert answers(engine, [mixtures.request(composition)]) == answers(engine, [expected])


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_mixtures_of_other_ranks_and_selections_are_stocks(engine, written, tmp_path, kind):
    library, stock = AdapterLibrary(written[1][kind]), Stock(*_of(written), tmp_path)
    mixtures = mixtures_of(engine, library)
    composition = mixtures.composer.composition
    found = [
        mixtures.request(composition({
            'l4': 0.4,
            'l1': 0.7
        }, merge_method='mixture')),
        mixtures.request(composition({
            'l4': 0.2,
            'l1': 0.7
        }, merge_method='selection'))
    ]
    expected = [stock.request(['l4', 'l1'], [0.4, 0.7], 'cat'), stock.request(['l1'], [1.0], 'linear')]
    assert answers(engine, found) == answers(engine, expected)


def test_more_mixtures_than_slots_are_answered_in_waves_as_each_alone(engine, library):
    mixtures = mixtures_of(engine, library)
    samples = [{'l0': 0.5, 'l1': 0.5}, {'l2': 1.5}, {'l3': 0.2, 'l0': -0.4, 'l1': 1}, {'l1': 0.1, 'l2': 0.9}]
    requests = [mixtures.request(mixtures.composer.composition(sample)) for sample in samples]
    alone = [answers(engine, [request], [prompt])[0] for request, prompt in zip(requests, PROMPTS)]
    assert answers(engine, requests) == alone and len(set(map(tuple, alone))) > 1


def test_a_mixture_that_cannot_be_loaded_in_a_step_fails_its_own_requests(engine, library, adapters):
    mixtures = mixtures_of(engine, library)
    composition = mixtures.composer.composition
    samples = [{'l0': 0.5, 'l1': 0.5}, {'l2': 0.7, 'l3': 0.7}, {'l1': 0.9}]
    good, broken, other = (mixtures.request(composition(sample)) for sample in samples)
    alone = [
        answers(engine, [request], [prompt])[0] for request, prompt in zip((good, other), (PROMPTS[0], PROMPTS[2]))
    ]
    (adapters / 'l3' / WEIGHTS).rename(adapters / 'away')
    assert answers(engine, [good, broken, other]) == [alone[0], 'error', alone[1]]
    # What was computed without it is nowhere: in no slot, in no prefix.
    (adapters / 'away').rename(adapters / 'l3' / WEIGHTS)
    [again] = answers(engine, [broken], PROMPTS[1:2])
    [anew] = answers(engine, [mixtures.request(composition({'l3': 0.7, 'l2': 0.7}))], PROMPTS[1:2])
    assert again == anew != 'error'


@pytest.mark.parametrize('damage, told', [
    (lambda file: file.unlink(), 'there is no'),
    (lambda file: file.write_bytes(b'nothing'), 'cannot read'),
    (lambda file: _change(file, 0.25), 'expected to be what it was'),
])
def test_what_happened_to_a_source_since_the_request_is_told_and_the_engine_goes_on(engine, library, adapters, damage,
                                                                                    told):
    mixtures = mixtures_of(engine, library)
    request = mixtures.request(mixtures.composer.composition({'l0': 0.31, 'l1': 0.17}))
    damage(adapters / 'l1' / WEIGHTS)
    with pytest.raises(ValueError, match=told):
        engine.llm_engine.add_lora(request)
    assert answers(engine, [None]) == answers(engine, [None])


def test_a_source_that_is_not_finite_is_told_and_the_engine_goes_on(engine, library, adapters):
    _change(adapters / 'l1' / WEIGHTS, float('nan'))
    mixtures = mixtures_of(engine, library)
    with pytest.raises(ValueError, match='finite'):
        engine.llm_engine.add_lora(mixtures.request(mixtures.composer.composition({'l0': 0.3, 'l1': 0.2})))
    assert answers(engine, [None]) == answers(engine, [None])


def test_new_values_make_another_adapter_of_the_same_name(engine, library, adapters):
    mixtures = mixtures_of(engine, library)
    composition = mixtures.composer.composition({'l0': 1.0})
    before = mixtures.request(composition, 'l0')
    _change(adapters / 'l0' / WEIGHTS, 0.5)
    after = mixtures.request(composition, 'l0')
    assert shown_name(before) == shown_name(after) == 'l0'
    assert before != after and before.lora_int_id != after.lora_int_id


def test_a_rank_that_the_engine_does_not_take_is_refused_with_the_one_to_set(engine, library):
    mixtures = mixtures_of(engine, library, merge_method='mixture')
    mixtures.max_lora_rank = 8
    composition = mixtures.composer.composition
    assert mixtures.request(composition(['l0', 'l1'])).lora_int_id > 2**32
    with pytest.raises(ValueError, match='found 12.* of 16'):
        mixtures.request(composition(['l0', 'l1', 'l2']))
    assert mixtures.served_rank(max_sources=2) == 16 and mixtures.served_rank(['l4'], 1) == 8
    mixtures.max_lora_rank = None
    with pytest.raises(ValueError, match='32'):
        engine.llm_engine.add_lora(mixtures.request(composition(['l4'] * 5)))


@pytest.mark.parametrize('weight', [1001, -1e30])
def test_a_weight_that_may_overflow_into_the_memory_of_others_is_refused(engine, library, weight):
    mixtures = mixtures_of(engine, library)
    with pytest.raises(ValueError, match='from -1000 to 1000'):
        mixtures.request(mixtures.composer.composition({'l0': weight}))


def test_a_path_says_all_and_comes_back(library):
    composer = mixtures_of_nothing(library)
    composition = composer.composition({'l0': 0.1 + 0.2, 'l4': -1e-30}, merge_method='mixture')
    mixture = StoredMixture.of(composition, library)
    again = StoredMixture.parse(mixture.path)
    assert again == mixture and again.path == mixture.path and again.lora_id == mixture.lora_id
    assert again.composition == composition
    for path in ('swift_patch:', 'swift_patch:{}', 'swift_patch:{"sources":[[1]],"weights":[],"options":{}}'):
        with pytest.raises(ValueError, match='path of a mixture'):
            StoredMixture.parse(path)


def test_workers_in_processes_of_their_own_merge_each_and_tell_what_they_cannot(written, adapters, tmp_path):
    script = Path(__file__).parent / 'two_workers.py'
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'VLLM_ENABLE_V1_MULTIPROCESSING': '1'}
    done = subprocess.run(
        [sys.executable, str(script), written[0],
         str(adapters), str(tmp_path / 'stock')],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]


def mixtures_of_nothing(library):
    from models import qwen2

    from swift_patch import FusionComposer
    return FusionComposer(qwen2().to('meta'), library=library)


def _of(written):
    return written[0], written[1]['peft']


def _change(file, value):
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.view(-1)[0] = value
    save_file(tensors, file)
