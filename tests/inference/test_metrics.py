"""Metrics are those of `swift infer`, over what has both a response and a label."""
import json
import pytest
from pathlib import Path
from test_run import SAMPLES, make_config
from typing import Dict
from unittest import mock

from swift_patch.inference import metrics
from swift_patch.inference.config import InferConfig
from swift_patch.inference.metrics import metric_of
from swift_patch.inference.run import run_infer

LINES = [('yes', 'yes'), ('no', 'yes'), (None, 'yes'), ('yes', None), ('a b', 'a b')]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / 'r.jsonl'
    path.write_text('\n'.join(json.dumps({'response': response, 'labels': label}) for response, label in LINES))
    return path


def test_accuracy_is_the_share_of_responses_that_are_their_labels(results: Path) -> None:
    assert metric_of('acc', results) == {'acc': pytest.approx(2 / 3)}


def test_rouge_is_ms_swifts(results: Path) -> None:
    pytest.importorskip('jieba')
    from swift_patch.ms_swift import compute_rouge_bleu
    assert metric_of('rouge', results) == compute_rouge_bleu(['yes', 'no', 'a b'], ['yes', 'yes', 'a b'])


@pytest.fixture
def config(model_dir: str, checkpoints: Dict[str, str], tmp_path: Path) -> InferConfig:
    return make_config(model_dir, checkpoints, tmp_path)


def test_a_run_has_the_metric_that_was_asked_for(config: InferConfig) -> None:
    run_infer(config)
    lines = [json.loads(line) for line in Path(config.result_path).read_text().splitlines()]
    samples = [{**sample, 'messages': line['messages']} for sample, line in zip(SAMPLES, lines)]
    Path(config.val_dataset[0]).write_text('\n\n'.join(map(json.dumps, samples)))
    config.swift_args['metric'], config.overwrite = 'acc', True
    assert run_infer(config).metric == {'acc': 1.}
    config.overwrite, config.resume = False, True
    assert run_infer(config).metric == {'acc': 1.}


def test_a_metric_that_cannot_be_computed_is_told_before_a_model_is_loaded(config: InferConfig) -> None:
    config.swift_args['metric'] = 'rouge'
    with mock.patch.object(metrics, 'find_spec', lambda package: None):
        with pytest.raises(ValueError, match='pip install jieba nltk rouge'):
            run_infer(config)
    Path(config.val_dataset[0]).write_text(json.dumps(SAMPLES[0]))
    config.swift_args['metric'] = 'acc'
    with pytest.raises(ValueError, match='no sample has one'):
        run_infer(config)
    assert not Path(config.result_path).exists()
