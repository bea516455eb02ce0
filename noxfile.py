"""The suite with every pair of releases that the README's table lists: `make matrix`, or `nox -s "suite(oldest)"`.

Each session makes an environment of its own, runs the tests in it, and leaves a line for the table that
`nox -s table` prints.
"""
import json
import nox
import xml.etree.ElementTree
from pathlib import Path
from typing import Dict

nox.options.default_venv_backend = 'venv'
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

RESULTS = Path('.nox') / 'results'
# By name, the Python and the pins. Where a release has an older or newer neighbour that no line names, the neighbour
# is inside of the range in pyproject.toml, but was not run.
ENVIRONMENTS: Dict[str, Dict[str, str]] = {
    'newest': {
        'python': '3.12',
        'ms-swift': '4.6.0',
        'peft': '0.20.0',
        'transformers': '5.19.0'
    },
    '4.6-peft-0.18': {
        'python': '3.11',
        'ms-swift': '4.6.0',
        'peft': '0.18.1',
        'transformers': '5.19.0'
    },
}
TORCH = '2.13.0'


@nox.session
@nox.parametrize('name', list(ENVIRONMENTS), ids=list(ENVIRONMENTS))
def suite(session: nox.Session, name: str) -> None:
    """Runs the suite, or what is given after `--`, with one pair of releases."""
    pins = {'torch': TORCH, **ENVIRONMENTS[name]}
    python = pins.pop('python')
    session.run('python', '-c', f'import sys; assert sys.version.startswith("{python}"), sys.version')
    constraints = Path(session.create_tmp()) / 'constraints.txt'
    constraints.write_text(''.join(f'{package}=={version}\n' for package, version in pins.items()))
    session.install('--constraint', str(constraints), '--editable', '.[test,upstream]')
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS.resolve() / f'{name}.xml'
    session.run('python', '-m', 'pytest', f'--junitxml={report}', *session.posargs)
    counts = xml.etree.ElementTree.parse(report).getroot()[0].attrib
    line = {'python': python, **pins, **{key: counts[key] for key in ('tests', 'failures', 'errors', 'skipped')}}
    (RESULTS / f'{name}.json').write_text(json.dumps(line))
