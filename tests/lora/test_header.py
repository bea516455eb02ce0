"""The header of a safetensors file is read as safetensors reads it, and what is no header is told."""
import json
import pytest
import torch
from checkpoint_files import DTYPE_NAMES, encoded, values_of, with_header
from fuzzing import tries
from hypothesis import given
from hypothesis import strategies as st
from pathlib import Path
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file
from tempfile import NamedTemporaryFile
from typing import Any, Dict

from swift_patch.lora.header import Header, opened, read_header

keys = st.text(st.characters(exclude_categories=['Cs']), max_size=12).filter(lambda key: key != '__metadata__')


@st.composite
def some_tensors(draw: Any) -> Dict[str, torch.Tensor]:
    found = {}
    for number, key in enumerate(draw(st.lists(keys, unique=True, max_size=8))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(list(DTYPE_NAMES)))
        found[key] = torch.full(shape, number + 1).to(dtype)
    return found


def read(content: bytes) -> Header:
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with opened(file.name) as fd:
            return Header(read_header(fd))


def assert_read_as(content: bytes, tensors: Dict[str, torch.Tensor]) -> None:
    header = read(content)
    assert header.nbytes == len(content)
    assert {key: entry.shape for key, entry in header.entries.items()} == \
        {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, entry in header.entries.items():
        assert entry.dtype == DTYPE_NAMES[tensors[key].dtype]
        assert content[entry.begin:entry.end] == values_of(tensors[key])


@tries(60)
@given(some_tensors(), st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=2))
def test_what_safetensors_writes_is_read_where_it_is(tensors, metadata):
    content = save(tensors, metadata)
    assert_read_as(content, tensors)
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with safe_open(file.name, 'pt') as stock:
            assert set(read(content).entries) == set(stock.keys())
            for key, entry in read(content).entries.items():
                told = stock.get_slice(key)
                assert (told.get_dtype(), tuple(told.get_shape())) == (entry.dtype, entry.shape)


@tries(60)
@given(some_tensors(), st.randoms())
def test_whatever_the_order_of_keys_and_of_values_both_read_the_same(tensors, chance):
    """Some writers sort their keys; empty tensors lie where others begin."""
    order, names = list(tensors), list(tensors)
    chance.shuffle(order)
    chance.shuffle(names)
    content = encoded({key: tensors[key] for key in order}, names)
    assert {key for key, _ in deserialize(content)} == set(tensors)
    assert_read_as(content, tensors)


def test_a_header_that_is_longer_than_what_is_read_at_once_is_read_whole(tmp_path: Path) -> None:
    tensors = {f'{"x" * 100}{number}': torch.full([2], float(number)) for number in range(3000)}
    save_file(tensors, tmp_path / 'file')
    assert (tmp_path / 'file').stat().st_size > 2**18
    assert_read_as((tmp_path / 'file').read_bytes(), tensors)


def one(**changes: Any) -> Dict[str, Any]:
    return {'t': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24], **changes}}


def two(first: Any, second: Any) -> Dict[str, Any]:
    return {key: {'dtype': 'F32', 'shape': [2], 'data_offsets': at} for key, at in (('a', first), ('b', second))}


@pytest.mark.parametrize(('content', 'told'), [
    (b'', 'it is not a safetensors file: it has no header'),
    (b'1234567', 'it is not a safetensors file: it has no header'),
    (b'\x80\x02' + b'pickle' * 10, 'it is not a safetensors file: it has no header'),
    (with_header(one())[:-1], 'it is shorter than its header says: it was not written to its end'),
    (with_header(one())[:8], 'it is shorter than its header says: it was not written to its end'),
    ((10**7).to_bytes(8, 'little') + b'{}', 'it is shorter than its header says: it was not written to its end'),
    (with_header(b''), 'its header is not JSON'),
    (with_header(b'{"t": '), 'its header is not JSON'),
    (with_header(b'\xff\xfe\xfd'), 'its header is not JSON'),
    (with_header(b'[' * 100_000), 'its header is not JSON'),
    (with_header([]), r'its header is expected to be an object, found \[\]'),
    (with_header({'t': {}}), "its header says of tensor 't' what nobody understands"),
    (with_header({'t': None}), "its header says of tensor 't' what nobody understands: None"),
    (with_header({'t': [1, 2]}), "its header says of tensor 't' what nobody understands"),
    (with_header(one(shape=None)), "its header says of tensor 't' what nobody understands"),
    (with_header(one(shape=[2, -3])), "its header says of tensor 't' what nobody understands"),
    (with_header(one(shape=[2.0, 3])), "its header says of tensor 't' what nobody understands"),
    (with_header(one(shape=[True, 6])), "its header says of tensor 't' what nobody understands"),
    (with_header(one(shape='23')), "its header says of tensor 't' what nobody understands"),
    (with_header(one(data_offsets=[0])), "its header says of tensor 't' what nobody understands"),
    (with_header(one(data_offsets=[0, 24, 48])), "its header says of tensor 't' what nobody understands"),
    (with_header(one(data_offsets=['0', '24'])), "its header says of tensor 't' what nobody understands"),
    (with_header(one(data_offsets=[0, 20])), r"tensor 't' of shape \(2, 3\) is expected to have another size than 20"),
    (with_header(one(data_offsets=[24, 0])), r"tensor 't' of shape \(2, 3\) is expected to have another size than -24"),
    (with_header(one(dtype='F16')), r"tensor 't' of shape \(2, 3\) is expected to have another size than 24 bytes"),
    (with_header(one(data_offsets=[8, 32])), "tensor 't' is expected at byte "),
    (with_header(two([0, 8], [4, 12])), "tensor 'b' is expected at byte "),
    (with_header(two([0, 8], [0, 8])), "tensor 'b' is expected at byte "),
    (with_header(two([0, 8], [16, 24])), "tensor 'b' is expected at byte "),
    (with_header(two([8, 16], [12, 20])), "tensor 'a' is expected at byte "),
    # Numbers of 4,300 digits are JSON, and Python does not print their sums.
    (with_header(one(dtype='I8', data_offsets=[int('9' * 4300)] * 2)), "tensor 't' is expected at byte "),
    (with_header(one(data_offsets=[0, int('9' * 4300)])), "tensor 't' of shape "),
])  # yapf: disable
def test_what_is_no_header_is_told(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=f'^{told}') as e:
        read(content)
    assert len(str(e.value)) < 500


offsets = st.lists(st.integers(-1, 24), min_size=2, max_size=2) | st.sampled_from([[0, 4], [4, 8], [8, 16], [4, 4]])
anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())
damaged = st.fixed_dictionaries({}, optional={
    'dtype': st.sampled_from(['F32', 'F16', 'I8', 'F64']) | anything,
    'shape': st.lists(st.integers(0, 3), max_size=2) | anything,
    'data_offsets': offsets | anything
})  # yapf: disable
plausible = st.builds(lambda dtype, shape, at: {
    'dtype': dtype,
    'shape': shape,
    'data_offsets': at
}, st.sampled_from(['F32', 'F16']), st.sampled_from([[1], [2], [1, 2], [], [0]]), offsets)


@tries(400)
@given(st.dictionaries(st.sampled_from('abc'), plausible | plausible | damaged | anything, max_size=3))
def test_a_header_is_taken_where_safetensors_takes_it(data):
    header = json.dumps(data).encode()
    try:
        found = Header(header)
    except ValueError as e:
        assert str(e)
        # Any number of bytes that might be there.
        for size in range(0, 33):
            with pytest.raises(SafetensorError):
                deserialize(with_header(header, bytes(size)))
        return
    if any(entry.dtype not in ('F32', 'F16', 'F64') for entry in found.entries.values()):
        return  # It is refused once it is known that the tensor is one of a LoRA.
    stock = dict(deserialize(with_header(header, bytes(found.nbytes - 8 - len(header)))))
    assert {key: (entry.dtype, list(entry.shape), entry.end - entry.begin) for key, entry in found.entries.items()} == \
        {key: (of['dtype'], of['shape'], len(of['data'])) for key, of in stock.items()}


@tries(200)
@given(some_tensors(), st.data())
def test_bytes_that_were_changed_or_cut_raise_nothing_else(tensors, data):
    content = bytearray(encoded(tensors))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))):]
    try:
        header = read(bytes(content))
    except ValueError as e:
        assert str(e)
    else:
        assert header.nbytes >= 8
