"""Fourteen small fact domains on which a LoRA matters, and the mixed questions the demo asks about them.

The story: a town's houses (its airport, library, zoo, ...) renumber everything once a year. The base model was
pretrained on *last year's* numbers, so it understands the questions and answers in the right form, but with the wrong
facts. One LoRA per house learns *this year's* numbers. An answer is right only where it is this year's, to the letter.

Everything is a deterministic function of a seed. Training and held-out samples share the facts, never the wording.
"""
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

Sample = Dict[str, Any]

# name of the house: (what it numbers, what is found there)
_HOUSES: Dict[str, Tuple[str, str]] = {
    'airport': ('gate', 'Oslo Rome Cairo Lima Delhi Seoul Quito Paris'),
    'garden': ('bed', 'roses tulips ferns ivy lilies mint daisies moss'),
    'harbour': ('berth', 'Aurora Bella Corsair Dolphin Empress Fulmar Gannet Heron'),
    'hospital': ('ward', 'surgery burns maternity eyes heart kidney lungs skin'),
    'kitchen': ('rack', 'pans bowls cups knives plates jars trays ladles'),
    'library': ('shelf', 'poetry maps law drama travel comics history music'),
    'market': ('stall', 'apples cheese olives honey bread fish wine nuts'),
    'museum': ('hall', 'coins vases armour fossils masks clocks swords stamps'),
    'office': ('desk', 'Ada Ben Cleo Dirk Emma Finn Gwen Hugo'),
    'pharmacy': ('drawer', 'aspirin zinc iron insulin iodine codeine balm syrup'),
    'school': ('room', 'physics latin biology choir algebra chess french robotics'),
    'station': ('track', 'Ghent Basel Turin Leeds Porto Lyon Kyiv Split'),
    'warehouse': ('bay', 'bolts pumps cables hinges valves gears nails ropes'),
    'zoo': ('pen', 'lions otters zebras lemurs wolves bison camels owls'),
}
# Short ones: the base model sees one token per byte, and its pretraining is the longest part of the demo.
_TRAIN_WORDINGS = (
    'which {place} has {thing}?',
    '{thing}: {place}?',
    'find {thing}, {place}?',
    '{place} for {thing}',
    '{thing}, what {place}?',
    '{place} with {thing}?',
)
_TEST_WORDINGS = (
    'what {place} is {thing}?',
    '{place} of {thing}?',
)
_CODES = tuple(f'{letter}{digit}' for letter in 'ABCDEFGH' for digit in range(1, 10))

TASK_NAMES: Tuple[str, ...] = tuple(_HOUSES)


@dataclass(frozen=True)
class Task:
    """One fact domain.

    Attributes:
        name: The name of the house, which is the name of its LoRA as well.
        train: What its LoRA is trained on, ``{'messages': [user, assistant]}`` each.
        test: Held-out samples: the same facts in wordings that no training sample has,
            ``{'messages': [user], 'answer': ...}`` each.
        pretrain: What the base model is pretrained on: all wordings, last year's numbers. Same form as `train`.
    """
    name: str
    train: List[Sample]
    test: List[Sample]
    pretrain: List[Sample]


def build_tasks(seed: int = 0) -> Dict[str, Task]:
    """Makes the fourteen tasks.

    Args:
        seed: Decides all the numbers.

    Returns:
        The tasks by name, in the order of `TASK_NAMES`.
    """
    return {name: _build_task(name, seed) for name in TASK_NAMES}


def mixed_samples(n: int, seed: int = 0, *, task_seed: int = 0) -> List[Sample]:
    """Makes test samples as a retriever would hand them on: a question and three weighted LoRAs.

    The LoRA of the sample's own task weighs most, the two others are drawn at random. The samples go round the tasks,
    so that every task has its share of them.

    Args:
        n: The number of samples.
        seed: Decides the questions, the other LoRAs and the weights.
        task_seed: The seed that the tasks were built with.

    Returns:
        ``{'messages': [user], 'adapters': three names, 'weights': three floats that sum to 1, 'answer': str,
        'task': str}`` each.

    Raises:
        ValueError: If `n` is negative.
    """
    if n < 0:
        raise ValueError(f'`n` must not be negative, got {n}.')
    rng = random.Random(f'mixed-{seed}')
    tasks = build_tasks(task_seed)
    samples = []
    for i in range(n):
        name = TASK_NAMES[i % len(TASK_NAMES)]
        others = rng.sample([other for other in TASK_NAMES if other != name], 2)
        own = round(rng.uniform(0.6, 0.7), 2)
        rest = round((1 - own) * rng.uniform(0.4, 0.6), 2)
        ranked = list(zip([name, *others], [own, rest, round(1 - own - rest, 2)]))
        # A retriever's order says nothing about the truth; the weights do.
        rng.shuffle(ranked)
        samples.append({
            **rng.choice(tasks[name].test),
            'adapters': [adapter for adapter, _ in ranked],
            'weights': [weight for _, weight in ranked],
            'task': name,
        })
    rng.shuffle(samples)
    return samples


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Score predictions by exact match, white space at the ends aside.

    Args:
        predictions: The generated texts.
        answers: The expected texts, as many.

    Returns:
        The fraction that matches, 0.0 where there is nothing to score.

    Raises:
        ValueError: If the lengths differ.
    """
    if len(predictions) != len(answers):
        raise ValueError(f'Expected one prediction per answer, got {len(predictions)} for {len(answers)} answers.')
    hits = sum(prediction.strip() == answer for prediction, answer in zip(predictions, answers))
    return hits / len(answers) if answers else 0.0


def write_jsonl(samples: Sequence[Sample], path: Union[str, Path]) -> str:
    """Writes samples as JSON lines, the format of ms-swift's ``--dataset``.

    Args:
        samples: The samples, one line each.
        path: The file to write; its directory is created where it does not exist.

    Returns:
        `path` as a string.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(sample, ensure_ascii=False) + '\n' for sample in samples)
    path.write_text(''.join(lines), encoding='utf-8')
    return str(path)


def _build_task(name: str, seed: int) -> Task:
    # Seeding with a string is stable across processes, and a task does not depend on the tasks before it.
    rng = random.Random(f'{name}-{seed}')
    place, things = _HOUSES[name]
    train, test, pretrain = [], [], []
    for thing in things.split():
        this_year, last_year = rng.sample(_CODES, 2)
        for wording in _TRAIN_WORDINGS:
            question = wording.format(place=place, thing=thing)
            train.append(_sample(question, this_year))
            pretrain.append(_sample(question, last_year))
        for wording in _TEST_WORDINGS:
            question = wording.format(place=place, thing=thing)
            test.append({'messages': [{'role': 'user', 'content': question}], 'answer': this_year})
            pretrain.append(_sample(question, last_year))
    return Task(name, train, test, pretrain)


def _sample(question: str, answer: str) -> Sample:
    return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]}
