"""Checkpoints of both formats are told apart, checked as files and loaded under any NAME, every tensor of them."""
import json
import os
import pytest
import re
import shutil
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from types import MappingProxyType
from typing import Any, Callable, Dict, List, Mapping

from swift_patch.inference.checkpoints import check_base_model, find_checkpoints
from swift_patch.inference.loading import load_adapters, lora_parameter_name
from swift_patch.synthetic.tiny_model import build_tiny_qwen2

# Parts of parameter names, attributes of torch's containers and of modules, and what torch allows in no name.
NAMES = ('lora', 'A', 'default', 'lora_A', 'weight', 'keys', 'half', 'model', 'a.b', 'q_proj')


def load_base(model_dir: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def activate(model: torch.nn.Module, alias: str) -> None:
    from swift.tuners import SwiftModel
    if isinstance(model, SwiftModel):
        model.set_active_adapters(alias)
    else:
        model.set_adapter(alias)


@pytest.fixture(scope='module')
def expected(model_dir: str, checkpoints: Dict[str, str]) -> Dict[str, torch.Tensor]:
    """The logits with each checkpoint alone, loaded by ms-swift onto a model of its own."""
    from swift.tuners import Swift
    return {name: logits_of(Swift.from_pretrained(load_base(model_dir), path)) for name, path in checkpoints.items()}


@pytest.fixture
def edited(checkpoints: Dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """Copy a checkpoint and change its config or its tensors."""

    def edit(name: str, config: Mapping[str, Any] = MappingProxyType({}), tensors: Callable = lambda _: None) -> str:
        copy = tmp_path / f'edited{len(list(tmp_path.iterdir()))}'
        shutil.copytree(checkpoints[name], copy)
        [config_file] = copy.rglob('adapter_config.json')
        config_file.write_text(json.dumps({**json.loads(config_file.read_text()), **config}))
        [tensor_file] = copy.rglob('adapter_model.safetensors')
        content = load_file(tensor_file)
        tensors(content)
        save_file(content, tensor_file)
        return str(copy)

    return edit


@pytest.mark.parametrize('key', [
    'm.q_proj.lora_A.weight', 'm.q_proj.lora_A.default.weight', 'base_model.model.m.q_proj.lora_A.weight',
    'm.q_proj.lora_A.lora_A.weight', 'm.q_proj.lora_A.weight.weight'
])
def test_the_parameter_of_a_linear_layer_is_named_by_segments(key: str) -> None:
    assert lora_parameter_name(key, 'x') == 'm.q_proj.lora_A.x.weight'


@pytest.mark.parametrize('key', ['m.e.lora_embedding_B', 'm.e.lora_embedding_B.default', 'm.e.lora_embedding_B.weight'])
def test_the_parameter_of_an_embedding_is_named_by_segments(key: str) -> None:
    assert lora_parameter_name(key, 'x') == 'm.e.lora_embedding_B.x'


@pytest.mark.parametrize('key', ['m.q_proj.weight', 'm.lora_magnitude_vector.weight', 'm.lora_A.a.bias', 'm.lora_A'])
def test_other_tensors_have_no_lora_parameter(key: str) -> None:
    with pytest.raises(ValueError, match='not the key of a LoRA tensor'):
        lora_parameter_name(key, 'x')


def test_both_formats_of_swift_sft_are_recognized(checkpoints: Dict[str, str]) -> None:
    swift, peft = find_checkpoints({'a': checkpoints['swift'], 'b': checkpoints['peft']})
    assert (swift.is_swift, swift.folder) == (True, Path(checkpoints['swift'], 'default'))
    assert (peft.is_swift, peft.folder) == (False, Path(checkpoints['peft']))


def test_the_folder_of_one_adapter_below_a_swift_checkpoint_is_accepted(checkpoints: Dict[str, str]) -> None:
    [checkpoint] = find_checkpoints({'a': f'{checkpoints["swift"]}/default'})
    assert checkpoint.is_swift


@pytest.mark.parametrize('name', ['swift', 'peft'])
def test_for_an_output_folder_the_checkpoint_in_it_is_named(trained: Dict[str, Path], name: str) -> None:
    with pytest.raises(ValueError, match=r"adapter 'a' .*not a checkpoint but holds some; give one of .*/checkpoint-6"):
        find_checkpoints({'a': trained[name]})


def test_everything_that_is_no_lora_checkpoint_is_told_at_once(model_dir: str, checkpoints: Dict[str, str],
                                                               edited: Callable[..., str], tmp_path: Path) -> None:
    empty = tmp_path / 'empty'
    empty.mkdir()
    broken = Path(edited('peft'))
    (broken / 'adapter_config.json').write_text('{')
    cut = Path(edited('peft'))
    (cut / 'adapter_model.safetensors').write_bytes(b'cut')
    truncated = Path(edited('peft'))
    tensors = (truncated / 'adapter_model.safetensors').read_bytes()
    (truncated / 'adapter_model.safetensors').write_bytes(tensors[:-100])
    without = Path(edited('swift'))
    (without / 'default' / 'adapter_model.safetensors').unlink()
    several = Path(edited('swift'))
    shutil.copytree(several / 'default', several / 'other')
    folder = checkpoints['peft']
    wrong = {
        'missing': (tmp_path / 'none', 'the path does not exist'),
        'file': (Path(folder, 'adapter_model.safetensors'), f'this is a file; give the folder {folder!r}.'),
        'model': (model_dir, 'this is a full model, not an adapter'),
        'empty': (empty, 'there is no adapter_config.json'),
        'broken': (broken, 'cannot read'),
        'cut': (cut, 'cannot read'),
        'truncated': (truncated, "adapter 'truncated'"),
        'without': (without, 'there is no adapter_model.safetensors'),
        'several': (several, 'it holds several adapters; give one of'),
        'bare': (edited('peft', {'peft_type': None}), 'is expected to have a peft_type, found none'),
        'ranks': (edited('peft', tensors=lambda t: t.update({key: t[key][:2].clone() for key in t if 'lora_A' in key})),
                  'is expected to have A and B of one rank, found shapes (2, '),
        'flat': (edited('swift', tensors=lambda t: t.update({key: t[key].flatten() for key in t if 'lora_A' in key})),
                 'is expected to have A and B of one rank, found shapes ('),
        'none': (edited('peft', tensors=lambda t: t.clear()), 'adapter_model.safetensors has no tensors'),
        'escape': (edited('peft', tensors=lambda t: t.update({'\x1b[31mx': torch.zeros(1)})),
                   '\\x1b[31mx is not a tensor of a LoRA and cannot be fused: save'),
        'loha': (edited('peft', {'peft_type': 'LOHA'}), 'an adapter of type LOHA, not LORA'),
        'dora': (edited('swift', {'use_dora': True}), 'trained with use_dora=True, which cannot be fused'),
        'head': (edited('peft', {'modules_to_save': ['lm_head']}), "modules_to_save=['lm_head']"),
        'pissa': (edited('peft', {'init_lora_weights': 'pissa_niter_4'}), 'which changes the base model'),
        'stray': (edited('peft', tensors=lambda t: t.update({'norm.weight': torch.zeros(1)})),
                  'norm.weight is not a tensor of a LoRA'),
        'half': (edited('swift', tensors=lambda t: t.pop(next(key for key in t if 'lora_B' in key))), 'but not lora_B'),
    }  # yapf: disable
    with pytest.raises(ValueError) as e:
        find_checkpoints({'good': checkpoints['peft'], **{name: str(path) for name, (path, _) in wrong.items()}})
    told = str(e.value).splitlines()
    assert len(told) == len(wrong) and all(text.isprintable() for text in told)
    for (name, (path, reason)), text in zip(wrong.items(), told):
        assert str(path) in text and reason in text, name


def test_an_adapter_of_another_base_model_is_told_from_the_files(model_dir: str, checkpoints: Dict[str, str],
                                                                 tmp_path: Path) -> None:
    found = find_checkpoints(checkpoints)
    check_base_model(found, model_dir)
    other = build_tiny_qwen2(tmp_path / 'other', hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    with pytest.raises(ValueError) as e:
        check_base_model(found, other)
    told = str(e.value).splitlines()
    assert len(told) == len(found)
    for checkpoint, text in zip(found, told):
        assert text.startswith(
            f'{checkpoint} does not belong to the base model {other}: ') and 'in the adapter and' in text


@pytest.mark.parametrize(('kinds', 'wrapper'), [
    (['swift', 'swift2'], 'SwiftModel'),
    (['peft', 'peft2'], 'PeftModel'),
    (['swift', 'peft', 'swift2', 'peft2'], 'PeftModel'),
], ids=['swift', 'peft', 'mixed'])  # yapf: disable
def test_under_any_name_an_adapter_computes_what_it_computes_alone(model_dir: str, checkpoints: Dict[str, str],
                                                                   expected: Dict[str, torch.Tensor], kinds: List[str],
                                                                   wrapper: str) -> None:
    kind_of = {name: kinds[i % len(kinds)] for i, name in enumerate(NAMES)}
    found = find_checkpoints({name: checkpoints[kind] for name, kind in kind_of.items()})
    model, aliases = load_adapters(load_base(model_dir), found)
    assert type(model).__name__.startswith(wrapper)
    assert list(aliases) == list(NAMES)
    for name, kind in kind_of.items():
        activate(model, aliases[name])
        torch.testing.assert_close(logits_of(model), expected[kind], msg=name)


def test_the_checkpoints_differ_so_that_a_mix_up_would_be_seen(expected: Dict[str, torch.Tensor]) -> None:
    for name in expected:
        for other in expected:
            assert name == other or not torch.allclose(expected[name], expected[other], atol=1e-2), (name, other)


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_fusing_works_after_loading(model_dir: str, checkpoints: Dict[str, str], kind: str) -> None:
    """PEFT's `add_weighted_adapter` raises TypeError where target modules are a list, as they are in JSON."""
    found = find_checkpoints({'a': checkpoints[kind], 'b': checkpoints[f'{kind}2']})
    model, aliases = load_adapters(load_base(model_dir), found)
    model.add_weighted_adapter(list(aliases.values()), [0.5, 0.5], 'fused', combination_type='linear')


@pytest.mark.parametrize('kind', ['swift', 'peft'])
@pytest.mark.parametrize(('num_layers', 'told'), [(1, 'have no place in this base model'),
                                                  (3, 'the file has no tensors for')])
def test_a_tensor_without_a_place_and_a_place_without_a_tensor_are_told(checkpoints: Dict[str, str], tmp_path: Path,
                                                                        kind: str, num_layers: int, told: str) -> None:
    other = build_tiny_qwen2(tmp_path, hidden_size=32, num_layers=num_layers, num_heads=2, num_kv_heads=1)
    found = find_checkpoints({'x': checkpoints[kind]})
    with pytest.raises(ValueError, match=rf"adapter 'x' \({checkpoints[kind]}\).*{told}"):
        load_adapters(load_base(other), found)


@pytest.mark.parametrize('kind', ['swift', 'peft'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_value_that_is_not_finite_is_told_as_such(model_dir: str, edited: Callable[..., str], kind: str,
                                                    value: float) -> None:
    path = edited(kind, tensors=lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(value))
    with pytest.raises(ValueError) as e:
        load_adapters(load_base(model_dir), find_checkpoints({'x': path}))
    assert re.match(
        rf"adapter 'x' \({path}\): tensor '.*' of {path}.*\.safetensors is expected to hold finite values, "
        'found infinite ones or NaN: train it again', str(e.value))


def test_what_is_no_tensor_of_a_lora_in_a_pickle_is_told_with_adapter_and_file(model_dir: str,
                                                                               edited: Callable[..., str]) -> None:
    path = Path(edited('peft'))
    tensors = load_file(path / 'adapter_model.safetensors')
    (path / 'adapter_model.safetensors').unlink()
    torch.save({**tensors, '\x1b[31mx.weight': torch.zeros(1)}, path / 'adapter_model.bin')
    with pytest.raises(ValueError) as e:
        load_adapters(load_base(model_dir), find_checkpoints({'x': path}))
    assert str(
        e.value) == (f"adapter 'x' ({path}): \\x1b[31mx.weight is not a tensor of a LoRA and cannot be fused: save "
                     f'{path}/adapter_model.bin without it.')


@pytest.mark.parametrize('kind', ['swift', 'peft'])
def test_an_adapter_that_does_not_fit_is_named(checkpoints: Dict[str, str], tmp_path: Path, kind: str) -> None:
    other = build_tiny_qwen2(tmp_path, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    with pytest.raises(ValueError, match=r"adapter 'x' .* cannot be loaded onto this base model: .*size mismatch"):
        load_adapters(load_base(other), find_checkpoints({'x': checkpoints[kind]}))


def test_the_digest_follows_the_content_and_not_the_place(checkpoints: Dict[str, str], edited: Callable[..., str],
                                                          tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoints['swift'], tmp_path / 'moved')
    # What a copy may have otherwise.
    (moved / 'default' / 'README.md').write_text('new')
    os.utime(moved / 'default' / 'adapter_model.safetensors', (0, 0))
    paths = {
        'original': checkpoints['swift'],
        'moved': str(moved),
        'config': edited('swift', {'lora_alpha': 1}),
        'values': checkpoints['swift2'],
    }
    original, moved, config, values = [checkpoint.digest() for checkpoint in find_checkpoints(paths)]
    assert original == moved
    assert len({original, config, values}) == 3


def test_the_digest_of_a_small_file_is_over_all_of_it(checkpoints: Dict[str, str], edited: Callable[..., str]) -> None:
    [checkpoint] = find_checkpoints({'a': edited('peft')})
    whole, digests = checkpoint.weights_file.read_bytes(), {checkpoint.digest()}
    assert len(whole) < 2**16
    places = range(len(whole) - 1, 0, -len(whole) // 50)
    for place in places:
        checkpoint.weights_file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        digests.add(checkpoint.digest())
    assert len(digests) == 1 + len(places)


@pytest.mark.skipif(not Path('/proc/self/io').exists(), reason='Linux only')
def test_the_digest_takes_no_longer_for_a_file_that_is_large(checkpoints: Dict[str, str],
                                                             edited: Callable[..., str]) -> None:
    [checkpoint] = find_checkpoints({'a': edited('peft')})
    digests = set()
    # Without room on the disk.
    os.truncate(checkpoint.weights_file, 2**36)
    for place in (0, 2**35, 2**36 - 1):
        with open(checkpoint.weights_file, 'r+b') as file:
            file.seek(place)
            file.write(b'x')
        before = bytes_read()
        digests.add(checkpoint.digest())
        assert bytes_read() - before < 2**17
    assert len(digests) == 3, 'its begin, its middle and its end are seen'


def bytes_read() -> int:
    """What this process has read of files, in the page cache or not."""
    return int(Path('/proc/self/io').read_text().split()[1])
