"""Brings what only the fast tiers hold to the first slow tier, before an engine ends: the most valuable chunks first.

Plans swap-outs and stores; knows no clock and no deadline, so it may be given up at any moment.
"""

from __future__ import annotations

import math

from engine.core.cache.allocation import Allocator
from engine.core.cache.cost_model import CostModel
from engine.core.cache.index import Chunk, ChunkIndex
from engine.core.cache.slow_transfers import SlowTransfers
from engine.core.cache.tier import Tiers
from engine.core.cache.transfers import Transfers
from engine.core.cache_map import retention_value

# Copies of each kind at a time.
MAX_COPIES = 64


class Drain:
    """What is left to store. A chunk that is in use when its turn comes is passed over."""

    def __init__(
        self,
        tiers: Tiers,
        index: ChunkIndex,
        transfers: Transfers,
        slow: SlowTransfers,
        allocator: Allocator,
        cost_model: CostModel,
        now: float,
    ) -> None:
        self._tiers = tiers
        self._transfers = transfers
        self._slow = slow
        self._allocator = allocator
        self._tier = tiers.stores[0]

        def value(chunk: Chunk) -> float:
            known = retention_value(cost_model, chunk.position, now - chunk.last_active)
            return math.inf if known is None else known

        # The next one is the last one.
        self._rest = sorted((chunk for chunk in index if tiers.store_of(chunk) is None), key=value)

    def is_done(self, now: float) -> bool:
        """Whether nothing is left to plan and nothing under way, or the tier takes nothing."""
        is_moving = self._slow.num_stores or self._transfers.num_swap_outs
        return not self._slow.takes_chunks(self._tier, now) or not (self._rest or is_moving)

    def plan(self, now: float) -> None:
        """Plan the next copies."""
        tiers, secondary, tier = self._tiers, self._tiers.secondary, self._tier
        num_swap_outs = MAX_COPIES - self._transfers.num_swap_outs
        num_stores = MAX_COPIES - self._slow.num_stores
        later: list[Chunk] = []
        refused: list[Chunk] = []  # would take a block of the secondary tier from a chunk that the policy keeps
        while self._rest and num_stores > 0 and len(later) < MAX_COPIES and self._slow.takes_chunks(tier, now):
            chunk = self._rest.pop()
            if chunk in secondary.arriving:
                later.append(chunk)
                continue
            if chunk.pins or chunk.key is None or tiers.store_of(chunk) is not None:
                continue
            if chunk.blocks[0] is None and chunk.blocks[1] is None:  # a peer has it
                continue
            if self._slow.find(chunk) is not None:  # of another kind: it is sent, or was computed while it came
                later.append(chunk)
                continue
            if not self._allocator.is_worth_storing(chunk, tier):
                continue
            if chunk.blocks[1] is not None:
                block_id = self._allocator.try_block(tier, chunk, now)
                if block_id is not None:
                    self._slow.plan_store(chunk, tier, block_id, now)
                    num_stores -= 1
                continue
            later.append(chunk)
            secondary_block = self._allocator.try_copied_block(now) if num_swap_outs > 0 else None
            is_moving = self._slow.num_stores or self._transfers.num_swap_outs
            if secondary_block is None and not is_moving:  # no block will come free by itself
                secondary_block = self._allocator.try_block(secondary, chunk, now)
                if secondary_block is None:
                    refused.append(later.pop())
            if secondary_block is not None:
                self._transfers.plan_swap_out(chunk, secondary_block)
                num_swap_outs -= 1
        if self._slow.num_stores or self._transfers.num_swap_outs:
            later += refused  # the chunk in their way may be among those that are stored now
        self._rest += reversed(later)
