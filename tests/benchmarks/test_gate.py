"""The gate's own logic: inner runs of pytest with bounds and measurements made up."""
import gate
import json
import math
import pytest
from gate import read_bounds, shown
from pathlib import Path
from typing import Sequence

pytest_plugins = ['pytester']

BOUNDS = """
attempts = 3
[merge]
what = "an update"
over = "a copy"
unit = "times"
[merge.bounds]
"small" = 2
"""

CONFTEST = """
from pathlib import Path
from gate import Gate

def pytest_configure(config):
    config.pluginmanager.register(Gate(Path(__file__).with_name('gate.toml')), 'gate')
"""


class Project:
    """A directory of benchmarks, and what pytest says about it."""

    def __init__(self, pytester: pytest.Pytester):
        self._pytester = pytester
        pytester.makeconftest(CONFTEST)
        pytester.makeini('[pytest]\nmarkers =\n    gate\naddopts = --strict-markers --benchmark-disable\n')

    def run(self,
            *values: float,
            bounds: str = BOUNDS,
            case: str = 'small',
            marker: str = '@pytest.mark.gate',
            args: Sequence[str] = ()) -> pytest.RunResult:
        """Runs one benchmark that measures `values` one after another."""
        Path('gate.toml').write_text(bounds, encoding='utf-8')
        self._pytester.makepyfile(f"""
            import pytest
            from measure import Ratio

            {marker}
            def test_it(gate, benchmark):
                values = map(float, {[str(value) for value in values]})
                benchmark.pedantic(lambda: None, rounds=2)
                gate('merge', {case!r}, lambda: Ratio(next(values), {{'update': 0.012, 'copy': 0.004}}))
            """)
        return self._pytester.runpytest(*args)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    # The inner run measures, though the outer one be a worker of pytest-xdist, in which pytest-benchmark would not.
    monkeypatch.delenv('PYTEST_XDIST_WORKER', raising=False)
    return Project(pytester)


def test_what_is_within_its_bound_passes_at_once(project: Project) -> None:
    result = project.run(1.5)
    assert result.ret == 0
    result.stdout.fnmatch_lines([
        '*merge: an update, over a copy (times)*', '*small*2*1.5*update 12 / copy 4*holds *', '*All of 1 bounds hold*'
    ])


def test_what_misses_its_bound_is_measured_again_and_every_attempt_is_shown(project: Project) -> None:
    result = project.run(3, 2.5, 1.5)
    assert result.ret == 0
    result.stdout.fnmatch_lines(['*small*2*3, 2.5, 1.5*holds, 2 retries*'])


def test_what_misses_its_bound_each_time_fails_the_run(project: Project) -> None:
    result = project.run(3, 2.5, 2.25)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([
        '*merge, small: at most 2 times expected, found 3, 2.5, 2.25*', '*small*2*3, 2.5, 2.25*MISSED, 2 retries*',
        '*1 of 1 bounds do not hold: merge, small*'
    ])


def test_what_is_not_a_number_does_not_hold(project: Project) -> None:
    assert project.run(*[math.nan] * 3).ret == pytest.ExitCode.TESTS_FAILED


def test_what_is_only_reported_holds_whatever_it_is(project: Project) -> None:
    result = project.run(1e6, bounds=BOUNDS.replace('= 2', '= inf'))
    assert result.ret == 0
    result.stdout.fnmatch_lines(['*small*—*1e+06*reported*'])


def test_a_benchmark_without_a_bound_fails(project: Project) -> None:
    result = project.run(1, case='large', args=['-k', 'test_it'])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*gate.toml has no bound for 'large' of 'merge'*"])


def test_a_bound_without_a_benchmark_fails_a_run_of_all(project: Project) -> None:
    bounds = BOUNDS + '"large" = 2\n'
    result = project.run(1, bounds=bounds, args=['-m', 'gate'])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(['*large*2*NOT MEASURED*', '*1 of 2 bounds do not hold: merge, large*'])
    for some in (['-k', 'test_it'], ['test_a_bound_without_a_benchmark_fails_a_run_of_all.py']):
        result = project.run(1, bounds=bounds, args=some)
        assert result.ret == 0
        result.stdout.no_fnmatch_line('*NOT MEASURED*')


def test_a_gated_benchmark_is_expected_to_have_the_marker(project: Project) -> None:
    result = project.run(1, marker='')
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(['*expected to have the marker `gate`*'])


def test_what_was_measured_is_in_the_json_of_pytest_benchmark_missed_or_not(project: Project) -> None:
    project.run(3, 2.5, 2.25, args=['--benchmark-enable', '--benchmark-json=out.json'])
    content = json.loads(Path('out.json').read_text(encoding='utf-8'))
    assert content['benchmarks'][0]['extra_info'] == {
        'subject': 'merge',
        'case': 'small',
        'what': 'an update',
        'divided_by': 'a copy',
        'attempts': [3, 2.5, 2.25],
        'ratio': 2.25,
        'bound': 2,
        'seconds': {
            'update': 0.012,
            'copy': 0.004
        }
    }


def test_small_numbers_are_shown_as_fractions() -> None:
    assert [shown(value) for value in (0.002, 1.25, 0, math.inf)] == ['1/500', '1.25', '0', '—']


def test_the_committed_bounds_can_be_read() -> None:
    attempts, subjects = read_bounds(Path(gate.__file__).with_name('gate.toml'))
    assert attempts > 1
    assert all(subject.bounds for subject in subjects.values())
