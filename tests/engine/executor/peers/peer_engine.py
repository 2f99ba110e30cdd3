"""An engine as its tier of peers sees it: a CPU tier with chunks, and answers; without a core and a model."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from engine.attention.protocol import LayerShape
from engine.core.handover import FoundChunks
from engine.core.plan import BlockCopy, ChunkRecord, SlowTransfer, TransferEnd
from engine.core.tier_table import CPU, PEER
from engine.executor.peers.blocks import Blocks, LocalBlocks
from engine.executor.peers.tier import PeerTier
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import Checksums

SECRET = b"s" * 32
IDENTITY = b"i" * 16
CHUNK_SIZE = 4
HOST = "127.0.0.1"
PATIENCE_S = 20.0


def key_of(number: int) -> bytes:
    return random.Random(number).randbytes(32)


def record_of(number: int, num_tokens: int = CHUNK_SIZE, owner_id: str | None = None) -> ChunkRecord:
    return ChunkRecord(
        key=key_of(number),
        parent_key=key_of(-number - 1),
        position=number,
        num_tokens=num_tokens,
        owner_id=owner_id,
        idle_s=1.5,
    )


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.002)


class PeerEngine:
    """One of several in this process, and its own handler. chunks: what it has: a block and a number of tokens by key."""

    def __init__(
        self,
        name: str,
        *,
        num_blocks: int = 16,
        rate: float = 0.0,
        secret: bytes = SECRET,
        identity: bytes = IDENTITY,
        layers: Sequence[LayerShape] = (LayerShape(2, 4, 4), LayerShape(1, 6, 2)),
        verifies: bool = True,
        blocks: Blocks | None = None,
    ) -> None:
        """blocks: what is sent and received instead of those of its own CPU tier."""
        self.name = name
        self.cpu = KVStore(
            layers, num_blocks=num_blocks, chunk_size=CHUNK_SIZE, dtype=torch.float32, device=torch.device("cpu")
        )
        self.checksums = Checksums(self.cpu) if verifies else None
        self.tier = PeerTier(identity, secret, name, HOST, rate, blocks or LocalBlocks(self.cpu, self.checksums))
        self.rows = self.cpu.storage.view(torch.uint8).numpy()
        self.chunks: dict[bytes, tuple[int, int]] = {}
        self.transcripts: dict[str, bytes] = {}
        self.offers: list[tuple[str, tuple[ChunkRecord, ...], bytes, str]] = []
        self.takes_offers = True
        self.asked: list[bytes] = []
        self.on_send: Callable[[Sequence[bytes]], None] = self.send_now
        self.ends: dict[int, TransferEnd] = {}
        self._num_transfers = 0
        self._mutex = threading.Lock()

    def run(self) -> PeerEngine:
        self.tier.run(self)
        return self

    def fill(self, *numbers: int, num_tokens: int = CHUNK_SIZE) -> None:
        """Chunks of these numbers, in blocks of these numbers."""
        for number in numbers:
            self.rows[number] = list(random.Random(number).randbytes(self.rows.shape[1]))
            self.chunks[key_of(number)] = (number, num_tokens)
            if self.checksums is not None:
                self.checksums.note_block(number)

    # -- handlers ------------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> FoundChunks:
        return FoundChunks(
            {index: 2.5 for index, key in enumerate(keys) if key in self.chunks}, ((0, 3),) if keys else ()
        )

    def send(self, keys: Sequence[bytes]) -> None:
        self.asked += keys
        self.on_send(keys)

    def transcript(self, conversation_id: str) -> Future[bytes | None]:
        future: Future[bytes | None] = Future()
        future.set_result(self.transcripts.get(conversation_id))
        return future

    def offered(
        self, conversation_id: str, records: Sequence[ChunkRecord], transcript: bytes, peer_id: str
    ) -> Future[bool]:
        self.offers.append((conversation_id, tuple(records), transcript, peer_id))
        future: Future[bool] = Future()
        future.set_result(self.takes_offers)
        return future

    # -- what a core would do ------------------------------------------------------------------------------------------

    def send_now(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if key in self.chunks:
                self.start_send(key)
            else:
                self.tier.decline([key])

    def start_send(self, key: bytes) -> int:
        block, num_tokens = self.chunks[key]
        return self._start(key, num_tokens, BlockCopy(CPU, block, PEER, 0))

    def load(self, number: int, block: int, peer_id: str | None = None, num_tokens: int = CHUNK_SIZE) -> int:
        """The number of the transfer."""
        if peer_id is not None:
            self.tier.expect(peer_id, [key_of(number)])
        return self._start(key_of(number), num_tokens, BlockCopy(PEER, 0, CPU, block))

    def _start(self, key: bytes, num_tokens: int, copy: BlockCopy) -> int:
        with self._mutex:
            self._num_transfers += 1
            transfer_id = self._num_transfers
        record = ChunkRecord(key=key, parent_key=key, position=0, num_tokens=num_tokens, owner_id=None, idle_s=0.0)
        self.tier.start(SlowTransfer(transfer_id=transfer_id, record=record, copy=copy))
        return transfer_id

    def end_of(self, transfer_id: int) -> TransferEnd:
        """How a transfer has ended; waits for that, and fails if it is told twice."""

        def has_ended() -> bool:
            with self._mutex:
                for end in self.tier.poll():
                    assert end.transfer_id not in self.ends
                    self.ends[end.transfer_id] = end
            return transfer_id in self.ends

        wait_until(has_ended)
        return self.ends[transfer_id]
