"""Seconds composing, sample after sample: through stock ms-swift or PEFT, and through the patch."""
import gc
import math
import os
import platform
import random
import tempfile
import time
import torch
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from typing import (Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional,
                    Sequence, Set, Tuple)

from ..compose.composer import FusionComposer
from ..inference.arguments import swift_arguments
from ..inference.checkpoints import check_base_model, find_checkpoints
from ..inference.engine import load_model
from ..lora.checkpoint import AdapterCheckpoint
from ..lora.combination import COMBINATION_TYPES, options_of_method
from ..lora.compiled import compile_merging
from ..patching import reverted, why_not_applied
from ..synthetic.adapters import write_synthetic

Compose = Callable[[List[str], List[float]], Any]
# (what is done, how many times) -> a context that yields what is to be called after each time.
Stage = Callable[[str, int], ContextManager[Callable[[], None]]]


class Sample(NamedTuple):
    """What one sample is composed of.

    Attributes:
        adapters: The names of the adapters.
        weights: A weight for each of them, 1 in sum.
    """
    adapters: List[str]
    weights: List[float]


@dataclass
class BenchConfig:
    """What is measured.

    Attributes:
        adapters: Where the checkpoint of each named adapter is.
        synthetic: Take a model and adapters with random values instead.
        swift_args: Arguments of ms-swift's `BaseArguments` (`model`, `torch_dtype`, `device_map`, ...). As in
            `swift infer`, what is not given comes from the args.json of the first adapter that has one.
        samples: How many samples.
        adapters_per_sample: How many adapters each is composed of; by default 3, or all where there are fewer.
        combination_type: One of PEFT's.
        merge_args: What else `add_weighted_adapter` and `FusionComposer` take for it (`density`, `svd_rank`, ...).
        compile_merging: Whether the patch merges by a compiled kernel, see `swift_patch.compile_merging`.
        seed: What samples are drawn depends on this, on the names of the adapters and on the numbers above only.
        stock_seconds: The stock path begins no further sample when composing took longer than this in sum.
    """
    adapters: Mapping[str, str] = field(default_factory=dict)
    synthetic: bool = False
    swift_args: Dict[str, Any] = field(default_factory=dict)
    samples: int = 30
    adapters_per_sample: Optional[int] = None
    combination_type: str = 'linear'
    merge_args: Dict[str, Any] = field(default_factory=dict)
    compile_merging: bool = False
    seed: int = 42
    stock_seconds: float = 120.


@dataclass
class BenchResult:
    """What was measured.

    Attributes:
        samples: The samples, the same for both paths.
        patch: The seconds that each took through the patch.
        stock: The seconds that each took through stock, for the first of them where the path was cut.
        machine: What `describe_machine` tells.
        model: What `describe_model` tells.
    """
    samples: List[Sample]
    patch: List[float]
    stock: List[float]
    machine: Dict[str, Any]
    model: Dict[str, Any]


def run_bench(config: BenchConfig, stage: Stage, say: Callable[[str], Any]) -> BenchResult:
    """Composes the same samples through the patch and through stock, each on a model that was loaded for it.

    The patch comes first, so that it is the one that waits for whatever a process does only once.

    Args:
        config: What to measure.
        stage: Shows how far it is, while it is measured.
        say: Shows what else is done, during which libraries may print bars of their own.

    Raises:
        ValueError: Something that a user can put right is wrong. Almost all of that is found before a model is loaded.
    """
    reason = why_not_applied()
    if reason is not None:
        raise ValueError(reason)
    if config.compile_merging:
        compile_merging()
    with tempfile.TemporaryDirectory() as folder:
        if not config.synthetic:
            return _run(config, config.swift_args, config.adapters, stage, say)
        swift_args, adapters = write_synthetic(Path(folder))
        return _run(config, {**swift_args, **config.swift_args}, adapters, stage, say)


def random_samples(adapters: Sequence[str], count: int, per_sample: int, seed: int) -> List[Sample]:
    """Draws samples of `per_sample` adapters each, with random weights. A seed draws the same ones every time."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        names = rng.sample(list(adapters), per_sample)
        weights = [rng.uniform(0.1, 1) for _ in names]
        samples.append(Sample(names, [weight / sum(weights) for weight in weights]))
    return samples


@contextmanager
def stock_composing(model: Any, **options: Any) -> Iterator[Compose]:
    """Takes the patch off, and yields what composes as users of stock do: a new fused adapter for every sample.

    Args:
        model: A `SwiftModel` or a `PeftModel`.
        **options: Arguments of `add_weighted_adapter` (`combination_type`, `density`, ...).
    """
    count = 0

    def compose(adapters: List[str], weights: List[float]) -> None:
        nonlocal count
        count += 1
        model.add_weighted_adapter(adapters, weights, f'fused_{count}', **options)
        # That of a SwiftModel has just done so itself, and doing it twice would be stock's time for nothing.
        if isinstance(model, PeftModel):
            model.set_adapter(f'fused_{count}')

    with reverted():
        yield compose


def seconds_composing(samples: Iterable[Tuple[List[str], List[float]]],
                      compose: Compose,
                      max_seconds: float = math.inf,
                      devices: Iterable[torch.device] = ()) -> Iterator[float]:
    """Composes sample by sample, and yields the seconds that each took.

    Args:
        samples: The adapters and the weights of each sample.
        compose: Is called with them. Only it is timed.
        max_seconds: No further sample is begun when composing took longer than this in sum.
        devices: Where the model is: work that was given to a CUDA device is waited for.
    """
    devices, total = [device for device in devices if device.type == 'cuda'], 0.

    def clock() -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for adapters, weights in samples:
        if total > max_seconds:
            return
        start = clock()
        compose(list(adapters), list(weights))
        seconds = clock() - start
        total += seconds
        yield seconds


def describe_machine(model: nn.Module) -> Dict[str, Any]:
    """Tells where the model is: `device`, `device_name`, `cores`, `threads` and `platform`."""
    devices = _devices(model)
    names = [torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor() for device in devices]
    return {
        'device': ', '.join(map(str, devices)),
        'device_name': ', '.join(dict.fromkeys(names)),
        # Those that this process may use, where the system tells.
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'platform': f'{platform.system()} {platform.machine()}',
    }


def describe_model(model: nn.Module, num_adapters: int) -> Dict[str, Any]:
    """Tells `wrapper`, `dtype`, `adapter_dtype`, `lora_layers`, `adapters` and `ranks`."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    dtypes: Dict[bool, Set[str]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        dtypes['lora_' in name].add(str(parameter.dtype).removeprefix('torch.'))
    return {
        'wrapper': type(model).__name__,
        'dtype': ', '.join(sorted(dtypes[False])),
        # PEFT keeps those of a model of less precision in float32.
        'adapter_dtype': ', '.join(sorted(dtypes[True])),
        'lora_layers': len(layers),
        'adapters': num_adapters,
        'ranks': sorted({rank
                         for layer in layers
                         for rank in layer.r.values()}),
    }


def _run(config: BenchConfig, swift_args: Mapping[str, Any], adapters: Mapping[str, str], stage: Stage,
         say: Callable[[str], Any]) -> BenchResult:
    checkpoints = find_checkpoints(adapters, swift_args)
    merge_args = {'combination_type': config.combination_type, **config.merge_args}
    options_of_method('fusion', **merge_args)
    per_sample = _adapters_per_sample(config.adapters_per_sample, len(adapters))
    if per_sample > 1:
        _check_ranks(checkpoints, config.combination_type)
    # Nothing is generated, and for some models ms-swift cannot tell which template is theirs.
    args = swift_arguments({'template': 'dummy', **swift_args}, checkpoints)
    check_base_model(checkpoints, args.model_dir)
    samples = random_samples(list(adapters), config.samples, per_sample, config.seed)

    @contextmanager
    def loaded(path: str) -> Iterator[Tuple[Any, List[Sample]]]:
        say(f'{path}: loading the model and its adapters ...')
        model, _, aliases = load_model(args, checkpoints)
        yield model, [Sample([aliases[name] for name in sample.adapters], sample.weights) for sample in samples]
        del model
        # Its modules refer to each other, and the next one needs the room.
        gc.collect()
        torch.cuda.empty_cache()

    with loaded('Patch') as (model, aliased):
        machine, about = describe_machine(model), describe_model(model, len(checkpoints))
        compose: Compose = FusionComposer(model, **merge_args).compose
        with stage('Patch: one adapter, refilled', len(samples)) as advance:
            patch = _measure(model, aliased, compose, advance)
        del model, compose
    with loaded('Stock') as (model, aliased), stock_composing(model, **merge_args) as compose:
        with stage('Stock: an adapter per sample', len(samples)) as advance:
            stock = _measure(model, aliased, compose, advance, config.stock_seconds)
    return BenchResult(samples, patch, stock, machine, about)


def _measure(model: nn.Module,
             samples: Sequence[Sample],
             compose: Compose,
             advance: Callable[[], None],
             max_seconds: float = math.inf) -> List[float]:
    seconds = []
    for of_one in seconds_composing(samples, compose, max_seconds, _devices(model)):
        seconds.append(of_one)
        advance()
    return seconds


def _devices(model: nn.Module) -> List[torch.device]:
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _adapters_per_sample(wanted: Optional[int], count: int) -> int:
    if wanted is not None and wanted > count:
        raise ValueError(f'--adapters_per_sample is expected to be at most the number of adapters, {count}, found '
                         f'{wanted}: give it less, or more --adapters.')
    return wanted or min(3, count)


def _check_ranks(checkpoints: Sequence[AdapterCheckpoint], combination_type: str) -> None:
    """Raises ValueError where stock refuses adapters for their ranks, which is seen in their configs."""
    ranks = {checkpoint.name: _rank(checkpoint.config) for checkpoint in checkpoints}
    COMBINATION_TYPES[combination_type].check_ranks(ranks)


def _rank(config: Mapping[str, Any]) -> Any:
    pattern = config.get('rank_pattern')
    numbers = [config.get('r'), *(pattern.values() if isinstance(pattern, dict) else ())]
    # What is no number is told when the adapter is loaded.
    return max((number for number in numbers if isinstance(number, int)), default=None)
