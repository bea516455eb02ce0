"""A tiny model and adapters trained on it by `swift sft` itself, once per session."""
import json
import pytest
import shutil
import subprocess
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from typing import Dict

from swift_patch.cli.doctor import PLUGIN
from swift_patch.ms_swift import TUNER_OPTION
from swift_patch.synthetic.tiny_model import MODEL_TYPE, TEMPLATE, build_tiny_qwen2


@pytest.fixture(scope='session')
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen2 with two layers."""
    return build_tiny_qwen2(tmp_path_factory.mktemp('model'), hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1)


@pytest.fixture(scope='session')
def trained(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """The output folders of two trainings, `swift` and `peft`, told apart by `--use_swift_lora` only."""
    root = tmp_path_factory.mktemp('trained')
    trainings = {}
    for name, answer in {'swift': 'red', 'peft': 'blue'}.items():
        dataset = root / f'{name}.jsonl'
        messages = [{'role': 'user', 'content': 'hello'}, {'role': 'assistant', 'content': answer * 3}]
        dataset.write_text((json.dumps({'messages': messages}) + '\n') * 8)
        args = {
            'model': model_dir,
            'model_type': MODEL_TYPE,
            'template': TEMPLATE,
            'dataset': dataset,
            'output_dir': root / name,
            'use_swift_lora': str(name == 'swift').lower(),
            'add_version': 'false',
            'max_steps': 6,
            'save_steps': 6,
            'learning_rate': 0.1,
            'lora_rank': 4,
            'torch_dtype': 'float32',
            'use_cpu': 'true',
            'report_to': 'none',
        }
        command = [sys.executable, '-m', 'swift.cli.sft', f'--{TUNER_OPTION}', 'lora', '--target_modules', 'all-linear']
        # Without the patch, ms-swift cannot make a SwiftModel with some releases of PEFT.
        command += ['--external_plugins', str(PLUGIN)]
        for key, value in args.items():
            command += [f'--{key}', str(value)]
        with open(root / f'{name}.log', 'w') as log:
            trainings[name] = subprocess.Popen(command, stdout=log, stderr=log)
    for name, training in trainings.items():
        assert training.wait() == 0, (root / f'{name}.log').read_text()[-3000:]
    return {name: root / name for name in trainings}


@pytest.fixture(scope='session')
def checkpoints(trained: Dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, str]:
    """Four checkpoints: `swift` and `peft` as they were trained, `swift2` and `peft2` with other values."""
    root = tmp_path_factory.mktemp('checkpoints')
    paths = {name: str(output_dir / 'checkpoint-6') for name, output_dir in trained.items()}
    for name in ('swift', 'peft'):
        copy = root / f'{name}2'
        shutil.copytree(paths[name], copy)
        [file] = copy.rglob('adapter_model.safetensors')
        generator = torch.Generator().manual_seed(len(name))
        save_file(
            {
                key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
                for key, tensor in load_file(file).items()
            }, file, {'format': 'pt'})
        paths[f'{name}2'] = str(copy)
    return paths
