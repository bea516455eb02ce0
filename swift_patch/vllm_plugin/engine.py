"""ms-swift's engine around vLLM, in which every request has its own composition of adapters."""
import asyncio
import os
import threading
import time
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from copy import copy
from dataclasses import replace
from swift.infer_engine import RequestConfig, VllmEngine
from swift.utils import start_event_loop_in_daemon
from typing import Any, AsyncIterator, Callable, Coroutine, Dict, Iterator, Mapping, NamedTuple, Optional, TypeVar
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ..compose.composer import FusionComposer, Sample
from ..compose.requests import ComposedInference, ComposedRequest, EncodedRequest, EngineEnded
from ..compose.tickets import Ticket
from ..errors import reason_of, short_repr
from ..lora.composition import Composition
from ..lora.library import AdapterLibrary
from .children import starting_children
from .loads import Loads
from .mixtures import LORA_RANKS, Mixtures, lora_options
from .settings import CACHE_BYTES

_T = TypeVar('_T')

_ENDED = 'The engine of vLLM ended: its log says why.'
# What `torchrun` tells a rank. vLLM would take its processes for other ranks of the same run.
_OF_RANKS = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'GROUP_WORLD_SIZE', 'ROLE_RANK',
             'ROLE_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')


class _Asked(NamedTuple):
    """What ms-swift hands on with a request in the place of its own kind of adapter."""
    lora_request: Optional[LoRARequest]
    ticket: Ticket


class VllmFusionEngine(ComposedInference, VllmEngine):  # type: ignore[misc]  # ms-swift has no types
    """ms-swift's engine around vLLM, in which each request has its own fusion of LoRAs.

    Requests are answered as they come, those of different compositions together. The workers of vLLM merge, each once
    for all requests of one composition, and keep what they merged for a while. All requests go to vLLM from one event
    loop: that in which `infer_async` is called first or, where `infer` comes first, one in a thread of its own.

    Args:
        model_id_or_path: The base model.
        library: The adapters.
        max_num_seqs: How many answers are computed at a time.
        max_loras: How many different compositions are computed at a time; each takes memory of its own. By default
            `max_num_seqs`.
        max_lora_rank: The largest rank that a composition may have, one of vLLM's. By default what `max_sources`
            adapters of the library need.
        max_sources: How many adapters one request merges; by default all. Only outputs that are averaged need more
            rank for more.
        cache_bytes: How much memory each worker keeps of the adapters that it read.
        composer_args: Arguments of `FusionComposer`: `merge_method`, `combination_type`, ...
        **options: Arguments of ms-swift's `VllmEngine`. In its `engine_kwargs`, `max_cpu_loras` is how many
            compositions the workers keep.

    Attributes:
        on_batch: Called with how many answers are computed at a time, where one is begun.
        merges_here: False: the workers of vLLM read and merge adapters.

    Raises:
        TypeError: See `FusionComposer`.
        ValueError: See `FusionComposer`, an adapter does not fit the model, the rank does not suffice, or vLLM cannot
            start.

    Example:
        >>> engine = VllmFusionEngine('Qwen/Qwen2.5-7B-Instruct', library, max_num_seqs=64)
        >>> engine.infer(requests, RequestConfig(max_tokens=64), compositions=[['sql', 'math'], {'legal': 1.0}, None])
    """
    merges_here = False
    template: Any
    max_num_seqs: int
    max_loras: Optional[int]
    max_lora_rank: Optional[int]

    def __init__(self,
                 model_id_or_path: str,
                 library: AdapterLibrary,
                 *,
                 max_num_seqs: int = 16,
                 max_loras: Optional[int] = None,
                 max_lora_rank: Optional[int] = None,
                 max_sources: Optional[int] = None,
                 cache_bytes: Optional[int] = None,
                 composer_args: Optional[Mapping[str, Any]] = None,
                 **options: Any):
        self._library, self._max_sources, self._composer_args = library, max_sources, dict(composer_args or {})
        self._cache_bytes = cache_bytes
        self.on_batch: Callable[[int], None] = lambda size: None
        self._composing, self._generating = _Clock(), _Clock()
        self._num_running = 0
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._loop_lock = threading.Lock()
        super().__init__(
            model_id_or_path,
            use_async_engine=True,
            max_num_seqs=max_num_seqs,
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,
            enable_lora=True,
            **options)
        self._loads = Loads(self.engine, self._max_loaded)
        # A copy, for its way to encode is replaced; the user's stays as it is.
        self.template = copy(self.template)
        self._encode, self.template.encode = self.template.encode, self._encode_unless_encoded

    @classmethod
    def of_arguments(cls, args: Any, template: Any, library: AdapterLibrary, **options: Any) -> 'VllmFusionEngine':
        """Returns the engine that `swift infer` or `swift deploy` would make, for adapters of a library.

        Args:
            args: ms-swift's arguments, whose `vllm_max_lora_rank` may be None.
            template: ms-swift's template.
            library: The adapters.
            **options: See the class.
        """
        # ms-swift has no option for `max_loras`: it makes room for each adapter that it is given.
        options = {**args.get_vllm_engine_kwargs(), 'max_loras': None, **options}
        for name in ('enable_lora', 'use_async_engine'):
            del options[name]
        engine_kwargs = dict(options.pop('engine_kwargs', None) or {})
        if args.vllm_data_parallel_size > 1:
            engine_kwargs.setdefault('data_parallel_size', args.vllm_data_parallel_size)
        if getattr(args, 'max_logprobs', None) is not None:
            # Those of a server.
            engine_kwargs.setdefault('max_logprobs', args.max_logprobs)
        return cls(
            args.model_dir,
            library,
            template=template,
            model_type=args.model_type,
            torch_dtype=args.torch_dtype,
            seed=args.seed,
            engine_kwargs=engine_kwargs,
            **options)

    @property
    def composer(self) -> FusionComposer:
        """What makes and checks compositions. Its model has no values."""
        return self._mixtures.composer

    @property
    def seconds_composing(self) -> float:
        """The seconds in which vLLM was loading compositions since the engine was made."""
        return self._composing.seconds

    @property
    def seconds_generating(self) -> float:
        """The seconds in which something was answered. Compositions are loaded meanwhile, too."""
        return self._generating.seconds

    @property
    def is_alive(self) -> bool:
        """Whether it can answer."""
        return not self.engine.errored

    def fresh_seed(self) -> None:
        """Returns None: vLLM draws for each request by itself, and faster without a seed."""

    async def infer_async(self,
                          infer_request: Any,
                          request_config: Any = None,
                          *,
                          composition: Optional[Sample] = None,
                          adapter_request: None = None,
                          **kwargs: Any) -> Any:
        """Answers a request, together with others that are there, whatever their compositions and settings.

        Where it is cancelled, or a stream closed, nothing of it goes on.

        Args:
            infer_request: The request.
            request_config: How to generate.
            composition: What `FusionComposer.compose` takes, None for the base model.
            adapter_request: None: the composition takes its place.
            **kwargs: See ms-swift.

        Returns:
            The response; an asynchronous iterator of chunks where `request_config` asks for a stream.

        Raises:
            EngineEnded: The engine ended.
            RuntimeError: Another event loop asked it before.
            Exception: What was wrong with this request.
        """
        self._check_loop()
        if adapter_request is not None:
            raise ValueError(
                f'adapter_request is expected to be left out, found {short_repr(adapter_request)}: add the '
                'adapter to the library, and name it in a composition.')
        item = infer_request
        if not isinstance(item, ComposedRequest):
            item = ComposedRequest(infer_request, composition)
        config = request_config or RequestConfig()
        if item.seed is not None:
            config = replace(config, seed=item.seed)
        ticket = item.ticket or Ticket()
        asked = _Asked(await self._loaded(item.composition, ticket), ticket)
        return await super().infer_async(item.request, config, adapter_request=asked, **kwargs)

    def submit(self, coroutine: 'Coroutine[Any, Any, _T]') -> 'Future[_T]':
        """Runs a coroutine in the event loop in which vLLM is asked. Others may run there meanwhile."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._get_event_loop())

    def close(self, seconds: float = 0.) -> None:
        """Ends the processes of vLLM, and with them what is being answered, in about so many seconds at most."""
        self.engine.shutdown(timeout=seconds)

    def _check_loop(self) -> None:
        """Raises RuntimeError where another event loop asked vLLM before, which would wait there for ever."""
        running = asyncio.get_running_loop()
        with self._loop_lock:
            self._loop = self._loop or running
        if self._loop is not running:
            raise RuntimeError('vLLM is expected to be asked from one event loop, found another one: use '
                               '`engine.submit`.')

    def _get_event_loop(self) -> asyncio.AbstractEventLoop:
        with self._loop_lock:
            if self._loop is None:
                self._loop = start_event_loop_in_daemon(name='VllmFusionEngine')[1]
            return self._loop

    def _encode_unless_encoded(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        # What is made of it takes parts of it out.
        return dict(request.inputs) if isinstance(request, EncodedRequest) else self._encode(request, *args, **kwargs)

    # Where ms-swift makes vLLM.

    def _prepare_engine_kwargs(self, max_model_len: Optional[int], engine_kwargs: Optional[Mapping[str, Any]]) -> None:
        """Checks the adapters, and sets what vLLM needs for them where it is not given."""
        given = dict(engine_kwargs or {})
        for name in ('max_num_seqs', 'max_loras', 'max_lora_rank'):
            # ms-swift has arguments for these, and an option of vLLM's comes before.
            setattr(self, name, given.pop(name, None) or getattr(self, name))
        self._mixtures = Mixtures(self.config, self.model_info.torch_dtype, self._library, **self._composer_args)
        self.composer.check(list(self._library))
        max_loras = min(self.max_loras or self.max_num_seqs, self.max_num_seqs)
        options = lora_options(self._rank(), max_loras)
        self.max_lora_rank = self._mixtures.max_lora_rank = options.pop('max_lora_rank')
        self.max_loras = options.pop('max_loras')
        given = {**options, **given}
        self._max_loaded: int = given['max_cpu_loras']
        with _starting():
            super()._prepare_engine_kwargs(max_model_len, given)

    def _rank(self) -> int:
        """Returns the rank that vLLM makes room for. Raises ValueError where the adapters need more."""
        needed = self._mixtures.served_rank(list(self._library), self._max_sources)
        if self.max_lora_rank is None:
            return needed
        if self.max_lora_rank not in LORA_RANKS or self.max_lora_rank < needed:
            at_a_time = '' if self._max_sources is None else f', {self._max_sources} at a time at most'
            raise ValueError(f'--vllm_max_lora_rank is expected to be one of {list(LORA_RANKS)} and at least {needed} '
                             f'for these adapters{at_a_time}, found {self.max_lora_rank}: give {needed}, or leave it '
                             'out.')
        return self.max_lora_rank

    def _prepare_engine(self) -> None:
        environment = {} if self._cache_bytes is None else {CACHE_BYTES: str(max(1, self._cache_bytes))}
        num_devices = self.tensor_parallel_size * self.pipeline_parallel_size
        with _starting(), starting_children(**environment), _of_this_rank(num_devices):
            super()._prepare_engine()

    # Where ms-swift asks vLLM.

    def _prepare_generation_config(self, request_config: Any) -> Any:
        if request_config.num_beams > 1:
            raise ValueError(f'num_beams is expected to be 1 with vLLM, found {request_config.num_beams}.')
        return super()._prepare_generation_config(request_config)

    def _add_adapter(self, adapter_request: LoRARequest) -> LoRARequest:
        """Returns what it is given. ms-swift would remember every adapter by name, for ever."""
        return adapter_request

    def _add_request(self, inputs: Dict[str, Any], generation_config: Any, request_id: str,
                     adapter_request: _Asked) -> AsyncIterator[Any]:
        outputs = super()._add_request(inputs, generation_config, request_id, adapter_request.lora_request)
        return self._watched(outputs, adapter_request.ticket, generation_config.n)

    async def _watched(self, outputs: Any, ticket: Ticket, count: int) -> AsyncIterator[Any]:
        """Yields what vLLM has of an answer, and raises where there will be none.

        By its ticket, a request waits until vLLM has room for it.
        """
        self._num_running += count
        try:
            if self._num_running <= self.max_num_seqs:
                self._start(ticket)
            # Where it is left, vLLM aborts the request.
            with self._generating:
                async with aclosing(outputs):
                    async for output in outputs:
                        if not ticket.has_started:
                            self._start(ticket)
                        if ticket.is_abandoned:
                            raise RuntimeError('Nobody waits for the answer any more.')
                        reasons = {each.finish_reason for each in output.outputs}
                        if 'abort' in reasons:
                            # Not by this side.
                            raise EngineEnded(_ENDED)
                        if 'error' in reasons:
                            raise RuntimeError('vLLM could not answer the request: its log says why.')
                        yield output
        except EngineDeadError as e:
            raise EngineEnded(_ENDED) from e
        except EngineGenerateError as e:
            raise e.__cause__ or e
        finally:
            self._num_running -= count

    def _start(self, ticket: Ticket) -> None:
        running = min(self._num_running, self.max_num_seqs)
        ticket.start(running)
        self.on_batch(running)

    async def _loaded(self, sample: Optional[Sample], ticket: Ticket) -> Optional[LoRARequest]:
        """Returns vLLM's request for a composition, once its workers have it; None for the base model.

        In a step of the engine, what is wrong with it would be found too late.

        Raises:
            EngineEnded: The engine ended.
            ValueError: It cannot be merged.
        """
        composition = self.composer.composition_of(sample)
        if composition.is_base:
            ticket.composed(0.)
            return None
        start = time.perf_counter()
        # It looks at files.
        found = await asyncio.get_running_loop().run_in_executor(None, self._request, composition)
        try:
            with self._composing:
                await self._loads.load(found)
        except EngineDeadError as e:
            raise EngineEnded(_ENDED) from e
        ticket.composed(time.perf_counter() - start)
        return found

    def _request(self, composition: Composition) -> LoRARequest:
        return self._mixtures.request(composition, short_repr(dict(zip(composition.sources, composition.weights))))


class _Clock:
    """A context that may be entered again before it is left, and the seconds in which somebody was within it."""

    def __init__(self) -> None:
        self._seconds = 0.
        self._num_within = 0
        self._since = 0.

    def __enter__(self) -> None:
        if not self._num_within:
            self._since = time.perf_counter()
        self._num_within += 1

    def __exit__(self, *error: Any) -> None:
        self._num_within -= 1
        if not self._num_within:
            self._seconds += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        return self._seconds + (time.perf_counter() - self._since if self._num_within else 0.)


@contextmanager
def _starting() -> Iterator[None]:
    """Within it, vLLM starts. Raises ValueError where it does not."""
    try:
        yield
    except Exception as e:  # options that do not go together, a model that it does not have, a process that ended
        raise ValueError(f'vLLM cannot start: {reason_of(e)}') from e


@contextmanager
def _of_this_rank(num_devices: int) -> Iterator[None]:
    """Within it, processes that start are none of the ranks of this run, and see the devices of this rank alone."""
    if 'RANK' not in os.environ:
        yield
        return
    first = int(os.environ.get('LOCAL_RANK') or 0) * num_devices
    names = [name for name in os.environ if name in _OF_RANKS or name.startswith('TORCHELASTIC_')]
    hidden = {name: os.environ.pop(name) for name in names}
    variable, devices = current_platform.device_control_env_var, None
    if not current_platform.is_cpu():
        devices = os.environ.get(variable)
        visible = devices.split(',') if devices else [str(number) for number in range(first + num_devices)]
        os.environ[variable] = ','.join(visible[first:first + num_devices])
    try:
        yield
    finally:
        os.environ.update(hidden)
        if devices is not None:
            os.environ[variable] = devices
        elif not current_platform.is_cpu():
            del os.environ[variable]
