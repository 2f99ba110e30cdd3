"""What happens to a client's headers before Ray Serve's HTTP proxy reads them.

`pensieve-serve` has Serve call `middlewares` in each proxy (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH). Knows nothing
of what is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# By these a client would tell Serve to give up early with an error of Serve's own, not to notice that the client has left,
# and which model of many to look for.
FOR_SERVE_ONLY = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id"}
)
REQUEST_ID = b"x-request-id"
# Serve writes it on each line of its logs; where there is none, it makes one.
GOOD_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


def middlewares() -> list[Middleware]:
    return [Middleware(ClientHeaders)]


class ClientHeaders:
    """Makes headers that Serve's proxy can read, and takes out those that would steer Serve.

    The proxy decodes some headers as UTF-8, and answers 500 if they are not: values in Latin-1, as many clients send
    them, become UTF-8 here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope = {**scope, "headers": list(_cleaned(scope["headers"]))}
        await self._app(scope, receive, send)


def _cleaned(headers: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    for name, value in headers:
        if name.lower().replace(b"_", b"-") in FOR_SERVE_ONLY:
            continue
        if name == REQUEST_ID and not GOOD_REQUEST_ID.fullmatch(value):
            continue
        try:
            value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1").encode()
        yield name, value
