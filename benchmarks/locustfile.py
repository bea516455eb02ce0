"""Users of a server of `swift-patch deploy`, for locust (pip install locust).

locust --headless --locustfile benchmarks/locustfile.py --host http://127.0.0.1:8000 --users 16 --run-time 60s
"""
import json
import os
import random
from locust import FastHttpUser, between, task
from typing import Any, Dict

# The key of the server, if it has one.
HEADERS = {'Authorization': f'Bearer {os.environ.get("OPENAI_API_KEY", "EMPTY")}'}
MAX_SOURCES, MAX_TOKENS = 3, 16


class Asker(FastHttpUser):
    """Asks by a mixture of LoRAs that nobody asked by before, reads the answer, and thinks about it for a moment."""
    wait_time = between(0, 0.1)

    def on_start(self) -> None:
        """Finds out which LoRAs there are."""
        base, *loras = self.client.get('/v1/models', headers=HEADERS).json()['data']
        self.base, self.loras = base['id'], [model['id'] for model in loras]

    def body(self, **fields: Any) -> Dict[str, Any]:
        """Returns the body of a request by a mixture."""
        sources = random.sample(self.loras, min(MAX_SOURCES, len(self.loras)))
        return {
            'model': self.base,
            'adapters': {
                name: random.uniform(0.1, 1)
                for name in sources
            },
            'messages': [{
                'role': 'user',
                'content': f'What is {random.randrange(10_000)}?'
            }],
            'max_tokens': MAX_TOKENS,
            **fields
        }

    @task(8)
    def ask(self) -> None:
        """Waits for the whole answer."""
        body = self.body()
        with self.client.post(
                '/v1/chat/completions', json=body, headers=HEADERS, name='answer', catch_response=True) as response:
            model = ','.join(f'{name}={weight}' for name, weight in body['adapters'].items())
            if response.status_code != 200 or response.json()['model'] != model:
                response.failure(f'{response.status_code} {response.text[:200]}')

    @task(3)
    def read(self) -> None:
        """Reads an answer as it comes."""
        with self.client.post(
                '/v1/chat/completions', json=self.body(stream=True), headers=HEADERS, name='stream',
                catch_response=True) as response:
            if response.status_code != 200 or not response.text.endswith('data: [DONE]\n\n'):
                response.failure(f'{response.status_code} {response.text[-200:]}')

    @task(1)
    def mistake(self) -> None:
        """Asks by a LoRA that does not exist, which is told."""
        body = self.body(adapters=['none-of-them'])
        with self.client.post(
                '/v1/chat/completions', json=body, headers=HEADERS, name='mistake', catch_response=True) as response:
            if response.status_code == 404 and 'none-of-them' in json.loads(response.text)['error']['message']:
                response.success()
            else:
                response.failure(f'{response.status_code} {response.text[:200]}')
