"""What can be lost without a next turn that is late goes first: tail-optimised LRU (Zhang et al. 2025, arXiv 2510.15152)."""

from __future__ import annotations

from typing import Any

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction.lru import LRU
from engine.core.cache.index import Chunk

# What a turn may have to compute again before its first token counts as late, in seconds, or in tokens if costs are no times.
FREE_S = 0.2
FREE_TOKENS = 1024


class TailOptimisedLRU(LRU):
    """Least recently used first, but before all others the chunks in front that a turn computes again in time.

    The published rule evicts from conversations that lack so few tokens that their next turn is not late even then, before it
    goes by the last use. There it is the end of a context that goes, because prefix caches can cut nothing else. Here it is
    the front, which is cheapest to compute: a chunk can be lost in time if everything up to its end takes at most FREE_S. So
    the class of a chunk is fixed by its position, and the order is (needed in time, last use, position).
    """

    def __init__(self, cost_model: CostModel) -> None:
        num_free = _num_free(cost_model)

        def rank(chunk: Chunk) -> tuple[Any, ...]:
            return chunk.position >= num_free, chunk.last_active, chunk.position

        super().__init__(rank=rank)


def _num_free(cost_model: CostModel) -> int:
    """How many leading chunks can be computed in time."""
    if not cost_model.is_in_seconds:
        return FREE_TOKENS // cost_model.chunk_size
    left_s, position = FREE_S, 0
    while position * cost_model.chunk_size < 1 << 20 and (left_s := left_s - cost_model.chunk_cost(position)) >= 0:
        position += 1
    return position
