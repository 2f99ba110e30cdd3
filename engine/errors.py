"""Everything that the engine raises on purpose. A message says what is wrong and what to do about it.

PensieveError
|-- ConfigError                  an option is wrong; raised at start
|   `-- WorkloadError            a workload, or a file that it is read from, is wrong
|-- ModelLoadError               the model or its tokenizer cannot be loaded
|   `-- UnsupportedModelError    it loads, but its attention cannot be served from a paged cache
|-- KernelBuildError             an attention kernel cannot be built, or is wrong here; raised only if asked for by name
|-- RequestError                 the request is at fault
|   |-- InvalidParameterError    a parameter is out of range or not implemented
|   |-- ContextLengthError       prompt and answer do not fit the context window
|   |-- UnknownModelError        no such model here
|   `-- AdapterError             an adapter cannot be loaded or unloaded
`-- EngineError                  the engine is at fault
    |-- OverloadedError          the queue is full
    |-- ExecutorError            the step that computed this request failed; the engine goes on
    |-- GrammarFailedError       an answer cannot go on within its grammar; the engine goes on
    |-- DeviceFailedError        the device reports an error after which no further operation works
    `-- EngineStoppedError       the engine is shut down
"""

from __future__ import annotations


class PensieveError(Exception):
    """The base of all errors that are raised on purpose.

    param: the option or parameter that is wrong, as the engine calls it; None if no single one is.
    retry_after_s: seconds after which the same request may succeed; None if waiting does not help.
    """

    retry_after_s: float | None = None

    def __init__(self, message: str, param: str | None = None, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class ConfigError(PensieveError):
    """An option is wrong; the message names it and the remedy."""


class WorkloadError(ConfigError):
    """A workload, or a file that it is read from, is wrong; the message names the file, the line and the remedy."""


class ModelLoadError(PensieveError):
    """The model or its tokenizer cannot be loaded."""


class UnsupportedModelError(ModelLoadError):
    """The model's attention cannot be served from a paged cache."""


class KernelBuildError(PensieveError):
    """An attention kernel cannot be built on this machine, or is wrong on it; torch's operations do its work then."""


class RequestError(PensieveError):
    """The request is at fault; trying again without a change is useless."""


class InvalidParameterError(RequestError):
    """A parameter is out of range, of the wrong kind, or not implemented; `param` names it."""


class ContextLengthError(RequestError):
    """Prompt and answer do not fit the context window."""

    def __init__(self, message: str, param: str | None = "prompt") -> None:
        super().__init__(message, param)


class UnknownModelError(RequestError):
    """No model of that name is served here."""


class AdapterError(RequestError):
    """An adapter cannot be loaded or unloaded; the message names the file, the field or the option that is the reason."""


class EngineError(PensieveError):
    """The engine is at fault, not the request."""


class OverloadedError(EngineError):
    """The queue is full; trying again later makes sense."""

    retry_after_s = 1.0


class ExecutorError(EngineError):
    """The step that computed this request failed. Its requests end; the engine goes on."""


class GrammarFailedError(EngineError):
    """An answer cannot go on within its grammar, which is too complex from here on; only this request ends."""


class DeviceFailedError(EngineError):
    """The device reports an error, such as an illegal address, after which this process can use it no more."""


class EngineStoppedError(EngineError):
    """The engine is shut down or shutting down."""

    retry_after_s = 1.0
