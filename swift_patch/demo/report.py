"""What the demo shows: the tables on the terminal, the picture and the result lines."""
import json
import statistics
from pathlib import Path
from rich.table import Table
from typing import Dict, List, Sequence

from .compare import COMPARED_TYPE, Answers
from .tasks import Sample, exact_match

_WAYS = {
    'base': 'the base model without LoRAs',
    'selection': 'the heaviest LoRA alone (here always the right one)',
    'fusion': 'parameters averaged: average',
    'mixture': 'outputs averaged: cat',
    'linear': "PEFT's linear, compared above",
}


def latency_table(stock: Answers, patch: Answers) -> Table:
    """Returns seconds composing per sample on both paths, for some of the samples, and in sum."""
    table = Table(
        'sample', title=f'Seconds composing ({COMPARED_TYPE}, 3 LoRAs each)', title_justify='left', show_footer=False)
    for column in ('stock', 'patch', 'stock / patch'):
        table.add_column(column, justify='right')
    total = len(patch.seconds)
    for number in sorted({1, 2, 5, *range(10, total, 10), len(stock.seconds), total} & set(range(1, total + 1))):
        ours = patch.seconds[number - 1]
        if number <= len(stock.seconds):
            theirs = stock.seconds[number - 1]
            table.add_row(str(number), f'{theirs:.3f}', f'{ours:.4f}', f'{theirs / ours:.0f}×')
        else:
            table.add_row(str(number), '(cut)', f'{ours:.4f}', '')
    both = len(stock.seconds)
    theirs, ours = sum(stock.seconds), sum(patch.seconds[:both])
    table.add_section()
    table.add_row(f'sum of 1-{both}', f'{theirs:.1f}', f'{ours:.3f}', f'{theirs / ours:.0f}×')
    return table


def accuracy_table(samples: Sequence[Sample], answers: Dict[str, Answers]) -> Table:
    """Returns the accuracy of each way to answer."""
    table = Table(
        'answered by', 'which is', title=f'Right answers to {len(samples)} mixed samples', title_justify='left')
    table.add_column('accuracy', justify='right')
    for name, given in answers.items():
        accuracy = exact_match(given.responses, [sample['answer'] for sample in samples])
        table.add_row(name, _WAYS[name], f'{accuracy:.0%}')
    return table


def draw_latency(stock: Answers, patch: Answers, path: Path) -> None:
    """Draws seconds composing against the sample's number on both paths, on a logarithmic axis."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for answers, label, color in ((stock, 'stock: add_weighted_adapter per sample', '#c0392b'),
                                  (patch, 'swift_patch: one fused adapter, refilled', '#2471a3')):
        numbers = range(1, len(answers.seconds) + 1)
        axes.plot(numbers, answers.seconds, marker='o', markersize=3, linewidth=1.2, color=color, label=label)
    last, median = len(stock.seconds), statistics.median(patch.seconds)
    axes.annotate(
        f'{stock.seconds[-1]:.2g} s', (last, stock.seconds[-1]), (6, 0),
        textcoords='offset points',
        color='#c0392b',
        va='center')
    axes.annotate(
        f'{median:.2g} s', (len(patch.seconds), median), (6, 0),
        textcoords='offset points',
        color='#2471a3',
        va='center')
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.set(xlabel='sample', ylabel='seconds composing', xlim=(0, len(patch.seconds) * 1.13))
    axes.set_title(f'Composing 3 of 14 LoRAs ({COMPARED_TYPE}), sample after sample')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend(loc='center right', framealpha=1)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_results(samples: Sequence[Sample], stock: Answers, answers: Dict[str, Answers], path: Path) -> None:
    """Writes a line per sample: the sample, what every way answered, and the seconds that composing took."""
    lines: List[str] = []
    for i, sample in enumerate(samples):
        line = {**sample, **{name: given.responses[i] for name, given in answers.items()}}
        line['seconds'] = {name: given.seconds[i] for name, given in answers.items()}
        if i < len(stock.responses):
            line['stock'], line['seconds']['stock'] = stock.responses[i], stock.seconds[i]
        lines.append(json.dumps(line, ensure_ascii=False) + '\n')
    path.write_text(''.join(lines), encoding='utf-8')
