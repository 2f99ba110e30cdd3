"""A tensor-parallel group as a peer: a chunk that leaves is gathered of all ranks, and one that comes goes to all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe

import pytest
import torch

from engine.attention.protocol import LayerShape
from engine.core.plan import TransferEnd
from engine.executor.peers.blocks import LocalBlocks
from engine.executor.tiers.group_blocks import GroupBlocks
from engine.executor.tiers.group_channel import OpenTier, TierChannel, TierFollower
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import Checksums
from tests.engine.executor.peers.peer_engine import CHUNK_SIZE, PeerEngine, record_of, wait_until
from tests.engine.executor.tiers.test_group_tier import Part

LAYERS = (LayerShape(2, 4, 4), LayerShape(1, 6, 2))
NUM_BLOCKS = 6
PATIENCE_S = 30.0


class Rank:
    """Its part of the CPU tier: each value says which rank, block and place it is."""

    def __init__(self, rank: int) -> None:
        self.cpu = KVStore(
            LAYERS, num_blocks=NUM_BLOCKS, chunk_size=CHUNK_SIZE, dtype=torch.float32, device=torch.device("cpu")
        )
        shape = self.cpu.storage.shape
        self.cpu.storage.copy_(1 + torch.arange(shape.numel()).view(shape) + 10000.0 * rank)
        self.checksums = Checksums(self.cpu)
        for block in range(NUM_BLOCKS):
            self.checksums.note_block(block)
        self.blocks = LocalBlocks(self.cpu, self.checksums)


class Group:
    """Ranks of this process. last_step: of rank 0. Their disks hang."""

    def __init__(self, size: int) -> None:
        self.ranks = [Rank(rank) for rank in range(size)]
        self.last_step = -1
        self.has_disk = threading.Event()
        self.is_opening = threading.Event()
        pipes = [Pipe() for _ in range(1, size)]
        self.followers = [
            TierFollower(theirs, self.open_disk, lambda rank=rank: rank.blocks)
            for (_, theirs), rank in zip(pipes, self.ranks[1:], strict=True)
        ]
        self.connections = {rank: ours for rank, (ours, _) in enumerate(pipes, 1)}
        self.channel = TierChannel(self.connections, lambda: self.last_step)
        self.blocks = GroupBlocks(self.ranks[0].blocks, self.channel)

    def open_disk(self, _: int) -> Part:
        self.is_opening.set()
        self.has_disk.wait()
        return Part()

    def rows(self, block: int) -> list[list[float]]:
        return [rank.cpu.storage[block].tolist() for rank in self.ranks]

    def are_intact(self, block: int) -> list[bool]:
        return [rank.checksums.is_intact(block) for rank in self.ranks]


@pytest.fixture
def make_group() -> Iterator[Callable[[int], Group]]:
    made: list[Group] = []

    def make(size: int) -> Group:
        made.append(Group(size))
        return made[-1]

    yield make
    for group in made:
        group.has_disk.set()
        for follower in group.followers:
            follower.close()
        group.channel.close()


def test_a_disk_that_hangs_keeps_no_block(make_group):
    group = make_group(2)
    group.channel.send(OpenTier(0))
    assert group.is_opening.wait(PATIENCE_S)
    assert group.blocks.content(0, CHUNK_SIZE) is not None


@pytest.mark.parametrize("size", [2, 3])
def test_a_block_goes_from_all_ranks_to_all_ranks(make_group, size):
    source, target = make_group(size), make_group(size)
    content = source.blocks.content(2, CHUNK_SIZE)
    assert len(content) == source.blocks.num_bytes == size * source.ranks[0].blocks.num_bytes
    buffer = target.blocks.buffer(4)
    buffer[:] = content
    assert target.blocks.take(4, buffer)
    assert target.rows(4) == source.rows(2)
    assert target.are_intact(4) == [True] * size


def test_what_follows_a_tail_leaves_no_rank(make_group):
    group = make_group(2)
    content = group.blocks.content(1, 3)
    parts = [content[: len(content) // 2], content[len(content) // 2 :]]
    assert parts == [rank.blocks.content(1, 3) for rank in group.ranks]
    assert all(0.0 in part.cast("f") for part in parts)


def test_a_block_that_is_damaged_on_one_rank_is_not_there(make_group):
    group = make_group(3)
    group.ranks[2].cpu.storage[1, 5] = -1.0
    assert group.blocks.content(1, CHUNK_SIZE) is None
    assert group.blocks.content(0, CHUNK_SIZE) is not None


def test_a_block_waits_for_the_copies_of_the_step_that_filled_it(make_group):
    group = make_group(2)
    group.last_step = 5
    told: list[memoryview | None] = []
    asking = threading.Thread(target=lambda: told.append(group.blocks.content(3, CHUNK_SIZE)))
    asking.start()
    (follower,) = group.followers
    wait_until(lambda: len(follower._held) == 1)
    group.ranks[1].cpu.storage[3] = 7.0  # as the worker's swap-out does, after that of rank 0
    group.ranks[1].checksums.note_block(3)
    assert not told
    follower.finish_step(5)
    asking.join(PATIENCE_S)
    (content,) = told
    assert set(content[len(content) // 2 :].cast("f")) == {7.0}


def test_with_a_rank_that_is_lost_nothing_leaves_and_nothing_comes(make_group):
    group = make_group(3)
    content = group.blocks.content(0, CHUNK_SIZE)
    group.followers.pop().close()
    assert group.blocks.content(0, CHUNK_SIZE) is None
    assert not group.blocks.take(1, content)


def test_groups_of_one_size_are_peers(make_group):
    """Over loopback, by the peers' own transport."""
    source, target = make_group(2), make_group(2)
    engines = [PeerEngine(name, blocks=group.blocks).run() for name, group in (("a", source), ("b", target))]
    other = PeerEngine("c", blocks=make_group(3).blocks).run()
    try:
        addresses = {engine.name: engine.tier.address for engine in (*engines, other)}
        for engine in (*engines, other):
            engine.tier.set_peers(addresses)
        for block in range(3):
            engines[0].chunks[record_of(block).key] = (block, CHUNK_SIZE)
        loads = [engines[1].load(block, 5 - block, "a") for block in range(3)]
        assert [engines[1].end_of(load).ok for load in loads] == [True] * 3
        for block in range(3):
            assert target.rows(5 - block) == source.rows(block)
            assert target.are_intact(5 - block) == [True] * 2
        assert other.end_of(other.load(0, 0, "a")) == TransferEnd(1, ok=False, gone=True)
    finally:
        for engine in (*engines, other):
            engine.tier.close()
