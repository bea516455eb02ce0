"""An ms-swift that has the functions itself, as `swift-patch upstream` puts them into it.

They are taken from there then, so that there is one of each: the modules of `weighted_adapter` are ms-swift's.
"""
import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Optional

OURS, THEIRS = f'{__package__}.weighted_adapter', 'swift.tuners.weighted_adapter'


def ms_swift_has_it() -> bool:
    """Returns whether the installed ms-swift has the functions itself. Does not import it."""
    try:
        spec = find_spec('swift')
    except ValueError:  # a `swift` that was put into sys.modules by hand
        return False
    for folder in (spec.submodule_search_locations if spec else None) or ():
        ours, caller = (Path(folder, 'tuners', name) for name in ('weighted_adapter/weighted.py', 'base.py'))
        # A checkout that went back to another branch may have the folder left, with nothing that calls it.
        if ours.is_file() and caller.is_file() and b'.weighted_adapter' in caller.read_bytes():
            return True
    return False


class _Alias(MetaPathFinder, Loader):
    """Imports ms-swift's modules under the names of ours."""

    def __init__(self) -> None:
        self._specs: Dict[str, Optional[ModuleSpec]] = {}

    def find_spec(self, fullname: str, path: Any, target: Optional[ModuleType] = None) -> Optional[ModuleSpec]:
        if fullname == OURS or fullname.startswith(f'{OURS}.'):
            return spec_from_loader(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(THEIRS + spec.name[len(OURS):])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # It ran when it was imported under its own name, whose spec it keeps.
        module.__spec__ = self._specs[OURS + module.__name__[len(THEIRS):]]


# Decided once, before anything of `weighted_adapter` is imported.
IS_NEEDED = ms_swift_has_it()
if IS_NEEDED:
    sys.meta_path.insert(0, _Alias())
