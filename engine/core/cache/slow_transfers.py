"""The transfers of slow tiers: planned, in flight, then complete or failed; each for as long as it takes.

A transfer moves one chunk between its block in a slow tier and one in the secondary tier. It pins no chunk: only its two
blocks are lent to it. So a chunk may be used, evicted from elsewhere, or lose its name meanwhile; what has arrived when the
transfer ends belongs to whichever chunk has the name then. There is at most one transfer of a chunk at a time.
"""

from __future__ import annotations

from engine.core.cache.index import Chunk, ChunkIndex
from engine.core.cache.tier import Tier, Tiers
from engine.core.plan import BlockCopy, SlowTransfer
from engine.core.stats import EngineStats

# After a failed store, a tier is left alone for so long: the next one would most likely fail too.
STORE_PAUSE_S = 1.0


class SlowTransfers:
    """The transfers that have not ended."""

    def __init__(self, tiers: Tiers, index: ChunkIndex, stats: EngineStats) -> None:
        self._tiers = tiers
        self._secondary = tiers.secondary
        self._index = index
        self._stats = stats
        self._planned: list[SlowTransfer] = []
        self._open: dict[int, SlowTransfer] = {}
        self._by_key: dict[bytes, SlowTransfer] = {}
        self._num_started = 0
        self._num_loads = 0
        self._paused_until_s: dict[Tier, float] = {}

    @property
    def num_loads(self) -> int:
        return self._num_loads

    @property
    def num_stores(self) -> int:
        return len(self._open) - self._num_loads

    def is_load(self, transfer: SlowTransfer) -> bool:
        """Whether it brings a chunk to the secondary tier."""
        return transfer.copy.target_tier == self._secondary.name

    def find(self, chunk: Chunk) -> SlowTransfer | None:
        """The transfer of a named chunk that has not ended, if there is one."""
        return None if chunk.key is None else self._by_key.get(chunk.key)

    def may_store(self, tier: Tier, now: float) -> bool:
        """Whether the tier takes chunks; it is left alone for a while after a failure."""
        return now >= self._paused_until_s.get(tier, now)

    def plan_load(self, chunk: Chunk, tier: Tier, target_block: int) -> SlowTransfer:
        """Bring a named, unpinned chunk from a slow tier to a new block of the secondary tier."""
        self._num_loads += 1
        return self._plan(chunk, tier, self._secondary, target_block)

    def plan_store(self, chunk: Chunk, tier: Tier, target_block: int) -> SlowTransfer:
        """Bring a named, unpinned chunk from the secondary tier to a new block of a slow one."""
        return self._plan(chunk, self._secondary, tier, target_block)

    def _plan(self, chunk: Chunk, source: Tier, target: Tier, target_block: int) -> SlowTransfer:
        source_block = chunk.blocks[source.number]
        assert source_block is not None, f"{chunk} has no block in the {source.name} tier"
        assert chunk.key is not None, f"{chunk} has no name"
        assert not chunk.pins, f"{chunk} is in use"
        self._tiers.unfile(chunk)
        source.lent[source_block] = chunk
        target.lent[target_block] = None
        self._tiers.file(chunk)
        self._num_started += 1
        copy = BlockCopy(source.name, source_block, target.name, target_block)
        transfer = SlowTransfer(transfer_id=self._num_started, key=chunk.key, num_tokens=chunk.num_tokens, copy=copy)
        self._planned.append(transfer)
        self._open[transfer.transfer_id] = transfer
        self._by_key[chunk.key] = transfer
        return transfer

    def take(self) -> tuple[SlowTransfer, ...]:
        """What has been planned since the last call; in flight from now on."""
        planned, self._planned = tuple(self._planned), []
        return planned

    def complete(self, transfer_id: int, *, ok: bool, now: float) -> None:
        """A transfer has ended; transfers may end in any order.

        ok: False if the target has not got what the source had; a source that could not be read is forgotten.
        """
        transfer = self._open.pop(transfer_id)
        del self._by_key[transfer.key]
        is_load, copy = self.is_load(transfer), transfer.copy
        self._num_loads -= is_load
        source, target = self._tiers.by_name[copy.source_tier], self._tiers.by_name[copy.target_tier]
        self._note_outcome(source if is_load else target, is_load=is_load, ok=ok, now=now)
        chunk = self._index.match(transfer.key)
        is_filed = chunk is not None and not chunk.pins
        if chunk is not None and is_filed:
            self._tiers.unfile(chunk)
        source.end_loan(copy.source)
        if ok and chunk is not None and chunk.blocks[target.number] is None:
            chunk.blocks[target.number] = copy.target
            target.lent[copy.target] = chunk
        target.end_loan(copy.target)
        if chunk is None:
            return
        if is_load and not ok and chunk.blocks[source.number] == copy.source:
            source.free_block(chunk)
        if not is_filed:
            self._tiers.note_spare_copies(chunk)
        elif all(block is None for block in chunk.blocks):
            self._index.drop(chunk)
        else:
            if is_load and ok:
                chunk.last_active = now  # a request waits for it
            self._tiers.file(chunk)

    def _note_outcome(self, tier: Tier, *, is_load: bool, ok: bool, now: float) -> None:
        outcome = ("loaded" if ok else "load_failed") if is_load else ("stored" if ok else "store_failed")
        self._stats.slow_transfers[f"{tier.name}_{outcome}"] += 1
        if not is_load and not ok:
            self._paused_until_s[tier] = now + STORE_PAUSE_S

    def check_integrity(self) -> None:
        """Raises AssertionError unless the blocks that are lent are those of the transfers that have not ended."""
        lent: dict[str, list[int]] = {tier.name: [] for tier in self._tiers}
        for transfer in self._open.values():
            lent[transfer.copy.source_tier].append(transfer.copy.source)
            lent[transfer.copy.target_tier].append(transfer.copy.target)
        for tier in self._tiers:
            assert sorted(tier.lent) == sorted(lent[tier.name]), tier.name
        assert len(self._by_key) == len(self._open)
        assert self._num_loads == sum(map(self.is_load, self._open.values()))
