"""What a block holds, for those that carry blocks out of the process: the disk tier, and the tier of peers.

Touches memory as bytes, never as tensors.
"""

from __future__ import annotations

import hashlib
import mmap
import sys

import numpy as np
import torch

from engine.config import EngineConfig
from engine.executor.local import LocalExecutor
from engine.executor.tiers.cold_format import COLD_VERSION
from engine.executor.tiers.disk_format import IDENTITY_BYTES
from engine.executor.tiers.kv_store import BlockStore


def kv_identity(config: EngineConfig, local: LocalExecutor, version: int) -> bytes:
    """A digest of all that a block's content depends on, beside its chunk's name and the rank of a group.

    version: of the format in which blocks are kept or sent.
    """
    shapes = [(layer.num_kv_heads, layer.k_dim, layer.v_dim) for layer in local.loaded.layers]
    parts = (
        version,
        local.loaded.facts.fingerprint,
        local.loaded.facts.dtype,
        config.chunk_size,
        shapes,
        sys.byteorder,
        *(() if config.kv_cold_dtype == "same" else (config.kv_cold_dtype, COLD_VERSION)),
    )
    return hashlib.sha256(repr(parts).encode()).digest()[:IDENTITY_BYTES]


class TailView:
    """Copies of partial chunks without what the rest of their blocks happens to hold, which may be another tenant's."""

    def __init__(self, cpu: BlockStore) -> None:
        self.chunk_size = cpu.chunk_size
        self._rows = cpu.storage.view(torch.uint8).numpy()
        self._spans = cpu.token_spans

    def copy(self, block: int, num_tokens: int) -> memoryview:
        """A block with zeros behind its first tokens, in pages of its own."""
        pages = memoryview(mmap.mmap(-1, self._rows.shape[1]))
        content = np.frombuffer(pages, np.uint8)
        content[:] = self._rows[block]
        for offset, num_heads, token_bytes in self._spans:
            part = content[offset : offset + num_heads * self.chunk_size * token_bytes]
            part.reshape(num_heads, self.chunk_size, token_bytes)[:, num_tokens:] = 0
        return pages
