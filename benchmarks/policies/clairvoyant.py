"""Policies that know the future: for bounds only. They are told when each chunk is used next, by the simulator's oracle."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from engine.core.cache.cost_model import CostModel
from engine.core.cache.index import Chunk
from engine.simulator.oracle import Oracle


class Clairvoyant:
    """Chunks that are never used again first; then the smallest cost over the time until the next use.

    Greedy: it takes the chunk that gives the least computation for the time that its block is freed, and looks no further.
    The least total cost with chunks of unequal cost and several tiers is not found by any such rule, so what it reaches is
    no lower bound of what is possible; it is an upper bound of that, and a goal.
    """

    def __init__(self, cost_model: CostModel, oracle: Oracle, *, knows_cost: bool = True) -> None:
        """knows_cost: else Belady's rule: the latest next use first, which is least misses if all chunks cost the same."""
        self._cost_model = cost_model
        self._oracle = oracle
        self._knows_cost = knows_cost
        self._held: dict[Chunk, float] = {}
        self._never: list[tuple[float, int, int, Chunk]] = []
        self._by_position: dict[int, list[tuple[float, float, int, Chunk]]] = {}
        self._num_inserted = 0

    def insert(self, chunk: Chunk) -> None:
        self._num_inserted += 1
        next_s = self._held[chunk] = self._oracle.next_use_s(chunk.key, chunk.last_active)
        if next_s == math.inf:
            heapq.heappush(self._never, (chunk.last_active, chunk.position, self._num_inserted, chunk))
        else:
            heap = self._by_position.setdefault(chunk.position if self._knows_cost else 0, [])
            heapq.heappush(heap, (-next_s, chunk.last_active, self._num_inserted, chunk))

    def remove(self, chunk: Chunk) -> None:
        del self._held[chunk]

    def choose_victim(self, now: float) -> Chunk | None:
        held = self._held
        while self._never:
            chunk = self._never[0][3]
            if held.get(chunk) == math.inf and chunk.last_active == self._never[0][0]:
                return chunk
            heapq.heappop(self._never)
        best, best_rank = None, (math.inf, 0)
        for position, heap in self._by_position.items():
            while heap and held.get(heap[0][3]) != -heap[0][0]:
                heapq.heappop(heap)
            if heap:
                rank = self._rank(position, -heap[0][0], now)
                if best is None or rank < best_rank:
                    best, best_rank = heap[0][3], rank
        return best

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        left, right = (
            self._rank(each.position, self._oracle.next_use_s(each.key, each.last_active), now)
            for each in (chunk, other)
        )
        return left < right

    def _rank(self, position: int, next_s: float, now: float) -> tuple[float, int]:
        if next_s == math.inf:
            return 0.0, position
        cost = self._cost_model.chunk_cost(position) if self._knows_cost else 1.0
        return cost / max(next_s - now, 1e-3), position

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._held)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._held
