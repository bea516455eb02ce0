"""The suite pointed at an ms-swift that `swift-patch upstream` edited: `pytest tests/weighted_adapter --ms-swift PATH`.

There is no swift_patch then: its name stands for nothing but the modules that the edit put into ms-swift. Stock, the
oracle, is what the installed ms-swift says that was not edited.
"""
import ast
import importlib
import os
import pkgutil
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, Tuple

OURS, THEIRS = 'swift_patch.weighted_adapter', 'swift.tuners.weighted_adapter'
# What the edit changed or added, by module and class.
EDITED = {
    ('swift.tuners.base', 'SwiftModel'): ['add_weighted_adapter', 'set_active_adapters', 'update_weighted_adapter'],
    ('swift.tuners.lora', 'LoRA'): ['activate_adapter'],
    ('swift.tuners.utils', 'SwiftAdapter'): ['offload'],
    ('peft.tuners.lora.model', 'LoraModel'): ['add_weighted_adapter', 'update_weighted_adapter'],
}
# The folder of packages in which stock is; set by `point_at`.
_stock_root: str = ''


def point_at(path: str) -> None:
    """Makes `swift` the edited one and `swift_patch` nothing but what it has. Before anything imports either."""
    global _stock_root
    assert not {'swift', 'swift_patch'} & set(sys.modules)
    _stock_root = str(Path(find_spec('swift').origin).parent.parent)
    assert Path(_stock_root) != Path(path).resolve(), 'the edited ms-swift hides the installed one, which is the oracle'
    sys.path.insert(0, str(Path(path).resolve()))
    # For processes that tests start.
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get('PYTHONPATH')]))
    absent = ModuleType('swift_patch')
    absent.__path__ = []
    sys.modules['swift_patch'] = absent
    package = sys.modules[OURS] = absent.weighted_adapter = importlib.import_module(THEIRS)
    assert Path(package.__file__).is_relative_to(Path(path).resolve()), package.__file__
    for found in pkgutil.iter_modules(package.__path__):
        sys.modules[f'{OURS}.{found.name}'] = importlib.import_module(f'{THEIRS}.{found.name}')


@contextmanager
def stock() -> Iterator[None]:
    """Within it, ms-swift and PEFT do what they do by themselves."""
    if not _stock_root:
        from swift_patch.patching import reverted
        with reverted():
            yield
        return
    edited = []
    for (module, class_name), names in EDITED.items():
        owner = getattr(importlib.import_module(module), class_name)
        for name in names:
            edited.append((owner, name, vars(owner)[name]))
            function = _stock_function(module, class_name, name)
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in edited:
            setattr(owner, name, function)


_functions: Dict[Tuple[str, str, str], Any] = {}


def _stock_function(module: str, class_name: str, name: str) -> Any:
    """Returns a function of stock that finds its names in the edited module; None where stock has none."""
    key = module, class_name, name
    if key not in _functions:
        path = Path(_stock_root, *module.split('.')).with_suffix('.py')
        [class_def] = [node for node in ast.parse(path.read_text()).body if getattr(node, 'name', '') == class_name]
        functions = [node for node in class_def.body if getattr(node, 'name', '') == name]
        scope: Dict[str, Any] = {}
        exec(compile(ast.Module(functions, []), str(path), 'exec'), vars(importlib.import_module(module)), scope)
        _functions[key] = scope.get(name)
    return _functions[key]
