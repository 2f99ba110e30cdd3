"""The transfers of slow tiers: planned, in flight, then complete or failed; each for as long as it takes.

A transfer moves one chunk between its block in a slow tier and one in the secondary tier: a load from there, a store to a
tier that keeps it, a send to a peer. It pins no chunk: only its two blocks are lent to it. So a chunk may be used, evicted
from elsewhere, or lose its name meanwhile; what has arrived when the transfer ends belongs to whichever chunk has the name
then. There is at most one transfer of a chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.cache.index import Chunk, ChunkIndex
from engine.core.cache.prices import LoadPrices
from engine.core.cache.tier import Tier, Tiers
from engine.core.plan import BlockCopy, ChunkRecord, SlowTransfer, TransferEnd
from engine.core.stats import EngineStats
from engine.core.tier_table import transfer_outcome

# After a failed store, a tier gets no more for so long, because the next one would most likely fail too; twice as long after
# each further one. The same holds for loads, but one or two bad blocks are no reason to spare the tier.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
MAX_FAILED_LOADS = 2


@dataclass(slots=True)
class _TierState:
    """How a slow tier does.

    open: its transfers that have not ended, the oldest first, and when each began.
    num_failures, paused_until_s: in a row, and until when it is left alone; of stores and of loads.
    num_stores_left: what may be stored now, as of `counted_at_s`.
    """

    open: dict[int, float] = field(default_factory=dict)
    num_failures: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    paused_until_s: dict[bool, float] = field(default_factory=dict)
    num_stores_left: float = 0.0
    counted_at_s: float | None = None


class SlowTransfers:
    """The transfers that have not ended."""

    def __init__(self, tiers: Tiers, index: ChunkIndex, prices: LoadPrices, stats: EngineStats) -> None:
        self._tiers = tiers
        self._secondary = tiers.secondary
        self._index = index
        self._prices = prices
        self._stats = stats
        self._planned: list[SlowTransfer] = []
        self._open: dict[int, SlowTransfer] = {}
        self._by_key: dict[bytes, SlowTransfer] = {}
        self._states = {tier.name: _TierState() for tier in tiers.slow}
        self._num_started = 0
        self._num_loads = 0
        self._num_sends = 0
        self._unawaited: set[int] = set()

    @property
    def num_loads(self) -> int:
        return self._num_loads

    @property
    def num_awaited_loads(self) -> int:
        """Those that were planned for a request that waits for them."""
        return self._num_loads - len(self._unawaited)

    @property
    def num_sends(self) -> int:
        return self._num_sends

    @property
    def num_stores(self) -> int:
        return len(self._open) - self._num_loads - self._num_sends

    def is_load(self, transfer: SlowTransfer) -> bool:
        """Whether it brings a chunk to the secondary tier."""
        return transfer.copy.target_tier == self._secondary.name

    def is_send(self, transfer: SlowTransfer) -> bool:
        """Whether it brings a chunk to a peer."""
        return not self._tiers.by_name[transfer.copy.target_tier].spec.is_store

    def find(self, chunk: Chunk) -> SlowTransfer | None:
        """The transfer of a named chunk that has not ended, if there is one."""
        return None if chunk.key is None else self._by_key.get(chunk.key)

    # -- whether a tier is to be used ----------------------------------------------------------------------------------

    def hangs(self, tier: Tier, now: float) -> bool:
        """Whether one of its transfers takes longer than a request would wait for it."""
        began_s = tuple(self._states[tier.name].open.values())  # of a copy, because others ask too
        return bool(began_s) and now - began_s[0] > tier.spec.max_wait_s

    def may_load(self, tier: Tier, now: float) -> bool:
        """Whether the tier gives chunks; it is left alone while it hangs, and for a while after it failed repeatedly."""
        return self._is_usable(tier, is_load=True, now=now)

    def may_store(self, tier: Tier, now: float) -> bool:
        """Whether the tier takes chunks ahead of time: as for loads, and only so many in a time."""
        state, spec = self._states[tier.name], tier.spec
        if spec.rewrite_s:
            if state.counted_at_s is None:
                state.num_stores_left, state.counted_at_s = float(spec.num_blocks), now
            earned = (now - state.counted_at_s) * spec.num_blocks / spec.rewrite_s
            state.num_stores_left = min(state.num_stores_left + earned, float(spec.num_blocks))
            state.counted_at_s = now
            if state.num_stores_left < 1:
                return False
        return self.takes_chunks(tier, now)

    def takes_chunks(self, tier: Tier, now: float) -> bool:
        """Whether a store would most likely go well."""
        return self._is_usable(tier, is_load=False, now=now)

    def _is_usable(self, tier: Tier, *, is_load: bool, now: float) -> bool:
        paused_until_s = self._states[tier.name].paused_until_s.get(is_load, now)
        return now >= paused_until_s and not self.hangs(tier, now)

    # -- planning ------------------------------------------------------------------------------------------------------

    def plan_load(
        self, chunk: Chunk, tier: Tier, target_block: int, now: float, *, is_awaited: bool = True
    ) -> SlowTransfer:
        """Bring a named, unpinned chunk from a slow tier to a new block of the secondary tier.

        is_awaited: by a request, which counts as a use of the chunk.
        """
        assert not chunk.pins, f"{chunk} is in use"
        self._num_loads += 1
        transfer = self._plan(chunk, tier, self._secondary, target_block, now)
        if not is_awaited:
            self._unawaited.add(transfer.transfer_id)
        return transfer

    def await_load(self, transfer: SlowTransfer) -> None:
        """A request waits for a load that was planned before."""
        self._unawaited.discard(transfer.transfer_id)

    def plan_store(self, chunk: Chunk, tier: Tier, target_block: int, now: float) -> SlowTransfer:
        """Bring a named, unpinned chunk from the secondary tier to a new block of a slow one."""
        assert not chunk.pins, f"{chunk} is in use"
        self._states[tier.name].num_stores_left -= 1
        return self._plan(chunk, self._secondary, tier, target_block, now)

    def plan_send(self, chunk: Chunk, peer: Tier, target_block: int, now: float) -> SlowTransfer:
        """Send a named chunk from the secondary tier to a peer, by way of a free block. A pinned chunk is as good as any."""
        self._num_sends += 1
        return self._plan(chunk, self._secondary, peer, target_block, now)

    def _plan(self, chunk: Chunk, source: Tier, target: Tier, target_block: int, now: float) -> SlowTransfer:
        source_block = chunk.blocks[source.number]
        assert source_block is not None, f"{chunk} has no block in the {source.name} tier"
        assert chunk.key is not None, f"{chunk} has no name"
        source.spare.pop(chunk, None)
        if not chunk.pins:
            self._tiers.unfile(chunk)
        source.lent[source_block] = chunk
        target.lent[target_block] = None
        if not chunk.pins:
            self._tiers.file(chunk)
        self._num_started += 1
        transfer = SlowTransfer(
            transfer_id=self._num_started,
            record=ChunkRecord(
                key=chunk.key,
                parent_key=chunk.parent_key,
                position=chunk.position,
                num_tokens=chunk.num_tokens,
                owner_id=chunk.owner_id,
                idle_s=now - chunk.last_active,
            ),
            copy=BlockCopy(source.name, source_block, target.name, target_block),
        )
        self._planned.append(transfer)
        self._open[transfer.transfer_id] = transfer
        self._by_key[chunk.key] = transfer
        self._state_of(transfer).open[transfer.transfer_id] = now
        return transfer

    def take(self) -> tuple[SlowTransfer, ...]:
        """What has been planned since the last call; in flight from now on."""
        planned, self._planned = tuple(self._planned), []
        return planned

    # -- ending --------------------------------------------------------------------------------------------------------

    def complete(self, end: TransferEnd, now: float) -> SlowTransfer:
        """A transfer has ended; transfers may end in any order. A source that could not be read is forgotten.

        So is a source that is a peer: what was expected of it has come, or does not.
        """
        transfer = self._open.pop(end.transfer_id)
        del self._by_key[transfer.key]
        ok, is_load, copy = end.ok, self.is_load(transfer), transfer.copy
        is_awaited = end.transfer_id not in self._unawaited
        self._unawaited.discard(end.transfer_id)
        self._num_loads -= is_load
        self._num_sends -= self.is_send(transfer)
        source, target = self._tiers.by_name[copy.source_tier], self._tiers.by_name[copy.target_tier]
        self._note_outcome(transfer, end, now)
        chunk = self._index.match(transfer.key)
        is_filed = chunk is not None and not chunk.pins
        if chunk is not None and is_filed:
            self._tiers.unfile(chunk)
        source.end_loan(copy.source)
        if ok and chunk is not None and chunk.blocks[target.number] is None and target.spec.is_store:
            chunk.blocks[target.number] = copy.target
            target.lent[copy.target] = chunk
        target.end_loan(copy.target)
        if chunk is None:
            return transfer
        if is_load and not (ok and source.spec.is_store) and chunk.blocks[source.number] == copy.source:
            source.free_block(chunk)
        if not is_filed:
            self._tiers.note_spare_copies(chunk)
        elif all(block is None for block in chunk.blocks):
            self._index.drop(chunk, "failed", now)
        else:
            if is_load and ok and is_awaited:
                chunk.last_active = now
            self._tiers.file(chunk)
        return transfer

    def _slow_tier_of(self, transfer: SlowTransfer) -> str:
        return transfer.copy.source_tier if self.is_load(transfer) else transfer.copy.target_tier

    def _state_of(self, transfer: SlowTransfer) -> _TierState:
        return self._states[self._slow_tier_of(transfer)]

    def _note_outcome(self, transfer: SlowTransfer, end: TransferEnd, now: float) -> None:
        tier, state, is_load = self._slow_tier_of(transfer), self._state_of(transfer), self.is_load(transfer)
        del state.open[end.transfer_id]
        outcome = f"{tier}_{transfer_outcome(tier, is_load=is_load, ok=end.ok, gone=end.gone)}"
        self._stats.slow_transfers[outcome] += 1
        if not end.ok:
            if not end.gone and now >= state.paused_until_s.get(
                is_load, now
            ):  # those that were under way tell nothing new
                state.num_failures[is_load] += 1
                num_too_many = state.num_failures[is_load] - (MAX_FAILED_LOADS if is_load else 0)
                if num_too_many > 0:
                    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (num_too_many - 1))
                    state.paused_until_s[is_load] = now + pause_s
            return
        state.num_failures[is_load] = 0
        if end.seconds is not None:
            self._stats.slow_seconds[outcome] += end.seconds
            if is_load:
                self._prices.note_load(tier, end.seconds, now)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the blocks that are lent are those of the transfers that have not ended."""
        lent: dict[str, list[int]] = {tier.name: [] for tier in self._tiers}
        for transfer in self._open.values():
            lent[transfer.copy.source_tier].append(transfer.copy.source)
            lent[transfer.copy.target_tier].append(transfer.copy.target)
        for tier in self._tiers:
            assert sorted(tier.lent) == sorted(lent[tier.name]), tier.name
        assert len(self._by_key) == len(self._open) == sum(len(state.open) for state in self._states.values())
        assert self._num_loads == sum(map(self.is_load, self._open.values()))
        assert self._num_sends == sum(map(self.is_send, self._open.values()))
        assert all(self.is_load(self._open[transfer_id]) for transfer_id in self._unawaited)
