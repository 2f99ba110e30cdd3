"""Errors as Anthropic words them, and the routes that answer with them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from deployments.errors import InternalError
from deployments.generation import ErrorItem
from deployments.http.errors import MAX_MESSAGE_CHARS, error_headers, wire_of
from deployments.http.ignored import TellingRoute
from engine.errors import ContextLengthError, OverloadedError, PensieveError

logger = logging.getLogger("ray.serve")

# What the `type` of an error is by its status.
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
# Clients that find these words, in these letters, in an error make their conversation shorter by themselves.
TOO_LONG = "prompt is too long: "


def status_of(error: ErrorItem) -> int:
    """As http/errors.py has it, but a full server is no limit of the client's own."""
    return 529 if error.is_a(OverloadedError) else wire_of(error).status


def error_body(error: ErrorItem, request_id: str) -> dict[str, Any]:
    """The JSON body, also of an event in a stream that has begun."""
    message = (TOO_LONG if error.is_a(ContextLengthError) else "") + error.message
    worded = {"type": TYPES.get(status_of(error), "invalid_request_error"), "message": message[:MAX_MESSAGE_CHARS]}
    return {"type": "error", "error": worded, "request_id": request_id}


def error_response(error: ErrorItem, request_id: str) -> JSONResponse:
    """A whole response that says only this."""
    return JSONResponse(error_body(error, request_id), status_code=status_of(error), headers=error_headers(error))


class MessagesRoute(TellingRoute):
    """A route whose request has an id, which every response carries, and whose errors are Anthropic's.

    The endpoint finds the id as `request.state.request_id`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request_id = request.state.request_id = "req_" + uuid.uuid4().hex
            try:
                response = await answer(request)
            except PensieveError as error:
                response = error_response(ErrorItem.of(error), request_id)
            except Exception:
                logger.exception("request %s failed", request_id)
                response = error_response(ErrorItem.of(InternalError("internal error")), request_id)
            response.headers["request-id"] = request_id
            return response

        return handle
