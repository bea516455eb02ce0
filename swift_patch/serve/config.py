"""What one server is."""
from dataclasses import dataclass, field
from typing import Any, Dict, Literal, Mapping, Sequence

# Where nobody else can reach a server.
LOOPBACK = ('127.0.0.1', 'localhost', '::1')


@dataclass(frozen=True)
class Limits:
    """What requests may ask of a server.

    Attributes:
        max_sources: How many adapters one request may merge.
        max_body_bytes: How large its body may be.
        max_waiting: How many requests may wait for a batch.
        max_seconds: How long one request may take, from its body to the end of its answer.
        max_shutdown_seconds: How long those that run may go on when the server is told to end.
    """
    max_sources: int = 8
    max_body_bytes: int = 32 * 2**20
    max_waiting: int = 1000
    max_seconds: float = 600.
    max_shutdown_seconds: float = 60.


@dataclass
class DeployConfig:
    """What one server is.

    Attributes:
        adapters: Where the checkpoint of each named adapter is: a path, or an id on a hub.
        swift_args: Arguments of ms-swift's `DeployArguments` (`model`, `host`, `port`, `api_key`, `served_model_name`,
            `max_new_tokens`, ...). As in `swift deploy`, what is not given comes from the args.json of the first
            adapter that has one; `host` is 127.0.0.1 by default.
        merge_method: How requests are merged that do not say: 'fusion', 'mixture' or 'selection'.
        composer_args: Further arguments of `FusionComposer` (`combination_type`, `density`, ...).
        max_batch_size: How many requests are answered together at most.
        compile_merging: Merge by a compiled kernel, see `swift_patch.compile_merging`.
        cache_bytes: How much memory may hold adapters that were read before, on each device.
        limits: What requests may ask for.
        adapter_folders: Where adapters may be that come while it runs; without any, none can come or go.
        ui: Whether there is a page to try mixtures on.
    """
    adapters: Mapping[str, str]
    swift_args: Dict[str, Any] = field(default_factory=dict)
    merge_method: Literal['fusion', 'mixture', 'selection'] = 'fusion'
    composer_args: Dict[str, Any] = field(default_factory=dict)
    max_batch_size: int = 16
    compile_merging: bool = False
    cache_bytes: int = 2**30
    limits: Limits = field(default_factory=Limits)
    adapter_folders: Sequence[str] = ()
    ui: bool = False
