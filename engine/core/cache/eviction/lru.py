"""By the time of the last use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from engine.core.cache.eviction.lazy_heap import LazyHeap
from engine.core.cache.index import Chunk


class LRU:
    """Least recently used first; among chunks of one time the leading one first."""

    def __init__(self, *, rank: Callable[[Chunk], tuple[Any, ...]] | None = None) -> None:
        """rank: what it goes by, the smallest first; None = as the class says."""
        self._key = rank or self._rank
        self._heap = LazyHeap(self._key)
        self.insert, self.remove = self._heap.insert, self._heap.remove

    @staticmethod
    def _rank(chunk: Chunk) -> tuple[Any, ...]:
        return chunk.last_active, chunk.position

    def choose_victim(self, now: float) -> Chunk | None:
        return self._heap.first()

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        return self._key(chunk) < self._key(other)

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
