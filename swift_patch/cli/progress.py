"""A progress bar for one stage of a command."""
from contextlib import contextmanager
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typing import Callable, Iterator, Optional


@contextmanager
def stage(console: Console, description: str, total: Optional[int] = None) -> Iterator[Callable[[], None]]:
    """Shows a bar for one stage; yields what advances it by one. Without a total the bar only moves."""
    columns = (TextColumn('{task.description:<36}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)
        if total is None:
            progress.update(task, total=1, completed=1)
