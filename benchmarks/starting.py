"""What a library of many adapters costs a process that begins: seconds, and resident memory.

python benchmarks/starting.py library|peft FOLDER [--threads N] [--first]

Prints JSON. Everything is measured in this process alone, and the first composition is really its first. Times are from
a base model that is built. Memory is by how much the process grew since then.
"""
import argparse
import gc
import json
import os
import psutil
import random
import statistics
import time
import torch
from adapters import NeverSeen, drop, read_all
from measure import timed
from pathlib import Path
from peft import PeftModel
from typing import Any, Dict, List
from workloads import base_model

from swift_patch import AdapterLibrary, FusionComposer
from swift_patch.patching import reverted

# For tensors: small, so that what grows with the number of adapters is seen beside it.
CACHE_BYTES = 2**24
# Compositions of each kind, of which the median is told.
SAMPLES = 60
# How many adapters PEFT has when it makes a composition of three, too.
LOADED = (10, 20, 50, 100)


class Process:
    """This process: how long it is at it, and how much it grew."""

    def __init__(self) -> None:
        self._process = psutil.Process(os.getpid())
        gc.collect()
        self._before = self._process.memory_info().rss
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Returns the seconds since it began."""
        return time.perf_counter() - self._start

    def mebibytes(self) -> float:
        """Returns by how much it grew."""
        gc.collect()
        return (self._process.memory_info().rss - self._before) / 2**20


def with_library(folder: Path, is_first_alone: bool) -> Dict[str, Any]:
    """Returns what a library costs."""
    rng, model = random.Random(0), base_model('tiny')
    process = Process()
    library = AdapterLibrary.from_folder(folder, cache_bytes=CACHE_BYTES)
    composer = FusionComposer(model, library=library)
    composer.compose(['lora_0', 'lora_1', 'lora_2'])
    found: Dict[str, Any] = {'seconds': process.seconds(), 'MiB': process.mebibytes()}
    if is_first_alone:
        return found
    found['reserve'] = timed(composer.reserve, None, 3)
    names = list(library)
    rng.shuffle(names)
    # Each adapter is used: what is remembered of all of them is in memory.
    for begin in range(0, len(names), 3):
        composer.compose(names[begin:begin + 3])
    found['MiB of all'] = process.mebibytes()
    few = names[:10]
    for _ in range(20):
        composer.compose(rng.sample(few, 3))
    found['from the cache'] = statistics.median(timed(composer.compose, rng.sample(few, 3)) for _ in range(SAMPLES))
    never_seen = NeverSeen(library, [library.path(name) for name in names])
    found['from the page cache'] = statistics.median(
        timed(composer.compose, never_seen.take(3)) for _ in range(SAMPLES))
    cold: List[float] = []
    for _ in range(SAMPLES):
        sources = never_seen.take(3)
        if all([drop(library.path(name)) for name in sources]):
            cold.append(timed(composer.compose, sources))
    # Where files cannot be dropped, it is not known. A few may stay: the kernel is about to do something with them.
    found['from the disk'] = statistics.median(cold) if len(cold) > SAMPLES // 4 else None
    return found


def with_peft(folder: Path) -> Dict[int, Dict[str, float]]:
    """Returns what PEFT costs, by the number of adapters that it has loaded."""
    names = [f'lora_{number}' for number in range(max(LOADED))]
    model: Any = base_model('tiny')
    found, composing = {}, 0.0
    with reverted():
        process = Process()
        for number, name in enumerate(names, start=1):
            if number == 1:
                model = PeftModel.from_pretrained(model, folder / name, name)
            else:
                model.load_adapter(folder / name, name)
            if number in LOADED:
                loading = process.seconds() - composing
                model.add_weighted_adapter(names[:3], [1 / 3] * 3, 'fused', combination_type='linear')
                model.set_adapter('fused')
                seconds = process.seconds() - composing
                found[number] = {'seconds': seconds, 'one more': seconds - loading, 'MiB': process.mebibytes()}
                model.delete_adapter('fused')
                composing = process.seconds() - loading
    return found


def main() -> None:
    """Measures what the arguments say, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('way', choices=['library', 'peft'])
    parser.add_argument('folder', type=Path, help='the folder of checkpoints')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--first', action='store_true', help='measure the first composition alone')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    read_all(args.folder)
    print(json.dumps(with_peft(args.folder) if args.way == 'peft' else with_library(args.folder, args.first)))


if __name__ == '__main__':
    main()
