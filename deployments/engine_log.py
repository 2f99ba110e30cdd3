"""The engine's log lines in a replica's log.

The engine logs by Python's own `engine.*` loggers, which Serve leaves alone, so nothing of them would be in any file.
Here they go to the replica's log, with its level and its format.
"""

from __future__ import annotations

import logging

from ray.serve.context import _get_serve_request_context, _set_request_context

SERVE_LOGGER = logging.getLogger("ray.serve")
ENGINE_LOGGER = logging.getLogger("engine")


def named(request_id: str) -> dict[str, str]:
    """The `extra` of a log line about the request with this X-Request-Id; empty = it is not known."""
    return {"request_id": request_id} if request_id else {}


def keep_request_id(request_id: str) -> None:
    """Calls of handles from here on have this id on their log lines, also in a context that Serve has not made.

    Serve gives such calls an id of their own otherwise: each choice of a request has a context of its own.
    """
    if request_id and not _get_serve_request_context().request_id:
        _set_request_context(request_id=request_id)


class _ToServe(logging.Handler):
    """Asks Serve's logger each time: Serve may change its level and its handlers while the replica runs."""

    def emit(self, record: logging.LogRecord) -> None:
        if SERVE_LOGGER.isEnabledFor(record.levelno):
            SERVE_LOGGER.handle(record)


def log_engine_with_serve(level: int | None = None) -> None:
    """Sends the engine's lines of this process to the replica's log from now on; may be called again.

    level: the replica's, in a worker of a tensor-parallel group. Serve has no file there: the lines go to standard
    error.
    """
    if level is not None:
        SERVE_LOGGER.setLevel(level)
    ENGINE_LOGGER.handlers = [_ToServe()]
    ENGINE_LOGGER.setLevel(logging.DEBUG)
    ENGINE_LOGGER.propagate = False  # to the root's, whose output Serve takes for another line of its own
