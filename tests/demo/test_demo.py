"""The demo's stages on a model of two layers with two LoRAs; the whole demo is `make demo`."""
import json
import pytest
from pathlib import Path
from rich.console import Console

from swift_patch.cli import main
from swift_patch.demo import compare, report
from swift_patch.demo.tasks import TASK_NAMES, build_tasks, exact_match, mixed_samples, write_jsonl
from swift_patch.demo.training import train_adapter
from swift_patch.synthetic.tiny_model import build_tiny_qwen2


@pytest.fixture(scope='module')
def town_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('engine')
    model_dir = build_tiny_qwen2(folder / 'model', hidden_size=32, num_layers=2)
    adapters = {}
    for name, task in list(build_tasks().items())[:3]:
        dataset = write_jsonl(task.train, folder / f'{name}.jsonl')
        adapters[name] = train_adapter(model_dir, dataset, folder / name, use_swift_lora=True, steps=2)
    return model_dir, adapters


@pytest.fixture(scope='module')
def samples(town_parts):
    adapters = list(town_parts[1])
    return [{**sample, 'adapters': adapters} for sample in mixed_samples(6)]


def test_stock_and_patch_give_the_same_answers_and_stock_is_cut_where_it_takes_too_long(town_parts, samples, tmp_path):
    advanced = []
    stock = compare.answer_with_stock(compare.TaskEngine(*town_parts), samples, lambda: advanced.append(1), 1e9)
    engine = compare.TaskEngine(*town_parts)
    patch = compare.answer_with_patch(engine, samples, lambda: advanced.append(1), combination_type='linear')
    assert stock.responses == patch.responses and len(stock.seconds) == len(patch.seconds) == 6
    assert len(advanced) == 12
    assert list(engine.model.adapters)[-1] == 'fused' and len(engine.model.adapters) == 4
    assert len(compare.answer_with_stock(compare.TaskEngine(*town_parts), samples, lambda: None, 0.0).responses) == 1

    answers = {'base': compare.answer_with_base(engine, samples, lambda: None), 'linear': patch}
    cut = compare.Answers(stock.responses[:4], stock.seconds[:4])
    report.write_results(samples, cut, answers, tmp_path / 'results.jsonl')
    lines = [json.loads(line) for line in Path(tmp_path, 'results.jsonl').read_text().splitlines()]
    assert [line['linear'] for line in lines] == patch.responses
    assert [line.get('stock') for line in lines] == [*stock.responses[:4], None, None]
    console = Console(record=True, width=100)
    console.print(report.accuracy_table(samples, answers))
    assert '%' in console.export_text()


def test_tasks_are_the_same_for_a_seed_and_share_facts_but_no_wording():
    assert build_tasks(3) == build_tasks(3) != build_tasks(4)
    for task in build_tasks().values():
        train = {sample['messages'][0]['content'] for sample in task.train}
        test = {sample['messages'][0]['content'] for sample in task.test}
        assert not train & test
        assert {sample['messages'][1]['content'] for sample in task.train} == {sample['answer'] for sample in task.test}


def test_mixed_samples_go_round_the_tasks_and_the_own_lora_is_the_heaviest():
    samples = mixed_samples(28)
    assert sorted(sample['task'] for sample in samples) == sorted(TASK_NAMES * 2)
    for sample in samples:
        assert len(set(sample['adapters'])) == 3 and sum(sample['weights']) == pytest.approx(1)
        assert sample['adapters'][sample['weights'].index(max(sample['weights']))] == sample['task']


def test_answers_are_scored_by_exact_match():
    assert exact_match(['A1 ', 'B2'], ['A1', 'B3']) == 0.5
    with pytest.raises(ValueError):
        exact_match(['A1'], [])


def test_an_output_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert main(['demo', '--output_dir', str(tmp_path / 'file')]) == 2
    assert main(['demo', '--samples', '0']) == 2
    err = capsys.readouterr().err
    assert '--output_dir' in err and '--samples' in err and 'Traceback' not in err
