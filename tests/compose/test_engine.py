"""Requests with different compositions are answered in one batch, each as it is answered alone."""
import asyncio
import logging
import pytest
import torch
from copy import copy
from models import layers, swift_arguments
from queue import Queue
from swift.tuners import SwiftModel
from types import SimpleNamespace
from unittest import mock

from swift_patch import FusionEngine
from swift_patch.compose.engine import ComposedRequest
from swift_patch.compose.tickets import Ticket
from swift_patch.inference.checkpoints import find_checkpoints
from swift_patch.inference.engine import load_model
from swift_patch.model import rows as rows_module
from swift_patch.model.rows import Rows
from swift_patch.ms_swift import (AdapterRequest, InferRequest, TransformersEngine, get_engine, get_template,
                                  prepare_model_template)

COMPOSITIONS = [['adapter_0', 'adapter_1'], {
    'adapter_2': 1.0
}, None, (['adapter_3', 'adapter_0'], [0.8, -0.4]), ['adapter_1']]
TEXTS = ['hello', 'a much longer question than all of the others', 'q', 'what is it?', 'bye now']


def request(text):
    return InferRequest(messages=[{'role': 'user', 'content': text}])


REQUESTS = [request(text) for text in TEXTS]


def load(written, kind):
    """Returns an engine around a small model with four LoRAs, and ms-swift's arguments."""
    model_dir, paths = written
    args = swift_arguments(model_dir)
    names = ('l0', 'l1', 'l2', 'l3')
    model, template, aliases = load_model(args, find_checkpoints({name: paths[kind][name] for name in names}))
    assert aliases == {name: f'adapter_{i}' for i, name in enumerate(names)}
    return FusionEngine(model, template), args


@pytest.fixture(scope='module', params=['swift', 'peft'])
def loaded(request, written):
    return load(written, request.param)


@pytest.fixture
def engine(loaded):
    engine = loaded[0]
    engine.max_batch_size, engine.strict, engine._has_told_of_rows = 16, True, False
    return engine


@pytest.fixture
def config(loaded):
    return loaded[1].get_request_config()


def content(response):
    return response.choices[0].message.content


def alone(engine, config):
    """What answers each request where it is the only one."""
    return [
        content(engine.infer([each], config, compositions=[composition])[0])
        for each, composition in zip(REQUESTS, COMPOSITIONS)
    ]


def test_each_request_of_a_batch_is_answered_as_alone(engine, config):
    expected = alone(engine, config)
    assert len(set(expected)) == len(expected), 'or the test would see nothing'
    found = engine.infer(REQUESTS, config, compositions=COMPOSITIONS, use_tqdm=False)
    assert list(map(content, found)) == expected
    assert engine.seconds_composing > 0 and engine.seconds_generating > 0


def test_one_adapter_answers_as_ms_swifts_own_engine_with_it(written, engine, config):
    if isinstance(engine.model, SwiftModel):
        pytest.skip('stock loads a SwiftModel only by the name that it was saved with')
    model_dir, paths = written
    args = swift_arguments(model_dir, adapters=[paths['peft']['l2']])
    stock = get_engine(prepare_model_template(args)[0], get_template(args))
    [expected] = stock.infer([REQUESTS[0]], config)
    found = engine.infer(REQUESTS[:2], config, compositions=[['adapter_2'], ['adapter_0']])[0]
    assert content(found) == content(expected)


def test_batches_are_as_large_as_they_may_be(engine, config):
    engine.max_batch_size = 2
    sizes = []
    with mock.patch.object(
            TransformersEngine,
            '_infer',
            autospec=True,
            side_effect=lambda self, requests, *args, **kwargs: sizes.append(len(requests)) or requests):
        engine.infer(REQUESTS, config, compositions=COMPOSITIONS)
    assert sizes == [2, 2, 1]


def test_several_answers_and_beams_belong_to_their_requests(engine, config):
    config.n, config.num_beams = 2, 2
    expected = [[
        choice.message.content for choice in engine.infer([each], config, compositions=[composition])[0].choices
    ] for each, composition in zip(REQUESTS, COMPOSITIONS)]
    found = engine.infer(REQUESTS, config, compositions=COMPOSITIONS)
    assert [[choice.message.content for choice in response.choices] for response in found] == expected


def test_stop_words_end_each_answer_as_alone(engine, config):
    unstopped = alone(engine, config)
    config.stop = ['y']
    expected = alone(engine, config)
    assert expected != unstopped, 'or the test would see nothing'
    assert list(map(content, engine.infer(REQUESTS, config, compositions=COMPOSITIONS))) == expected


def test_log_probabilities_are_those_of_each_request(engine, config):
    config.logprobs, config.top_logprobs = True, 2

    def told(response):
        return [[token['token'], *(top['token'] for top in token['top_logprobs'])]
                for token in response.choices[0].logprobs['content']]

    expected = [
        told(engine.infer([each], config, compositions=[composition])[0])
        for each, composition in zip(REQUESTS, COMPOSITIONS)
    ]
    assert list(map(told, engine.infer(REQUESTS, config, compositions=COMPOSITIONS))) == expected


def test_as_many_compositions_as_requests_are_wanted(engine, config):
    with pytest.raises(ValueError, match='one for each of 5 requests, found 1'):
        engine.infer(REQUESTS, config, compositions=[['adapter_0']])


# Each request has a merge method of its own.


def of_methods(engine):
    """A composition for each request: of the engine's method, and of every other."""
    composition = engine.composer.composition
    names = ['adapter_0', 'adapter_1', 'adapter_2', 'adapter_3']
    return [
        composition(names, [0.5, -0.7, 0.2, 0.9], 'mixture'), ['adapter_1', 'adapter_2'], None,
        composition(names[:2], [0.4, 0.6], 'selection'),
        composition(names[1:3], merge_method='mixture')
    ]


def test_requests_with_different_merge_methods_are_answered_in_one_batch_each_as_alone(engine, config):
    compositions = of_methods(engine)
    expected = [
        content(engine.infer([each], config, compositions=[composition])[0])
        for each, composition in zip(REQUESTS, compositions)
    ]
    assert len(set(expected)) == len(expected), 'or the test would see nothing'
    assert list(map(content, engine.infer(REQUESTS, config, compositions=compositions))) == expected
    found = ask(engine, *zip(REQUESTS, [config] * len(REQUESTS), compositions))
    assert list(map(content, found)) == expected


@pytest.mark.parametrize('count', [1, 3], ids=['alone', 'in a batch'])
def test_a_mixture_of_many_makes_no_later_batch_slower(engine, config, caplog, count):

    def read():
        variants = [layer.lora_variant['fused'] for layer in layers(engine.model).values()]
        return {(len(variant.A), variant.A.shape[1], variant.B.shape[2]) for variant in variants}

    def parameters():
        return [(id(parameter), parameter.data_ptr()) for parameter in engine.model.parameters()]

    batch = dict(infer_requests=REQUESTS, request_config=config, compositions=COMPOSITIONS)
    expected = list(map(content, engine.infer(**batch)))
    before, places = parameters(), read()
    assert places == {(len(REQUESTS), 4, 4)}
    caplog.clear()
    engine.infer(REQUESTS[:count], config, compositions=of_methods(engine)[:count])
    assert read() == {(count, 16, 16)}
    assert list(map(content, engine.infer(**batch))) == expected
    assert read() == places and parameters() == before
    assert 'grows' not in caplog.text


def test_an_engine_around_a_compiled_model_may_keep_the_rank_of_all_batches(engine):
    assert not FusionEngine(engine.model, engine.template, rank_by_batch=False).composer.rank_by_batch


def test_layers_that_cannot_have_rows_answer_one_by_one_with_any_merge_method(engine, config):
    compositions = [composition for composition in of_methods(engine) if composition is not None]
    requests = REQUESTS[:len(compositions)]
    expected = list(map(content, engine.infer(requests, config, compositions=compositions)))
    with mock.patch.object(rows_module, 'reads_variants', lambda layer_class: False):
        assert list(map(content, engine.infer(requests, config, compositions=compositions))) == expected


# An error reaches the request that it belongs to, and no other.

BAD = InferRequest(messages=[{'role': 'nobody', 'content': 'x'}])


@pytest.mark.parametrize(('requests', 'compositions'), [
    (REQUESTS[:3], [['adapter_0'], ['nobody'], ['adapter_1']]),
    ([REQUESTS[0], BAD, REQUESTS[2]], [['adapter_0'], ['adapter_1'], ['adapter_1']]),
], ids=['composition', 'messages'])  # yapf: disable
def test_an_error_takes_the_place_of_its_response_and_of_no_other(engine, config, requests, compositions):
    expected = [
        content(engine.infer([requests[i]], config, compositions=[compositions[i]])[0])  # yapf: disable
        for i in (0, 2)
    ]
    engine.strict = False
    found = engine.infer(requests, config, compositions=compositions)
    assert isinstance(found[1], Exception)
    assert [content(found[0]), content(found[2])] == expected
    engine.strict = True
    with pytest.raises(Exception):
        engine.infer(requests, config, compositions=compositions)
    assert content(engine.infer(requests[:1], config, compositions=compositions[:1])[0]) == expected[0]


def test_requests_that_cannot_be_encoded_leave_the_others_their_own_rows_and_beams(engine, config):
    config.n, config.num_beams, engine.strict = 2, 2, False

    def texts(response):
        return [choice.message.content for choice in response.choices]

    expected = [
        texts(engine.infer([REQUESTS[i]], config, compositions=[COMPOSITIONS[i]])[0])  # yapf: disable
        for i in (0, 3)
    ]
    found = engine.infer([BAD, REQUESTS[0], BAD, REQUESTS[3]],
                         config,
                         compositions=[['adapter_1'], COMPOSITIONS[0], ['adapter_2'], COMPOSITIONS[3]])
    assert [texts(found[1]), texts(found[3])] == expected
    assert isinstance(found[0], Exception) and isinstance(found[2], Exception)


def test_an_error_of_a_sample_has_no_number_of_ours(engine, config):
    engine.strict = False
    found = engine.infer(REQUESTS[:3], config, compositions=[['adapter_0'], ['adapter_1'], ['nobody']])
    assert str(found[2]).startswith('adapters is expected to name adapters')


def test_adapters_that_are_not_loaded_are_refused(engine, config, written):
    expected = alone(engine, config)
    with pytest.raises(ValueError, match='adapter_request is expected to be left out'):
        engine.infer(REQUESTS[:1], config, adapter_request=AdapterRequest('other', written[1]['peft']['l4']))
    assert alone(engine, config) == expected


@pytest.mark.parametrize('seeds', [[1], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0.5], [1, 2, 3, 4, -1], 7])
def test_seeds_are_an_integer_for_each_request(engine, config, seeds):
    with pytest.raises((TypeError, ValueError), match='seeds is expected to'):
        engine.infer(REQUESTS, config, compositions=COMPOSITIONS, seeds=seeds)


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory'),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    MemoryError(),
])
def test_a_batch_for_which_memory_does_not_suffice_is_halved(engine, config, caplog, error):
    expected = alone(engine, config)
    infer, sizes = TransformersEngine._infer, []

    def limited(self, requests, *args, **kwargs):
        sizes.append(len(requests))
        if len(requests) > 2:
            raise error
        return infer(self, requests, *args, **kwargs)

    with mock.patch.object(TransformersEngine, '_infer', limited), caplog.at_level(logging.WARNING, 'swift_patch'):
        found = engine.infer(REQUESTS, config, compositions=COMPOSITIONS)
    assert list(map(content, found)) == expected
    assert max(sizes[1:]) < 5 and engine.max_batch_size == 1
    assert 'Memory does not suffice for a batch of 5' in caplog.text


def test_rows_that_memory_does_not_suffice_for_are_halved(engine, caplog):
    made, init = [], Rows.__init__

    def limited(self, target, count, rank):
        made.append(count)
        if count > 20:
            raise torch.OutOfMemoryError('CUDA out of memory')
        init(self, target, count, rank)

    engine.max_batch_size = 70
    with mock.patch.object(Rows, '__init__', limited), caplog.at_level(logging.WARNING, 'swift_patch'):
        engine.reserve(max_sources=2)
    assert made == [70, 35, 17] and engine.max_batch_size == 17
    assert 'Memory does not suffice for a batch of 35' in caplog.text


def test_what_cannot_be_batched_is_answered_one_by_one_and_that_is_said_once(engine, config, caplog):
    expected = alone(engine, config)
    from swift_patch.model.variant import RowsVariant
    forward = RowsVariant.forward

    def in_one_heap(self, module, active_adapter, x, result, **kwargs):
        return forward(self, module, active_adapter, x.flatten(0, -2), result, **kwargs)

    with mock.patch.object(RowsVariant, 'forward', in_one_heap), caplog.at_level(logging.WARNING, 'swift_patch'):
        for _ in range(2):
            found = engine.infer(REQUESTS, config, compositions=COMPOSITIONS)
            assert list(map(content, found)) == expected
    assert caplog.text.count('are answered one by one, for Layer') == 1


# Requests that wait.


def ask(engine, *asked):
    """Asks asynchronously: (request, config, composition) each. Returns the responses or errors."""

    async def all_of_them():
        return await asyncio.gather(
            *(engine.infer_async(each, config, composition=composition) for each, config, composition in asked),
            return_exceptions=True)

    return asyncio.run(all_of_them())


def batches_of(engine):
    """Has the engine's batches be counted from now on."""
    sizes = []
    answered = type(engine)._infer

    def counting(self, infer_requests, **kwargs):
        sizes.append(len(infer_requests))
        return answered(self, infer_requests, **kwargs)

    return sizes, mock.patch.object(FusionEngine, '_infer', counting)


def test_requests_that_wait_are_answered_in_one_batch_whatever_their_compositions(engine, config):
    expected = alone(engine, config)
    sizes, counting = batches_of(engine)
    with counting:
        found = ask(engine, *((each, config, composition) for each, composition in zip(REQUESTS, COMPOSITIONS)))
    assert list(map(content, found)) == expected
    assert len(sizes) < len(REQUESTS) and sum(sizes) == len(REQUESTS)


def test_an_error_reaches_only_whom_it_belongs_to_and_the_next_request_works(engine, config):
    expected = alone(engine, config)
    found = ask(engine, (REQUESTS[0], config, COMPOSITIONS[0]), (REQUESTS[1], config, ['nobody']),
                (BAD, config, ['adapter_0']), (REQUESTS[3], config, COMPOSITIONS[3]))
    assert [content(found[0]), content(found[3])] == [expected[0], expected[3]]
    assert isinstance(found[1], ValueError) and 'nobody' in str(found[1])
    assert isinstance(found[2], Exception)
    assert content(ask(engine, (REQUESTS[4], config, COMPOSITIONS[4]))[0]) == expected[4]


def test_settings_that_differ_make_different_batches_and_the_oldest_request_goes_first(config):
    other = copy(config)
    other.max_tokens = 3
    assert waiting(idle(max_batch_size=2), *enumerate([config, other, config, config, other])) == [[0, 2], [1, 4], [3]]


def waiting(engine_like, *asked):
    """Puts requests into the queue of what has an engine's queue, and returns the batches that it fetches."""
    for request, settings in asked:
        engine_like._queue.put((request, {'request_config': settings}, (None, None)))
    batches = []
    while engine_like._waiting or not engine_like._queue.empty():
        fetched = FusionEngine._fetch_infer_requests(engine_like)
        batches.append(None if fetched is None else fetched[0]['infer_requests'])
    return batches


def idle(**changes):
    """Returns what has an engine's queue, but not its thread, which would answer meanwhile."""
    return SimpleNamespace(
        **{
            '_queue': Queue(),
            '_waiting': [],
            'max_batch_size': 4,
            'max_model_len': None,
            '_length': lambda request: 0,
            **changes
        })


def test_several_answers_to_one_request_count_in_a_batch(config):
    config.n, config.num_beams = 2, 3
    assert waiting(idle(), *((number, config) for number in range(3))) == [[0], [1], [2]]
    config.num_beams = 1
    assert waiting(idle(), *((number, config) for number in range(3))) == [[0, 1], [2]]
    config.n = 100
    assert waiting(idle(), *((number, config) for number in range(2))) == [[0], [1]]


def test_a_long_prompt_takes_no_room_for_tokens_from_others(config):
    config.max_tokens = 10
    engine = idle(max_model_len=100, _length=lambda request: request)
    # The first alone has room for 5 tokens; with it, the others would have no more.
    assert waiting(engine, *((length, config) for length in (95, 10, 90, 91, 20))) == [[95], [10, 90, 20], [91]]


def test_who_went_away_while_it_waited_is_in_no_batch(config):
    tickets = [Ticket() for _ in range(3)]
    tickets[1].is_abandoned = True
    asked = [ComposedRequest(REQUESTS[0], None, None, ticket) for ticket in tickets]
    assert waiting(idle(), *((each, config) for each in asked)) == [[asked[0], asked[2]]]
    tickets[0].is_abandoned = tickets[2].is_abandoned = True
    assert waiting(idle(), *((each, config) for each in asked)) == [None]


def test_requests_that_are_encoded_before_are_answered_the_same_also_among_others(engine, config):
    expected = alone(engine, config)
    asked = [
        ComposedRequest(engine.encoded(each) if number % 2 else each, composition)
        for number, (each, composition) in enumerate(zip(REQUESTS, COMPOSITIONS))
    ]
    for _ in range(2):
        assert list(map(content, engine._infer(asked, config))) == expected
    with pytest.raises(Exception, match='nobody'):
        engine.encoded(BAD)


def test_a_ticket_tells_how_long_each_part_took(engine, config):
    tickets = [Ticket() for _ in REQUESTS]
    assert not any(ticket.has_started or ticket.is_composed or ticket.batch_size for ticket in tickets)
    engine._infer([ComposedRequest(*each, None, ticket) for *each, ticket in zip(REQUESTS, COMPOSITIONS, tickets)],
                  config)
    for ticket in tickets:
        ticket.end()
        assert ticket.has_started and ticket.is_composed and ticket.batch_size == len(REQUESTS)
        parts = (ticket.seconds_queued, ticket.seconds_composing, ticket.seconds_generating)
        assert all(seconds > 0 for seconds in parts) and parts == (ticket.seconds_queued, ticket.seconds_composing,
                                                                   ticket.seconds_generating)


@pytest.mark.parametrize('n', [1, 3])
def test_a_row_for_which_nobody_waits_ends_and_no_other(engine, config, n):
    config.n, config.max_tokens, config.return_details, config.temperature = n, 40, True, 1.
    seeds = range(len(REQUESTS))
    expected = engine.infer(REQUESTS, config, compositions=COMPOSITIONS, seeds=seeds, use_tqdm=False)
    tickets = [Ticket() for _ in REQUESTS]
    tickets[1].is_abandoned = tickets[3].is_abandoned = True
    found = engine._infer([ComposedRequest(*each) for each in zip(REQUESTS, COMPOSITIONS, seeds, tickets)], config)
    for number, (response, as_before) in enumerate(zip(found, expected)):
        for choice, choice_before in zip(response.choices, as_before.choices):
            if number in (1, 3):
                assert len(choice.token_ids) == 1 < len(choice_before.token_ids)
            else:
                assert choice.token_ids == choice_before.token_ids


def stripped(texts):
    return [text.strip() for text in texts]


def stream(engine, config, *asked):
    """Asks for streams and returns the texts that came, or the errors."""

    chunks = []

    async def one(each, composition):
        text = ''
        try:
            async for chunk in await engine.infer_async(each, config, composition=composition):
                text += chunk.choices[0].delta.content or ''
                chunks.append(text)
        except Exception as e:
            return e
        # ms-swift 3 streams fewer line breaks than it answers.
        return text.strip()

    async def all_of_them():
        return await asyncio.wait_for(asyncio.gather(*(one(*pair) for pair in asked)), 60)

    found = asyncio.run(all_of_them())
    assert len(chunks) >= sum(not isinstance(each, Exception) for each in found)
    return found


def test_streams_of_a_batch_are_what_is_answered_without(engine, config):
    expected = alone(engine, config)
    config.stream = True
    assert stream(engine, config, *zip(REQUESTS, COMPOSITIONS)) == stripped(expected)


def test_a_stream_is_computed_with_its_fusion_where_adapters_are_activated_by_thread(written, monkeypatch):
    monkeypatch.setenv('USE_UNIQUE_THREAD', '0')
    engine, args = load(written, 'swift')
    config = args.get_request_config()
    expected = alone(engine, config)
    config.stream = True
    assert stream(engine, config, *zip(REQUESTS, COMPOSITIONS)) == stripped(expected)


def test_a_stream_that_fails_ends_with_its_error_and_no_other(engine, config):
    expected = alone(engine, config)
    config.stream = True
    found = stream(engine, config, (REQUESTS[0], COMPOSITIONS[0]), (REQUESTS[1], ['nobody']),
                   (REQUESTS[4], COMPOSITIONS[4]))
    assert [found[0], found[2]] == stripped([expected[0], expected[4]])
    assert isinstance(found[1], ValueError) and 'nobody' in str(found[1])


def test_streams_that_cannot_be_batched_come_one_by_one(engine, config):
    expected = alone(engine, config)
    config.stream = True
    from swift_patch.model.variant import RowsVariant
    forward = RowsVariant.forward

    def in_one_heap(self, module, active_adapter, x, result, **kwargs):
        return forward(self, module, active_adapter, x.flatten(0, -2), result, **kwargs)

    with mock.patch.object(RowsVariant, 'forward', in_one_heap):
        assert stream(engine, config, *zip(REQUESTS, COMPOSITIONS)) == stripped(expected)


def test_a_client_that_goes_away_leaves_the_engine_to_the_next(engine, config):

    async def go_away():
        task = asyncio.ensure_future(engine.infer_async(REQUESTS[0], config, composition=COMPOSITIONS[0]))
        await asyncio.sleep(0)
        task.cancel()

    expected = alone(engine, config)
    asyncio.run(go_away())
    for _ in range(2):
        assert content(ask(engine, (REQUESTS[1], config, COMPOSITIONS[1]))[0]) == expected[1]


def test_two_engines_and_a_stock_one_may_share_a_template(engine, config, written):
    other = FusionEngine(engine.model, engine.template, adapter_name='other')
    expected = alone(engine, config)
    config.stream = True
    for asked in (other, engine):
        assert stream(asked, config, *zip(REQUESTS, COMPOSITIONS)) == stripped(expected)
    template = get_template(load(written, 'peft')[1])
    FusionEngine(engine.model, template)
    assert 'generate' not in vars(template)


def test_a_stream_that_nobody_reads_on_ends_before_the_next_batch(engine, config):
    expected = alone(engine, config)
    config.stream, config.max_tokens = True, 200
    batch = engine._infer([ComposedRequest(*pair) for pair in zip(REQUESTS, COMPOSITIONS)], config)
    next(batch)
    thread = engine._stream._thread
    batch.close()
    assert not thread.is_alive()
    config.stream, config.max_tokens = False, 8
    assert alone(engine, config) == expected


@pytest.mark.parametrize('size', [0, -1, 2.5, 'a', None, True])
def test_a_batch_size_is_a_positive_integer(engine, size):
    with pytest.raises(ValueError, match='max_batch_size is expected to be a positive integer, found'):
        FusionEngine(engine.model, engine.template, max_batch_size=size)
