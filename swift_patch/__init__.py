"""Fuse LoRAs per sample at a flat cost, in ms-swift and PEFT.

Importing the package applies its patch, unless the environment variable `SWIFT_PATCH_DISABLE` is set to 1. It imports
neither ms-swift nor PEFT nor torch: they are patched when they are imported.
"""
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .patching import apply, is_applied, revert
from .patching.releases import unsupported

if TYPE_CHECKING:
    from .compose.composer import FusionComposer
    from .compose.engine import FusionEngine
    from .errors import RowsError
    from .lora.compiled import compile_merging
    from .lora.library import AdapterLibrary

__version__ = '0.1.0'
__all__ = [
    'AdapterLibrary', 'FusionComposer', 'FusionEngine', 'RowsError', 'apply', 'compile_merging', 'is_applied', 'revert'
]

# Where the names are that import torch, PEFT or ms-swift.
_LAZY = {
    'AdapterLibrary': 'lora.library',
    'FusionComposer': 'compose.composer',
    'FusionEngine': 'compose.engine',
    'RowsError': 'errors',
    'compile_merging': 'lora.compiled',
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        reason = unsupported()
        if reason is not None:
            # Importing them would fail in some way of its own, or they would not work. An AttributeError would lose the
            # reason in `from swift_patch import FusionComposer`.
            raise ImportError(reason)
        return getattr(import_module(f'.{_LAZY[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


if os.environ.get('SWIFT_PATCH_DISABLE', '0').lower() not in ('1', 'true', 'yes', 'on'):
    apply()
