"""A stage shows that something moves: bars on a terminal, lines elsewhere."""
import io
import pytest
import time
from rich.console import Console
from typing import Any
from unittest import mock

from swift_patch.cli import progress
from swift_patch.cli.progress import stage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that stands still until it is told otherwise."""
    clock = mock.Mock(wraps=time)
    clock.monotonic = mock.Mock(return_value=100.)
    monkeypatch.setattr(progress, 'time', clock)
    return clock.monotonic


def test_on_no_terminal_a_stage_is_a_line_in_the_end(clock: Any) -> None:
    file = io.StringIO()
    with stage(Console(file=file), 'Reading', 4) as advance:
        for _ in range(4):
            advance()
        clock.return_value += 2
    assert file.getvalue() == 'Reading: 4 of 4, 2.0/s, 2.0 s\n'


def test_on_no_terminal_long_stages_tell_now_and_then_how_far_they_are(clock: Any) -> None:
    file = io.StringIO()
    with stage(Console(file=file), 'Answering', 1000, done=100) as advance:
        for _ in range(30):
            clock.return_value += 1
            advance(10)
    told = file.getvalue().splitlines()
    assert told == [
        'Answering: 210 of 1,000, 10.0/s, 11.0 s, 79 s left', 'Answering: 320 of 1,000, 10.0/s, 22.0 s, 68 s left',
        'Answering: 400 of 1,000, 10.0/s, 30.0 s'
    ]


def test_on_no_terminal_what_has_no_number_tells_its_seconds(clock: Any) -> None:
    file = io.StringIO()
    with stage(Console(file=file), 'Loading'):
        clock.return_value += 3
    assert file.getvalue() == 'Loading: 3.0 s\n'


@pytest.mark.parametrize('total', [None, 4])
def test_on_a_terminal_a_bar_is_there_at_once_and_full_in_the_end(total: Any) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, legacy_windows=False)
    with stage(console, 'Reading', total, redirects=False) as advance:
        assert 'Reading' in file.getvalue()
        advance(4)
    assert '4/4' in file.getvalue().splitlines()[-1] or '4/4' in file.getvalue()


def test_what_fails_ends_the_stage_with_its_error(clock: Any) -> None:
    file = io.StringIO()
    with pytest.raises(ValueError, match='wrong'):
        with stage(Console(file=file), 'Reading', 4):
            raise ValueError('wrong')
