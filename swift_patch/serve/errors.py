"""Errors of a server, as clients of OpenAI's API know them."""
import json
from fastapi import Response
from typing import Any, Dict, Mapping, Optional

from ..errors import printable

# OpenAI's names for kinds of errors.
_TYPES = {401: 'authentication_error', 404: 'not_found_error', 429: 'rate_limit_error', 504: 'timeout_error'}


class RequestError(ValueError):
    """What is wrong with one request, or went wrong with it.

    Args:
        status: The status of HTTP.
        message: What was expected, what was found, what to do.
        param: The field of the body that it is about.
        code: A word for programs.
        headers: Headers of the response.
    """

    def __init__(self,
                 status: int,
                 message: str,
                 *,
                 param: Optional[str] = None,
                 code: Optional[str] = None,
                 headers: Optional[Mapping[str, str]] = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> Dict[str, Any]:
        """The error as OpenAI's clients read it, and as ms-swift's `InferClient` does."""
        # Text of a request may come back, with what no JSON can have.
        message = ' '.join(map(printable, str(self).split()))
        kind = _TYPES.get(self.status, 'server_error' if self.status >= 500 else 'invalid_request_error')
        error = {'message': message, 'type': kind, 'param': self.param, 'code': self.code}
        return {'object': 'error', 'message': message, 'error': error}

    @property
    def response(self) -> Response:
        """The response that tells it."""
        return Response(json.dumps(self.body), self.status, self.headers, 'application/json')
