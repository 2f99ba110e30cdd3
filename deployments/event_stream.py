"""A response of server-sent events whose end is heard of, whatever becomes of it. Knows nothing of what the events say."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class EventStream(StreamingResponse):
    """`end` is called once the response is over, and may have nothing left to do. Where the client leaves early enough, the
    first of `events` is never asked for: then no `finally` in there runs, and only `end` hears of it."""

    def __init__(
        self, events: AsyncGenerator[str, None], end: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
        self._events = events
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._end()
