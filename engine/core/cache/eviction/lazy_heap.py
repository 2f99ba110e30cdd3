"""A heap of chunks from which any chunk can be removed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

from engine.core.cache.index import Chunk


class LazyHeap:
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
