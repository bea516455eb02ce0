"""ms-swift's own server around an engine in which every request has its own fusion."""
import asyncio
import json
import logging
import math
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, make_dataclass, replace
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from functools import lru_cache
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from typing import Any, AsyncIterator, Awaitable, Dict, Iterator, NoReturn, Optional, Set, TypeVar, Union

from ..compose.requests import ComposedRequest, EncodedRequest, Engine
from ..compose.tickets import Ticket
from ..errors import reason_of, short_repr, without_paths
from ..lora.composition import Composition
from ..lora.library import AdapterLibrary
from .config import DeployConfig
from .errors import RequestError
from .guards import Authentication, BodyLimit
from .metrics import Metrics
from .mixture import Mixture, asked_for
from .page import PATH as PAGE
from .protocol import ChatRequest, TextRequest
from .stock import JsonlWriter, MaxLengthError, SwiftDeploy, SwiftInfer

logger = logging.getLogger(__name__)

_T = TypeVar('_T')

# Routes of ms-swift's for trainers and for models that generate no text, in which no adapter can be named.
_NOT_SERVED = ('/infer/', '/v1/embeddings')
# For all, as in ms-swift: what watches and what finds servers have no key.
_EXEMPT = ('/health', '/health/', '/ping', '/v1/models')
# Requests whose media are fetched at a time.
_MEDIA_AT_ONCE = 8
# No token takes longer.
_SECONDS_OF_A_TOKEN = 30.
# The status of requests whose clients went away, in metrics alone. It is that of nginx.
_GONE = 499


@dataclass(eq=False)
class Call:
    """A request that was let in.

    Attributes:
        composition: What answers it, None for the base model.
        model: Its name, which the answer tells.
        seed: What its random numbers come from, None where the engine draws them.
        deadline: When it must have ended, in `time.monotonic`.
        ticket: How far it is.
        error: What went wrong.
        outcome: The status to count it by.
    """
    composition: Optional[Composition]
    model: str
    seed: Optional[int]
    deadline: float
    ticket: Ticket = field(default_factory=Ticket)
    error: Optional[RequestError] = None
    outcome: int = _GONE


class _WithEngine(SwiftInfer):  # type: ignore[misc]  # ms-swift has no types
    """Takes the place of `SwiftInfer` in `SwiftDeploy`, for the model is loaded already."""

    def __init__(self, args: Any) -> None:
        super(SwiftInfer, self).__init__(args)
        self.infer_kwargs: Dict[str, Any] = {}
        self.jsonl_writer: Any = (
            # Strict, it would fail requests that were answered where there is no room.
            JsonlWriter(args.result_path, strict=False) if args.result_path else None)


class FusionDeploy(SwiftDeploy, _WithEngine):  # type: ignore[misc]  # ms-swift has no types
    """ms-swift's server, in which every request brings its own fusion.

    Args:
        args: ms-swift's arguments.
        engine: What answers.
        library: The adapters that requests may name.
        config: The server.

    Attributes:
        app: The application, for any server of ASGI.
        base: The name of the base model.
        metrics: What is counted.

    Raises:
        ValueError: An adapter has the name of the base model.
    """

    def __init__(self, args: Any, engine: Engine, library: AdapterLibrary, config: DeployConfig):
        self.infer_engine, self.template = engine, engine.template
        # Text is text: ms-swift would open the file of an `<img>FILE</img>`. The template is the engine's own copy.
        self.template._replace_image_tags = lambda inputs: None
        self.library, self.config = library, config
        self.base: str = args.served_model_name or args.model_suffix
        if self.base in library:
            raise ValueError(f'The base model is called {self.base!r}, but so is an adapter: give --served_model_name.')
        self._calls: Set[Call] = set()
        self._media_pool = ThreadPoolExecutor(_MEDIA_AT_ONCE)
        self._created = int(time.time())
        self.metrics = Metrics(library, engine.merges_here, config.max_batch_size, self._waiting,
                               lambda: len(self._calls) - self._waiting())
        engine.on_batch = self.metrics.batch_sizes.observe
        super().__init__(args)
        # The outermost last.
        self.app.add_middleware(
            BodyLimit,
            max_bytes=config.limits.max_body_bytes,
            max_seconds=config.limits.max_seconds,
            refuse=self._refused)
        if args.api_key:
            self.app.add_middleware(
                Authentication, check=self._check_api_key, is_exempt=self._is_exempt, refuse=self._refused)

    # What the constructor of ms-swift calls.

    def _register_app(self) -> None:
        super()._register_app()
        routes = self.app.router.routes
        routes[:] = [route for route in routes if getattr(route, 'path', None) not in (*_NOT_SERVED, '/v1/models')]
        self.app.head('/health')(self.health)
        self.app.get('/v1/models')(self.list_models)
        self.app.get('/v1/models/{model:path}')(self.find_model)
        self.app.get('/metrics')(self.show_metrics)
        if self.config.adapter_folders:
            from .runtime import RuntimeAdapters
            RuntimeAdapters(self.library, self.infer_engine.composer, self.base,
                            self.config.adapter_folders).register(self.app)
        for kind, told in ((RequestError, lambda e: e), (RequestValidationError, _of_body), (HTTPException, _of_http),
                           (RecursionError, _of_depth), (Exception, _of_server)):
            self.app.exception_handler(kind)(self._handler(told))

    def _install_auth_middleware(self) -> None:
        """Does nothing: that of ms-swift answers with 400, and older releases have none."""

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Runs that of ms-swift, in a form that newer releases of Starlette take, too."""
        with contextmanager(super().lifespan)(app):
            yield

    # Routes.

    async def create_chat_completion(self, request: ChatRequest, raw_request: Request) -> Any:
        """Answers `/v1/chat/completions`."""
        return await self._answer(request, raw_request, self._mixture(request))

    async def create_completion(self, request: TextRequest, raw_request: Request) -> Any:
        """Answers `/v1/completions`."""
        return await self._answer(
            ChatRequest.from_cmpl_request(request), raw_request, self._mixture(request), return_cmpl_response=True)

    async def health(self) -> Response:
        """Tells whether requests are answered: 200, or 503 where what answers has ended."""
        return Response(status_code=200 if self.infer_engine.is_alive else 503)

    async def list_models(self, limit: int = 1000, after: Optional[str] = None) -> Dict[str, Any]:
        """Lists the base model and the adapters, a page of them.

        Args:
            limit: How many at most.
            after: The last one of the page before.
        """
        if not 1 <= limit <= 10_000:
            raise RequestError(400, f'limit is expected to be from 1 to 10000, found {limit}.', param='limit')
        names = [self.base, *self.library]
        if after is not None and after not in names:
            raise RequestError(404, f'Model {short_repr(after)} does not exist.', param='after', code='model_not_found')
        begin = 0 if after is None else names.index(after) + 1
        data = [self._model(name) for name in names[begin:begin + limit]]
        return {'object': 'list', 'data': data, 'has_more': begin + limit < len(names)}

    async def find_model(self, model: str) -> Dict[str, Any]:
        """Tells of one model, also of a mixture."""
        return self._model(asked_for(model, self.base, self.library).named(self.base))

    async def show_metrics(self) -> Response:
        """Shows what Prometheus reads."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _model(self, name: str) -> Dict[str, Any]:
        parent = None if name == self.base else self.base
        return {
            'id': name,
            'object': 'model',
            'created': self._created,
            'owned_by': self.args.owned_by,
            'parent': parent
        }

    # A request: what it asks for, whether it is let in, its answer.

    def _mixture(self, request: Union[ChatRequest, TextRequest]) -> Mixture:
        found = asked_for(
            request.model,
            self.base,
            self.library,
            adapters=request.adapters,
            weights=request.weights,
            merge_method=request.merge_method,
            lora=request.lora)
        if found.merge_method == self.config.merge_method and 'combination_type' not in self.config.composer_args:
            return found._replace(merge_method=None)
        return found

    def _admit(self, request: ChatRequest, mixture: Mixture) -> Call:
        """Lets a request in, or raises RequestError."""
        limits = self.config.limits
        if len(mixture.adapters) > limits.max_sources:
            raise RequestError(
                400,
                f'At most {limits.max_sources} adapters are expected in one request, found {len(mixture.adapters)}.',
                param='adapters')
        for name in ('n', 'num_beams'):
            if getattr(request, name) > self.config.max_batch_size:
                raise RequestError(
                    400,
                    f'{name} is expected to be at most {self.config.max_batch_size}, found {getattr(request, name)}.',
                    param=name)
        if request.stream and max(request.n, request.num_beams) > 1:
            raise RequestError(400, 'n and num_beams are expected to be 1 in a stream, found more.', param='n')
        if 1 < request.num_beams < request.n:
            raise RequestError(400, 'n is expected to be at most num_beams, found more.', param='n')
        composition = None
        if mixture.adapters:
            try:
                composition = self.infer_engine.composer.composition(*mixture)
            except (TypeError, ValueError) as e:
                raise RequestError(400, str(e), param='weights') from e
        waiting = [call for call in self._calls if not call.ticket.has_started]
        if len(waiting) >= limits.max_waiting:
            seconds = max(call.ticket.seconds_queued for call in waiting)
            raise RequestError(
                429,
                f'{len(waiting)} requests wait, as many as may: try again later.',
                code='queue_full',
                headers={'Retry-After': str(math.ceil(seconds) or 1)})
        seed = self.infer_engine.fresh_seed() if request.seed is None else request.seed % 2**63
        return Call(composition, mixture.named(self.base), seed, time.monotonic() + limits.max_seconds)

    async def _answer(self, request: ChatRequest, raw_request: Request, mixture: Mixture, **kwargs: Any) -> Any:
        call = request.__dict__['call'] = self._admit(request, mixture)
        with ExitStack() as stack:
            stack.enter_context(self._counted(call))
            try:
                response = await _in_time(call, raw_request,
                                          super().create_chat_completion(request, raw_request, **kwargs))
                if not isinstance(response, StreamingResponse):
                    return response
                chunks = response.body_iterator.__aiter__()
                first = await _in_time(call, raw_request, chunks.__anext__())
            except Exception as e:
                raise call.error or self._failed(call, e) from None
            return _Stream(call, self._told(call, first, chunks), stack.pop_all())

    async def infer_async(self, infer_request: Any, request_config: Any, **kwargs: Any) -> Any:
        """Has the engine answer a request of `ChatRequest.parse`. ms-swift calls it."""
        call: Call = infer_request.call
        try:
            # Seeds are those of the requests, so that requests of different seeds make one batch.
            config = replace(request_config, seed=None)
            encoded = await self._encoded(infer_request, config)
            answer = await self.infer_engine.infer_async(
                ComposedRequest(encoded, call.composition, call.seed, call.ticket), config)
        except Exception as e:
            # ms-swift makes a 400 of whatever is raised here.
            call.error = self._failed(call, e)
            raise call.error from e
        return self._chunks(call, answer) if config.stream else self._ended(call, answer)

    async def _encoded(self, infer_request: Any, config: Any) -> EncodedRequest:
        """Returns a request as the model gets it. Raises RequestError where it cannot be asked."""
        engine = self.infer_engine
        try:
            # Media may hang, and shall not keep text waiting.
            pool = self._media_pool if _has_media(infer_request) else None
            encoded = await asyncio.get_running_loop().run_in_executor(pool, self._encoded_with_media, infer_request)
        except MaxLengthError as e:
            raise RequestError(
                400, f'A shorter prompt is expected: {e}', param='messages', code='context_length_exceeded') from e
        except Exception as e:  # what a template has against messages may be anything
            raise RequestError(400, f"The model's template refuses it: {reason_of(e)}", param='messages') from e
        num_tokens = engine._get_num_tokens(encoded.inputs)
        if engine.max_model_len is not None and num_tokens >= engine.max_model_len:
            raise RequestError(
                400,
                f'A prompt of less than {engine.max_model_len} tokens is expected, found {num_tokens}.',
                param='messages',
                code='context_length_exceeded')
        try:
            # As the batch will, where it would be a mistake of all of its requests.
            engine._prepare_generation_config(replace(config, max_tokens=config.max_tokens or 1))
        except Exception as e:
            raise RequestError(400, f'Settings that go together are expected, found others: {reason_of(e)}') from e
        return encoded

    def _encoded_with_media(self, infer_request: Any) -> EncodedRequest:
        # What comes from elsewhere may take its time. ms-swift 3 has no such method: its templates fetch.
        prepared = getattr(super(), '_prepare_request_media', nullcontext)
        with prepared(infer_request):
            return self.infer_engine.encoded(infer_request)

    @staticmethod
    @contextmanager
    def _prepare_request_media(infer_request: Any) -> Iterator[Any]:
        """Leaves media for the thread that encodes the request: ms-swift would fetch them in that of all requests."""
        yield infer_request

    async def _chunks(self, call: Call, answer: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for chunk in answer:
            chunk.model = call.model
            yield self._ended(call, chunk) if chunk.choices[0].finish_reason else chunk

    def _ended(self, call: Call, response: Any) -> Any:
        """Notes that a request was answered, and tells how long it took."""
        ticket = call.ticket
        ticket.end()
        call.outcome, response.model = 200, call.model
        response.timings = {
            'queued': round(ticket.seconds_queued, 6),
            'composing': round(ticket.seconds_composing, 6),
            'generating': round(ticket.seconds_generating, 6),
            'batch_size': ticket.batch_size
        }
        self.metrics.answered(ticket, response.usage.prompt_tokens, response.usage.completion_tokens)
        return response

    def _post_process(self, request_info: Any, response: Any, return_cmpl_response: bool = False) -> Any:
        """Makes what is sent of what the engine answered."""
        timings = getattr(response, 'timings', None)
        if return_cmpl_response:
            # What reads as a call of a tool is text there, and an assertion of ms-swift's that fails.
            for choice in response.choices:
                (choice.delta if hasattr(choice, 'delta') else choice.message).tool_calls = None
        request_info['model'] = response.model
        found = super()._post_process(request_info, response, return_cmpl_response)
        if timings is None:
            return found
        return _with_timings(found.__class__)(
            **{
                each.name: getattr(found, each.name)
                for each in fields(found)
            }, timings=timings)

    async def _told(self, call: Call, first: Any, chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Yields the events of a stream, with what goes wrong meanwhile as the last one."""
        try:
            yield first
            while True:
                chunk = await asyncio.wait_for(chunks.__anext__(), call.deadline - time.monotonic())
                yield chunk
        except StopAsyncIteration:
            return
        except Exception as e:
            error = call.error or (_late(call) if isinstance(e, asyncio.TimeoutError) else self._failed(call, e))
            call.outcome = error.status
            yield f'data: {json.dumps(error.body)}\n\n'

    def close(self) -> None:
        """Ends what is still being answered, for a process that ends: a thread that computes then would abort it."""
        for call in list(self._calls):
            call.ticket.is_abandoned = True
        self.infer_engine.close(_SECONDS_OF_A_TOKEN)

    # What is noted, and what goes wrong.

    async def _check_model(self, request: ChatRequest) -> None:
        """Has nothing to say: what a request asks for was looked at."""

    def _check_api_key(self, raw_request: Request) -> Optional[str]:
        """Returns what is wrong with the key of a request, None where it is right."""
        try:
            found: Optional[str] = super()._check_api_key(raw_request)
            return found
        except TypeError:  # ms-swift compares it by a function that takes ASCII alone
            return 'API key error'

    def _waiting(self) -> int:
        return sum(not call.ticket.has_started for call in list(self._calls))

    def _is_exempt(self, path: str) -> bool:
        # The page has a login of its own.
        return path in _EXEMPT or self.config.ui and (path == '/' or f'{path}/'.startswith(f'{PAGE}/'))

    @contextmanager
    def _counted(self, call: Call) -> Iterator[None]:
        """Within it, a request is among those that wait or are answered."""
        self._calls.add(call)
        is_refused = False
        try:
            yield
        except RequestError:  # counted where it is told
            is_refused = True
            raise
        finally:
            if not is_refused:
                self.metrics.requests.labels(str(call.outcome)).inc()
            self._calls.discard(call)
            call.ticket.is_abandoned = True
            call.ticket.end()

    def _failed(self, call: Call, error: Exception) -> RequestError:
        """Returns what a client is told of an error."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, RecursionError):
            return _of_depth(error)
        if call.composition is not None and not call.ticket.is_composed and isinstance(error, (TypeError, ValueError)):
            paths = self._paths(call.composition)
            if paths is not None:
                return RequestError(400, without_paths(str(error), paths), param='adapters')
        return _of_server(error, call.ticket.traceback)

    def _paths(self, composition: Composition) -> 'Optional[list[str]]':
        """Returns where the adapters are; None where their files are damaged, which is no mistake of a request."""
        try:
            return [str(self.library.stored(name).checkpoint.path) for name in composition.sources]
        except ValueError:
            return None

    @staticmethod
    def create_error_response(status_code: Any, message: str) -> NoReturn:
        """Raises what is wrong with a request. ms-swift calls it."""
        raise RequestError(int(status_code), message)

    def _refused(self, error: RequestError) -> Response:
        """Counts a request that is refused and returns the response."""
        self.metrics.requests.labels(str(error.status)).inc()
        return error.response

    def _handler(self, told: Any) -> Any:

        async def handler(raw_request: Request, error: Exception) -> Response:
            return self._refused(told(error))

        return handler


class _Stream(StreamingResponse):
    """A stream of events, at whose end, or where its client goes away or does not read, `stack` is closed."""

    def __init__(self, call: Call, events: AsyncIterator[Any], stack: ExitStack):
        super().__init__(events, media_type='text/event-stream')
        self._call, self._stack = call, stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # One more, for the event that says that there was no time left.
        seconds = self._call.deadline - time.monotonic() + 1
        with self._stack:
            try:
                await asyncio.wait_for(super().__call__(scope, receive, send), seconds)
            except asyncio.TimeoutError:
                self._call.outcome = 504


async def _in_time(call: Call, raw_request: Request, answer: Awaitable[_T]) -> _T:
    """Waits for a part of an answer, as long as its client waits and as a request may take.

    Raises:
        RequestError: The client went away, or there was no time left.
    """
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_until_gone(raw_request))
    try:
        timeout = call.deadline - time.monotonic()
        await asyncio.wait((task, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestError(_GONE, 'The client went away.') if gone.done() else _late(call)
    finally:
        task.cancel()
        gone.cancel()


def _has_media(infer_request: Any) -> bool:
    """Returns whether a request has images, sounds or videos."""
    contents = (message.get('content') for message in infer_request.messages)
    return bool(
        infer_request.images or infer_request.audios or infer_request.videos
        or any(item.get('type') != 'text' for content in contents if isinstance(content, list) for item in content))


async def _until_gone(raw_request: Request) -> None:
    while (await raw_request.receive())['type'] != 'http.disconnect':
        pass


def _late(call: Call) -> RequestError:
    where = 'while it was answered' if call.ticket.has_started else 'while it waited for others'
    return RequestError(504, f'The request took longer than it may, {where}: ask for less, or later.', code='timeout')


@lru_cache(maxsize=None)
def _with_timings(kind: Any) -> Any:
    """Returns a response of ms-swift's with `timings`."""
    return make_dataclass(f'{kind.__name__}WithTimings', [('timings', Dict[str, float], None)], bases=(kind, ))


def _of_body(error: RequestValidationError) -> RequestError:
    # Of a field that may be several things, what is told of the likeliest.
    found = max(error.errors(), key=lambda each: len(each['loc']))
    place = [str(part) for part in found['loc'][1:] if '[' not in str(part)]
    if place == [] and isinstance(found['input'], bytes):
        return RequestError(
            400, 'A body of JSON with a header `Content-Type: application/json` is expected, found '
            'another header or none.')
    if found['type'] == 'json_invalid':
        return RequestError(400, f'The body is expected to be JSON, found: {found["ctx"]["error"]}.')
    if found['type'] == 'value_error':
        return RequestError(400, str(found['ctx']['error']))
    return RequestError(
        400,
        f'{".".join(place) or "The body"}: {found["msg"]}, found {short_repr(found["input"])}.',
        param=place[0] if place else None)


def _of_http(error: HTTPException) -> RequestError:
    return RequestError(error.status_code, str(error.detail), headers=error.headers)


def _of_depth(error: RecursionError) -> RequestError:
    return RequestError(400, 'A body that is nested less deeply is expected.')


def _of_server(error: Exception, where: str = '') -> RequestError:
    """Returns an error of the server: its log has what a client is not told.

    Args:
        error: What went wrong.
        where: Its traceback, where it has none any more.
    """
    number = secrets.token_hex(8)
    logger.error('Request %s failed: %s', number, where or reason_of(error), exc_info=None if where else error)
    return RequestError(500, f'The server failed; its log says why at {number}.', code=number)
