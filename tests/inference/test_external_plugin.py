import json
import subprocess
import sys

from swift_patch.cli.doctor import PLUGIN


def test_ms_swifts_own_infer_command_runs_with_the_patch_in_force(model_dir, tmp_path):
    dataset, result, probe = tmp_path / 'samples.jsonl', tmp_path / 'results.jsonl', tmp_path / 'probe.py'
    dataset.write_text(json.dumps({'messages': [{'role': 'user', 'content': 'hello'}]}) + '\n')
    probe.write_text('import atexit\nfrom swift_patch import patching\n'
                     'def tell():\n'
                     '    done = {*patching.in_force(), *patching.needless()}\n'
                     '    print("in force:", done == {*patching.PATCHES})\n'
                     'atexit.register(tell)\n')
    command = [sys.executable, '-m', 'swift.cli.infer', '--external_plugins', str(PLUGIN), str(probe)]
    for key, value in {
            'model': model_dir,
            'model_type': 'qwen2',
            'template': 'chatml',
            'torch_dtype': 'float32',
            'val_dataset': dataset,
            'result_path': result,
            'max_new_tokens': 4
    }.items():
        command += [f'--{key}', str(value)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert 'in force: True' in process.stdout
    assert 'response' in json.loads(result.read_text())
