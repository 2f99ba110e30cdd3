"""Chunks, and the index that finds them by content.

A chunk's key is a chained hash of all tokens up to its end, so equal prefixes of one tenant are the same chunk, and what
comes before a chunk need not be resident to recognise it. Knows nothing of blocks' contents, of eviction or of requests.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from engine.core.reuse import NO_REUSE, Reuse

KEY_BYTES = 32
# Keys of dropped chunks that are remembered, for the statistics: twice as many as there are blocks, within these bounds. Of
# 165 bytes each, that is 2.7 to 22 MB, and half a million to four million tokens in chunks of 32.
MIN_DROPPED_KEYS, MAX_DROPPED_KEYS = 1 << 14, 1 << 17


class Chunk:
    """`chunk_size` consecutive tokens of a context (fewer in a tail), at chunk number `position`.

    Identity, not value: only the cache manager's classes change one.

    blocks: its block in each tier, the fastest tier first; None if it has none there, or not yet.
    key: its name in the index; None while one request is still writing it, or if an equal chunk has the name.
    num_tokens: leading tokens whose KV is valid.
    pins: requests and step transfers that use it.
    last_active: latest use by any conversation that contains it, in seconds.
    owner_id: the conversation that left it as its tail (tails only).
    is_to_store: it is worth a place in a slow tier, as far as is known. Changes only while the chunk is pinned or unfiled.
    reuse: what is known of its next use; times are on the engine's clock. Does not change while a policy holds the chunk.
    num_uses: turns that have used it, the one included that made it.
    last_user_id: the conversation that used it last. num_users: conversations that used it; one that comes back after
        another counts again.
    tenant: whose it is, if hints are taken. Does not change while a policy holds the chunk.
    """

    __slots__ = (
        "blocks",
        "is_to_store",
        "key",
        "last_active",
        "last_user_id",
        "num_tokens",
        "num_users",
        "num_uses",
        "owner_id",
        "parent_key",
        "pins",
        "position",
        "reuse",
        "tenant",
    )

    def __init__(self, position: int, blocks: list[int | None]) -> None:
        self.position = position
        self.blocks = blocks
        self.key: bytes | None = None
        self.parent_key = b""
        self.num_tokens = 0
        self.pins = 0
        self.last_active = 0.0
        self.owner_id: str | None = None
        self.is_to_store = False
        self.reuse: Reuse = NO_REUSE
        self.num_uses = 0
        self.last_user_id: str | None = None
        self.num_users = 0
        self.tenant = ""

    def note_use(self, conversation_id: str, reuse: Reuse, now: float) -> None:
        """A turn of that conversation has used it, and says this of its next use."""
        self.num_uses += 1
        if conversation_id != self.last_user_id:
            self.last_user_id = conversation_id
            self.num_users += 1
        self.reuse = reuse if self.num_users == 1 else self.reuse.merged(reuse, now)

    def __repr__(self) -> str:
        return (
            f"Chunk(position={self.position}, tokens={self.num_tokens}, blocks={self.blocks}, pins={self.pins}, "
            f"last_active={self.last_active})"
        )


class Drop(NamedTuple):
    """The end of a chunk's KV.

    reason: that of the eviction, see tier_table.eviction_reasons; "released", if it was said before that it may go; "failed",
        if what should have brought or kept it did; "peer_gone", if another engine had it; "stateless", if nothing is kept.
    time_s: on the engine's clock; of what another engine had, its last use.
    """

    reason: str
    time_s: float


def root_key(model: str, adapter: str, tenant: str) -> bytes:
    """The parent of every first chunk. Two tenants, models or adapters never share a key."""
    parts = (part.encode() for part in (model, adapter, tenant))
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hashlib.blake2b(framed, digest_size=KEY_BYTES).digest()


def chunk_key(parent_key: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the chunk that holds `token_ids` after the context that `parent_key` names."""
    return hashlib.blake2b(parent_key + array("I", token_ids).tobytes(), digest_size=KEY_BYTES).digest()


def full_chunk_keys(parent_key: bytes, token_ids: Sequence[int], chunk_size: int) -> list[bytes]:
    """Keys of the chunks that `token_ids` fill, one after the other, after the context that `parent_key` names.

    As chunk_key for each, but the tokens are packed once.
    """
    packed = array("I", token_ids)
    data, num_bytes = packed.tobytes(), packed.itemsize * chunk_size
    keys = []
    for start in range(0, len(data) - num_bytes + 1, num_bytes):
        parent_key = hashlib.blake2b(parent_key + data[start : start + num_bytes], digest_size=KEY_BYTES).digest()
        keys.append(parent_key)
    return keys


class ChunkIndex:
    """Key -> chunk, for every chunk whose KV is resident somewhere; and the keys of those that were, and are gone.

    A tail (a chunk with fewer than `chunk_size` tokens) has a key like any other; to find the longest tail that a context
    continues, the lengths of the tails under each parent are counted, at most `chunk_size - 1` of them.

    The latest `max_dropped` full chunks that were dropped are remembered: exact as long as no more are.
    """

    def __init__(self, chunk_size: int, num_blocks: int = 0) -> None:
        """num_blocks: of all tiers. on_drop: told each chunk whose KV is gone, while it still has its name."""
        self.chunk_size = chunk_size
        self.max_dropped = max(MIN_DROPPED_KEYS, min(2 * num_blocks, MAX_DROPPED_KEYS))
        self.on_drop: list[Callable[[Chunk], object]] = []
        self._chunks: dict[bytes, Chunk] = {}
        self._tail_lengths: dict[bytes, dict[int, int]] = {}
        self._dropped: dict[bytes, Drop] = {}
        self._last_drop = Drop("", 0.0)

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks.values())

    def match(self, key: bytes) -> Chunk | None:
        """The chunk of that name; None if there is none."""
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

    def tail_lengths(self, parent_key: bytes) -> list[int]:
        """How many tokens the tails under `parent_key` have, the longest first."""
        return sorted(self._tail_lengths.get(parent_key, ()), reverse=True)

    def insert(self, chunk: Chunk, key: bytes, parent_key: bytes) -> bool:
        """Name `chunk`; False, and the chunk unchanged, if an equal one already has that name."""
        self._dropped.pop(key, None)
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

    def drop(self, chunk: Chunk, reason: str, now: float) -> None:
        """Take the name away, if there is one, because the KV is gone; remember the key of a full chunk.

        reason: why, see Drop.
        """
        if chunk.key is None:
            return
        for told in self.on_drop:
            told(chunk)
        if chunk.reuse.expected_use_s == math.inf:
            reason = "released"
        if chunk.num_tokens == self.chunk_size:
            self.remember_dropped(chunk.key, reason, now)
        self.remove(chunk)

    def remember_dropped(self, key: bytes, reason: str, now: float) -> None:
        """The KV of a full chunk with that key was here, and is gone."""
        last = self._last_drop
        if last.time_s != now or last.reason != reason:  # most go together: one value for all of them
            self._last_drop = last = Drop(reason, now)
        self._dropped.pop(key, None)
        self._dropped[key] = last
        if len(self._dropped) > self.max_dropped:
            del self._dropped[next(iter(self._dropped))]

    def was_dropped(self, key: bytes) -> bool:
        """Whether the KV of that full chunk was here and is gone, as far as is remembered."""
        return key in self._dropped

    def why_dropped(self, key: bytes) -> Drop | None:
        """When and why the KV of that full chunk went, as far as is remembered."""
        return self._dropped.get(key)

    def check_integrity(self) -> None:
        """Raises AssertionError if a chunk is known by a wrong key, or both resident and gone."""
        assert self._dropped.keys().isdisjoint(self._chunks)
        assert all(chunk.key == key for key, chunk in self._chunks.items())
