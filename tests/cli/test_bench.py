"""`swift-patch bench` writes a table, a picture and JSON; whatever is wrong is told before anything is loaded."""
import json
import os
import pytest
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import swift_patch
from swift_patch import cli
from swift_patch.bench import measure
from swift_patch.synthetic.tiny_model import MODEL_TYPE

NAMES = ['l0', 'l1', 'l2', 'l3']


def command(written: Any, kind: str = 'swift', names: List[str] = NAMES) -> List[str]:
    model_dir, paths = written
    adapters = [f'{name}={paths[kind][name]}' for name in names]
    return [
        'bench', '--adapters', *adapters, '--model', model_dir, '--model_type', MODEL_TYPE, '--torch_dtype', 'float32',
        '--device', 'cpu'
    ]


@pytest.fixture
def loads_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is about to be loaded."""

    def fail(*args: Any) -> None:
        raise AssertionError('a model is loaded')

    monkeypatch.setattr(measure, 'load_model', fail)


@pytest.mark.parametrize(('kind', 'wrapper'), [('swift', 'SwiftModel'), ('peft', 'PeftModel')])
def test_a_table_a_picture_and_json_are_made(written: Any, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str,
                                             wrapper: str) -> None:
    picture, data = tmp_path / 'new' / 'a.png', tmp_path / 'a.json'
    arguments = [*command(written, kind), '--samples', '6', '--adapters_per_sample', '2', '--seed', '7']
    assert cli.main([*arguments, '--picture', str(picture), '--json', str(data)]) == 0
    out = capsys.readouterr().out
    assert 'Composing 2 of 4 LoRAs (linear)' in out and 'sum of 1-6' in out and 'cut' not in out
    assert f'{wrapper}, float32, 14 LoRA layers, 4 adapters of rank 4 in float32' in ' '.join(out.split())
    assert f'Wrote {picture}' in out and f'Wrote {data}' in out
    assert picture.read_bytes().startswith(b'\x89PNG')
    found = json.loads(data.read_text())
    assert [len(found['samples']), found['stock_samples'], found['settings']['seed']] == [6, 6, 7]
    assert found['samples'][0]['adapters'] == measure.random_samples(NAMES, 1, 2, 7)[0].adapters
    assert all(sample['stock_seconds'] > 0 and sample['patch_seconds'] > 0 for sample in found['samples'])
    assert found['settings']['swift_args']['model'] == written[0]
    assert found['versions']['swift-patch'] == swift_patch.__version__ and 'peft' in found['versions']
    assert found['model']['wrapper'] == wrapper and found['machine']['device'] == 'cpu'
    # Nothing but these.
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['a.json', 'a.png', 'new']


def test_that_stock_was_cut_is_told(written: Any, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([*command(written), '--samples', '3', '--stock_seconds', '0']) == 0
    out = ' '.join(capsys.readouterr().out.split())
    assert '│ 3 │ (cut) │' in out and '│ sum of 1-1 │' in out
    assert 'Stock was cut after 1 of 3 samples (--stock_seconds 0): the sums are of those.' in out


def test_a_synthetic_model_needs_no_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / 'a.json'
    arguments = ['bench', '--synthetic', '--samples', '2', '--stock_seconds', '0', '--device', 'cpu']
    assert cli.main([*arguments, '--json', str(data)]) == 0
    found = json.loads(data.read_text())
    assert (found['settings']['synthetic'], found['settings']['adapters']) == (True, {})
    assert [found['model'][key] for key in ('lora_layers', 'adapters', 'ranks')] == [56, 14, [8]]
    assert '56 LoRA layers, 14 adapters of rank 8' in ' '.join(capsys.readouterr().out.split())


def test_the_option_compile_merging_is_handed_on_and_told(written: Any, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = tmp_path / 'a.json', []
    monkeypatch.setattr(measure, 'compile_merging', lambda: asked.append(True))
    arguments = [*command(written), '--samples', '1', '--stock_seconds', '0', '--json', str(data), '--overwrite']
    for option in ([], ['--compile_merging']):
        assert cli.main([*arguments, *option]) == 0
        assert json.loads(data.read_text())['settings']['compile_merging'] == bool(option)
    assert asked == [True]


@pytest.mark.parametrize(('arguments', 'told'), [
    (['--picture', 'a.bmp'], "--picture is expected to end in one of .png, .svg, .pdf, found 'a.bmp'."),
    (['--picture', 'a'], "found 'a'."),
    (['--picture', '/dev/null/a.png'], 'Cannot write /dev/null/a.png: '),
    (['--json', '/dev/null/a'], 'Cannot write /dev/null/a: '),
    (['--json', '.'], 'Cannot write .: it is a folder.'),
    (['--json', 'x' * 300], 'File name too long'),
    (['--json', 'old', '--picture', 'a.png'], '--json old exists: give --overwrite to replace it, or another file.'),
    (['--picture', 'old.png'], '--picture old.png exists: give --overwrite'),
    (['--json', 'a.png', '--picture', './a.png'], 'are expected to be two files, found a.png twice.'),
    (['--adapters_per_sample', '5'], '--adapters_per_sample is expected to be at most the number of adapters, 4'),
    (['--combination_type', 'ties'], 'expects a density'),
    (['--model_type', 'none'], 'ms-swift cannot use these arguments: '),
    (['--adapters', 'a'], "--adapters takes NAME=PATH, a folder, @FILE or the id of an adapter on a hub, got 'a': "),
    (['--adapters', 'l0=b'], "--adapters names 'l0' twice: "),
    (['--adapters', 'a=b', 'a=c'], "--adapters names 'a' twice: b and c."),
    (['--adapters', 'a=none'], "adapter 'a' (none): the path does not exist."),
])  # yapf: disable
def test_what_is_wrong_is_told_before_a_model_is_loaded(written: Any, loads_no_model: None, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                                        arguments: List[str], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ('old', 'old.png'):
        Path(name).write_text('precious')
    assert cli.main([*command(written), *arguments]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith('swift-patch')]
    assert line.startswith('swift-patch bench: error: ') and told in line
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {'old': 'precious', 'old.png': 'precious'}


@pytest.mark.parametrize(('arguments', 'told'), [
    (['--samples', '0'], "argument --samples: must be an integer from 1 to 100000, got '0'"),
    (['--samples', '100001'], 'argument --samples: must be an integer'),
    (['--samples', '1.5'], 'argument --samples: must be an integer'),
    (['--adapters_per_sample', '0'], 'argument --adapters_per_sample: must be an integer of at least 1'),
    (['--stock_seconds', '-1'], 'argument --stock_seconds: must be a number of at least 0'),
    (['--stock_seconds', 'nan'], 'argument --stock_seconds: must be a number'),
    (['--seed', 'x'], 'argument --seed: invalid int value'),
    (['--density', '2'], 'argument --density: must be a number from 0 to 1'),
    (['--combination_type', 'average'], "argument --combination_type: invalid choice: 'average'"),
    (['--torch_dtype', 'float8'], "argument --torch_dtype: invalid choice: 'float8'"),
    (['--synthetic'], 'argument --synthetic: not allowed with argument --adapters'),
    (['--merge_method', 'fusion'], 'unrecognized arguments: --merge_method fusion'),
])  # yapf: disable
def test_a_wrong_value_is_told_with_its_option(written: Any, loads_no_model: None, capsys: pytest.CaptureFixture,
                                               arguments: List[str], told: str) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main([*command(written), *arguments])
    assert e.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(('arguments', 'told'), [
    ([], 'one of the arguments --adapters --synthetic is required'),
    (['--model', 'x'], 'one of the arguments --adapters --synthetic is required'),
    (['--adapters'], 'argument --adapters: expected at least one argument'),
])  # yapf: disable
def test_adapters_are_required(arguments: List[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(['bench', *arguments])
    assert e.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(('option', 'value'), [('model', 'x'), ('model_type', 'x'), ('model_revision', 'x'),
                                               ('use_hf', 'true')])
def test_a_synthetic_model_is_no_other(loads_no_model: None, capsys: pytest.CaptureFixture, option: str,
                                       value: str) -> None:
    assert cli.main(['bench', '--synthetic', f'--{option}', value]) == 2
    assert f'--synthetic makes a model of its own, so it takes no --{option}: ' in capsys.readouterr().err


def test_overwrite_replaces_old_files(written: Any, tmp_path: Path) -> None:
    picture, data = tmp_path / 'a.svg', tmp_path / 'a.json'
    for path in (picture, data):
        path.write_text('old')
    arguments = [*command(written), '--samples', '1', '--picture', str(picture), '--json', str(data)]
    assert cli.main([*arguments, '--overwrite']) == 0
    assert '<svg' in picture.read_text() and json.loads(data.read_text())['schema_version'] == 1


@pytest.mark.parametrize('name', ['_measure', 'stock_composing'])
def test_an_interrupted_run_writes_nothing(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture, name: str) -> None:

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, name, interrupt)
    assert cli.main([*command(written), '--samples', '1', '--json', str(tmp_path / 'a.json')]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == 'swift-patch bench: interrupted'
    assert not list(tmp_path.iterdir()) and swift_patch.is_applied()


def test_a_switched_off_patch_is_told(written: Any) -> None:
    process = subprocess.run([sys.executable, '-m', 'swift_patch.cli', *command(written)],
                             env={
                                 **os.environ, 'SWIFT_PATCH_DISABLE': '1'
                             },
                             capture_output=True,
                             text=True)
    assert process.returncode == 2
    assert 'swift-patch bench: error: The patch is switched off: unset SWIFT_PATCH_DISABLE' in process.stderr
