"""How well a run answered: the metrics of `swift infer`."""
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Sequence

from .dataset import Sample

# What ms-swift's metrics import, which it does not require to be installed.
_PACKAGES = {'acc': (), 'rouge': ('jieba', 'nltk', 'rouge')}


def check_metric(metric: str, samples: Sequence[Sample]) -> None:
    """Raises ValueError where a metric cannot be computed of samples."""
    if metric not in _PACKAGES:
        raise ValueError(f'--metric is expected to be one of {", ".join(_PACKAGES)}, found {metric!r}.')
    missing = [package for package in _PACKAGES[metric] if find_spec(package) is None]
    if missing:
        raise ValueError(f'--metric {metric} needs packages that are not installed: pip install {" ".join(missing)}')
    if all(sample.label is None for sample in samples):
        raise ValueError(f'--metric {metric} compares responses with labels, but no sample has one: a label is an '
                         'assistant message at the end of the messages.')


def metric_of(metric: str, path: Path) -> Dict[str, float]:
    """Returns a metric of a result file, over the lines that have both a response and a label.

    Args:
        metric: 'acc', the share of responses that are their labels; or 'rouge', ms-swift's ROUGE and BLEU in percent.
        path: The file.
    """
    pairs = []
    with open(path, encoding='utf-8') as file:
        for line in file:
            found = json.loads(line)
            if found['response'] is not None and found['labels'] is not None:
                pairs.append((found['response'], found['labels']))
    if metric == 'acc':
        return {'acc': sum(response == label for response, label in pairs) / max(len(pairs), 1)}
    from ..ms_swift import compute_rouge_bleu
    scores: Dict[str, float] = compute_rouge_bleu(*map(list, zip(*pairs))) if pairs else {}
    return scores
