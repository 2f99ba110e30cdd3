"""Server-sent events: how one is written, and a response of them that reports its end. Knows nothing of what they say."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def sse_event(data: dict[str, Any], name: str | None = None) -> str:
    """One event; name: its type, in the protocols that name theirs."""
    line = f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return line if name is None else f"event: {name}\n{line}"


class EventStream(StreamingResponse):
    """A response of server-sent events that calls `end` once it is over, however it ends.

    If the client leaves early enough, the first of `events` is never asked for: then no `finally` in there runs, and
    only `end` is called. Otherwise it may have nothing left to do.

    A client that speaks HTTP/1.0 gets all events at once, when the last one is there.
    """

    def __init__(
        self, events: AsyncGenerator[str, None], end: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
        self._events = events
        self._end = end
        self._at_end: list[Callable[[], None]] = []

    def at_end(self, callback: Callable[[], None]) -> None:
        """Called after `end`, whatever becomes of that."""
        self._at_end.append(callback)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, _at_once(send) if scope.get("http_version") == "1.0" else send)
        finally:
            try:
                await self._events.aclose()
                await self._end()
            finally:
                for callback in self._at_end:
                    callback()


def _at_once(send: Send) -> Send:
    """Sends a response when it is complete, with its length.

    HTTP/1.0 knows no chunks, and uvicorn (with httptools) sends what comes without a length in chunks.
    """
    start: Message = {}
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message["body"])
        if not message["more_body"]:
            body = b"".join(parts)
            length = (b"content-length", str(len(body)).encode())
            await send({**start, "headers": [*start["headers"], length]})
            await send({"type": "http.response.body", "body": body, "more_body": False})

    return collect
