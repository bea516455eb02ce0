"""How far a command is: one stage after another."""
import time
from contextlib import contextmanager
from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn,
                           TimeElapsedColumn, TimeRemainingColumn)
from rich.text import Text
from typing import Callable, Iterator, Optional

# Seconds after which something is said again where it cannot be shown.
_SECONDS_OF_SILENCE = 10.


class _Count(MofNCompleteColumn):
    """How many things are done of how many, where they are counted."""

    def render(self, task: Task) -> Text:
        return super().render(task) if (task.total or 0) > 1 else Text('')


class _Rate(ProgressColumn):
    """How many things a second are done."""

    def render(self, task: Task) -> Text:
        return Text('' if task.total is None or not task.speed else f'{task.speed:,.1f}/s')


@contextmanager
def stage(console: Console,
          description: str,
          total: Optional[int] = None,
          done: int = 0,
          *,
          redirects: bool = False) -> Iterator[Callable[..., None]]:
    """Shows one stage: on a terminal as a bar that moves, elsewhere by a line now and then.

    Args:
        console: Where.
        description: What is being done.
        total: How many things there are to do, None where that is not known.
        done: How many of them are done already.
        redirects: Whether what is written to stdout and stderr meanwhile appears above the bar.

    Yields:
        What is called with how many more are done, by default one.
    """
    if not console.is_terminal:
        yield from _told(console, description, total, done)
        return
    columns = (SpinnerColumn(finished_text='✓'), TextColumn('{task.description:<36}'), BarColumn(), _Count(), _Rate(),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, redirect_stdout=redirects, redirect_stderr=redirects) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda count=1: progress.advance(task, count)
        if total is None:
            completed = progress.tasks[0].completed or 1
            progress.update(task, total=completed, completed=completed)


def _told(console: Console, description: str, total: Optional[int], done: int) -> Iterator[Callable[..., None]]:
    start = said = time.monotonic()
    before = done

    def line() -> str:
        seconds = time.monotonic() - start
        text = f'{description}: '
        if total is not None:
            text += f'{done:,} of {total:,}, '
        if done > before:
            text += f'{(done - before) / max(seconds, 1e-9):,.1f}/s, '
        return f'{text}{seconds:.1f} s'

    def advance(count: int = 1) -> None:
        nonlocal done, said
        done += count
        if time.monotonic() - said > _SECONDS_OF_SILENCE:
            said = time.monotonic()
            left = '' if total is None else f', {(total - done) * (said - start) / (done - before):,.0f} s left'
            console.print(line() + left, highlight=False, soft_wrap=True)

    yield advance
    console.print(line(), highlight=False, soft_wrap=True)
