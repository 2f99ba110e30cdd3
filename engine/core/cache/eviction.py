"""Which chunk is evicted first.

A policy holds the chunks that may go and promises the exact order of its victims; the cache decides when to ask, and what
happens to a victim.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, Protocol

from engine.core.cache.cost_model import CostModel
from engine.core.cache.index import Chunk
from engine.errors import ConfigError


class EvictionPolicy(Protocol):
    """Holds chunks whose `last_active` does not change while they are held."""

    def insert(self, chunk: Chunk) -> None: ...
    def remove(self, chunk: Chunk) -> None: ...
    def choose_victim(self, now: float) -> Chunk | None:
        """The next to go, still held; None when the policy holds nothing."""
        ...

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        """Whether `chunk` would be chosen before `other`, held or not."""
        ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Chunk]: ...
    def __contains__(self, chunk: object) -> bool: ...


class _LazyHeap:
    """Chunks by a key that is fixed while they are held.

    A removed chunk's entry stays in the heap until it comes up, or until such entries are the majority.
    """

    def __init__(self, key: Callable[[Chunk], Any]) -> None:
        """entries: (key, stamp, chunk), a heap. stamps: of the chunks that are held; an entry with another one is old."""
        self._key = key
        self.entries: list[tuple[Any, int, Chunk]] = []
        self.stamps: dict[Chunk, int] = {}
        self._num_inserted = 0

    def insert(self, chunk: Chunk) -> None:
        self._num_inserted += 1
        self.stamps[chunk] = self._num_inserted
        heapq.heappush(self.entries, (self._key(chunk), self._num_inserted, chunk))

    def remove(self, chunk: Chunk) -> None:
        del self.stamps[chunk]
        if len(self.entries) > 64 and len(self.entries) > 2 * len(self.stamps):
            self.entries = [entry for entry in self.entries if self.stamps.get(entry[2]) == entry[1]]
            heapq.heapify(self.entries)

    def first(self) -> Chunk | None:
        entries, stamps = self.entries, self.stamps
        while entries:
            _, stamp, chunk = entries[0]
            if stamps.get(chunk) == stamp:
                return chunk
            heapq.heappop(entries)
        return None

    def __len__(self) -> int:
        return len(self.stamps)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.stamps)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self.stamps


class LRU:
    """Least recently used first; among chunks of one time the leading one first."""

    def __init__(self) -> None:
        self._heap = _LazyHeap(self._rank)
        self.insert, self.remove = self._heap.insert, self._heap.remove

    @staticmethod
    def _rank(chunk: Chunk) -> tuple[Any, ...]:
        return chunk.last_active, chunk.position

    def choose_victim(self, now: float) -> Chunk | None:
        return self._heap.first()

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        return self._rank(chunk) < self._rank(other)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._heap)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._heap


class TrailingLRU(LRU):
    """Least recently used first; among chunks of one time the last one first.

    Radix caches do that, as they can only cut leaves.
    """

    @staticmethod
    def _rank(chunk: Chunk) -> tuple[Any, ...]:
        return chunk.last_active, -chunk.position


class RetentionValue:
    """Smallest `chunk_cost(position) / (now - last_active)` first (paper section 4.3.1); ties go to the front.

    The ranking moves with time, so no heap over all chunks can hold it. But at any one position the cost is the same for
    all, hence the least recently used one has the smallest value: one heap by `last_active` per position, and the minimum
    over the heads is the exact minimum over all chunks.
    """

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._heaps: list[_LazyHeap] = []  # by position
        self._costs: list[float] = []  # by position
        self._oldest = _LazyHeap(LRU._rank)

    def insert(self, chunk: Chunk) -> None:
        while len(self._heaps) <= chunk.position:
            self._costs.append(self._cost_model.chunk_cost(len(self._heaps)))
            self._heaps.append(_LazyHeap(attrgetter("last_active")))
        self._heaps[chunk.position].insert(chunk)
        self._oldest.insert(chunk)

    def remove(self, chunk: Chunk) -> None:
        self._heaps[chunk.position].remove(chunk)
        self._oldest.remove(chunk)

    def choose_victim(self, now: float) -> Chunk | None:
        """The chunk with the smallest retention value; O(positions) at worst, whatever the number of chunks.

        Costs rise with the position and nothing has been idle for longer than the oldest chunk, so the search ends
        when even that could not win.
        """
        oldest = self._oldest.first()
        if oldest is None:
            return None
        longest_idle = now - oldest.last_active
        best: Chunk | None = None
        best_idle, best_cost = 0.0, 0.0
        for cost, heap in zip(self._costs, self._heaps, strict=True):
            if best is not None and cost * best_idle > best_cost * longest_idle:
                break
            if not heap.entries:
                continue
            _, stamp, head = heap.entries[0]
            if (
                heap.stamps.get(head) != stamp
            ):  # asked here, because a call for each position would take most of the time
                live = heap.first()
                if live is None:
                    continue
                head = live
            # cost / idle < best_cost / best_idle, without dividing: idle may be 0.
            idle = now - head.last_active
            if best is None or cost * best_idle < best_cost * idle:
                best, best_idle, best_cost = head, idle, cost
        return best

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        cost, other_cost = (self._cost_model.chunk_cost(c.position) for c in (chunk, other))
        left, right = cost * (now - other.last_active), other_cost * (now - chunk.last_active)
        return left < right or (left == right and chunk.position < other.position)

    def __len__(self) -> int:
        return len(self._oldest)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._oldest)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._oldest


# By the name in the configuration; what makes one from the cost model.
POLICIES: dict[str, Callable[[CostModel], EvictionPolicy]] = {
    "retention_value": RetentionValue,
    "lru": lambda cost_model: LRU(),
    "trailing_lru": lambda cost_model: TrailingLRU(),
}
EVICTION_POLICIES = tuple(POLICIES)


def make_policy(name: str, cost_model: CostModel) -> EvictionPolicy:
    """A policy by its name in the configuration. Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(
            f"eviction_policy must be one of {', '.join(POLICIES)}, got {name!r}", param="eviction_policy"
        )
    return POLICIES[name](cost_model)
