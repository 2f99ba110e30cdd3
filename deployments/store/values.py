"""What goes into the conversation store and what comes out, as plain values. Knows no database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from engine.text.transcript import Transcript

INTERRUPTED = "interrupted"
Order = Literal["asc", "desc"]


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
    """An item to keep.

    body: the OpenAI item object as given.
    id: None = the store makes one. An id that a client chose must not be passed on: ids are unique over all tenants.
    """

    role: str | None
    body: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class StoredItem:
    id: str
    role: str | None
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list; has_more: there are items after the last one, in the order asked for."""

    items: tuple[StoredItem, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class NewResponse:
    """A turn that begins. At most one of previous_response_id and conversation_id.

    owner: the boot of the ingress process that runs it; lease_until: unix seconds up to which the turn counts as
    running unless the lease is renewed. params: whatever else the answer has to repeat (temperature, metadata, ...).
    session_key: what it is routed by if it continues neither; None = its own id.
    """

    id: str
    model: str
    input: Sequence[NewItem]
    owner: str
    lease_until: float
    previous_response_id: str | None = None
    conversation_id: str | None = None
    session_key: str | None = None
    instructions: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A turn that ended with an answer, whole or cut at max_output_tokens.

    transcript: what the engine computed, the history included; None = unknown, and the next turn tokenises its history.
    """

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
    """session_key: the conversation's id, or what the chain's first response was routed by, such as its own id."""

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
    input: tuple[StoredItem, ...]
    output: tuple[StoredItem, ...]


@dataclass(frozen=True, slots=True)
class StoredConversation:
    id: str
    created_at: float
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class History:
    """What was said before a turn, oldest first, without instructions.

    transcript: what the engine computed for the latest turn of it. Items added or removed by hand since are in `items`
    alone, so match it as text.
    is_whole: whether no older items were left out.
    """

    items: tuple[StoredItem, ...]
    transcript: Transcript | None
    session_key: str
    is_whole: bool = True
