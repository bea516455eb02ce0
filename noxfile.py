"""The suite with the releases that the README's table lists: `make matrix`, or `nox -s suite-oldest` for one of them.

Each session makes an environment of its own and runs the tests in it; `table` prints as Markdown what they found. A
Python that is not on the machine is left out.
"""
import json
import nox
import xml.etree.ElementTree
from pathlib import Path
from typing import Dict

nox.options.default_venv_backend = 'venv'
nox.options.reuse_existing_virtualenvs = True

TORCH = '2.13.0'
# What pip would search for long: the newest that the datasets of older ms-swift works with, and that ms-swift 3 does.
OF_DATASETS_3 = {'datasets': '3.6.0', 'pandas': '2.3.3', 'gradio': '5.50.0', 'setuptools': '80.9.0'}
OF_SWIFT_3 = {'transformers': '4.57.6', 'trl': '0.24.0', **OF_DATASETS_3}
NEWEST = {'ms-swift': '4.6.0', 'peft': '0.20.0', 'transformers': '5.19.0'}
# By name, the Python, where it is not to be the one that runs nox.
PYTHONS = {'python-3.10': '3.10', 'python-3.12': '3.12'}
# By name, the pins.
ENVIRONMENTS: Dict[str, Dict[str, str]] = {
    'newest': NEWEST,
    'python-3.10': NEWEST,
    'python-3.12': NEWEST,
    'older-peft': {
        **NEWEST, 'peft': '0.18.1'
    },
    'peft-19': {
        'ms-swift': '4.5.3',
        'peft': '0.19.1',
        'transformers': '5.16.1'
    },
    'first-4': {
        'ms-swift': '4.0.0',
        'peft': '0.18.1',
        'transformers': '5.2.0',
        'trl': '0.28.0',
        **OF_DATASETS_3
    },
    'last-3': {
        'ms-swift': '3.12.6',
        'peft': '0.18.1',
        **OF_SWIFT_3
    },
    'oldest': {
        'ms-swift': '3.11.2',
        'peft': '0.18.0',
        **OF_SWIFT_3
    },
}
RESULTS = Path('.nox') / 'results'


def add_session(name: str, pins: Dict[str, str]) -> None:
    """Adds the session of one environment."""

    @nox.session(name=f'suite-{name}', python=PYTHONS.get(name))
    def suite(session: nox.Session) -> None:
        """Runs the suite with one pair of releases; what is given after `--` goes to pytest."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        report, result = RESULTS.resolve() / f'{name}.xml', RESULTS / f'{name}.json'
        for of_before in (report, result):
            of_before.unlink(missing_ok=True)
        versions = {'torch': TORCH, **pins}
        constraints = Path(session.create_tmp()) / 'constraints.txt'
        constraints.write_text(''.join(f'{package}=={version}\n' for package, version in versions.items()))
        session.install('--constraint', str(constraints), '--editable', '.[test]')
        try:
            session.run('python', '-m', 'pytest', f'--junitxml={report}', *session.posargs)
        finally:
            if report.exists():
                python = session.run('python', '-c', 'import platform; print(platform.python_version())', silent=True)
                try:
                    counts = xml.etree.ElementTree.parse(report).getroot()[0].attrib
                except xml.etree.ElementTree.ParseError:
                    session.error(f'pytest did not end, and what it found is not whole: {report}')
                found = {key: int(counts[key]) for key in ('tests', 'failures', 'errors', 'skipped')}
                line = {'python': str(python).strip(), **versions, **found}
                result.write_text(json.dumps(line, indent=2))


for environment, environment_pins in ENVIRONMENTS.items():
    add_session(environment, environment_pins)


@nox.session(venv_backend='none')
def table(session: nox.Session) -> None:
    """Prints the table of the README: what the sessions found when they last ran."""
    print('| | ms-swift | peft | transformers | Python | passed | skipped | failed |')
    print('| --- | --- | --- | --- | --- | ---: | ---: | ---: |')
    for name in ENVIRONMENTS:
        path = RESULTS / f'{name}.json'
        if not path.exists():
            session.warn(f'suite-{name} has not run here')
            continue
        found = json.loads(path.read_text())
        failed = found['failures'] + found['errors']
        cells = [
            f'`{name}`', *(found[key] for key in ('ms-swift', 'peft', 'transformers', 'python')),
            found['tests'] - failed - found['skipped'], found['skipped'], failed
        ]
        print('| ' + ' | '.join(map(str, cells)) + ' |')
