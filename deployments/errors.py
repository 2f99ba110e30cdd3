"""Everything that the deployments raise on purpose, besides the errors of the engine and the store.

The store's are in store/errors.py. http/errors.py has the table of what each of them is in HTTP.

RequestError
|-- MalformedBodyError            the body is no JSON object
|-- MissingParameterError         a parameter that has to be there is not
|-- UnknownParameterError         no parameter has this name
|-- UnsupportedParameterError     OpenAI's API knows it, this server does not do it
|-- ExclusiveParametersError      two parameters of which only one may be given
|-- BodyTooLargeError
|-- HeadersTooLargeError
|-- AuthenticationError           no API key, or an unknown one
|-- NotAnOperatorError            the key is not an operator's
|-- RemoteWithoutKeysError        from another machine, to a server without API keys
|-- CrossOriginError              from a web page of another origin, to a server without API keys
|-- UnsupportedMediaTypeError     a body that does not say that it is JSON
|-- UnsupportedEncodingError      a body that is compressed in a way that is not read here
|-- ResponseCancelledError        the client cancelled the response
`-- TenantLimitError              the tenant reached a limit of its own
    |-- TooManyRequestsError      running at the same time
    |-- TooManyTokensError        a minute
    |-- TooManyStoreRequestsError a minute, to what only stores
    `-- TooManyStoreBytesError    a minute, to what only stores

EngineError
|-- InternalError                 a defect; the log says more
|-- AnswerTimeoutError            the answer was not complete in time
|-- ReplicaLostError              the engine replica that computed the answer died
|-- ModelReplacedError            a deploy changed the model during the answer
`-- EngineStoppedError
    `-- NoReplicaError            no engine replica is ready; a request may wait for one
        |-- ModelNotLoadedError   a replica cannot start
        |-- ReplicaNotPlacedError no node has room for a replica
        `-- ServerStoppingError   the application is being deleted, and no replica will come
"""

from __future__ import annotations

from engine.errors import EngineError, EngineStoppedError, RequestError


class MalformedBodyError(RequestError):
    """The body is no JSON object, or did not arrive whole."""


class MissingParameterError(RequestError):
    """A parameter that has to be there is not."""


class UnknownParameterError(RequestError):
    """No parameter has this name."""


class UnsupportedParameterError(RequestError):
    """OpenAI's API knows the parameter or its value, but this server does not support it."""


class ExclusiveParametersError(RequestError):
    """Only one of two parameters may be given."""


class BodyTooLargeError(RequestError):
    """A body has more bytes than the server takes."""


class HeadersTooLargeError(RequestError):
    """The headers are too many, too long, or too large together."""


class AuthenticationError(RequestError):
    """The API key is missing or unknown."""


class NotAnOperatorError(RequestError):
    """A tenant's key asks for what concerns all tenants."""


class RemoteWithoutKeysError(RequestError):
    """A request comes, or may come, from another machine to a server that has no API keys."""


class CrossOriginError(RequestError):
    """A web page of another origin sends a request through a browser on this machine."""


class UnsupportedMediaTypeError(RequestError):
    """A body does not say that it is JSON, like those that forms of web pages send."""


class UnsupportedEncodingError(RequestError):
    """A body is compressed in a way that the server does not read."""


class ResponseCancelledError(RequestError):
    """The client cancelled or deleted the response while it was being computed."""

    def __init__(self) -> None:
        super().__init__("the response was cancelled")


class TenantLimitError(RequestError):
    """The tenant reached a limit of its own; `retry_after_s` says when it is below it again."""


class TooManyRequestsError(TenantLimitError):
    """As many requests of the tenant run as may."""

    retry_after_s = 1.0


class TooManyTokensError(TenantLimitError):
    """The tenant used its tokens of this minute."""


class TooManyStoreRequestsError(TenantLimitError):
    """The tenant sent as many requests this minute to the paths that only store as it may."""


class TooManyStoreBytesError(TenantLimitError):
    """The tenant sent as many bytes this minute to the paths that only store as it may."""


class InternalError(EngineError):
    """A defect of the server; the message says nothing of it, the log does."""


class AnswerTimeoutError(EngineError):
    """The answer was not complete in the time that the request gave it."""


class ReplicaLostError(EngineError):
    """The engine replica that computed the answer died."""

    retry_after_s = 1.0


class ModelReplacedError(EngineError):
    """Another model was deployed during an answer, and cannot continue what the first one began."""

    retry_after_s = 1.0


class NoReplicaError(EngineStoppedError):
    """No engine replica is ready.

    is_final: none will be until an operator changes something, so waiting does not help.
    """

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message, retry_after_s=30.0 if is_final else 5.0)
        self.is_final = is_final


class ModelNotLoadedError(NoReplicaError):
    """An engine replica cannot start; the message has the reason, without folders of the server."""


class ReplicaNotPlacedError(NoReplicaError):
    """An engine replica waits for a node with room for it, or for its group of ranks."""


class ServerStoppingError(NoReplicaError):
    """The application is being deleted."""
