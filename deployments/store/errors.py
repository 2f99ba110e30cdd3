"""Everything that the conversation store raises on purpose.

PensieveError
|-- ConfigError
|   |-- StoreConfigError             the store's URL is wrong, or its driver is not installed; raised at start
|   `-- StoreVersionError            the database was written by a newer version; raised at start
|-- RequestError
|   |-- NotFoundError                no such id, deleted, or another tenant's
|   |   `-- PreviousResponseNotFoundError
|   |-- PreviousResponseError        it is there but has no whole answer to continue from
|   |-- ConversationBusyError        another turn of the conversation is running
|   `-- StoredTooMuchError           the tenant's quota is used up
`-- EngineError
    `-- StoreError                   the database is at fault; its cause is in the log, not in the message
        |-- StoreUnavailableError    it does not answer
        |   `-- StoreFullError       it has no room
        `-- StoreCorruptedError      what it holds is damaged; waiting does not help
"""

from __future__ import annotations

from engine.errors import ConfigError, EngineError, RequestError


class StoreConfigError(ConfigError):
    """The store's URL is wrong, or its driver is not installed."""


class StoreVersionError(ConfigError):
    """The database has migrations that this version does not know."""


class NotFoundError(RequestError):
    """No such id here. Of an id that belongs to another tenant nothing else is ever said."""


class PreviousResponseNotFoundError(NotFoundError):
    """No such response to continue from."""


class PreviousResponseError(RequestError):
    """The response exists, but its turn is still running, or was interrupted, cancelled or failed."""


class ConversationBusyError(RequestError):
    """Turns of one conversation come one after the other; one is running."""


class StoredTooMuchError(RequestError):
    """The tenant keeps as much as it may."""


class StoreError(EngineError):
    """The database is at fault.

    The message is the same for every cause: what a driver says may quote a row, a path or a host, which only an operator
    should read.
    """

    retry_after_s: float | None = 1.0
    says = ""

    def __init__(self) -> None:
        super().__init__(self.says)


class StoreUnavailableError(StoreError):
    """The database does not answer, or not in time. Whether a write took effect is then unknown."""

    says = (
        "the conversation store does not answer; the server's log says why. Nothing needs a restart: requests work again "
        "as soon as it is back"
    )


class StoreFullError(StoreUnavailableError):
    """No room is left, or less than new turns may take."""

    says = (
        "the conversation store has no room for more: delete conversations and responses, send store: false, or have the "
        "operator make room. What is stored can be read"
    )


class StoreCorruptedError(StoreError):
    """The database, or a row of it, is damaged."""

    says = (
        "the conversation store is damaged, and waiting does not mend it: its operator has to restore a backup; the server's "
        "log says which file or database it is"
    )
    retry_after_s = None
