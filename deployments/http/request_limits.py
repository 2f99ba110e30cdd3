"""A pure ASGI middleware that bounds the headers of a request before anything reads them. Knows no routes."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import HeadersTooLargeError
from deployments.generation import ErrorItem
from deployments.http.errors import error_response

MAX_HEADERS = 100
MAX_HEADER_VALUE_BYTES = 8 * 2**10


class RequestLimits:
    """Answers 431 to too many headers, too long ones, or too many bytes of all names and values.

    The application does not see such a request.
    """

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._refusal(scope["headers"]) if scope["type"] == "http" else None
        if reason is None:
            await self._app(scope, receive, send)
            return
        error = ErrorItem.of(HeadersTooLargeError(reason))
        await error_response(error)(scope, receive, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        if sum(len(name) + len(value) for name, value in headers) > self._max_header_bytes:
            return f"the headers are larger than {self._max_header_bytes} bytes"
        if len(headers) > MAX_HEADERS:
            return f"there are more than {MAX_HEADERS} headers"
        if any(len(value) > MAX_HEADER_VALUE_BYTES for _, value in headers):
            return f"a header is longer than {MAX_HEADER_VALUE_BYTES} bytes"
        return None
