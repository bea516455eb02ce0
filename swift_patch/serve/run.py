"""Running a server: its model is loaded, then it listens until it is told to end."""
import asyncio
import logging
import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Awaitable, Callable, List, Optional, TypeVar

from ..inference.arguments import swift_arguments
from ..inference.backends import check_backend, import_backend
from ..inference.checkpoints import check_base_model, find_checkpoints
from ..inference.config import Stage, no_stage
from ..inference.engine import load_engine
from ..patching import why_not_applied
from .config import LOOPBACK, DeployConfig

logger = logging.getLogger(__name__)

_T = TypeVar('_T')

if TYPE_CHECKING:
    from socket import socket

    from .app import FusionDeploy


def make_server(config: DeployConfig, stage: Stage = no_stage) -> 'FusionDeploy':
    """Loads the model and returns the server, which does not listen yet.

    Args:
        config: The server.
        stage: Shows how far it is.

    Raises:
        ValueError: An option, an adapter or the model cannot be used.
    """
    _check(config)
    with stage('Looking at the adapters'):
        checkpoints = find_checkpoints(config.adapters, config.swift_args)
    with stage('Importing ms-swift'):
        import_backend(config)
        from ..lora.combination import options_of_method
        from ..lora.compiled import compile_merging
        from ..lora.library import AdapterLibrary
        from .app import FusionDeploy
        from .stock import ServerArguments
    if config.compile_merging:
        compile_merging()
    options_of_method(config.merge_method, **config.composer_args)
    with stage("Reading the model's configuration"):
        args = swift_arguments(
            # ms-swift would listen to everybody, and log what is asked and answered.
            {
                'host': LOOPBACK[0],
                'verbose': False,
                **config.swift_args
            },
            checkpoints,
            result_path=config.swift_args.get('result_path'),
            max_batch_size=config.max_batch_size,
            arguments_class=ServerArguments)
        # ms-swift 3 makes one up.
        args.result_path = args.result_path if config.swift_args.get('result_path') else None
        if args.task_type != 'causal_lm':
            raise ValueError(
                f'swift-patch deploy serves models that generate text, but this is one for {args.task_type}.')
        check_base_model(checkpoints, args.model_dir)
    library = AdapterLibrary({checkpoint.name: checkpoint.path
                              for checkpoint in checkpoints},
                             cache_bytes=config.cache_bytes)
    with stage('Loading the model'):
        engine = load_engine(
            args,
            library,
            max_batch_size=config.max_batch_size,
            max_sources=config.limits.max_sources,
            cache_bytes=config.cache_bytes,
            composer_args={
                'merge_method': config.merge_method,
                **config.composer_args
            })
    return FusionDeploy(args, engine, library, config)


def run_deploy(config: DeployConfig,
               stage: Stage = no_stage,
               on_ready: Callable[[str], object] = partial(print, flush=True)) -> None:
    """Serves until SIGTERM or SIGINT, at which requests that run are finished and no others are taken.

    Args:
        config: The server.
        stage: Shows how far it is.
        on_ready: Called with a sentence that says where it is, once it listens.

    Raises:
        ValueError: See `make_server`, or it cannot listen there.
    """
    deploy = _in_a_thread(partial(make_server, config, stage))
    import uvicorn
    args = deploy.args
    host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(args.host, args.host)
    url = f'{"https" if args.ssl_certfile else "http"}://{f"[{host}]" if ":" in host else host}:{args.port}'
    end_page: 'Optional[Callable[[], Awaitable[None]]]' = None
    if config.ui:
        from .page import mount_page
        end_page = mount_page(deploy.app, f'{url}/v1', args.api_key)
    if not (args.api_key or args.host in LOOPBACK):
        logger.warning(f'Everybody who can reach {args.host}:{args.port} can use this server: give an --api_key, or '
                       '--host 127.0.0.1 and a gateway in front.')

    class Server(uvicorn.Server):

        async def startup(self, sockets: 'Optional[List[socket]]' = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready(f'Serving {deploy.base} and {len(deploy.library):,} adapters at {url}')

        async def shutdown(self, sockets: 'Optional[List[socket]]' = None) -> None:
            ending = None if end_page is None else asyncio.ensure_future(end_page())
            await super().shutdown(sockets)
            if ending is not None:
                ending.cancel()

    server = Server(
        uvicorn.Config(
            deploy.app,
            host=args.host,
            port=args.port,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            log_level=args.log_level,
            timeout_graceful_shutdown=max(1, round(config.limits.max_shutdown_seconds))))
    # When it has ended, uvicorn raises the signal once more, which would end the process by it.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server.run()
    except SystemExit as e:  # uvicorn has said why
        raise ValueError(f'Cannot listen on {args.host}:{args.port}.') from e
    finally:
        signal.signal(signal.SIGTERM, before)
    deploy.close()


def _in_a_thread(make: Callable[[], _T]) -> _T:
    """Returns what `make` returns in a thread of its own, with which the threads that it computed with end.

    A thread of ms-swift's computes the answers. Threads that another one computed with, and that only wait, make OpenMP
    take the cores for overcommitted: on two of them, a batch then took 2.6 times as long.
    """
    made: List[_T] = []
    errors: List[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except BaseException as e:
            errors.append(e)

    # Nobody waits for it where this one is interrupted.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    for error in errors:
        raise error
    return made[0]


def _check(config: DeployConfig) -> None:
    """Raises ValueError for what can be told without ms-swift."""
    reason = why_not_applied()
    if reason is not None:
        raise ValueError(reason)
    check_backend(config)
    key = config.swift_args.get('api_key')
    # An empty one is that of a shell's variable that is not set, and ms-swift would let everybody in.
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ''):
        raise ValueError('--api_key is expected to be printable ASCII without spaces around it, found that it is '
                         f'{"empty" if not key else "not"}.')
    if config.adapter_folders and not key:
        raise ValueError('--adapter_folders lets requests add and remove adapters: give an --api_key, too.')
    for folder in config.adapter_folders:
        if not os.path.isdir(folder):
            raise ValueError(f'--adapter_folders is expected to name folders, found {folder}.')
    if config.ui:
        from .page import check_installed
        check_installed()
