"""A pure ASGI middleware that bounds headers and body of a request before anything reads them. Knows no routes."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestLimits:
    """Reads the body and hands it on in one piece; above `max_body_bytes`, announced or counted, answers
    `too_large` instead and the application never hears of the request. The same for the headers, names and values."""

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        too_large: Response,
        max_header_bytes: int,
        headers_too_large: Response,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._too_large = too_large
        self._max_header_bytes = max_header_bytes
        self._headers_too_large = headers_too_large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
            await self._headers_too_large(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            await self._too_large(scope, receive, send)
            return
        body = bytearray()
        more_body = True
        while more_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more_body = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                await self._too_large(scope, receive, send)
                return
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_rest() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, receive_rest, send)
