"""The bound on bodies, driven as an ASGI server would."""

from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import Message

from deployments.request_limits import RequestLimits


class Echo:
    """Answers with the body; counts how often it was called."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.next_message: Message | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_calls += 1
        message = await receive()
        assert not message["more_body"]
        await PlainTextResponse(message["body"])(scope, receive, send)
        self.next_message = await receive()


async def call(app: Any, chunks: list[bytes], headers: dict[str, str], *, disconnect: bool = False) -> list[Message]:
    incoming = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    incoming[-1]["more_body"] = False
    if disconnect:
        incoming.pop()
    incoming.append({"type": "http.disconnect"})
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": "POST", "path": "/", "headers": raw_headers}, receive, send)
    return sent


def limited(echo: Echo) -> RequestLimits:
    return RequestLimits(
        echo,
        max_body_bytes=10,
        too_large=PlainTextResponse("too large", 413),
        max_header_bytes=120,
        headers_too_large=PlainTextResponse("headers too large", 431),
    )


async def test_body_is_handed_on_in_one_piece_and_then_the_connection() -> None:
    echo = Echo()
    sent = await call(limited(echo), [b"01234", b"56789"], {"content-length": "10"})
    assert sent[1]["body"] == b"0123456789"
    assert echo.next_message == {"type": "http.disconnect"}


async def test_announced_size_is_refused_unread() -> None:
    echo = Echo()
    sent = await call(limited(echo), [b"x"], {"content-length": "11"})
    assert sent[0]["status"] == 413
    assert echo.num_calls == 0


async def test_counted_size_is_refused_whatever_was_announced() -> None:
    for headers in ({}, {"content-length": "5"}, {"content-length": "many"}):
        echo = Echo()
        sent = await call(limited(echo), [b"01234", b"56789", b"0"], headers)
        assert sent[0]["status"] == 413
        assert echo.num_calls == 0


async def test_client_that_leaves_while_sending_is_forgotten() -> None:
    echo = Echo()
    assert await call(limited(echo), [b"0", b"1"], {}, disconnect=True) == []
    assert echo.num_calls == 0


async def test_headers_are_counted_names_and_values() -> None:
    echo = Echo()
    fits = {"a" * 20: "b" * 100}
    assert (await call(limited(echo), [b"x"], fits))[0]["status"] == 200
    for headers in (fits | {"c": ""}, {"a": "b" * 120}):
        sent = await call(limited(echo), [b"x"], headers)
        assert sent[0]["status"] == 431
    assert echo.num_calls == 1
