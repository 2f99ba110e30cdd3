"""The disk tier of a tensor-parallel group: each rank keeps its part of every chunk, in files and threads of its own.

The core plans for all ranks at once, so a chunk has the same slot on each of them. Rank 0 passes every transfer on, and a
transfer has ended when all ranks have said so: well, if all say that. So a chunk is there if every rank has its part. No rank
decides anything, and none takes part in a collective for it.

    rank 0 -> worker   OpenTier once; StartTransfer; STOP
    worker -> rank 0   TierOpened once; TierRows of what an earlier process left; TierEnds; TierClosed, its last word

Transfers go beside the steps, on connections of their own (see plan_channel), with one exception: a worker may still be
copying blocks of a step that rank 0 has finished. A transfer that was planned with the result of that step waits for it.

A rank that is slow or hangs is a tier that hangs: the core leaves it alone, and no block is given away before the last rank
has told the end. A rank that is lost ends the group, as at any other time.
"""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from engine.core.plan import SlowTransfer, TransferEnd
from engine.executor.plan_channel import hang_up
from engine.executor.tiers.disk_tier import CLOSE_TIMEOUT_S, MAX_SCAN_WAIT_S, DiskTier, Records

logger = logging.getLogger(__name__)

# How long rank 0 waits at the start until the workers have measured their disks, in seconds. One that takes longer opens its
# part meanwhile, and the tier is used from then on.
OPEN_TIMEOUT_S = 30.0
STOP = pickle.dumps(None)


@dataclass(frozen=True, slots=True)
class OpenTier:
    """Take a folder and tell what is there. number: of rank 0's folder; a worker takes the same one if it is free."""

    number: int


@dataclass(frozen=True, slots=True)
class StartTransfer:
    """Begin a transfer of this rank's part, when the step `after_step` is finished on this rank."""

    transfer: SlowTransfer
    after_step: int


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


@dataclass(slots=True)
class _Pending:
    """A transfer that some ranks have not ended. ok, seconds: of those that have; the slowest counts, 0 = not measured."""

    waiting: set[int]
    began_s: float
    ok: bool = True
    seconds: float = 0.0


@dataclass(slots=True)
class _Rows:
    """What the ranks have told of one segment."""

    own: Records | None = None
    others: list[Mapping[int, bytes | None]] = field(default_factory=list)


class GroupTier:
    """Rank 0's side; to the core's driver it is what a DiskTier is.

    spec, folder: of rank 0's part, as all parts have the same size.
    read_s: seconds until the slowest rank has read its part of a block; None if one could not measure it.
    """

    def __init__(
        self,
        local: DiskTier,
        connections: Mapping[int, Connection[Any, Any]],
        last_step: Callable[[], int],
    ) -> None:
        """Have the workers open their parts.

        local: rank 0's part. connections: to the workers, by rank; the owner closes them after `close`.
        last_step: the last step that rank 0 has finished.
        """
        self.spec = local.spec
        self.read_s = local.read_s
        self._local = local
        self._connections = dict(connections)
        self._last_step = last_step
        self._ranks = (0, *self._connections)
        self._on_records: Callable[[Records], None] = lambda _: None
        self._wake: Callable[[], None] = lambda: None
        self._changed = threading.Condition()  # and the lock of what follows
        self._pending: dict[int, _Pending] = {}
        self._ended: deque[TransferEnd] = deque()
        self._opened: dict[int, TierOpened] = {}
        self._problems: dict[int, str | None] = {}
        self._rows: dict[int, _Rows] = {}
        self._num_unread = self.spec.num_blocks
        self._gone: set[int] = set()
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="tier-listener", daemon=True).start()
        # A worker that is stopped does not read; that is no reason for the engine's thread to wait.
        threading.Thread(target=self._send_all, name="tier-sender", daemon=True).start()
        self._outbox.put(pickle.dumps(OpenTier(local.number)))
        with self._changed:
            self._changed.wait_for(lambda: not self._silent_ranks(), OPEN_TIMEOUT_S)
            for rank in self._silent_ranks():
                self._problems[rank] = "its disk has not answered yet"
            read_s = [self.read_s, *(self._opened[rank].read_s for rank in self._opened)]
        measured = [seconds for seconds in read_s if seconds is not None]
        self.read_s = max(measured) if len(measured) == len(self._ranks) else None

    @property
    def number(self) -> int:
        """Of rank 0's folder."""
        return self._local.number

    @property
    def num_written_bytes(self) -> int:
        """To the files of all ranks, each of which has written as much as rank 0."""
        return self._local.num_written_bytes * len(self._ranks)

    @property
    def problem(self) -> str | None:
        """Why chunks are not written at present, or not read, and on which rank; None = all is well. For people."""
        now = time.monotonic()
        with self._changed:
            problems = {**self._problems, 0: self._local.problem}
            for transfer in self._pending.values():
                if now - transfer.began_s > self.spec.max_wait_s:
                    problems |= dict.fromkeys(transfer.waiting, "a transfer does not end")
        told = [f"rank {rank}: {problem}" for rank, problem in sorted(problems.items()) if problem is not None]
        return "; ".join(told) or None

    def folder(self) -> Path | None:
        """Where rank 0's files are; None as long as its disk cannot be used."""
        return self._local.folder()

    def run(self, on_records: Callable[[Records], None], wake: Callable[[], None] = lambda: None) -> None:
        """Start the transfers; called once. Returns when all records were told, or after MAX_SCAN_WAIT_S.

        on_records: called in a thread with what lies in the blocks, some at a time, each block once.
        wake: called in a thread when a transfer has ended.
        """
        deadline = time.monotonic() + MAX_SCAN_WAIT_S
        with self._changed:
            self._on_records, self._wake = on_records, wake
        self._local.run(self._note_own_rows, self._note_own_ends)
        with self._changed:
            self._changed.wait_for(lambda: not self._num_unread or bool(self._gone), deadline - time.monotonic())

    def start(self, transfer: SlowTransfer) -> None:
        """Begin a transfer on all ranks; returns at once."""
        with self._changed:
            is_possible = not self._silent_ranks() and not self._gone
            if is_possible:
                self._pending[transfer.transfer_id] = _Pending(set(self._ranks), time.monotonic())
            else:
                self._ended.append(TransferEnd(transfer.transfer_id, ok=False))
        if not is_possible:
            self._wake()
            return
        self._outbox.put(pickle.dumps(StartTransfer(transfer, self._last_step()), pickle.HIGHEST_PROTOCOL))
        self._local.start(transfer)

    def poll(self) -> list[TransferEnd]:
        """The transfers that have ended on all ranks since the last call."""
        with self._changed:
            ended = list(self._ended)
            self._ended.clear()
        return ended

    def close(self) -> None:
        """Close the files of all ranks, as DiskTier does. May be called again."""
        self._outbox.put(STOP)
        self._local.close()
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._gone) == len(self._connections), 2 * CLOSE_TIMEOUT_S):
                logger.error(
                    "ranks %s do not close their part of the disk tier", sorted(set(self._ranks[1:]) - self._gone)
                )

    def _silent_ranks(self) -> list[int]:
        return [rank for rank in self._connections if rank not in self._opened and rank not in self._gone]

    # -- the sender's thread -------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        message = b""
        while message != STOP:
            message = self._outbox.get()
            for connection in self._connections.values():
                with suppress(OSError):  # it is gone, which the listener finds, too
                    connection.send_bytes(message)

    # -- the listener's thread -----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    message = TierClosed()
                if isinstance(message, TierClosed):
                    del ranks[connection]
                self._note(rank, message)

    def _note(self, rank: int, message: Any) -> None:
        has_ended = False
        with self._changed:
            match message:
                case TierOpened():
                    self._opened[rank] = message
                    self._problems[rank] = message.problem
                    logger.info("disk tier of rank %d: %s", rank, message.folder or f"no folder, {message.problem}")
                case TierRows(keys):
                    self._rows.setdefault(min(keys), _Rows()).others.append(keys)
                    self._tell_rows(min(keys))
                case TierEnds(ends, problem):
                    self._problems[rank] = problem
                    has_ended = self._note_ends(rank, ends)
                case TierClosed():
                    self._gone.add(rank)
                    self._problems[rank] = "its part is closed"
            self._changed.notify_all()
        if has_ended:
            self._wake()

    # -- both, and the threads of rank 0's part ------------------------------------------------------------------------

    def _note_own_rows(self, records: Records) -> None:
        with self._changed:
            self._rows.setdefault(min(records), _Rows()).own = records
            self._tell_rows(min(records))
            self._changed.notify_all()

    def _tell_rows(self, first_block: int) -> None:
        """Tell what all ranks have in a segment, when the last one has told what it has.

        A name says all that a block holds, so parts that have the same name belong together, whenever they were written.
        """
        rows = self._rows[first_block]
        if rows.own is None or len(rows.others) < len(self._connections):
            return
        del self._rows[first_block]
        self._num_unread -= len(rows.own)
        self._on_records(
            {
                block: record if record is not None and all(keys[block] == record.key for keys in rows.others) else None
                for block, record in rows.own.items()
            }
        )

    def _note_own_ends(self) -> None:
        with self._changed:
            has_ended = self._note_ends(0, tuple(self._local.poll()))
        if has_ended:
            self._wake()

    def _note_ends(self, rank: int, ends: tuple[TransferEnd, ...]) -> bool:
        """Whether a transfer has ended on all ranks."""
        num_before = len(self._ended)
        for end in ends:
            transfer = self._pending[end.transfer_id]
            transfer.waiting.remove(rank)
            transfer.ok = transfer.ok and end.ok
            transfer.seconds = max(transfer.seconds, end.seconds or 0.0)
            if not transfer.waiting:
                del self._pending[end.transfer_id]
                seconds = transfer.seconds or None
                self._ended.append(TransferEnd(end.transfer_id, transfer.ok, seconds if transfer.ok else None))
        return len(self._ended) > num_before


class TierFollower:
    """A worker's side: carries out its part of what rank 0 sends, beside the steps."""

    def __init__(self, connection: Connection[Any, Any], make_tier: Callable[[int], DiskTier | None]) -> None:
        """Start a thread that opens this rank's part when rank 0 says so.

        connection: to rank 0; closed by `close`.
        make_tier: this rank's part, given the number of its folder.
        """
        self._connection = connection
        self._make_tier = make_tier
        self._tier: DiskTier | None = None
        self._sending = threading.Lock()
        self._holding = threading.Lock()
        self._held: deque[StartTransfer] = deque()
        self._last_step = -1
        self._thread = threading.Thread(target=self._follow, name="tier-follower", daemon=True)
        self._thread.start()

    def finish_step(self, step_id: int) -> None:
        """This rank has finished a step, with all of its copies."""
        with self._holding:
            self._last_step = step_id
            while self._held and self._held[0].after_step <= step_id:
                self._start(self._held.popleft())

    def close(self) -> None:
        """End what runs, before the blocks are freed."""
        hang_up(self._connection)
        self._thread.join(2 * CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the disk tier does not end; it is left behind")
        else:
            self._connection.close()

    def _follow(self) -> None:
        try:
            while (message := self._receive()) is not None:
                match message:
                    case OpenTier(number):
                        self._open(number)
                    case StartTransfer():
                        self._start_in_order(message)
        finally:
            if self._tier is not None:
                self._tier.close()
            self._send(TierClosed())

    def _receive(self) -> Any:
        """None = stop, or rank 0 is gone."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return None

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

    def _start_in_order(self, message: StartTransfer) -> None:
        with self._holding:
            if self._held or message.after_step > self._last_step:
                self._held.append(message)
            else:
                self._start(message)

    def _start(self, message: StartTransfer) -> None:
        assert self._tier is not None, "rank 0 has it opened first"
        self._tier.start(message.transfer)

    def _tell_ends(self) -> None:
        assert self._tier is not None
        with self._sending:
            ends = tuple(self._tier.poll())
            if ends:
                self._send_locked(TierEnds(ends, self._tier.problem))

    def _send(self, message: Any) -> None:
        with self._sending:
            self._send_locked(message)

    def _send_locked(self, message: Any) -> None:
        with suppress(OSError):  # rank 0 is gone; reading tells that, too
            self._connection.send(message)
