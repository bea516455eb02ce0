"""Checkpoints as files: made by PEFT and ms-swift, then changed, damaged or written byte by byte."""
import json
import os
import shutil
import torch
from pathlib import Path
from safetensors.torch import load_file
from torch import Tensor
from typing import Any, Callable, Mapping, Optional, Sequence

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
# Of safetensors.
DTYPE_NAMES = {
    torch.float64: 'F64',
    torch.float32: 'F32',
    torch.float16: 'F16',
    torch.bfloat16: 'BF16',
    torch.int64: 'I64',
    torch.int32: 'I32',
    torch.int8: 'I8',
    torch.uint8: 'U8',
    torch.bool: 'BOOL'
}


def values_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b''


def with_header(header: Any, values: bytes = b'') -> bytes:
    """A safetensors file with this header, JSON or bytes, whether it is right or not."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, 'little') + content + values


def encoded(tensors: Mapping[str, Tensor], keys: Optional[Sequence[str]] = None, least: int = 0) -> bytes:
    """A safetensors file with its values in the order of `tensors`, named in the order of `keys`.

    safetensors itself has one order, by size of the elements and name. With `least` bytes for the header, spaces aside,
    files of other headers have one size.
    """
    header, values = {}, b''
    for key, tensor in tensors.items():
        content = values_of(tensor)
        header[key] = {
            'dtype': DTYPE_NAMES[tensor.dtype],
            'shape': list(tensor.shape),
            'data_offsets': [len(values), len(values) + len(content)]
        }
        values += content
    named = {key: header[key] for key in (tensors if keys is None else keys)}
    return with_header(json.dumps(named).encode().ljust(least), values)


def file_in(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint, which ms-swift's format has in a folder of the adapter's."""
    [file] = checkpoint.rglob(name)
    return file


def edited(checkpoint: Any,
           copy: Path,
           config: Optional[Mapping[str, Any]] = None,
           tensors: Optional[Callable[[Any], Any]] = None,
           write: Callable[[Mapping[str, Tensor]], bytes] = encoded) -> Path:
    """A copy of a checkpoint with another config, with tensors that were changed (in place, or returned), or both."""
    shutil.copytree(checkpoint, copy)
    if config is not None:
        file = file_in(copy, CONFIG)
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if tensors is not None:
        file = file_in(copy, WEIGHTS)
        content = load_file(file)
        changed = tensors(content)
        file.write_bytes(write(content if changed is None else changed))
    return copy


def numbered(first: float, step: float) -> Callable[[Mapping[str, Tensor]], Any]:
    """Fills each A and B with a number of its own: no part of one file, and no tensor, is taken for another."""
    return lambda tensors: {
        key: torch.full_like(tensors[key], first + step * number) if 'lora_' in key else tensors[key]
        for number, key in enumerate(sorted(tensors))
    }


def aged(folder: Path, seconds: int = 3600) -> Path:
    """A folder whose files were all written at one time, long ago."""
    for path in folder.rglob('*'):
        if path.is_file():
            os.utime(path, ns=(0, 10**18 - seconds * 10**9))
    return folder
