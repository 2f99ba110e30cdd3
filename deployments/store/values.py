"""What goes into the conversation store and what comes out: plain values, and the errors with their HTTP meaning.
Knows no database.

PensieveError
|-- ConfigError
|   |-- StoreConfigError             the store's URL is wrong, or its driver is not installed; raised at start
|   `-- StoreVersionError            the database was written by a newer version; raised at start
|-- RequestError
|   |-- NotFoundError                no such id, deleted, or another tenant's (HTTP 404)
|   |   `-- PreviousResponseNotFoundError
|   |-- PreviousResponseError        it is there but has no whole answer to continue from (HTTP 400)
|   |-- ConversationBusyError        another turn of the conversation is running (HTTP 409)
|   `-- StoredTooMuchError           the tenant keeps as much as it may (HTTP 429)
`-- EngineError
    `-- StoreError                   the database is at fault; clients hear no more than that, the log says where
        |-- StoreUnavailableError    it does not answer (HTTP 503)
        |   `-- StoreFullError       it has no room (HTTP 503)
        `-- StoreCorruptedError      what it holds is damaged (HTTP 503); waiting does not help
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from engine.errors import ConfigError, EngineError, RequestError
from engine.text.transcript import Transcript

INTERRUPTED = "interrupted"
Order = Literal["asc", "desc"]


class StoreConfigError(ConfigError):
    """The store's URL is wrong, or its driver is not installed."""


class StoreVersionError(ConfigError):
    """The database has migrations that this version does not know."""


class NotFoundError(RequestError):
    """No such id here. Of an id that belongs to another tenant nothing else is ever said."""

    http_status = 404
    code: str | None = "not_found"


class PreviousResponseNotFoundError(NotFoundError):
    """No such response to continue from."""

    code = "previous_response_not_found"


class PreviousResponseError(RequestError):
    """The response exists, but its turn is still running, or was interrupted, cancelled or failed."""

    code = "previous_response_not_complete"


class ConversationBusyError(RequestError):
    """Turns of one conversation come one after the other; one is running."""

    http_status = 409
    code = "conversation_locked"


class StoredTooMuchError(RequestError):
    """The tenant keeps as much as it may."""

    http_status = 429
    kind = "insufficient_quota"
    code = "storage_quota_exceeded"
    retry_after_s = None


class StoreError(EngineError):
    """The database is at fault. The message is the same for every cause: what a driver says may quote a row, a path or a
    host, and clients are no operators."""

    http_status = 503
    kind = "service_unavailable"
    says = ""

    def __init__(self) -> None:
        super().__init__(self.says)


class StoreUnavailableError(StoreError):
    """The database does not answer, or not in time. Whether a write took effect is then unknown."""

    code = "store_unavailable"
    says = (
        "the conversation store does not answer; the server's log says why. Nothing needs a restart: requests work again "
        "as soon as it is back"
    )


class StoreFullError(StoreUnavailableError):
    """No room is left, or less than new turns may take."""

    code = "store_full"
    says = (
        "the conversation store has no room for more: delete conversations and responses, send store: false, or have the "
        "operator make room. What is stored can be read"
    )


class StoreCorruptedError(StoreError):
    """The database, or a row of it, is damaged."""

    code = "store_corrupted"
    says = (
        "the conversation store is damaged, and waiting does not mend it: its operator has to restore a backup; the server's "
        "log says which file or database it is"
    )
    retry_after_s = None


class Status(StrEnum):
    """Of a response. Only IN_PROGRESS ever changes."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that a tenant may keep, see usage.py; None = any amount."""

    max_rows: int | None = None
    max_bytes: int | None = None


UNLIMITED = Quota()


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Of one tenant: what it may keep, and what it may send in a minute to the paths that only store; None = any amount."""

    quota: Quota = UNLIMITED
    requests_per_minute: int | None = None
    bytes_per_minute: int | None = None


NO_STORE_LIMITS = StoreLimits()


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item to keep. body: the OpenAI item object as given. id: None = the store makes one. An id that a client
    chose must not be passed on: ids are unique over all tenants."""

    role: str | None
    body: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    id: str
    role: str | None
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list; has_more: there are items after the last one, in the order asked for."""

    items: tuple[Item, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class NewResponse:
    """A turn that begins. At most one of previous_response_id and conversation_id.

    owner: the boot of the ingress process that runs it; lease_until: unix seconds up to which the turn counts as
    running unless the lease is renewed. params: whatever else the answer has to repeat (temperature, metadata, ...).
    """

    id: str
    model: str
    input: Sequence[NewItem]
    owner: str
    lease_until: float
    previous_response_id: str | None = None
    conversation_id: str | None = None
    instructions: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A turn that ended with an answer, whole or cut at max_output_tokens. transcript: what the engine computed, the
    history included; None = unknown, and the next turn tokenises its history."""

    output: Sequence[NewItem]
    usage: Mapping[str, Any]
    transcript: Transcript | None
    completed_at: float
    incomplete_reason: str | None = None

    @property
    def status(self) -> Status:
        return Status.COMPLETED if self.incomplete_reason is None else Status.INCOMPLETE


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """session_key: the conversation's id or the id of the chain's first response; routing hashes on it."""

    id: str
    conversation_id: str | None
    previous_response_id: str | None
    session_key: str
    model: str
    created_at: float
    completed_at: float | None
    status: Status
    incomplete_reason: str | None
    error: Mapping[str, Any] | None
    instructions: str | None
    params: Mapping[str, Any]
    usage: Mapping[str, Any] | None
    input: tuple[Item, ...]
    output: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class StoredConversation:
    id: str
    created_at: float
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class History:
    """What was said before a turn, oldest first, without instructions. transcript: what the engine computed for the
    latest turn of it; items added or removed by hand since are in `items` alone, so match it as text. is_whole: no older
    items were left out."""

    items: tuple[Item, ...]
    transcript: Transcript | None
    session_key: str
    is_whole: bool = True
