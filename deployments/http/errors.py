"""Errors in HTTP: one table from each error class to its status, and to type and code as OpenAI words them.

Everything that sends an error, whole or as an event, looks here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from deployments import errors as ours
from deployments.generation import ErrorItem
from deployments.store import errors as store
from engine import errors as engine
from engine.errors import PensieveError

# Of an error's message: it may repeat what was sent, and a client that sent megabytes does not need them back.
MAX_MESSAGE_CHARS = 1000

INVALID = "invalid_request_error"
SERVER = "server_error"
LIMIT = "rate_limit_error"
UNAVAILABLE = "service_unavailable"


class Wire(NamedTuple):
    """How clients see an error: the HTTP status, and `type` and `code` of the body."""

    status: int
    type: str
    code: str | None


_INTERNAL = Wire(500, SERVER, None)
ERRORS: Mapping[type[PensieveError], Wire] = {
    engine.RequestError: Wire(400, INVALID, None),
    engine.InvalidParameterError: Wire(400, INVALID, "invalid_value"),
    engine.GrammarFailedError: Wire(400, INVALID, "grammar_failed"),
    engine.AdapterError: Wire(400, INVALID, "adapter_not_loadable"),
    engine.ContextLengthError: Wire(400, INVALID, "context_length_exceeded"),
    ours.MalformedBodyError: Wire(400, INVALID, None),
    ours.MissingParameterError: Wire(400, INVALID, "missing_required_parameter"),
    ours.UnknownParameterError: Wire(400, INVALID, "unknown_parameter"),
    ours.UnsupportedParameterError: Wire(400, INVALID, "unsupported_parameter"),
    ours.ExclusiveParametersError: Wire(400, INVALID, "mutually_exclusive_parameters"),
    store.PreviousResponseError: Wire(400, INVALID, "previous_response_not_complete"),
    ours.AuthenticationError: Wire(401, INVALID, "invalid_api_key"),
    ours.NotAnOperatorError: Wire(403, INVALID, "not_an_operator"),
    ours.RemoteWithoutKeysError: Wire(403, INVALID, "no_api_keys_configured"),
    ours.CrossOriginError: Wire(403, INVALID, "cross_origin_request"),
    engine.UnknownModelError: Wire(404, INVALID, "model_not_found"),
    store.NotFoundError: Wire(404, INVALID, "not_found"),
    store.PreviousResponseNotFoundError: Wire(404, INVALID, "previous_response_not_found"),
    store.ConversationBusyError: Wire(409, INVALID, "conversation_locked"),
    ours.ResponseCancelledError: Wire(409, INVALID, "response_cancelled"),
    ours.BodyTooLargeError: Wire(413, INVALID, "body_too_large"),
    ours.UnsupportedMediaTypeError: Wire(415, INVALID, "unsupported_media_type"),
    ours.UnsupportedEncodingError: Wire(415, INVALID, "unsupported_content_encoding"),
    engine.OverloadedError: Wire(429, LIMIT, "overloaded"),
    ours.TenantLimitError: Wire(429, LIMIT, None),
    ours.TooManyRequestsError: Wire(429, LIMIT, "too_many_requests"),
    ours.TooManyTokensError: Wire(429, LIMIT, "tokens_per_minute"),
    ours.TooManyStoreRequestsError: Wire(429, LIMIT, "store_requests_per_minute"),
    ours.TooManyStoreBytesError: Wire(429, LIMIT, "store_bytes_per_minute"),
    store.StoredTooMuchError: Wire(429, "insufficient_quota", "storage_quota_exceeded"),
    ours.HeadersTooLargeError: Wire(431, INVALID, "headers_too_large"),
    engine.EngineError: _INTERNAL,
    ours.InternalError: _INTERNAL,
    engine.ExecutorError: Wire(500, SERVER, "executor_failed"),
    engine.DeviceFailedError: Wire(500, SERVER, "device_failed"),
    engine.EngineStoppedError: Wire(503, UNAVAILABLE, "engine_stopped"),
    ours.ReplicaLostError: Wire(503, UNAVAILABLE, "replica_lost"),
    ours.ModelReplacedError: Wire(503, UNAVAILABLE, "model_replaced"),
    ours.NoReplicaError: Wire(503, UNAVAILABLE, "no_replica"),
    ours.ModelNotLoadedError: Wire(503, UNAVAILABLE, "model_not_loaded"),
    ours.ReplicaNotPlacedError: Wire(503, UNAVAILABLE, "replica_not_placed"),
    ours.ServerStoppingError: Wire(503, UNAVAILABLE, "server_stopping"),
    store.StoreError: Wire(503, UNAVAILABLE, None),
    store.StoreUnavailableError: Wire(503, UNAVAILABLE, "store_unavailable"),
    store.StoreFullError: Wire(503, UNAVAILABLE, "store_full"),
    store.StoreCorruptedError: Wire(503, UNAVAILABLE, "store_corrupted"),
    ours.AnswerTimeoutError: Wire(504, "timeout_error", "timeout"),
}
_BY_NAME = {kind.__name__: wire for kind, wire in ERRORS.items()}


def wire_of(error: ErrorItem | PensieveError) -> Wire:
    """How clients see it. What has no row in the table, like an error that only the start may raise, is internal."""
    return _BY_NAME.get(error.kind if isinstance(error, ErrorItem) else type(error).__name__, _INTERNAL)


def error_body(error: ErrorItem) -> dict[str, Any]:
    """The JSON body, also of an event in a stream that has begun."""
    wire = wire_of(error)
    return _body(error.message, wire.type, error.param, wire.code)


def error_headers(error: ErrorItem) -> dict[str, str]:
    """What a response with this error says besides its body."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if wire_of(error).status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: ErrorItem) -> JSONResponse:
    """A whole response that says only this."""
    return JSONResponse(error_body(error), status_code=wire_of(error).status, headers=error_headers(error))


def _body(message: str, error_type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message[:MAX_MESSAGE_CHARS], "type": error_type, "param": param, "code": code}}


async def pensieve_error(request: Request, error: Exception) -> Response:
    """Answers what was raised on purpose."""
    assert isinstance(error, PensieveError)
    return error_response(ErrorItem.of(error))


async def http_error(request: Request, error: Exception) -> Response:
    """Answers what Starlette raises: no such route, or not with this method. OPTIONS asks for the methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": _allowed(request)})
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    body = _body(f"{request.method} {request.scope['path']}: {error.detail}", INVALID, None, code)
    headers = {"allow": _allowed(request)} if error.status_code == 405 else error.headers
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _allowed(request: Request) -> str:
    """The methods of all routes of this path; the exception knows only those of one."""
    methods = {
        method
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return ", ".join(sorted(methods | {"OPTIONS"}))


async def unexpected_error(request: Request, error: Exception) -> Response:
    """Answers a defect. Starlette raises it again after this, so that Serve logs it."""
    return error_response(ErrorItem.of(ours.InternalError("internal error")))


EXCEPTION_HANDLERS = {
    PensieveError: pensieve_error,
    HTTPException: http_error,
    Exception: unexpected_error,
}
