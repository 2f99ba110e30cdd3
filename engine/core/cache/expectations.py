"""Chunks that a peer said it has: each gets a name and a place in the peer's tier, and is loaded from there like any other.

They are expected by requests, which load them when their turn comes, and by offers: what a peer would like to leave here
before it ends is loaded while no request waits for a load, as long as it finds free blocks, or those of less valuable chunks.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.core.cache.allocation import Allocator
from engine.core.cache.index import KEY_BYTES, Chunk, ChunkIndex
from engine.core.cache.prices import LoadPrices
from engine.core.cache.slow_transfers import SlowTransfers
from engine.core.cache.tier import Tier, Tiers
from engine.core.plan import ChunkRecord
from engine.core.stats import EngineStats

# What is loaded for an offer keeps no request waiting, so it may cost so many times what computing it would.
OFFER_DISCOUNT = 4.0


class Expectations:
    """Who expects which chunk. One that has come, or is not to come, loses its place with the end of its transfer.

    max_loads: for offers, at a time.
    """

    def __init__(
        self,
        tiers: Tiers,
        index: ChunkIndex,
        slow: SlowTransfers,
        allocator: Allocator,
        prices: LoadPrices,
        peer: Tier,
        stats: EngineStats,
        max_loads: int,
    ) -> None:
        self._tiers = tiers
        self._index = index
        self._slow = slow
        self._allocator = allocator
        self._prices = prices
        self._peer = peer
        self._stats = stats
        self._max_loads = max_loads
        # Of each request or offer, the names of what it expects; and of each name, by how many.
        self._expected: dict[str, list[bytes]] = {}
        self._num_expecting: dict[bytes, int] = {}
        # Of offers: what is to be loaded, in order; what is being loaded; and by offer, what has not ended.
        self._to_load: dict[bytes, None] = {}
        self._loading: dict[int, bytes] = {}
        self._open_offers: dict[str, set[bytes]] = {}
        self._offers_of: dict[bytes, list[str]] = {}
        self._ended_offers: list[str] = []

    def expect(self, records: Iterable[ChunkRecord], request_id: str, now: float) -> None:
        """Let a request find these chunks, until `forget`. What is here already, or finds no place, is passed over."""
        names = self._expected.setdefault(request_id, [])
        for record in records:
            if self._try_place(record, now):
                names.append(record.key)
                self._num_expecting[record.key] = self._num_expecting.get(record.key, 0) + 1

    def forget(self, request_id: str) -> None:
        """A request, or an offer, needs no more of what it expected."""
        for key in self._expected.pop(request_id, ()):
            self._num_expecting[key] -= 1
            if not self._num_expecting[key]:
                del self._num_expecting[key]
                self._give_up(key)

    def _try_place(self, record: ChunkRecord, now: float) -> bool:
        """Whether the chunk has a place among the expected ones now."""
        chunk = self._index.match(record.key)
        if chunk is not None:
            return chunk.blocks[self._peer.number] is not None
        is_sound = 0 < record.num_tokens <= self._index.chunk_size and record.position >= 0 and record.idle_s >= 0
        if not is_sound or len(record.key) != KEY_BYTES or len(record.parent_key) != KEY_BYTES:
            return False
        block_id = self._peer.pool.try_allocate()
        if block_id is None:
            return False
        chunk = self._tiers.restored_chunk(self._peer, block_id, record, now)
        self._index.insert(chunk, record.key, record.parent_key)
        self._tiers.file(chunk)
        return True

    def _give_up(self, key: bytes) -> None:
        """Take the chunk's place away, unless it is being loaded: then it goes with the end of that."""
        chunk = self._index.match(key)
        if chunk is None or self._place_of(chunk) is None or self._place_of(chunk) in self._peer.lent:
            return
        if chunk.pins:
            self._peer.spare.pop(chunk, None)
            self._peer.free_block(chunk)
            return
        self._tiers.unfile(chunk)
        self._peer.free_block(chunk)
        if all(block is None for block in chunk.blocks):
            self._index.drop(chunk, "peer_gone", chunk.last_active)
        else:
            self._tiers.file(chunk)

    def _place_of(self, chunk: Chunk) -> int | None:
        return chunk.blocks[self._peer.number]

    # -- offers --------------------------------------------------------------------------------------------------------

    def accept(self, records: Iterable[ChunkRecord], offer_id: str, now: float) -> None:
        """Load what there is room for, in this order; `take_ended_offers` tells when all of it has come or is given up."""
        self.expect(records, offer_id, now)
        keys = self._expected[offer_id]
        self._open_offers[offer_id] = set(keys)
        for key in self._open_offers[offer_id]:
            self._offers_of.setdefault(key, []).append(offer_id)
        loading = set(self._loading.values())
        self._to_load |= dict.fromkeys(key for key in keys if key not in loading)
        if not keys:
            self._end_offer(offer_id)

    @property
    def has_loads_to_plan(self) -> bool:
        """Whether chunks of offers wait for their loads."""
        return bool(self._to_load)

    def plan_loads(self, now: float) -> None:
        """Plan the next loads for offers."""
        while self._to_load and not self._slow.num_awaited_loads and len(self._loading) < self._max_loads:
            key = next(iter(self._to_load))
            del self._to_load[key]
            if not self._try_load(key, now):
                self._settle(key)

    def _try_load(self, key: bytes, now: float) -> bool:
        chunk, peer, slow = self._index.match(key), self._peer, self._slow
        if chunk is None or self._place_of(chunk) is None:
            return False
        transfer = slow.find(chunk)
        if transfer is None:
            if chunk.pins or chunk.blocks[0] is not None or chunk.blocks[1] is not None or not slow.may_load(peer, now):
                return False
            compute_cost = self._prices.compute_cost([(chunk.position, chunk.num_tokens)])
            if self._prices.load_cost(peer.name) > OFFER_DISCOUNT * compute_cost:
                self._stats.slow_refusals[f"{peer.name}_load"] += 1
                return False
            block_id = self._allocator.try_block(self._tiers.secondary, chunk, now)
            if block_id is None:
                return False
            transfer = slow.plan_load(chunk, peer, block_id, now, is_awaited=False)
        self._loading[transfer.transfer_id] = key
        return True

    def end_transfer(self, transfer_id: int) -> None:
        """A slow transfer has ended."""
        key = self._loading.pop(transfer_id, None)
        if key is not None:
            self._settle(key)

    def give_up_offers(self) -> None:
        """Load no more of them."""
        to_load, self._to_load = self._to_load, {}
        for key in to_load:
            self._settle(key)

    def _settle(self, key: bytes) -> None:
        for offer_id in self._offers_of.pop(key, ()):
            self._open_offers[offer_id].discard(key)
            if not self._open_offers[offer_id]:
                self._end_offer(offer_id)

    def _end_offer(self, offer_id: str) -> None:
        del self._open_offers[offer_id]
        self._ended_offers.append(offer_id)
        self.forget(offer_id)

    def take_ended_offers(self) -> list[str]:
        """Those of which nothing more is to come, since the last call."""
        ended, self._ended_offers = self._ended_offers, []
        return ended

    # -- proof ---------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises AssertionError unless each place in the peer's tier is expected by something, or a transfer's."""
        peer, counts = self._peer, dict[bytes, int]()
        for names in self._expected.values():
            for key in names:
                counts[key] = counts.get(key, 0) + 1
        assert counts == self._num_expecting
        for chunk in self._index:
            if self._place_of(chunk) is not None and self._place_of(chunk) not in peer.lent:
                assert chunk.key in self._num_expecting, f"nothing expects {chunk}"
        assert not peer.copied, "nothing is copied to a peer"
        still_open = {key for keys in self._open_offers.values() for key in keys}
        assert still_open == self._offers_of.keys() == {*self._to_load, *self._loading.values()}
        assert self._open_offers.keys() <= self._expected.keys()
