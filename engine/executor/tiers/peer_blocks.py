"""The blocks of the CPU tier as what leaves the process, and what comes into it: bytes."""

from __future__ import annotations

import torch

from engine.executor.tiers.kv_content import TailView
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import Checksums


class Blocks:
    """The content of the CPU tier's blocks, as bytes."""

    def __init__(self, cpu: KVStore, checksums: Checksums | None) -> None:
        """checksums: of the blocks, if they are verified."""
        self._rows = cpu.storage.view(torch.uint8).numpy()  # the same memory: numpy knows no bfloat16
        self._tails = TailView(cpu)
        self._checksums = checksums
        self.num_bytes = int(self._rows.shape[1])
        self.chunk_size = cpu.chunk_size

    def view(self, block: int) -> memoryview:
        """The block itself."""
        return memoryview(self._rows[block])

    def content(self, block: int, num_tokens: int) -> memoryview | None:
        """What may leave the process: without what follows the chunk's tokens. None if the block is damaged."""
        if self._checksums is not None and not self._checksums.is_intact(block):
            return None
        return self.view(block) if num_tokens == self.chunk_size else self._tails.copy(block, num_tokens)

    def note(self, block: int) -> None:
        """A chunk was written there."""
        if self._checksums is not None:
            self._checksums.note_block(block)
