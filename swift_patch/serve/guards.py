"""What requests pass before they are read: the API key, and how large and how slow a body may be."""
import asyncio
import time
from fastapi import HTTPException, Request
from typing import Any, Awaitable, Callable, Optional

from .errors import RequestError

# An application of ASGI, and what answers with an error instead.
_App = Callable[..., Awaitable[None]]
_Refuse = Callable[[RequestError], _App]


class Authentication:
    """Refuses requests without the API key.

    Args:
        app: What they go to.
        check: Returns what is wrong with the key of a request, None where it is right.
        is_exempt: Returns whether a path is for all.
        refuse: Makes the response.
    """

    def __init__(self, app: _App, check: Callable[[Request], Optional[str]], is_exempt: Callable[[str], bool],
                 refuse: _Refuse):
        self._app, self._check, self._is_exempt, self._refuse = app, check, is_exempt, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves a request."""
        app = self._app
        if scope['type'] == 'http' and not self._is_exempt(scope['path']) and self._check(Request(scope)):
            app = self._refuse(
                RequestError(
                    401,
                    'A header `Authorization: Bearer KEY` with the API key of this server is expected, found none or '
                    'another key.',
                    code='invalid_api_key',
                    headers={'WWW-Authenticate': 'Bearer'}))
        await app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, before they are read or while they come, and those that do not come.

    Args:
        app: What requests go to.
        max_bytes: How many bytes a body may have.
        max_seconds: How long it may take.
        refuse: Makes the response.
    """

    def __init__(self, app: _App, max_bytes: int, max_seconds: float, refuse: _Refuse):
        self._app, self._max_bytes, self._max_seconds, self._refuse = app, max_bytes, max_seconds, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves a request."""
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        length = dict(scope['headers']).get(b'content-length', b'0')
        if not length.isdigit() or int(length) > self._max_bytes:
            await self._refuse(self._error())(scope, receive, send)
            return
        count, is_whole, deadline = 0, False, time.monotonic() + self._max_seconds

        async def counted() -> Any:
            nonlocal count, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                # FastAPI makes a 400 of any other kind.
                raise HTTPException(408, f'A body within {self._max_seconds:g} s is expected, found a part of one.',
                                    {'Connection': 'close'}) from None
            is_whole = not message.get('more_body', False)
            count += len(message.get('body', b''))
            if count > self._max_bytes:
                error = self._error()
                raise HTTPException(error.status, str(error), dict(error.headers or {}))
            return message

        await self._app(scope, counted, send)

    def _error(self) -> RequestError:
        return RequestError(
            413,
            f'A body of at most {self._max_bytes:,} bytes is expected, found more.',
            headers={'Connection': 'close'})
