"""Chunks, and the index that finds them by content. A chunk's key is a chained hash of all tokens up to its end, so
equal prefixes of one tenant are the same chunk, and what comes before a chunk need not be resident to recognise it.
Knows nothing of blocks' contents, of eviction or of requests.
"""

from __future__ import annotations

import enum
import hashlib
from array import array
from collections.abc import Iterator, Sequence

KEY_BYTES = 32


class Tier(enum.Enum):
    """Where KV is kept. On a machine without a GPU the GPU tier is a pool in host memory."""

    GPU = "gpu"
    CPU = "cpu"


class Residency(enum.Enum):
    """Derived from a chunk's blocks. BOTH: swapped out ahead of time, its GPU block can be reclaimed at no cost."""

    GPU = "gpu"
    BOTH = "both"
    CPU = "cpu"
    DROPPED = "dropped"


class Chunk:
    """`chunk_size` consecutive tokens of a context (fewer in a tail), at chunk number `position`. Identity, not value:
    only the cache manager changes one.

    key: its name in the index; None while one request is still writing it, or where an equal chunk has the name.
    num_tokens: leading tokens whose KV is valid. pins: requests that use it. last_active: latest use, in seconds, by any
    conversation that contains it. owner_id: the conversation that left it as its tail (tails only).
    """

    __slots__ = (
        "cpu_block",
        "gpu_block",
        "key",
        "last_active",
        "num_tokens",
        "owner_id",
        "parent_key",
        "pins",
        "position",
    )

    def __init__(self, position: int, gpu_block: int | None) -> None:
        self.position = position
        self.gpu_block = gpu_block
        self.cpu_block: int | None = None
        self.key: bytes | None = None
        self.parent_key = b""
        self.num_tokens = 0
        self.pins = 0
        self.last_active = 0.0
        self.owner_id: str | None = None

    @property
    def residency(self) -> Residency:
        if self.gpu_block is not None:
            return Residency.GPU if self.cpu_block is None else Residency.BOTH
        return Residency.DROPPED if self.cpu_block is None else Residency.CPU

    def __repr__(self) -> str:
        return (
            f"Chunk(position={self.position}, tokens={self.num_tokens}, gpu={self.gpu_block}, "
            f"cpu={self.cpu_block}, pins={self.pins}, last_active={self.last_active})"
        )


def root_key(model: str, adapter: str, tenant: str) -> bytes:
    """The parent of every first chunk. Two tenants, models or adapters never share a key."""
    parts = (part.encode() for part in (model, adapter, tenant))
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.blake2b(framed, digest_size=KEY_BYTES).digest()


def chunk_key(parent_key: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the chunk that holds `token_ids` after the context that `parent_key` names."""
    return hashlib.blake2b(parent_key + array("I", token_ids).tobytes(), digest_size=KEY_BYTES).digest()


class ChunkIndex:
    """Key -> chunk, for every chunk whose KV is resident somewhere.

    A tail (a chunk with fewer than `chunk_size` tokens) has a key like any other; to find the longest tail that a context
    continues, the lengths of the tails under each parent are counted, at most `chunk_size - 1` of them.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self._chunks: dict[bytes, Chunk] = {}
        self._tail_lengths: dict[bytes, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks.values())

    def match(self, key: bytes) -> Chunk | None:
        return self._chunks.get(key)

    def match_tail(self, parent_key: bytes, token_ids: Sequence[int]) -> Chunk | None:
        """The longest tail under `parent_key` whose tokens all begin `token_ids`; None if there is none."""
        lengths = self._tail_lengths.get(parent_key)
        if lengths is None:
            return None
        for length in sorted(lengths, reverse=True):
            if length <= len(token_ids):
                chunk = self._chunks.get(chunk_key(parent_key, token_ids[:length]))
                if chunk is not None:
                    return chunk
        return None

    def insert(self, chunk: Chunk, key: bytes, parent_key: bytes) -> bool:
        """Name `chunk`; False, and nothing changed, where an equal chunk already has that name."""
        if key in self._chunks:
            return False
        chunk.key, chunk.parent_key = key, parent_key
        self._chunks[key] = chunk
        if chunk.num_tokens < self.chunk_size:
            lengths = self._tail_lengths.setdefault(parent_key, {})
            lengths[chunk.num_tokens] = lengths.get(chunk.num_tokens, 0) + 1
        return True

    def remove(self, chunk: Chunk) -> None:
        """Take the name away; the chunk keeps its blocks."""
        assert chunk.key is not None
        del self._chunks[chunk.key]
        if chunk.num_tokens < self.chunk_size:
            lengths = self._tail_lengths[chunk.parent_key]
            lengths[chunk.num_tokens] -= 1
            if not lengths[chunk.num_tokens]:
                del lengths[chunk.num_tokens]
            if not lengths:
                del self._tail_lengths[chunk.parent_key]
        chunk.key = None
