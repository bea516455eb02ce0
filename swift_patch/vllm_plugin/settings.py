"""What a plain vLLM is told by its environment."""
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional

from ..lora.library import AdapterLibrary

# Where the adapters are: a folder of checkpoints, or a file that lists them.
ADAPTERS = 'SWIFT_PATCH_ADAPTERS'
# How much memory a worker keeps of the adapters that it read.
CACHE_BYTES = 'SWIFT_PATCH_CACHE_BYTES'
_MERGE_METHOD, _COMBINATION_TYPE = 'SWIFT_PATCH_MERGE_METHOD', 'SWIFT_PATCH_COMBINATION_TYPE'
_DENSITY, _MAX_SOURCES = 'SWIFT_PATCH_DENSITY', 'SWIFT_PATCH_MAX_SOURCES'


@dataclass(frozen=True)
class Settings:
    """What a server is told.

    Attributes:
        library: the adapters.
        max_sources: how many of them one request may merge.
        composer_args: arguments of `FusionComposer`.
    """
    library: AdapterLibrary
    max_sources: int
    composer_args: Dict[str, Any]

    @classmethod
    def from_environment(cls) -> 'Optional[Settings]':
        """Returns what the environment says, None where it names no adapters.

        Raises:
            ValueError: a variable is not one of its values, or there are no adapters.
        """
        place = os.environ.get(ADAPTERS)
        if not place:
            return None
        library = (AdapterLibrary.from_manifest if os.path.isfile(place) else AdapterLibrary.from_folder)(place)
        composer_args: Dict[str, Any] = {'merge_method': os.environ.get(_MERGE_METHOD) or 'fusion'}
        if os.environ.get(_COMBINATION_TYPE):
            composer_args['combination_type'] = os.environ[_COMBINATION_TYPE]
        if os.environ.get(_DENSITY):
            composer_args['density'] = _number(_DENSITY)
        # What workers read, before there are some.
        positive_integer(CACHE_BYTES, 1)
        return cls(library, positive_integer(_MAX_SOURCES, 8), composer_args)


def positive_integer(variable: str, default: int) -> int:
    """Returns the value of a variable of the environment. Raises ValueError where it is no positive integer."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or not int(text):
        raise ValueError(f'{variable} is expected to be a positive integer, found {text!r}.')
    return int(text)


def _number(variable: str) -> float:
    try:
        return float(os.environ[variable])
    except ValueError:
        raise ValueError(f'{variable} is expected to be a number, found {os.environ[variable]!r}.') from None
