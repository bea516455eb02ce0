"""Checkouts of ms-swift to edit."""
import shutil
import subprocess
from pathlib import Path

# ms-swift's, which is in its checkouts but not in what is installed.
SETUP_CFG = '''\
[isort]
line_length = 120
multi_line_output = 0
known_standard_library = setuptools
known_first_party = swift
known_third_party = json,yaml
no_lines_before = STDLIB,LOCALFOLDER
default_section = THIRDPARTY

[yapf]
BASED_ON_STYLE = pep8
COLUMN_LIMIT = 120
BLANK_LINE_BEFORE_NESTED_CLASS_OR_DEF = true
SPLIT_BEFORE_EXPRESSION_AFTER_OPENING_PAREN = true
SPLIT_BEFORE_ARITHMETIC_OPERATOR = true

[flake8]
max-line-length = 120
select = B,C,E,F,P,T4,W,B9
ignore = F401,F403,F405,F821,W503,E251,W504,E126
exclude = docs/src,*.pyi,.git,peft.py
'''
PAGE = '''\
# Tuners

## SwiftModel

- `SwiftModel.add_weighted_adapter(self, ...)`
  - Function: merges

- `SwiftModel.save_pretrained(self, save_directory)`
  - Function: saves
'''


def copy_of_ms_swift(folder: Path) -> Path:
    """A copy of the installed ms-swift as a checkout has it, without its git."""
    import swift
    shutil.copytree(Path(swift.__file__).parent, folder / 'swift', ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'setup.cfg').write_text(SETUP_CFG)
    return folder


def add_docs(repo: Path, chinese: str = 'Use-tuners.md') -> None:
    for path in (f'docs/source/Instruction/{chinese}', 'docs/source_en/Instruction/Use-tuners.md'):
        (repo / path).parent.mkdir(parents=True)
        (repo / path).write_text(PAGE, encoding='utf-8')


def git(repo: Path, *arguments: str) -> str:
    command = ['git', '-C', str(repo), '-c', 'user.name=test', '-c', 'user.email=test@example.com', *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout
