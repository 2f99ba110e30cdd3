"""The bound on headers, driven as an ASGI server would."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message

from deployments.http.request_limits import MAX_HEADER_VALUE_BYTES, MAX_HEADERS, RequestLimits


class Application:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_calls += 1
        await PlainTextResponse("")(scope, receive, send)


async def call(app: Any, headers: list[tuple[bytes, bytes]]) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
    return sent


@pytest.mark.parametrize(
    ("fits", "does_not", "reason"),
    [
        ([(b"a" * 20, b"b" * 100)], [(b"a" * 20, b"b" * 100), (b"c", b"")], "larger than 120 bytes"),
        ([(b"a", b"")] * MAX_HEADERS, [(b"a", b"")] * (MAX_HEADERS + 1), "more than 100 headers"),
        (
            [(b"a", b"b" * MAX_HEADER_VALUE_BYTES)],
            [(b"a", b"b" * (MAX_HEADER_VALUE_BYTES + 1))],
            "longer than 8192 bytes",
        ),
    ],
    ids=["bytes", "number", "one"],
)
async def test_headers_beyond_a_bound_are_refused_before_the_application_hears_of_them(
    fits: list[tuple[bytes, bytes]], does_not: list[tuple[bytes, bytes]], reason: str
) -> None:
    application = Application()
    app = RequestLimits(application, max_header_bytes=120 if "120" in reason else 32 * 2**10)
    assert (await call(app, fits))[0]["status"] == 200
    start, body = await call(app, does_not)
    assert start["status"] == 431
    error = json.loads(body["body"])["error"]
    assert reason in error["message"]
    assert error["code"] == "headers_too_large"
    assert application.num_calls == 1
