"""What an observer of the cache is shown: where chunks lie, and which left lately and why.

Changes nothing. Knows no conversation but by the keys of its chunks, and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.cache.cost_model import CostModel
from engine.core.cache.index import Chunk, ChunkIndex, chunk_key, root_key
from engine.core.cache.tier import Tiers
from engine.core.request import Request
from engine.core.tier_table import BOTH, DROPPED, FAST_TIERS

# Evictions that are remembered while the cache is watched.
MAX_EVICTIONS = 64
# So long after the last look the cache counts as watched, in seconds.
WATCH_S = 10.0


class Cell(NamedTuple):
    """One chunk of a context.

    state: the fastest tier that has it, or "both" (fast ones), or "dropped"; or what is being done to it: "computing",
        "loading" (to the GPU tier), "storing" (to the CPU tier).
    num_tokens: whose KV is there, or was.
    idle_s: since its last use by any conversation; None while a request uses it, or if it is dropped.
    retention_value: what the eviction policy goes by, the smallest goes first; None as idle_s, and when it was used just now.
    """

    state: str
    num_tokens: int
    idle_s: float | None = None
    retention_value: float | None = None


class Eviction(NamedTuple):
    """A chunk that left a tier.

    number: counts up.
    now_s: when it left, on the driver's clock; the idle time and the retention value are those of that moment.
    key: of the chunk; empty if it has no name.
    """

    number: int
    now_s: float
    reason: str
    key: bytes
    position: int
    num_tokens: int
    idle_s: float
    retention_value: float | None


@dataclass(frozen=True, slots=True)
class ContextKeys:
    """The names that the chunks of a context have if they are cached.

    tails: those that its last chunk may have, the longest first, with their lengths.
    num_chunks: of the whole context, of which these may be the first ones.
    """

    full: tuple[bytes, ...]
    tails: tuple[tuple[int, bytes], ...]
    num_chunks: int


def context_keys(
    token_ids: Sequence[int], *, model: str, tenant: str, chunk_size: int, max_chunks: int, adapter: str = ""
) -> ContextKeys:
    """Of at most `max_chunks` chunks in front. O(tokens); what it says holds for ever.

    The last token of a turn was sampled and perhaps never computed: a chunk that it would begin does not count, and the
    one that it ends may be there without it.
    """
    num_chunks = count_computed_chunks(len(token_ids), chunk_size)
    key = root_key(model, adapter, tenant)
    full = []
    for position in range(min(num_chunks - 1, max_chunks)):
        key = chunk_key(key, token_ids[position * chunk_size : (position + 1) * chunk_size])
        full.append(key)
    tail = token_ids[len(full) * chunk_size : num_chunks * chunk_size] if len(full) < max_chunks else ()
    return ContextKeys(tuple(full), tail_keys(key, tail), num_chunks)


def count_computed_chunks(num_tokens: int, chunk_size: int) -> int:
    """Chunks of a context that has had a turn, whose last token was perhaps never computed."""
    return -(-max(num_tokens - 1, min(num_tokens, 1)) // chunk_size)


def tail_keys(parent_key: bytes, tail: Sequence[int]) -> tuple[tuple[int, bytes], ...]:
    """See ContextKeys.tails. parent_key: of the last full chunk. tail: the tokens behind it, of one chunk at most."""
    return tuple((length, chunk_key(parent_key, tail[:length])) for length in range(len(tail), 0, -1))


class MappedContext(NamedTuple):
    """A conversation's context as it is now.

    status: "idle", or that of its request.
    num_chunks: of the whole context, of which `cells` may be the first ones.
    keys: the names of its chunks as far as they are known.
    """

    status: str
    num_chunks: int
    cells: tuple[Cell, ...]
    keys: tuple[bytes, ...]


class EvictionLog:
    """The last evictions, as long as the cache is watched; else it costs one comparison for each."""

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._evictions: deque[Eviction] = deque(maxlen=MAX_EVICTIONS)
        self._watched_until_s = float("-inf")
        self._num_noted = 0

    def watch(self, now: float) -> None:
        """From now on for WATCH_S. What was noted before a pause is forgotten: it would have a gap behind it."""
        if now >= self._watched_until_s:
            self._evictions.clear()
        self._watched_until_s = now + WATCH_S

    def note(self, reason: str, chunk: Chunk, now: float) -> None:
        """`chunk` is about to go."""
        if now >= self._watched_until_s:
            return
        self._num_noted += 1
        idle_s = now - chunk.last_active
        self._evictions.append(
            Eviction(
                self._num_noted,
                now,
                reason,
                chunk.key or b"",
                chunk.position,
                chunk.num_tokens,
                idle_s,
                retention_value(self._cost_model, chunk.position, idle_s),
            )
        )

    def latest(self) -> tuple[Eviction, ...]:
        """The newest first."""
        return tuple(reversed(self._evictions))


def retention_value(cost_model: CostModel, position: int, idle_s: float) -> float | None:
    """See eviction.RetentionValue; None for a chunk that was used just now, whose value has no bound."""
    return cost_model.chunk_cost(position) / idle_s if idle_s > 0 else None


class CacheMap:
    """Where the chunks of contexts lie now."""

    def __init__(self, tiers: Tiers, index: ChunkIndex, cost_model: CostModel) -> None:
        self._tiers = tiers
        self._index = index
        self._cost_model = cost_model

    def map_context(self, keys: ContextKeys, now: float) -> list[Cell]:
        """The chunks of a context of which no request is running. O(chunks)."""
        size = self._index.chunk_size
        cells = [self._cell(self._index.match(key), size, now) for key in keys.full]
        if keys.tails:
            tail = next((chunk for _, key in keys.tails if (chunk := self._index.match(key)) is not None), None)
            cells.append(self._cell(tail, keys.tails[0][0], now))
        return cells

    def map_row(self, request: Request, max_chunks: int, now: float) -> list[Cell]:
        """The chunks of a running request, the first `max_chunks` of them."""
        size = self._index.chunk_size
        computing: set[int] = set()
        for start, end in request.pending:
            computing.update(range(start // size, min(-(-end // size), max_chunks)))
        cells = [
            Cell("computing", chunk.num_tokens)
            if chunk.position in computing and chunk not in self._tiers.primary.arriving
            else self._cell(chunk, chunk.num_tokens, now)
            for chunk in request.chunks[:max_chunks]
        ]
        # A token that was sampled just now may begin a chunk that gets its block with the next step.
        num_new = min(-(-request.num_tokens // size), max_chunks) - len(cells)
        return cells + [Cell("computing", 0)] * num_new

    def _cell(self, chunk: Chunk | None, num_tokens: int, now: float) -> Cell:
        """num_tokens: of a chunk that is gone."""
        if chunk is None:
            return Cell(DROPPED, num_tokens)
        state = self._state(chunk)
        if chunk.pins:
            return Cell(state, chunk.num_tokens)
        idle_s = now - chunk.last_active
        return Cell(state, chunk.num_tokens, idle_s, retention_value(self._cost_model, chunk.position, idle_s))

    def _state(self, chunk: Chunk) -> str:
        tiers = self._tiers
        if chunk in tiers.primary.arriving:
            return "loading"
        if chunk in tiers.secondary.arriving:
            return "storing"
        names = [tier.name for tier in tiers if chunk.blocks[tier.number] is not None]
        return BOTH if tuple(names[:2]) == FAST_TIERS else names[0]
