"""Peers in one process: what a core asks of another one comes late, out of order, badly, or not at all.

As many ends as there are cores; each is the transport of its core's tier of peers. Knows two blocks of memory and no socket.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.core.cache_map import context_keys
from engine.core.engine_core import EngineCore
from engine.core.handover import records_of
from engine.core.plan import ChunkRecord, SlowTransfer, TransferEnd
from engine.core.request import Request
from engine.core.tier_table import CPU, PEER, TierSpec


def peer_tier(num_blocks: int, max_wait_s: float = 30.0) -> TierSpec:
    return TierSpec(name=PEER, num_blocks=num_blocks, is_fast=False, is_store=False, max_wait_s=max_wait_s)


@dataclass
class _Load:
    """One that is open. due: in polls. content: what came, once the peer has sent it; None = it is gone."""

    transfer: SlowTransfer
    before: bytes | None
    due: float
    has_come: bool = False
    content: bytes | None = None


class PeerEnd:
    """The transport of one core.

    peers: the others. num_open: transfers that have not ended.
    """

    def __init__(
        self,
        core: EngineCore,
        read: Callable[[int], bytes | None],
        write: Callable[[int, bytes | None], None],
        now: Callable[[], float],
        *,
        seed: int = 0,
        max_delay: int = 4,
        failures: float = 0.05,
        hangs: float = 0.02,
    ) -> None:
        """read, write: see DelayedTier. now: the core's time.

        failures: part of the transfers, of either direction, that fail although the content is there.
        hangs: part of them that do not end until `wake`.
        """
        self.core = core
        self.peers: list[PeerEnd] = []
        self.ended_offers: list[str] = []
        self._read, self._write, self._now = read, write, now
        self._rng = random.Random(seed)
        self.max_delay, self.failures, self.hangs = max_delay, failures, hangs
        self._loads: dict[int, _Load] = {}
        self._sends: dict[int, tuple[float, SlowTransfer, bytes | None]] = {}
        self._expected: dict[bytes, PeerEnd] = {}
        self._asked: dict[bytes, list[tuple[PeerEnd, int]]] = {}  # the peers that asked, and their transfers
        self._num_polls = 0

    @property
    def num_open(self) -> int:
        return len(self._loads) + len(self._sends)

    # -- what requests find elsewhere, and what is offered -------------------------------------------------------------

    def find(self, request: Request) -> None:
        """Ask all peers for what the request, which was just added, lacks."""
        handover = self.core.handover
        query = handover.missing_chunks(request)
        for peer in self.peers:
            if query is not None:
                found = peer.core.handover.find_chunks(query.keys, peer._now())
                records = records_of(query, found, request, self.core.cache_config.chunk_size)
                self.expect(peer, records)
                handover.expect(records, request.request_id, self._now())

    def offer(self, peer: PeerEnd, offer_id: str, token_ids: Sequence[int], conversation_id: str, tenant: str) -> None:
        """Leave what is here of a context to a peer."""
        config = self.core.cache_config
        sizes = {"chunk_size": config.chunk_size, "max_chunks": 1000}
        keys = context_keys(token_ids, model=config.model, tenant=tenant, **sizes)
        records = self.core.handover.records_of(keys, conversation_id, self._now())
        peer.expect(self, records)
        peer.core.handover.accept_offer(records[::-1], offer_id, peer._now())

    def expect(self, peer: PeerEnd, records: Iterable[ChunkRecord]) -> None:
        """Loads of these go to that peer."""
        self._expected |= dict.fromkeys((record.key for record in records), peer)

    # -- the transport -------------------------------------------------------------------------------------------------

    def start(self, transfer: SlowTransfer) -> None:
        """Begin a transfer."""
        copy, now = transfer.copy, self._num_polls
        due = float("inf") if self._rng.random() < self.hangs else now + self._rng.randint(0, self.max_delay)
        if copy.source_tier == PEER:
            assert copy.target_tier == CPU
            self._write(copy.target, None)
            load = self._loads[transfer.transfer_id] = _Load(transfer, self._read(copy.target), due)
            source = self._expected.get(transfer.key)
            if source is None or source is self:
                load.has_come = True
            else:
                source.ask(transfer.key, self, transfer.transfer_id)
        else:
            assert (copy.source_tier, copy.target_tier) == (CPU, PEER)
            self._sends[transfer.transfer_id] = due, transfer, self._read(copy.source)

    def ask(self, key: bytes, asker: PeerEnd, transfer_id: int) -> None:
        """A peer wants a chunk for a transfer of its own."""
        askers = self._asked.setdefault(key, [])
        askers.append((asker, transfer_id))
        self.core.handover.start_sends([key], self._now())

    def decline(self, keys: Iterable[bytes]) -> None:
        """See PeerAnswers."""
        for key in keys:
            self._answer(key, None)

    def end_offers(self, offer_ids: Iterable[str]) -> None:
        """See PeerAnswers."""
        self.ended_offers += offer_ids

    def _answer(self, key: bytes, content: bytes | None) -> None:
        for asker, transfer_id in self._asked.pop(key, ()):
            load = asker._loads.get(transfer_id)
            if load is not None and not load.has_come:
                load.has_come, load.content = True, content

    def poll(self) -> list[TransferEnd]:
        """The transfers that have ended, in any order."""
        self._num_polls += 1
        ends = [self._end_send(number) for number, (due, *_) in list(self._sends.items()) if due <= self._num_polls]
        ends += [
            self._end_load(number)
            for number, load in list(self._loads.items())
            if load.due <= self._num_polls and load.has_come
        ]
        self._rng.shuffle(ends)
        return ends

    def wake(self) -> None:
        """Let what hangs end with the next polls; a load whose peer does not answer is given up."""
        self._sends = {number: (0.0, *rest) for number, (_, *rest) in self._sends.items()}
        for load in self._loads.values():
            load.due, load.has_come = 0.0, True

    def _end_send(self, number: int) -> TransferEnd:
        _, transfer, before = self._sends.pop(number)
        content = self._read(transfer.copy.source)
        ok = content is not None and before is not None and self._rng.random() >= self.failures
        if ok:
            assert content == before, "the source of a send has changed"
        is_wanted = transfer.key in self._asked
        self._answer(transfer.key, content if ok else None)
        return TransferEnd(number, ok and is_wanted, gone=not is_wanted)

    def _end_load(self, number: int) -> TransferEnd:
        load = self._loads.pop(number)
        target = load.transfer.copy.target
        assert self._read(target) in (None, load.before), "something else was written to the target of a load"
        if load.content is None:
            return TransferEnd(number, ok=False, gone=True)
        if self._rng.random() < self.failures:
            return TransferEnd(number, ok=False)
        self._write(target, load.content)
        return TransferEnd(number, ok=True, seconds=None)


def connect(ends: Sequence[PeerEnd]) -> None:
    """Let them know each other."""
    for end in ends:
        end.peers = [other for other in ends if other is not end]
