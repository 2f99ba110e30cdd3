"""An application behind a port of this machine, for clients that are programs of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

# Far longer than a start takes; only a defect waits for it.
START_S = 120.0


@contextmanager
def serving(make_app: Callable[[], Awaitable[FastAPI]], end: Callable[[], Any] | None = None) -> Iterator[str]:
    """The application in a thread and an event loop of its own. Its address."""
    server: list[uvicorn.Server] = []

    async def serve() -> None:
        server.append(uvicorn.Server(uvicorn.Config(await make_app(), port=0, log_level="critical")))
        await server[0].serve()
        if end is not None:
            await end()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    end_s = time.monotonic() + START_S
    while not (server and server[0].started):
        assert thread.is_alive(), "the application does not start"
        assert time.monotonic() < end_s, "the application does not come up"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server[0].servers[0].sockets[0].getsockname()[1]}"
    finally:
        server[0].force_exit = server[0].should_exit = True  # a client that watches a stream would not leave
        thread.join()
