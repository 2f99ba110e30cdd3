"""What travels between the ingress and an engine replica: one request there, a stream of items back.

Plain values, so that no exception class and no engine object has to survive pickling. Knows neither HTTP nor Ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import KW_ONLY, dataclass, replace

from deployments.origin import NO_ORIGIN, Origin
from engine.adapters import with_adapter
from engine.cache_view import CacheView
from engine.core.retention import ConversationCache, RetentionOutcome
from engine.errors import PensieveError
from engine.generation import Generation
from engine.text.output import OutputDelta


@dataclass(frozen=True, slots=True)
class GenerationRequest(Generation):
    """What the engine is asked for, and how its answer is to travel.

    stream: deltas as they come; else one delta with the whole answer.
    begun_by: AsyncEngine.identity of the engine that gave the beginning; one of another identity does not go on from there.
    returns_transcript: the last delta is to bring what was said.
    model: which one is asked, if there are several; empty = the first one. An adapter's name is one, too.
    origin: the HTTP request that it is for.
    """

    session_id: str
    _: KW_ONLY
    stream: bool
    begun_by: str = ""
    returns_transcript: bool = False
    model: str = ""
    origin: Origin = NO_ORIGIN

    @property
    def routing_key(self) -> str:
        """What it is routed by: the session, with its adapter."""
        return with_adapter(self.session_id, self.adapter)


@dataclass(frozen=True, slots=True)
class DeltaItem:
    """A part of the answer, from the engine replica of that rank. model: which one says it; a deploy may change it."""

    delta: OutputDelta
    replica_rank: int
    model: str = ""


@dataclass(frozen=True, slots=True)
class ErrorItem:
    """The request ended here with an error, as plain values: its class may not be importable at the other end.

    kind: the name of the error's class; http/errors.py says what that is for clients.
    message, param, retry_after_s: see PensieveError.
    """

    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: PensieveError) -> ErrorItem:
        """The same as a value."""
        return cls(type(error).__name__, error.message, error.param, error.retry_after_s)

    def is_a(self, kind: type[PensieveError]) -> bool:
        """Whether the error was of this very class."""
        return self.kind == kind.__name__


GenerationItem = DeltaItem | ErrorItem


async def drain(items: AsyncIterable[GenerationItem]) -> None:
    """Reads to the end. Use it instead of closing when nothing more matters: closing cancels a call that is about to end."""
    async for _ in items:
        pass


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an engine replica serves, and how much of it.

    model_name: what clients ask for. max_model_len: the window in tokens, prompt and answer. max_num_requests: as many
    may run and wait in one replica; it rejects the next one. warnings: what an operator should see to although it serves.
    adapters: names that clients may ask for besides, of the adapters that are loaded.
    may_load_adapters: whether others may be loaded at run time.
    adapter: which of them this is the card of; empty = the model itself. parent: the model's own name then.
    """

    model_name: str
    max_model_len: int
    max_num_requests: int
    warnings: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    may_load_adapters: bool = False
    adapter: str = ""
    parent: str | None = None

    def of_adapter(self, name: str) -> ModelCard:
        """The same of one of its adapters."""
        return replace(self, model_name=name, adapter=name, parent=self.model_name, adapters=())


@dataclass(frozen=True, slots=True)
class ReplicaCache:
    """What the engine replica of that rank shows of its cache; see AsyncEngine.map_cache."""

    replica_rank: int
    view: CacheView


@dataclass(frozen=True, slots=True)
class KeptConversation:
    """What the engine replica of that rank has cached of a conversation, and what came of a hint; its end is a Unix time."""

    replica_rank: int
    cache: ConversationCache
    outcome: RetentionOutcome | None = None


@dataclass(frozen=True, slots=True)
class CacheHold:
    """How many blocks of each tier every engine replica is to leave in use, for a demonstration; None = all."""

    gpu_blocks: int | None = None
    cpu_blocks: int | None = None
