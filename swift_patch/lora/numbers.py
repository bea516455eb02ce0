"""Numbers that users give: weights, densities, quantiles."""
import ctypes
import hashlib
import json
import math
from numbers import Real
from typing import Any, List, Optional


def as_number(value: Any) -> Optional[float]:
    """Returns a real number of any kind as a float, infinite where it is too large for one; None for what is none."""
    try:
        if getattr(value, 'shape', None) == ():
            # A tensor or an array without dimensions.
            value = value.item()
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    except OverflowError:
        return math.inf
    except Exception:  # a tensor on the meta device has no value; an object may raise anything
        return None


def as_float32(value: float) -> float:
    """Returns a number rounded to float32, in which PEFT keeps weights; infinite where it is too large for that."""
    return ctypes.c_float(value).value


def is_finite_weight(value: float) -> bool:
    """Returns whether a weight is finite in float32, with which adapters are merged."""
    return math.isfinite(as_float32(value))


def equal_weights(count: int) -> List[float]:
    """Returns the weights of `count` sources that are given none: 1/k each (LoraRetriever, arXiv:2402.09997, §4.2)."""
    return [1 / count] * count


def derived_seed(*parts: Any) -> int:
    """Returns a seed that has nothing to do with those derived from other parts, which are numbers and texts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7], 'big')
