"""A run looks at the adapters that its samples name and at no others, and answers as with all of them in the model."""
import forkserver
import json
import numpy as np
import os
import pytest
import shutil
import sys
import test_run
from models import swift_arguments
from pathlib import Path
from safetensors.torch import load_file, save_file
from test_run import SAMPLES, command_line, make_config, read
from typing import Any, Dict, List

from swift_patch import FusionEngine
from swift_patch.inference.batches import batches
from swift_patch.inference.checkpoints import find_checkpoints
from swift_patch.inference.config import InferConfig
from swift_patch.inference.engine import load_model
from swift_patch.inference.run import run_infer
from swift_patch.lora.numbers import derived_seed
from swift_patch.ms_swift import InferRequest

DEADLINE = 120
NUM_ADAPTERS = 2000

# Fixtures.
loads_no_model, undisturbed = test_run.loads_no_model, test_run.undisturbed


@pytest.fixture
def config(model_dir: str, checkpoints: Dict[str, str], tmp_path: Path) -> InferConfig:
    return make_config(model_dir, checkpoints, tmp_path)


def settings_of(config: InferConfig) -> Dict[str, Any]:
    return json.loads(Path(f'{config.result_path}.args.json').read_text())


def write_samples(config: InferConfig, samples: List[Dict[str, Any]]) -> None:
    Path(config.val_dataset[0]).write_text('\n'.join(map(json.dumps, samples)))


def test_adapters_that_no_sample_names_may_be_broken_or_missing(config: InferConfig, undisturbed: Path,
                                                                tmp_path: Path) -> None:
    broken = tmp_path / 'broken'
    broken.mkdir()
    (broken / 'adapter_config.json').write_text('{')
    config.adapters = {'first': str(broken), **config.adapters, 'missing': 'none', 'id': 'none/one'}
    run_infer(config)
    for file in undisturbed.iterdir():
        assert (Path(config.result_path).parent / file.name).read_bytes() == file.read_bytes()


def test_all_that_is_wrong_with_all_that_are_named_is_told_before_a_model_is_loaded(config: InferConfig,
                                                                                    loads_no_model: None,
                                                                                    tmp_path: Path) -> None:
    shutil.copytree(config.adapters['A'], tmp_path / 'dora')
    config_file = tmp_path / 'dora' / 'adapter_config.json'
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), 'use_dora': True}))
    shutil.copytree(config.adapters['A'], tmp_path / 'cut')
    os.truncate(tmp_path / 'cut' / 'adapter_model.safetensors', 1000)
    wrong = {
        'dora': (str(tmp_path / 'dora'), 'it was trained with use_dora=True, which cannot be fused.'),
        'cut': (str(tmp_path / 'cut'), 'it was not written to its end'),
        'none': ('none', 'the path does not exist.'),
    }
    config.adapters = {**config.adapters, **{name: path for name, (path, _) in wrong.items()}, 'unused': 'none'}
    write_samples(config, [*SAMPLES, {**SAMPLES[0], 'adapters': ['none', 'cut']}, {**SAMPLES[0], 'adapters': ['dora']}])
    with pytest.raises(ValueError) as e:
        run_infer(config)
    told = str(e.value).splitlines()
    assert len(told) == len(wrong)
    for (name, (path, reason)), text in zip(wrong.items(), told):
        assert text.startswith(f'adapter {name!r} ({path}): ') and reason in text
    assert not Path(config.result_path).exists()


@pytest.mark.parametrize('max_batch_size', [1, 16])
def test_a_value_that_is_not_finite_ends_the_run_at_its_sample(config: InferConfig, tmp_path: Path,
                                                               max_batch_size: int) -> None:
    config.max_batch_size = max_batch_size
    # The others of its batch are answered in smaller ones, for which other random numbers are drawn.
    config.swift_args['temperature'] = 0.
    run_infer(config)
    path = Path(config.result_path)
    expected, settings = path.read_bytes(), settings_of(config)

    mended = config.adapters['A']
    shutil.copytree(mended, tmp_path / 'copy')
    file = tmp_path / 'copy' / 'adapter_model.safetensors'
    tensors = load_file(file)
    key = sorted(tensors)[3]
    tensors[key][1, 2] = np.nan
    save_file(tensors, file)
    config.adapters, config.overwrite = {**config.adapters, 'A': str(tmp_path / 'copy')}, True
    with pytest.raises(ValueError) as e:
        run_infer(config)
    told = f"{config.val_dataset[0]}, line 3: adapter 'A' ({tmp_path / 'copy'}): tensor {key!r} of {file} is "
    assert str(e.value).startswith(told)
    assert '1 of ' in str(e.value)
    # The sample before it is answered, those after it are not.
    assert path.read_bytes() == expected.splitlines(keepends=True)[0]

    # No finished line is of the adapter, so that another one may take its place.
    config.adapters, config.overwrite, config.resume = {**config.adapters, 'A': mended}, False, True
    assert run_infer(config).resumed == 1
    assert path.read_bytes() == expected and settings_of(config) == settings


def test_samples_that_are_added_may_name_other_adapters(config: InferConfig, undisturbed: Path,
                                                        checkpoints: Dict[str, str]) -> None:
    shutil.copytree(undisturbed, Path(config.result_path).parent)
    config.resume = True
    config.adapters = {**config.adapters, 'new': checkpoints['peft2']}
    samples = Path(config.val_dataset[0]).read_text()
    Path(config.val_dataset[0]).write_text(f'{samples}\n{json.dumps({**SAMPLES[0], "adapters": ["new"]})}')
    assert 'adapter new' not in settings_of(config)
    summary = run_infer(config)
    assert (summary.resumed, summary.samples) == (len(SAMPLES), 1)
    # Of it is known from now on what it was.
    config.adapters = {**config.adapters, 'new': checkpoints['peft']}
    with pytest.raises(ValueError, match='Cannot resume .*: adapter new was "[0-9a-f]*" and is now '):
        run_infer(config)


@pytest.mark.parametrize('merge_method', ['fusion', 'mixture'])
@pytest.mark.parametrize('kinds', [('swift', 'swift2'), ('peft', 'peft2'), ('swift', 'peft')], ids='-'.join)
def test_a_run_answers_as_with_the_adapters_in_the_model(config: InferConfig, checkpoints: Dict[str, str], kinds: Any,
                                                         merge_method: Any) -> None:
    config.merge_method, config.max_batch_size = merge_method, 2
    config.adapters = {name: checkpoints[kinds[i % 2]] for i, name in enumerate(config.adapters)}
    config.swift_args.update(logprobs=True, top_logprobs=2)
    run_infer(config)

    args = swift_arguments(**{
        'model_dir' if key == 'model' else key: value
        for key, value in config.swift_args.items()
    })
    model, template, aliases = load_model(args, find_checkpoints(config.adapters))
    engine = FusionEngine(model, template, merge_method=merge_method)
    requests = [
        InferRequest(messages=[message for message in sample['messages'] if message['role'] != 'assistant'])
        for sample in SAMPLES
    ]
    compositions = [([aliases[name] for name in sample['adapters']], sample.get('weights')) for sample in SAMPLES]
    lengths = [len(template.encode(request)['input_ids']) for request in requests]
    found: Dict[int, Any] = {}
    for batch in batches(dict(enumerate(lengths)), 2):
        found.update(
            zip(
                batch,
                engine.infer([requests[number] for number in batch],
                             args.get_request_config(),
                             compositions=[compositions[number] for number in batch],
                             seeds=[derived_seed(args.seed, number) for number in batch])))
    lines = read(config)
    assert len({line['response'] for line in lines}) > 2, 'or the test would see nothing'
    for number, line in enumerate(lines):
        choice = found[number].choices[0]
        assert line['response'] == choice.message.content
        old, new = ([token['logprob'] for token in logprobs['content']]
                    for logprobs in (choice.logprobs, line['logprobs']))
        assert new == pytest.approx(old, abs=1e-4)


def opens(log: Any, argv: List[str], folder: str) -> None:
    """Runs the command and sends what it opened in a folder, and how often it listed that."""
    opened, listed = set(), []

    def hook(event: str, args: Any) -> None:
        if event in ('open', 'os.scandir', 'os.listdir') and args and isinstance(args[0], (str, os.PathLike)):
            path = os.path.abspath(args[0])
            if event == 'open' and path.startswith(folder + os.sep):
                opened.add(os.path.relpath(path, folder))
            elif event != 'open' and path.startswith(folder):
                listed.append(os.path.relpath(path, folder))

    sys.addaudithook(hook)
    from swift_patch import cli
    code = cli.main(argv)
    log.send((code, sorted(opened), listed))


def test_of_two_thousand_adapters_no_file_is_opened_but_of_the_five_that_are_named(config: InferConfig,
                                                                                   checkpoints: Dict[str, str],
                                                                                   tmp_path: Path) -> None:
    folder = tmp_path / 'many'
    kinds = list(checkpoints.values())
    named = {f'lora{number}' for number in (3, 500, 501, 1200, 1999)}
    for number in range(NUM_ADAPTERS):
        name = f'lora{number}'
        if name in named:
            shutil.copytree(kinds[number % len(kinds)], folder / name)
        else:
            (folder / name).mkdir(parents=True)
            (folder / name / 'adapter_config.json').write_text('{')
    write_samples(config, [{
        **SAMPLES[0], 'adapters': [name, 'lora3'][:1 + (name != 'lora3')]
    } for name in sorted(named)])
    config.adapters = {}
    argv = ['infer', *command_line(config)]
    argv.insert(2, str(folder))
    receiver, sender = forkserver.pipe()
    process = forkserver.start(opens, tmp_path / 'log.txt', sender, argv, str(folder))
    sender.close()
    assert receiver.poll(DEADLINE), (tmp_path / 'log.txt').read_text()[-3000:]
    code, opened, listed = receiver.recv()
    process.join()
    assert code == 0, (tmp_path / 'log.txt').read_text()[-3000:]
    assert {path.split(os.sep)[0] for path in opened} == named
    # The folder itself, and the named ones, where an adapter in ms-swift's format is looked for.
    assert {path.split(os.sep)[0] for path in listed} <= {'.', *named} and listed.count('.') <= 2
    assert len(read(config)) == 5
