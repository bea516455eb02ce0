"""What an adapter of a library may not be is told where it is used first, and the model stays as it was."""
import gc
import os
import pickle
import pytest
import re
import shutil
import torch
from checkpoint_files import CONFIG, WEIGHTS, edited, encoded, file_in, with_header
from models import PROJECTIONS, assert_same_state, deltas, qwen2, randomised, state
from pathlib import Path
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from typing import Any, Callable, Dict
from unittest import mock

from swift_patch import AdapterLibrary, FusionComposer
from swift_patch.lora.checkpoint import join_key, split_key


def base_model() -> torch.nn.Module:
    return qwen2()


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """A checkpoint `good` in each format, as PEFT and ms-swift write them, of the model of these tests."""
    from models import loras, peft_model, swift_model
    root, found = tmp_path_factory.mktemp('made'), {}
    for kind, build, cls in (('peft', peft_model, LoraConfig), ('swift', swift_model, None)):
        model = build(loras(1, **({} if cls is None else {'cls': cls})))
        model.save_pretrained(str(root / kind))
        # PEFT has a folder for each adapter; that of ms-swift's is a folder in the checkpoint.
        found[kind] = root / kind / 'l0' if kind == 'peft' else root / kind
    return found


@pytest.fixture(params=['peft', 'swift'])
def good(request: Any, made: Dict[str, Path]) -> Path:
    return made[request.param]


def assert_refused(good: Path, bad: Path, *told: str, is_header: bool = True, **options: Any) -> str:
    """Asserts that an adapter is refused with each way to use it, before and after something was composed."""
    model = base_model()
    composer = FusionComposer(model, library=AdapterLibrary({'good': good, 'bad': bad}, **options))
    uses: Dict[str, Callable[[], Any]] = {
        'alone': lambda: composer.compose(['bad']),
        'after another': lambda: composer.compose({
            'good': 0.5,
            'bad': 0.5
        }),
        'in a batch': lambda: composer.compose_batch([['good'], ['bad']]),
    }
    if is_header:
        uses['checked'] = lambda: composer.check(['good', 'bad'])
    for is_wrapped in (False, True):
        if is_wrapped:
            composer.compose(['good'])
        before, types = state(model), {name: type(module) for name, module in model.named_modules()}
        assert is_wrapped == any(isinstance(module, LoraLayer) for module in model.modules())
        for use in uses.values():
            with pytest.raises(ValueError) as e:
                use()
            assert_same_state(state(model), before)
            assert {name: type(module) for name, module in model.named_modules()} == types
            text = str(e.value)
            for part in ("adapter 'bad'", str(bad), *told):
                assert part in text, text
    # What is right goes on.
    composer.compose(['good'])
    return text


@pytest.mark.parametrize(('config', 'told'), [
    ({'peft_type': 'LOHA', 'swift_type': 'LOHA'}, 'this is an adapter of type LOHA, not LORA'),
    ({'peft_type': '\x1b[31mLORA', 'swift_type': '\x1b[31mLORA'}, 'of type \\x1b[31mLORA, not LORA'),
    ({'peft_type': None, 'swift_type': None}, '_type, found none: this is no config of an adapter'),
    ({'modules_to_save': ['lm_head']}, "modules_to_save=['lm_head'], which cannot be fused"),
    ({'bias': 'all'}, "bias='all', which cannot be fused"),
    ({'lora_bias': True}, 'lora_bias=True, which cannot be fused'),
    ({'use_dora': True}, 'use_dora=True, which cannot be fused'),
    ({'use_qalora': True}, 'use_qalora=True, which cannot be fused'),
    ({'use_bdlora': True}, 'use_bdlora=True, which cannot be fused'),
    ({'trainable_token_indices': [1, 2]}, 'trainable_token_indices=[1, 2], which cannot be fused'),
    ({'layer_replication': [[0, 2], [1, 2]]}, 'layer_replication=[[0, 2], [1, 2]], which cannot be fused'),
    ({'target_parameters': ['a.weight']}, "target_parameters=['a.weight'], which cannot be fused"),
    ({'alora_invocation_tokens': [5]}, 'alora_invocation_tokens=[5], which cannot be fused'),
    ({'init_lora_weights': 'pissa'}, 'which changes the base model; give the converted checkpoint'),
    ({'target_modules': ['nothing']}, 'does not fit this base model'),
    ({'target_modules': 7}, 'target_modules in {config} is expected to be a list of names or a regular'),
    ({'target_modules': [7]}, 'a list of names or a regular expression, found [7]'),
    ({'target_modules': '('}, "a list of names or a regular expression, found '('"),
    ({'exclude_modules': {}}, 'exclude_modules in {config} is expected to be a list of names or a regular'),
    ({'r': 'four'}, "r in {config} is expected to be a positive integer, found 'four': put it right, or save"),
    ({'r': -1}, 'r in {config} is expected to be a positive integer, found -1'),
    ({'r': True}, 'r in {config} is expected to be a positive integer, found True'),
    ({'r': 8}, '{weights} cannot be used: |is of rank 4, but of rank 8 by adapter_config.json'),
    ({'lora_alpha': 'x'}, "lora_alpha in {config} is expected to be a finite number, found 'x'"),
    ({'lora_alpha': float('nan')}, 'lora_alpha in {config} is expected to be a finite number, found nan'),
    ({'rank_pattern': {'q_proj': 2}}, '{weights} cannot be used: |is of rank 4, but of rank 2 by adapter_config.json'),
    ({'rank_pattern': {'(': 2}}, 'regular expressions and positive integers, found {'),
    ({'rank_pattern': {'q_proj': 2.5}}, 'regular expressions and positive integers, found {'),
    ({'alpha_pattern': {'q_proj': None}}, 'regular expressions and finite numbers, found {'),
    ({'alpha_pattern': 7}, 'regular expressions and finite numbers, found 7'),
    ({'init_lora_weights': ['pissa']}, 'init_lora_weights in {config} is expected to be a name, true or false, found'),
    ({'target_modules': PROJECTIONS[:-1]}, 'tensors of the file have no place in this base model'),
    ({'target_modules': PROJECTIONS + ['lm_head']}, 'the file has no tensors for 2 of the parameters'),
])  # yapf: disable
def test_a_config_that_cannot_be_fused_or_does_not_fit_is_told(good: Path, tmp_path: Path, config: Dict[str, Any],
                                                               told: str) -> None:
    bad = edited(good, tmp_path / 'bad', config)
    parts = [part.replace('{config}', str(file_in(bad, CONFIG))).replace('{weights}', str(file_in(bad, WEIGHTS)))
             for part in told.split('|')]  # yapf: disable
    assert_refused(good, bad, *parts)


@pytest.mark.parametrize(('content', 'told'), [(b'', 'cannot read'), (b'{', 'cannot read'),
                                               (b'[]', 'must hold an object'), (b'\xff\xfe\x00', 'cannot read')])
def test_a_config_that_is_none_is_told(good: Path, tmp_path: Path, content: bytes, told: str) -> None:
    bad = edited(good, tmp_path / 'bad')
    file_in(bad, CONFIG).write_bytes(content)
    assert_refused(good, bad, told, CONFIG)


def key_of(tensors: Dict[str, torch.Tensor], part: str) -> str:
    return next(key for key in tensors if part in key)


def changing(part: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Dict[str, torch.Tensor]], None]:

    def changed(tensors: Dict[str, torch.Tensor]) -> None:
        key = key_of(tensors, part)
        tensors[key] = change(tensors[key])

    return changed


A = 'layers.1.mlp.down_proj.lora_A'


@pytest.mark.parametrize(('change', 'told'), [
    (changing(A, lambda tensor: tensor[:, :-1]), f'{A}|is of shape (4, 63) in the file, but (4, 64) in this base'),
    (changing(A, lambda tensor: tensor[None]), f'{A}|is of shape (1, 4, 64) in the file, but (4, 64)'),
    (changing(A, lambda tensor: tensor.flatten()), f'{A}|is of shape (256,) in the file, but (4, 64)'),
    (changing(A, lambda tensor: tensor[0, 0].clone()), f'{A}|is of shape () in the file, but (4, 64)'),
    (changing(A, lambda tensor: tensor.to(torch.int8)), f'{A}|is of dtype I8, expected one of F64, F32, F16, BF16'),
    (changing(A, lambda tensor: tensor.to(torch.int64)), f'{A}|is of dtype I64, expected one of F64, F32, F16, BF16'),
    (changing(A, lambda tensor: tensor[:0]), f'{A}|is empty, of shape (0, 64): it was saved without being gathered'),
    (changing(A, lambda tensor: torch.empty(0)), f'{A}|is empty, of shape (0,)|ZeRO-3|stage3_gather_16bit_weights'),
    (lambda tensors: tensors.pop(key_of(tensors, A)), f'the file has no tensors for 1 of|{A}'),
    (lambda tensors: tensors.clear(), 'the file has no tensors for 28 of the parameters'),
    (lambda tensors: tensors.update({'model.layers.2.mlp.down_proj.lora_A.weight': torch.zeros(4, 64)}),
     '1 tensors of the file have no place in this base model|layers.2.mlp.down_proj.lora_A.weight'),
    (lambda tensors: tensors.update({'something.weight': torch.zeros(4)}),
     'something.weight is not a tensor of a LoRA and cannot be fused'),
    (lambda tensors: tensors.update({'model.layers.0.mlp.down_proj.lora_magnitude_vector.weight': torch.zeros(4)}),
     'lora_magnitude_vector.weight is not a tensor of a LoRA'),
    (lambda tensors: tensors.update({'x': torch.zeros(0)}), 'x is not a tensor of a LoRA and cannot be fused'),
])  # yapf: disable
def test_tensors_that_are_not_those_of_the_config_are_told(good: Path, tmp_path: Path, change: Callable[..., Any],
                                                           told: str) -> None:

    def changed(tensors: Dict[str, torch.Tensor]) -> None:
        change(tensors)

    assert_refused(good, edited(good, tmp_path / 'bad', tensors=changed), *told.split('|'))


def test_all_tensors_saved_without_being_gathered_are_told_shortly(good: Path, tmp_path: Path) -> None:
    bad = edited(good, tmp_path / 'bad', tensors=lambda tensors: {key: torch.empty(0) for key in tensors})
    assert len(assert_refused(good, bad, 'ZeRO-3', '; ...')) < 3000


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_values_that_are_not_finite_are_told_with_adapter_and_tensor(good: Path, tmp_path: Path, dtype: torch.dtype,
                                                                     value: str) -> None:

    def change(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        tensors[key_of(tensors, A)][2, 3:5] = float(value)
        return tensors

    bad = edited(good, tmp_path / 'bad', tensors=change)
    key = key_of(load_file(file_in(bad, WEIGHTS)), A)
    assert_refused(
        good,
        bad,
        f'tensor {key!r} of {file_in(bad, WEIGHTS)} is expected to hold finite',
        'found that 2 of 256',
        is_header=False)


def test_values_so_large_that_their_sum_is_not_finite_are_fine(good: Path, tmp_path: Path) -> None:
    large = edited(good, tmp_path / 'large', tensors=lambda of: {key: torch.full_like(of[key], 3e38) for key in of})
    model = base_model()
    FusionComposer(model, library=AdapterLibrary({'large': large})).compose(['large'])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize('cut', [1, 7, 100, 5000, None])
def test_a_file_that_was_not_written_to_its_end_is_told(good: Path, tmp_path: Path, cut: Any) -> None:
    bad = edited(good, tmp_path / 'bad')
    file = file_in(bad, WEIGHTS)
    content = file.read_bytes()
    file.write_bytes(b'' if cut is None else content[:-cut])
    assert_refused(good, bad, 'cannot read', str(file), 'it has no header' if cut is None else 'not written to its end')


@pytest.mark.parametrize(('content', 'told'), [
    ((2**62).to_bytes(8, 'little') + b'{}', 'it is not a safetensors file'),
    ((10**7).to_bytes(8, 'little') + b'{}' * 100, 'it is shorter than its header says'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n', 'a pointer of Git LFS'),
    (with_header({'a': {'dtype': 'F32', 'shape': [9], 'data_offsets': [0, 4]}}, bytes(4)), 'another size than 4 bytes'),
    (with_header({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]},
                  'b': {'dtype': 'F32', 'shape': [1], 'data_offsets': [2, 6]}}, bytes(6)), "tensor 'b' is expected at"),
    (encoded({'a': torch.zeros(3)}) + b'more', 'it is expected to have'),
])  # yapf: disable
def test_a_file_that_is_no_safetensors_file_is_told(good: Path, tmp_path: Path, content: bytes, told: str) -> None:
    bad = edited(good, tmp_path / 'bad')
    file_in(bad, WEIGHTS).write_bytes(content)
    assert_refused(good, bad, 'cannot read', str(file_in(bad, WEIGHTS)), told)


@pytest.mark.parametrize('what', ['nothing', 'a file', 'an empty folder', 'no weights', 'a folder of weights'])
def test_files_that_are_not_there_are_told(good: Path, tmp_path: Path, what: str) -> None:
    bad = tmp_path / 'bad'
    if what == 'a file':
        bad.write_bytes(b'')
    elif what == 'an empty folder':
        bad.mkdir()
    elif what != 'nothing':
        edited(good, bad)
        file = file_in(bad, WEIGHTS)
        file.unlink()
        if what == 'a folder of weights':
            file.mkdir()
    told = {
        'nothing': 'the path does not exist',
        'a file': 'this is a file; give the folder',
        'an empty folder': f'there is no {CONFIG} in it'
    }.get(what, f'there is no {WEIGHTS} in')
    assert_refused(good, bad, told)


@pytest.mark.parametrize('name', [CONFIG, WEIGHTS, ''])
def test_files_without_permission_are_told(good: Path, tmp_path: Path, name: str) -> None:
    bad = edited(good, tmp_path / 'bad')
    denied = file_in(bad, name) if name else bad
    denied.chmod(0)
    try:
        if os.access(denied, os.R_OK):
            pytest.skip('root may read everywhere')
        assert_refused(good, bad, 'Permission denied')
    finally:
        denied.chmod(0o700)


@pytest.fixture(scope='module')
def with_embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of PEFT's with the base weights of its embedding, which PEFT saves with it."""
    path = tmp_path_factory.mktemp('embedding')
    config = LoraConfig(r=4, target_modules=['q_proj', 'embed_tokens', 'lm_head'])
    randomised(get_peft_model(base_model(), config)).save_pretrained(path, save_embedding_layers=True)
    assert [key for key in load_file(path / WEIGHTS) if 'base_layer' in key]
    return path


def test_base_weights_that_are_those_of_the_model_are_fine(with_embedding: Path, good: Path, tmp_path: Path) -> None:
    without = edited(with_embedding, tmp_path / 'without', tensors=lambda tensors: {
        key: tensors[key] for key in tensors if 'base_layer' not in key})  # yapf: disable
    plain = edited(good, tmp_path / 'plain', tensors=lambda tensors: tensors.update({
        'base_model.model.model.embed_tokens.weight': base_model().model.embed_tokens.weight,
        'base_model.model.lm_head.weight': base_model().lm_head.weight.detach().to(torch.float64)}))  # yapf: disable
    found = {}
    for name, path in (('with', with_embedding), ('without', without), ('plain', plain), ('good', good)):
        model = base_model()
        FusionComposer(model, library=AdapterLibrary({'x': path})).compose(['x'])
        found[name] = deltas(model, 'fused')
    for first, second in (('with', 'without'), ('plain', 'good')):
        assert found[first].keys() == found[second].keys()
        assert all(torch.equal(found[first][name], found[second][name]) for name in found[first])


@pytest.mark.parametrize(('key', 'change', 'told'), [
    ('embed_tokens.base_layer.weight', lambda weight: weight.index_fill(0, torch.tensor([63]), 1.0),
     'they are not those of this base model'),
    ('lm_head.base_layer.weight', lambda weight: weight * 1.001, 'they are not those of this base model'),
    ('embed_tokens.base_layer.weight', lambda weight: weight * float('nan'), 'they are not those of this base model'),
    ('embed_tokens.base_layer.weight', lambda weight: torch.cat([weight, weight[:1]]),
     '(65, 32) in the file, (64, 32) in this base model'),
    ('embed_tokens.base_layer.weight', lambda weight: weight.to(torch.int8), '(64, 32) in the file'),
])  # yapf: disable
def test_base_weights_of_another_model_are_told(with_embedding: Path, made: Dict[str, Path], tmp_path: Path, key: str,
                                                change: Callable[[torch.Tensor], torch.Tensor], told: str) -> None:
    bad = edited(with_embedding, tmp_path / 'bad', tensors=changing(key, change))
    assert_refused(made['peft'], bad, 'base weights of its own', key, 'cannot be fused', told)


def pickled(good: Path, path: Path, content: Any = None) -> Path:
    """A copy of a checkpoint with its tensors as a pickle."""
    shutil.copytree(good, path)
    file = file_in(path, WEIGHTS)
    torch.save(load_file(file) if content is None else content, file.with_name('adapter_model.bin'))
    file.unlink()
    return path


def test_a_pickle_is_converted_once_and_gone_with_the_library(good: Path, tmp_path: Path) -> None:
    models = [base_model() for _ in range(2)]
    library = AdapterLibrary({'x': pickled(good, tmp_path / 'pickled')}, cache_bytes=0)
    with mock.patch.object(torch, 'load', wraps=torch.load) as load:
        composer = FusionComposer(models[0], library=library)
        for _ in range(3):
            composer.compose(['x'])
            composer.check(['x'])
    assert load.call_count == 1
    FusionComposer(models[1], library=AdapterLibrary({'x': good})).compose(['x'])
    assert_same_deltas(*(deltas(model, 'fused') for model in models))
    [folder] = [Path(library.stored('x').file).parent]
    assert folder.is_dir()
    del composer, library, models
    gc.collect()
    assert not folder.exists()


def assert_same_deltas(first: Dict[str, torch.Tensor], second: Dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() != set()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Malicious:
    """Runs something when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker), )


def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(good: Path, tmp_path: Path) -> None:
    marker = tmp_path / 'marker'
    bad = pickled(good, tmp_path / 'bad', {'a': Malicious(marker)})
    assert_refused(good, bad, 'cannot read', 'adapter_model.bin', 'UnpicklingError')
    file_in(bad, 'adapter_model.bin').write_bytes(pickle.dumps(Malicious(marker)))
    assert_refused(good, bad, 'cannot read', 'adapter_model.bin')
    assert not marker.exists()


@pytest.mark.parametrize(('content', 'told'), [
    ([torch.zeros(1)], 'an object of tensors by name, found a list'),
    (torch.zeros(1), 'an object of tensors by name, found a Tensor'),
    (0, 'an object of tensors by name, found a int'),
    ({'a': 1}, "found 'a': a int"),
    ({'state_dict': {'a': torch.zeros(1)}}, "found 'state_dict': a dict"),
    ({1: torch.zeros(1)}, 'found 1: a Tensor'),
    ({'a': torch.zeros(1).to_sparse()}, "found 'a': a Tensor"),
    (b'', 'not a pickle of tensors alone, or a damaged one (EOFError)'),
    (b'\x1b[31mred', 'not a pickle of tensors alone, or a damaged one (UnpicklingError)'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'a pointer of Git LFS'),
    (None, 'not a pickle of tensors alone, or a damaged one'),
])  # yapf: disable
def test_a_pickle_of_something_else_is_told(good: Path, tmp_path: Path, content: Any, told: str) -> None:
    bad = pickled(good, tmp_path / 'bad', {'a': torch.zeros(1)} if content is None else content)
    file = file_in(bad, 'adapter_model.bin')
    if content is None:
        file.write_bytes(file.read_bytes()[:-100])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    text = assert_refused(good, bad, f'cannot read {file}: it is ', told, 'Copy it again, or save the adapter again.')
    assert text.isprintable() and 'weights_only' not in text


def test_a_file_of_several_adapters_is_told(good: Path, tmp_path: Path) -> None:

    def twice(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        parts = {key: split_key(key) for key in tensors}
        return {join_key(*parts[key][:2], name): tensors[key].clone() for key in tensors for name in ('a', 'b')}

    bad = edited(good, tmp_path / 'bad', tensors=twice)
    assert_refused(good, bad, f'{file_in(bad, WEIGHTS)} is expected to hold one adapter, found tensors of ', "'a'",
                   "'b'")


def test_what_is_wrong_in_a_pickle_is_told_as_in_a_file(good: Path, tmp_path: Path) -> None:
    tensors = load_file(file_in(good, WEIGHTS))
    key = key_of(tensors, A)
    tensors[key][0, 0] = float('nan')
    assert_refused(good, pickled(good, tmp_path / 'nan', tensors), f'tensor {key!r}', '1 of 256', is_header=False)
    tensors.pop(key)
    assert_refused(good, pickled(good, tmp_path / 'missing', tensors), 'the file has no tensors for 1 of', A)


def test_all_that_is_wrong_is_told_at_once_where_it_is_asked(good: Path, tmp_path: Path) -> None:
    bad = {
        'config': edited(good, tmp_path / 'config', {'use_dora': True}),
        'missing': tmp_path / 'none',
        'shape': edited(good, tmp_path / 'shape', tensors=changing(A, lambda tensor: tensor[1:])),
    }
    composer = FusionComposer(base_model(), library=AdapterLibrary({'good': good, **bad}))
    with pytest.raises(ValueError) as e:
        composer.check()
    assert [re.match("adapter '(.*?)'", line)[1] for line in str(e.value).splitlines()] == list(bad)
    composer.check(['good'])


def test_a_config_of_json_may_hold_what_python_prints_otherwise(good: Path, tmp_path: Path) -> None:
    odd = edited(good, tmp_path / 'odd', {'of_a_later_release': [float('nan')]})
    assert 'NaN' in file_in(odd, CONFIG).read_text()
    models = [base_model() for _ in range(2)]
    for model, path in zip(models, (odd, good)):
        FusionComposer(model, library=AdapterLibrary({'x': path})).compose(['x'])
    assert_same_deltas(*(deltas(model, 'fused') for model in models))


def test_values_beyond_the_dtype_that_they_would_have_are_refused(good: Path, tmp_path: Path) -> None:
    tensors = {key: tensor.double() for key, tensor in load_file(file_in(good, WEIGHTS)).items()}
    next(iter(tensors.values()))[0, 0] = 1e300
    bad = shutil.copytree(good, tmp_path / 'bad')
    file_in(bad, WEIGHTS).write_bytes(encoded(tensors))
    assert_refused(good, bad, 'values of float32', 'found larger ones', is_header=False)
