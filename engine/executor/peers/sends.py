"""The source's side of moving chunks: who waits for which chunk, and the frames that the core's transfers become.

A chunk that a peer wants is asked of the core once. The core plans its transfer or declines it; either goes to all that wait
for it by then. Knows no socket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from engine.core.plan import SlowTransfer, TransferEnd
from engine.executor.peers.blocks import Blocks
from engine.executor.peers.connection import SEND_TIMEOUT_S, Connection, Message
from engine.executor.peers.protocol import MAX_KEYS, Buffer, Kind, pack_frame, pack_keys
from engine.executor.peers.timing import Deadlines, Rate

logger = logging.getLogger(__name__)

# What the core has not decided by then is declined: those that wait for it have given up.
MAX_WAIT_S = 10.0


class Sends:
    """Of all connections of one engine."""

    def __init__(self, blocks: Blocks, rate: Rate, on_end: Callable[[TransferEnd], None], deadlines: Deadlines) -> None:
        """on_end: a transfer of the core has ended."""
        self.is_limited = True
        # A peer may read as slowly as the rate, which is its own, too.
        self.timeout_s = max(SEND_TIMEOUT_S, 4 * blocks.num_bytes / rate.bytes_per_s if rate.bytes_per_s else 0.0)
        self._blocks = blocks
        self._rate = rate
        self._on_end = on_end
        self._deadlines = deadlines
        self._mutex = threading.Lock()
        self._waiting: dict[bytes, _Waiters] = {}

    def want(self, keys: Sequence[bytes], connection: Connection, ask: Callable[[tuple[bytes, ...]], None]) -> None:
        """Send these chunks to a peer when the core gives them. ask: the core, for those that were not asked for yet."""
        to_ask, too_many = [], []
        since_s = time.monotonic()
        with self._mutex:
            for key in dict.fromkeys(keys):
                waiters = self._waiting.get(key)
                if waiters is not None:
                    waiters.connections.setdefault(connection, since_s)
                elif len(self._waiting) < MAX_KEYS:
                    self._waiting[key] = _Waiters(connection, since_s)
                    to_ask.append(key)
                else:
                    too_many.append(key)
        if too_many:
            connection.put(Message(Kind.GONE, pack_keys(too_many)))
        if not to_ask:
            return
        self._deadlines.call_after(MAX_WAIT_S, lambda: self._expire(to_ask, since_s))
        try:
            ask(tuple(to_ask))
        except Exception as error:  # the engine may be stopping
            logger.warning("chunks for a peer cannot be asked for: %r", error)
            self.decline(to_ask)

    def start(self, transfer: SlowTransfer) -> None:
        """Send a chunk to all that wait for it."""
        with self._mutex:
            waiters = self._waiting.pop(transfer.key, None)
        connections = {} if waiters is None else waiters.connections
        send = _Send(transfer, len(connections), self)
        if not connections:
            self.end(transfer, ok=False)
        now = time.monotonic()
        for connection, since_s in connections.items():
            frame = _Frame(send, connection, now - since_s)
            if not connection.put(frame):
                frame.end(ok=False)

    def decline(self, keys: Iterable[bytes]) -> None:
        """Tell those that wait for these chunks that they are not here."""
        gone: dict[Connection, list[bytes]] = {}
        with self._mutex:
            for key in keys:
                waiters = self._waiting.pop(key, None)
                for connection in () if waiters is None else waiters.connections:
                    gone.setdefault(connection, []).append(key)
        for connection, its_keys in gone.items():
            connection.put(Message(Kind.GONE, pack_keys(its_keys)))

    def _expire(self, keys: Iterable[bytes], since_s: float) -> None:
        with self._mutex:
            late = [key for key in keys if key in self._waiting and self._waiting[key].since_s == since_s]
        self.decline(late)

    # -- for the frames ------------------------------------------------------------------------------------------------

    def frame(self, transfer: SlowTransfer, connection: Connection, waited_s: float) -> list[Buffer]:
        """The frame of a transfer, when the rate allows it; empty if the connection has ended, or the block is damaged.

        waited_s: from when the peer asked until the chunk lay where it is sent from; the peer is told.
        """
        record = transfer.record
        if self.is_limited:
            self._rate.wait(self._blocks.num_bytes, connection.closed)
        if connection.closed.is_set():
            return []
        content = self._blocks.content(transfer.copy.source, record.num_tokens)
        if content is None:
            logger.error("block %d of the CPU tier is damaged; it is not sent", transfer.copy.source)
            connection.put(Message(Kind.GONE, record.key))
            return []
        waited_us = max(0, int(waited_s * 1e6))
        return pack_frame(Kind.BLOCK, content, number=waited_us, key=record.key, num_tokens=record.num_tokens)

    def end(self, transfer: SlowTransfer, *, ok: bool) -> None:
        self._on_end(TransferEnd(transfer.transfer_id, ok, gone=not ok))


class _Waiters:
    def __init__(self, connection: Connection, since_s: float) -> None:
        self.connections = {connection: since_s}  # in the order in which they came, with since when
        self.since_s = since_s


class _Send:
    """A transfer, until all of its frames have ended."""

    def __init__(self, transfer: SlowTransfer, num_frames: int, sends: Sends) -> None:
        self.transfer = transfer
        self.sends = sends
        self._num_left = num_frames
        self._is_sent = False
        self._mutex = threading.Lock()

    def end_frame(self, *, ok: bool) -> None:
        with self._mutex:
            self._num_left -= 1
            self._is_sent |= ok
            is_over = not self._num_left
        if is_over:
            self.sends.end(self.transfer, ok=self._is_sent)


class _Frame:
    """A transfer's frame to one of the peers."""

    def __init__(self, send: _Send, connection: Connection, waited_s: float) -> None:
        self._send = send
        self._connection = connection
        self._waited_s = waited_s

    def buffers(self) -> Sequence[Buffer]:
        return self._send.sends.frame(self._send.transfer, self._connection, self._waited_s)

    def end(self, *, ok: bool) -> None:
        self._send.end_frame(ok=ok)
