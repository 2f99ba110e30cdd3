"""What somebody who watches the cache is shown: where each chunk of a context lies, and which chunks left lately and why.
Plain values and a log; the cache manager makes them. Knows no conversation but by the keys of its chunks, and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.cache.cost_model import CostModel
from engine.core.cache.index import Chunk, chunk_key, root_key

# Evictions that are remembered while somebody watches.
MAX_EVICTIONS = 64
# So long after the last look the cache counts as watched, in seconds.
WATCH_S = 10.0
# From which tier to which, by reason; see stats.EVICTION_REASONS.
EVICTION_MOVES = {
    "gpu_reclaimed": ("gpu", "cpu"),
    "gpu_swapped_out": ("gpu", "cpu"),
    "gpu_dropped": ("gpu", "dropped"),
    "cpu_dropped": ("cpu", "dropped"),
    "cpu_copy_dropped": ("cpu", "gpu"),
}


class Cell(NamedTuple):
    """One chunk of a context.

    state: its residency ("gpu", "both", "cpu", "dropped"), or what is being done to it: "computing", "loading" (to the GPU
    tier), "storing" (to the CPU tier). num_tokens: whose KV is there, or was. idle_s: since its last use by any
    conversation; None while a request uses it, or if it is dropped. retention_value: what the eviction policy goes by, the
    smallest goes first; None as idle_s, and when it was used just now.
    """

    state: str
    num_tokens: int
    idle_s: float | None = None
    retention_value: float | None = None


class Eviction(NamedTuple):
    """A chunk that left a tier. number: counts up. key: of the chunk; empty if it has no name. The idle time and the
    retention value are those of that moment, now_s on the driver's clock."""

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
    """The names that the chunks of a context have if they are cached. tails: those that its last chunk may have, the longest
    first, with their lengths. num_chunks: of the whole context, of which these may be the first ones."""

    full: tuple[bytes, ...]
    tails: tuple[tuple[int, bytes], ...]
    num_chunks: int


def context_keys(token_ids: Sequence[int], *, model: str, tenant: str, chunk_size: int, max_chunks: int) -> ContextKeys:
    """Of at most `max_chunks` chunks in front. O(tokens); what it says holds for ever.

    The last token of a turn was sampled and perhaps never computed: a chunk that it would begin does not count, and the
    one that it ends may be there without it."""
    num_chunks = -(-max(len(token_ids) - 1, min(len(token_ids), 1)) // chunk_size)
    key = root_key(model, "", tenant)
    full = []
    for position in range(min(num_chunks - 1, max_chunks)):
        key = chunk_key(key, token_ids[position * chunk_size : (position + 1) * chunk_size])
        full.append(key)
    tail = token_ids[len(full) * chunk_size : num_chunks * chunk_size] if len(full) < max_chunks else ()
    tails = tuple((length, chunk_key(key, tail[:length])) for length in range(len(tail), 0, -1))
    return ContextKeys(tuple(full), tails, num_chunks)


class MappedContext(NamedTuple):
    """A conversation's context as it is now. status: "idle", or that of its request. num_chunks: of the whole context, of
    which `cells` may be the first ones. keys: the names of its chunks as far as they are known."""

    status: str
    num_chunks: int
    cells: tuple[Cell, ...]
    keys: tuple[bytes, ...]


class EvictionLog:
    """The last evictions, as long as somebody watches; else it costs one comparison for each."""

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
