"""Numbers that users give: weights, densities, quantiles."""
import ctypes
import hashlib
import json
import math
from numbers import Integral, Real
from typing import Any, List, Optional

from ..errors import short_repr


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


def check_positive(argument: str, value: Any) -> None:
    """Raises ValueError where an argument is not a positive integer."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{argument} is expected to be a positive integer, found {short_repr(value)}.')


def checked_seeds(seeds: Any, count: int) -> Optional[List[int]]:
    """Returns a seed for each of `count` samples as a list, or None for None.

    Raises:
        TypeError: they are not a list of integers.
        ValueError: there are not as many, or one is not between 0 and 2**63 - 1.
    """
    if seeds is None:
        return None
    try:
        found = list(seeds)
    except TypeError as e:
        raise TypeError(f'seeds is expected to be a list of integers, found {short_repr(seeds)}.') from e
    if not all(isinstance(seed, Integral) and not isinstance(seed, bool) for seed in found):
        raise TypeError(f'seeds is expected to hold integers, found {short_repr(found)}.')
    if len(found) != count or not all(0 <= seed < 2**63 for seed in found):
        raise ValueError(f'seeds is expected to hold an integer from 0 to 2**63 - 1 for each of {count} samples, found '
                         f'{len(found)}: {short_repr(found)}.')
    return [int(seed) for seed in found]


def derived_seed(*parts: Any) -> int:
    """Returns a seed that has nothing to do with those derived from other parts, which are numbers and texts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7], 'big')
