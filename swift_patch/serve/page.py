"""A page to try mixtures of LoRAs on: the answers of several, side by side.

It is a client like any other and asks the server over HTTP: limits, errors and metrics are those of every request.
"""
import asyncio
import html
import inspect
import secrets
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import (TYPE_CHECKING, Any, AsyncGenerator, AsyncIterator, Awaitable, Callable, Dict, List, Literal,
                    Optional, Sequence, Tuple)
from urllib.parse import urlsplit

from ..lora.combination import MERGE_METHODS
from .config import LOOPBACK
from .snippets import as_curl, as_python

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI
    from openai import AsyncOpenAI

# Tasks that read answers, by session.
_Running = Dict[Optional[str], List['asyncio.Task[None]']]

PATH = '/ui'
COLUMNS = 4
# Of a column: a slider for each of its LoRAs, made beforehand.
MAX_ADAPTERS = 8
# As many as the server lists at a time.
_PAGE_OF_NAMES = 1000
_SECONDS_BETWEEN_UPDATES = 0.1
_NAMES = 'ABCD'
# Whatever a model writes and whatever Gradio's own files ask for: the page loads nothing from elsewhere.
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
_CSS = """
footer { display: none !important; }
#heading h2 { margin: 0; display: inline; }
#heading p { display: inline; margin-left: 12px; color: var(--body-text-color-subdued); }
.choice .form { align-content: flex-start; background: var(--block-background-fill); }
.choice .form > * { flex-grow: 0; }
.method .wrap { gap: 4px; }
.method label { padding: 4px 6px; gap: 4px; }
.method label span { margin-left: 0; }
#buttons { gap: 8px; }
#buttons button { flex: 1; }
.told { font-size: 13px; line-height: 1.5; min-height: 80px; overflow-wrap: anywhere; }
.told .used { font-family: var(--font-mono); font-weight: 600; }
.told .figures { display: flex; flex-wrap: wrap; column-gap: 16px; color: var(--body-text-color-subdued); }
.told .figures b { color: var(--body-text-color); font-weight: 600; }
.told .error { color: var(--error-text-color); white-space: pre-wrap; }
"""


@dataclass
class _Answer:
    """What came of a request until now."""
    text: str = ''
    model: str = ''
    timings: Dict[str, Any] = field(default_factory=dict)
    tokens: Optional[int] = None
    error: str = ''
    state: Literal['waiting', 'answering', 'done', 'failed', 'stopped'] = 'waiting'

    @property
    def is_done(self) -> bool:
        return self.state not in ('waiting', 'answering')


@dataclass
class _Column:
    """The components of a mixture: those to choose it by, and those that show what came of it."""
    choice: 'gradio.Column'
    adapters: 'gradio.Dropdown'
    merge_method: 'gradio.Radio'
    weights: List['gradio.Slider']
    # The adapters that the sliders were set for: the browser may ask before they follow what was picked.
    named: 'gradio.State'
    result: 'gradio.Column'
    answer: 'gradio.Textbox'
    told: 'gradio.HTML'
    curl: 'gradio.Code'
    python: 'gradio.Code'

    @property
    def inputs(self) -> List[Any]:
        return [self.adapters, self.merge_method, *self.sliders]

    @property
    def sliders(self) -> List[Any]:
        return [self.named, *self.weights]

    @property
    def outputs(self) -> List[Any]:
        return [self.answer, self.told, self.curl, self.python]


@dataclass
class _Parts:
    """The components of the page."""
    heading: 'gradio.Markdown'
    question: 'gradio.Textbox'
    ask: 'gradio.Button'
    stop: 'gradio.Button'
    system: 'gradio.Textbox'
    max_tokens: 'gradio.Number'
    temperature: 'gradio.Slider'
    count: 'gradio.Radio'
    columns: List[_Column]

    @property
    def common(self) -> List[Any]:
        return [self.question, self.system, self.max_tokens, self.temperature, self.count]


def check_installed() -> None:
    """Raises ValueError where what the page needs is not installed."""
    try:
        import gradio  # noqa: F401
        import openai  # noqa: F401
    except ImportError as e:
        raise ValueError("The page needs Gradio: pip install 'swift-patch[ui]'.") from e


def mount_page(app: 'FastAPI', base_url: str, api_key: Optional[str] = None) -> Callable[[], Awaitable[None]]:
    """Puts the page into an app, at /ui, where / leads then.

    With a key the page asks for it, as the password of any user; the app itself must let requests below /ui pass
    without it.

    Args:
        app: The app of the server that the page asks.
        base_url: Where that server is, with its `/v1`.
        api_key: The key that the server asks for, if it does.

    Returns:
        What is to be run beside the server's own wait for its connections when it is told to end: an open page has one
        that does not end by itself. It ends those once the page's answers are whole.

    Raises:
        ValueError: Gradio is not installed.
    """
    running: _Running = {}
    page = build_page(base_url, api_key, running)
    import gradio as gr
    from fastapi.responses import RedirectResponse

    def is_login(user: str, password: str) -> bool:
        return secrets.compare_digest(password.encode(), (api_key or '').encode())

    options = {
        'auth': is_login if api_key else None,
        'auth_message': "The password is the server's API key, with any user name.",
        # The page takes no files, but Gradio has a route for them.
        'max_file_size': 1,
        'show_error': False,
        'ssr_mode': False,
        'run_history': False,
        'footer_links': [],
        **_look(gr)
    }
    parameters = inspect.signature(gr.mount_gradio_app).parameters
    gr.mount_gradio_app(app, page, PATH, **{name: value for name, value in options.items() if name in parameters})
    mounted = app.routes[-1].app  # type: ignore[attr-defined]
    mounted.add_middleware(_OnlyFromHere)

    @app.get('/', include_in_schema=False)
    async def to_page() -> RedirectResponse:
        # Relative, for what is before the app may have it below a path.
        return RedirectResponse(f'{PATH[1:]}/')

    async def end() -> None:
        while running:
            await asyncio.sleep(_SECONDS_BETWEEN_UPDATES)
        mounted.stop_event.set()

    return end


def build_page(base_url: str, api_key: Optional[str] = None, running: Optional[_Running] = None) -> 'gradio.Blocks':
    """Returns the page.

    Args:
        base_url: Where the server is, with its `/v1`.
        api_key: The key that the server asks for, if it does.
        running: Where the tasks are put that read answers, by session.

    Raises:
        ValueError: Gradio is not installed.
    """
    check_installed()
    import gradio as gr
    look = _look(gr) if 'theme' in inspect.signature(gr.Blocks).parameters else {}
    with gr.Blocks(title='Mixtures of LoRAs', analytics_enabled=False, fill_width=True, **look) as page:
        _connect(gr, page, _build(gr), _client(base_url, api_key), bool(api_key), {} if running is None else running)
    return page


def _connect(gr: Any, page: 'gradio.Blocks', parts: _Parts, client: 'AsyncOpenAI', has_key: bool,
             running: _Running) -> None:
    """Gives the components of the page what they do."""
    columns = parts.columns

    async def load() -> Dict[Any, Any]:
        try:
            base, *names = await _names(client)
        except Exception as e:
            return {parts.heading: _heading('', f'The server does not say which adapters it has: {_message(e)}')}
        updates: Dict[Any, Any] = {parts.heading: _heading(base)}
        # Something to begin with: one adapter, and a mixture.
        for column, picked in zip(columns, [names[:1], names[:2], [], []]):
            updates[column.adapters] = gr.update(choices=names, value=picked)
            updates.update(zip(column.sliders, _sliders(gr, picked)))
        return updates

    async def ask(request: gr.Request, question: str, system: str, max_tokens: Optional[int], temperature: float,
                  count: int, *values: Any) -> AsyncIterator[Dict[Any, Any]]:
        if not question.strip():
            raise gr.Error('There is no question.', print_exception=False)
        try:
            base = (await client.models.list(extra_query={'limit': 1})).data[0].id
        except Exception as e:
            raise gr.Error(_message(e)) from e
        common = _common(base, question, system, max_tokens, temperature)
        width = len(columns[0].inputs)
        bodies = [{**common, **_mixture(*values[index * width:(index + 1) * width])} for index in range(count)]
        # The address that the browser has: the page itself may ask at another one.
        shown_url = f'{request.url.scheme}://{request.headers["host"]}/v1'
        updates: Dict[Any, Any] = {}
        for column, body in zip(columns, bodies):
            updates[column.curl] = as_curl(shown_url, body, has_key)
            updates[column.python] = as_python(shown_url, body, has_key)
        tasks = running[request.session_hash] = []
        try:
            async with aclosing(_answers(client, bodies, tasks)) as snapshots:
                async for answers in snapshots:
                    for column, answer in zip(columns, answers):
                        updates[column.answer], updates[column.told] = answer.text, _told(answer)
                    # All of it each time: where two updates come at once, a browser may show the last alone.
                    yield updates
        finally:
            running.pop(request.session_hash, None)

    async def stop(request: gr.Request) -> None:
        for task in running.get(request.session_hash, ()):
            task.cancel()

    def show(count: int) -> List[Any]:
        return [gr.update(visible=index < count) for _ in range(2) for index in range(COLUMNS)]

    # Not to be called by programs: they have the server itself.
    private = {'api_name': False, 'show_progress': 'hidden'}
    at_once = {'queue': False, **private}
    page.load(load, None, [parts.heading, *[part for column in columns for part in (column.adapters, *column.sliders)]],
              **private)
    # Gradio itself looks only where there is something new to send.
    page.unload(stop)
    gr.on([parts.ask.click, parts.question.submit],
          ask, [*parts.common, *[part for column in columns for part in column.inputs]],
          [part for column in columns for part in column.outputs],
          concurrency_limit=None,
          trigger_mode='once',
          **private)
    parts.stop.click(stop, None, None, **at_once)
    parts.count.change(show, parts.count,
                       [*[column.choice for column in columns], *[column.result for column in columns]], **at_once)
    for column in columns:
        column.adapters.input(
            partial(_sliders, gr), column.adapters, column.sliders, trigger_mode='always_last', **at_once)


def _build(gr: Any) -> _Parts:
    heading = gr.Markdown(_heading(''), elem_id='heading')
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            '',
            label='Question',
            placeholder='Enter asks, Shift+Enter starts a new line',
            lines=1,
            max_lines=8,
            scale=8,
            autofocus=True,
            elem_id='question')
        with gr.Column(scale=1, min_width=120, elem_id='buttons'):
            ask = gr.Button('Ask', variant='primary', size='sm', elem_id='ask')
            stop = gr.Button('Stop', size='sm', elem_id='stop')
    title = 'Settings of all: system prompt, tokens, temperature, number of mixtures'
    with gr.Accordion(title, open=False, elem_id='settings'), gr.Row():
        system = gr.Textbox('', label='System prompt', placeholder='none', lines=1, max_lines=4, scale=3)
        max_tokens = gr.Number(256, label='Tokens at most', precision=0, minimum=1, scale=1, elem_id='max-tokens')
        temperature = gr.Slider(0, 2, 0, step=0.05, label='Temperature', scale=2, elem_id='temperature')
        count = gr.Radio([2, 3, 4], value=2, label='Mixtures side by side', scale=2, elem_id='count')
    with gr.Row(equal_height=True):
        choices = [_build_choice(gr, index) for index in range(COLUMNS)]
    # A row of their own: answers are level, whatever the number of sliders.
    with gr.Row():
        results = [_build_result(gr, index) for index in range(COLUMNS)]
    columns = [_Column(*choice, *result) for choice, result in zip(choices, results)]
    return _Parts(heading, question, ask, stop, system, max_tokens, temperature, count, columns)


def _look(gr: Any) -> Dict[str, Any]:
    # Gradio 5 takes these where the page is made, Gradio 6 where it is mounted. No font is one to be downloaded.
    fonts = {
        'font': ['system-ui', '-apple-system', 'Segoe UI', 'sans-serif'],
        'font_mono': ['ui-monospace', 'Consolas', 'monospace']
    }
    return {
        'theme':
        gr.themes.Default(primary_hue='indigo', neutral_hue='slate', text_size='sm', spacing_size='sm', **fonts),
        'css': _CSS
    }


class _OnlyFromHere:
    """Tells browsers to load nothing from elsewhere for what an app answers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:

        async def send_with_policy(message: Any) -> None:
            if message['type'] == 'http.response.start':
                message = {**message, 'headers': [*message['headers'], (b'content-security-policy', _POLICY.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _client(base_url: str, api_key: Optional[str]) -> 'AsyncOpenAI':
    import openai
    http_client = None
    if urlsplit(base_url).hostname in LOOPBACK:
        # No proxy leads to this very machine, and its certificate is for another name, or signed by nobody.
        http_client = openai.DefaultAsyncHttpxClient(verify=False, trust_env=False)
    return openai.AsyncOpenAI(base_url=base_url, api_key=api_key or 'none', max_retries=0, http_client=http_client)


def _build_choice(gr: Any, index: int) -> Tuple[Any, ...]:
    name = _NAMES[index]
    is_shown = index < 2
    with gr.Column(min_width=240, visible=is_shown, elem_id=f'choice-{name}', elem_classes='choice') as column:
        adapters = gr.Dropdown([],
                               label=f'{name}: LoRAs (none: the base model)',
                               multiselect=True,
                               max_choices=MAX_ADAPTERS,
                               elem_id=f'adapters-{name}')
        merge_method = gr.Radio(
            list(MERGE_METHODS), value='fusion', label='Merge method', elem_id=f'method-{name}', elem_classes='method')
        # Hundredths: 1/k of any k is near one of them. A browser moves what is between two steps.
        weights = [
            gr.Slider(-1, 2, 1, step=0.01, visible=False, elem_id=f'weight-{name}-{slot}')
            for slot in range(MAX_ADAPTERS)
        ]
    return column, adapters, merge_method, weights, gr.State([])


def _build_result(gr: Any, index: int) -> Tuple[Any, ...]:
    name = _NAMES[index]
    is_shown = index < 2
    with gr.Column(min_width=240, visible=is_shown, elem_id=f'result-{name}') as column:
        # Plain text: nothing that a model writes is markup.
        answer = gr.Textbox(
            label=f'{name}: answer', lines=10, max_lines=10, interactive=False, elem_id=f'answer-{name}')
        told = gr.HTML(_told(None), elem_id=f'told-{name}', padding=False)
        with gr.Accordion('Copy the request', open=False, elem_id=f'request-{name}'), gr.Tabs():
            with gr.Tab('curl'):
                curl = _code(gr, 'shell', f'curl-{name}')
            with gr.Tab('Python'):
                python = _code(gr, 'python', f'python-{name}')
    return column, answer, told, curl, python


def _code(gr: Any, language: str, elem_id: str) -> Any:
    return gr.Code(
        language=language,
        interactive=False,
        show_label=False,
        show_line_numbers=False,
        wrap_lines=True,
        lines=4,
        elem_id=elem_id)


def _sliders(gr: Any, picked: Sequence[str]) -> List[Any]:
    """Returns the adapters that the sliders are for, and what becomes of each slider: its weight starts at 1/k."""
    shown = [gr.update(visible=True, label=name, value=_share(len(picked))) for name in picked]
    return [list(picked), *shown, *[gr.update(visible=False)] * (MAX_ADAPTERS - len(picked))]


def _share(count: int) -> float:
    return round(1 / count, 2)


def _mixture(adapters: Sequence[str], merge_method: str, named: Sequence[str], *weights: float) -> Dict[str, Any]:
    """Returns the fields of a request that ask for a mixture; without weights, where those are 1/k each."""
    if not adapters:
        return {}
    is_even = named != adapters or list(weights[:len(adapters)]) == [_share(len(adapters))] * len(adapters)
    mixture = {'adapters': list(adapters) if is_even else dict(zip(adapters, weights))}
    # One alone is merged with nothing.
    return mixture if is_even and len(adapters) == 1 else {**mixture, 'merge_method': merge_method}


def _common(base: str, question: str, system: str, max_tokens: Optional[int], temperature: float) -> Dict[str, Any]:
    """Returns the fields that the requests of all columns have."""
    messages = [{'role': 'system', 'content': system}] if system.strip() else []
    messages.append({'role': 'user', 'content': question})
    # An empty field is the server's own limit.
    limit = {} if max_tokens is None else {'max_tokens': max_tokens}
    return {'model': base, 'messages': messages, **limit, 'temperature': temperature}


async def _names(client: 'AsyncOpenAI') -> List[str]:
    """Returns the names of the base model and, after it, of all adapters."""
    names: List[str] = []
    while True:
        query = {'limit': _PAGE_OF_NAMES, **({'after': names[-1]} if names else {})}
        page = await client.models.list(extra_query=query)
        names += [model.id for model in page.data]
        if not page.data or not getattr(page, 'has_more', False):
            return names


async def _answers(client: 'AsyncOpenAI', bodies: Sequence[Dict[str, Any]],
                   tasks: List['asyncio.Task[None]']) -> AsyncGenerator[List[_Answer], None]:
    """Sends requests at the same moment.

    Args:
        client: What asks the server.
        bodies: The requests.
        tasks: A task is put here for each of them; to cancel it stops its answer.

    Yields:
        The answers until then, as often as there is more of them.
    """
    answers = [_Answer() for _ in bodies]
    has_more = asyncio.Event()

    def end(answer: _Answer, task: 'asyncio.Task[None]') -> None:
        if task.cancelled():
            answer.state = 'stopped'
        elif task.exception() is not None:
            answer.state, answer.error = 'failed', _message(task.exception())
        else:
            answer.state = 'done'
        has_more.set()

    for body, answer in zip(bodies, answers):
        task = asyncio.create_task(_read(client, body, answer, has_more))
        task.add_done_callback(partial(end, answer))
        tasks.append(task)
    try:
        yield answers
        is_done = False
        while not is_done:
            # Models are faster than browsers, for which what they cannot show yet would pile up.
            await asyncio.sleep(_SECONDS_BETWEEN_UPDATES)
            await has_more.wait()
            has_more.clear()
            is_done = all(answer.is_done for answer in answers)
            yield answers
    finally:
        # The server sees that nobody reads on, and frees their places.
        for task in tasks:
            task.cancel()


async def _read(client: 'AsyncOpenAI', body: Dict[str, Any], answer: _Answer, has_more: asyncio.Event) -> None:
    stream = await client.chat.completions.create(
        model=body['model'],
        messages=body['messages'],
        stream=True,
        stream_options={'include_usage': True},
        extra_body=body)
    async with stream:
        async for chunk in stream:
            answer.state = 'answering'
            answer.model = chunk.model or answer.model
            answer.timings = getattr(chunk, 'timings', None) or answer.timings
            answer.text += ''.join(choice.delta.content or '' for choice in chunk.choices)
            if chunk.usage is not None:
                answer.tokens = chunk.usage.completion_tokens
            has_more.set()


def _message(error: Optional[BaseException]) -> str:
    """Returns what the server says of an error, or what is known where it says nothing."""
    body = getattr(error, 'body', None)
    if isinstance(body, dict) and body.get('message'):
        return str(body['message'])
    cause = getattr(error, '__cause__', None)
    return f'{error} ({cause})' if cause is not None else str(error)


def _heading(base: str, error: str = '') -> str:
    return f'## Mixtures of LoRAs\n{error or base}'


def _told(answer: Optional[_Answer]) -> str:
    """Returns the HTML of what is known about an answer."""
    if answer is None:
        return '<div class="told"></div>'
    used = f'<div class="used">{html.escape(answer.model)}</div>' if answer.model else ''
    figures = [] if answer.state in ('done', 'failed') else [f'<span>{answer.state}</span>']
    for name in ('queued', 'composing', 'generating'):
        if name in answer.timings:
            figures.append(f'<span>{name} <b>{answer.timings[name]:.3f} s</b></span>')
    if 'batch_size' in answer.timings:
        figures.append(f'<span>batch of <b>{answer.timings["batch_size"]}</b></span>')
    if answer.tokens is not None and answer.is_done:
        figures.append(f'<span><b>{answer.tokens}</b> tokens</span>')
    error = f'<div class="error" role="alert">{html.escape(answer.error)}</div>' if answer.error else ''
    shown = f'{used}{error}<div class="figures">{"".join(figures)}</div>'
    return f'<div class="told" data-state="{answer.state}">{shown}</div>'
