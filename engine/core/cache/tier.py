"""A tier, and the row of all tiers, in which each chunk is filed by where its blocks are.

Knows no request and no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from engine.core.cache.block_pool import BlockPool
from engine.core.cache.eviction import EvictionPolicy, HintedRetention
from engine.core.cache.index import Chunk
from engine.core.plan import ChunkRecord
from engine.core.tier_table import TierSpec


class Tier:
    """The blocks of one tier.

    sole, copied: the unpinned chunks that have a block here and may lose it. Taking the block of one in `copied` loses
        nothing, because the tier that this one exchanges blocks with has the chunk too.
    spare: pinned chunks that a faster tier has too, so that their block here can be done without; the oldest first.
    arriving: chunks whose block here a step's transfer, planned or in flight, writes to.
    lent: blocks that a slow transfer reads or writes, with the chunk that they belong to; None = to the transfer alone.
        Their chunks are neither filed nor spare here.
    to_store: of `sole`, those that are worth a place in a slow tier; of the secondary tier, if there are slow ones.
    unread: blocks of which it is not known yet what an earlier process left there.
    """

    def __init__(self, number: int, spec: TierSpec, make_policy: Callable[[], EvictionPolicy]) -> None:
        """number: its place in the row of tiers, and in each chunk's blocks."""
        self.number = number
        self.spec = spec
        self.name = spec.name
        self.pool = BlockPool(spec.name, spec.num_blocks)
        self.sole = make_policy()
        self.copied = make_policy()
        self.spare: dict[Chunk, None] = {}
        self.arriving: set[Chunk] = set()
        self.lent: dict[int, Chunk | None] = {}
        self.to_store = make_policy()
        self.unread: set[int] = set()
        self.held: list[int] = []
        self.num_to_hold = 0

    @property
    def num_available(self) -> int:
        """Blocks that could be had: free ones, those that may be taken, and those held back."""
        return self.pool.num_free + len(self.sole) + len(self.copied) + len(self.held)

    def file(self, chunk: Chunk, *, is_copied: bool) -> None:
        """Let an unpinned chunk lose its block here, unless that is lent."""
        if chunk.blocks[self.number] not in self.lent:
            (self.copied if is_copied else self.sole).insert(chunk)
            if chunk.is_to_store and not is_copied:
                self.to_store.insert(chunk)

    def unfile(self, chunk: Chunk, *, is_copied: bool) -> None:
        """Undo `file`, while blocks and loans are still the same."""
        if chunk.blocks[self.number] not in self.lent:
            (self.copied if is_copied else self.sole).remove(chunk)
            if chunk.is_to_store and not is_copied:
                self.to_store.remove(chunk)

    def choose_victim(self, now: float) -> Chunk | None:
        """The chunk to lose its block here next, those first that lose nothing; None if there is none."""
        return self.copied.choose_victim(now) or self.sole.choose_victim(now)

    def choose_victim_before(self, chunk: Chunk, now: float) -> Chunk | None:
        """As `choose_victim`, but only if the policy would let one go before `chunk`."""
        copied, sole = self.copied.choose_victim(now), self.sole.choose_victim(now)
        if copied is not None and self.sole.goes_before(copied, chunk, now):
            return copied
        if sole is None or not self.sole.goes_before(sole, chunk, now):
            return None
        # One of them loses its block. What a slow tier has is loaded again, while the other one would be computed again.
        return copied if copied is not None and sole.is_to_store else sole

    def choose_victim_idle_at(self, now: float) -> Chunk | None:
        """As `choose_victim`, but only one that was not used just now."""
        for policy in (self.copied, self.sole):
            victim = policy.choose_victim(now)
            if victim is not None and victim.last_active < now:
                return victim
        return None

    def count_idle_chunks(self) -> int:
        """Unpinned chunks that have a block here, those included whose block is lent."""
        # Of a copy, because statistics are asked for from other threads.
        lent = sum(chunk is not None and not chunk.pins for chunk in tuple(self.lent.values()))
        return len(self.sole) + len(self.copied) + lent

    def note_spare_copy(self, chunk: Chunk) -> None:
        """Let a pinned chunk in a faster tier lose its block here, if it has one that is not lent."""
        block_id = chunk.blocks[self.number]
        if block_id is not None and block_id not in self.lent:
            self.spare.setdefault(chunk)

    def free_block(self, chunk: Chunk) -> None:
        """Take the chunk's block away, if it has one here. One that is lent stays taken until the loan ends."""
        block_id = chunk.blocks[self.number]
        if block_id is None:
            return
        chunk.blocks[self.number] = None
        if block_id in self.lent:
            self.lent[block_id] = None
        else:
            self.pool.free(block_id)

    def end_loan(self, block_id: int) -> None:
        """A slow transfer has ended: the block is its chunk's again, or free if the chunk has given it up."""
        if self.lent.pop(block_id) is None:
            self.pool.free(block_id)

    def check_integrity(self, chunks: Iterable[Chunk]) -> None:
        """Raises AssertionError unless each block is one of free, held back, a transfer's, or one chunk's."""
        owned = [block for chunk in chunks if (block := chunk.blocks[self.number]) is not None]
        transfers = [block for block, chunk in self.lent.items() if chunk is None]
        assert all(chunk is None or chunk.blocks[self.number] == block for block, chunk in self.lent.items())
        assert len(self.held) <= self.num_to_hold
        self.pool.check_integrity(owned + transfers + self.held + list(self.unread))


class Tiers:
    """The row of tiers, the fastest first.

    primary: the one whose blocks steps compute in. secondary: exchanges blocks with it inside of plans. slow: all others,
    which exchange blocks with the secondary one, outside of plans. stores: of these, the ones that keep what is stored there.
    peer: the one that does not, if there is one; see TierSpec.is_store.
    """

    def __init__(self, specs: Sequence[TierSpec], make_policy: Callable[[], EvictionPolicy]) -> None:
        self.row = tuple(Tier(number, spec, make_policy) for number, spec in enumerate(specs))
        self.primary, self.secondary, *slow = self.row
        self.slow = tuple(slow)
        self.stores = tuple(tier for tier in slow if tier.spec.is_store)
        self.peer = next((tier for tier in slow if not tier.spec.is_store), None)
        self._stores_first_use = bool(self.stores) and self.stores[0].spec.stores_first_use
        self._no_copies = (None,) * (len(self.row) - 1)
        self.by_name = {tier.name: tier for tier in self.row}

    def __iter__(self) -> Iterator[Tier]:
        return iter(self.row)

    def new_chunk(self, position: int, block_id: int) -> Chunk:
        """A pinned, unnamed chunk with that block in the primary tier."""
        chunk = Chunk(position, [block_id, *self._no_copies])
        chunk.pins = 1
        chunk.is_to_store = self._stores_first_use
        return chunk

    def restored_chunk(self, tier: Tier, block_id: int, record: ChunkRecord, now: float) -> Chunk:
        """An unpinned, unfiled chunk without a name, whose only block is one of a slow tier."""
        chunk = Chunk(record.position, [None, *self._no_copies])
        chunk.blocks[tier.number] = block_id
        chunk.num_tokens = record.num_tokens
        chunk.owner_id = record.owner_id
        chunk.last_active = now - record.idle_s
        chunk.is_to_store = True
        return chunk

    def slow_tier_of(self, chunk: Chunk) -> Tier | None:
        """The fastest slow tier that has the chunk, or from which it is expected; None if there is none."""
        for tier in self.slow:
            if chunk.blocks[tier.number] is not None:
                return tier
        return None

    def store_of(self, chunk: Chunk) -> Tier | None:
        """The fastest slow tier that keeps the chunk; None if none does."""
        for tier in self.stores:
            if chunk.blocks[tier.number] is not None:
                return tier
        return None

    def tell_policies_their_size(self) -> None:
        """Tell those eviction policies that divide a tier between tenants how many blocks it has."""
        for tier in self.row:
            for policy in (tier.sole, tier.copied, tier.to_store):
                if isinstance(policy, HintedRetention):
                    policy.num_blocks = tier.pool.num_blocks

    # -- which blocks may be taken -------------------------------------------------------------------------------------

    def pin(self, chunk: Chunk) -> None:
        """One more user: nothing of the chunk may be taken but spare copies."""
        if not chunk.pins:
            self.unfile(chunk)
        chunk.pins += 1
        self.note_spare_copies(chunk)

    def unpin(self, chunk: Chunk) -> None:
        """One user fewer. After the last one the chunk may lose its blocks, and loses them if it has no name."""
        chunk.pins -= 1
        if chunk.pins:
            return
        self.forget_spare_copies(chunk)
        if chunk.key is not None:
            self.file(chunk)
            return
        for tier in self.row:
            tier.free_block(chunk)

    def file(self, chunk: Chunk) -> None:
        """Let an unpinned chunk lose its blocks."""
        is_in_secondary = chunk.blocks[1] is not None
        if chunk.blocks[0] is not None:
            (self.primary.copied if is_in_secondary else self.primary.sole).insert(chunk)
        if not self.slow:
            if is_in_secondary:
                self.secondary.sole.insert(chunk)
            return
        if is_in_secondary:
            self.secondary.file(chunk, is_copied=self.store_of(chunk) is not None)
        for tier in self.slow:
            if chunk.blocks[tier.number] is not None:
                tier.file(chunk, is_copied=False)

    def refuse_to_store(self, chunk: Chunk) -> None:
        """An unpinned chunk is not worth a place in a slow tier before its next use."""
        self.unfile(chunk)
        chunk.is_to_store = False
        self.file(chunk)

    def unfile(self, chunk: Chunk) -> None:
        """Undo `file`, while blocks and loans are still the same."""
        is_in_secondary = chunk.blocks[1] is not None
        if chunk.blocks[0] is not None:
            (self.primary.copied if is_in_secondary else self.primary.sole).remove(chunk)
        if not self.slow:
            if is_in_secondary:
                self.secondary.sole.remove(chunk)
            return
        if is_in_secondary:
            self.secondary.unfile(chunk, is_copied=self.store_of(chunk) is not None)
        for tier in self.slow:
            if chunk.blocks[tier.number] is not None:
                tier.unfile(chunk, is_copied=False)

    def touch(self, chunk: Chunk, now: float) -> None:
        """The chunk is about to be used: it goes after all others."""
        if chunk.pins:
            return
        self.unfile(chunk)
        chunk.last_active = now
        self.file(chunk)

    def note_spare_copies(self, chunk: Chunk) -> None:
        """A pinned chunk in the primary tier can do without its other copies, unless a transfer is at it."""
        is_in_secondary = chunk.blocks[1] is not None
        if not chunk.pins or chunk.blocks[0] is None or not (is_in_secondary or self.slow):
            return
        if chunk in self.primary.arriving:
            return
        if is_in_secondary and chunk not in self.secondary.arriving:
            self.secondary.note_spare_copy(chunk)
        for tier in self.slow:
            tier.note_spare_copy(chunk)

    def forget_spare_copies(self, chunk: Chunk) -> None:
        """Its copies are needed, or no longer those of a pinned chunk."""
        self.secondary.spare.pop(chunk, None)
        for tier in self.slow:
            tier.spare.pop(chunk, None)

    def expect_no_more(self, chunk: Chunk) -> None:
        """Take away the place of an unfiled chunk that was expected from a peer."""
        if self.peer is not None:
            self.peer.free_block(chunk)

    def free_copies(self, chunk: Chunk) -> None:
        """Take away all blocks of a pinned chunk but that of the primary tier."""
        self.forget_spare_copies(chunk)
        self.secondary.free_block(chunk)
        for tier in self.slow:
            tier.free_block(chunk)

    # -- proof ---------------------------------------------------------------------------------------------------------

    def check_integrity(self, named: set[Chunk], chunks: set[Chunk]) -> None:
        """Raises AssertionError unless chunks are filed where their blocks say, and blocks have one owner each.

        named: those in the index. chunks: these and all others that have blocks.
        """
        for tier in self.row:
            assert set(tier.sole).isdisjoint(tier.copied)
            for policy, is_copied in ((tier.sole, False), (tier.copied, True)):
                expected = {
                    chunk
                    for chunk in named
                    if not chunk.pins
                    and chunk.blocks[tier.number] is not None
                    and chunk.blocks[tier.number] not in tier.lent
                    and self._is_copied(chunk, tier) == is_copied
                }
                assert len(policy) == len(expected), (tier.name, is_copied)
                assert set(policy) == expected, (tier.name, is_copied)
            if self.slow and tier is not self.primary:
                assert set(tier.to_store) == {chunk for chunk in tier.sole if chunk.is_to_store}, tier.name
            for chunk in tier.spare:
                assert chunk.pins, chunk
                assert chunk.blocks[0] is not None, chunk
                assert chunk.blocks[tier.number] is not None, chunk
                assert chunk.blocks[tier.number] not in tier.lent, chunk
            tier.check_integrity(chunks)

    def _is_copied(self, chunk: Chunk, tier: Tier) -> bool:
        if tier is self.primary:
            return chunk.blocks[1] is not None
        return tier is self.secondary and self.store_of(chunk) is not None
