"""What the demo shows besides the latencies: the accuracies and the result lines."""
import json
from pathlib import Path
from rich.table import Table
from typing import Dict, List, Sequence

from .compare import Answers
from .tasks import Sample, exact_match

_WAYS = {
    'base': 'the base model without LoRAs',
    'selection': 'the heaviest LoRA alone (here always the right one)',
    'fusion': 'parameters averaged: average',
    'mixture': 'outputs averaged: cat',
    'linear': "PEFT's linear, compared above",
}


def accuracy_table(samples: Sequence[Sample], answers: Dict[str, Answers]) -> Table:
    """Returns the accuracy of each way to answer."""
    table = Table(
        'answered by', 'which is', title=f'Right answers to {len(samples)} mixed samples', title_justify='left')
    table.add_column('accuracy', justify='right')
    for name, given in answers.items():
        accuracy = exact_match(given.responses, [sample['answer'] for sample in samples])
        table.add_row(name, _WAYS[name], f'{accuracy:.0%}')
    return table


def throughput_table(answers: Dict[int, Answers]) -> Table:
    """Returns how fast the same samples were answered, by batch size."""
    first, count = next(iter(answers.values())), len(next(iter(answers.values())).responses)
    table = Table(
        'each with a fusion of its own',
        title=f'Composing and generating, {count} samples (fusion)',
        title_justify='left')
    for name in ('seconds', 'samples/s', 'equal answers'):
        table.add_column(name, justify='right')
    for size, given in answers.items():
        equal = sum(map(str.__eq__, first.responses, given.responses))
        name = 'one by one' if size == 1 else f'in batches of {size}'
        table.add_row(name, f'{sum(given.seconds):.1f}', f'{count / sum(given.seconds):.1f}', f'{equal} of {count}')
    return table


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
