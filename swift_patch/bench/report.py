"""What was measured, shown: the table on the terminal, the picture, and the JSON for machines."""
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from rich.table import Table
from typing import TYPE_CHECKING, Any, Dict, Mapping, Sequence

if TYPE_CHECKING:
    from .measure import BenchConfig, BenchResult

# What comes later adds keys, and changes this number only where it changes what a key means.
SCHEMA_VERSION = 1


def latency_table(stock: Sequence[float], patch: Sequence[float], title: str) -> Table:
    """Returns seconds composing per sample on both paths, for some of the samples, and in sum.

    Args:
        stock: The seconds of stock, for the first of the samples where it was cut.
        patch: The seconds of the patch.
        title: The title.
    """
    table = Table('sample', title=title, title_justify='left', show_footer=False)
    for column in ('stock', 'patch', 'stock / patch'):
        table.add_column(column, justify='right')
    total, both = len(patch), len(stock)
    step = 10 * math.ceil(total / 100)
    for number in sorted({1, 2, 5, 10, *range(step, total, step), both, total} & set(range(1, total + 1))):
        ours = patch[number - 1]
        if number <= both:
            theirs = stock[number - 1]
            table.add_row(str(number), f'{theirs:.3f}', f'{ours:.4f}', _ratio(theirs, ours))
        else:
            table.add_row(str(number), '(cut)', f'{ours:.4f}', '')
    theirs, ours = sum(stock), sum(patch[:both])
    table.add_section()
    table.add_row(f'sum of 1-{both}', f'{theirs:.{1 if theirs >= 10 else 3}f}', f'{ours:.3f}', _ratio(theirs, ours))
    return table


def draw_latency(stock: Sequence[float], patch: Sequence[float], path: Path, title: str) -> None:
    """Draws seconds composing against the sample's number on both paths, on a logarithmic axis.

    Args:
        stock: See `latency_table`.
        patch: See `latency_table`.
        path: The file, whose ending says what is written: .png, .svg or .pdf.
        title: The title. What follows its first line is drawn smaller.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    cut = f' (cut after {len(stock)} of {len(patch)})' if len(stock) < len(patch) else ''
    median = statistics.median(patch)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for seconds, label, color, told in ((stock, f'stock: add_weighted_adapter per sample{cut}', '#c0392b', stock[-1]),
                                        (patch, f'swift_patch: one fused adapter, refilled (median {median:.2g} s)',
                                         '#2471a3', median)):
        numbers = list(range(1, len(seconds) + 1))
        axes.plot(numbers, seconds, marker='o', markersize=3, linewidth=1.2, color=color, label=label)
        axes.annotate(
            f'{told:.2g} s', (numbers[-1], told), xytext=(6, 0), textcoords='offset points', color=color, va='center')
    axes.set_yscale('log')
    low, high = min(*stock, *patch), max(*stock, *patch)
    # Where there are few powers of ten, numbers between them tell more.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1, )))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.set(xlabel='sample', ylabel='seconds composing', xlim=(0, len(patch) * 1.13 + 0.5))
    heading, _, details = title.partition('\n')
    axes.set_title(heading, pad=6 + 14 * len(details.splitlines()))
    axes.text(0.5, 1.02, details, transform=axes.transAxes, ha='center', va='bottom', fontsize='small')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend(loc='best', framealpha=1)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def headline(result: 'BenchResult', combination_type: str) -> str:
    """Returns what was composed, for a title."""
    per_sample = len(result.samples[0].adapters)
    return f'Composing {per_sample} of {result.model["adapters"]} LoRAs ({combination_type}), sample after sample'


def about_table(result: 'BenchResult', versions: Mapping[str, str]) -> Table:
    """Returns on what it was measured."""
    table = Table.grid('', '', padding=(0, 2))
    table.add_row('machine', about_machine(result))
    table.add_row('model', about_model(result))
    table.add_row('versions', ', '.join(f'{name} {version}' for name, version in versions.items()))
    return table


def about_machine(result: 'BenchResult') -> str:
    """Returns the machine in a line."""
    machine = result.machine
    return (f'{machine["device_name"]} ({machine["device"]}), {_count(machine["cores"], "core")}, '
            f'torch on {_count(machine["threads"], "thread")}, {machine["platform"]}')


def about_model(result: 'BenchResult') -> str:
    """Returns the model in a line."""
    model, ranks = result.model, result.model['ranks']
    rank = f'rank {ranks[0]}' if len(ranks) == 1 else f'ranks {ranks[0]} to {ranks[-1]}'
    return (f'{model["wrapper"]}, {model["dtype"]}, {_count(model["lora_layers"], "LoRA layer")}, '
            f'{_count(model["adapters"], "adapter")} of {rank} in {model["adapter_dtype"]}')


def to_json(config: 'BenchConfig', result: 'BenchResult', versions: Mapping[str, str]) -> Dict[str, Any]:
    """Returns all of it, as an object for JSON.

    Returns:
        `schema_version`: 1.
        `settings`: the fields of `BenchConfig`, with the number of adapters per sample that it came to.
        `machine`: `device`, `device_name`, `cores`, `threads` and `platform`.
        `versions`: of Python and of the packages, by name.
        `model`: `wrapper`, `dtype`, `adapter_dtype`, `lora_layers`, `adapters` (how many) and `ranks`.
        `stock_samples`: how many samples stock composed: all of `samples`, or the first of them where it was cut.
        `samples`: a list in the order in which they were composed, each with `adapters`, `weights`, `patch_seconds` and
        `stock_seconds` (null where stock was cut).
    """
    return {
        'schema_version':
        SCHEMA_VERSION,
        'settings': {
            **asdict(config), 'adapters_per_sample': len(result.samples[0].adapters)
        },
        'machine':
        result.machine,
        'versions':
        dict(versions),
        'model':
        result.model,
        'stock_samples':
        len(result.stock),
        'samples': [{
            **sample._asdict(), 'patch_seconds': patch,
            'stock_seconds': result.stock[i] if i < len(result.stock) else None
        } for i, (sample, patch) in enumerate(zip(result.samples, result.patch))],
    }


def write_json(data: Dict[str, Any], path: Path) -> None:
    """Writes an object to a file."""
    # A path that is not Unicode has halves of surrogate pairs, which become escapes of JSON so.
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + '\n', encoding='utf-8', errors='backslashreplace')


def _ratio(theirs: float, ours: float) -> str:
    ratio = theirs / ours
    return f'{ratio:.{0 if ratio >= 10 else 1}f}×'


def _count(count: int, what: str) -> str:
    return f'{count} {what}' if count == 1 else f'{count} {what}s'
