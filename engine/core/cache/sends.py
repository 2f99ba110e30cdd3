"""Sends chunks to peers that asked for them, from whichever tier they are in, beside everything else.

A chunk leaves from the secondary tier: one that lies in the primary tier only is swapped out for it, one that lies in a slow
tier only is loaded, if that is cheaper than to compute it. What cannot be had soon is declined. To be sent is no use: the
peer has the chunk from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from engine.core.cache.allocation import Allocator
from engine.core.cache.index import Chunk, ChunkIndex
from engine.core.cache.prices import LoadPrices
from engine.core.cache.slow_transfers import SlowTransfers
from engine.core.cache.tier import Tier, Tiers
from engine.core.cache.transfers import Transfers
from engine.core.handover import FoundChunks
from engine.core.stats import EngineStats

# Copies of each kind at a time: so many, and no more than a part of the secondary tier's blocks.
MAX_COPIES = 64
MAX_SHARE = 8
# What is asked for at a time; more is declined at once.
MAX_WANTED = 4096
# A chunk that cannot be sent within so many seconds is declined.
MAX_DELAY_S = 5.0
# How many of those that wait for their turn are looked at for one plan.
MAX_LOOKED_AT = 256
# Before the engine ends, so many chunks may lose their place in the secondary tier to others before they were sent.
MAX_DISPLACED = 8
# Lengths of partial chunks that a peer is told.
MAX_TAILS = 4


class Sends:
    """What peers have asked for and did not get yet, in order of arrival.

    max_copies: sends at a time, each of which holds a block of the secondary tier.
    is_draining: the engine is about to end, so that a chunk that a peer has got is needed here no longer.
    """

    def __init__(
        self,
        tiers: Tiers,
        index: ChunkIndex,
        transfers: Transfers,
        slow: SlowTransfers,
        allocator: Allocator,
        prices: LoadPrices,
        peer: Tier,
        stats: EngineStats,
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._transfers = transfers
        self._slow = slow
        self._allocator = allocator
        self._prices = prices
        self._peer = peer
        self._stats = stats
        self.max_copies = max(1, min(MAX_COPIES, tiers.secondary.pool.num_blocks // MAX_SHARE))
        self._wanted: dict[bytes, float] = {}  # until when
        self._declined: list[bytes] = []
        self._sent: dict[bytes, None] = {}  # the latest ones, no more than the secondary tier may hold
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def peer_name(self) -> str:
        return self._peer.name

    @property
    def deadline_s(self) -> float | None:
        """When the first of them has to be declined; None if there are none."""
        return next(iter(self._wanted.values()), None)

    def find(self, keys: Sequence[bytes], now: float) -> FoundChunks:
        """Which chunks could be sent. Changes nothing; any thread may ask, as the answer holds for a moment only."""
        idle_s = {}
        for place, key in enumerate(keys):
            chunk = self._index.match(key)
            if chunk is not None and self._is_to_be_had(chunk, now):
                idle_s[place] = max(0.0, now - chunk.last_active)
        last = max(idle_s, default=0)
        lengths = self._index.tail_lengths(keys[last]) if keys else ()
        return FoundChunks(idle_s, tuple((last, length) for length in lengths[:MAX_TAILS]))

    def want(self, keys: Sequence[bytes], now: float) -> None:
        """Send these; see `take_declined` for those that are not."""
        for key in keys:
            if len(self._wanted) < MAX_WANTED:
                self._wanted.setdefault(key, now + MAX_DELAY_S)
            elif key not in self._wanted:
                self._decline(key)

    def take_declined(self) -> list[bytes]:
        """What is not sent, since the last call."""
        declined, self._declined = self._declined, []
        return declined

    def note_sent(self, key: bytes) -> None:
        """A peer has got that chunk."""
        self._sent[key] = None
        if len(self._sent) > self._tiers.secondary.pool.num_blocks:
            del self._sent[next(iter(self._sent))]

    def plan(self, now: float) -> None:
        """Plan the next copies: sends first, so that what was brought for them is not evicted for the next ones."""
        is_held_up = False
        for key in list(islice(self._wanted, MAX_LOOKED_AT)):
            chunk = self._index.match(key)
            if chunk is None or now >= self._wanted[key]:
                self._decline(key)
            elif self._is_ready(chunk):
                may_send = self._slow.num_sends < self.max_copies
                block_id = self._peer.pool.try_allocate() if may_send else None
                if block_id is None:
                    is_held_up = True
                    continue
                del self._wanted[key]
                self._slow.plan_send(chunk, self._peer, block_id, now)
        if not is_held_up:
            for key in list(islice(self._wanted, MAX_LOOKED_AT)):
                chunk = self._index.match(key)
                if chunk is None or not self._is_on_its_way(chunk, now):
                    self._decline(key)

    def _decline(self, key: bytes) -> None:
        self._wanted.pop(key, None)
        self._declined.append(key)
        self._stats.slow_refusals[f"{self._peer.name}_send"] += 1

    def _is_ready(self, chunk: Chunk) -> bool:
        """Whether it lies in the secondary tier, with no transfer at it."""
        is_still = chunk not in self._tiers.secondary.arriving and self._slow.find(chunk) is None
        return is_still and chunk.blocks[1] is not None

    def _is_on_its_way(self, chunk: Chunk, now: float) -> bool:
        """Whether it can be sent, now or soon. Plans a copy of it to the secondary tier, if it takes one."""
        tiers, slow = self._tiers, self._slow
        if chunk.blocks[1] is not None:
            return True
        if slow.find(chunk) is not None:
            return self._is_to_be_had(chunk, now)
        is_in_primary = chunk.blocks[0] is not None
        store = tiers.store_of(chunk)
        if not is_in_primary and (store is None or not self._is_to_be_had(chunk, now)):
            return False
        num_copies = self._transfers.num_swap_outs if is_in_primary else slow.num_loads
        if num_copies >= self.max_copies:
            return True
        if self.is_draining and not tiers.secondary.pool.num_free:
            num_moving = self._transfers.num_swap_outs + slow.num_sends
            if not self._try_give_up_sent_copy(now) and num_moving >= MAX_DISPLACED:
                return True  # what is sent now makes room
        block_id = self._allocator.try_block(tiers.secondary, chunk, now)
        if block_id is None:  # what lies on a disk is older than all that is here
            block_id = self._allocator.try_copied_block(now)
        if block_id is None:  # one may come free when what is under way has ended
            return bool(self._transfers.num_swap_outs or slow.num_loads or slow.num_stores or slow.num_sends)
        if is_in_primary:
            self._transfers.plan_swap_out(chunk, block_id)
        elif store is not None:
            slow.plan_load(chunk, store, block_id, now, is_awaited=False)
        return True

    def _try_give_up_sent_copy(self, now: float) -> bool:
        """Free a block of the secondary tier, if a chunk lies in one that a peer has got and that nothing uses."""
        while self._sent:
            key = next(iter(self._sent))
            del self._sent[key]
            chunk = self._index.match(key)
            if chunk is not None and self._allocator.try_give_up_copy(chunk, now):
                return True
        return False

    def _is_to_be_had(self, chunk: Chunk, now: float) -> bool:
        if chunk.blocks[0] is not None or chunk.blocks[1] is not None:
            return True
        store = self._tiers.store_of(chunk)
        if store is None or not self._slow.may_load(store, now):
            return False
        return self._prices.is_loaded(store.name, chunk.position, chunk.num_tokens)
