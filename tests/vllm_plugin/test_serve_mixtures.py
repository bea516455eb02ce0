"""A real vLLM answers each request by its own mixture, and refuses what is wrong with one request to that one alone."""
import asyncio
import httpx
import openai
import os
import pytest
import random
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from vllm_asking import (MARGIN, OF_RANK_4, PROMPT, TOKENS, ask, asked_at_once, body_of, drawn, is_healthy, listed,
                         tokens_of)
from vllm_server import BASE

COUNT = 64


@pytest.fixture(scope='module')
def expected(oracle):
    """What each of many mixtures is to answer."""
    found = drawn(oracle, COUNT)
    assert len(set(found.values())) > COUNT / 2, 'or the tests would see nothing'
    return found


def test_mixtures_that_were_never_seen_are_answered_at_once_each_as_it_is_alone(server, expected):
    found = asked_at_once(server, expected)
    assert dict(zip(expected, found)) == expected


def test_the_base_model_and_single_adapters_are_answered_among_mixtures(server, oracle, expected):
    alone = {BASE: {}, **{name: {name: 1.0} for name in OF_RANK_4}}
    answers = {model: oracle.answer(PROMPT, mixture, 'fusion', TOKENS) for model, mixture in alone.items()}
    assert all(answer.margin > MARGIN / 100 for answer in answers.values())
    wanted = {**dict(list(expected.items())[:8]), **{model: answer.tokens for model, answer in answers.items()}}
    assert dict(zip(wanted, asked_at_once(server, wanted))) == wanted


def test_weights_are_equal_where_none_are_given_and_the_order_is_that_of_the_request(server):
    models = ['l0,l1', 'l0=0.5,l1=0.5', 'l1=0.5,l0=0.5']
    assert len({tokens_of(ask(server, model)) for model in models}) == 1


def test_what_was_asked_for_is_not_listed(server, folder, expected):
    asked_at_once(server, list(expected)[:8])
    assert listed(server) == [BASE, *sorted(path.name for path in folder.iterdir())]


@pytest.mark.parametrize('model, status, told', [
    ('l9', 404, 'l9'),
    ('l0=0.5,l9=0.5', 404, 'l9'),
    ('l0=0.5,l1', 400, 'weight'),
    ('l0=', 400, 'finite'),
    (',', 400, 'a=0.6,b=0.4'),
    ('l0=nan', 400, 'finite'),
    ('l0=1e999', 400, 'finite'),
    ('l0=0.5,l4=0.5', 400, 'rank'),
    ('l0,l1,merge_method=sum', 400, 'sum'),
    ('l0,merge_method=fusion,merge_method=mixture', 400, 'merge_method'),
    ('l0,l1,l2,l4,merge_method=mixture', 400, '32'),
    (','.join(['l0'] * 9), 400, '8'),
])  # yapf: disable
def test_what_is_wrong_is_told_to_the_one_who_asked(server, model, status, told):
    response = ask(server, model)
    assert response.status_code == status, response.text
    error = response.json()['error']
    assert told in error['message']
    assert error['code'] == status
    assert is_healthy(server)


def test_no_path_comes_from_a_request(server, folder):
    body = {'lora_name': 'mine', 'lora_path': str(folder / 'l0')}
    assert httpx.post(f'{server.url}/v1/load_lora_adapter', json=body, timeout=60).status_code == 404
    assert ask(server, str(folder / 'l0')).status_code == 404


def test_a_source_that_is_deleted_fails_its_own_requests_alone(server, folder, expected):
    few = dict(list(expected.items())[:16])
    assert ask(server, 'spoiled0=0.5,l1=0.5').status_code == 200
    (folder / 'spoiled0' / 'adapter_model.safetensors').unlink()
    broken = [f'spoiled0={number / 10},l1=0.5' for number in range(1, 9)]
    found = asked_at_once(server, [*few, *broken])
    assert dict(zip(few, found)) == few
    assert all(isinstance(status, int) and 400 <= status <= 500 for status in found[len(few):])
    assert is_healthy(server)


def test_a_source_that_holds_nan_fails_its_own_requests_alone(server, folder, expected):
    few = dict(list(expected.items())[:16])
    replace_values(folder / 'spoiled1' / 'adapter_model.safetensors', torch.nan)
    broken = [f'spoiled1={number / 10},l1=0.5' for number in range(1, 9)]
    found = asked_at_once(server, [*few, *broken])
    assert dict(zip(few, found)) == few
    assert all(isinstance(status, int) and 400 <= status <= 500 for status in found[len(few):])
    assert is_healthy(server)
    told = ask(server, broken[0])
    assert 'spoiled1' in told.json()['error']['message']


def test_a_source_that_vanishes_under_load_makes_no_answer_wrong(server, folder, expected):
    # It holds what l2 holds.
    of_it = {model.replace('l2', 'spoiled2'): tokens for model, tokens in expected.items() if 'l2' in model}
    of_others = {model: tokens for model, tokens in expected.items() if 'l2' not in model}
    models = random.Random(0).sample([*of_it, *of_others], COUNT)
    expected_tokens = {**of_it, **of_others}

    async def ask_all():
        async with httpx.AsyncClient(
                base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:

            async def ask(number, model):
                if number == COUNT // 2:
                    # The first ones are on their way, in which files are read.
                    os.rename(folder / 'spoiled2', folder.parent / 'away')
                return tokens_of(await client.post('/v1/completions', json=body_of(model)))

            return await asyncio.gather(*(ask(*each) for each in enumerate(models)))

    for model, found in zip(models, asyncio.run(ask_all())):
        if model in of_others:
            assert found == expected_tokens[model], model
        else:
            assert found == expected_tokens[model] or found in (400, 404, 500), model
    assert is_healthy(server)
    assert asked_at_once(server, of_others) == list(of_others.values())


def replace_values(file: Path, value: float) -> None:
    """Puts a file with another value in the place of a file, as `os.replace` does."""
    tensors = load_file(file)
    tensors[next(iter(tensors))].fill_(value)
    save_file(tensors, file.with_suffix('.new'), {'format': 'pt'})
    os.replace(file.with_suffix('.new'), file)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0) as client:
        yield client


def test_openai_asks_a_mixture(client, expected):
    for model, tokens in list(expected.items())[:4]:
        body = body_of(model)
        return_ids = {'return_token_ids': body.pop('return_token_ids')}
        found = client.completions.create(**body, extra_body=return_ids)
        assert tuple(found.choices[0].token_ids) == tokens
        assert found.model == model


def test_openai_streams_a_mixture(client, expected):
    for model, tokens in list(expected.items())[:4]:
        body = body_of(model)
        return_ids = {'return_token_ids': body.pop('return_token_ids')}
        chunks = client.completions.create(**body, stream=True, extra_body=return_ids)
        assert tuple(token for chunk in chunks for token in chunk.choices[0].token_ids) == tokens


def test_openai_chats_with_a_mixture(client, oracle):
    prompt = '<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n'
    answer = oracle.answer(prompt, {'l0': 0.6, 'l1': 0.4}, 'fusion', TOKENS)
    found = client.chat.completions.create(
        model='l0=0.6,l1=0.4',
        messages=[{
            'role': 'user',
            'content': 'hello'
        }],
        max_tokens=TOKENS,
        temperature=0,
        extra_body={'return_token_ids': True})
    assert tuple(found.choices[0].token_ids) == answer.tokens


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('model, error', [('l0=0.5,l9=0.5', openai.NotFoundError), ('l0=nan', openai.BadRequestError)])
def test_openai_raises_its_own_exceptions(client, model, error, stream):
    with pytest.raises(error):
        client.completions.create(model=model, prompt=PROMPT, stream=stream)
