"""A run writes one line per sample, all or none of the checks pass before it, and a killed one is resumed exactly."""
import argparse
import importlib.util
import json
import os
import pytest
import shutil
import subprocess
import sys
import threading
import torch
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List

from swift_patch import cli
from swift_patch.cli.infer import add_parser
from swift_patch.inference import results
from swift_patch.inference import run as run_module
from swift_patch.inference.config import InferConfig
from swift_patch.inference.dataset import DatasetError
from swift_patch.inference.run import run_infer
from swift_patch.lora.numbers import derived_seed
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE

USER = {'role': 'user', 'content': 'hello'}
SAMPLES = [
    {'messages': [USER], 'adapters': ['lora'], 'id': 'first'},
    {'messages': [USER, {'role': 'assistant', 'content': 'gold'}], 'adapters': ['lora', 'A'], 'weights': [0.7, 0.3]},
    {'messages': [{'role': 'system', 'content': 's'}, USER], 'adapters': ['default', 'A']},
    {'messages': [USER], 'adapters': ['default', 'A']},
    {'messages': [USER], 'adapters': ['A', 'lora', 'default'], 'weights': [1, 0.5, -0.2]},
]  # yapf: disable


def make_config(model_dir: str, checkpoints: Dict[str, str], folder: Path) -> InferConfig:
    """A run that samples its tokens, with adapters of both formats."""
    dataset = folder / 'data.jsonl'
    dataset.write_text('\n\n'.join(map(json.dumps, SAMPLES)))
    return InferConfig(
        adapters={
            'lora': checkpoints['swift'],
            'A': checkpoints['peft'],
            'default': checkpoints['swift2']
        },
        val_dataset=[str(dataset)],
        result_path=str(folder / 'results' / 'out.jsonl'),
        swift_args={
            'model': model_dir,
            'model_type': MODEL_TYPE,
            'template': TEMPLATE,
            'torch_dtype': 'float32',
            'device_map': 'cpu',
            'max_new_tokens': 8,
            'temperature': 1.,
            'seed': 1,
        })


@pytest.fixture
def config(model_dir: str, checkpoints: Dict[str, str], tmp_path: Path) -> InferConfig:
    return make_config(model_dir, checkpoints, tmp_path)


@pytest.fixture(scope='module')
def undisturbed(model_dir: str, checkpoints: Dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result folder of a run of `config` that nothing disturbed."""
    config = make_config(model_dir, checkpoints, tmp_path_factory.mktemp('undisturbed'))
    run_infer(config)
    return Path(config.result_path).parent


@pytest.fixture
def finished(config: InferConfig, undisturbed: Path) -> bytes:
    """What the run writes; it has been written where `config` has its results."""
    shutil.copytree(undisturbed, Path(config.result_path).parent)
    return Path(config.result_path).read_bytes()


@pytest.fixture
def loads_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is about to be loaded."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('a model is loaded')

    monkeypatch.setattr(run_module, 'Generator', fail)


def read(config: InferConfig) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in Path(config.result_path).read_text(encoding='utf-8').splitlines()]


def test_a_result_is_what_swift_infer_writes_and_how_it_was_composed(config: InferConfig, finished: bytes) -> None:
    results = read(config)
    assert len(results) == len(SAMPLES)
    assert [result['line'] for result in results] == [1, 3, 5, 7, 9]
    for sample, result in zip(SAMPLES, results):
        answer = {'role': 'assistant', 'content': result['response']}
        prompt = [message for message in sample['messages'] if message['role'] != 'assistant']
        assert result['messages'] == [*prompt, answer]
        assert result['adapters'] == sample['adapters']
        assert result['weights'] == sample.get('weights', [1 / len(sample['adapters'])] * len(sample['adapters']))
        assert (result['logprobs'], result['merge_method']) == (None, 'fusion')
    assert [result['labels'] for result in results] == [None, 'gold', None, None, None]
    assert results[0]['id'] == 'first'
    assert list(results[0])[:3] == ['response', 'labels', 'logprobs'], 'the order of swift infer'


@pytest.mark.parametrize('kinds', [('swift', 'swift2'), ('peft', 'peft2'), ('swift', 'peft')])
def test_one_adapter_answers_as_in_swift_infer(config: InferConfig, checkpoints: Dict[str, str], kinds: Any) -> None:
    from swift_patch.ms_swift import BaseArguments, InferRequest, get_engine, get_template, prepare_model_template
    config.swift_args['temperature'] = 0.
    config.adapters = {f'name.{kind}': checkpoints[kind] for kind in kinds}
    samples = [{'messages': [USER], 'adapters': [name]} for name in config.adapters]
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))
    expected = []
    for path in config.adapters.values():
        args = BaseArguments(adapters=[path], **config.swift_args)
        engine = get_engine(prepare_model_template(args)[0], get_template(args))
        response = engine.infer([InferRequest(messages=[USER])], args.get_request_config())[0]
        expected.append(response.choices[0].message.content)
    assert expected[0] != expected[1], 'or the test would see nothing'
    run_infer(config)
    assert [result['response'] for result in read(config)] == expected


def test_settings_that_are_not_given_come_from_the_training(config: InferConfig) -> None:
    config.swift_args = {'max_new_tokens': 2}
    assert run_infer(config).samples == len(SAMPLES)


@pytest.mark.parametrize('merge_method', ['mixture', 'selection'])
def test_the_other_merge_methods_answer_one_adapter_as_fusion_does(config: InferConfig, merge_method: str) -> None:
    config.merge_method = merge_method
    config.swift_args['temperature'] = 0.
    run_infer(config)
    answer = read(config)[0]['response']
    assert {result['merge_method'] for result in read(config)} == {merge_method}
    config.merge_method, config.overwrite = 'fusion', True
    run_infer(config)
    assert read(config)[0]['response'] == answer


def test_the_summary_tells_samples_and_seconds(config: InferConfig) -> None:
    summary = run_infer(config)
    assert (summary.samples, summary.resumed) == (len(SAMPLES), 0)
    assert summary.seconds_composing > 0 and summary.seconds_generating > 0
    assert summary.seconds >= summary.seconds_composing + summary.seconds_generating
    assert summary.samples_per_second == pytest.approx(len(SAMPLES) / summary.seconds)


# Runs the same config in a process of its own, which kills itself while it writes a line: after `$2` whole lines,
# `$3` bytes into the next one.
KILLED_RUN = """
import json, os, signal, sys
import swift_patch
from swift_patch.inference import results, run

num_lines, num_bytes = map(int, sys.argv[2:])
write_line, written = results.write_line, []

def write_line_or_die(file, line):
    if len(written) == num_lines:
        file.write(json.dumps(line, ensure_ascii=False).encode()[:num_bytes])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write_line(file, line)
    written.append(line)

results.write_line = write_line_or_die
run.run_infer(run.InferConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize(('num_lines', 'num_bytes'), [(2, 0), (3, 20), (0, 20)],
                         ids=['between lines', 'within a line', 'within the first line'])
def test_a_killed_run_resumes_to_the_same_file(config: InferConfig, undisturbed: Path, num_lines: int,
                                               num_bytes: int) -> None:
    path = Path(config.result_path)
    killed = subprocess.run(
        [sys.executable, '-c', KILLED_RUN,
         json.dumps(vars(config)),
         str(num_lines), str(num_bytes)],
        capture_output=True,
        text=True)
    assert killed.returncode == -9, killed.stderr[-3000:]
    left = path.read_bytes()
    assert left.count(b'\n') == num_lines and (not left.endswith(b'\n') if num_bytes else True)

    config.resume = True
    summary = run_infer(config)
    assert (summary.resumed, summary.samples) == (num_lines, len(SAMPLES) - num_lines)
    for file in undisturbed.iterdir():
        assert (path.parent / file.name).read_bytes() == file.read_bytes()
    assert len(list(path.parent.iterdir())) == len(list(undisturbed.iterdir()))


def test_resuming_a_finished_run_changes_nothing(config: InferConfig, finished: bytes, loads_no_model: None) -> None:
    config.resume = True
    summary = run_infer(config)
    assert (summary.resumed, summary.samples, summary.samples_per_second) == (len(SAMPLES), 0, 0)
    assert Path(config.result_path).read_bytes() == finished


def test_a_run_is_the_same_where_the_adapters_name_its_settings(config: InferConfig, finished: bytes,
                                                                loads_no_model: None) -> None:
    for key in ('model', 'model_type', 'template', 'torch_dtype'):
        del config.swift_args[key]
    config.resume = True
    assert run_infer(config).resumed == len(SAMPLES)


def test_resuming_where_nothing_is_there_starts(config: InferConfig) -> None:
    config.resume = True
    assert run_infer(config).samples == len(SAMPLES)


def change_temperature(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    config.swift_args['temperature'] = 0.5


def change_adapter(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    config.adapters = {**config.adapters, 'A': checkpoints['peft2']}


def change_merge_method(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    config.merge_method = 'mixture'


def change_combination_type(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    config.composer_args = {'combination_type': 'linear'}


def change_sample(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    samples = [dict(sample) for sample in SAMPLES]
    samples[1]['weights'] = [0.3, 0.7]
    Path(config.val_dataset[0]).write_text('\n\n'.join(map(json.dumps, samples)))


def drop_samples(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    Path(config.val_dataset[0]).write_text(json.dumps(SAMPLES[0]))


def spoil_line(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    path = Path(config.result_path)
    path.write_bytes(path.read_bytes().replace(b'{', b'[', 1))


def lose_settings(config: InferConfig, checkpoints: Dict[str, str]) -> None:
    Path(f'{config.result_path}.args.json').unlink()


@pytest.mark.parametrize(('change', 'told'), [
    (change_temperature, 'temperature was 1.0 and is now 0.5'),
    (change_adapter, 'adapter A was'),
    (change_merge_method, 'merge_method was "fusion" and is now "mixture"'),
    (change_combination_type, 'combination_type was not given and is now "linear"'),
    (change_sample, 'in its line 2, weights is not that of line 3 of the dataset'),
    (drop_samples, 'it has 5 lines, the dataset 1 samples'),
    (spoil_line, 'line 1 is not a result line'),
    (lose_settings, 'its settings in .* cannot be read'),
])
def test_only_the_same_run_is_resumed(config: InferConfig, checkpoints: Dict[str, str], finished: bytes,
                                      loads_no_model: None, change: Callable, told: str) -> None:
    change(config, checkpoints)
    config.resume = True
    before = Path(config.result_path).read_bytes()
    with pytest.raises(ValueError, match=rf'Cannot resume .*{told}'):
        run_infer(config)
    assert Path(config.result_path).read_bytes() == before


def test_an_existing_result_is_neither_overwritten_nor_appended_to(config: InferConfig, loads_no_model: None) -> None:
    path = Path(config.result_path)
    path.parent.mkdir()
    path.write_text('precious\n')
    with pytest.raises(ValueError, match='exists. Give --resume .* --overwrite .* another --result_path'):
        run_infer(config)
    assert path.read_text() == 'precious\n'


def test_overwrite_starts_again(config: InferConfig, finished: bytes) -> None:
    config.overwrite = True
    Path(config.result_path).write_text('old\n' * 100)
    run_infer(config)
    assert Path(config.result_path).read_bytes() == finished


def test_the_result_cannot_be_the_dataset(config: InferConfig, loads_no_model: None) -> None:
    config.result_path, config.overwrite = config.val_dataset[0], True
    with pytest.raises(ValueError, match='is the dataset itself'):
        run_infer(config)


def test_what_the_template_refuses_is_told_with_its_line_before_a_model_is_loaded(config: InferConfig,
                                                                                  loads_no_model: None) -> None:
    too_long = {'role': 'user', 'content': 'x' * 600}
    samples = [*SAMPLES, {**SAMPLES[0], 'messages': [too_long]}, {**SAMPLES[0], 'tools': 3}]
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))
    with pytest.raises(DatasetError) as e:
        run_infer(config)
    (long_line, long_text), (tools_line, tools_text) = e.value.problems
    assert (long_line, tools_line) == (6, 7)
    assert 'larger than the max_length(512)' in long_text and 'refuses it' in tools_text


def test_a_result_file_that_cannot_be_made_is_told_before_a_model_is_loaded(config: InferConfig, tmp_path: Path,
                                                                            loads_no_model: None) -> None:
    for path in (f'{config.val_dataset[0]}/r.jsonl', f'{config.val_dataset[0]}/deeper/r.jsonl',
                 str(tmp_path / ('x' * 300))):
        config.result_path = path
        with pytest.raises(ValueError, match='Cannot write .*xxx: |Cannot write .*data.jsonl is not a folder'):
            run_infer(config)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission_is_told_before_a_model_is_loaded(config: InferConfig, tmp_path: Path,
                                                                      loads_no_model: None) -> None:
    folder = tmp_path / 'locked'
    folder.mkdir(mode=0o500)
    config.result_path = str(folder / 'r.jsonl')
    with pytest.raises(ValueError, match='Cannot write .* no permission to write to .*locked'):
        run_infer(config)


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='Linux only')
def test_a_full_disk_is_told(config: InferConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(config.result_path).parent.mkdir()
    monkeypatch.setattr(results, 'open', FullDisk, raising=False)
    with pytest.raises(ValueError, match='Cannot write .*out.jsonl: No space left on device'):
        run_infer(config)


class FullDisk:
    """A file that can be made, but not written to."""

    def __init__(self, *args: Any) -> None:
        self.file, full = open(*args), open('/dev/full', 'wb')
        self.write, self.flush, self.close = full.write, full.flush, full.close

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize(('swift_args', 'reason'), [
    pytest.param({'device_map': 'cuda:0'}, 'CUDA|NVIDIA',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')),
    pytest.param({'attn_impl': 'flash_attention_2'}, 'ImportError: FlashAttention2',
                 marks=pytest.mark.skipif(importlib.util.find_spec('flash_attn') is not None, reason='installed')),
])  # yapf: disable
def test_what_keeps_the_model_from_loading_is_told_in_a_line(config: InferConfig, swift_args: Dict[str, Any],
                                                             reason: str) -> None:
    config.swift_args.update(swift_args)
    with pytest.raises(
            ValueError, match=f'^Cannot load the base model {config.swift_args["model"]}: .*({reason})') as e:
        run_infer(config)
    assert len(str(e.value).splitlines()) == 1
    assert not Path(config.result_path).exists()


@pytest.mark.parametrize(('merge_method', 'composer_args', 'told'), [
    ('fusion', {'combination_type': 'ties'}, 'expects a density'),
    ('selection', {'combination_type': 'linear'}, 'expected to have no combination_type'),
    ('fusion', {'combination_type': 'liner'}, 'combination_type is expected to be one of'),
])  # yapf: disable
def test_options_of_the_composition_are_checked_before_a_model_is_loaded(config: InferConfig, loads_no_model: None,
                                                                         merge_method: Any, composer_args: Dict[str,
                                                                                                                Any],
                                                                         told: str) -> None:
    config.merge_method, config.composer_args = merge_method, composer_args
    with pytest.raises(ValueError, match=told):
        run_infer(config)


@pytest.mark.parametrize('wrong', [{
    'val_dataset': ['none.jsonl']
}, {
    'adapters': {
        'lora': 'none'
    }
}, {
    'swift_args': {
        'model': '.'
    }
}])
def test_nothing_is_written_before_all_checks_have_passed(config: InferConfig, loads_no_model: None,
                                                          wrong: Dict[str, Any]) -> None:
    vars(config).update(wrong)
    with pytest.raises(ValueError):
        run_infer(config)
    assert not Path(config.result_path).parent.exists()


def test_random_compositions_resume_to_the_same_file(config: InferConfig) -> None:
    """The composer skips what it composed last, so a resumed run composes where an undisturbed one did not."""
    path = Path(config.result_path)
    config.composer_args = {'combination_type': 'dare_linear', 'density': 0.5}
    run_infer(config)
    expected = path.read_bytes()
    lines = expected.splitlines(keepends=True)
    assert json.loads(lines[2])['adapters'] == json.loads(lines[3])['adapters']
    path.write_bytes(b''.join(lines[:3]))
    config.resume = True
    run_infer(config)
    assert path.read_bytes() == expected


def test_seeds_of_different_parts_differ() -> None:
    seeds = {derived_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 50 * 50


def parse(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(['infer', *args])


def command_line(config: InferConfig) -> List[str]:
    args = ['--adapters', *(f'{name}={path}' for name, path in config.adapters.items())]
    for key, value in config.swift_args.items():
        args += [f'--{key}', str(value)]
    return [*args, '--val_dataset', *config.val_dataset, '--result_path', config.result_path]


def test_the_command_does_what_the_function_does(config: InferConfig, finished: bytes,
                                                 capsys: pytest.CaptureFixture) -> None:
    args = parse(*command_line(config), '--overwrite')
    assert args.run(args) == 0
    assert Path(config.result_path).read_bytes() == finished
    told = capsys.readouterr()
    assert '│ samples            │ 5 ' in told.out and f'Wrote {config.result_path}' in told.out
    assert '[INFO' not in told.err
    assert [line.split(':')[0] for line in told.err.splitlines() if 'WARNING' not in line] == [
        'Reading the samples', 'Looking at the adapters', 'Importing ms-swift', "Reading the model's configuration",
        'Checking the samples', 'Loading the model', 'Answering'
    ]


def test_the_command_tells_a_mistake_without_a_traceback(config: InferConfig, capsys: pytest.CaptureFixture) -> None:
    config.val_dataset = ['none.jsonl']
    args = parse(*command_line(config))
    assert args.run(args) == 2
    assert capsys.readouterr().err.startswith('swift-patch infer: error: Cannot read the dataset none.jsonl')


def test_a_finished_run_has_nothing_left_to_do(config: InferConfig, finished: bytes,
                                               capsys: pytest.CaptureFixture) -> None:
    assert cli.main(['infer', *command_line(config), '--resume']) == 0
    assert 'Nothing left to do: all samples are finished.' in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'can_resume'), [('Generator', False), ('result_line', True)])
def test_an_interrupted_run_tells_how_to_go_on_where_it_can(config: InferConfig, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture, name: str,
                                                            can_resume: bool) -> None:

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, name, interrupt)
    assert cli.main(['infer', *command_line(config)]) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == 'swift-patch infer: interrupted' + (f'; --resume goes on with {config.result_path}'
                                                       if can_resume else '')


def test_the_command_tells_that_the_patch_is_switched_off(config: InferConfig) -> None:
    process = subprocess.run([sys.executable, '-m', 'swift_patch.cli', 'infer', *command_line(config)],
                             env={
                                 **os.environ, 'SWIFT_PATCH_DISABLE': '1'
                             },
                             capture_output=True,
                             text=True)
    assert process.returncode == 2
    assert process.stderr.startswith('swift-patch infer: error: The patch is switched off: unset SWIFT_PATCH_DISABLE')
    assert len(process.stderr.splitlines()) == 1


def test_a_key_that_lines_of_several_datasets_add_is_told_and_of_one_it_is_kept(config: InferConfig,
                                                                                tmp_path: Path) -> None:
    [first] = config.val_dataset
    Path(first).write_text('\n'.join(json.dumps({**sample, 'dataset': 'mine'}) for sample in SAMPLES[:2]))
    run_infer(config)
    assert [line['dataset'] for line in read(config)] == ['mine'] * 2
    config.val_dataset, config.overwrite = [first, first], True
    with pytest.raises(DatasetError, match="line 2: the key 'dataset' is one that result lines"):
        run_infer(config)
    assert len(read(config)) == 2


def test_threads_wait_for_each_other(config: InferConfig, finished: bytes, tmp_path: Path) -> None:
    paths = [tmp_path / 'one.jsonl', tmp_path / 'two.jsonl']
    threads = [threading.Thread(target=run_infer, args=(replace(config, result_path=str(path)), )) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [finished] * 2


def test_what_a_run_registers_is_no_obstacle_to_the_next_one(config: InferConfig, tmp_path: Path) -> None:
    info = tmp_path / 'info.json'
    info.write_text(json.dumps([{'dataset_name': 'mine', 'dataset_path': config.val_dataset[0]}]))
    config.swift_args['custom_dataset_info'] = str(info)
    config.val_dataset, config.overwrite = ['mine'], True
    assert run_infer(config).samples == run_infer(config).samples == len(SAMPLES)


def test_datasets_may_be_paths(config: InferConfig, finished: bytes) -> None:
    config.val_dataset, config.resume = [Path(config.val_dataset[0])], True
    assert run_infer(config).resumed == len(SAMPLES)


def test_a_batch_has_a_sample(config: InferConfig) -> None:
    config.max_batch_size = 0
    with pytest.raises(ValueError, match='--max_batch_size is expected to be 1 or more, found 0'):
        run_infer(config)


@pytest.mark.parametrize('option', ['resume', 'overwrite', 'retry_errors', 'verbose', 'compile_merging'])
def test_switches_may_be_values_as_a_file_has_them(option: str) -> None:
    assert not getattr(parse(*REQUIRED), option)
    for given, expected in (([], True), (['True'], True), (['False'], False)):
        assert getattr(parse(*REQUIRED, f'--{option}', *given), option) is expected


def test_options_may_come_from_a_file_as_in_swift_infer(config: InferConfig, finished: bytes, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / 'options.yaml'
    adapters = ''.join(f'\n- {name}={path}' for name, path in config.adapters.items())
    options = ''.join(f'{key}: {value}\n' for key, value in config.swift_args.items())
    file.write_text(f'adapters:{adapters}\nval_dataset: {config.val_dataset[0]}\n{options}')
    code = cli.main(['infer', str(file), '--result_path', config.result_path, '--overwrite'])
    told = capsys.readouterr().err
    if 'the installed ms-swift reads no options from files' in told:
        assert code == 2
        return
    assert Path(config.result_path).read_bytes() == finished
    for name, content in (('none.yaml', None), ('list.yaml', '- 3'), ('wrong.json', '{')):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert cli.main(['infer', str(tmp_path / name)]) == 2
        assert f'swift-patch infer: error: Cannot read the options in {tmp_path / name}: ' in capsys.readouterr().err


REQUIRED = ['--adapters', 'a=b', '--val_dataset', 'c', '--result_path', 'd']


@pytest.mark.parametrize('wrong', [
    '--num_beams 0', '--num_beams 1.5', '--max_new_tokens 0', '--max_length -1', '--top_k -2', '--svd_rank 0',
    '--top_p 1.1', '--top_p nan', '--temperature -0.1', '--temperature inf', '--density 2', '--density x',
    '--combination_type tied'
])  # yapf: disable
def test_a_value_out_of_range_is_told_with_its_option(wrong: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(['infer', *REQUIRED, *wrong.split()])
    assert e.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    option, value = wrong.split()
    assert f'argument {option}: ' in told and f"'{value}'" in told


def test_values_within_the_range_are_taken() -> None:
    args = parse(*REQUIRED, '--top_p', '1', '--temperature', '0', '--num_beams', '2', '--top_k', '-1')
    assert (args.top_p, args.temperature, args.num_beams, args.top_k) == (1., 0., 2, -1)


@pytest.mark.parametrize('unknown', [['--max_new', '3'], ['--unknown', 'x']])
def test_an_unknown_or_shortened_option_is_told(unknown: List[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(['infer', *REQUIRED, *unknown]) == 2
    assert f'swift-patch infer: error: unrecognized arguments: {" ".join(unknown)}' in capsys.readouterr().err


def test_booleans_are_given_as_in_ms_swift() -> None:
    required = ['--adapters', 'a=b', '--val_dataset', 'c', '--result_path', 'd']
    assert parse(*required).logprobs is None
    assert parse(*required, '--logprobs').logprobs is True
    assert parse(*required, '--logprobs', 'false').logprobs is False


def test_the_command_line_is_there_without_torch_or_swift() -> None:
    code = "import sys, swift_patch.cli.infer; print({'torch', 'swift', 'peft', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == 'set()'
