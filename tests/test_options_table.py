"""The README compares the options of `swift infer` as they are."""
import importlib.util
import pytest
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_of_the_readme_is_that_of_both_parsers() -> None:
    pinned = dict(line.split('==') for line in (ROOT / 'constraints.txt').read_text().split() if '==' in line)
    if version('ms-swift') != pinned['ms-swift']:
        pytest.skip('the README has the options of the newest ms-swift')
    spec = importlib.util.spec_from_file_location('options', ROOT / 'docs' / 'options.py')
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    assert options.table() in (ROOT / 'README.md').read_text(encoding='utf-8')
