"""The three parts in a checkout: what they change, alone and together, and the patches and texts that go with them."""
import ast
import errno
import pytest
import subprocess
import sys
from pathlib import Path
from upstream_checkout import PAGE, add_docs, git

from swift_patch.cli import main
from swift_patch.upstream.change import changes
from swift_patch.upstream.edits import UnexpectedCode
from swift_patch.upstream.parts import PARTS, TESTS, text

PAGES = {f'docs/{folder}/Instruction/Use-tuners.md' for folder in ('source', 'source_en')}
INIT = 'tests/tuners/__init__.py'
CHANGED = {
    'fix': {'base', 'lora_layers'},
    'activation': {'base', 'lora', 'utils'},
    'refill': {'base', 'utils'},
}


def contents(repo):
    return {
        path.relative_to(repo): path.read_bytes()
        for path in repo.rglob('*') if path.is_file() and '.git' not in path.parts
    }


def edit(repo, *arguments):
    return main(['upstream', '--repo', str(repo), *map(str, arguments)])


def of_part(part):
    return {f'swift/tuners/{name}.py'
            for name in CHANGED[part]} | {INIT, f'tests/tuners/{TESTS[part]}'} | (
                PAGES if part == 'refill' else set())


@pytest.mark.parametrize('part', PARTS)
def test_a_part_alone_changes_what_it_says_and_no_more_than_250_lines(repo, part, capsys):
    assert edit(repo, '--part', part) == 0
    assert {line[3:] for line in git(repo, 'status', '--porcelain', '-uall').splitlines()} == of_part(part)
    printed = capsys.readouterr().out
    assert all(path.split('/')[-1] in printed for path in of_part(part))
    git(repo, 'add', '.')
    added = sum(int(line.split()[0]) for line in git(repo, 'diff', '--cached', '--numstat').splitlines())
    assert 0 < added <= 250


@pytest.mark.parametrize('parts', [[part] for part in PARTS] + [[]], ids=str)
def test_the_second_time_changes_nothing(repo, capsys, parts):
    arguments = [argument for part in parts for argument in ('--part', part)]
    edit(repo, *arguments)
    before = contents(repo)
    assert edit(repo, *arguments) == 0
    assert contents(repo) == before and 'nothing was changed' in capsys.readouterr().out


def test_parts_may_come_one_after_the_other_in_any_order(repo):
    for part in reversed(PARTS):
        edit(repo, '--part', part)
    in_turn = contents(repo)
    git(repo, 'checkout', '-q', '.')
    git(repo, 'clean', '-fdq')
    edit(repo)
    assert contents(repo) == in_turn


def test_a_file_that_cannot_be_written_leaves_all_as_they_were(repo, capsys):
    (repo / 'tests').write_text('a file')
    before = contents(repo)
    assert edit(repo) == 2
    assert contents(repo) == before and 'Cannot write' in capsys.readouterr().err


def test_a_failure_half_way_leaves_all_as_they_were(repo, capsys, monkeypatch):
    before, write_bytes = contents(repo), Path.write_bytes

    def full_disk(path, data):
        if path.name == TESTS['refill']:
            write_bytes(path, data[:10])
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write_bytes(path, data)

    monkeypatch.setattr(Path, 'write_bytes', full_disk)
    assert edit(repo) == 2
    assert contents(repo) == before and 'No space left' in capsys.readouterr().err


def test_the_diff_applies_and_gives_what_the_edit_gives(repo, tmp_path):
    before, diff = contents(repo), tmp_path / 'change.diff'
    assert edit(repo, '--diff', diff) == 0
    assert contents(repo) == before
    git(repo, 'apply', '--check', str(diff))
    git(repo, 'apply', str(diff))
    applied = contents(repo)
    git(repo, 'checkout', '-q', '.')
    git(repo, 'clean', '-fdq')
    edit(repo)
    assert contents(repo) == applied != before


def test_the_series_is_applied_by_git_am_and_gives_what_the_edit_gives(repo, tmp_path):
    before, folder = contents(repo), tmp_path / 'series'
    assert edit(repo, '--series', folder, '--author', 'Ada <ada@example.com>') == 0
    patches = sorted(folder.iterdir())
    assert [path.name for path in patches] == [f'000{number}-{part}.patch' for number, part in enumerate(PARTS, 1)]
    assert contents(repo) == before
    git(repo, 'am', *map(str, patches))
    titles = git(repo, 'log', '--reverse', '--format=%an %s').splitlines()[1:]
    assert titles == [f'Ada {text(part).title}' for part in PARTS]
    assert '## How it was tested' in git(repo, 'log', '-1', '--format=%B')
    applied = contents(repo)
    git(repo, 'reset', '-q', '--hard', 'HEAD~3')
    edit(repo)
    assert contents(repo) == applied


def test_a_part_that_a_checkout_has_gets_no_patch(repo, tmp_path):
    edit(repo, '--part', 'fix')
    edit(repo, '--series', tmp_path / 'series')
    assert sorted(path.name
                  for path in (tmp_path / 'series').iterdir()) == ['0001-activation.patch', '0002-refill.patch']


@pytest.mark.parametrize(
    'tool', [['flake8'], ['isort', '--check-only', '--diff'], ['yapf', '--diff', '--recursive']],
    ids=lambda tool: tool[0])
@pytest.mark.parametrize('part', PARTS)
def test_linters_with_the_settings_of_ms_swift_find_nothing_new(repo, stock_copy, tool, part):
    (repo / 'setup.cfg').write_bytes((stock_copy / 'setup.cfg').read_bytes())

    def found(*paths):
        process = subprocess.run([sys.executable, '-m', *tool, *paths], cwd=repo, capture_output=True, text=True)
        # One line per complaint: of a diff, the head of a hunk, whose length depends on where a diff finds equal lines.
        return [line for line in (process.stdout + process.stderr).splitlines() if not line.startswith((' ', '+', '-'))]

    edited = [f'swift/tuners/{name}.py' for name in CHANGED[part]]
    before = found(*edited)
    edit(repo, '--part', part)
    # Older releases of ms-swift are not in the style of today's linters; of the newest ones `before` is empty.
    assert len(found(*edited)) <= len(before)
    assert found(f'tests/tuners/{TESTS[part]}') == []


def test_strings_are_in_single_quotes(repo):

    def fix():
        files = [str(path) for path in repo.rglob('*.py')]
        command = [sys.executable, '-m', 'pre_commit_hooks.string_fixer', *files]
        return subprocess.run(command, capture_output=True, text=True)

    fix()  # What ms-swift itself has in double quotes.
    edit(repo)
    process = fix()
    assert process.returncode == 0, process.stdout + process.stderr


def method(repo, path, name):
    """The code of a method of the checkout."""
    source = (repo / path).read_text()
    [node] = [node for node in ast.walk(ast.parse(source)) if getattr(node, 'name', '') == name]
    return ast.get_source_segment(source, node)


@pytest.mark.parametrize('old, new, left_alone', [
    ('use_dora=lora_config.use_dora,\n            )', 'config=lora_config,\n            )', '_create_and_replace'),
    ('new_module = Linear(target, adapter_name, module_key=module_key',
     'new_module = Linear(target, adapter_name, config=lora_config, module_key=module_key', '_create_new_module'),
])
def test_an_ms_swift_that_gives_the_config_to_layers_itself_is_left_to_it(repo, old, new, left_alone):
    path = repo / 'swift/tuners/lora_layers.py'
    stock = path.read_text()
    assert old in stock
    path.write_text(stock.replace(old, new))
    edit(repo, '--part', 'fix')
    for name in ('_create_and_replace', '_create_new_module'):
        found = method(repo, 'swift/tuners/lora_layers.py', name)
        assert ('get_compat_kwargs' not in found) == (name == left_alone)


def test_an_ms_swift_that_refills_in_a_way_of_its_own_is_left_alone(repo, capsys):
    path = repo / 'swift/tuners/base.py'
    path.write_text(path.read_text().replace(
        '    def save_pretrained(self,\n', '    def update_weighted_adapter(self):\n        pass\n\n'
        '    def save_pretrained(self,\n'))
    before = contents(repo)
    assert edit(repo, '--part', 'refill') == 0
    assert contents(repo) == before and 'nothing was changed' in capsys.readouterr().out


def test_nothing_of_the_parts_names_the_plugin(repo):
    for item in (item for of_one in changes(repo, PARTS).values() for item in of_one):
        assert 'swift_patch' not in item.new and 'swift-patch' not in item.new, item.path
    for part in PARTS:
        assert 'swift_patch' not in text(part).markdown()


def test_a_copy_without_documentation_gets_none(repo, capsys):
    git(repo, 'rm', '-rqf', 'docs')
    assert edit(repo) == 0
    assert not (repo / 'docs').exists() and 'no folder docs' in capsys.readouterr().out


def test_the_entry_comes_after_that_of_add_weighted_adapter_whatever_the_page_is_called(repo):
    git(repo, 'rm', '-rqf', 'docs')
    add_docs(repo, '使用tuners.md')
    edit(repo)
    page = (repo / 'docs/source/Instruction/使用tuners.md').read_text(encoding='utf-8')
    heads = [line.split('(')[0] for line in page.splitlines() if line.startswith('- ')]
    assert heads == [
        f'- `SwiftModel.{name}' for name in ('add_weighted_adapter', 'update_weighted_adapter', 'save_pretrained')
    ]
    assert page.startswith(PAGE[:PAGE.index('- `SwiftModel.save')])


@pytest.mark.parametrize('path, old, new, message', [
    ('swift/tuners/base.py', 'class SwiftModel(', 'class (', 'cannot be parsed'),
    ('swift/tuners/base.py', '(set(self.adapters.keys()) - adapter_names)', 'adapters', 'found them 0 times'),
    ('swift/tuners/base.py', 'from copy import copy\n', '', 'from copy import copy'),
    ('swift/tuners/lora.py', 'set_adapter(module, adapter_name', 'set_adapter(model, adapter_name', 'lora.py is exp'),
    ('swift/tuners/lora_layers.py', 'class LoraModel(_LoraModel)', 'class Lora(_LoraModel)', 'found them 0 times'),
    ('swift/tuners/utils.py', '    offload_helper = None\n', '    offload_helper = None\n' * 2, 'found them 2 times'),
    ('docs/source_en/Instruction/Use-tuners.md', 'add_weighted_adapter', 'merge', 'docs/source_en'),
])
def test_a_checkout_that_looks_otherwise_is_refused_and_left_as_it_was(repo, capsys, path, old, new, message):
    source = (repo / path).read_text(encoding='utf-8')
    assert old in source
    (repo / path).write_text(source.replace(old, new), encoding='utf-8')
    before = contents(repo)
    with pytest.raises(UnexpectedCode, match=message):
        changes(repo, PARTS)
    assert edit(repo) == 2
    assert contents(repo) == before and 'error' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['', 'nowhere', 'swift/tuners/base.py'])
def test_what_is_no_checkout_is_refused(repo, capsys, name):
    assert edit(repo / 'docs' / name) == 2
    assert 'expected to be a checkout' in capsys.readouterr().err


@pytest.mark.parametrize('option, name', [('--diff', 'change.diff'), ('--series', '0002-activation.patch')])
def test_an_existing_file_is_not_replaced_unless_asked(repo, tmp_path, capsys, option, name):
    (tmp_path / name).write_text('mine')
    target = tmp_path / name if option == '--diff' else tmp_path
    assert edit(repo, option, target) == 2
    assert (tmp_path / name).read_text() == 'mine' and '--overwrite' in capsys.readouterr().err
    assert edit(repo, option, target, '--overwrite') == 0
    assert (tmp_path / name).read_text() != 'mine'


def test_one_file_is_not_written_twice(repo, tmp_path, capsys):
    both = tmp_path / 'both'
    assert edit(repo, '--part', 'fix', '--diff', both, '--pull_request', both) == 2
    assert 'give two files' in capsys.readouterr().err and not both.exists()


@pytest.mark.parametrize('part', PARTS)
def test_the_text_of_a_part_says_what_and_how_it_was_tested(repo, tmp_path, part):
    path = tmp_path / 'text.md'
    assert edit(repo, '--part', part, '--pull_request', path) == 0
    written = path.read_text(encoding='utf-8')
    assert written.startswith('# ') and '## What' in written and f'tests/tuners/{TESTS[part]}' in written
    assert ('| `linear` |' in written) == (part == 'refill')


@pytest.mark.parametrize('arguments, message', [
    (['--pull_request', 'text.md'], 'give one --part'),
    (['--series', 'series', '--author', 'nobody'], 'NAME <EMAIL>'),
])
def test_what_cannot_be_done_is_said_before_anything_changes(repo, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = contents(repo)
    assert edit(repo, *arguments) == 2
    assert contents(repo) == before and message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['repo']
