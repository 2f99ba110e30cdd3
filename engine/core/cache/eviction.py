"""Which chunk is evicted first.

A policy holds the chunks that may go and promises the exact order of its victims; the cache decides when to ask, and what
happens to a victim.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable, Iterator
from itertools import chain
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


# Of the heads of RetentionValue: if more had to be looked at to find the first ones, they are ranked anew.
MAX_LOOKED_AT = 24
# More than what rounding can do to the order of two values.
ROUNDING = 1e-9


class RetentionValue:
    """Smallest `chunk_cost(position) / (now - last_active)` first (paper section 4.3.1); ties go to the front.

    The ranking moves with time, so no heap over all chunks can hold it. But at any one position the cost is the same for
    all, hence the least recently used one has the smallest value: one heap by `last_active` per position, and the minimum
    over the heads is the exact minimum over all chunks.
    """

    def __init__(self, cost_model: CostModel) -> None:
        """Costs rise with the position.

        ranking: (key, position) of heads, a heap. front: (value at `front_at`, position) of the others, which were looked at.
        The inverse of a value grows linearly: at `now` it is (now - ranked_at) / cost - key, for a key of (last_active -
        ranked_at) / cost. So a key and the smallest cost say how small a value can be, and few heads have to be looked at.
        """
        self._cost_model = cost_model
        self._heaps: list[_LazyHeap] = []  # by position
        self._costs: list[float] = []  # by position, rising
        self._num_chunks = 0
        self._ranking: list[tuple[float, int]] = []
        self._ranked_at = 0.0
        self._front: list[tuple[float, int]] = []
        self._front_positions: set[int] = set()
        self._front_at = 0.0

    def insert(self, chunk: Chunk) -> None:
        position = chunk.position
        while len(self._heaps) <= position:
            self._costs.append(self._cost_model.chunk_cost(len(self._heaps)) or sys.float_info.min)  # divided by
            self._heaps.append(_LazyHeap(attrgetter("last_active")))
        heap = self._heaps[position]
        heap.insert(chunk)
        self._num_chunks += 1
        if heap.entries[0][2] is not chunk:
            return
        if position in self._front_positions:
            heapq.heappush(self._front, (_value(self._costs[position], self._front_at - chunk.last_active), position))
        else:
            heapq.heappush(self._ranking, (self._key(chunk), position))

    def remove(self, chunk: Chunk) -> None:
        self._heaps[chunk.position].remove(chunk)
        self._num_chunks -= 1

    def choose_victim(self, now: float) -> Chunk | None:
        """The chunk with the smallest retention value, whatever the number of chunks."""
        if not self._num_chunks:
            return None
        if now != self._front_at:
            self._start_front(now)
        costs, heaps, ranking, front = self._costs, self._heaps, self._ranking, self._front
        most_gained = (now - self._ranked_at) / costs[0]
        best: Chunk | None = None
        value, position = math.inf, 0
        while front:
            value, position = front[0]
            best = heaps[position].first()
            if best is None:
                self._front_positions.discard(heapq.heappop(front)[1])
                continue
            present = _value(costs[position], now - best.last_active)
            if present == value:
                break
            heapq.heapreplace(front, (present, position))  # the head of then was removed
        while ranking:
            key, other = ranking[0]
            if best is not None and (most_gained - key + ROUNDING * (most_gained + abs(key))) * value < 1:
                break
            heapq.heappop(ranking)
            if other in self._front_positions or (head := heaps[other].first()) is None:
                continue
            self._front_positions.add(other)
            idle_s = now - head.last_active
            present = costs[other] / idle_s if idle_s > 0 else math.inf
            heapq.heappush(front, (present, other))
            if best is None or (present, other) < (value, position):
                best, value, position = head, present, other
        return best

    def _start_front(self, now: float) -> None:
        """Nothing was looked at yet at this time."""
        if len(self._front) > MAX_LOOKED_AT:
            self._ranked_at = now
            heads = [head for heap in self._heaps if (head := heap.first()) is not None]
            self._ranking = [(self._key(head), head.position) for head in heads]
            heapq.heapify(self._ranking)
        else:
            for position in self._front_positions:
                head = self._heaps[position].first()
                if head is not None:
                    heapq.heappush(self._ranking, (self._key(head), position))
        self._front, self._front_positions, self._front_at = [], set(), now

    def _key(self, head: Chunk) -> float:
        return (head.last_active - self._ranked_at) / self._costs[head.position]

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        left, right = (
            (_value(self._cost_model.chunk_cost(c.position), now - c.last_active), c.position) for c in (chunk, other)
        )
        return left < right

    def __len__(self) -> int:
        return self._num_chunks

    def __iter__(self) -> Iterator[Chunk]:
        return chain.from_iterable(self._heaps)

    def __contains__(self, chunk: object) -> bool:
        return isinstance(chunk, Chunk) and chunk.position < len(self._heaps) and chunk in self._heaps[chunk.position]


def _value(cost: float, idle_s: float) -> float:
    """See RetentionValue; infinite for a chunk that was used just now."""
    return cost / idle_s if idle_s > 0 else math.inf


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
