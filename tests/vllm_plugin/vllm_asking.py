"""Requests to a server of `l0` to `l4`, and what they are to be answered."""
import httpx
import random
from server import posted_at_once

PROMPT, TOKENS = 'hello world', 12
# In logits. What is as close as this may be turned around by the order of sums.
MARGIN = 1e-3
OF_RANK_4 = ['l0', 'l1', 'l2', 'l3']


def named(mixture, merge_method='fusion'):
    """Returns how a request asks for a mixture."""
    parts = [f'{name}={weight}' for name, weight in mixture.items()]
    return ','.join([*parts, f'merge_method={merge_method}'] if merge_method in ('mixture', 'selection') else parts)


def drawn(oracle, count, seed=0, merge_methods=('fusion', 'mixture', 'fusion', 'mixture', 'selection')):
    """Returns random mixtures of one to three adapters, by how a request asks for them, with their answers."""
    rng = random.Random(seed)
    found, tried = {}, 0
    while len(found) < count:
        merge_method = merge_methods[tried % len(merge_methods)]
        # Outputs alone are averaged whatever the ranks.
        names = [*OF_RANK_4, 'l4'] if merge_method in ('mixture', 'selection') else OF_RANK_4
        mixture = {name: round(rng.uniform(-0.7, 1.2), 3) for name in rng.sample(names, rng.randint(1, 3))}
        answer = oracle.answer(PROMPT, mixture, merge_method, TOKENS)
        if answer.margin > MARGIN:
            found[named(mixture, merge_method)] = answer.tokens
        tried += 1
    assert tried < 2 * count
    return found


def body_of(model, **fields):
    return {
        'model': model,
        'prompt': PROMPT,
        'max_tokens': TOKENS,
        'temperature': 0,
        'return_token_ids': True,
        **fields,
    }


def tokens_of(response):
    """Returns the tokens of an answer; where there is none, the status."""
    return tuple(response.json()['choices'][0]['token_ids']) if response.status_code == 200 else response.status_code


def asked_at_once(server, models):
    """Returns the tokens of each of many requests that are sent at once, or the status of those that fail."""
    return list(map(tokens_of, posted_at_once(f'{server.url}/v1/completions', list(map(body_of, models)))))


def ask(server, model, **fields):
    return httpx.post(f'{server.url}/v1/completions', json=body_of(model, **fields), timeout=300)


def is_healthy(server):
    return httpx.get(f'{server.url}/health', timeout=60).status_code == 200


def listed(server):
    return [model['id'] for model in httpx.get(f'{server.url}/v1/models', timeout=60).json()['data']]
