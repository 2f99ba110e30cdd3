"""Hand-over of chunks between this engine and others: what it lacks, what it expects of them, and what it sends them.

A peer is one more slow tier, whose blocks are places for chunks that are on their way, and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from engine.core.cache.allocation import Allocator
from engine.core.cache.expectations import Expectations
from engine.core.cache.index import ChunkIndex
from engine.core.cache.matching import ContextMatcher
from engine.core.cache.prices import LoadPrices
from engine.core.cache.sends import Sends
from engine.core.cache.slow_transfers import SlowTransfers
from engine.core.cache.tier import Tier, Tiers
from engine.core.cache.transfers import Transfers
from engine.core.cache_map import ContextKeys
from engine.core.handover import ContextQuery, FoundChunks
from engine.core.plan import ChunkRecord, SlowTransfer
from engine.core.request import Request
from engine.core.stats import EngineStats

# Of conversations whose last use is just over, those that would cost most to compute are worth most.
MIN_IDLE_S = 1e-3


class Handover:
    """What an engine's driver asks of the core for hand-over; between two steps, if it does not say else."""

    def __init__(
        self,
        tiers: Tiers,
        index: ChunkIndex,
        matcher: ContextMatcher,
        transfers: Transfers,
        slow: SlowTransfers,
        allocator: Allocator,
        prices: LoadPrices,
        peer: Tier,
        stats: EngineStats,
    ) -> None:
        self._index = index
        self._matcher = matcher
        self._prices = prices
        self.sends = Sends(tiers, index, transfers, slow, allocator, prices, peer, stats)
        self.expectations = Expectations(tiers, index, slow, allocator, prices, peer, stats, self.sends.max_copies)

    # -- what a request lacks ------------------------------------------------------------------------------------------

    def missing_chunks(self, request: Request) -> ContextQuery | None:
        """What to ask peers for before the request is added; None if all of its context is here.

        O(tokens). Any thread may call it: what it says may be outdated, and does no harm then.
        """
        if request.unscored:  # it is computed, whatever is cached of it
            return None
        size, token_ids = self._index.chunk_size, request.token_ids
        self._matcher.extend_keys(request)
        keys = request.chunk_keys
        first = next((place for place, key in enumerate(keys) if self._index.match(key) is None), len(keys))
        parent_key = self._matcher.parent_key(request, first)
        rest = token_ids[first * size : (first + 1) * size]
        is_tail_here = first == len(keys) and self._index.match_tail(parent_key, rest) is not None
        if is_tail_here or first * size >= len(token_ids) - 1:
            return None
        return ContextQuery(first, (parent_key, *keys[first:]))

    def expect(self, records: Iterable[ChunkRecord], request_id: str, now: float) -> None:
        """See Expectations.expect; for a request that was just added, until it is admitted or ends."""
        self.expectations.expect(records, request_id, now)

    def forget(self, request_id: str) -> None:
        """A request is admitted, or has ended."""
        self.expectations.forget(request_id)

    # -- what others lack ----------------------------------------------------------------------------------------------

    def find_chunks(self, keys: Sequence[bytes], now: float) -> FoundChunks:
        """See Sends.find. Any thread may ask."""
        return self.sends.find(keys, now)

    def start_sends(self, keys: Sequence[bytes], now: float) -> None:
        """Send these chunks; each comes out as a transfer to the peer's tier, or is declined."""
        self.sends.want(keys, now)

    def take_declined(self) -> list[bytes]:
        """See Sends.take_declined."""
        return self.sends.take_declined()

    # -- before one of them ends ---------------------------------------------------------------------------------------

    def records_of(self, context: ContextKeys, owner_id: str, now: float) -> list[ChunkRecord]:
        """What could be sent of a context of which no request is running, front first. O(chunks). Any thread may ask."""
        names = [*context.full, *(key for _, key in context.tails)]
        records = []
        for place in sorted(self.sends.find(names, now).idle_s):
            chunk = self._index.match(names[place])
            if chunk is not None and chunk.key is not None:
                records.append(
                    ChunkRecord(
                        key=chunk.key,
                        parent_key=chunk.parent_key,
                        position=chunk.position,
                        num_tokens=chunk.num_tokens,
                        owner_id=None if chunk.num_tokens == self._index.chunk_size else owner_id,
                        idle_s=max(0.0, now - chunk.last_active),
                    )
                )
        return records

    def value_of(self, records: Sequence[ChunkRecord]) -> float:
        """What it is worth to leave these chunks of one conversation to a peer; only ratios count.

        As of a chunk's retention: what computing them again costs, over the time for which nothing used them.
        """
        cost = self._prices.compute_cost((record.position, record.num_tokens) for record in records)
        return cost / max(min((record.idle_s for record in records), default=math.inf), MIN_IDLE_S)

    def accept_offer(self, records: Iterable[ChunkRecord], offer_id: str, now: float) -> None:
        """See Expectations.accept."""
        self.expectations.accept(records, offer_id, now)

    def take_ended_offers(self) -> list[str]:
        """See Expectations.take_ended_offers."""
        return self.expectations.take_ended_offers()

    # -- beside the steps ----------------------------------------------------------------------------------------------

    @property
    def has_copies_to_plan(self) -> bool:
        """Whether `plan` may plan something."""
        return len(self.sends) > 0 or self.expectations.has_loads_to_plan

    def plan(self, now: float) -> None:
        """Plan the next sends, and the next loads for offers."""
        self.sends.plan(now)
        self.expectations.plan_loads(now)

    def end_transfer(self, transfer: SlowTransfer, *, ok: bool) -> None:
        """A slow transfer has ended."""
        self.expectations.end_transfer(transfer.transfer_id)
        if ok and transfer.copy.target_tier == self.sends.peer_name:
            self.sends.note_sent(transfer.key)

    def start_drain(self) -> None:
        """The engine is about to end: it takes nothing more, and what it has sent makes room for the rest."""
        self.expectations.give_up_offers()
        self.sends.is_draining = True

    def check_integrity(self) -> None:
        """See Expectations.check_integrity."""
        self.expectations.check_integrity()
