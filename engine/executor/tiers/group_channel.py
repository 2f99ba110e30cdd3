"""What rank 0 of a tensor-parallel group and its workers tell each other of slow tiers. No rank decides anything.

    rank 0 -> worker   OpenTier, StartTransfer, CloseTier               of the disk tier, see group_tier
                       ReadBlock, WriteBlock                            of the CPU tier, see group_blocks
    worker -> rank 0   TierOpened, TierRows, TierEnds, TierClosed; BlockRead, BlockWritten

That goes beside the steps and their collectives, on connections of its own (see plan_channel), with one exception: a worker
may still be copying blocks of a step that rank 0 has finished. So whatever concerns blocks waits on each worker for the last
step that rank 0 had finished when it asked.
"""

from __future__ import annotations

import logging
import pickle
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from engine.config import EngineConfig
from engine.core.plan import SlowTransfer, TransferEnd
from engine.executor.peers.blocks import LocalBlocks
from engine.executor.plan_channel import hang_up
from engine.executor.tiers.disk_tier import CLOSE_TIMEOUT_S, DiskTier, wants_disk_tier

logger = logging.getLogger(__name__)


def wants_tier_channel(config: EngineConfig) -> bool:
    """Whether the ranks of a group may have something to tell each other here."""
    return wants_disk_tier(config) or config.may_hand_over


@dataclass(frozen=True, slots=True)
class OpenTier:
    """Take a folder and tell what is there. number: of rank 0's folder; a worker takes the same one if it is free."""

    number: int


@dataclass(frozen=True, slots=True)
class StartTransfer:
    """Begin a transfer of this rank's part, when the step `after_step` is finished on this rank."""

    after_step: int
    transfer: SlowTransfer


@dataclass(frozen=True, slots=True)
class CloseTier:
    """Close the files; no transfer follows."""


@dataclass(frozen=True, slots=True)
class ReadBlock:
    """Tell this rank's part of a block of the CPU tier; after a step, as above. number: of the request for it."""

    after_step: int
    number: int
    block: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class WriteBlock:
    """Write this rank's part of a block of the CPU tier; after a step, as above."""

    after_step: int
    number: int
    block: int
    content: bytes


@dataclass(frozen=True, slots=True)
class TierOpened:
    """read_s, problem, folder: as a DiskTier has them."""

    read_s: float | None
    problem: str | None
    folder: str | None


@dataclass(frozen=True, slots=True)
class TierRows:
    """The names of the chunks of which an earlier process left a part in these blocks; None = nothing that can be used."""

    keys: dict[int, bytes | None]


@dataclass(frozen=True, slots=True)
class TierEnds:
    """Transfers have ended on this rank. problem: as of now."""

    ends: tuple[TransferEnd, ...]
    problem: str | None


@dataclass(frozen=True, slots=True)
class TierClosed:
    """The files of this rank are closed."""


@dataclass(frozen=True, slots=True)
class BlockRead:
    """content: None = it is damaged."""

    number: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class BlockWritten:
    number: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The worker says nothing any more."""


class TierChannel:
    """Rank 0's side. ranks: of the workers."""

    def __init__(self, connections: Mapping[int, Connection[Any, Any]], last_step: Callable[[], int]) -> None:
        """Start to send and to listen.

        connections: to the workers, by rank; the owner ends them.
        last_step: the last step that rank 0 has finished.
        """
        self.last_step = last_step
        self.ranks = tuple(connections)
        self._connections = dict(connections)
        self._mutex = threading.Lock()  # of the next two
        self._listeners: list[Callable[[int, Any], None]] = []
        self._gone: list[int] = []
        # A worker that is stopped does not read; that is no reason for the engine's thread to wait.
        self._outbox: queue.SimpleQueue[tuple[int | None, Any] | None] = queue.SimpleQueue()
        for name, work in (("tier-listener", self._listen), ("tier-sender", self._send_all)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def add_listener(self, listener: Callable[[int, Any], None]) -> None:
        """It gets (rank, message) of all that comes from now on, in a thread; and is told who is gone already."""
        with self._mutex:
            self._listeners.append(listener)
            for rank in self._gone:
                listener(rank, Gone())

    def send(self, message: Any, rank: int | None = None) -> None:
        """To one worker, or to all of them; returns at once. Messages to one worker keep their order."""
        self._outbox.put((rank, message))

    def close(self) -> None:
        """Send nothing more."""
        self._outbox.put(None)

    def _send_all(self) -> None:
        while (item := self._outbox.get()) is not None:
            rank, message = item
            content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
            for connection in self._connections.values() if rank is None else (self._connections[rank],):
                with suppress(OSError):  # it is gone, which the listener finds, too
                    connection.send_bytes(content)

    def _listen(self) -> None:
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    message = Gone()
                    del ranks[connection]
                with self._mutex:
                    if isinstance(message, Gone):
                        self._gone.append(rank)
                    for listener in self._listeners:
                        listener(rank, message)


class TierFollower:
    """A worker's side: carries out its part of what rank 0 asks for, beside the steps."""

    def __init__(
        self,
        connection: Connection[Any, Any],
        make_tier: Callable[[int], DiskTier | None],
        make_blocks: Callable[[], LocalBlocks],
    ) -> None:
        """Start to listen.

        connection: to rank 0; closed by `close`.
        make_tier: this rank's part of the disk tier, given the number of its folder.
        make_blocks: this rank's part of the CPU tier.
        """
        self._connection = connection
        self._make_tier = make_tier
        self._make_blocks = make_blocks
        self._tier: DiskTier | None = None
        self._sending = threading.Lock()
        self._holding = threading.Lock()
        self._held: deque[StartTransfer | ReadBlock | WriteBlock] = deque()
        self._last_step = -1
        self._copies: queue.SimpleQueue[ReadBlock | WriteBlock | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name="tier-follower", daemon=True)
        self._copying = threading.Thread(target=self._copy_blocks, name="tier-blocks", daemon=True)
        self._thread.start()
        self._copying.start()

    def finish_step(self, step_id: int) -> None:
        """This rank has finished a step, with all of its copies."""
        with self._holding:
            self._last_step = step_id
            while self._held and self._held[0].after_step <= step_id:
                self._begin(self._held.popleft())

    def close(self) -> None:
        """End what runs, before the blocks are freed."""
        hang_up(self._connection)
        self._copies.put(None)
        self._copying.join()
        self._thread.join(2 * CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the disk tier does not end; it is left behind")
        else:
            self._connection.close()

    def _follow(self) -> None:
        try:
            while (message := self._receive()) is not None:
                match message:
                    case OpenTier(number):  # in a thread, because a disk may hang
                        threading.Thread(target=self._open, args=(number,), name="tier-open", daemon=True).start()
                    case CloseTier():
                        self._close_tier()
                        self._send(TierClosed())
                    case _:
                        self._begin_in_order(message)
        finally:
            self._close_tier()
            hang_up(self._connection)

    def _receive(self) -> Any:
        """None = rank 0 is gone, or it is over."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return None

    def _begin_in_order(self, message: StartTransfer | ReadBlock | WriteBlock) -> None:
        with self._holding:
            if self._held or message.after_step > self._last_step:
                self._held.append(message)
            else:
                self._begin(message)

    def _begin(self, message: StartTransfer | ReadBlock | WriteBlock) -> None:
        """Returns at once: the thread of the steps may have called."""
        if not isinstance(message, StartTransfer):
            self._copies.put(message)
        elif self._tier is not None:
            self._tier.start(message.transfer)

    def _send(self, message: Any) -> None:
        with self._sending:
            self._send_locked(message)

    def _send_locked(self, message: Any) -> None:
        with suppress(OSError):  # rank 0 is gone; reading tells that, too
            self._connection.send(message)

    # -- the disk ------------------------------------------------------------------------------------------------------

    def _open(self, number: int) -> None:
        self._tier = tier = self._make_tier(number)
        assert tier is not None, "rank 0 has one, by the same options"
        folder = tier.folder()
        self._send(TierOpened(tier.read_s, tier.problem, None if folder is None else str(folder)))
        tier.run(
            lambda records: self._send(
                TierRows({block: None if record is None else record.key for block, record in records.items()})
            ),
            wake=self._tell_ends,
        )

    def _tell_ends(self) -> None:
        assert self._tier is not None
        with self._sending:
            ends = tuple(self._tier.poll())
            if ends:
                self._send_locked(TierEnds(ends, self._tier.problem))

    def _close_tier(self) -> None:
        if self._tier is not None:
            self._tier.close()

    # -- blocks of the CPU tier ----------------------------------------------------------------------------------------

    def _copy_blocks(self) -> None:
        blocks: LocalBlocks | None = None
        while (message := self._copies.get()) is not None:
            blocks = blocks or self._make_blocks()
            match message:
                case ReadBlock(_, number, block, num_tokens):
                    content = blocks.content(block, num_tokens)
                    self._send(BlockRead(number, None if content is None else bytes(content)))
                case WriteBlock(_, number, block, content):
                    blocks.write(block, memoryview(content))
                    self._send(BlockWritten(number))
