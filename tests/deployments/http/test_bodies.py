"""Bodies under way: how many bytes of them, for which tenants, and what is made of them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Request
from starlette.types import Message

from deployments.completions.requests import ChatCompletionBody
from deployments.errors import BodyTooLargeError
from deployments.http import bodies as request_bodies
from deployments.http.bodies import MAX_INLINE_BYTES, RequestBodies
from deployments.http.errors import wire_of
from engine.errors import OverloadedError, RequestError
from engine.tenant import Tenant

A, B = Tenant("a"), Tenant("b")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
RAW = json.dumps(CHAT).encode()


class Sender:
    """A client that sends a body piece by piece; `end` sends the last one."""

    def __init__(self, *, length: int | str | None = None) -> None:
        headers = [] if length is None else [(b"content-length", str(length).encode())]
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self.request = Request({"type": "http", "method": "POST", "headers": headers}, self._messages.get)

    def send(self, piece: bytes, *, more: bool = True) -> Sender:
        self._messages.put_nowait({"type": "http.request", "body": piece, "more_body": more})
        return self

    def end(self, piece: bytes = b"") -> Sender:
        return self.send(piece, more=False)

    def leave(self) -> Sender:
        self._messages.put_nowait({"type": "http.disconnect"})
        return self


@pytest.fixture
async def bodies(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RequestBodies]:
    """At most 1 MiB each, and 2 MiB of them under way."""
    monkeypatch.setattr(request_bodies, "MAX_BYTES_IN_FLIGHT", 2 << 20)
    bodies = RequestBodies(1 << 20)
    yield bodies
    assert not bodies._in_flight._held, "a body that is done is still counted"
    bodies.close()


async def parse(bodies: RequestBodies, sender: Sender, tenant: Tenant = A, **options: Any) -> ChatCompletionBody:
    async with asyncio.timeout(30):
        return (await bodies.parse(ChatCompletionBody, sender.request, tenant, **options))[0]


async def until_waiting() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_body_in_pieces(bodies: RequestBodies) -> None:
    body = await parse(bodies, Sender().send(RAW[:5]).send(RAW[5:9]).end(RAW[9:]))
    assert body.messages[0].content == "hi"
    assert (await parse(bodies, Sender(length="many").end(RAW))) == body
    assert await parse(bodies, Sender(length=0).end(), default=RAW) == body
    with pytest.raises(RequestError):
        await parse(bodies, Sender().end())


async def test_what_was_announced_too_large_is_not_read(bodies: RequestBodies) -> None:
    with pytest.raises(BodyTooLargeError) as caught:
        await parse(bodies, Sender(length=(1 << 20) + 1))  # which sends nothing
    assert wire_of(caught.value)[::2] == (413, "body_too_large")


@pytest.mark.parametrize("length", [None, 5])
async def test_what_becomes_too_large_is_read_no_further(bodies: RequestBodies, length: int | None) -> None:
    sender = Sender(length=length).send(RAW)
    for _ in range(2):
        sender.send(b" " * (1 << 19))
    with pytest.raises(BodyTooLargeError):
        await parse(bodies, sender)  # whose end never comes


async def test_a_client_that_leaves_in_its_body(bodies: RequestBodies) -> None:
    with pytest.raises(match="closed"):
        await parse(bodies, Sender().send(RAW[:9]).leave())


async def test_only_so_many_bytes_are_under_way_and_each_tenant_has_its_part(bodies: RequestBodies) -> None:
    half = b" " * ((1 << 19) - len(RAW))
    senders = [Sender().send(half) for _ in range(4)]
    reading = [asyncio.create_task(parse(bodies, sender)) for sender in senders]
    await until_waiting()
    with pytest.raises(OverloadedError):
        await parse(bodies, Sender().end(RAW.ljust(1000)))
    assert (await parse(bodies, Sender().end(RAW.ljust(1000)), B)).messages  # another tenant
    for sender in senders:
        sender.end(RAW)
    assert all(body.messages for body in await asyncio.gather(*reading))
    assert (await parse(bodies, Sender().end(RAW))).messages


async def test_a_reader_that_is_cancelled_gives_its_bytes_back(bodies: RequestBodies) -> None:
    reading = [asyncio.create_task(parse(bodies, Sender().send(b" " * (1 << 19)))) for _ in range(4)]
    await until_waiting()
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    assert (await parse(bodies, Sender().end(RAW))).messages


async def test_large_bodies_are_parsed_in_one_thread_and_small_ones_here(
    bodies: RequestBodies, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    original = request_bodies.parse_request

    def parse_noted(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(request_bodies, "parse_request", parse_noted)
    large = [Sender().end(RAW.ljust(MAX_INLINE_BYTES + 1)) for _ in range(3)]
    await asyncio.gather(*(parse(bodies, sender) for sender in large))
    await parse(bodies, Sender().end(RAW.ljust(MAX_INLINE_BYTES)))
    assert names == ["parser_0"] * 3 + [threading.current_thread().name]
