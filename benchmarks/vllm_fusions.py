"""What a fusion for each request costs in vLLM, measured: a real one, on a CPU as on a GPU.

python benchmarks/vllm_fusions.py [--only FIGURE ...] [--rounds N] [--samples N] [--many N] [--threads N] [--json FILE]

It prints tables in Markdown. The figures:

    samples   samples per second of one dataset: one by one, rows in ms-swift's engine, vLLM with one LoRA for all, vLLM
              with a fusion for each sample and 4, 16, 64 slots for adapters
    run       the same by `swift-patch infer`, with either backend
    cpu       CPU seconds of 64 requests at once, each with a mixture that was never seen, over those with one for all,
              and over those with one for all in a vLLM without the plugin
    added     milliseconds that a mixture that was never seen adds to one request
    blocked   milliseconds that one holds up the engine, and those of an adapter that is loaded from a folder
    many      after many mixtures: memory of all processes, the list of models, the latency of the last over the first

The model is a Qwen2 with 24 layers, hidden 256, 168 LoRA layers of rank 8 (0.8 M elements); of `many` a tiny one. A
fusion is of 3 of 14 LoRAs. (A module called vllm here would hide vLLM.)
"""
import argparse
import httpx
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from measure import timed
from pathlib import Path
from rich.console import Console
from serve import Files, mixtures, model_of, question, written
from server import posted_at_once
from typing import Any, Callable, Dict, Iterator, List, NamedTuple
from vllm_server import BASE, ENVIRONMENT, VllmServer, serving_vllm
from workloads import SHAPES

from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE

TOKENS, AT_ONCE = 32, 64
SLOTS = (4, 16, 64)
SECONDS = 600
COMPLETIONS = '/v1/completions'
# vLLM's attention on a CPU wants heads of 32 and more.
SHAPES['tiny for vLLM'] = {**SHAPES['tiny'], 'hidden_size': 64, 'intermediate_size': 128}
# As much rank as they have, for each slot is computed in full.
OPTIONS = ('--dtype', 'float32', '--max-model-len', '256', '--enforce-eager', '--max-num-seqs', str(AT_ONCE),
           '--max-lora-rank', '8')
Progress = Callable[[str], None]


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        what: What was measured.
        found: The number, with its unit.
        details: What else is told.
    """
    what: str
    found: str
    details: str = ''


def body_of(number: int, model: str, max_tokens: int = TOKENS) -> Dict[str, Any]:
    """Returns the body of a request, which is answered by so many tokens."""
    return {
        'model': model,
        'prompt': question(number),
        'max_tokens': max_tokens,
        'temperature': 0,
        'ignore_eos': True,
    }


def ask(client: httpx.Client, body: Dict[str, Any]) -> str:
    """Returns what is answered."""
    response = client.post(COMPLETIONS, json=body)
    response.raise_for_status()
    return str(response.json()['choices'][0]['text'])


def ask_at_once(server: VllmServer, bodies: List[Dict[str, Any]]) -> None:
    """Asks all at once, and waits for all answers."""
    for response in posted_at_once(server.url + COMPLETIONS, bodies):
        response.raise_for_status()


def cpu_seconds(server: VllmServer) -> float:
    """Returns the seconds that all processes of a server have computed."""
    return sum(sum(process.cpu_times()[:2]) for process in server.processes)


def samples(files: Files, args: argparse.Namespace, progress: Progress) -> Iterator[Row]:
    """Compares engines on one dataset, each in a process of its own; of each the best round is told."""
    ways: Dict[str, Dict[str, Any]] = {
        'one by one': {'max_batch_size': 1},
        "rows in ms-swift's engine, batches of 16": {'max_batch_size': 16},
        "rows in ms-swift's engine, batches of 64": {'max_batch_size': 64},
        'vLLM, one LoRA for all': {'max_loras': 1, 'is_one_for_all': True},
        **{f'vLLM, a fusion for each, max_loras {slots}': {'max_loras': slots} for slots in SLOTS}
    }  # yapf: disable
    found: Dict[str, List[float]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way, told in ways.items():
            progress(f'samples: {way}, round {number + 1} of {args.rounds}')
            # An eighth tells as much of what takes as long for each.
            count = args.samples // 8 if told.get('max_batch_size') == 1 else args.samples
            found[way].append(in_process('by_engine', [files, count, told]))
    yield from _best(f'{args.samples} samples of {TOKENS} tokens', found)


def by_engine(files: Files, count: int, told: Dict[str, Any]) -> float:
    """Answers the dataset by an engine in this process, and returns the samples per second."""
    from swift.infer_engine import RequestConfig

    from swift_patch import AdapterLibrary
    from swift_patch.ms_swift import BaseArguments, InferRequest
    library, engine = AdapterLibrary(files.adapters), None
    if 'max_batch_size' in told:
        from swift_patch import FusionEngine
        from swift_patch.inference.engine import load_base_model
        options = {'model_type': MODEL_TYPE, 'template': TEMPLATE, 'torch_dtype': 'float32'}
        args = BaseArguments(model=files.model, **options)
        engine = FusionEngine(*load_base_model(args), library=library, max_batch_size=told['max_batch_size'])
    else:
        import torch

        from swift_patch.vllm_plugin.engine import VllmFusionEngine
        engine = VllmFusionEngine(
            files.model,
            library,
            model_type=MODEL_TYPE,
            template_type=TEMPLATE,
            torch_dtype=torch.float32,
            max_model_len=256,
            enforce_eager=True,
            max_num_seqs=AT_ONCE,
            max_loras=told['max_loras'],
            max_sources=3)
    config = RequestConfig(max_tokens=TOKENS, temperature=0)

    def answer(compositions: List[Dict[str, float]]) -> None:
        requests = [
            InferRequest(messages=[{
                'role': 'user',
                'content': question(number)
            }]) for number, _ in enumerate(compositions)
        ]
        engine.infer(requests, config, compositions=compositions, use_tqdm=False)

    # All adapters are read, and what is slow at first is done.
    answer([{'lora_0': 1.}] if told.get('is_one_for_all') else mixtures(AT_ONCE // 4, seed=9))
    compositions = [{'lora_0': 1.}] * count if told.get('is_one_for_all') else mixtures(count)
    return count / timed(answer, compositions)


def run(files: Files, args: argparse.Namespace, progress: Progress) -> Iterator[Row]:
    """Compares the backends of `swift-patch infer` on one dataset, see `samples`."""
    found: Dict[str, List[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for size, backend in itertools.product((16, AT_ONCE), ('transformers', 'vllm')):
                way = f'--infer_backend {backend} --max_batch_size {size}'
                progress(f'run: {way}, round {number + 1} of {args.rounds}')
                rate = in_process('by_run', [files, args.samples, folder, size, backend])
                found.setdefault(way, []).append(rate)
    yield from _best(f'swift-patch infer, {args.samples} samples of {TOKENS} tokens', found)


def by_run(files: Files, count: int, folder: str, size: int, backend: str) -> float:
    """Answers the dataset by `swift-patch infer`, and returns the samples per second of its loop."""
    from swift_patch.inference.config import InferConfig
    from swift_patch.inference.run import run_infer
    dataset = Path(folder) / 'dataset.jsonl'
    with open(dataset, 'w') as f:
        for number, mixture in enumerate(mixtures(count)):
            messages = [{'role': 'user', 'content': question(number)}]
            sample = {'messages': messages, 'adapters': list(mixture), 'weights': list(mixture.values())}
            print(json.dumps(sample), file=f)
    swift_args: Dict[str, Any] = {
        'model': files.model,
        'model_type': MODEL_TYPE,
        'template': TEMPLATE,
        'torch_dtype': 'float32',
        'temperature': 0,
        'max_new_tokens': TOKENS
    }
    if backend == 'vllm':
        swift_args.update(infer_backend='vllm', vllm_max_model_len=256, vllm_enforce_eager=True)
    result = str(Path(folder) / 'result.jsonl')
    config = InferConfig(files.adapters, str(dataset), result, swift_args, max_batch_size=size, overwrite=True)
    return run_infer(config).samples_per_second


def _best(what: str, found: Dict[str, List[float]]) -> Iterator[Row]:
    for way, rates in found.items():
        yield Row(f'{what}: {way}', f'{max(rates):.2f} samples/s', ', '.join(f'{rate:.2f}' for rate in rates))


def cpu(server: VllmServer, alone: VllmServer, args: argparse.Namespace, progress: Progress) -> Iterator[Row]:
    """Compares requests that each have a mixture that was never seen with the same of one mixture, by turns.

    And with the same of as many mixtures that the engine has: what the rest is, it takes for adapters that differ.

    Args:
        server: a vLLM with the plugin.
        alone: one without, which serves the adapter `lora_0`.
        args: what `main` was told.
        progress: is told what is measured.
    """
    new = iter(mixtures(AT_ONCE * args.rounds * 3, seed=4))
    found: Dict[str, List[float]] = {}
    for number in range(args.rounds * 3):
        models = list(map(model_of, itertools.islice(new, AT_ONCE)))
        turns = [
            # The mixtures are known once they were asked for.
            ('never seen', server, models),
            ('known', server, models),
            ('one for all', server, models[:1] * AT_ONCE),
            ('base model', server, [BASE] * AT_ONCE),
            ('one for all without the plugin', alone, ['lora_0'] * AT_ONCE),
        ]
        for way, of_way, named in turns if number % 2 else [*turns[2:], *turns[:2]]:
            progress(f'cpu: {way}, round {number + 1} of {args.rounds * 3}')
            before = cpu_seconds(of_way)
            ask_at_once(of_way, [body_of(each, model) for each, model in enumerate(named)])
            found.setdefault(way, []).append(cpu_seconds(of_way) - before)
    medians = {way: statistics.median(of_way) for way, of_way in found.items()}
    for first, second in (('never seen', 'one for all without the plugin'), ('never seen', 'one for all'),
                          ('never seen', 'known'), ('known', 'one for all'), ('one for all', 'base model')):
        ratios = [ours / theirs for ours, theirs in zip(found[first], found[second])]
        yield Row(f'CPU seconds of {AT_ONCE} mixtures at once, {first} over {second} (max_loras {AT_ONCE}), median',
                  f'{statistics.median(ratios):.2f}', f'{medians[first]:.2f} s over {medians[second]:.2f} s')


def added(server: VllmServer, progress: Progress, count: int = 60) -> Iterator[Row]:
    """Compares one request of a mixture that was never seen with the same asked again."""
    progress('added')
    found: List[float] = []
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        for number, mixture in enumerate(mixtures(count, seed=5)):
            # Of the same prompt the prefix would be known, too.
            model = model_of(mixture)
            first = timed(ask, client, body_of(3 * number, model, 4))
            again = statistics.median(timed(ask, client, body_of(3 * number + each, model, 4)) for each in (1, 2))
            found.append((first - again) * 1e3)
    quartiles = statistics.quantiles(found)
    yield Row('ms that a mixture never seen adds to one request, median', f'{quartiles[1]:.1f}',
              f'quartiles {quartiles[0]:.1f} and {quartiles[2]:.1f}')


def blocked(files: Files, rounds: int) -> List[Row]:
    """Times by turns, in vLLM's engine in this process, how long adapters hold it up that it did not have."""
    import wrapt
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from swift_patch import AdapterLibrary
    from swift_patch.vllm_plugin.mixtures import Mixtures
    engine = LLM(
        files.model,
        dtype='float32',
        max_model_len=256,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=4,
        max_cpu_loras=8).llm_engine
    config = engine.model_config
    maker = Mixtures(config.hf_config, config.dtype, AdapterLibrary(files.adapters))
    loading: List[float] = []

    def load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        found = wrapped(*args, **kwargs)
        loading.append(time.perf_counter() - start)
        return found

    wrapt.wrap_function_wrapper('vllm.lora.worker_manager', 'WorkerLoRAManager._load_adapter', load)
    whole: Dict[str, List[float]] = {'merged': [], 'folder': []}
    parts: Dict[str, List[float]] = {'merged': [], 'folder': []}
    paths = list(files.adapters.values())
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as memory:
        for number, mixture in enumerate(mixtures(rounds, seed=6)):
            path = Path(memory) / 'adapter'
            if not path.exists():
                path.mkdir()
            for file in Path(paths[number % len(paths)]).iterdir():
                (path / file.name).write_bytes(file.read_bytes())
            requests = {
                'merged': maker.request(maker.composer.composition(mixture), model_of(mixture)),
                'folder': LoRARequest(f'folder{number}', number + 1, str(path))
            }
            for way in list(requests) if number % 2 else list(requests)[::-1]:
                whole[way].append(timed(engine.add_lora, requests[way]) * 1e3)
                parts[way].append(loading.pop() * 1e3)
    rows = []
    # In the first ones each adapter is read for the first time.
    first = len(paths)
    for what, found in (('an adapter holds up the engine', whole), ('of which until it is loaded', parts)):
        medians = {way: statistics.median(of_one[first:]) for way, of_one in found.items()}
        ratio = statistics.median(ours / theirs
                                  for ours, theirs in zip(found['merged'][first:], found['folder'][first:]))
        rows.append(
            Row(f'ms that {what}: a mixture never seen, median', f'{medians["merged"]:.2f}',
                f'from a folder in memory: {medians["folder"]:.2f}; ratio {ratio:.2f}'))
    return rows


def many(files: Files, count: int, progress: Progress, every: int = 100) -> Iterator[Row]:
    """Asks for many different mixtures, one after another, and looks how the server grows and slows down.

    Each is compared with one of the base model, asked beside it: others use the machine, too.
    """
    folder = str(Path(files.adapters['lora_0']).parent)
    with serving_vllm(
            files.model, *OPTIONS, SWIFT_PATCH_ADAPTERS=folder) as server, httpx.Client(
                base_url=server.url, timeout=SECONDS) as client:

        def memory() -> float:
            return sum(process.memory_info().rss for process in server.processes) / 2**20

        def listed() -> int:
            return len(client.get('/v1/models').json()['data'])

        seconds: List[float] = []
        ratios: List[float] = []
        sizes: List[float] = []
        before = listed()
        # What is remembered at most fills up first.
        for number, mixture in enumerate(mixtures(count + every, seed=7)):
            if number % every == 0:
                progress(f'many: {number} of {count + every}')
                sizes.append(memory())
            seconds.append(timed(ask, client, body_of(number, model_of(mixture), 4)))
            ratios.append(seconds[-1] / timed(ask, client, body_of(number, BASE, 4)))
        sizes.append(memory())
        first, last = slice(every, 2 * every), slice(-every, None)
        yield Row(
            f'latency of the last {every} of {count:,} different mixtures over the first {every}, after {every}',
            f'{statistics.median(ratios[last]) / statistics.median(ratios[first]):.3f}',
            f'each over the base model beside it; in ms {statistics.median(seconds[first]) * 1e3:.1f}, then '
            f'{statistics.median(seconds[last]) * 1e3:.1f}')
        yield Row(f'memory of all processes after {count + every:,} mixtures, over that after {2 * every}',
                  f'{sizes[-1] / sizes[2]:.3f}', 'MiB: ' + ', '.join(f'{size:.0f}' for size in sizes[::4]))
        yield Row('models listed before and after', f'{before} and {listed()}')


def in_process(what: str, arguments: List[Any]) -> Any:
    """Measures something in a process of its own, where the environment is vLLM's, and returns what was found."""
    environment = {**os.environ, **ENVIRONMENT, 'OMP_NUM_THREADS': os.environ['OMP_NUM_THREADS']}
    with tempfile.NamedTemporaryFile('w+') as log, tempfile.NamedTemporaryFile('r') as result:
        # What vLLM says goes to any output.
        command = [sys.executable, __file__, '--child', json.dumps([what, arguments, result.name])]
        status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        if status:
            raise RuntimeError(f'Measuring {what} ended with {status}:\n{Path(log.name).read_text()[-5000:]}')
        return json.load(result)


def child(what: str, arguments: List[Any], result: str) -> None:
    """Measures what `in_process` wants."""
    files, *others = arguments
    found = {'by_engine': by_engine, 'by_run': by_run, 'blocked': blocked}[what](Files(*files), *others)
    Path(result).write_text(json.dumps(found))


def measured(args: argparse.Namespace, progress: Progress) -> Iterator[Row]:
    """Measures what the arguments say."""
    with tempfile.TemporaryDirectory() as folder:
        if set(args.only) - {'many'}:
            progress('writing a model and its adapters')
            small = written(Path(folder) / 'small', 'small')
        if 'blocked' in args.only:
            progress('blocked')
            yield from (Row(*row) for row in in_process('blocked', [small, 100]))
        if {'cpu', 'added'} & set(args.only):
            adapters = str(Path(small.adapters['lora_0']).parent)
            options = (*OPTIONS, '--max-loras', str(AT_ONCE))
            threads = {'OMP_NUM_THREADS': os.environ['OMP_NUM_THREADS']}
            with serving_vllm(small.model, *options, SWIFT_PATCH_ADAPTERS=adapters, **threads) as server:
                # Every adapter is read, and all that is slow at first is done.
                ask_at_once(server, [body_of(number, name) for number, name in enumerate(small.adapters)])
                ask_at_once(server,
                            [body_of(each, model_of(one)) for each, one in enumerate(mixtures(AT_ONCE, seed=8))])
                if 'added' in args.only:
                    yield from added(server, progress)
                if 'cpu' in args.only:
                    one = f'lora_0={small.adapters["lora_0"]}'
                    with serving_vllm(
                            small.model, *options, '--enable-lora', '--lora-modules', one, VLLM_PLUGINS='',
                            **threads) as alone:
                        ask_at_once(alone, [body_of(number, 'lora_0') for number in range(AT_ONCE)])
                        yield from cpu(server, alone, args, progress)
        if 'samples' in args.only:
            yield from samples(small, args, progress)
        if 'run' in args.only:
            yield from run(small, args, progress)
        if 'many' in args.only:
            yield from many(written(Path(folder) / 'tiny', 'tiny for vLLM'), args.many, progress)


def main() -> None:
    """Prints a table of what was measured."""
    figures = ['blocked', 'added', 'cpu', 'samples', 'run', 'many']
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=figures, default=figures)
    parser.add_argument('--rounds', type=int, default=2, help='how often samples are measured')
    parser.add_argument('--samples', type=int, default=128, help='how many samples the dataset has')
    parser.add_argument('--many', type=int, default=2000, help='how many different mixtures one server is asked for')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='of each engine')
    parser.add_argument('--json', type=Path, help='where to write what was measured')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    os.environ['OMP_NUM_THREADS'] = str(args.threads)
    console, start, rows = Console(stderr=True), time.monotonic(), []
    for row in measured(args, lambda what: console.print(f'{time.monotonic() - start:6.0f} s  {what}')):
        rows.append(row)
        console.print(*row)
    print(f'| {args.threads} threads | found | |\n| --- | ---: | --- |')
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=2))


if __name__ == '__main__':
    main()
