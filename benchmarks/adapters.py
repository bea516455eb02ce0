"""LoRAs on disk: as many as are wanted, each in a folder of its own with values of its own, in PEFT's format."""
import os
import random
import torch
from pathlib import Path
from peft import LoraConfig, PeftModel, get_peft_model
from typing import Iterable, List, Sequence
from workloads import TARGETS, base_model

from swift_patch import AdapterLibrary

_WEIGHTS, _CONFIG = 'adapter_model.safetensors', 'adapter_config.json'


def write_adapters(folder: Path,
                   count: int,
                   shape: str = 'small',
                   rank: int = 8,
                   dtype: torch.dtype = torch.float32) -> Path:
    """Writes checkpoints of random values, and returns the folder of their folders.

    PEFT saves the first. The others have its config and its header, which is what PEFT would write, too.
    """
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS)
    model = get_peft_model(base_model(shape, dtype), config, 'first', autocast_adapter_dtype=False)
    model.save_pretrained(folder, selected_adapters=['first'])
    written, config_file = (folder / 'first' / name for name in (_WEIGHTS, _CONFIG))
    content = written.read_bytes()
    begin = 8 + int.from_bytes(content[:8], 'little')
    elements = (len(content) - begin) // dtype.itemsize
    config_content = config_file.read_bytes()
    for number in range(count):
        own = folder / f'lora_{number}'
        own.mkdir()
        (own / _CONFIG).write_bytes(config_content)
        values = (torch.randn(elements) * 0.1).to(dtype).view(torch.uint8).numpy()
        with open(own / _WEIGHTS, 'wb') as f:
            f.write(content[:begin])
            f.write(values)
    for file in (folder / 'first').iterdir():
        file.unlink()
    (folder / 'first').rmdir()
    (folder / 'README.md').unlink(missing_ok=True)
    # What is not on the disk yet cannot be dropped from the page cache.
    os.sync()
    return folder


class NeverSeen:
    """Names that a library knows nothing of, however often their files were read: each is new.

    Args:
        library: the library.
        paths: the checkpoints, which are taken by turns.
    """

    def __init__(self, library: AdapterLibrary, paths: Iterable[Path]):
        self._library = library
        self._paths = list(paths)
        random.Random(0).shuffle(self._paths)
        self._taken: List[str] = []
        self._count = 0

    def take(self, count: int) -> List[str]:
        """Returns names of so many files, which are in the library now. Those that were taken before leave it."""
        for name in self._taken:
            self._library.remove(name)
        self._taken = [f'never_seen_{number}' for number in range(self._count, self._count + count)]
        for name in self._taken:
            self._library.add(name, self._paths[self._count % len(self._paths)])
            self._count += 1
        return self._taken


def read_all(folder: Path) -> None:
    """Puts all tensors into the page cache."""
    for file in folder.glob(f'*/{_WEIGHTS}'):
        file.read_bytes()


def drop(folder: Path) -> bool:
    """Puts the files of a checkpoint out of the page cache, and returns whether they are out."""
    return all([_dropped(folder / name) for name in (_CONFIG, _WEIGHTS)])


def _dropped(file: Path) -> bool:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        # Reads only what needs no waiting for the disk.
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except (AttributeError, OSError):  # not Linux, or a file system that knows no such reads
        return False
    finally:
        os.close(fd)
    return False


def loaded(folder: Path, names: Sequence[str], shape: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Returns a model with adapters loaded into it, as PEFT does it."""
    first, *others = names
    model = PeftModel.from_pretrained(base_model(shape, dtype), folder / first, first, autocast_adapter_dtype=False)
    for name in others:
        model.load_adapter(folder / name, name, autocast_adapter_dtype=False)
    return model
