"""Gives out blocks: free ones, or those of chunks that are evicted for it. Knows no request.

A chunk that loses its block in the primary tier is reclaimed at no cost if the secondary tier has it too, else swapped out,
or dropped if the secondary tier has no room for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from engine.core.cache.index import Chunk, ChunkIndex
from engine.core.cache.prices import LoadPrices
from engine.core.cache.slow_transfers import SlowTransfers
from engine.core.cache.tier import Tier, Tiers
from engine.core.cache.transfers import Transfers
from engine.core.cache_map import EvictionLog
from engine.core.stats import EngineStats


class Allocator:
    """Blocks of all tiers, by eviction if none is free; and copies made ahead of time, so that eviction is cheap."""

    def __init__(
        self,
        tiers: Tiers,
        index: ChunkIndex,
        transfers: Transfers,
        slow: SlowTransfers,
        prices: LoadPrices,
        stats: EngineStats,
        eviction_log: EvictionLog,
        *,
        write_through: bool,
    ) -> None:
        """write_through: swap out what each turn leaves as soon as may be."""
        self._tiers = tiers
        self._primary, self._secondary = tiers.primary, tiers.secondary
        self._index = index
        self._transfers = transfers
        self._slow = slow
        self._prices = prices
        self._stats = stats
        self._eviction_log = eviction_log
        self._write_through = write_through and tiers.secondary.pool.num_blocks > 0
        self._unwritten: dict[Chunk, None] = {}

    def new_block(self, now: float) -> int:
        """A block of the primary tier; the caller has made sure that one is available."""
        pool = self._primary.pool
        if not pool.num_free:
            self._evict(now)
        block_id = pool.try_allocate()
        assert block_id is not None
        return block_id

    def try_block(self, tier: Tier, chunk: Chunk, now: float, *, is_ahead_of_time: bool = False) -> int | None:
        """A block of a slower tier for `chunk`: free, a spare copy's, or that of a chunk which goes before it.

        Ahead of time not that of a chunk that a faster tier has too: one copy made for another one lost gains nothing.
        """
        if not tier.pool.num_free and not self._try_drop_spare_copy(tier, now):
            victim = tier.choose_victim_before(chunk, now)
            if victim is None or (is_ahead_of_time and _is_in_faster_tier(victim, tier)):
                return None
            self._take_copy(tier, victim, now)
        return tier.pool.try_allocate()

    def try_block_for_load(self, now: float) -> int | None:
        """A block of the secondary tier for a chunk that is about to be used: of whatever was not used just now."""
        tier = self._secondary
        if not tier.pool.num_free and not self._try_drop_spare_copy(tier, now):
            victim = tier.choose_victim_idle_at(now)
            if victim is None:
                return None
            self._take_copy(tier, victim, now)
        return tier.pool.try_allocate()

    def try_copied_block(self, now: float) -> int | None:
        """A block of the secondary tier that is free, or whose chunk a slow tier has too."""
        tier = self._secondary
        if not tier.pool.num_free:
            victim = tier.copied.choose_victim(now)
            if victim is None:
                return None
            self._take_copy(tier, victim, now)
        return tier.pool.try_allocate()

    def try_give_up_copy(self, chunk: Chunk, now: float) -> bool:
        """Free the block that a chunk has in the secondary tier; False if it has none, or something uses it."""
        block_id = chunk.blocks[1]
        if chunk.pins or block_id is None or block_id in self._secondary.lent:
            return False
        self._take_copy(self._secondary, chunk, now)
        return True

    # -- ahead of time -------------------------------------------------------------------------------------------------

    @property
    def num_ready_blocks(self) -> int:
        """Blocks of the primary tier that a request could get without a copy, now or when the swap-outs under way end."""
        primary = self._primary
        return primary.pool.num_free + len(primary.copied) + self._transfers.num_swap_outs

    def note_end_of_turn(self, chunk: Chunk) -> None:
        """A request has released a chunk; with write-through, it is to be swapped out soon."""
        if self._write_through and chunk.key is not None and chunk.blocks[1] is None:
            self._unwritten[chunk] = None

    def plan_swap_outs(self, watermark_blocks: int, max_blocks: int, now: float) -> None:
        """Swap out ahead of time, once fewer than `watermark_blocks` are free or reclaimable.

        The smallest retention value first, and `max_blocks` at once although fewer would do: else each block that is taken
        from then on would be copied for alone, in a step of its own. With write-through, what the last turns left goes
        before that, whatever is free.
        """
        primary = self._primary
        if not self._secondary.pool.num_blocks:
            return
        while max_blocks and self._unwritten:
            chunk = next(iter(self._unwritten))
            del self._unwritten[chunk]
            if chunk in primary.sole:
                max_blocks -= self._try_swap_out(chunk, now)
        if self.num_ready_blocks >= watermark_blocks:
            return
        for _ in range(max_blocks):
            victim = primary.sole.choose_victim(now)
            if victim is None or not self._try_swap_out(victim, now):
                return

    def plan_stores(self, watermark: float, max_blocks: int, now: float) -> None:
        """Store ahead of time in the first slow tier what is worth it, the smallest retention value first.

        A chunk that is cheaper to compute again than to load is refused until its next use.

        watermark: until this share of the secondary tier's blocks is free or reclaimable.
        max_blocks: most stores at a time.
        """
        if not self._tiers.stores:
            return
        tier, secondary = self._tiers.stores[0], self._secondary
        num_wanted = self._num_stores_wanted(watermark)
        for _ in range(min(num_wanted, max_blocks - self._slow.num_stores)):
            victim = secondary.to_store.choose_victim(now)
            if victim is None or not self._slow.may_store(tier, now):
                return
            if self._slow.find(victim) is not None:  # it is on its way from a peer, and was computed meanwhile
                self._tiers.refuse_to_store(victim)
                continue
            if not self.is_worth_storing(victim, tier):
                continue
            block_id = self.try_block(tier, victim, now, is_ahead_of_time=True)
            if block_id is None:
                return
            self._slow.plan_store(victim, tier, block_id, now)

    def count_blocks_until_copies(self, watermark_blocks: int, store_watermark: float, num_running: int) -> int | None:
        """How many blocks of the primary tier `num_running` decoding requests can get before a step has to copy or store.

        The other arguments are those of plan_swap_outs and plan_stores. None if they would plan something now, or something
        is planned.
        """
        primary, secondary = self._primary, self._secondary
        if self._transfers.planned or self._unwritten:
            return None
        num_uncopied = primary.pool.num_free + len(primary.copied)
        if not secondary.pool.num_blocks:
            return num_uncopied + len(primary.sole)
        num_blocks = num_uncopied
        if len(primary.sole):
            num_blocks = min(num_blocks, self.num_ready_blocks - watermark_blocks)
        if self._tiers.stores and len(secondary.to_store):
            # A chunk that is filled pins its twin in the secondary tier, if there is one: one stored chunk less that may go.
            num_blocks = min(num_blocks, -self._num_stores_wanted(store_watermark) - num_running)
        return None if num_blocks < 0 else num_blocks

    def _num_stores_wanted(self, watermark: float) -> int:
        """How many chunks of the secondary tier are to be stored; below 0 if more are than have to."""
        secondary = self._secondary
        num_free = secondary.pool.num_free + len(secondary.copied) + self._slow.num_stores
        return math.ceil(watermark * secondary.pool.num_blocks) - num_free

    def is_worth_storing(self, chunk: Chunk, tier: Tier) -> bool:
        """Whether loading the chunk from there would be clearly cheaper than to compute it; counts and notes it if not."""
        if self._prices.is_loaded(tier.name, chunk.position, chunk.num_tokens):
            return True
        self._stats.slow_refusals[f"{tier.name}_store"] += 1
        self._tiers.refuse_to_store(chunk)
        return False

    def _try_swap_out(self, chunk: Chunk, now: float) -> bool:
        """Plan an ahead-of-time copy of an unpinned chunk to the secondary tier, if that has a block for it."""
        block_id = self.try_block(self._secondary, chunk, now, is_ahead_of_time=True)
        if block_id is None:
            return False
        self._transfers.plan_swap_out(chunk, block_id)
        return True

    # -- evicting ------------------------------------------------------------------------------------------------------

    def _evict(self, now: float) -> None:
        """Free one block of the primary tier; if there is no victim, one that is held back."""
        primary, tiers = self._primary, self._tiers
        victim = primary.choose_victim(now)
        if victim is None:
            primary.pool.free(primary.held.pop())
            return
        primary_block = victim.blocks[0]
        assert primary_block is not None
        if victim.blocks[1] is not None:  # where else it is filed stays as it is
            self._note(primary, "reclaimed", victim, now)
            primary.copied.remove(victim)
            primary.free_block(victim)
            return
        tiers.unfile(victim)
        primary.free_block(victim)
        secondary_block = self.try_block(self._secondary, victim, now)
        if secondary_block is not None:
            self._note(primary, "swapped_out", victim, now)
            self._transfers.plan_eviction(victim, primary_block, secondary_block)
        elif tiers.store_of(victim) is not None:
            self._note(primary, "reclaimed", victim, now)
            tiers.file(victim)
        else:
            self._note(primary, "dropped", victim, now)
            tiers.expect_no_more(victim)
            self._index.drop(victim, f"{primary.name}_dropped", now)

    def _try_drop_spare_copy(self, tier: Tier, now: float) -> bool:
        if not tier.spare:
            return False
        chunk = next(iter(tier.spare))
        del tier.spare[chunk]
        self._note(tier, "copy_dropped", chunk, now)
        tier.free_block(chunk)
        return True

    def _take_copy(self, tier: Tier, victim: Chunk, now: float) -> None:
        """Free the block of an unpinned chunk in a slower tier; drop the chunk if that was its last one."""
        self._tiers.unfile(victim)
        tier.free_block(victim)
        if _is_in_faster_tier(victim, tier):
            self._note(tier, "copy_dropped", victim, now)
            self._tiers.file(victim)
        elif self._tiers.store_of(victim) is not None:
            self._note(tier, "reclaimed", victim, now)
            self._tiers.file(victim)
        else:
            self._note(tier, "dropped", victim, now)
            self._tiers.expect_no_more(victim)
            self._index.drop(victim, f"{tier.name}_dropped", now)

    def _note(self, tier: Tier, what: str, chunk: Chunk, now: float) -> None:
        reason = f"{tier.name}_{what}"
        self._stats.evictions[reason] += 1
        self._eviction_log.note(reason, chunk, now)

    # -- smaller tiers -------------------------------------------------------------------------------------------------

    def hold_back(self, num_blocks: Mapping[str, int], now: float) -> None:
        """Make tiers smaller by so many blocks, by name, for a demonstration; others stay as they are.

        What lies in the blocks is evicted as for a request that needs them. Blocks that are pinned are taken when they
        no longer are; those of the primary tier are given back to a request that finds no other, until it ends. 0: all
        blocks of the tier are in use again.
        """
        for name, num in num_blocks.items():
            tier = self._tiers.by_name[name]
            tier.num_to_hold = min(num, tier.pool.num_blocks)
            while len(tier.held) > tier.num_to_hold:
                tier.pool.free(tier.held.pop())
        self.hold(now)

    def hold(self, now: float) -> None:
        """Take blocks out of use until as many are as there are to be, or no more can be had.

        The slower tiers first: what leaves a faster one then finds the room that it is to have.
        """
        for tier in reversed(self._tiers.row):
            while len(tier.held) < tier.num_to_hold:
                block_id = self._try_any_block(tier, now)
                if block_id is None:
                    break
                tier.held.append(block_id)

    def _try_any_block(self, tier: Tier, now: float) -> int | None:
        """A free block, or one of a chunk that may lose it, whichever goes first."""
        if tier is self._primary:
            has_one = tier.num_available > len(tier.held)
            return self.new_block(now) if has_one else None
        if not tier.pool.num_free and not self._try_drop_spare_copy(tier, now):
            victim = tier.choose_victim(now)
            if victim is None:
                return None
            self._take_copy(tier, victim, now)
        return tier.pool.try_allocate()


def _is_in_faster_tier(chunk: Chunk, tier: Tier) -> bool:
    return any(block is not None for block in chunk.blocks[: tier.number])
