"""README's figures from what `make bench` measured: prints the tables in Markdown and draws the pictures.

python benchmarks/figures.py benchmarks.json docs/cost.png docs/batches.png docs/library.png
"""
import argparse
import json
import statistics
from gate import shown
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

_COLORS = {
    'stock ms-swift': '#c0392b',
    'PEFT add + set': '#d68910',
    'PEFT delete + add + set': '#7d3c98',
    'swift_patch': '#2471a3',
    'one by one': '#c0392b',
    "PEFT's mixed batch": '#d68910',
    'one LoRA for all': '#7d3c98',
    'base model': '#616a6b',
    'PEFT load_adapter': '#d68910',
    'AdapterLibrary': '#2471a3',
    'from the cache': '#2471a3',
    'from the page cache': '#148f77',
    'from the disk': '#616a6b',
}
# Cases that name a size and a dtype, and then a way: a line for each of the former.
_BY_SIZE = ('merge', 'library merge')
_PLACES = ('from the cache', 'from the page cache', 'from the disk')
_SAMPLES_SHOWN = (1, 2, 5, 10, 20, 30, 60)


def tables(content: Dict[str, Any]) -> str:
    """Returns the tables, with the machine that they are from. What was not measured is left out."""
    machine, benchmarks = content['machine_info'], content['benchmarks']
    packages = ', '.join(f'{name} {version}' for name, version in machine.get('packages', {}).items())
    cpu = machine.get('cpu', {})
    parts = [f'On {cpu.get("brand_raw", "an unknown CPU")}, {cpu.get("count", "?")} cores, with {packages}.']
    gated = [found for found in (benchmark['extra_info'] for benchmark in benchmarks) if 'ratio' in found]
    for subject in dict.fromkeys(found['subject'] for found in gated):
        rows = [found for found in gated if found['subject'] == subject]
        over = f', over {rows[0]["divided_by"]}' if rows[0]['divided_by'] else ''
        table = _by_size(rows) if subject in _BY_SIZE else _markdown(['case', 'ms', subject, 'at most'], [[
            found['case'], ' / '.join(f'{seconds * 1e3:.3g}' for seconds in found['seconds'].values()),
            shown(found['ratio']),
            shown(found['bound'])
        ] for found in rows])
        parts.append(f'{rows[0]["what"]}{over}:\n\n{table}')
    medians = {
        (found['extra_info'].get('subject'), found['extra_info'].get('case')): found['stats']['median'] * 1e3
        for found in benchmarks
    }
    pairs = [('activating another of 14 LoRAs, 168 layers', ('switching', 'stock'), ('switching', 'another LoRA')),
             ('offloading where nothing is left to move, 3 LoRAs, 14 layers', ('offload', 'stock'), ('offload',
                                                                                                     'patch'))]
    rows = [[what, f'{medians[theirs]:,.0f}', f'{medians[ours]:.2g}'] for what, theirs, ours in pairs
            if theirs in medians and ours in medians]
    if rows:
        parts.append(_markdown(['ms', 'stock ms-swift', 'swift_patch'], rows))
    for subject, what in (('samples', 'seconds of sample'), ('upstream', 'seconds of sample, `refill` alone')):
        curves = samples(content, subject)
        if curves:
            numbers = [number for number in _SAMPLES_SHOWN if number <= min(map(len, curves.values()))]
            parts.append(
                _markdown([what, *map(str, numbers)], [[path, *(f'{seconds[number - 1]:.2g}' for number in numbers)]
                                                       for path, seconds in curves.items()]))
    on_disk, by_peft = library(content)
    if on_disk:
        parts.append(
            _markdown([
                'LoRAs on disk', 's to the first composition', 's to reserve for all', 'MiB at first',
                'MiB once all were used', *(f'ms, {where}' for where in _PLACES)
            ], [[
                f'{number:,}', *(_short(found[key])
                                 for key in ('seconds', 'reserve', 'MiB', 'MiB of all')), *(_milliseconds(found[where])
                                                                                            for where in _PLACES)
            ] for number, found in on_disk.items()]))
    if by_peft:
        parts.append(
            _markdown(
                ['LoRAs loaded by PEFT', 's to the first composition', 'MiB', 'ms of another one'],
                [[f'{number:,}', *(_short(found[key]) for key in ('seconds', 'MiB')),
                  _milliseconds(found['one more'])] for number, found in by_peft.items()]))
    for hidden, found in batches(content).items():
        sizes = list(next(iter(found['samples_per_second'].values())))
        parts.append(
            _markdown([f'samples/s, hidden {hidden}, batches of', *sizes],
                      [[way, *(f'{rates[size]:.2f}' for size in sizes)]
                       for way, rates in found['samples_per_second'].items()]))
        parts.append(
            _markdown([f'composing over generating, hidden {hidden}', *sizes],
                      [['swift_patch', *(f'{found["composing"][size]:.1%}' for size in sizes)]]))
    return '\n\n'.join(parts)


def _by_size(rows: Sequence[Dict[str, Any]]) -> str:
    """Returns the table of cases such as `40M bf16 linear compiled`: a line for each size and dtype."""
    ratios = {tuple(found['case'].split(maxsplit=2)): shown(found['ratio']) for found in rows}
    sizes = dict.fromkeys(key[:2] for key in ratios)
    ways = dict.fromkeys(way for *_, way in ratios)
    return _markdown(['P', 'dtype', *ways],
                     [[*size, *(ratios.get((*size, way), '') for way in ways)] for size in sizes])


def samples(content: Dict[str, Any], subject: str = 'samples') -> Dict[str, List[float]]:
    """Returns the seconds of each sample by path."""
    found = (benchmark['extra_info'] for benchmark in content['benchmarks'])
    return {
        extra['case']: extra['samples']
        for extra in found if extra.get('subject') == subject and 'samples' in extra
    }


def batches(content: Dict[str, Any]) -> Dict[int, Dict[str, Any]]:
    """Returns what was measured of batches, by the hidden size of the model."""
    found = (benchmark['extra_info'] for benchmark in content['benchmarks'])
    return {extra['case']: extra for extra in found if extra.get('subject') == 'batches'}


def library(content: Dict[str, Any]) -> Tuple[Dict[int, Dict[str, Any]], Dict[int, Dict[str, Any]]]:
    """Returns what was measured of a library by the number of LoRAs, and what of PEFT."""
    found = [extra for extra in (benchmark['extra_info'] for benchmark in content['benchmarks']) if 'measured' in extra]
    by_peft = next((extra['measured'] for extra in found if extra['way'] == 'PEFT'), {})
    on_disk = {extra['number']: extra['measured'] for extra in found if extra['way'] == 'library'}
    # JSON has no numbers as keys.
    return dict(sorted(on_disk.items())), {int(number): of_one for number, of_one in by_peft.items()}


def draw_library(on_disk: Dict[int, Dict[str, Any]], by_peft: Dict[int, Dict[str, Any]], path: Path) -> None:
    """Draws the first composition and any other one against the number of LoRAs, on logarithmic axes."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (first, other) = pyplot.subplots(ncols=2, figsize=(9, 4.5), layout='constrained')

    def line(axes: Any, measured: Dict[int, Dict[str, Any]], key: str, factor: float, label: str, color: str) -> None:
        points = [(number, found[key] * factor) for number, found in measured.items() if found[key] is not None]
        if points:
            axes.plot(*zip(*points), marker='o', markersize=4, linewidth=1.2, color=color, label=label)

    line(first, by_peft, 'seconds', 1, 'PEFT load_adapter', _COLORS['PEFT load_adapter'])
    line(first, on_disk, 'seconds', 1, 'AdapterLibrary', _COLORS['AdapterLibrary'])
    line(other, by_peft, 'one more', 1e3, 'PEFT add + set', _COLORS['PEFT add + set'])
    for where in reversed(_PLACES):
        line(other, on_disk, where, 1e3, f'AdapterLibrary, {where}', _COLORS[where])
    for axes, title, label in ((first, 'From a base model to the first composition', 'seconds'),
                               (other, 'Any other composition of 3 LoRAs', 'ms')):
        axes.set_xscale('log')
        axes.set_yscale('log')
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,g}'))
        axes.set(xlabel='LoRAs that may be composed', ylabel=label)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_batches(found: Dict[int, Dict[str, Any]], path: Path) -> None:
    """Draws samples per second against the batch size, a picture for each model, on logarithmic axes."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, every = pyplot.subplots(ncols=len(found), figsize=(9, 4.5), layout='constrained', squeeze=False)
    for axes, (hidden, measured) in zip(every[0], found.items()):
        for way, rates in measured['samples_per_second'].items():
            sizes = list(map(int, rates))
            axes.plot(
                sizes, list(rates.values()), marker='o', markersize=3, linewidth=1.2, color=_COLORS[way], label=way)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log', base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        axes.set(xlabel='batch size', ylabel='samples per second')
        axes.set_title(f'hidden {hidden}, 24 layers, {measured["tokens"]} new tokens')
        axes.grid(alpha=0.3)
    handles, labels = every[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(curves: Dict[str, List[float]], path: Path) -> None:
    """Draws seconds against the sample's number, on a logarithmic axis."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    last = max(map(len, curves.values()))
    for name, seconds in curves.items():
        color = _COLORS[name]
        axes.plot(range(1, len(seconds) + 1), seconds, marker='o', markersize=3, linewidth=1.2, color=color, label=name)
        axes.annotate(
            f'{statistics.median(seconds[-3:]):.2g} s', (len(seconds), seconds[-1]), (6, 0),
            textcoords='offset points',
            color=color,
            va='center')
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.set(xlabel='sample', ylabel='seconds per sample', xlim=(0, last * 1.13))
    axes.set_title('Composing 3 of 14 LoRAs (linear, 168 LoRA layers), sample after sample')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=len(curves))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _short(value: Optional[float]) -> str:
    if value is None:
        return ''
    return f'{value:.2g}' if value < 100 else f'{value:,.0f}'


def _milliseconds(seconds: Optional[float]) -> str:
    return _short(None if seconds is None else seconds * 1e3)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ['---', *('---:' for _ in header[1:])]
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (header, rule, *rows))


def main() -> None:
    """Reads the first argument, prints, and draws the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('json', type=Path, help='what pytest-benchmark wrote')
    parser.add_argument('cost', type=Path, help='the picture to draw of the cost per sample')
    parser.add_argument('batches', type=Path, help='the picture to draw of batches')
    parser.add_argument('library', type=Path, help='the picture to draw of adapters on disk')
    args = parser.parse_args()
    content = json.loads(args.json.read_text(encoding='utf-8'))
    print(tables(content))
    if samples(content):
        draw(samples(content), args.cost)
    if batches(content):
        draw_batches(batches(content), args.batches)
    if any(library(content)):
        draw_library(*library(content), args.library)


if __name__ == '__main__':
    main()
