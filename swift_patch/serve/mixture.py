"""What a request asks for: which adapters, with which weights, merged how."""
import math
from typing import Any, Container, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from ..errors import short_repr
from ..lora.combination import MERGE_METHODS
from .errors import RequestError

# How the name of a model says how it is merged, among its adapters and their weights.
_METHOD = 'merge_method'


class Mixture(NamedTuple):
    """Adapters to merge.

    Attributes:
        adapters: Their names, none for the base model alone.
        weights: A weight for each, None for equal ones.
        merge_method: `fusion`, `mixture` or `selection`; None for that of the server.
    """
    adapters: Tuple[str, ...] = ()
    weights: Optional[Tuple[float, ...]] = None
    merge_method: Optional[str] = None

    def named(self, base: str) -> str:
        """Returns the model that asks for this, `a=0.6,b=0.4`; `base` where it has no adapters."""
        if not self.adapters:
            return base
        weights = self.weights or (1 / len(self.adapters), ) * len(self.adapters)
        if len(weights) == 1 and weights[0] == 1:
            parts = list(self.adapters)
        else:
            parts = [f'{name}={weight!r}' for name, weight in zip(self.adapters, weights)]
        return ','.join(parts + ([f'{_METHOD}={self.merge_method}'] if self.merge_method else []))


def asked_for(model: str,
              base: str,
              names: Container[str],
              *,
              adapters: Union[Sequence[str], Mapping[str, float], None] = None,
              weights: Optional[Sequence[float]] = None,
              merge_method: Optional[str] = None,
              lora: Optional[Sequence[Any]] = None) -> Mixture:
    """Returns what the fields of a request ask for.

    Args:
        model: The base model, an adapter, or `a,b` or `a=0.6,b=0.4`, with `,merge_method=mixture` or without.
        base: The name of the base model.
        names: The adapters that there are.
        adapters: Their names, or a mapping to weights.
        weights: A weight for each name.
        merge_method: `fusion`, `mixture` or `selection`.
        lora: In the form of llama.cpp's server: objects with a `name` and a `scale`, whose outputs are added.

    Raises:
        RequestError: They do not go together (400), or there is no such adapter or model (404).
    """
    if adapters is not None and lora is not None:
        raise RequestError(400, 'Either adapters or lora is expected, found both: leave one out.', param='lora')
    if adapters is None and lora is None:
        if weights is not None:
            raise RequestError(400, 'weights is expected beside adapters, found no adapters.', param='weights')
        found = _of_model(model, base, names, merge_method)
    else:
        if model != base:
            raise RequestError(
                404 if '=' not in model and ',' not in model and model not in names else 400,
                f'model is expected to be {base!r} where the request has adapters, found {short_repr(model)}.',
                param='model',
                code='model_not_found')
        if lora is not None:
            if weights is not None:
                raise RequestError(400, 'weights is expected beside adapters, found lora.', param='weights')
            found = Mixture(
                tuple(item.name for item in lora), tuple(float(item.scale) for item in lora), merge_method or 'mixture')
        elif isinstance(adapters, Mapping):
            if weights is not None:
                raise RequestError(
                    400, 'weights is expected to be left out where adapters has weights.', param='weights')
            found = Mixture(tuple(adapters), tuple(map(float, adapters.values())), merge_method)
        else:
            found = Mixture(
                tuple(adapters or ()), None if weights is None else tuple(map(float, weights)), merge_method)
    for name in found.adapters:
        if name not in names:
            raise RequestError(
                404,
                f'Adapter {short_repr(name)} does not exist: GET /v1/models lists those that do.',
                param='model' if adapters is None and lora is None else 'adapters',
                code='model_not_found')
    return found


def _of_model(model: str, base: str, names: Container[str], merge_method: Optional[str]) -> Mixture:
    if model == base:
        return Mixture()
    # A name may be anything.
    if model in names:
        return Mixture((model, ), None, merge_method)
    if '=' not in model and ',' not in model:
        raise RequestError(
            404,
            f'Model {short_repr(model)} does not exist: GET /v1/models lists {base!r} and its adapters, of which a '
            'mixture is `a=0.6,b=0.4`.',
            param='model',
            code='model_not_found')
    adapters: List[str] = []
    weights: List[float] = []
    for part in model.split(','):
        name, separator, value = part.rpartition('=') if '=' in part else (part, '', '')
        name = name.strip()
        if name == _METHOD:
            if merge_method not in (None, value):
                raise RequestError(
                    400,
                    f'{_METHOD} is expected to be said once, found {merge_method!r} and {short_repr(value)}.',
                    param=_METHOD)
            merge_method = value.strip()
            if merge_method not in MERGE_METHODS:
                raise RequestError(
                    400,
                    f'{_METHOD} is expected to be one of {list(MERGE_METHODS)}, found {short_repr(merge_method)}.',
                    param='model')
            continue
        adapters.append(name)
        if separator:
            weights.append(_number(part, value))
    if weights and len(weights) != len(adapters):
        raise RequestError(
            400,
            f'A mixture is expected to have a weight for each adapter or for none, found {short_repr(model)}.',
            param='model')
    if not adapters or not all(adapters):
        raise RequestError(400, f'A mixture is expected to be `a=0.6,b=0.4`, found {short_repr(model)}.', param='model')
    return Mixture(tuple(adapters), tuple(weights) or None, merge_method)


def _number(part: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(
            400, f'A mixture is expected to have finite numbers as weights, found {short_repr(part)}.', param='model')
    return value
