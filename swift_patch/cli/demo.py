"""`swift-patch demo`: a small model, fourteen LoRAs, and stock against the patch on the same samples."""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from rich.console import Console

from ..errors import short_repr
from .arguments import file_path
from .progress import stage

# All of them are made before the first is answered.
_MAX_SAMPLES = 100_000
_BATCH_SIZES = (1, 16)


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Adds the command `demo` to those of `swift-patch`."""
    parser = subparsers.add_parser(
        'demo',
        help='train 14 small LoRAs and compare stock with the patch, offline, in about 2 minutes',
        description='Build a small Qwen2, train 14 LoRAs on it with ms-swift, answer mixed samples with 3 LoRAs each '
        'through stock ms-swift and through the patch, and show the seconds that composing took and the accuracy of '
        'each merge method. Everything happens offline, on the CPU.')
    parser.add_argument('--output_dir', type=file_path, default=Path('demo_out'), help='(default: %(default)s)')
    parser.add_argument('--samples', type=int, default=60, help='how many mixed samples (default: %(default)s)')
    parser.add_argument(
        '--stock_seconds',
        type=float,
        default=75,
        help='the stock path begins no further sample when composing took longer than this in sum; how many samples '
        'were left out is told (default: %(default)s)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 where both paths gave the same answers, 1 where they did not, 2 after a user's mistake.
    """
    if not 1 <= args.samples <= _MAX_SAMPLES:
        print(
            f'swift-patch demo: error: --samples is expected to be from 1 to {_MAX_SAMPLES}, found '
            f'{short_repr(args.samples)}.',
            file=sys.stderr)
        return 2
    if not args.stock_seconds >= 0:  # NaN, too
        print(
            f'swift-patch demo: error: --stock_seconds is expected to be 0 or more, found {args.stock_seconds}.',
            file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f'swift-patch demo: error: --output_dir cannot be made: {e}', file=sys.stderr)
        return 2
    # This very stream: while ms-swift trains, what goes to `sys.stdout` is thrown away.
    console = Console(file=sys.stdout)
    console.print('Loading ms-swift ...')
    os.environ.setdefault('LOG_LEVEL', 'ERROR')
    import torch

    from ..bench.report import draw_latency, latency_table
    from ..demo import compare, report
    from ..demo.tasks import TASK_NAMES, build_tasks, mixed_samples, write_jsonl
    from ..demo.training import pretrain_base, train_adapter
    from ..synthetic.tiny_model import build_tiny_qwen2

    # So small a model gains nothing from more threads, and loses much where they share a core with others.
    torch.set_num_threads(1)
    tasks, samples = build_tasks(), mixed_samples(args.samples)
    with tempfile.TemporaryDirectory() as folder:
        with stage(console, 'Pretraining a small Qwen2'):
            model_dir = build_tiny_qwen2(Path(folder, 'model'))
            pretrain_base(model_dir, [sample for task in tasks.values() for sample in task.pretrain])
        adapters = {}
        with stage(console, f'Training {len(TASK_NAMES)} LoRAs with ms-swift', len(TASK_NAMES)) as advance:
            for name, task in tasks.items():
                dataset = write_jsonl(task.train, Path(folder, f'{name}.jsonl'))
                adapters[name] = train_adapter(model_dir, dataset, Path(folder, name), use_swift_lora=True)
                advance()
        with stage(console, 'Stock: an adapter per sample', len(samples)) as advance:
            stock = compare.answer_with_stock(
                compare.TaskEngine(model_dir, adapters), samples, advance, max_seconds=args.stock_seconds)
        engine = compare.TaskEngine(model_dir, adapters)
        with stage(console, 'Patch: one adapter, refilled', len(samples)) as advance:
            patch = compare.answer_with_patch(
                engine, samples, advance, combination_type=compare.COMPARED_TYPE, adapter_name='compared')
        answers = {}
        with stage(console, 'Each merge method', 4 * len(samples)) as advance:
            answers['base'] = compare.answer_with_base(engine, samples, advance)
            for method in ('selection', 'fusion', 'mixture'):
                answers[method] = compare.answer_with_patch(
                    engine, samples, advance, merge_method=method, adapter_name=method)
        answers[compare.COMPARED_TYPE] = patch
        batches = [-(-len(samples) // size) for size in _BATCH_SIZES]
        with stage(console, 'One by one, and in batches', sum(batches)) as advance:
            in_batches = {
                size: engine.answer_in_batches(samples, size, advance, adapter_name='rows')
                for size in _BATCH_SIZES
            }

    draw_latency(stock.seconds, patch.seconds, args.output_dir / 'latency.png',
                 f'Composing 3 of {len(adapters)} LoRAs ({compare.COMPARED_TYPE}), sample after sample')
    report.write_results(samples, stock, answers, args.output_dir / 'results.jsonl')
    console.print(
        latency_table(stock.seconds, patch.seconds, f'Seconds composing ({compare.COMPARED_TYPE}, 3 LoRAs each)'))
    console.print(report.accuracy_table(samples, answers))
    console.print(report.throughput_table(in_batches))
    done, equal = len(stock.responses), sum(map(str.__eq__, stock.responses, patch.responses))
    if done < len(samples):
        console.print(f'The stock path was cut after {done} of {len(samples)} samples (--stock_seconds).')
    console.print(f'Equal answers on both paths: {equal} of {done}.')
    console.print(
        "The questions are about this year's facts, which only the LoRAs know; the base model knows last year's.")
    console.print(f'Wrote {args.output_dir / "latency.png"} and {args.output_dir / "results.jsonl"} '
                  f'in {time.perf_counter() - start:.0f} s.')
    return 0 if equal == done else 1
