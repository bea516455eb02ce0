"""ms-swift's engine around a real vLLM answers each request by its own composition, as ms-swift's own engine does."""
import asyncio
import os
import pytest
import torch
from safetensors.torch import load_file, save_file
from swift.infer_engine import AdapterRequest, RequestConfig
from unittest import mock
from vllm_deployed import KEPT, drawn, is_idle, until

from swift_patch import AdapterLibrary
from swift_patch.compose.requests import ComposedRequest
from swift_patch.compose.tickets import Ticket
from swift_patch.ms_swift import InferRequest
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE
from swift_patch.vllm_plugin.engine import VllmFusionEngine, _of_this_rank

LIKELIEST = RequestConfig(max_tokens=8, temperature=0)


@pytest.fixture
def engine(deployed):
    deployed.engine.strict = True
    return deployed.engine


def to_request(text='hello'):
    return InferRequest(messages=[{'role': 'user', 'content': text}])


def answers(engine, compositions, config=LIKELIEST, texts=None, **kwargs):
    """What the engine answers to one call, an error in the place of an answer where it is not strict."""
    requests = [to_request(text) for text in texts or ['hello'] * len(compositions)]
    found = engine.infer(requests, config, compositions=compositions, use_tqdm=False, **kwargs)
    return [each if isinstance(each, Exception) else each.choices[0].message.content for each in found]


def test_each_request_is_answered_by_its_own_composition_as_it_is_alone(engine, alone):
    texts = [f'hello {number}' for number in range(24)]
    mixtures = drawn(24, seed=1)
    expected = [alone(text, mixture) for text, mixture in zip(texts, mixtures)]
    assert len(set(expected)) > 12, 'or the test would see nothing'
    assert answers(engine, mixtures, texts=texts) == expected


def test_a_composition_may_be_said_in_every_form(engine, alone):
    composition = engine.composer.composition
    forms = {
        'the base model': (None, None),
        'names': (['l0', 'l1'], {'l0': .5, 'l1': .5}),
        'a pair': ((['l0', 'l1'], [.6, .4]), {'l0': .6, 'l1': .4}),
        'a mapping': ({'l4': 1.}, {'l4': 1.}),
        'a selection': (composition({'l0': 2., 'l1': 1.}, None, 'selection'), {'l0': 1.}),
        'a mixture': (composition(['l1'], None, 'mixture'), {'l1': 1.}),
    }  # yapf: disable
    asked, meant = zip(*forms.values())
    assert answers(engine, asked) == [alone('hello', each) for each in meant]


def test_a_composition_that_many_ask_for_is_loaded_once_and_then_known(engine):
    asked = []
    add_lora = engine.engine.add_lora

    async def counting(lora_request):
        asked.append(lora_request)
        return await add_lora(lora_request)

    with mock.patch.object(engine.engine, 'add_lora', counting):
        first = answers(engine, [{'l0': .123, 'l2': .456}] * 6 + [None])
        assert len(asked) == 1
        assert answers(engine, [{'l0': .123, 'l2': .456}] * 2) == first[:2]
        assert len(asked) == 1


def test_what_is_remembered_of_compositions_is_bounded(engine):
    answers(engine, drawn(2 * KEPT, seed=2))
    assert len(engine._loads) == KEPT
    assert engine._adapters_pool == {}


@pytest.mark.parametrize(('composition', 'told'), [
    (['nobody'], 'nobody'),
    ({'l0': float('nan')}, 'finite'),
    (['l0', 'l4'], 'rank'),
])  # yapf: disable
def test_what_is_wrong_with_a_composition_is_the_error_of_its_request_alone(engine, alone, composition, told):
    engine.strict = False
    found = answers(engine, [['l1'], composition, None])
    assert found[::2] == [alone('hello', {'l1': 1.}), alone('hello')]
    assert isinstance(found[1], ValueError) and told in str(found[1])
    engine.strict = True
    with pytest.raises(ValueError, match=told):
        answers(engine, [['l1'], composition, None])


def test_a_mixture_of_a_larger_rank_than_there_is_room_for_is_told_with_the_rank_to_set(engine):
    with pytest.raises(ValueError, match='rank of 8 at most, found 12: .* of 16'):
        answers(engine, [engine.composer.composition(['l0', 'l1', 'l2'], None, 'mixture')])


def test_files_that_went_bad_are_the_error_of_their_requests_until_they_are_good(deployed, engine, written, alone):
    path = deployed.come('spoiled', written[1]['peft']['l0']) / 'adapter_model.safetensors'
    good = path.read_bytes()
    tensors = load_file(path)
    save_file({key: tensor * torch.nan for key, tensor in tensors.items()}, path)
    engine.strict = False
    found = answers(engine, [{'spoiled': .7, 'l1': .3}] * 2 + [['l1']])
    assert all(isinstance(each, ValueError) and 'spoiled' in str(each) for each in found[:2])
    assert found[2] == alone('hello', {'l1': 1.})
    path.write_bytes(good)
    assert answers(engine, [{'spoiled': .7, 'l1': .3}]) == [alone('hello', {'l0': .7, 'l1': .3})]


def test_what_the_workers_put_out_and_cannot_load_again_in_a_step_is_an_error_of_its_request(
        deployed, engine, written, alone):
    path = deployed.come('gone', written[1]['peft']['l0']) / 'adapter_model.safetensors'
    composition = {'gone': .7, 'l2': .3}
    expected = alone('hello', {'l0': .7, 'l2': .3})
    assert answers(engine, [composition]) == [expected]
    lora_request = engine._request(engine.composer.composition(composition))
    content = path.read_bytes()
    path.unlink()
    # The engine still takes it for loaded.
    assert engine.submit(engine.engine.remove_lora(lora_request.lora_int_id)).result()
    engine.strict, request = False, engine._request

    def known(composition):
        return lora_request if 'gone' in composition.sources else request(composition)

    with mock.patch.object(engine, '_request', known):
        found = answers(engine, [composition, ['l1']])
    assert isinstance(found[0], RuntimeError) and 'its log says why' in str(found[0])
    assert found[1] == alone('hello', {'l1': 1.})
    assert engine.is_alive
    path.write_bytes(content)


def test_a_seed_draws_the_same_whatever_is_answered_beside_it(engine):
    config = RequestConfig(max_tokens=8, temperature=1.)
    mixtures = drawn(4, seed=3)
    first = answers(engine, mixtures, config, seeds=[1, 2, 2**62, 2**63 - 1])
    assert answers(engine, mixtures[::-1] + [None], config, seeds=[2**63 - 1, 2**62, 2, 1, 5])[:4] == first[::-1]
    assert answers(engine, mixtures, config, seeds=[5, 6, 7, 8]) != first


def test_requests_that_are_given_up_are_ended_in_vllm(engine):
    # Its likeliest tokens go on and on.
    config = RequestConfig(max_tokens=200, temperature=0)

    async def give_up():
        tickets = [Ticket() for _ in range(6)]
        tasks = [
            asyncio.ensure_future(engine.infer_async(ComposedRequest(to_request(), ['l0'], None, ticket), config))
            for ticket in tickets
        ]
        for ticket in tickets[3:]:
            ticket.is_abandoned = True
        for task, ticket in zip(tasks[:3], tickets):
            while not ticket.has_started:
                await asyncio.sleep(.001)
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    kinds = [type(each) for each in engine.submit(give_up()).result()]
    assert kinds == [asyncio.CancelledError] * 3 + [RuntimeError] * 3
    until(lambda: is_idle(engine))


def test_a_stream_is_what_is_answered_at_once_and_ends_where_it_is_closed(engine, alone):
    config = RequestConfig(max_tokens=8, temperature=0, stream=True)

    async def read(count):
        stream = await engine.infer_async(to_request(), config, composition={'l0': .5, 'l3': .5})
        texts = []
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
            if len(texts) == count:
                await stream.aclose()
        return ''.join(texts)

    assert engine.submit(read(None)).result() == alone('hello', {'l0': .5, 'l3': .5})
    config.max_tokens = 200
    engine.submit(read(1)).result()
    until(lambda: is_idle(engine))


def test_a_ticket_tells_how_far_its_request_is_and_those_without_room_wait(engine):
    tickets = [Ticket() for _ in range(6)]
    running = []
    config = RequestConfig(max_tokens=100, temperature=1.)

    async def ask():
        tasks = [
            asyncio.ensure_future(engine.infer_async(ComposedRequest(to_request(), [name], None, ticket), config))
            for name, ticket in zip(['l0', 'l1', 'l2', 'l3', 'l4', 'l0'], tickets)
        ]
        while sum(ticket.has_started for ticket in tickets) < 4:
            await asyncio.sleep(0)
        running.append(sum(ticket.has_started for ticket in tickets))
        await asyncio.gather(*tasks)

    sizes = []
    with mock.patch.object(engine, 'on_batch', sizes.append):
        engine.submit(ask()).result()
    assert running == [4], 'as many as there is room for'
    assert len(sizes) == 6 and max(sizes) == 4
    for ticket in tickets:
        ticket.end()
        assert ticket.is_composed and 1 <= ticket.batch_size <= 4
        assert ticket.seconds_generating > ticket.seconds_composing >= 0
    assert engine.seconds_generating > 0 and engine.seconds_composing > 0


@pytest.mark.parametrize(('kwargs', 'told'), [
    ({'request_config': RequestConfig(num_beams=2)}, 'num_beams'),
    ({'adapter_request': AdapterRequest('a', 'b')}, 'adapter_request'),
])  # yapf: disable
def test_what_vllm_cannot_do_is_told(engine, kwargs, told):
    with pytest.raises(ValueError, match=told):
        engine.submit(engine.infer_async(to_request(), **kwargs)).result()


def test_another_event_loop_is_refused_and_not_left_waiting(engine):
    with pytest.raises(RuntimeError, match='one event loop'):
        asyncio.run(engine.infer_async(to_request(), LIKELIEST))


def test_a_user_s_template_stays_as_it_is_for_what_is_encoded(engine):
    encoded = engine.encoded(to_request())
    assert encoded.inputs['input_ids'] == engine.template.encode(to_request())['input_ids']
    for _ in range(2):
        [response] = engine.infer([encoded], LIKELIEST, use_tqdm=False)
        assert [response.choices[0].message.content] == answers(engine, [None])


# Without a vLLM that starts.


def refused(written, **options):
    """What is told where no engine is started."""
    model, paths = written
    with pytest.raises(ValueError) as e:
        VllmFusionEngine(
            model,
            AdapterLibrary(paths['peft']),
            model_type=MODEL_TYPE,
            template_type=TEMPLATE,
            torch_dtype=torch.float32,
            **options)
    return str(e.value)


@pytest.mark.parametrize(('options', 'told'), [
    ({'max_lora_rank': 1}, 'at least 8 for these adapters, found 1: give 8'),
    ({'max_lora_rank': 9}, 'one of [1, 8, 16, 32, 64, 128, 256, 320, 512]'),
    ({'max_lora_rank': 8, 'max_sources': 3, 'composer_args': {'merge_method': 'mixture'}},
     'at least 16 for these adapters, 3 at a time at most, found 8: give 16'),
    ({'engine_kwargs': {'max_lora_rank': 1}}, 'found 1'),
    ({'max_sources': 200, 'composer_args': {'combination_type': 'cat'}, 'max_lora_rank': 16}, '24'),
    ({'engine_kwargs': {'no_such_option': 1}}, 'vLLM cannot start: '),
    ({'composer_args': {'merge_method': 'sum'}}, 'sum'),
])  # yapf: disable
def test_what_no_engine_can_be_started_with_is_told_before_it_is(written, options, told):
    if told == '24':
        told = 'at least 32'
    assert told in refused(written, **options)


def test_an_adapter_of_another_model_is_told_before_vllm_starts(written, tmp_path_factory):
    from models import write_checkpoints
    _, others = write_checkpoints(tmp_path_factory.mktemp('narrow'), 1)
    model, _ = written
    with pytest.raises(ValueError, match='l0'):
        VllmFusionEngine(model, AdapterLibrary(others['peft']), model_type=MODEL_TYPE, template_type=TEMPLATE)


def test_the_processes_of_a_rank_are_no_ranks(monkeypatch):
    ranks = {'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1', 'MASTER_PORT': '1', 'TORCHELASTIC_RUN_ID': 'none'}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with _of_this_rank(2):
        assert not ranks.keys() & os.environ.keys()
    assert dict(os.environ) == before


class OfGPUs:
    """What is used of vLLM's platform, with GPUs."""
    device_control_env_var = 'CUDA_VISIBLE_DEVICES'

    @staticmethod
    def is_cpu():
        return False


@pytest.mark.parametrize(('visible', 'expected'), [(None, '2,3'), ('4,5,6,7', '6,7')])
def test_a_rank_has_gpus_of_its_own(monkeypatch, visible, expected):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    with mock.patch('swift_patch.vllm_plugin.engine.current_platform', OfGPUs), _of_this_rank(2):
        assert os.environ['CUDA_VISIBLE_DEVICES'] == expected
    assert os.environ.get('CUDA_VISIBLE_DEVICES') == visible
