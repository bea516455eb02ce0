"""Puts the table of patches in force, takes it back, and tells.

Nothing here imports ms-swift or PEFT: what is not imported yet is patched right after its import, by wrapt's
post-import hooks.
"""
import importlib
import logging
import pkgutil
import sys
import threading
import wrapt
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable, Iterator, Optional, Set, Tuple

from .releases import unsupported
from .table import PATCHES, Patch

logger = logging.getLogger(__name__)

# The package that `Patch.source` is in.
_PACKAGE = __package__.rpartition('.')[0]
_MISSING = object()
# What stood where a patch is in force now, to be put back; None for one that is not needed. Filled when a patch is
# made, emptied by `revert`.
_originals: Dict[Patch, Optional[Tuple[type, str, Any]]] = {}
# The patches that are to be made as soon as their modules are imported: set by `apply`, cleared by `revert`.
_wanted: Set[Patch] = set()
# Whether it was said, since the last `apply`, that the releases that are installed are not supported.
_has_warned = False
# The modules that have a post-import hook. Never cleared, for wrapt cannot take a hook back; hooks ask `_wanted`.
_hooked: Set[str] = set()
# The modules of this package that import what is patched. Whoever imports one of them first imports PEFT with it half
# made, so that the patch must wait until it is whole.
_OWN_MODULES = (f'{__package__}.fixes', *(f'{_PACKAGE}.{folder}.{found.name}' for folder in ('lora', 'model', 'compose')
                                          for found in pkgutil.iter_modules([str(Path(__file__).parents[1] / folder)])))
# Guards all of the above. Reentrant: patching imports modules of this package, which may import a hooked module.
_lock = threading.RLock()


def apply() -> None:
    """Puts `PATCHES` in force, each as soon as its module is imported. A repeated call is a no-op.

    With releases of ms-swift or PEFT that are not supported it patches nothing, and warns once they are imported.
    """
    global _has_warned
    _has_warned = False
    _wanted.update(PATCHES)
    _patch_imported()
    for module in (*dict.fromkeys(patch.after for patch in PATCHES), *_OWN_MODULES):
        if module not in _hooked:
            _hooked.add(module)
            # Outside of the lock: the thread that is importing the module would wait for it with its import lock held.
            wrapt.register_post_import_hook(_patch_imported, module)


def revert() -> None:
    """Puts back the very objects that `apply` replaced and removes what it added. A repeated call is a no-op."""
    _take_back(PATCHES)


@contextmanager
def reverted() -> Iterator[None]:
    """Within it, ms-swift and PEFT do what they do by themselves. Fixes stay: without them there is nothing to do."""
    taken_back = [patch for patch in PATCHES if not patch.is_fix and patch in _wanted]
    _take_back(taken_back)
    try:
        yield
    finally:
        _wanted.update(taken_back)
        _patch_imported()


def is_applied() -> bool:
    """Returns whether the patches are in force, or will be as soon as their modules are imported."""
    return why_not_applied() is None


def why_not_applied() -> Optional[str]:
    """Returns why the patches are not in force, in a text for users; None where `is_applied`."""
    if not _wanted.issuperset(PATCHES):
        return 'The patch is switched off: unset SWIFT_PATCH_DISABLE, or call swift_patch.apply().'
    return unsupported()


def in_force() -> Tuple[Patch, ...]:
    """Returns the patches whose modules are imported and that stand in them now."""
    return tuple(patch for patch in PATCHES if _originals.get(patch) is not None)


def needless() -> Tuple[Patch, ...]:
    """Returns the patches that the imported ms-swift and PEFT do not need, or have themselves."""
    return tuple(patch for patch in PATCHES if patch in _originals and _originals[patch] is None)


def _take_back(patches: Iterable[Patch]) -> None:
    with _lock:
        for patch in patches:
            _wanted.discard(patch)
            replaced = _originals.pop(patch, None)
            if replaced is None:
                continue
            owner, attribute, original = replaced
            if original is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, original)


def _patch_imported(imported: Optional[ModuleType] = None) -> None:
    """Makes the patches whose modules are imported. `imported` is the one that was imported just now, if any."""
    with _lock:
        for patch in PATCHES:
            if patch not in _wanted or patch in _originals or not _is_whole(patch.after, imported):
                continue
            if _is_refused():
                return
            if any(name in sys.modules and not _is_whole(name, imported) for name in _OWN_MODULES):
                continue
            class_name, attribute = patch.target.split('.')
            owner = getattr(importlib.import_module(patch.module), class_name)
            source, name = patch.source.split(':')
            new = getattr(importlib.import_module(f'{_PACKAGE}.{source}'), name)
            # From the class's own dict: an attribute's value would be bound, and could not be put back as it was.
            original = vars(owner).get(attribute, _MISSING)
            if patch.is_fix:
                stock = getattr(owner, attribute)
                new = new(stock)
                if new is stock:
                    _originals[patch] = None
                    continue
            setattr(owner, attribute, staticmethod(new) if isinstance(original, staticmethod) else new)
            _originals[patch] = owner, attribute, original


def _is_refused() -> bool:
    """Whether the installed releases are not supported, which is said once."""
    global _has_warned
    reason = unsupported()
    if reason is not None and not _has_warned:
        _has_warned = True
        # Not a Python warning, which would be raised into somebody's import where warnings are made errors.
        logger.warning(reason)
    return reason is not None


def _is_whole(name: str, imported: Optional[ModuleType]) -> bool:
    """Whether a module is imported to its end. Its own hook is called a moment before the import system says so."""
    module = sys.modules.get(name)
    if module is None:
        return False
    return module is imported or not getattr(module.__spec__, '_initializing', False)
