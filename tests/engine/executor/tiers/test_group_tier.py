"""A disk tier of several ranks: when a transfer ends, what is restored, and what becomes of a rank that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe

import pytest

from engine.core.plan import BlockCopy, ChunkRecord, SlowTransfer, TransferEnd
from engine.core.tier_table import CPU, TierSpec
from engine.executor.peers.blocks import LocalBlocks
from engine.executor.tiers import group_tier
from engine.executor.tiers.disk_tier import DISK
from engine.executor.tiers.group_channel import OpenTier, TierChannel, TierFollower, TierOpened
from engine.executor.tiers.group_tier import GroupTier

# Only a defect waits for it.
PATIENCE_S = 30.0
NUM_BLOCKS = 4


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def record(name: str) -> ChunkRecord:
    return ChunkRecord(
        key=name.encode().ljust(32), parent_key=bytes(32), position=0, num_tokens=4, owner_id=None, idle_s=1.0
    )


def load(transfer_id: int) -> SlowTransfer:
    return SlowTransfer(transfer_id=transfer_id, record=record("a"), copy=BlockCopy(DISK, 0, CPU, transfer_id))


class Part:
    """A rank's part, whose transfers end when the test says so. Has the interface of a DiskTier."""

    def __init__(self, rows: str = "    ", read_s: float | None = 0.1, max_wait_s: float = 10.0) -> None:
        """rows: the name of the chunk in each block; a space = none."""
        self.spec = TierSpec(name=DISK, num_blocks=NUM_BLOCKS, is_fast=False, max_wait_s=max_wait_s)
        self.problem: str | None = None
        self.read_s = read_s
        self.number = 3
        self.started: list[int] = []
        self.is_closed = False
        self._rows = rows
        self._ended: list[TransferEnd] = []
        self._wake: Callable[[], None] = lambda: None

    def folder(self) -> None:
        return None

    def run(self, on_records, wake=lambda: None) -> None:
        self._wake = wake
        records = [None if name == " " else record(name) for name in self._rows]
        for first in (2, 0):  # two segments
            on_records({block: records[block] for block in (first + 1, first)})

    def start(self, transfer: SlowTransfer) -> None:
        self.started.append(transfer.transfer_id)

    def end(self, *ends: TransferEnd) -> None:
        self._ended += ends
        self._wake()

    def poll(self) -> list[TransferEnd]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        self.is_closed = True


def no_blocks() -> LocalBlocks:
    raise AssertionError("nothing is copied here")


class Ranks:
    """A group of threads of this process.

    last_step: of rank 0. numbers: of the folders that the workers were told.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts
        self.last_step = -1
        self.numbers: list[int] = []
        pipes = [Pipe() for _ in parts[1:]]
        self.followers = [
            TierFollower(connection, lambda number, part=part: self.numbers.append(number) or part, no_blocks)
            for (_, connection), part in zip(pipes, parts[1:], strict=True)
        ]
        connections = {rank: connection for rank, (connection, _) in enumerate(pipes, 1)}
        self.channel = TierChannel(connections, lambda: self.last_step)
        self.tier = GroupTier(parts[0], self.channel)
        self.records: dict[int, ChunkRecord | None] = {}
        self.num_wakes = 0
        self.tier.run(self._note_records, self._wake)

    def _note_records(self, records) -> None:
        assert not records.keys() & self.records.keys()
        self.records.update(records)

    def _wake(self) -> None:
        self.num_wakes += 1


@pytest.fixture
def make_ranks() -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(*parts: Part) -> Ranks:
        made.append(Ranks(*parts))
        return made[-1]

    yield make
    for ranks in made:
        ranks.tier.close()
        for follower in ranks.followers:
            follower.close()


def test_a_chunk_is_restored_if_all_ranks_have_it_in_the_same_block(make_ranks):
    ranks = make_ranks(Part("abcd"), Part("ab d"), Part("aXcd"))
    wait_until(lambda: len(ranks.records) == NUM_BLOCKS)
    assert ranks.records == {0: record("a"), 1: None, 2: None, 3: record("d")}
    assert ranks.numbers == [3, 3]


def test_a_transfer_ends_with_the_last_rank(make_ranks):
    ranks = make_ranks(*(parts := (Part(), Part(), Part())))
    for transfer_id in (1, 2):
        ranks.tier.start(load(transfer_id))
    wait_until(lambda: all(part.started == [1, 2] for part in parts))
    parts[1].end(TransferEnd(2, ok=True, seconds=0.2), TransferEnd(1, ok=False))
    parts[0].end(TransferEnd(1, ok=True, seconds=0.5), TransferEnd(2, ok=True, seconds=0.1))
    assert ranks.tier.poll() == []
    parts[2].end(TransferEnd(1, ok=True, seconds=0.1))
    wait_until(lambda: ranks.num_wakes == 1)
    assert ranks.tier.poll() == [TransferEnd(1, ok=False)]
    parts[2].end(TransferEnd(2, ok=True, seconds=0.3))
    wait_until(lambda: ranks.num_wakes == 2)
    assert ranks.tier.poll() == [TransferEnd(2, ok=True, seconds=0.3)]
    assert ranks.tier.poll() == []


def test_a_transfer_waits_for_the_step_that_it_was_planned_with(make_ranks):
    """The worker may still copy what rank 0 has copied: the block that is stored, or the one that is loaded over."""
    ranks = make_ranks(*(parts := (Part(), Part())))
    (follower,) = ranks.followers
    ranks.tier.start(load(1))
    wait_until(lambda: parts[1].started == [1])
    ranks.last_step = 7
    ranks.tier.start(load(2))
    ranks.last_step = 8
    ranks.tier.start(load(3))
    assert parts[0].started == [1, 2, 3]
    wait_until(lambda: len(follower._held) == 2)
    follower.finish_step(6)
    assert parts[1].started == [1]
    follower.finish_step(7)
    assert parts[1].started == [1, 2]
    follower.finish_step(8)
    assert parts[1].started == [1, 2, 3]
    ranks.tier.start(load(4))
    wait_until(lambda: parts[1].started == [1, 2, 3, 4])


def test_the_slowest_rank_sets_the_price(make_ranks):
    assert make_ranks(Part(read_s=0.1), Part(read_s=0.3), Part(read_s=0.2)).tier.read_s == 0.3
    assert make_ranks(Part(read_s=0.1), Part(read_s=None)).tier.read_s is None


def test_a_rank_with_a_problem_is_named_until_it_is_well(make_ranks):
    ranks = make_ranks(*(parts := (Part(), Part(), Part())))
    assert ranks.tier.problem is None
    ranks.tier.start(load(1))
    wait_until(lambda: all(part.started == [1] for part in parts))
    parts[0].problem, parts[2].problem = "is read-only", "No space left on device"
    parts[2].end(TransferEnd(1, ok=False))
    wait_until(lambda: ranks.tier.problem == "rank 0: is read-only; rank 2: No space left on device")
    ranks.tier.start(load(2))
    wait_until(lambda: parts[2].started == [1, 2])
    parts[0].problem = parts[2].problem = None
    parts[2].end(TransferEnd(2, ok=True, seconds=0.1))
    wait_until(lambda: ranks.tier.problem is None)


def test_a_rank_that_does_not_read_holds_up_nobody(monkeypatch):
    """More than a socket takes; the engine's thread goes on, and the rank is named."""
    ours, theirs = Pipe()
    threading.Thread(target=lambda: theirs.recv() and theirs.send(TierOpened(0.1, None, None))).start()
    tier = GroupTier(Part(max_wait_s=0.0), TierChannel({1: ours}, lambda: -1))
    monkeypatch.setattr(group_tier, "CLOSE_TIMEOUT_S", 0.01)
    for transfer_id in range(5000):
        tier.start(load(transfer_id))
    assert tier.poll() == []
    assert tier.problem == "rank 0: a transfer does not end; rank 1: a transfer does not end"
    tier.close()
    theirs.close()


def test_without_a_rank_every_transfer_fails_at_once(monkeypatch):
    """One that has not opened its part yet, or has ended: its part is never waited for."""
    monkeypatch.setattr(group_tier, "OPEN_TIMEOUT_S", 0.01)
    monkeypatch.setattr(group_tier, "MAX_SCAN_WAIT_S", 0.01)
    ours, theirs = Pipe()
    tier = GroupTier(part := Part(), TierChannel({1: ours}, lambda: -1))
    assert tier.problem == "rank 1: its disk has not answered yet"
    assert tier.read_s is None
    wakes: list[None] = []
    tier.run(lambda _: None, wake=lambda: wakes.append(None))
    tier.start(load(1))
    assert len(wakes) == 1
    assert tier.poll() == [TransferEnd(1, ok=False)]
    theirs.send(TierOpened(0.1, None, None))
    wait_until(lambda: tier.problem is None)
    tier.start(load(2))
    assert (tier.poll(), part.started) == ([], [2])
    theirs.close()
    wait_until(lambda: tier.problem is not None)
    tier.start(load(3))
    assert tier.poll() == [TransferEnd(3, ok=False)]
    tier.close()
    assert part.is_closed


def test_closing_waits_until_all_ranks_have_closed_their_files(make_ranks):
    ranks = make_ranks(*(parts := (Part(), Part(), Part())))
    ranks.tier.close()
    assert all(part.is_closed for part in parts)
    ranks.tier.close()


def test_a_part_is_closed_when_rank_0_is_gone():
    ours, theirs = Pipe()
    part = Part()
    follower = TierFollower(theirs, lambda _: part, no_blocks)
    ours.send(OpenTier(0))
    assert isinstance(ours.recv(), TierOpened)
    ours.close()
    wait_until(lambda: part.is_closed)
    follower.close()
