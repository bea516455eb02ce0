"""What is replaced where: one table, and the three functions that put it in force, take it back, and tell.

Nothing here imports ms-swift or PEFT: what is not imported yet is patched right after its import, by wrapt's
post-import hooks.
"""
import importlib
import pkgutil
import sys
import threading
import wrapt
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, NamedTuple, Optional, Set, Tuple


class Patch(NamedTuple):
    """One attribute that is replaced.

    Attributes:
        after: the module whose import is waited for; the classes are complete then.
        module: where the class is.
        target: the class and the attribute.
        source: `module:function` of `weighted_adapter`, which takes its place.
    """
    after: str
    module: str
    target: str
    source: str


PATCHES = (
    Patch('peft', 'peft.tuners.lora.model', 'LoraModel.add_weighted_adapter', 'weighted:add_weighted_adapter'),
    Patch('peft', 'peft.tuners.lora.model', 'LoraModel.update_weighted_adapter', 'weighted:update_weighted_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.base', 'SwiftModel.add_weighted_adapter',
          'weighted:swift_add_weighted_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.base', 'SwiftModel.update_weighted_adapter',
          'weighted:update_weighted_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.base', 'SwiftModel.set_active_adapters', 'activation:set_active_adapters'),
    Patch('swift.tuners.base', 'swift.tuners.lora', 'LoRA.activate_adapter', 'activation:activate_adapter'),
    Patch('swift.tuners.base', 'swift.tuners.utils', 'SwiftAdapter.offload', 'activation:offload_module'),
)

_MISSING = object()
# What stood where a patch is in force now, to be put back: filled when a patch is made, emptied by `revert`.
_originals: Dict[Patch, Tuple[type, str, Any]] = {}
# Whether the modules that are imported from now on are to be patched: set by `apply`, cleared by `revert`.
_is_wanted = False
# The modules that have a post-import hook. Never cleared, for wrapt cannot take a hook back; hooks ask `_is_wanted`.
_hooked: Set[str] = set()
# The modules of this package that import what is patched. Whoever imports one of them first imports PEFT with it half
# made, so that the patch must wait until it is whole.
_OWN_MODULES = tuple(f'{__package__}.weighted_adapter.{found.name}'
                     for found in pkgutil.iter_modules([str(Path(__file__).with_name('weighted_adapter'))]))
# Guards all of the above. Reentrant: patching imports modules of this package, which may import a hooked module.
_lock = threading.RLock()


def apply() -> None:
    """Puts `PATCHES` in force, each as soon as its module is imported. Doing it again changes nothing."""
    global _is_wanted
    _is_wanted = True
    _patch_imported()
    for module in (*dict.fromkeys(patch.after for patch in PATCHES), *_OWN_MODULES):
        if module not in _hooked:
            _hooked.add(module)
            # Outside of the lock: the thread that is importing the module would wait for it with its import lock held.
            wrapt.register_post_import_hook(_patch_imported, module)


def revert() -> None:
    """Puts back the very objects that `apply` replaced and removes what it added. Doing it again changes nothing."""
    global _is_wanted
    with _lock:
        _is_wanted = False
        while _originals:
            _, (owner, attribute, original) = _originals.popitem()
            if original is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, original)


@contextmanager
def reverted() -> Iterator[None]:
    """Within it, ms-swift and PEFT are as they were."""
    revert()
    try:
        yield
    finally:
        apply()


def is_applied() -> bool:
    """Returns whether the patches are in force, or will be as soon as their modules are imported."""
    return _is_wanted


def in_force() -> Tuple[Patch, ...]:
    """Returns the patches whose modules are imported and that stand in them now."""
    return tuple(patch for patch in PATCHES if patch in _originals)


def _patch_imported(imported: Optional[ModuleType] = None) -> None:
    """Makes the patches whose modules are imported. `imported` is the one that was imported just now, if any."""
    with _lock:
        for patch in PATCHES:
            if not _is_wanted or patch in _originals or not _is_whole(patch.after, imported):
                continue
            if any(name in sys.modules and not _is_whole(name, imported) for name in _OWN_MODULES):
                continue
            class_name, attribute = patch.target.split('.')
            owner = getattr(importlib.import_module(patch.module), class_name)
            source, name = patch.source.split(':')
            new = getattr(importlib.import_module(f'{__package__}.weighted_adapter.{source}'), name)
            # From the class's own dict: an attribute's value would be bound, and could not be put back as it was.
            original = vars(owner).get(attribute, _MISSING)
            setattr(owner, attribute, staticmethod(new) if isinstance(original, staticmethod) else new)
            _originals[patch] = owner, attribute, original


def _is_whole(name: str, imported: Optional[ModuleType]) -> bool:
    """Whether a module is imported to its end. Its own hook is called a moment before the import system says so."""
    module = sys.modules.get(name)
    if module is None:
        return False
    return module is imported or not getattr(module.__spec__, '_initializing', False)
