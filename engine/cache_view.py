"""What an engine shows of its cache: where the chunks of conversations are, and what was evicted.

CacheWatch makes the names of chunks outside the engine thread; in that thread it only looks them up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from engine.core.cache_map import Cell, ContextKeys, MappedContext, context_keys
from engine.core.engine_core import EngineCore
from engine.core.tier_table import eviction_moves
from engine.text.transcript import ConversationTable, Transcript

# Conversations that are shown: of one tenant, and in all. Chunks of one conversation, from its front on.
MAX_TENANT_CONVERSATIONS = 32
MAX_CONVERSATIONS = 64
MAX_CHUNKS = 256
# How many of the last used conversations are looked through for those of the tenants that watch.
MAX_SEARCHED = 4096


@dataclass(frozen=True, slots=True)
class CacheQuery:
    """Who watches.

    tenants: whose conversations are asked for.
    sees_all: those of all tenants are shown, as far as there is room.
    """

    tenants: tuple[str, ...] = ()
    sees_all: bool = False


class ConversationView(NamedTuple):
    """A conversation as a row of chunks.

    status: "idle", or that of its request; see RequestStatus.
    num_chunks: of the whole context.
    cells: its first chunks, at most MAX_CHUNKS; none for a request that has not begun.
    """

    tenant: str
    session_id: str
    status: str
    num_chunks: int
    cells: tuple[Cell, ...]


class EvictionView(NamedTuple):
    """A chunk that left a tier.

    number: counts up in this engine.
    source, target: tiers, or "dropped".
    tenant, session_id: of a conversation that it is part of; None if that is not among those shown.
    """

    number: int
    ago_s: float
    reason: str
    source: str
    target: str
    tenant: str | None
    session_id: str | None
    position: int
    num_tokens: int
    idle_s: float
    retention_value: float | None


class TierView(NamedTuple):
    """Blocks of a tier.

    num_held: how many of those in use are held back for a demonstration.
    """

    name: str
    num_blocks: int
    num_used: int
    num_held: int


@dataclass(frozen=True, slots=True)
class CacheView:
    """Everything that is shown at one time.

    hit_rates: the part of all prompt tokens since the start that was found in "gpu", in "cpu" (loaded) and "not_loaded",
        that had been "dropped", and that was "new"; empty before the first prompt.
    """

    chunk_size: int
    tiers: tuple[TierView, ...]
    hit_rates: dict[str, float]
    conversations: tuple[ConversationView, ...]
    evictions: tuple[EvictionView, ...]


class Call(Protocol):
    """Runs a function in the engine thread, between two steps."""

    def __call__(self, function: Callable[[], Any]) -> Awaitable[Any]: ...


class CacheWatch:
    """Looks at one engine's cache. Remembers the names of chunks of the conversations shown last."""

    def __init__(
        self,
        core: EngineCore,
        conversations: ConversationTable,
        call: Call,
        clock: Callable[[], float],
        adapter_identity: Callable[[str], str] = lambda _: "",
    ) -> None:
        """adapter_identity: of a conversation's adapter, by the conversation's name; "" = the model alone."""
        self._adapter_identity = adapter_identity
        self._core = core
        self._conversations = conversations
        self._call = call
        self._clock = clock
        self._named: dict[str, tuple[Transcript, ContextKeys]] = {}
        self._moves = eviction_moves([tier.name for tier in core.cache_config.tiers])

    async def look(self, query: CacheQuery, run_aside: Callable[..., Awaitable[Any]]) -> CacheView:
        """The view for those who watch. Runs two short commands in the engine thread.

        How long these take depends neither on the number of conversations nor on their length.

        run_aside: runs a function in another thread.
        """
        chosen: dict[str, tuple[str, Transcript | None]] = await self._call(lambda: dict(self._choose(query)))
        named = await run_aside(self._name, chosen, self._named)
        self._named = named  # for the next one; others may look at the same time, at other conversations
        view: CacheView = await self._call(lambda: self._view(chosen, named))
        return view

    def _choose(self, query: CacheQuery) -> Iterator[tuple[str, tuple[str, Transcript | None]]]:
        """(conversation id, (tenant, latest branch)) of what is to be shown.

        Conversations with a request come first, then the others by last use.
        """
        wanted = dict.fromkeys(query.tenants, MAX_TENANT_CONVERSATIONS)
        num_any = MAX_TENANT_CONVERSATIONS if query.sees_all else 0
        branches = dict(self._conversations.latest(MAX_SEARCHED))
        tenants = dict(self._core.live_conversations(MAX_SEARCHED))
        num_chosen = 0
        for conversation_id in {**tenants, **branches}:
            tenant = tenants.get(conversation_id) or conversation_id.partition("\n")[0]
            if num_chosen == MAX_CONVERSATIONS:
                return
            if not (wanted.get(tenant) or num_any):
                continue
            if wanted.get(tenant):
                wanted[tenant] -= 1
            if num_any:
                num_any -= 1
            num_chosen += 1
            yield conversation_id, (tenant, branches.get(conversation_id))

    def _name(
        self, chosen: dict[str, tuple[str, Transcript | None]], known: dict[str, tuple[Transcript, ContextKeys]]
    ) -> dict[str, tuple[Transcript, ContextKeys]]:
        config = self._core.cache_config
        named = {}
        for conversation_id, (tenant, branch) in chosen.items():
            if branch is None:
                continue
            before = known.get(conversation_id)
            if before is not None and before[0] is branch:
                named[conversation_id] = before
                continue
            keys = context_keys(
                branch.token_ids,
                model=config.model,
                tenant=tenant,
                adapter=self._adapter_identity(conversation_id),
                chunk_size=config.chunk_size,
                max_chunks=MAX_CHUNKS,
            )
            named[conversation_id] = branch, keys
        return named

    def _view(
        self, chosen: dict[str, tuple[str, Transcript | None]], named: dict[str, tuple[Transcript, ContextKeys]]
    ) -> CacheView:
        now = self._clock()
        contexts = {
            conversation_id: named[conversation_id][1] if conversation_id in named else None
            for conversation_id in chosen
        }
        mapped = self._core.map_contexts(contexts, MAX_CHUNKS, now)
        owners: dict[bytes, str] = {}
        for conversation_id, context in mapped.items():
            for key in context.keys:
                owners.setdefault(key, conversation_id)

        def names(conversation_id: str) -> tuple[str, str]:
            return chosen[conversation_id][0], _shown_session(conversation_id)

        def row(conversation_id: str, context: MappedContext) -> ConversationView:
            return ConversationView(*names(conversation_id), context.status, context.num_chunks, context.cells)

        evictions = []
        for eviction in self._core.latest_evictions():
            owner = owners.get(eviction.key)
            tenant, session_id = (None, None) if owner is None else names(owner)
            source, target = self._moves[eviction.reason]
            evictions.append(
                EvictionView(
                    *(eviction.number, now - eviction.now_s, eviction.reason, source, target, tenant, session_id),
                    *(eviction.position, eviction.num_tokens, eviction.idle_s, eviction.retention_value),
                )
            )
        return CacheView(
            self._core.cache_config.chunk_size,
            self._tiers(),
            self._hit_rates(),
            tuple(row(conversation_id, context) for conversation_id, context in mapped.items()),
            tuple(evictions),
        )

    def _tiers(self) -> tuple[TierView, ...]:
        statistics, held = self._core.get_statistics(), self._core.count_held_blocks()
        names = [tier.name for tier in self._core.cache_config.tiers if tier.is_store]
        return tuple(
            TierView(
                name,
                statistics[f"num_{name}_blocks"],
                statistics[f"num_{name}_blocks"] - statistics[f"num_{name}_blocks_free"],
                held[name],
            )
            for name in names
        )

    def _hit_rates(self) -> dict[str, float]:
        stats = self._core.stats
        if not stats.num_prompt_tokens:
            return {}
        return {
            name: num / stats.num_prompt_tokens
            for name, num in (
                *stats.cached_tokens.items(),
                ("not_loaded", stats.num_not_loaded_tokens),
                ("dropped", stats.num_dropped_tokens),
                ("new", stats.num_new_tokens),
            )
        }


def _shown_session(conversation_id: str) -> str:
    """What is shown of a conversation's name: the session, with its adapter if there is one."""
    return (conversation_id.partition("\n")[2] or conversation_id).replace("\n", " @ ")
