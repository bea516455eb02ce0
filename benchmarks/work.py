"""How much work something is, counted instead of timed: the same on every machine, however busy it is."""
import sys
import torch
from measure import Ratio
from torch.utils._python_dispatch import TorchDispatchMode
from typing import Any, Callable, List, Tuple


class Writes(TorchDispatchMode):
    """Within it, counts operations of PyTorch that write, and the elements that they write.

    Attributes:
        operations: how many operations.
        elements: how many elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, (list, tuple)) else [result]
        # A view is an alias of what it is a view of, and writes nothing.
        written = [
            value.numel() for value, schema in zip(returned, func._schema.returns)
            if isinstance(value, torch.Tensor) and (schema.alias_info is None or schema.alias_info.is_write)
        ]
        if written:
            self.operations += 1
            self.elements += sum(written)
        return result


def writes(candidate: Callable[[], Any]) -> Writes:
    """Returns what a call writes."""
    with Writes() as found:
        candidate()
    return found


def calls(candidate: Callable[[], Any]) -> int:
    """Returns how many functions a call calls, of Python and of C."""
    count = 0

    def count_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ('call', 'c_call')

    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        candidate()
    finally:
        sys.setprofile(before)
    return count


def over(count: float, yardstick: float) -> Ratio:
    """Returns a count over another, as a measurement of the gate."""
    return Ratio(count / yardstick)


def counted(owner: Any, name: str, candidate: Callable[[], Any]) -> int:
    """Returns how often `owner.name`, a function of a class or a module, is called within a call."""
    original = getattr(owner, name)
    found: List[Tuple[Any, ...]] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        found.append(args)
        return original(*args, **kwargs)

    setattr(owner, name, counting)
    try:
        candidate()
    finally:
        setattr(owner, name, original)
    return len(found)
