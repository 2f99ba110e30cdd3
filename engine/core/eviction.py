"""Which chunk goes first. A policy holds the chunks that nobody pins and promises the exact order of its victims; the
cache manager decides when to ask and what happens to a victim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from engine.core.chunk_index import Chunk
from engine.core.cost_model import CostModel
from engine.errors import ConfigError


class EvictionPolicy(Protocol):
    """Chunks are inserted in order of `last_active` (they are inserted when their last user leaves, at that time)."""

    def insert(self, chunk: Chunk) -> None: ...
    def remove(self, chunk: Chunk) -> None: ...
    def choose_victim(self, now: float) -> Chunk | None:
        """The next to go, still held; None when the policy holds nothing."""
        ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Chunk]: ...
    def __contains__(self, chunk: object) -> bool: ...


class LRU:
    """Least recently used first; among the chunks of one turn, the leading one first."""

    def __init__(self) -> None:
        self._chunks: dict[Chunk, None] = {}

    def insert(self, chunk: Chunk) -> None:
        self._chunks[chunk] = None

    def remove(self, chunk: Chunk) -> None:
        del self._chunks[chunk]

    def choose_victim(self, now: float) -> Chunk | None:
        return next(iter(self._chunks), None)

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks


class RetentionValue:
    """Smallest `chunk_cost(position) / (now - last_active)` first (paper section 4.3.1); ties go to the front.

    The ranking moves with time, so no heap can hold it. But at any one position the cost is the same for all, hence the
    least recently used one has the smallest value: one LRU list per position, and the minimum over the list heads is
    the exact minimum over all chunks.
    """

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._by_position: dict[int, dict[Chunk, None]] = {}
        self._cost: dict[int, float] = {}
        self._num_chunks = 0

    def insert(self, chunk: Chunk) -> None:
        position = chunk.position
        if position not in self._by_position:
            self._by_position[position] = {}
            self._cost[position] = self._cost_model.chunk_cost(position)
        self._by_position[position][chunk] = None
        self._num_chunks += 1

    def remove(self, chunk: Chunk) -> None:
        chunks = self._by_position[chunk.position]
        del chunks[chunk]
        if not chunks:
            del self._by_position[chunk.position]
        self._num_chunks -= 1

    def choose_victim(self, now: float) -> Chunk | None:
        """O(number of distinct positions), whatever the number of chunks."""
        best: Chunk | None = None
        best_idle, best_cost = 0.0, 0.0
        cost = self._cost
        for position, chunks in self._by_position.items():
            head = next(iter(chunks))
            idle = now - head.last_active
            # cost / idle < best_cost / best_idle, without dividing: idle may be 0.
            left, right = cost[position] * best_idle, best_cost * idle
            if best is None or left < right or (left == right and position < best.position):
                best, best_idle, best_cost = head, idle, cost[position]
        return best

    def __len__(self) -> int:
        return self._num_chunks

    def __iter__(self) -> Iterator[Chunk]:
        for chunks in self._by_position.values():
            yield from chunks

    def __contains__(self, chunk: object) -> bool:
        return isinstance(chunk, Chunk) and chunk in self._by_position.get(chunk.position, ())


def make_policy(name: str, cost_model: CostModel) -> EvictionPolicy:
    """The policy of that name in the configuration: `retention_value` or `lru`."""
    if name == "retention_value":
        return RetentionValue(cost_model)
    if name == "lru":
        return LRU()
    raise ConfigError(f"eviction_policy must be 'retention_value' or 'lru', got {name!r}", param="eviction_policy")
