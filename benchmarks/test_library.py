"""Adapters that stay on disk.

How much a library of M adapters costs, M from 10 to 10,000, beside PEFT, which loads them: each in processes of its own
(`starting.py`), with a tiny model of 28 LoRA layers, so that what grows with M is large beside what does not. Then,
with 168 LoRA layers and more, one composition over that of adapters of the same size loaded into the model, and over
its limit, see `copying.py`. Last, questions that each bring three LoRAs of their own, as PRAG's do.

`cached` is what the library has in memory; `never seen` is read from the page cache of the system. They are timed in
blocks of some calls in a row: whoever composes does nothing in between that takes the caches of the CPU.
"""
import json
import pytest
import random
import shutil
import statistics
import subprocess
import sys
import torch
from adapters import NeverSeen, loaded, read_all, write_adapters
from contextlib import contextmanager
from copying import copies_of, over_copy
from itertools import count, cycle
from measure import Ratio, in_blocks, interleaved, ratio
from pathlib import Path
from peft import PeftModel
from swift.tuners import SwiftModel
from typing import Any, Callable, Dict, Iterator, List, NamedTuple
from work import calls, counted, over, writes
from workloads import SOURCES, base_model, elements

import swift_patch
from swift_patch import AdapterLibrary, FusionComposer
from swift_patch.lora import compiled as kernel
from swift_patch.lora.reading import Reading
from swift_patch.patching import reverted

NUMBERS = (10, 100, 1_000, 10_000)
# By name: the shape, the dtype, and how many calls are a block.
SIZES = {
    '0.8M fp32': ('small', torch.float32, 20),
    '9.2M fp32': ('Qwen2.5-1.5B', torch.float32, 5),
    '9.2M bf16': ('Qwen2.5-1.5B', torch.bfloat16, 5),
}
# What is loaded into the model; of the library, what is composed again and again.
SEEN = [f'lora_{number}' for number in range(6)]
WARMUP = 1


class Size(NamedTuple):
    """Adapters of one size, in a library and in a model.

    Attributes:
        name: the size's name.
        calls: how many calls are a block.
        in_model: composes of adapters in the model.
        from_library: composes of adapters in the library.
        never_seen: names of adapters in the library.
        copies: what a merge is divided by.
    """
    name: str
    calls: int
    in_model: FusionComposer
    from_library: FusionComposer
    never_seen: NeverSeen
    copies: Dict[str, Callable[[], Any]]

    def candidates(self) -> Dict[str, Callable[[], Callable[[], Any]]]:
        """Returns what composes, and the copies, as `in_blocks` wants them."""
        rng = random.Random(0)

        def composing(composer: FusionComposer, samples: Iterator[List[str]]) -> Callable[[], Any]:
            return lambda: composer.compose(next(samples), [rng.random() for _ in range(3)])

        def seen() -> Iterator[List[str]]:
            return iter(lambda: rng.sample(SEEN, 3), None)

        def never_seen() -> Iterator[List[str]]:
            names = iter(self.never_seen.take(3 * (self.calls + WARMUP)))
            return iter(lambda: [next(names) for _ in range(3)], None)

        return {
            'in model': lambda: composing(self.in_model, seen()),
            'cached': lambda: composing(self.from_library, seen()),
            'never seen': lambda: composing(self.from_library, never_seen()),
            **{
                name: lambda copy=copy: copy
                for name, copy in self.copies.items()
            },
        }

    def seconds(self, *names: str) -> Dict[str, List[float]]:
        """Returns the seconds of candidates, by block."""
        candidates = self.candidates()
        return in_blocks({name: candidates[name] for name in names}, calls=self.calls, warmup=WARMUP)


def start(way: str, folder: Path, *options: str) -> Dict[str, Any]:
    """Returns what `starting.py` prints in a process of its own."""
    program = Path(__file__).with_name('starting.py')
    command = [sys.executable, str(program), way, str(folder), '--threads', str(torch.get_num_threads()), *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def with_library(folder: Path) -> Dict[str, Any]:
    """Returns what a library costs. A process has one first composition: three have, and their median is told."""
    found, *others = start('library', folder), *(start('library', folder, '--first') for _ in range(2))
    return {**found, 'seconds': statistics.median(of_one['seconds'] for of_one in (found, *others))}


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[int, Path]]:
    """The folders of so many adapters of the tiny model."""
    with temporary(tmp_path_factory) as folder:
        yield {number: write_adapters(folder / str(number), number, 'tiny', rank=2) for number in NUMBERS}


@contextmanager
def temporary(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is gone afterwards: there is much in it, of which pytest would keep the last three."""
    folder = factory.mktemp('adapters')
    yield folder
    shutil.rmtree(folder)


@pytest.mark.benchmark(group='library')
@pytest.mark.parametrize('number', NUMBERS[:-1])
def test_so_many_adapters_on_disk(benchmark: Any, folders: Dict[int, Path], number: int) -> None:
    found = benchmark.pedantic(with_library, args=(folders[number], ), rounds=1)
    benchmark.extra_info.update(way='library', number=number, measured=found)


@pytest.mark.gate
@pytest.mark.benchmark(group='library')
def test_the_memory_of_ten_thousand(gate: Callable, benchmark: Any, folders: Dict[int, Path]) -> None:
    found = [benchmark.pedantic(with_library, args=(folders[10_000], ), rounds=1)]
    benchmark.extra_info.update(way='library', number=10_000, measured=found[0])

    def memory() -> Ratio:
        return Ratio((found.pop() if found else start('library', folders[10_000]))['MiB of all'])

    gate('library memory', '10,000 LoRAs', memory)


@pytest.mark.benchmark(group='library')
def test_so_many_adapters_loaded_by_peft(benchmark: Any, folders: Dict[int, Path]) -> None:
    found = benchmark.pedantic(start, args=('peft', folders[100]), rounds=1)
    benchmark.extra_info.update(way='PEFT', measured=found)


@pytest.mark.gate
@pytest.mark.benchmark(group='library')
def test_the_first_composition_does_not_depend_on_how_many_there_are(gate: Callable, benchmark: Any,
                                                                     folders: Dict[int, Path]) -> None:

    def beginning(number: int) -> Callable[[], None]:
        models = [base_model('tiny') for _ in range(12)]

        def begin() -> None:
            library = AdapterLibrary.from_folder(folders[number])
            FusionComposer(models.pop(), library=library).compose(SOURCES)

        return begin

    def first() -> Ratio:
        candidates = {f'{number:,} LoRAs': beginning(number) for number in (10_000, 10)}
        return ratio(interleaved(candidates, rounds=9))

    benchmark.pedantic(beginning(10_000), rounds=3)
    gate('first composition', '10,000 LoRAs', first)


@pytest.mark.gate
@pytest.mark.benchmark(group='library')
def test_a_composition_does_not_depend_on_how_many_there_are(gate: Callable, benchmark: Any, one_thread: None,
                                                             folders: Dict[int, Path]) -> None:

    def composing(number: int) -> Callable[[], None]:
        composer = FusionComposer(base_model('tiny'), library=AdapterLibrary.from_folder(folders[number]))
        weights = count(1)
        return lambda: composer.compose(SOURCES, [next(weights), 1, 1])

    candidates = {f'{number:,} LoRAs': composing(number) for number in (10_000, 10)}
    many, few = candidates.values()
    benchmark.pedantic(many, rounds=50)
    for candidate in (many, few):
        for _ in range(5):
            candidate()
    gate('calls', '10,000 LoRAs on disk over 10', lambda: over(calls(many), calls(few)))
    gate('library', '10,000 LoRAs over 10', lambda: ratio(interleaved(candidates, rounds=400, warmup=50)))


@pytest.fixture(scope='module', params=SIZES)
def size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Size]:
    """Adapters of one size. Benchmarks share them."""
    shape, dtype, in_a_block = SIZES[request.param]
    with temporary(tmp_path_factory) as folder:
        write_adapters(folder, len(SEEN) + 3 * (in_a_block + WARMUP), shape, dtype=dtype)
        read_all(folder)
        model, library = loaded(folder, SEEN, shape, dtype), AdapterLibrary({name: folder / name for name in SEEN})
        base: Any = base_model(shape, dtype)
        if dtype != torch.float32:
            # Where PEFT has LoRAs in float32, ms-swift has them in the dtype of the layers.
            base = SwiftModel(base, {}, inference_mode=True)
        in_model, from_library = FusionComposer(model), FusionComposer(base, library=library)
        never_seen = NeverSeen(library, [path for path in folder.iterdir() if path.name not in SEEN])
        copies = copies_of(elements(model, SEEN[0]), 3, dtype)
        found = Size(request.param, in_a_block, in_model, from_library, never_seen, copies)
        for weight in (1., .5, .2):
            for name in SEEN:
                # What was asked for once alone, or before the fused adapter was made, is not kept.
                from_library.compose([name], [weight])
        candidates = found.candidates()
        for way, reads in (('cached', 0), ('never seen', 3)):
            assert counted(Reading, 'read', candidates[way]()) == reads
        yield found


@pytest.mark.gate
@pytest.mark.benchmark(group='library')
@pytest.mark.parametrize('way', ['cached', 'never seen'])
def test_a_composition_over_one_of_what_is_loaded(gate: Callable, benchmark: Any, size: Size, way: str) -> None:
    benchmark.pedantic(size.candidates()[way](), rounds=size.calls)
    if size.name == '0.8M fp32':
        gate('operations', f'library, {way}', lambda: over(writes(size.candidates()[way]()).operations, 1))
    gate('library over loaded', f'{size.name} {way}', lambda: ratio(size.seconds(way, 'in model')))


@pytest.mark.gate
@pytest.mark.benchmark(group='library')
@pytest.mark.parametrize('way', ['cached', 'never seen', 'cached compiled', 'never seen compiled'])
def test_a_composition_against_copy(gate: Callable, benchmark: Any, size: Size, way: str,
                                    compiled_only_here: None) -> None:
    kind = way.removesuffix(' compiled')
    swift_patch.compile_merging(kind != way)
    benchmark.pedantic(size.candidates()[kind](), rounds=size.calls)
    gate('library merge', f'{size.name} {way}', lambda: over_copy(size.seconds(kind, *size.copies), kind, size.copies))
    # Or compiling failed, which was logged.
    assert bool(kernel._kernel) == (kind != way)


@pytest.mark.gate
@pytest.mark.benchmark(group='library')
def test_questions_that_bring_their_own_loras(gate: Callable, benchmark: Any, one_thread: None, tmp_path: Path) -> None:
    write_adapters(tmp_path, 16)
    read_all(tmp_path)
    kept, *paths = sorted(tmp_path.iterdir())
    paths_in_turn, library = cycle(paths), AdapterLibrary()
    composer = FusionComposer(base_model(), 'mixture', library=library)
    model = PeftModel.from_pretrained(base_model(), kept, 'kept')
    names, numbers = ['a', 'b', 'c'], count()

    def with_library() -> None:
        own = [f'{name}_{next(numbers)}' for name in names]
        for name in own:
            library.add(name, next(paths_in_turn))
        composer.compose(own, [1.0] * 3)
        for name in own:
            library.remove(name)

    def with_peft() -> None:
        with reverted():
            for name in names:
                model.load_adapter(next(paths_in_turn), name)
            model.add_weighted_adapter(names, [1.0] * 3, 'fused', combination_type='cat')
            model.set_adapter('fused')
            for name in ['fused', *names]:
                model.delete_adapter(name)

    benchmark.pedantic(with_library, rounds=20, warmup_rounds=3)
    candidates = {'library': with_library, 'PEFT': with_peft}
    gate('questions', '3 LoRAs each, cat', lambda: ratio(interleaved(candidates, rounds=9, warmup=1, limit=20)))
