"""A pure ASGI middleware: a slash at the end of a path asks for the same as the path without it. Knows no routes."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class TrailingSlashes:
    """Takes the slashes at the end of a path away, without a redirect: many clients do not follow one with a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            root = scope.get("root_path", "")
            path = scope["path"].rstrip("/")
            scope = {**scope, "path": path if len(path) > len(root) else f"{root}/"}
        await self._app(scope, receive, send)
