"""The CPU tier of a tensor-parallel group as its peers see it: the parts of all ranks, one behind the other.

So a group is one peer, and talks to groups of the same size. Rank 0 has the connections to peers; a chunk that leaves is
gathered there, and one that arrives is told to each rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from engine.executor.peers.blocks import LocalBlocks
from engine.executor.tiers.group_channel import BlockRead, BlockWritten, Gone, ReadBlock, TierChannel, WriteBlock


class GroupBlocks:
    """See Blocks. Calls wait for all ranks. A block is not there if a rank cannot give its part, or is lost."""

    def __init__(self, own: LocalBlocks, channel: TierChannel) -> None:
        """own: of rank 0; all parts have the same size."""
        self._own = own
        self._channel = channel
        self.num_blocks, self.chunk_size = own.num_blocks, own.chunk_size
        self.num_bytes = own.num_bytes * (1 + len(channel.ranks))
        self._numbers = count()
        self._changed = threading.Condition()  # and the lock of what follows
        self._answers: dict[int, dict[int, bytes | None]] = {}  # by number of the request, by rank
        self._gone: set[int] = set()
        channel.add_listener(self._note)

    def buffer(self, block: int) -> memoryview:
        """Where the content of a block is to be received."""
        return memoryview(bytearray(self.num_bytes))

    def content(self, block: int, num_tokens: int) -> memoryview | None:
        """What may leave the process. None if a part is damaged."""
        own = self._own.content(block, num_tokens)
        after_step = self._channel.last_step()
        answers = self._ask(lambda number, _: ReadBlock(after_step, number, block, num_tokens))
        parts = [own, *(answers.get(rank) for rank in self._channel.ranks)]
        if any(part is None for part in parts):
            return None
        return memoryview(b"".join(part for part in parts if part is not None))

    def take(self, block: int, content: memoryview) -> bool:
        """A chunk was received to a buffer. Returns whether all ranks have their part."""
        size = self._own.num_bytes
        self._own.write(block, content[:size])
        after_step = self._channel.last_step()
        answers = self._ask(
            lambda number, place: WriteBlock(
                after_step, number, block, bytes(content[place * size : (place + 1) * size])
            )
        )
        return len(answers) == len(self._channel.ranks)

    def _ask(self, message: Callable[[int, int], Any]) -> Mapping[int, bytes | None]:
        """The answers by rank; without those of ranks that are gone. There is no other way out: a block may be written late.

        message: given the number of the request, and the rank.
        """
        number = next(self._numbers)
        with self._changed:
            self._answers[number] = {}
        for rank in self._channel.ranks:
            self._channel.send(message(number, rank), rank)
        with self._changed:
            self._changed.wait_for(lambda: self._gone or len(self._answers[number]) == len(self._channel.ranks))
            return self._answers.pop(number)

    def _note(self, rank: int, message: Any) -> None:
        with self._changed:
            match message:
                case BlockRead(number, content) if number in self._answers:
                    self._answers[number][rank] = content
                case BlockWritten(number) if number in self._answers:
                    self._answers[number][rank] = b""
                case Gone():
                    self._gone.add(rank)
            self._changed.notify_all()
