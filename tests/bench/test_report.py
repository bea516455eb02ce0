"""The table, the picture and the JSON show what was measured, also where stock was cut or is the faster one."""
import io
import json
import pytest
from pathlib import Path
from rich.console import Console
from typing import Any, List

from swift_patch.bench import report
from swift_patch.bench.measure import BenchConfig, BenchResult, Sample


def text(table: Any, width: int = 80) -> List[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()


def cells(line: str) -> List[str]:
    return [cell.strip() for cell in line.strip('│┃').replace('┃', '│').split('│')]


def rows(stock: List[float], patch: List[float]) -> List[List[str]]:
    return [cells(line) for line in text(report.latency_table(stock, patch, 'title')) if line.startswith('│')]


def result(cut: int = 12, **model: Any) -> BenchResult:
    samples = [Sample(['a', 'b'], [0.25, 0.75])] * 12
    machine = {
        'device': 'cuda:0',
        'device_name': 'NVIDIA H100 80GB HBM3',
        'cores': 16,
        'threads': 1,
        'platform': 'Linux x86_64'
    }
    about = {
        'wrapper': 'PeftModel',
        'dtype': 'bfloat16',
        'adapter_dtype': 'float32',
        'lora_layers': 196,
        'adapters': 14,
        'ranks': [8, 16],
        **model
    }
    return BenchResult(samples, [0.5] + [0.004] * 11, [0.2 + i for i in range(cut)], machine, about)


def test_the_table_tells_seconds_ratios_and_sums() -> None:
    assert rows([0.1, 0.2, 10.], [0.2, 0.01, 0.01]) == [
        ['1', '0.100', '0.2000', '0.5×'],
        ['2', '0.200', '0.0100', '20×'],
        ['3', '10.000', '0.0100', '1000×'],
        ['sum of 1-3', '10.3', '0.220', '47×'],
    ]


def test_what_was_cut_is_told_and_the_sums_are_of_what_both_did() -> None:
    assert rows([0.1, 0.2], [0.2, 0.1, 0.1, 0.1, 0.1]) == [
        ['1', '0.100', '0.2000', '0.5×'],
        ['2', '0.200', '0.1000', '2.0×'],
        ['5', '(cut)', '0.1000', ''],
        ['sum of 1-2', '0.300', '0.300', '1.0×'],
    ]


@pytest.mark.parametrize(('count', 'numbers'), [
    (1, '1'), (4, '1 2 4'), (12, '1 2 5 10 12'), (60, '1 2 5 10 20 30 40 50 60'),
    (1000, '1 2 5 10 100 200 300 400 500 600 700 800 900 1000'),
])  # yapf: disable
def test_some_of_the_samples_are_shown_and_the_last(count: int, numbers: str) -> None:
    assert [row[0] for row in rows([0.5] * count, [0.001] * count)] == [*numbers.split(), f'sum of 1-{count}']


def test_the_last_sample_of_stock_is_shown() -> None:
    assert [row[0] for row in rows([0.5] * 13, [0.001] * 30)] == [*'1 2 5 10 13 20 30'.split(), 'sum of 1-13']


def test_the_table_and_what_it_is_about_fit_80_columns() -> None:
    table = text(report.latency_table([999.] * 60, [9.] * 60, report.headline(result(), 'dare_linear_svd')))
    about = text(report.about_table(result(), {'python': '3.11.7', 'ms-swift': '4.6.0', 'torch': '2.13.0+cpu'}))
    assert max(map(len, table + about)) <= 80
    assert table[0].startswith('Composing 2 of 14 LoRAs (dare_linear_svd)')
    found = ' '.join(' '.join(about).split())
    assert 'NVIDIA H100 80GB HBM3 (cuda:0), 16 cores, torch on 1 thread, Linux x86_64' in found
    assert 'PeftModel, bfloat16, 196 LoRA layers, 14 adapters of ranks 8 to 16 in float32' in found
    assert 'ms-swift 4.6.0' in found


def test_one_is_not_many() -> None:
    assert '1 LoRA layer, 1 adapter of rank 4' in report.about_model(result(ranks=[4], lora_layers=1, adapters=1))


@pytest.mark.parametrize(('name', 'magic'), [('a.png', b'\x89PNG'), ('a.svg', b'<?xml'), ('a.pdf', b'%PDF')])
def test_the_picture_is_of_the_type_that_its_name_says(tmp_path: Path, name: str, magic: bytes) -> None:
    report.draw_latency([0.1, 0.2], [0.1, 0.01], tmp_path / name, 'title\ndetails')
    assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize('stock', [[0.2], [0.2, 0.3, 0.4]])
def test_the_picture_shows_all_seconds_on_named_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     stock: List[float]) -> None:
    from matplotlib import pyplot
    figures: List[Any] = []
    monkeypatch.setattr(pyplot, 'close', figures.append)
    patch = [0.5, 0.002, 0.004]
    report.draw_latency(stock, patch, tmp_path / 'a.png', 'title\nmachine\nmodel')
    monkeypatch.undo()
    [axes] = figures[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [stock, patch]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3][:len(stock)], [1, 2, 3]]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ('sample', 'seconds composing', 'log')
    shown = [found.get_text() for found in axes.texts]
    assert axes.get_title(
    ) == 'title' and 'machine\nmodel' in shown and '0.004 s' in shown and f'{stock[-1]} s' in shown
    labels = [found.get_text() for found in axes.get_legend().get_texts()]
    assert ('(cut after 1 of 3)' in labels[0]) == (len(stock) == 1) and '(median 0.004 s)' in labels[1]
    pyplot.close(figures[0])


def test_the_json_has_all_of_it(tmp_path: Path) -> None:
    config = BenchConfig({'a': 'x', 'b': '\udcff'}, swift_args={'model': 'm'}, samples=12, merge_args={'density': 0.5})
    found = result(cut=2)
    report.write_json(report.to_json(config, found, {'python': '3'}), tmp_path / 'a.json')
    data = json.loads((tmp_path / 'a.json').read_text(encoding='utf-8'))
    assert list(data) == ['schema_version', 'settings', 'machine', 'versions', 'model', 'stock_samples', 'samples']
    assert (data['schema_version'], data['stock_samples'], data['versions']) == (1, 2, {'python': '3'})
    assert data['settings'] == {
        'adapters': {'a': 'x', 'b': '\udcff'},
        'synthetic': False,
        'swift_args': {'model': 'm'},
        'samples': 12,
        'adapters_per_sample': 2,
        'combination_type': 'linear',
        'merge_args': {'density': 0.5},
        'compile_merging': False,
        'seed': 42,
        'stock_seconds': 120.,
    }  # yapf: disable
    assert (data['machine'], data['model']) == (found.machine, found.model)
    assert data['samples'][0] == {
        'adapters': ['a', 'b'],
        'weights': [0.25, 0.75],
        'patch_seconds': 0.5,
        'stock_seconds': 0.2
    }
    assert [sample['stock_seconds'] for sample in data['samples']] == [0.2, 1.2, *[None] * 10]
    assert [sample['patch_seconds'] for sample in data['samples']] == found.patch
