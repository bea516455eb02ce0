"""How an error message shows what was found."""
import reprlib
from typing import Any


class _Short(reprlib.Repr):

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 80
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxdict = 10

    def repr1(self, x: Any, level: int) -> str:
        try:
            return super().repr1(x, level)
        except Exception:  # integers of more than 4300 digits, for one, have no repr
            return f'<{type(x).__name__} without a repr>'


def short_repr(value: Any) -> str:
    """Returns the repr of any value, cut where it is long. Never raises, also where the value's own repr does."""
    return _Short().repr(value)
