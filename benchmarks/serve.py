"""What `swift-patch deploy` promises, measured: a real server on 127.0.0.1, asked from this process.

python benchmarks/serve.py [--requests N] [--rounds N] [--many N] [--only FIGURE ...] [--threads N] [--json FILE]

The figures, of which each is a ratio or a count within one run, for times are those of a machine that others use, too:

    equal       requests at once, each with its own mixture of 3 of 14 LoRAs: how many are not answered as one by one
    throughput  tokens per second of these, over those of the same requests with one LoRA for all
    latency     milliseconds that the server adds to one request over the engine alone
    memory      resident memory after many requests, some of them bad, over that after a tenth of them
    kill        SIGKILL and restart under load: answers that are another's, and requests that hang

Of `equal`, `throughput` and `latency` the model is a Qwen2 with 24 layers, hidden 256; of the others a tiny one.
"""
import argparse
import httpx
import json
import os
import psutil
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import torch
from adapters import write_adapters
from concurrent.futures import ThreadPoolExecutor
from measure import timed
from pathlib import Path
from rich.console import Console
from rich.table import Table
from server import Server, posted_at_once, serving
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from workloads import NAMES, SHAPES

from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE, build_tiny_qwen2

ADDED_MS = 15.
# Of one request alone, few: what a server adds is not by the token.
CHAT, TOKENS = '/v1/chat/completions', 16
JSON = {'Content-Type': 'application/json'}
SECONDS = 600
OPTIONS = ('--model_type', MODEL_TYPE, '--template', TEMPLATE, '--torch_dtype', 'float32', '--temperature', '0')
# What is wrong with one request of twenty, and the status that says so.
BAD: List[Tuple[bytes, int]] = [
    (json.dumps(body).encode(), status) for body, status in (
        ({'model': 'lora_99', 'messages': [{'role': 'user', 'content': 'a'}]}, 404),
        ({'model': 'lora_0=0.5,lora_99=0.5', 'messages': [{'role': 'user', 'content': 'a'}]}, 404),
        ({'model': 'lora_0=0.5,lora_1', 'messages': [{'role': 'user', 'content': 'a'}]}, 400),
        ({'model': 'model', 'messages': [{'role': 'user', 'content': 'a'}], 'adapters': ['lora_0'], 'weights': [1, 2]},
         400),
        ({'model': 'lora_0', 'messages': [{'role': 'user', 'content': 'a' * 5000}]}, 400),
        ({'model': 'lora_0', 'messages': 'a'}, 400),
        ({'model': 'lora_0', 'messages': [{'role': 'user'}]}, 400),
        ([], 400),
    )
] + [(b'{"model": "lora_0", "messages": [', 400), (b'\xff\xfe', 400)]  # yapf: disable


class Figure(NamedTuple):
    """A row of the table.

    Attributes:
        what: What was measured.
        found: The number.
        bound: What it is held to.
        is_least: Whether the bound is the least that is allowed, and not the most.
        details: What else is told.
    """
    what: str
    found: float
    bound: float
    is_least: bool
    details: Dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether the bound is met."""
        return self.found >= self.bound if self.is_least else self.found <= self.bound


class Files(NamedTuple):
    """A model and its LoRAs on disk."""
    model: str
    adapters: Dict[str, str]


def written(folder: Path, shape: str) -> Files:
    """Writes a model of a shape of `workloads` and 14 LoRAs for it, in PEFT's format."""
    torch.manual_seed(0)
    size = SHAPES[shape]
    model = build_tiny_qwen2(
        folder / 'model',
        hidden_size=size['hidden_size'],
        intermediate_size=size['intermediate_size'],
        num_layers=size['num_hidden_layers'],
        num_heads=size['num_attention_heads'],
        num_kv_heads=size['num_key_value_heads'])
    adapters = write_adapters(folder / 'adapters', len(NAMES), shape)
    return Files(model, {name: str(adapters / name) for name in NAMES})


def mixtures(count: int, seed: int = 0) -> List[Dict[str, float]]:
    """Returns different mixtures of three LoRAs with random weights."""
    rng = random.Random(seed)
    return [{name: round(rng.uniform(0.1, 1), 3) for name in rng.sample(NAMES, 3)} for _ in range(count)]


def question(number: int) -> str:
    """Returns what is asked; every one is of the same length."""
    return f'What is {number:05}?'


def body_of(number: int, mixture: Dict[str, float], max_tokens: int) -> Dict[str, Any]:
    """Returns the body of a request."""
    return {
        'model': model_of(mixture),
        'messages': [{
            'role': 'user',
            'content': question(number)
        }],
        'max_tokens': max_tokens,
        'temperature': 0
    }


def model_of(mixture: Dict[str, float]) -> str:
    """Returns how a request asks for a mixture."""
    return ','.join(f'{name}={weight}' for name, weight in mixture.items())


def content(response: httpx.Response) -> str:
    """Returns what was answered."""
    response.raise_for_status()
    return str(response.json()['choices'][0]['message']['content'])


def asked_at_once(url: str, bodies: List[Dict[str, Any]]) -> Tuple[List[str], float, float]:
    """Asks all at once and returns the answers, the tokens per second, and how large a batch was at the median."""
    found: List[httpx.Response] = []
    seconds = timed(lambda: found.extend(posted_at_once(url + CHAT, bodies)))
    answers = [content(response) for response in found]
    tokens = sum(response.json()['usage']['completion_tokens'] for response in found)
    sizes = [response.json()['timings']['batch_size'] for response in found]
    return answers, tokens / seconds, statistics.median(sizes)


def measure_large(files: Files, args: argparse.Namespace, progress: Callable[[str], None]
                  ) -> Iterator[Tuple[str, Figure]]:  # yapf: disable
    """Measures what a model of 24 layers is for."""
    bodies = [body_of(number, mixture, 32) for number, mixture in enumerate(mixtures(args.requests))]
    with serving(files.model, files.adapters, *OPTIONS, '--max_batch_size', str(args.max_batch_size)) as server:
        with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
            for body in bodies[:3]:
                content(client.post(CHAT, json=body))
            if 'latency' in args.only:
                progress('latency')
                yield 'latency', added_latency(files, client)
            if 'equal' in args.only:
                progress(f'{args.requests} one by one')
                expected = [content(client.post(CHAT, json=body)) for body in bodies]
        if 'equal' in args.only:
            progress(f'{args.requests} at once')
            answers, _, median_size = asked_at_once(server.url, bodies)
            yield 'equal', Figure(f'of {args.requests} requests at once, answers unlike one by one',
                                  sum(answer != one for answer, one in zip(answers, expected)), 0, False, {
                                      'different answers': len(set(answers)),
                                      'batch size at the median': median_size
                                  })
        if 'throughput' in args.only:
            yield 'throughput', throughput(server, bodies, args.rounds, progress)


def throughput(server: Server, bodies: List[Dict[str, Any]], rounds: int, progress: Callable[[str], None]) -> Figure:
    """Compares requests that each have their own mixture with the same requests of one LoRA, by turns."""
    of_one = [{**body, 'model': NAMES[0]} for body in bodies]
    candidates = [('mixtures', bodies), ('one LoRA', of_one)]
    found: Dict[str, List[float]] = {name: [] for name, _ in candidates}
    for number in range(rounds):
        for name, of_candidate in candidates if number % 2 else candidates[::-1]:
            progress(f'throughput: {name}, round {number + 1} of {rounds}')
            found[name].append(asked_at_once(server.url, of_candidate)[1])
    ratios = [ours / theirs for ours, theirs in zip(found['mixtures'], found['one LoRA'])]
    return Figure(
        'tokens per second, each its own mixture over one LoRA for all', statistics.median(ratios), 0.85, True, {
            'ratios': [round(ratio, 3) for ratio in ratios],
            **{
                f'tokens/s, {name}': [round(each, 1) for each in rates]
                for name, rates in found.items()
            }
        })


def added_latency(files: Files, client: httpx.Client, count: int = 60) -> Figure:
    """Compares one request of the server with the same of an engine in a process of its own, by turns."""
    found: Dict[str, List[float]] = {'engine': [], 'server': []}
    command = [sys.executable, __file__, '--engine', json.dumps(files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine:
        try:
            for number, mixture in enumerate(mixtures(count + 3, seed=1)):
                answers, body = {}, body_of(number, mixture, TOKENS)

                def by_engine() -> float:
                    print(json.dumps([body['messages'], mixture]), file=engine.stdin, flush=True)
                    answers['engine'], seconds = json.loads(engine.stdout.readline())
                    return float(seconds)

                def by_server() -> float:
                    return timed(lambda: answers.update(server=content(client.post(CHAT, json=body))))

                order = [('engine', by_engine), ('server', by_server)]
                seconds = {name: ask() for name, ask in (order if number % 2 else order[::-1])}
                if answers['engine'] != answers['server']:
                    raise RuntimeError(f'The engine answers {answers["engine"]!r}, the server {answers["server"]!r}.')
                for name, of_one in seconds.items() if number >= 3 else ():
                    found[name].append(of_one * 1e3)
        finally:
            engine.kill()
    added = [ours - theirs for ours, theirs in zip(found['server'], found['engine'])]
    return Figure(
        f'milliseconds that the server adds to one request of {TOKENS} tokens', statistics.median(added), ADDED_MS,
        False, {
            'ms, engine': round(statistics.median(found['engine']), 1),
            'ms, server': round(statistics.median(found['server']), 1),
            'quartiles of what is added': [round(each, 1) for each in statistics.quantiles(added)]
        })


def be_engine(files: Files) -> None:
    """Answers what stdin asks by an engine alone, and tells what it answered and in how many seconds."""
    from swift_patch import AdapterLibrary, FusionEngine
    from swift_patch.inference.engine import load_base_model
    from swift_patch.ms_swift import BaseArguments, InferRequest
    stdout, sys.stdout = sys.stdout, sys.stderr
    arguments = {'model_type': MODEL_TYPE, 'template': TEMPLATE, 'torch_dtype': 'float32', 'temperature': 0}
    args = BaseArguments(model=files.model, **arguments, max_new_tokens=TOKENS)
    library = AdapterLibrary(files.adapters)
    engine = FusionEngine(*load_base_model(args), library=library)
    engine.reserve(list(library), max_sources=8)
    config = args.get_request_config()
    for line in sys.stdin:
        messages, mixture = json.loads(line)
        found: List[Any] = []
        seconds = timed(lambda: found.extend(
            engine.infer([InferRequest(messages=messages)], config, compositions=[mixture], use_tqdm=False)))
        print(json.dumps([found[0].choices[0].message.content, seconds]), file=stdout, flush=True)


def memory(files: Files, count: int, progress: Callable[[str], None]) -> Figure:
    """Asks many requests, one of twenty of them bad, and looks how the server grows."""
    rng, end = random.Random(0), time.monotonic() + SECONDS
    sent = []
    for number, mixture in enumerate(mixtures(count, seed=2)):
        good = json.dumps(body_of(number, mixture, rng.randint(1, 6))).encode()
        sent.append(rng.choice(BAD) if rng.random() < 0.05 else (good, 200))
    with serving(files.model, files.adapters, *OPTIONS) as server, httpx.Client(
            base_url=server.url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
        process = psutil.Process(server.process.pid)

        def ask(one: Tuple[bytes, int]) -> Optional[int]:
            if time.monotonic() > end:
                return None
            status = client.post(CHAT, content=one[0], headers=JSON).status_code
            return status if status != one[1] else 0

        wrong, sizes = [], []
        for begin in range(0, count, count // 10):
            progress(f'memory: {begin} of {count} requests')
            wrong += [status for status in pool.map(ask, sent[begin:begin + count // 10]) if status != 0]
            sizes.append(process.memory_info().rss / 2**20)
    if wrong:
        raise RuntimeError(f'{len(wrong)} of {count} requests were answered by another status or not in time: '
                           f'{wrong[:5]}.')
    return Figure(f'resident memory after {count:,} requests, 5 % of them bad, over that after {count // 10:,}',
                  sizes[-1] / sizes[0], 1.02, False, {
                      'MiB, by tenths': [round(size, 1) for size in sizes],
                      'bad': sum(status != 200 for _, status in sent)
                  })


def kill(files: Files, times: int, progress: Callable[[str], None], workers: int = 8, kinds: int = 60) -> Figure:
    """Kills a server under load and starts another, several times, and looks at every answer."""
    bodies = [body_of(number, mixture, 24) for number, mixture in enumerate(mixtures(kinds, seed=3))]
    progress('kill: one by one')
    with serving(files.model, files.adapters, *OPTIONS) as server, httpx.Client(
            base_url=server.url, timeout=60) as client:
        expected = [content(client.post(CHAT, json=body)) for body in bodies]
    is_up, is_over, end = threading.Event(), threading.Event(), time.monotonic() + SECONDS
    url, counts, lock, enough = [''], {'equal': 0, 'wrong': 0, 'closed': 0, 'hung': 0}, threading.Lock(), 150
    answered = threading.Semaphore(0)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while not is_over.is_set() and time.monotonic() < end:
            if not is_up.wait(1):
                continue
            number = rng.randrange(kinds)
            try:
                answer = httpx.post(f'{url[0]}{CHAT}', json=bodies[number], timeout=30)
                is_equal = content(answer) == expected[number] and answer.json()['model'] == bodies[number]['model']
                outcome = 'equal' if is_equal else 'wrong'
            except httpx.TimeoutException:
                outcome = 'hung'
            except httpx.TransportError:
                outcome = 'closed'
            with lock:
                counts[outcome] += 1
            if outcome == 'equal':
                answered.release()

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, seed) for seed in range(workers)]
        try:
            for number in range(times):
                progress(f'kill: {number + 1} of {times}')
                with serving(files.model, files.adapters, *OPTIONS) as server:
                    url[0] = server.url
                    is_up.set()
                    for _ in range(enough):
                        if not answered.acquire(timeout=60):
                            raise RuntimeError(f'The server does not answer: {counts}.')
                    # All workers wait for answers, but for those that are between two.
                    is_up.clear()
                    server.process.kill()
                    server.process.wait()
        finally:
            is_over.set()
        for future in futures:
            future.result()
    if not counts['closed']:
        raise RuntimeError(f'No request was under way when the server was killed: {counts}.')
    return Figure(f'of the requests around {times} SIGKILLs, those with the answer of another, or none',
                  counts['wrong'] + counts['hung'], 0, False, {
                      'different answers': len(set(expected)),
                      **counts
                  })


def measured(args: argparse.Namespace, progress: Callable[[str], None]) -> Iterator[Tuple[str, Figure]]:
    """Measures what the arguments say."""
    with tempfile.TemporaryDirectory() as folder:
        if {'equal', 'throughput', 'latency'} & set(args.only):
            files = written(Path(folder) / 'small', 'small')
            yield from measure_large(files, args, progress)
        if 'memory' in args.only or 'kill' in args.only:
            files = written(Path(folder) / 'tiny', 'tiny')
        if 'memory' in args.only:
            yield 'memory', memory(files, args.many, progress)
        if 'kill' in args.only:
            yield 'kill', kill(files, args.kills, progress)


def main() -> int:
    """Prints a table of what was measured, and returns 1 where a bound is missed."""
    figures = ['latency', 'equal', 'throughput', 'memory', 'kill']
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--requests', type=int, default=200, help='how many at once')
    parser.add_argument('--rounds', type=int, default=5, help='how often throughput is measured')
    parser.add_argument('--max_batch_size', type=int, default=16, help='of these servers')
    parser.add_argument('--many', type=int, default=5000, help='how many requests the memory is looked at for')
    parser.add_argument('--kills', type=int, default=3, help='how often a server is killed')
    parser.add_argument('--only', nargs='+', choices=figures, default=figures)
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='of the server and of the engine')
    parser.add_argument('--json', type=Path, help='where to write what was measured')
    parser.add_argument('--engine', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ['OMP_NUM_THREADS'] = str(args.threads)
    if args.engine:
        be_engine(Files(*args.engine))
        return 0

    console = Console(stderr=True)
    start, found = time.monotonic(), {}
    for name, figure in measured(args, lambda what: console.print(f'{time.monotonic() - start:6.0f} s  {what}')):
        found[name] = figure
        console.print(f'{name}: {figure.found:.4g}', figure.details)
    table = Table('', 'found', 'bound', '', 'details', title=f'swift-patch deploy, {args.threads} threads')
    for figure in found.values():
        details = '\n'.join(f'{name}: {value}' for name, value in figure.details.items())
        sign = '≥' if figure.is_least else '≤'
        table.add_row(figure.what, f'{figure.found:.4g}', f'{sign} {figure.bound:g}',
                      'holds' if figure.holds else 'MISSED', details)
    Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({
                name: {
                    **figure._asdict(), 'holds': figure.holds
                }
                for name, figure in found.items()
            }, indent=2))
    return not all(figure.holds for figure in found.values())


if __name__ == '__main__':
    sys.exit(main())
