"""By the cost of computing a chunk again, for the time that it has been idle: the paper's policy."""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction.lazy_heap import LazyHeap
from engine.core.cache.index import Chunk

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
        self._heaps: list[LazyHeap] = []  # by position
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
            self._heaps.append(LazyHeap(attrgetter("last_active")))
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
