"""What an engine is asked to load, by a client that says when it has. Real ones are in the other tests."""
import asyncio
import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from swift_patch.vllm_plugin import loads
from swift_patch.vllm_plugin.loads import Loads


class Client:
    """What of vLLM's client of an engine is asked: it answers when it is told to."""

    def __init__(self):
        self.asked, self.answer, self.errored = [], None, False

    async def add_lora(self, lora_request):
        self.asked.append(lora_request.lora_int_id)
        self.answer = asyncio.get_running_loop().create_future()
        return await self.answer


async def begun(client, coroutine):
    """Returns a task of a coroutine once it has asked the client."""
    task, before = asyncio.ensure_future(coroutine), len(client.asked)
    while len(client.asked) == before:
        await asyncio.sleep(0)
    return task


def adapter(number):
    return LoRARequest(f'adapter{number}', number, 'folder')


def test_an_adapter_is_asked_for_once_whoever_goes_away_meanwhile():

    async def check():
        client = Client()
        loaded = Loads(client, 2)
        first = await begun(client, loaded.load(adapter(1)))
        others = [asyncio.ensure_future(loaded.load(adapter(1))) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        client.answer.set_result(True)
        await asyncio.gather(*others)
        await loaded.load(adapter(1))
        assert client.asked == [1]

    asyncio.run(check())


def test_what_was_not_asked_for_for_longest_is_asked_for_again():

    async def check():
        client = Client()
        loaded = Loads(client, 2)
        for number, is_new in ((1, True), (2, True), (1, False), (3, True), (1, False), (2, True)):
            before = len(client.asked)
            task = await begun(client, loaded.load(adapter(number))) if is_new else loaded.load(adapter(number))
            if is_new:
                client.answer.set_result(True)
            await task
            assert (client.asked[before:], len(loaded) <= 2) == ([number] * is_new, True)

    asyncio.run(check())


@pytest.mark.parametrize('error, told', [
    (Exception("Call to add_lora method failed: adapter 'l0': no file"), "adapter 'l0': no file"),
    (OSError('no connection'), 'no connection'),
])  # yapf: disable
def test_what_is_wrong_is_told_to_all_who_wait_and_the_next_one_tries_again(error, told):

    async def check():
        client = Client()
        loaded = Loads(client, 2)
        waiting = [await begun(client, loaded.load(adapter(1))), asyncio.ensure_future(loaded.load(adapter(1)))]
        await asyncio.sleep(0)
        client.answer.set_exception(error)
        for found in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(found, ValueError) and told in str(found) and 'method failed' not in str(found)
        again = await begun(client, loaded.load(adapter(1)))
        client.answer.set_result(True)
        await again

    asyncio.run(check())


@pytest.mark.parametrize('last_word', [
    lambda answer: None,
    lambda answer: answer.cancel(),
    lambda answer: answer.set_exception(Exception('Call to add_lora method failed: worker died')),
    lambda answer: answer.set_exception(EngineDeadError()),
], ids=['none', 'cancelled', 'of a worker', 'of its end'])  # yapf: disable
def test_who_waits_for_an_engine_that_ends_is_told_that_it_ended_whatever_it_says_last(monkeypatch, last_word):
    monkeypatch.setattr(loads, '_SECONDS_OF_LOOKING', .01)

    async def check():
        client = Client()
        loaded = Loads(client, 2)
        task = await begun(client, loaded.load(adapter(1)))
        client.errored = True
        last_word(client.answer)
        with pytest.raises(EngineDeadError):
            await task
        assert client.answer.done() and not len(loaded)

    asyncio.run(check())


def test_a_failure_of_what_was_put_out_leaves_the_one_that_was_asked_for_since():

    async def check():
        client = Client()
        loaded = Loads(client, 1)
        first = await begun(client, loaded.load(adapter(1)))
        failing = client.answer
        for number in (2, 1):
            again = await begun(client, loaded.load(adapter(number)))
            client.answer.set_result(True)
            await again
        failing.set_exception(OSError())
        with pytest.raises(ValueError):
            await first
        await loaded.load(adapter(1))
        assert client.asked == [1, 2, 1]

    asyncio.run(check())
