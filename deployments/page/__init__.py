"""The page at `/`: files that are sent as they are.

No build step, and nothing from elsewhere. The page asks the same API as every other client, with a key if keys are
configured.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
}
# Nothing but these files runs or is loaded, whatever a model writes.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """The files are sent without a key, as there is nothing in them."""
    folder = Path(__file__).parent
    for path, (name, media_type) in _FILES.items():
        text = (folder / name).read_text(encoding="utf-8")

        async def send(request: Request, text: str = text, media_type: str = media_type) -> Response:
            return Response(text, media_type=media_type, headers=_HEADERS)

        app.router.add_route(path, send, methods=["GET"], include_in_schema=False)
