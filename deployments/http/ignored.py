"""The names of unknown parameters that a request had and that were ignored: told in a header of its answer.

Knows no endpoint and no kind of body.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

IGNORED_HEADER = "x-pensieve-ignored"
MAX_HEADER_CHARS = 1024
# All others could end the header or a name in it.
_NOT_IN_NAMES = re.compile(r"[^\w.\[\]$@:/-]", re.ASCII)


def note_ignored(request: Request, names: Sequence[str]) -> None:
    """These are to be told with the answer to this request."""
    if names:
        request.state.ignored_names = (*getattr(request.state, "ignored_names", ()), *names)


class TellingRoute(APIRoute):
    """A route whose answers tell what note_ignored was told of. It touches the start of an answer, and no part after."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_and_tell(request: Request) -> Response:
            response = await handle(request)
            if names := getattr(request.state, "ignored_names", ()):
                response.headers[IGNORED_HEADER] = _header_value(names)
            return response

        return handle_and_tell


def _header_value(names: Sequence[str]) -> str:
    """Names with commas between them; three dots stand for those that have no room."""
    value = ""
    for name in names:
        longer = f"{value},{_NOT_IN_NAMES.sub('?', name)}" if value else _NOT_IN_NAMES.sub("?", name)
        if len(longer) > MAX_HEADER_CHARS:
            return f"{value},..."
        value = longer
    return value
