"""The blocks of the CPU tier as what leaves the process, and what comes into it: bytes."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.executor.local import LocalExecutor
from engine.executor.tiers.kv_content import TailView
from engine.executor.tiers.kv_store import BlockStore
from engine.executor.tiers.swapper import Checksums


class Blocks(Protocol):
    """The content of the CPU tier's blocks, as bytes.

    num_bytes: of one block.
    """

    num_blocks: int
    num_bytes: int
    chunk_size: int

    def buffer(self, block: int) -> memoryview:
        """Where the content of a block is to be received."""
        ...

    def content(self, block: int, num_tokens: int) -> memoryview | None:
        """What may leave the process: without what follows the chunk's tokens. None if the block is damaged."""
        ...

    def take(self, block: int, content: memoryview) -> bool:
        """A chunk was received to what `buffer` gave. Returns whether the block holds it now."""
        ...


class LocalBlocks:
    """Those of this process; a chunk is received in place."""

    def __init__(self, cpu: BlockStore, checksums: Checksums | None) -> None:
        """checksums: of the blocks, if they are verified."""
        self._rows = cpu.storage.view(torch.uint8).numpy()  # the same memory: numpy knows no bfloat16
        self._tails = TailView(cpu)
        self._checksums = checksums
        self.num_blocks, self.num_bytes = (int(length) for length in self._rows.shape)
        self.chunk_size = cpu.chunk_size

    def buffer(self, block: int) -> memoryview:
        """The block itself."""
        return memoryview(self._rows[block])

    def content(self, block: int, num_tokens: int) -> memoryview | None:
        """See Blocks."""
        if self._checksums is not None and not self._checksums.is_intact(block):
            return None
        return self.buffer(block) if num_tokens == self.chunk_size else self._tails.copy(block, num_tokens)

    def take(self, block: int, content: memoryview) -> bool:
        """See Blocks."""
        if self._checksums is not None:
            self._checksums.note_block(block)
        return True

    def write(self, block: int, content: memoryview) -> None:
        """Copy a chunk there that was received elsewhere."""
        self.buffer(block)[:] = content
        self.take(block, content)


def make_rank_blocks(local: LocalExecutor) -> LocalBlocks:
    """Those of one rank."""
    return LocalBlocks(local.cpu_store, local.runner.swapper.checksums)
