"""The target's side of moving chunks: frames become blocks of the CPU tier, written in place, and verified there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.core.plan import SlowTransfer, TransferEnd
from engine.executor.peers.blocks import Blocks
from engine.executor.peers.protocol import Header, checksum_of
from engine.executor.peers.socket import PeerSocket
from engine.executor.peers.timing import Rate

logger = logging.getLogger(__name__)

# The content of a block has to follow its header in that time.
BLOCK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Pull:
    """A chunk that a peer was asked for. since_s: by time.perf_counter."""

    transfer: SlowTransfer
    since_s: float


class Loads:
    """Of all peers of one engine."""

    def __init__(self, blocks: Blocks, rate: Rate, on_end: Callable[[TransferEnd], None]) -> None:
        """on_end: a transfer of the core has ended."""
        self.blocks = blocks
        # What the rate makes of one block, in seconds.
        self.pace_s = blocks.num_bytes / rate.bytes_per_s if rate.bytes_per_s else 0.0
        self._rate = rate
        self._on_end = on_end
        self._mutex = threading.Lock()
        self._last_end_s = 0.0

    def receive(self, pull: Pull | None, header: Header, connection: PeerSocket, closed: threading.Event) -> None:
        """Receive the content of a BLOCK to where it belongs; not before the rate allows it.

        pull: None = it is not waited for any more. closed: the connection ends. Raises OSError if that is before it is whole.
        """
        header_s = time.perf_counter()
        self._rate.wait(header.length, closed)
        if pull is None or pull.transfer.record.num_tokens != header.num_tokens:
            if pull is not None:
                self.fail(pull.transfer, gone=True)
            connection.receive(header.length, BLOCK_TIMEOUT_S)
            return
        block = pull.transfer.copy.target
        content = self.blocks.buffer(block)
        try:
            connection.receive_into(content, BLOCK_TIMEOUT_S)
        except OSError:
            self.fail(pull.transfer, gone=True)
            raise
        if checksum_of(header.key, (content,)) != header.checksum:
            logger.warning("a chunk of a peer was damaged on its way; it is computed instead")
            self.fail(pull.transfer, gone=False)
            return
        if not self.blocks.take(block, content):
            self.fail(pull.transfer, gone=True)
            return
        with self._mutex:
            # Of the tier's time: what arrives beside another chunk counts once, and waiting for the source's own copies
            # does not: it makes the first chunks of a pull late, and the next ones no dearer. A source may say anything.
            end_s = time.perf_counter()
            begin_s = min(pull.since_s + header.number * 1e-6, header_s)
            seconds = end_s - max(begin_s, self._last_end_s)
            self._last_end_s = end_s
        self._on_end(TransferEnd(pull.transfer.transfer_id, True, seconds))

    def fail(self, transfer: SlowTransfer, *, gone: bool) -> None:
        """gone: it is not there, or its peer is not; else it was damaged."""
        self._on_end(TransferEnd(transfer.transfer_id, False, gone=gone))
