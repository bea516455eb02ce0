"""The gate: what a benchmark measures is compared with the bound that is committed in gate.toml.

A plugin for pytest. A benchmark with the marker `gate` hands its measurement to the fixture `gate`; whatever misses its
bound is measured again, up to `attempts` times, for noise passes and a slower program does not. The tables at the end
show every attempt. The run fails where a bound is missed, where a benchmark has no bound, and, when all of the
benchmarks were asked for, where a bound has no benchmark.
"""
import io
import math
import pytest
import sys
from dataclasses import dataclass, field
from measure import Ratio
from pathlib import Path
from rich.console import Console
from rich.table import Table
from typing import Any, Callable, Dict, Iterator, List, Tuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class Subject:
    """What one group of bounds is about: a table of gate.toml.

    Attributes:
        what: what is measured.
        unit: what the number counts.
        bounds: the largest number allowed, by case; `inf` where it is only reported.
        over: what the measurement is divided by, if anything.
    """
    what: str
    unit: str
    bounds: Dict[str, float]
    over: str = ''


@dataclass
class Outcome:
    """What was measured for one bound.

    Attributes:
        bound: the bound.
        attempts: every measurement, the last one decides.
    """
    bound: float
    attempts: List[Ratio] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].value <= self.bound

    @property
    def verdict(self) -> str:
        """What the table says."""
        if not self.attempts:
            return 'NOT MEASURED'
        if math.isinf(self.bound):
            return 'reported'
        retries = len(self.attempts) - 1
        after = f', {retries} {"retry" if retries == 1 else "retries"}' if retries else ''
        return ('holds' if self.holds else 'MISSED') + after


def read_bounds(path: Path) -> Tuple[int, Dict[str, Subject]]:
    """Returns how often to try, and the bounds by subject."""
    with path.open('rb') as file:
        content = tomllib.load(file)
    attempts = content.pop('attempts')
    return attempts, {name: Subject(**table) for name, table in content.items()}


class Gate:
    """The plugin. To be registered under some name in `pytest_configure`.

    Args:
        path: the bounds, in TOML. All benchmarks are in its directory.
    """

    def __init__(self, path: Path):
        self._directory = path.resolve().parent
        self._attempts, self._subjects = read_bounds(path)
        self._outcomes = {
            (name, case): Outcome(bound)
            for name, subject in self._subjects.items()
            for case, bound in subject.bounds.items()
        }
        self._is_whole = False

    @pytest.fixture
    def gate(self, request: pytest.FixtureRequest,
             benchmark: Any) -> Iterator[Callable[[str, str, Callable[[], Ratio]], Ratio]]:
        """Returns `gate(subject, case, measure)`: fails the test where no attempt holds the bound.

        What was measured is also in pytest-benchmark's JSON, as `extra_info`.
        """
        if request.node.get_closest_marker('gate') is None:
            pytest.fail('a test that uses the fixture `gate` is expected to have the marker `gate`, found none')

        def gate(subject: str, case: str, measure: Callable[[], Ratio]) -> Ratio:
            __tracebackhide__ = True
            outcome = self._outcomes.get((subject, case))
            if outcome is None:
                pytest.fail(f'gate.toml has no bound for {case!r} of {subject!r}: add one')
            while not outcome.holds and len(outcome.attempts) < self._attempts:
                outcome.attempts.append(measure())
            last = outcome.attempts[-1]
            benchmark.extra_info.update(
                subject=subject,
                case=case,
                what=self._subjects[subject].what,
                divided_by=self._subjects[subject].over,
                attempts=[attempt.value for attempt in outcome.attempts],
                ratio=last.value,
                bound=outcome.bound,
                seconds=dict(last.seconds))
            if not outcome.holds:
                values = ', '.join(shown(attempt.value) for attempt in outcome.attempts)
                pytest.fail(f'{subject}, {case}: at most {shown(outcome.bound)} {self._subjects[subject].unit} '
                            f'expected, found {values}')
            return last

        yield gate

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        option, config = session.config.option, session.config
        paths = [(config.invocation_params.dir / arg).resolve() for arg in config.args]
        self._is_whole = not option.keyword and option.markexpr in ('', 'gate') and any(
            path == self._directory or path in self._directory.parents for path in paths)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._is_whole and self._unmeasured() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        outcomes = {key: outcome for key, outcome in self._outcomes.items() if outcome.attempts or self._is_whole}
        if not outcomes:
            return
        terminalreporter.section('gate')
        console = Console(file=io.StringIO(), width=120, force_terminal=terminalreporter.hasmarkup)
        for name, subject in self._subjects.items():
            of_subject = {case: outcome for (key, case), outcome in outcomes.items() if key == name}
            if of_subject:
                console.print(_table(name, subject, of_subject))
        missed = [f'{name}, {case}' for (name, case), outcome in outcomes.items() if not outcome.holds]
        bounds = sum(math.isfinite(outcome.bound) for outcome in outcomes.values())
        console.print(f'{len(missed)} of {bounds} bounds do not hold: {"; ".join(missed)}.'
                      if missed else f'All of {bounds} bounds hold.')
        terminalreporter.write(console.file.getvalue())

    def _unmeasured(self) -> bool:
        return any(not outcome.attempts for outcome in self._outcomes.values())


def shown(value: float) -> str:
    """Returns a number as the tables show it: small ones as fractions."""
    if math.isinf(value):
        return '—'
    return f'1/{1 / value:.0f}' if 0 < value < 0.1 else f'{value:.3g}'


def _table(name: str, subject: Subject, outcomes: Dict[str, Outcome]) -> Table:
    title = f'{name}: {subject.what}{", over " if subject.over else ""}{subject.over} ({subject.unit})'
    table = Table(title=title, title_justify='left', title_style='bold')
    table.add_column('case', min_width=28)
    table.add_column('at most', justify='right', min_width=7)
    table.add_column('found', justify='right', min_width=20)
    table.add_column('of the last attempt, ms', justify='right', min_width=30)
    table.add_column('verdict', min_width=17)
    for case, outcome in outcomes.items():
        times = outcome.attempts[-1].seconds if outcome.attempts else {}
        table.add_row(
            case,
            shown(outcome.bound),
            ', '.join(shown(attempt.value) for attempt in outcome.attempts),
            ' / '.join(f'{of} {seconds * 1e3:.3g}' for of, seconds in times.items()),
            outcome.verdict,
            style=None if outcome.holds else 'red')
    return table
