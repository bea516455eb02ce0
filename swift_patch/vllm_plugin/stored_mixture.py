"""A composition of stored adapters as the path of vLLM's requests for adapters: all that a worker needs to merge it."""
import hashlib
import json
import weakref
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Dict, Tuple

from ..errors import short_repr
from ..lora.combination import MergeOptions
from ..lora.composition import Composition
from ..lora.library import AdapterLibrary
from ..lora.stored import StoredAdapter

# What tells such a path from one of a file system.
_PREFIX = 'swift_patch:'
_DEFAULTS = asdict(MergeOptions())
# vLLM counts its own adapters from 1 on, and keeps numbers in 64 bits.
_FIRST_ID = 2**32

_digests: 'weakref.WeakKeyDictionary[StoredAdapter, str]' = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class StoredSource:
    """An adapter on disk, as it was when it was looked at.

    Attributes:
        name: what it is called.
        folder: its checkpoint.
        digest: see `AdapterCheckpoint.digest`. It is the same on another machine.
        mtime_ns: when its tensors were written.
    """
    name: str
    folder: str
    digest: str
    mtime_ns: int

    @classmethod
    def of(cls, library: AdapterLibrary, name: str) -> 'StoredSource':
        """Returns an adapter of a library as its files are now. Raises ValueError where it cannot be fused."""
        stored = library.stored(name)
        return cls(name, str(library.path(name)), digest_of(stored), stored.signatures[1][3])


@dataclass(frozen=True)
class StoredMixture:
    """A composition with the places of its sources.

    Attributes:
        sources: the adapters; one may come several times.
        weights: a weight for each.
        options: how to merge.
    """
    sources: Tuple[StoredSource, ...]
    weights: Tuple[float, ...]
    options: MergeOptions

    @classmethod
    def of(cls, composition: Composition, library: AdapterLibrary) -> 'StoredMixture':
        """Returns a composition of a library's adapters, as their files are now.

        Raises:
            ValueError: there is no such adapter, or it cannot be fused.
        """
        found = {name: StoredSource.of(library, name) for name in dict.fromkeys(composition.sources)}
        return cls(tuple(found[name] for name in composition.sources), composition.weights, composition.options)

    @classmethod
    def parse(cls, path: str) -> 'StoredMixture':
        """Returns what was made a path of by `path`. Raises ValueError where it is damaged."""
        try:
            content = json.loads(path.removeprefix(_PREFIX))
            sources = tuple(StoredSource(*source) for source in content['sources'])
            return cls(sources, tuple(content['weights']), MergeOptions(**content['options']).checked())
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f'A path of a mixture is expected, found {short_repr(path)}: it is made by the resolver of '
                'swift_patch alone.') from e

    @cached_property
    def path(self) -> str:
        """What `parse` takes. What differs in it differs in what is merged, or in when that was written."""
        options: Dict[str, Any] = {key: value for key, value in asdict(self.options).items() if value != _DEFAULTS[key]}
        content = {
            'sources': [[source.name, source.folder, source.digest, source.mtime_ns] for source in self.sources],
            'weights': self.weights,
            'options': options
        }
        return _PREFIX + json.dumps(content, separators=(',', ':'))

    @property
    def lora_id(self) -> int:
        """The number that vLLM knows it by. Servers that know nothing of each other find the same."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return _FIRST_ID + int.from_bytes(digest[:7], 'big')

    @property
    def composition(self) -> Composition:
        """The composition of adapters by name. Raises ValueError or TypeError where the path was not checked."""
        return Composition.of([source.name for source in self.sources], self.weights, self.options)


def is_mixture(path: str) -> bool:
    """Returns whether a path is that of a mixture."""
    return path.startswith(_PREFIX)


def digest_of(stored: StoredAdapter) -> str:
    """Returns the digest of an adapter that was looked at, which is computed once."""
    if stored not in _digests:
        _digests[stored] = stored.checkpoint.digest()
    return _digests[stored]
