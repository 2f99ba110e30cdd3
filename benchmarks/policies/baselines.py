"""Policies to compare with that are no options: `eviction_policy: baselines:ToolTtl` with this folder on PYTHONPATH."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import LRU, RetentionValue
from engine.core.cache.eviction.lazy_heap import LazyHeap
from engine.core.cache.index import Chunk
from engine.core.reuse import NUM_TOOL_CLASSES


class OnceUsedFirst(LRU):
    """What one turn has used goes before what several have; of each the least recently used first.

    The two lists of 2Q and ARC, without ARC's moving border between them: that is learned from what one cache has just
    dropped, and a chunk that leaves one of our tiers is mostly still in another.
    """

    def __init__(self, cost_model: CostModel) -> None:
        super().__init__()

    @staticmethod
    def _rank(chunk: Chunk) -> tuple[Any, ...]:
        return chunk.num_uses > 1, chunk.last_active, chunk.position


# How long the context of a call is kept, in seconds.
TOOL_TTL_S = 60.0


class ToolTtl:
    """Retention value, but contexts whose call is under way go last, until they have been idle for TOOL_TTL_S."""

    def __init__(self, cost_model: CostModel) -> None:
        self._kept, self._free = RetentionValue(cost_model), RetentionValue(cost_model)
        self._expiry = LazyHeap(attrgetter("last_active"))

    def insert(self, chunk: Chunk) -> None:
        if _is_call(chunk):
            self._kept.insert(chunk)
            self._expiry.insert(chunk)
        else:
            self._free.insert(chunk)

    def remove(self, chunk: Chunk) -> None:
        if chunk in self._expiry:
            self._expiry.remove(chunk)
            self._kept.remove(chunk)
        else:
            self._free.remove(chunk)

    def choose_victim(self, now: float) -> Chunk | None:
        while (chunk := self._expiry.first()) is not None and now - chunk.last_active > TOOL_TTL_S:
            self.remove(chunk)
            self._free.insert(chunk)
        return self._free.choose_victim(now) or self._kept.choose_victim(now)

    def goes_before(self, chunk: Chunk, other: Chunk, now: float) -> bool:
        is_kept, other_is_kept = (_is_call(each) and now - each.last_active <= TOOL_TTL_S for each in (chunk, other))
        return other_is_kept if is_kept != other_is_kept else self._free.goes_before(chunk, other, now)

    def __len__(self) -> int:
        return len(self._kept) + len(self._free)

    def __iter__(self) -> Iterator[Chunk]:
        return chain(self._kept, self._free)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._kept or chunk in self._free


def _is_call(chunk: Chunk) -> bool:
    return 0 < chunk.reuse.reuse_class < NUM_TOOL_CLASSES
