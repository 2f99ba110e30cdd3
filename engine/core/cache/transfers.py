"""The block copies of steps: planned, in flight, then complete, aborted or failed.

From its planning to its end a copy pins its chunk. Copies are planned by whatever needs them, told with the next plan, and
end when that plan's result is there: the copies of a step, which are between fast tiers, are finished when the step is. For
those of slow tiers see slow_transfers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.cache.index import Chunk, ChunkIndex
from engine.core.cache.tier import Tiers
from engine.core.plan import BlockCopy
from engine.core.stats import EngineStats


@dataclass(slots=True)
class StepTransfers:
    """The block copies of one plan; see StepPlan for their order.

    swap_ins: (chunk that is read, chunk that is written), the same one if a shared chunk comes back to the primary tier.
    """

    evictions: list[tuple[Chunk, BlockCopy]] = field(default_factory=list)
    local_copies: list[BlockCopy] = field(default_factory=list)
    swap_ins: list[tuple[Chunk, Chunk, BlockCopy]] = field(default_factory=list)
    swap_outs: list[tuple[Chunk, BlockCopy]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.evictions or self.local_copies or self.swap_ins or self.swap_outs)


class Transfers:
    """The copies of the plan being made, and of those that have no result yet."""

    def __init__(self, tiers: Tiers, index: ChunkIndex, stats: EngineStats) -> None:
        self.planned = StepTransfers()
        self._in_flight: list[StepTransfers] = []
        self._tiers = tiers
        self._primary, self._secondary = tiers.primary, tiers.secondary
        self._index = index
        self._stats = stats

    @property
    def num_swap_outs(self) -> int:
        """Copies ahead of time that have not ended."""
        return sum(len(transfers.swap_outs) for transfers in (self.planned, *self._in_flight))

    # -- planning ------------------------------------------------------------------------------------------------------

    def plan_swap_in(self, source: Chunk, target: Chunk) -> None:
        """Bring the KV of `source` from the secondary tier to the primary tier's block of `target`."""
        self._tiers.pin(source)
        self._secondary.spare.pop(source, None)
        self._primary.arriving.add(target)
        copy = self._copy_in(source.blocks[1], target.blocks[0])
        self.planned.swap_ins.append((source, target, copy))

    def plan_local_copy(self, source_block: int, target: Chunk) -> None:
        """Copy a block of the primary tier, as it is before the step, to that of `target`."""
        name = self._primary.name
        self.planned.local_copies.append(BlockCopy(name, source_block, name, _known(target.blocks[0])))

    def plan_eviction(self, victim: Chunk, primary_block: int, secondary_block: int) -> None:
        """Move an unpinned, unfiled chunk, which has just lost its block of the primary tier, to the secondary tier."""
        victim.pins += 1
        self._plan_store(self.planned.evictions, victim, primary_block, secondary_block)

    def plan_swap_out(self, chunk: Chunk, secondary_block: int) -> None:
        """Copy an unpinned chunk to the secondary tier, ahead of time."""
        self._tiers.pin(chunk)
        self._plan_store(self.planned.swap_outs, chunk, _known(chunk.blocks[0]), secondary_block)

    def _plan_store(
        self, copies: list[tuple[Chunk, BlockCopy]], chunk: Chunk, primary_block: int, secondary_block: int
    ) -> None:
        chunk.blocks[1] = secondary_block
        self._secondary.arriving.add(chunk)
        num_tokens = chunk.num_tokens if chunk.num_tokens < self._index.chunk_size else None
        copy = BlockCopy(self._primary.name, primary_block, self._secondary.name, secondary_block, num_tokens)
        copies.append((chunk, copy))

    def _copy_in(self, secondary_block: int | None, primary_block: int | None) -> BlockCopy:
        return BlockCopy(self._secondary.name, _known(secondary_block), self._primary.name, _known(primary_block))

    # -- in flight -----------------------------------------------------------------------------------------------------

    def take(self) -> StepTransfers:
        """What the plan being made has to tell; in flight from now on."""
        transfers, self.planned = self.planned, StepTransfers()
        self._in_flight.append(transfers)
        self._stats.num_local_copies += len(transfers.local_copies)
        self._stats.num_swap_ins += len(transfers.swap_ins)
        self._stats.num_swap_outs += len(transfers.swap_outs) + len(transfers.evictions)
        return transfers

    def complete(self) -> None:
        """The oldest plan in flight has been executed."""
        tiers = self._tiers
        transfers = self._in_flight.pop(0)
        for chunk, _ in (*transfers.evictions, *transfers.swap_outs):
            self._secondary.arriving.discard(chunk)
            tiers.unpin(chunk)
            tiers.note_spare_copies(chunk)
        for source, target, _ in transfers.swap_ins:
            self._primary.arriving.discard(target)
            if target.key is None and source is target:  # a tail taken over: its copies are stale once it is written to
                tiers.free_copies(source)
            tiers.unpin(source)
            tiers.note_spare_copies(source)

    def abort(self, now: float) -> None:
        """The executor failed at the oldest plan in flight: whatever it was to write is not to be trusted.

        Chunks keep the copy that was read, and those whose only copy was on its way are dropped.
        """
        tiers = self._tiers
        transfers = self._in_flight.pop(0)
        for chunk, _ in (*transfers.evictions, *transfers.swap_outs):
            self._secondary.arriving.discard(chunk)
            self._secondary.spare.pop(chunk, None)
            self._secondary.free_block(chunk)
            is_lost = chunk.blocks[0] is None and tiers.store_of(chunk) is None
            if is_lost or chunk in self._primary.arriving:  # evicted, or evicted and on its way back
                self._index.drop(chunk, "failed", now)
            tiers.unpin(chunk)
        for source, target, _ in transfers.swap_ins:
            self._undo_swap_in(source, target)

    def _undo_swap_in(self, source: Chunk, target: Chunk) -> None:
        """A shared chunk is in the secondary tier again; a private one goes with its request."""
        self._primary.arriving.discard(target)
        if source is target and target.key is not None:
            self._primary.free_block(target)
        elif source is target:
            self._tiers.free_copies(source)
        self._tiers.unpin(source)

    def fail_swap_in(self, primary_block: int, now: float) -> Chunk | None:
        """A swap-in of the oldest plan in flight brought something else than what was swapped out: forget the chunk.

        Returns the chunk that was to be written, whichever request holds it; None if there is no such swap-in.
        """
        for transfer in self._in_flight[0].swap_ins:
            source, target, copy = transfer
            if copy.target == primary_block:
                self._in_flight[0].swap_ins.remove(transfer)
                self._primary.arriving.discard(target)
                for chunk in {source, target}:
                    self._index.drop(chunk, "failed", now)
                    self._tiers.forget_spare_copies(chunk)
                self._tiers.free_copies(source)
                self._tiers.unpin(source)
                self._stats.num_corrupted_swaps += 1
                return target
        return None

    # -- proof ---------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> list[Chunk]:
        """Raises AssertionError if a copy's blocks are not its chunks'; returns the chunks that are pinned, once a pin."""
        pinned: list[Chunk] = []
        storing, loading = set(), set()
        for transfers in (self.planned, *self._in_flight):
            for chunk, copy in (*transfers.evictions, *transfers.swap_outs):
                assert chunk.blocks[1] == copy.target
                storing.add(chunk)
                pinned.append(chunk)
            for source, target, copy in transfers.swap_ins:
                assert (source.blocks[1], target.blocks[0]) == (copy.source, copy.target)
                loading.add(target)
                pinned.append(source)
        assert (self._secondary.arriving, self._primary.arriving) == (storing, loading)
        return pinned


def _known(block_id: int | None) -> int:
    assert block_id is not None, "a copy needs both of its blocks"
    return block_id
