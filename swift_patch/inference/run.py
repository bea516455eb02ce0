"""The run of `swift-patch infer`: check everything, load once, then compose, generate and write batch by batch."""
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Optional

from .config import Answer, InferConfig, InferSummary, Stage, no_stage
from .generator import ContinuousGenerator, Done, Generator
from .metrics import metric_of
from .plan import Job, Plan, make_job, make_plan
from .ranks import RankDied, Ranks, Terminated, joined
from .results import ResultFile, result_line

if TYPE_CHECKING:
    from ..ms_swift import InferArguments

# Held by a run: loading a model and seeding are of the whole process, and another thread would disturb them.
_ALONE = threading.RLock()


def run_infer(config: InferConfig, stage: Stage = no_stage) -> InferSummary:
    """Answers every sample of some datasets with its own composition of adapters.

    No file is written before the samples, the adapters, the options, an existing result file, the template's view of
    every sample and the loading of the model have all succeeded. Each result line is flushed when its sample and all
    before it are done. The lines depend on the inputs only (the random state is seeded per batch, and batches do not
    depend on what is finished or on how many processes there are), so that a resumed run writes the same file.

    Threads that call it wait for each other. Started in several processes, as by torchrun, it shares the batches among
    them; the first one writes.

    Args:
        config: What to run.
        stage: Shows how far it is.

    Returns:
        What was done; in processes other than the first nothing but the path.

    Raises:
        DatasetError: If samples are wrong, with all of them.
        ValueError: If anything else that a user can put right is wrong.
        RankDied: If another process of the run ended.
        KeyboardInterrupt: Where it was interrupted; once there is a result file, with a text on how to go on.
    """
    if config.swift_args.get('stream'):
        # They are shown one after another.
        config = replace(config, max_batch_size=1)
    with _ALONE, joined() as ranks, ExitStack() as stack:
        job = make_job(config, ranks, stage)
        path = Path(config.result_path or _default_path(job.args))
        summary = InferSummary(str(path))
        # Of the first rank alone.
        results: Optional[ResultFile] = None

        def open_results() -> Plan:
            nonlocal results
            results = stack.enter_context(ResultFile(path, config, job.args, job.samples, job.checkpoints))
            return make_plan(job, results.todo, stage)

        plan = ranks.from_main(open_results)
        if results is not None:
            summary = InferSummary(str(results.path), resumed=results.num_finished, errors=results.num_errors)
        if plan.batches or plan.refused:
            _answer(job, plan, ranks, results, summary, stage)
    if job.args.metric and results is not None:
        summary.metric = metric_of(job.args.metric, results.path)
    return summary


def _answer(job: Job, plan: Plan, ranks: Ranks, results: Optional[ResultFile], summary: InferSummary,
            stage: Stage) -> None:
    """Does what is planned, on all ranks; the one that has the results writes them and counts."""
    generator_class = ContinuousGenerator if job.is_continuous else Generator
    with ExitStack() as stack:
        with stage('Loading the model'):
            generator = ranks.on_all(lambda: generator_class(job.config, job.args, job.checkpoints, job.samples)
                                     if plan.batches else None)
        if generator is not None:
            stack.callback(generator.close)

        def begin(number: int) -> 'Future[Done]':
            assert generator is not None, 'there are batches'
            return generator.begin(plan.batches[number])

        shown = no_stage if job.args.stream else stage
        advance = stack.enter_context(shown('Answering', len(job.samples), summary.resumed))
        writer = None if results is None else _Writer(job, results, plan.refused, summary, advance)

        def deliver(number: int, done: Done) -> None:
            if writer is not None:
                writer.take(done)

        try:
            ranks.share(range(len(plan.batches)), begin, deliver, job.window)
        except (KeyboardInterrupt, RankDied, Terminated) as e:
            raise type(e)(f'{e} --resume goes on with {summary.result_path}'.lstrip()) from e


class _Writer:
    """Writes the lines of answers in the order of the dataset, and counts.

    Args:
        job: What is asked.
        results: The file.
        refused: Why samples cannot be asked, by number.
        summary: What is counted into.
        advance: Called with how many more lines are written.
    """

    def __init__(self, job: Job, results: ResultFile, refused: Dict[int, str], summary: InferSummary,
                 advance: Callable[[int], None]):
        self._config = job.config
        self._samples = job.samples
        self._results = results
        self._summary = summary
        self._advance = advance
        self._todo = deque(results.todo)
        self._meant = set(results.todo)
        # Those whose lines wait for those of samples before them.
        self._answers = {number: Answer(error=reason) for number, reason in refused.items()}
        results.start()
        self._start = time.perf_counter()
        self._write()

    def take(self, done: Done) -> None:
        """Takes what came of a batch.

        Raises:
            ValueError: A sample failed and the run is strict; the lines before it are written. Or nothing can be
                written.
        """
        self._summary.seconds_composing += done.seconds_composing
        self._summary.seconds_generating += done.seconds_generating
        # Others of the batch were finished before.
        self._answers.update((number, answer) for number, answer in done.answers.items() if number in self._meant)
        self._write()

    def _write(self) -> None:
        while self._todo and self._todo[0] in self._answers:
            number = self._todo[0]
            answer, sample = self._answers.pop(number), self._samples[number]
            if answer.error is not None and self._config.strict:
                raise ValueError(f'{sample.dataset}, {sample.unit} {sample.line}: {answer.error}')
            self._results.write(number, result_line(self._config, sample, answer))
            self._todo.popleft()
            self._summary.samples += 1
            self._summary.tokens += answer.tokens
            self._summary.errors += answer.error is not None
            self._advance(1)
        self._summary.seconds = time.perf_counter() - self._start


def _default_path(args: 'InferArguments') -> str:
    """Returns where results go by default: where `swift infer` puts those of a model without adapters."""
    return os.path.join('result', args.model_suffix, 'infer_result', f'{datetime.now():%Y%m%d-%H%M%S}.jsonl')
