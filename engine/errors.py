"""Everything that the engine raises on purpose. A message says what is wrong and what to do about it.

PensieveError
|-- ConfigError                  an option is wrong; raised at start
|-- ModelLoadError               the model or its tokenizer cannot be loaded
|   `-- UnsupportedModelError    it loads, but its attention cannot be served from a paged cache
|-- KernelBuildError             an attention kernel cannot be built, or is wrong here; raised only if asked for by name
|-- RequestError                 the request is at fault (HTTP 400)
|   |-- InvalidParameterError    a parameter is out of range or not implemented
|   |-- ContextLengthError       prompt and answer do not fit the context window
|   `-- UnknownModelError        no such model here (HTTP 404)
`-- EngineError                  the engine is at fault (HTTP 500)
    |-- OverloadedError          as many requests wait as may (HTTP 429)
    |-- ExecutorError            the step that computed this request failed; the engine goes on
    |-- DeviceFailedError        the device reports an error after which no further operation works
    `-- EngineStoppedError       the engine is shut down (HTTP 503)
"""

from __future__ import annotations


class PensieveError(Exception):
    """Base of all; `http_status`, `kind` and `code` are what an OpenAI error body says of it. retry_after_s: with
    status 429 or 503, when the same request may succeed, in seconds; None = not by waiting."""

    http_status = 500
    kind = "server_error"
    code: str | None = None
    retry_after_s: float | None = 1.0

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(PensieveError):
    """An option is wrong; the message names it and the remedy."""


class ModelLoadError(PensieveError):
    """The model or its tokenizer cannot be loaded."""


class UnsupportedModelError(ModelLoadError):
    """The model's attention cannot be served from a paged cache."""


class KernelBuildError(PensieveError):
    """An attention kernel cannot be built on this machine, or is wrong on it; torch's operations do its work then."""


class RequestError(PensieveError):
    """The request is at fault; trying again without a change is useless."""

    http_status = 400
    kind = "invalid_request_error"


class InvalidParameterError(RequestError):
    """A parameter is out of range, of the wrong kind, or not implemented; `param` names it."""

    code = "invalid_value"


class ContextLengthError(RequestError):
    """Prompt and answer do not fit the context window."""

    code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """No model of that name is served here."""

    http_status = 404
    code = "model_not_found"


class EngineError(PensieveError):
    """The engine is at fault, not the request."""


class OverloadedError(EngineError):
    """As many requests wait as may; trying again later makes sense."""

    http_status = 429
    kind = "rate_limit_error"
    code = "overloaded"


class ExecutorError(EngineError):
    """The step that computed this request failed. Its requests end; the engine goes on."""

    code = "executor_failed"


class DeviceFailedError(EngineError):
    """The device reports an error, such as an illegal address, after which this process can use it no more."""

    code = "device_failed"


class EngineStoppedError(EngineError):
    """The engine is shut down or shutting down."""

    http_status = 503
    kind = "service_unavailable"
    code = "engine_stopped"
