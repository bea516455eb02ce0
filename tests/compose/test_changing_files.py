"""Files that change under a running composer: each call sees one state of them, old or new, or is told."""
import errno
import os
import pytest
import shutil
import subprocess
import sys
import torch
from checkpoint_files import CONFIG, WEIGHTS, aged, edited, encoded, file_in, numbered
from file_faults import between_calls
from models import assert_same_state, deltas, loras, peft_model, qwen2, randomised, state, swift_model
from pathlib import Path
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from types import MappingProxyType
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from swift_patch import AdapterLibrary, FusionComposer

Deltas = Dict[str, Tensor]
# The header of each file with spaces, so that files of other headers have one size.
LEAST = 8192


def small_model() -> nn.Module:
    return qwen2(1, 16)


class Place:
    """A checkpoint at a path, and another one of its size that may take its place.

    `new` has another scaling, other values in every tensor, and its tensors in another order: no part of it, be that
    its config or its header, goes with the rest of the old one unnoticed.

    Attributes:
        path: where a library has it.
        expected: what each of both makes of the model, by a composer that never saw anything else.
    """

    def __init__(self, root: Path, checkpoint: Path, is_pickle: bool = False):
        self.path, self._root, self._count = root / 'live' / 'x', root, 0
        self._whole = {
            'old': edited(checkpoint, root / 'old', {'lora_alpha': 8}, numbered(1.0, 0.5),
                          lambda tensors: encoded(tensors, least=LEAST)),
            'new': edited(checkpoint, root / 'new', {'lora_alpha': 16}, numbered(-3.0, -0.25),
                          lambda tensors: encoded(dict(reversed(tensors.items())), least=LEAST)),
        }  # yapf: disable
        assert len({file_in(whole, WEIGHTS).stat().st_size for whole in self._whole.values()}) == 1
        self.weights = WEIGHTS
        if is_pickle:
            self.weights = 'adapter_model.bin'
            for whole in self._whole.values():
                file = file_in(whole, WEIGHTS)
                torch.save(load_file(file), file.with_name(self.weights))
                file.unlink()
        self.model = small_model()
        self.expected = {name: self.fresh(whole) for name, whole in self._whole.items()}
        self.restore()

    def fresh(self, path: Optional[Path] = None) -> Deltas:
        """What a composer that never saw anything else makes of a checkpoint, or of what is there now.

        In the same model: the scaling of the fused adapter is that of what was in it first.
        """
        FusionComposer(self.model, library=AdapterLibrary({'x': self.path if path is None else path})).compose(['x'])
        return deltas(self.model, 'fused')

    def restore(self) -> None:
        """Puts the old checkpoint there."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir(parents=True)
        self.copy('old').rename(self.path)

    def copy(self, name: str) -> Path:
        """A copy of one of both, as old as everything else, so that nobody waits for it to settle."""
        self._count += 1
        return aged(Path(shutil.copytree(self._whole[name], self._root / f'copy{self._count}')))

    def other(self) -> str:
        """A folder for what is moved away."""
        self._count += 1
        return str(self._root / f'away{self._count}')

    def expect_new_of(self, how: str) -> None:
        """Takes what is there after something has happened for the new state, and makes it unhappen."""
        getattr(self, how)()
        self.expected['new'] = self.fresh()
        self.restore()

    def composer(self, **options: Any) -> FusionComposer:
        """A composer with a library that has looked at nothing yet."""
        return FusionComposer(self.model, library=AdapterLibrary({'x': self.path}, **options))

    def told(self, composer: FusionComposer, actions: Mapping[int, Callable[[], Any]] = MappingProxyType({})) -> str:
        """Composes, and returns whose state that made: `old`, `new`, or `error`, where the model is as it was."""
        before = state(self.model)
        with between_calls(self.path.parent, actions):
            try:
                composer.compose(['x'])
            except ValueError as e:
                assert "'x'" in str(e)
                assert_same_state(state(self.model), before)
                return 'error'
        made = deltas(self.model, 'fused')
        found = [name for name, expected in self.expected.items() if is_same(made, expected)]
        assert len(found) == 1, 'what was made is neither that of the old files nor that of the new ones'
        return found[0]

    # What may happen to it.

    def swap_folders(self) -> None:
        new = self.copy('new')
        os.rename(self.path, self.other())
        os.rename(new, self.path)

    def swap_folders_back(self) -> None:
        """Puts away what is there for the folder, the very one, that was there first."""
        os.rename(self.path, self.other())
        os.rename(self._root / f'away{self._count - 1}', self.path)

    def replace_file(self) -> None:
        # The config stays, which makes values of its own of the new file.
        os.replace(file_in(self.copy('new'), self.weights), file_in(self.path, self.weights))

    def rewrite_in_place(self) -> None:
        content = file_in(self._whole['new'], self.weights).read_bytes()
        with open(file_in(self.path, self.weights), 'r+b') as f:
            f.write(content)

    def truncate(self) -> None:
        file = file_in(self.path, self.weights)
        os.truncate(file, file.stat().st_size // 2)

    def empty(self) -> None:
        file_in(self.path, self.weights).write_bytes(b'')

    def delete(self) -> None:
        file_in(self.path, self.weights).unlink()

    def delete_folder(self) -> None:
        shutil.rmtree(self.path)

    def damage_config(self) -> None:
        file_in(self.path, CONFIG).write_text('{"r": ')

    def fail(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def is_same(first: Deltas, second: Deltas) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """One as PEFT writes it, one as ms-swift does, and one with base weights, which are compared with the model's."""
    root, targets = tmp_path_factory.mktemp('made'), ['q_proj', 'down_proj']
    peft_model(loras(1, LoraConfig, target_modules=targets), small_model()).save_pretrained(str(root / 'peft'))
    swift_model(loras(1, target_modules=targets), small_model()).save_pretrained(str(root / 'swift'))
    embedding = LoraConfig(r=4, target_modules=[*targets, 'embed_tokens'])
    # Initialised so that the base weights are in the file, and random.
    randomised(get_peft_model(small_model(), embedding)).save_pretrained(root / 'base', save_embedding_layers=True)
    return {
        'peft': root / 'peft' / 'l0',
        'swift': root / 'swift',
        'pickle': root / 'peft' / 'l0',
        'base': root / 'base'
    }


@pytest.fixture(params=['swift', 'pickle'])
def place(request: Any, checkpoints: Dict[str, Path], tmp_path: Path) -> Place:
    return Place(tmp_path, checkpoints[request.param], request.param == 'pickle')


def moments(place: Place,
            before: str,
            action: Callable[[], Any],
            undo: Optional[Callable[[], Any]] = None) -> Iterator[Tuple[str, FusionComposer]]:
    """Does something at each moment at which a composer looks at files, and yields what was made, and the composer.

    Args:
        place: the files.
        before: whether what is there is `unknown` to the library, `known`, or `cached`.
        action: what is done.
        undo: is done at each later moment.
    """
    first = last = 0
    while True:
        place.restore()
        composer = place.composer(cache_bytes=2**20 * (before == 'cached'))
        if before != 'unknown':
            assert place.told(composer) == 'old'
        happened: List[int] = []
        actions = {first: lambda: happened.append(1) or action()}
        if undo is not None:
            last = max(last, first) + 1
            actions[last] = lambda: happened.append(2) or undo()
        found = place.told(composer, actions)
        if not happened:
            return
        if undo is not None and len(happened) < 2:
            first = last = first + 1
            continue
        yield found, composer
        first += undo is None


def test_each_thing_that_may_happen_makes_a_difference(place: Place) -> None:
    """Else nothing that follows would show anything."""
    old, new = place.expected.values()
    assert not is_same(old, new)
    for name, tensor in old.items():
        for other in (tensor * 2, new[name] / 2, new[name] * 2):
            assert not torch.equal(tensor, other) and not torch.equal(new[name], other)
    place.replace_file()
    replaced = place.fresh()
    assert not any(is_same(replaced, expected) for expected in (old, new))
    place.restore()
    place.swap_folders()
    assert is_same(place.fresh(), new)
    place.swap_folders_back()
    assert is_same(place.fresh(), old)


BEFORE = pytest.mark.parametrize('before', ['unknown', 'known', 'cached'])


@BEFORE
def test_a_folder_that_is_swapped_at_any_moment_is_the_old_one_or_the_new_one(place: Place, before: str) -> None:
    seen = set()
    for found, composer in moments(place, before, place.swap_folders):
        seen.add(found)
        # What is remembered of that moment does no harm later.
        assert place.told(composer) == 'new'
    assert 'new' in seen


@BEFORE
def test_a_folder_that_is_swapped_and_back_is_never_a_mixture(place: Place, before: str) -> None:
    for _, composer in moments(place, before, place.swap_folders, place.swap_folders_back):
        assert place.told(composer) == 'old'


@BEFORE
@pytest.mark.parametrize('how', ['replace_file', 'rewrite_in_place'])
def test_a_file_that_is_written_anew_at_any_moment_is_the_old_one_or_the_new_one(place: Place, before: str,
                                                                                 how: str) -> None:
    place.expect_new_of(how)
    for _, composer in moments(place, before, getattr(place, how)):
        assert place.told(composer) == 'new'


@BEFORE
@pytest.mark.parametrize('how', ['truncate', 'empty', 'delete', 'delete_folder', 'damage_config', 'fail'])
def test_files_that_go_at_any_moment_are_told_or_were_read_before(place: Place, before: str, how: str) -> None:
    place.expected.pop('new')
    for found, composer in moments(place, before, getattr(place, how)):
        assert found in ('old', 'error')
        # The system fails only once.
        assert place.told(composer) == ('old' if how == 'fail' else 'error')
        place.restore()
        assert place.told(composer) == 'old'


@pytest.mark.parametrize('how', ['swap_folders', 'truncate', 'delete_folder', 'fail'])
def test_so_it_is_where_base_weights_are_compared(checkpoints: Dict[str, Path], tmp_path: Path, how: str) -> None:
    place = Place(tmp_path, checkpoints['base'])
    assert any('base_layer' in key for key in load_file(file_in(place.path, WEIGHTS)))
    for found, _ in moments(place, 'unknown', getattr(place, how)):
        assert found in (('old', 'new', 'error') if how == 'swap_folders' else ('old', 'error'))


@pytest.mark.parametrize('cache_bytes', [0, 2**20])
def test_an_adapter_in_several_rows_of_a_batch_is_one_state_of_it(checkpoints: Dict[str, Path], tmp_path: Path,
                                                                  cache_bytes: int) -> None:
    place, ids = Place(tmp_path, checkpoints['peft']), torch.arange(8)[None].expand(3, -1)
    # So small that the outputs tell of everything.
    rows = [{'x': 0.001}, {'x': 0.0005, 'y': 0.0005}, {'x': 0.001}]

    def logits(actions: Mapping[int, Callable[[], Any]] = MappingProxyType({})) -> Tensor:
        library = AdapterLibrary({'x': place.path, 'y': place.copy('old')}, cache_bytes=cache_bytes)
        with between_calls(place.path.parent, actions):
            FusionComposer(place.model, library=library).compose_batch(rows)
        with torch.no_grad():
            return place.model(ids).logits

    expected = [logits()]
    place.swap_folders()
    expected.append(logits())
    assert not any(torch.equal(first, second) for first, second in zip(*expected))
    first, happened = 0, [True]
    while happened:
        place.restore()
        happened.clear()
        try:
            found = logits({first: lambda: happened.append(True) or place.swap_folders()})
        except ValueError as e:
            assert "'x'" in str(e)
        else:
            assert any(torch.equal(found, other) for other in expected)
        first += 1


# Another process that does something to files as fast as it may, with pauses of any length in which a composer, which
# waits until what was written has settled, gets through.
_WRITER = '''
import os, random, shutil, sys
from time import sleep
how, file, old, new, pause = sys.argv[1:]
contents = [open(path, 'rb').read() for path in (old, new)]
chance = random.Random(0)
print('started', flush=True)
while True:
    content = chance.choice(contents)
    if how == 'replace':
        with open(file + '.new', 'wb') as f:
            f.write(content)
        os.utime(file + '.new', (0, 10**9))
        os.replace(file + '.new', file)
    elif how == 'rewrite':
        with open(file, 'r+b') as f:
            f.write(content)
    elif how == 'truncate':
        os.truncate(file, chance.randrange(len(content)))
        with open(file, 'wb') as f:
            f.write(content)
    elif how == 'delete':
        os.unlink(file)
        with open(file, 'wb') as f:
            f.write(content)
    sleep(chance.random() * float(pause))
'''


@pytest.mark.parametrize(('how', 'pause'), [('replace', 0.004), ('rewrite', 0.15), ('truncate', 0.15),
                                            ('delete', 0.15)])
def test_beside_a_process_that_writes_all_the_time_a_call_sees_one_state(checkpoints: Dict[str, Path], tmp_path: Path,
                                                                         how: str, pause: float) -> None:
    place = Place(tmp_path, checkpoints['peft'])
    files = [file_in(place.copy(name), WEIGHTS) for name in ('old', 'new')]
    place.expect_new_of('replace_file')
    composer, seen, changes = place.composer(cache_bytes=2**20), [], 0
    command = [sys.executable, '-c', _WRITER, how, str(file_in(place.path, WEIGHTS)), *map(str, files), str(pause)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b'started\n'
            # Between two writes there may be many calls.
            while len(seen) < 20_000 and (changes < 12 or not {'old', 'new'} <= set(seen)):
                seen.append(place.told(composer))
                changes += seen[-2:-1] != seen[-1:]
            assert writer.poll() is None
        finally:
            writer.kill()
    assert {'old', 'new'} <= set(seen)
    # It was killed anywhere: what is there now is whole, or is told.
    try:
        place.expected = {'now': place.fresh()}
    except ValueError:
        assert place.told(composer) == 'error'
    else:
        assert place.told(composer) == 'now'
