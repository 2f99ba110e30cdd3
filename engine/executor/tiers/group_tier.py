"""The disk tier of a tensor-parallel group: each rank keeps its part of every chunk, in files and threads of its own.

The core plans for all ranks at once, so a chunk has the same slot on each of them. Rank 0 passes every transfer on (see
group_channel), and a transfer has ended when all ranks have said so: well, if all say that. So a chunk is there if every rank
has its part. There is no collective.

A rank that is slow or hangs is a tier that hangs: the core leaves it alone, and no block is given away before the last rank
has told the end. A rank that is lost ends the group, as at any other time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.plan import SlowTransfer, TransferEnd
from engine.executor.tiers.disk_tier import CLOSE_TIMEOUT_S, MAX_SCAN_WAIT_S, DiskTier, Records
from engine.executor.tiers.group_channel import (
    CloseTier,
    Gone,
    OpenTier,
    StartTransfer,
    TierChannel,
    TierClosed,
    TierEnds,
    TierOpened,
    TierRows,
)

logger = logging.getLogger(__name__)

# How long rank 0 waits at the start until the workers have measured their disks, in seconds. One that takes longer opens its
# part meanwhile, and the tier is used from then on.
OPEN_TIMEOUT_S = 30.0


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

    def __init__(self, local: DiskTier, channel: TierChannel) -> None:
        """Have the workers open their parts. local: rank 0's part."""
        self.spec = local.spec
        self.read_s = local.read_s
        self._local = local
        self._channel = channel
        self._ranks = (0, *channel.ranks)
        self._on_records: Callable[[Records], None] = lambda _: None
        self._wake: Callable[[], None] = lambda: None
        self._changed = threading.Condition()  # and the lock of what follows
        self._pending: dict[int, _Pending] = {}
        self._ended: deque[TransferEnd] = deque()
        self._opened: dict[int, TierOpened] = {}
        self._problems: dict[int, str | None] = {}
        self._rows: dict[int, _Rows] = {}
        self._num_unread = self.spec.num_blocks
        self._closed: set[int] = set()
        channel.add_listener(self._note)
        channel.send(OpenTier(local.number))
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
            self._changed.wait_for(lambda: not self._num_unread or bool(self._closed), deadline - time.monotonic())

    def start(self, transfer: SlowTransfer) -> None:
        """Begin a transfer on all ranks; returns at once."""
        with self._changed:
            is_possible = not self._silent_ranks() and not self._closed
            if is_possible:
                self._pending[transfer.transfer_id] = _Pending(set(self._ranks), time.monotonic())
            else:
                self._ended.append(TransferEnd(transfer.transfer_id, ok=False))
        if not is_possible:
            self._wake()
            return
        self._channel.send(StartTransfer(self._channel.last_step(), transfer))
        self._local.start(transfer)

    def poll(self) -> list[TransferEnd]:
        """The transfers that have ended on all ranks since the last call."""
        with self._changed:
            ended = list(self._ended)
            self._ended.clear()
        return ended

    def close(self) -> None:
        """Close the files of all ranks, as DiskTier does. May be called again."""
        self._channel.send(CloseTier())
        self._local.close()
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._closed) == len(self._channel.ranks), 2 * CLOSE_TIMEOUT_S):
                late = sorted(set(self._channel.ranks) - self._closed)
                logger.error("ranks %s do not close their part of the disk tier", late)

    def _silent_ranks(self) -> list[int]:
        return [rank for rank in self._channel.ranks if rank not in self._opened and rank not in self._closed]

    # -- the channel's thread ------------------------------------------------------------------------------------------

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
                case TierClosed() | Gone():
                    self._closed.add(rank)
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
        if rows.own is None or len(rows.others) < len(self._channel.ranks):
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
