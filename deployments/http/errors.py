"""Errors as OpenAI words them, for FastAPI: from ErrorItems, from our exceptions, and from everybody else's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from deployments.completions.answers import error_body
from deployments.generation import ErrorItem
from engine.errors import PensieveError

# Of an error's message: it may repeat what was sent.
MAX_MESSAGE_CHARS = 1000


def error_response(error: ErrorItem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    if len(error.message) > MAX_MESSAGE_CHARS:
        error = replace(error, message=error.message[:MAX_MESSAGE_CHARS] + "...")
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def pensieve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PensieveError)
    headers = {"www-authenticate": "Bearer"} if error.http_status == 401 else None
    return error_response(ErrorItem.from_error(error), headers)


async def http_error(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    item = ErrorItem(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}", "invalid_request_error", code
    )
    return error_response(item, {"allow": _allowed(request)} if error.status_code == 405 else error.headers)


def _allowed(request: Request) -> str:
    """The methods of all routes of this path; the exception knows only those of one."""
    methods = {
        method
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return ", ".join(sorted(methods))


async def unexpected_error(request: Request, error: Exception) -> Response:
    """Starlette raises it again after this, so that Serve logs it."""
    return error_response(ErrorItem(500, "internal error", "server_error"))


EXCEPTION_HANDLERS = {
    PensieveError: pensieve_error,
    HTTPException: http_error,
    Exception: unexpected_error,
}
