"""Which adapters there are on disk: the folders in a folder, or what a file lists. Imports no torch."""
import json
import os
from pathlib import Path
from typing import Any, Dict, Union

from ..errors import short_repr
from .checkpoint import CONFIG_NAME

PathLike = Union[str, 'os.PathLike[str]']


def paths_in_folder(folder: PathLike) -> Dict[str, str]:
    """Returns the folders in a folder by name, see `AdapterLibrary.from_folder`."""
    try:
        with os.scandir(folder) as entries:
            found = {
                entry.name: entry.path
                for entry in entries if not entry.name.startswith('.') and _is_folder(entry)
            }
    except OSError as e:
        raise ValueError(f'Cannot read the folder {os.fspath(folder)}: {e.strerror or e}.') from e
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        raise ValueError(f'{os.fspath(folder)} is expected to be a folder of checkpoints, found that it is a '
                         'checkpoint: give the folder above it, or a name for it.')
    if not found:
        raise ValueError(f'{os.fspath(folder)} is expected to have checkpoints in it, found no folder.')
    return dict(sorted(found.items()))


def expanded(path: str, folder: PathLike = '') -> str:
    """Returns a path in a folder with the user's home and variables in it; as it is where that is there."""
    if not (path.startswith('~') or '$' in path) or os.path.exists(os.path.join(folder, path)):
        return path
    return os.path.expandvars(os.path.expanduser(path))


def paths_in_manifest(file: PathLike) -> Dict[str, str]:
    """Returns the paths in a manifest by name, see `AdapterLibrary.from_manifest`."""
    folder = os.path.dirname(file)
    return {name: os.path.join(folder, expanded(path, folder)) for name, path in listed_in_manifest(file).items()}


def listed_in_manifest(file: PathLike) -> Dict[str, str]:
    """Returns what a manifest lists by name, as it is given there. Raises ValueError where it cannot be read."""
    prefix = f'The manifest {os.fspath(file)}'
    try:
        text = Path(file).read_text(encoding='utf-8-sig')
    except (OSError, ValueError) as e:
        raise ValueError(f'{prefix} cannot be read: {getattr(e, "strerror", None) or e}.') from e
    pairs = []
    try:
        # An object is a tuple here, an array a list.
        data: Any = json.loads(text, object_pairs_hook=tuple)
        # One line alone may be that of an adapter.
        if not isinstance(data, tuple) or {key for key, _ in data} == {'name', 'path'}:
            raise ValueError('These are lines.')
        pairs = [(item[0], item[1], f'of {short_repr(item[0])}') for item in data]
    except (ValueError, TypeError, RecursionError):
        for number, line in enumerate(text.split('\n'), start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                pairs.append((item['name'], item['path'], f'in line {number}'))
            except (ValueError, TypeError, KeyError, RecursionError) as e:
                raise ValueError(f'{prefix} is expected to be a JSON object of names and paths, or lines of '
                                 f'{{"name": ..., "path": ...}}, found {short_repr(line)} in line {number}.') from e
    found: Dict[str, str] = {}
    for name, path, where in pairs:
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            raise ValueError(f'{prefix} is expected to have a name and a path {where}, found {short_repr(name)} and '
                             f'{short_repr(path)}.')
        if name in found:
            raise ValueError(f'{prefix} names adapter {short_repr(name)} twice, again {where}.')
        found[name] = path
    if not found:
        raise ValueError(f'{prefix} is expected to list adapters, found none.')
    return found


def _is_folder(entry: 'os.DirEntry[str]') -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
