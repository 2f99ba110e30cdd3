"""What Serve's proxy gets to read of a client's headers."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.proxy_headers import middlewares


async def passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    (middleware,) = middlewares()
    app: Any = middleware.cls(application, *middleware.args, **middleware.kwargs)
    original = {"type": "http", "headers": headers}
    await app(original, None, None)
    assert original["headers"] is headers
    return list(seen[0]["headers"])


async def test_latin_1_becomes_utf_8_which_stays_as_it_is() -> None:
    utf8, latin1 = "zo\xeb".encode(), "zo\xeb".encode("latin-1")
    headers = [(b"x-session-id", latin1), (b"x-other", b"\xff\xfe"), (b"x-session-id", utf8), (b"accept", b"*/*")]
    assert await passed_on(headers) == [
        (b"x-session-id", utf8),
        (b"x-other", b"\xc3\xbf\xc3\xbe"),
        (b"x-session-id", utf8),
        (b"accept", b"*/*"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"Serve-Multiplexed-Model-Id",
    ],
)
@pytest.mark.parametrize("value", [b"0.001", b"?1", b"\xff"])
async def test_what_would_steer_serve_is_taken_out(name: bytes, value: bytes) -> None:
    assert await passed_on([(b"a", b"b"), (name, value)]) == [(b"a", b"b")]


@pytest.mark.parametrize(
    ("value", "is_kept"),
    [(b"abc-123", True), (b"x" * 128, True), (b"x" * 129, False), (b"\xff", False), (b"a b", False), (b"", False)],
)
async def test_a_request_id_is_kept_where_it_can_be_logged(value: bytes, is_kept: bool) -> None:
    headers = [(b"x-request-id", value)]
    assert await passed_on(headers) == (headers if is_kept else [])


async def test_a_scope_without_headers_passes() -> None:
    (middleware,) = middlewares()
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    app: Any = middleware.cls(application)
    await app({"type": "lifespan"}, None, None)
    assert seen == [{"type": "lifespan"}]
