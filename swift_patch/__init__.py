"""Fuse LoRAs per sample at a flat cost, in ms-swift and PEFT.

Importing the package applies its patch, unless the environment variable `SWIFT_PATCH_DISABLE` is set to 1. It imports
neither ms-swift nor PEFT nor torch: they are patched when they are imported.
"""
import os
from typing import TYPE_CHECKING, Any

from .patching import apply, is_applied, revert
from .patching.releases import unsupported

if TYPE_CHECKING:
    from .compose.composer import FusionComposer
    from .lora.compiled import compile_merging

__version__ = '0.1.0'
__all__ = ['FusionComposer', 'apply', 'compile_merging', 'is_applied', 'revert']


def __getattr__(name: str) -> Any:
    if name in ('FusionComposer', 'compile_merging'):
        reason = unsupported()
        if reason is not None:
            # Importing them would fail in some way of its own, or they would not work. An AttributeError would lose the
            # reason in `from swift_patch import FusionComposer`.
            raise ImportError(reason)
    if name == 'FusionComposer':
        from .compose.composer import FusionComposer
        return FusionComposer
    if name == 'compile_merging':
        from .lora.compiled import compile_merging
        return compile_merging
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


if os.environ.get('SWIFT_PATCH_DISABLE', '0').lower() not in ('1', 'true', 'yes', 'on'):
    apply()
