"""The edit of a checkout, and the diff of it."""
import errno
import pytest
import subprocess
import sys
from pathlib import Path
from upstream_checkout import PAGE, add_docs, git

from swift_patch.cli import main
from swift_patch.upstream.change import TEST, change
from swift_patch.upstream.edits import UnexpectedCode

MODULES = ['base', 'lora', 'lora_layers', 'peft', 'utils']


def contents(repo):
    return {
        path.relative_to(repo): path.read_bytes()
        for path in repo.rglob('*') if path.is_file() and '.git' not in path.parts
    }


def test_it_edits_what_it_says_and_nothing_else(repo, capsys):
    assert main(['upstream', '--repo', str(repo)]) == 0
    changed = {line[3:] for line in git(repo, 'status', '--porcelain', '-uall').splitlines()}
    assert {path
            for path in changed if 'weighted_adapter' not in path} == {
                *(f'swift/tuners/{name}.py' for name in MODULES), 'docs/source/Instruction/Use-tuners.md',
                'docs/source_en/Instruction/Use-tuners.md'
            }
    assert TEST in changed and 'swift/tuners/weighted_adapter/weighted.py' in changed
    printed = capsys.readouterr().out
    assert all(path.split('/')[-1] in printed for path in changed)


def test_the_second_time_changes_nothing(repo, capsys):
    main(['upstream', '--repo', str(repo)])
    before = contents(repo)
    assert main(['upstream', '--repo', str(repo)]) == 0
    assert contents(repo) == before and 'nothing was changed' in capsys.readouterr().out


def test_a_file_that_cannot_be_written_leaves_all_as_they_were(repo, capsys):
    (repo / 'tests').write_text('a file')
    before = contents(repo)
    assert main(['upstream', '--repo', str(repo)]) == 2
    assert contents(repo) == before and 'Cannot write' in capsys.readouterr().err


def test_a_failure_half_way_leaves_all_as_they_were(repo, capsys, monkeypatch):
    before, write_bytes = contents(repo), Path.write_bytes

    def full_disk(path, data):
        if path.name == 'weighted.py':
            write_bytes(path, data[:10])
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write_bytes(path, data)

    monkeypatch.setattr(Path, 'write_bytes', full_disk)
    assert main(['upstream', '--repo', str(repo)]) == 2
    assert contents(repo) == before and 'No space left' in capsys.readouterr().err


def test_the_diff_applies_and_gives_what_the_edit_gives(repo, tmp_path):
    before, diff = contents(repo), tmp_path / 'change.diff'
    assert main(['upstream', '--repo', str(repo), '--diff', str(diff)]) == 0
    assert contents(repo) == before
    git(repo, 'apply', '--check', str(diff))
    git(repo, 'apply', str(diff))
    applied = contents(repo)
    git(repo, 'checkout', '-q', '.')
    git(repo, 'clean', '-fdq')
    main(['upstream', '--repo', str(repo)])
    assert contents(repo) == applied != before


@pytest.mark.parametrize(
    'tool', [['flake8'], ['isort', '--check-only', '--diff'], ['yapf', '--diff', '--recursive']],
    ids=lambda tool: tool[0])
def test_linters_with_the_settings_of_ms_swift_find_nothing_new(repo, stock_copy, tool):
    (repo / 'setup.cfg').write_bytes((stock_copy / 'setup.cfg').read_bytes())

    def found(*paths):
        process = subprocess.run([sys.executable, '-m', *tool, *paths], cwd=repo, capture_output=True, text=True)
        return process.stdout + process.stderr

    edited = [f'swift/tuners/{name}.py' for name in MODULES]
    before = found(*edited)
    main(['upstream', '--repo', str(repo)])
    # Older releases of ms-swift are not in the style of today's linters.
    assert found(*edited).count('\n') <= before.count('\n')
    assert found('swift/tuners/weighted_adapter', TEST) == ''


def test_strings_are_in_single_quotes(repo):

    def fix():
        files = [str(path) for path in repo.rglob('*.py')]
        command = [sys.executable, '-m', 'pre_commit_hooks.string_fixer', *files]
        return subprocess.run(command, capture_output=True, text=True)

    fix()  # What ms-swift itself has in double quotes.
    main(['upstream', '--repo', str(repo)])
    process = fix()
    assert process.returncode == 0, process.stdout + process.stderr


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
    main(['upstream', '--repo', str(repo)])
    for name in ('_create_and_replace', '_create_new_module'):
        method = path.read_text().partition(f'def {name}')[2].partition('    def ')[0]
        assert ('layer_arguments' not in method) == (name == left_alone)


def test_nothing_of_the_change_names_the_plugin(repo):
    for item in change(repo):
        assert 'swift_patch' not in item.new and 'swift-patch' not in item.new, item.path


def test_a_copy_without_documentation_gets_none(repo, capsys):
    git(repo, 'rm', '-rqf', 'docs')
    assert main(['upstream', '--repo', str(repo)]) == 0
    assert not (repo / 'docs').exists() and 'no folder docs' in capsys.readouterr().out


def test_the_entry_comes_after_that_of_add_weighted_adapter_whatever_the_page_is_called(repo):
    git(repo, 'rm', '-rqf', 'docs')
    add_docs(repo, '使用tuners.md')
    main(['upstream', '--repo', str(repo)])
    page = (repo / 'docs/source/Instruction/使用tuners.md').read_text(encoding='utf-8')
    heads = [line.split('(')[0] for line in page.splitlines() if line.startswith('- ')]
    assert heads == [
        f'- `SwiftModel.{name}' for name in ('add_weighted_adapter', 'update_weighted_adapter', 'save_pretrained')
    ]
    assert page.startswith(PAGE[:PAGE.index('- `SwiftModel.save')])


@pytest.mark.parametrize('path, old, new, message', [
    ('swift/tuners/base.py', 'class SwiftModel(', 'class SwiftModule(', 'SwiftModel is expected to be defined once'),
    ('swift/tuners/base.py', 'def set_active_adapters(self, adapter_names:', 'def set_active_adapters(self, names:',
     'is expected to take'),
    ('swift/tuners/lora.py', 'def activate_adapter(', 'def switch_adapter(', 'add_weighted_adapter|activate_adapter'),
    ('swift/tuners/lora_layers.py', 'target.update_layer(', 'target.renew_layer(', 'call target.update_layer once'),
    ('swift/tuners/base.py', 'adapter_names: Union[List[str], str], offload: str = None)',
     'adapter_names: Union[List[str], str], offload: str = None, *, quiet=False, **more)', 'found .*quiet.*more'),
    ('swift/tuners/lora_layers.py', 'target.update_layer(', 'target.update_layer(*_) if True else print(',
     'the name and the rank'),
    ('swift/tuners/peft.py', 'def hot_patch_peft_module', 'def patch_peft_module', 'hot_patch_peft_module'),
    ('swift/tuners/peft.py', '    RankAllocator.mask_to_budget = adalora_mask_to_budget\n',
     '    RankAllocator.mask_to_budget = adalora_mask_to_budget\n    return True\n', 'without returning'),
    ('swift/tuners/utils.py', 'class SwiftAdapter', 'class (', 'cannot be parsed'),
    ('docs/source_en/Instruction/Use-tuners.md', 'add_weighted_adapter', 'merge', 'docs/source_en'),
])
def test_a_checkout_that_looks_otherwise_is_refused_and_left_as_it_was(repo, capsys, path, old, new, message):
    source = (repo / path).read_text(encoding='utf-8')
    assert old in source
    (repo / path).write_text(source.replace(old, new), encoding='utf-8')
    before = contents(repo)
    with pytest.raises(UnexpectedCode, match=message):
        change(repo)
    assert main(['upstream', '--repo', str(repo)]) == 2
    assert contents(repo) == before and 'error' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['', 'nowhere', 'swift/tuners/base.py'])
def test_what_is_no_checkout_is_refused(repo, capsys, name):
    assert main(['upstream', '--repo', str(repo / 'docs' / name)]) == 2
    assert 'expected to be a checkout' in capsys.readouterr().err


def test_an_existing_file_is_not_replaced_unless_asked(repo, tmp_path, capsys):
    diff = tmp_path / 'change.diff'
    diff.write_text('mine')
    assert main(['upstream', '--repo', str(repo), '--diff', str(diff)]) == 2
    assert diff.read_text() == 'mine' and '--overwrite' in capsys.readouterr().err
    assert main(['upstream', '--repo', str(repo), '--diff', str(diff), '--overwrite']) == 0


def test_one_file_is_not_written_twice(repo, tmp_path, capsys):
    both = str(tmp_path / 'both')
    assert main(['upstream', '--repo', str(repo), '--diff', both, '--pull_request', both]) == 2
    assert 'give two files' in capsys.readouterr().err and not (tmp_path / 'both').exists()


def test_the_text_of_the_pull_request_has_the_figures(repo, tmp_path):
    text = tmp_path / 'pull_request.md'
    assert main(['upstream', '--repo', str(repo), '--pull_request', str(text)]) == 0
    written = text.read_text(encoding='utf-8')
    for heading in ('## What', '## Why', '## Figures', '## How it was tested'):
        assert heading in written
    assert '| before: a new adapter each |' in written and '{figures}' not in written


def test_figures_that_are_none_are_refused_before_anything_changes(repo, tmp_path, capsys):
    (tmp_path / 'figures.json').write_text('{}')
    before = contents(repo)
    assert main(['upstream', '--repo', str(repo), '--figures', str(tmp_path / 'figures.json')]) == 2
    assert contents(repo) == before and 'bench --json' in capsys.readouterr().err
