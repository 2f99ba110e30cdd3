"""Event streams on the wire of a real HTTP server, to clients of both versions."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from deployments.http.event_stream import EventStream

EVENTS = ["data: one\n\n", "data: zwölf\n\n", "data: [DONE]\n\n"]
WAIT_S = 60


class Application:
    """Streams EVENTS; after the first it waits until it may go on."""

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.is_begun, self.is_over = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(self._events(), self._end, {"x-name": "value"})(scope, receive, send)

    async def _events(self) -> AsyncIterator[str]:
        for event in EVENTS:
            yield event
            self.is_begun.set()
            await self.may_go_on.wait()

    async def _end(self) -> None:
        self.is_over.set()


@asynccontextmanager
async def served(application: Application, http: str) -> AsyncIterator[int]:
    """The port of a server on this machine."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, http=http, lifespan="off", log_level="critical"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def ask(port: int, version: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET / HTTP/{version}\r\nHost: here\r\n\r\n".encode())
    return reader, writer


@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_a_client_that_knows_no_chunks_gets_a_body_of_known_length(http):
    application = Application()
    application.may_go_on.set()
    async with served(application, http) as port, asyncio.timeout(WAIT_S):
        reader, writer = await ask(port, "1.0")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")  # to its end: the server closes
        headers = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
        assert body.decode() == "".join(EVENTS)
        assert int(headers["content-length"]) == len(body)
        assert "transfer-encoding" not in headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-name"] == "value"
        writer.close()
    assert application.is_over.is_set()


@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_other_clients_get_each_event_when_it_is_there(http):
    application = Application()
    async with served(application, http) as port, asyncio.timeout(WAIT_S):
        reader, writer = await ask(port, "1.1")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        assert b"data: one" in await reader.readuntil(b"data: one\n\n\r\n")
        application.may_go_on.set()
        assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_leaves_ends_the_stream(version):
    """Also one to which nothing is sent meanwhile."""
    application = Application()
    async with served(application, "httptools") as port, asyncio.timeout(WAIT_S):
        _, writer = await ask(port, version)
        await application.is_begun.wait()
        writer.close()
        await application.is_over.wait()
