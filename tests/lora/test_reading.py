"""What is read of a file is what safetensors loads, wherever it shall lie in memory."""
import os
import pytest
import time
import torch
from checkpoint_files import encoded
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from pathlib import Path
from safetensors.torch import load
from tempfile import NamedTemporaryFile
from typing import Any, Dict, List, Tuple
from unittest import mock

from swift_patch.lora import reading as module
from swift_patch.lora.header import Header, opened, read_header
from swift_patch.lora.reading import DTYPES, FileChanged, Placed, Reading, read_into, settled_signatures, signature_of

CPU = torch.device('cpu')
KINDS = [(torch.float32, CPU), (torch.float64, CPU), (torch.bfloat16, CPU)]


@st.composite
def cases(draw: Any) -> Tuple[Dict[str, torch.Tensor], List[Placed]]:
    """Tensors in the order of a file, and where some of them go: those that do not are gaps in what is read."""
    count = draw(st.integers(1, 12))
    tensors = {}
    for number in range(count):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 5), max_size=2))
        # Integers that every dtype can hold.
        tensors[f't{number}'] = (torch.arange(torch.Size(shape).numel()) + 20 * number).reshape(shape).to(dtype)
    ends, placed = {kind: 0 for kind in KINDS}, []
    for key in draw(st.permutations(draw(st.lists(st.sampled_from(list(tensors)), unique=True)))):
        kind = draw(st.sampled_from(KINDS))
        placed.append(Placed(key, kind, ends[kind]))
        ends[kind] += tensors[key].numel()
    return tensors, draw(st.permutations(placed))


def read(content: bytes, placed: List[Placed], spare: int = 0) -> Tuple[Reading, torch.Tensor]:
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with opened(file.name) as fd:
            reading = Reading(Header(read_header(fd)), placed)
            # What was in the memory before.
            buffer = torch.full([reading.nbytes + spare], 255, dtype=torch.uint8)
            reading.read(fd, buffer)
    return reading, buffer


def assert_read(content: bytes, placed: List[Placed], spare: int = 0) -> None:
    expected = load(content)
    reading, buffer = read(content, placed, spare)
    found = reading.tensors(buffer)
    assert found.keys() == {kind for _, kind, _ in placed}
    for kind, values in found.items():
        assert (values.dtype, values.device, values.dim()) == (*kind, 1)
        assert len(values) == sum(expected[key].numel() for key, of, _ in placed if of == kind)
    for key, kind, offset in placed:
        value = expected[key].flatten()
        assert torch.equal(found[kind][offset:offset + len(value)], value.to(kind[0]))
    parts = list(reading.parts(buffer))
    assert sorted(key for key, _ in parts) == sorted(key for key, _, _ in placed)
    for key, value in parts:
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key].flatten())


@tries(150)
@given(cases(), st.integers(0, 100))
def test_wherever_tensors_go_they_are_what_safetensors_loads(case, spare):
    tensors, placed = case
    assert_read(encoded(tensors), placed, spare)


@tries(60)
@given(cases(), st.integers(1, 7))
def test_reads_that_stop_early_go_on_where_they_stopped(case, most):
    """A system call may read less than it was asked for: on some file systems, at a signal, or beyond 2 GiB."""
    preadv, (tensors, placed) = os.preadv, case

    def short(fd, views, offset):
        left, cut = most, []
        for view in views:
            cut.append(view[:left])
            left -= len(cut[-1])
        return preadv(fd, cut, offset)

    with mock.patch.object(module.os, 'preadv', short):
        assert_read(encoded(tensors), placed)


@pytest.mark.parametrize('order', ['as in the file', 'reversed', 'every other'])
def test_more_tensors_than_one_call_can_scatter_to_are_read(order: str) -> None:
    tensors = {f't{number:04}': torch.full([3], float(number)) for number in range(2500)}
    keys = list(tensors)
    placed = {'as in the file': keys, 'reversed': keys[::-1], 'every other': keys[::2]}[order]
    assert_read(encoded(tensors), [Placed(key, KINDS[0], 3 * at) for at, key in enumerate(placed)])


def test_what_lies_in_memory_as_in_the_file_is_read_at_once_and_stays_where_it_was_read_to() -> None:
    tensors = {f't{number:04}': torch.full([3], float(number)) for number in range(2500)}
    with mock.patch.object(module.os, 'preadv', wraps=os.preadv) as preadv:
        reading, buffer = read(encoded(tensors), [Placed(key, KINDS[0], 3 * at) for at, key in enumerate(tensors)])
    assert preadv.call_count == 1
    [values] = reading.tensors(buffer).values()
    assert values.data_ptr() == buffer.data_ptr()


@tries(60)
@given(cases(), st.integers(0, 50))
def test_a_file_that_ends_too_early_is_told(case, cut):
    tensors, placed = case
    with NamedTemporaryFile() as file:
        file.write(encoded(tensors))
        file.flush()
        with opened(file.name) as fd:
            header = Header(read_header(fd))
            reading = Reading(header, placed)
            os.truncate(file.name, max(header.nbytes - cut, 0))
            buffer = torch.empty(reading.nbytes, dtype=torch.uint8)
            ends = [header.entries[key].end for key, _, _ in placed if tensors[key].numel()]
            if max(ends, default=0) > header.nbytes - cut:
                with pytest.raises(FileChanged):
                    reading.read(fd, buffer)
            else:
                reading.read(fd, buffer)


def test_a_file_without_a_byte_to_read_is_no_error(tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(b'')
    with opened(str(tmp_path / 'file')) as fd:
        read_into(fd, 0, [])
        with pytest.raises(FileChanged):
            read_into(fd, 0, [memoryview(bytearray(1))])


@pytest.mark.parametrize('dtype', DTYPES.values())
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_one_value_that_is_not_finite_is_seen_among_finite_ones(dtype: torch.dtype, value: float) -> None:
    tensors = {'a': torch.randn(100).to(dtype), 'b': torch.randn(100).to(dtype), 'c': torch.randn(100)}
    placed = [Placed('c', KINDS[1], 0), Placed('b', KINDS[1], 100), Placed('a', KINDS[1], 200)]
    reading, buffer = read(encoded(tensors), placed)
    assert reading.is_finite(buffer)
    tensors['b'][77] = value
    reading, buffer = read(encoded(tensors), placed)
    assert not reading.is_finite(buffer)
    assert [key for key, part in reading.parts(buffer) if not part.isfinite().all()] == ['b']


def test_infinities_of_both_signs_do_not_make_up_for_each_other() -> None:
    reading, buffer = read(encoded({'a': torch.tensor([float('inf'), float('-inf')])}), [Placed('a', KINDS[0], 0)])
    assert not reading.is_finite(buffer)


def test_only_a_sum_within_their_range_says_that_values_are_finite() -> None:
    for value, is_sure in ((6.0, True), (60000.0, False), (float('inf'), False), (float('nan'), False)):
        values = torch.full([1000], value, dtype=torch.float16)
        reading, buffer = read(encoded({'a': values}), [Placed('a', KINDS[0], 0)])
        assert reading.is_finite(buffer) is is_sure


def watched_clock() -> Any:
    """Counts the module's own calls: every engine of ms-swift leaves a thread that sleeps a hundred times a second."""
    return mock.patch.object(module, 'time', mock.Mock(wraps=time))


def test_what_was_written_to_just_now_is_waited_for_once(tmp_path: Path) -> None:
    old, new = tmp_path / 'old', tmp_path / 'new'
    old.write_bytes(b'old')
    os.utime(old, (0, 10**9))
    new.write_bytes(b'new')
    with watched_clock() as clock:
        found = settled_signatures([str(old), str(new)])
        assert found == tuple(signature_of(os.stat(file)) for file in (old, new)) and clock.sleep.call_count
        clock.reset_mock()
        assert settled_signatures([str(old), str(new)]) == found and not clock.sleep.call_count


def test_after_that_every_write_is_seen(tmp_path: Path) -> None:
    file = tmp_path / 'file'
    file.write_bytes(b'0')
    for number in range(1, 6):
        found = settled_signatures([str(file)])
        with open(file, 'r+b') as f:
            f.write(str(number).encode())
        assert signature_of(os.stat(file)) != found[0]


def test_a_file_of_the_future_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / 'file'
    file.write_bytes(b'')
    os.utime(file, (4 * 10**9, 4 * 10**9))
    settled_signatures([str(file)])
    with watched_clock() as clock:
        settled_signatures([str(file)])
    assert not clock.sleep.call_count


def test_a_file_that_is_written_to_all_the_time_is_told_some_time(tmp_path: Path) -> None:
    file = tmp_path / 'file'
    stat = os.stat

    def written(path):
        file.write_bytes(b'')
        return stat(path)

    with mock.patch.object(module.os, 'stat', written), mock.patch.object(module, '_MAX_WAIT', 0.1):
        with pytest.raises(ValueError, match='being written to'):
            settled_signatures([str(file)])
