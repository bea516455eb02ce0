"""A request as text to copy: for `curl`, and for the `openai` package."""
import json
import shlex
from typing import Any, List, Mapping

# The environment variable that has the key. The key itself is in no text that is shown.
KEY_VARIABLE = 'API_KEY'
# What OpenAI's requests do not have: its package takes these in `extra_body` alone.
OWN_FIELDS = ('adapters', 'weights', 'merge_method', 'lora')


def as_curl(base_url: str, body: Mapping[str, Any], has_key: bool) -> str:
    """Returns the command for a shell that sends a chat completion.

    Args:
        base_url: Where the server is, with its `/v1`.
        body: The request.
        has_key: The server asks for a key, which the command takes from the environment variable API_KEY.
    """
    fields = [f'  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}' for key, value in body.items()]
    parts = [f'curl {shlex.quote(base_url + "/chat/completions")}', "-H 'Content-Type: application/json'"]
    if has_key:
        parts.append(f'-H "Authorization: Bearer ${KEY_VARIABLE}"')
    parts.append('-d ' + shlex.quote('{\n' + ',\n'.join(fields) + '\n}'))
    return ' \\\n  '.join(parts)


def as_python(base_url: str, body: Mapping[str, Any], has_key: bool) -> str:
    """Returns the Python, with the `openai` package, that sends a chat completion and prints the answer.

    Args:
        base_url: Where the server is, with its `/v1`.
        body: The request.
        has_key: The server asks for a key, which the code takes from the environment variable API_KEY.
    """
    lines: List[str] = ['import os', 'from openai import OpenAI'] if has_key else ['from openai import OpenAI']
    # The package insists on one.
    key = f'os.environ[{KEY_VARIABLE!r}]' if has_key else repr('none')
    lines += ['', f'client = OpenAI(base_url={base_url!r}, api_key={key})', 'answer = client.chat.completions.create(']
    lines += [f'    {name}={value!r},' for name, value in body.items() if name not in OWN_FIELDS]
    extra = {name: value for name, value in body.items() if name in OWN_FIELDS}
    if extra:
        lines.append(f'    extra_body={extra!r},')
    lines += [')', 'print(answer.choices[0].message.content)']
    return '\n'.join(lines)
