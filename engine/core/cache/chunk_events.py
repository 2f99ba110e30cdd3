"""Which full chunks came to be cached, and which are gone, for an index elsewhere. Noted from the first question on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from engine.core.cache.index import Chunk

# As many are noted between two takes; of more, all are lost together, so that a listener knows that it has to start anew.
MAX_EVENTS = 1 << 16


class ChunkStored(NamedTuple):
    """A full chunk can be found from now on, in whatever tier.

    parent_key: of the chunk before it; None = it is the first one of its context.
    """

    key: bytes
    parent_key: bytes | None
    token_ids: tuple[int, ...]
    position: int


class ChunkRemoved(NamedTuple):
    """No tier has the chunk any more."""

    key: bytes


class ChunkEvents:
    """The events since the last `take`, the oldest first.

    What an earlier process or another engine has left is not told: nothing here knows its tokens.
    """

    def __init__(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size
        self._events: deque[ChunkStored | ChunkRemoved] = deque()
        self._has_overflowed = False

    def note_stored(self, key: bytes, parent_key: bytes, token_ids: Sequence[int], position: int) -> None:
        self._note(ChunkStored(key, parent_key if position else None, tuple(token_ids), position))

    def note_removed(self, chunk: Chunk) -> None:
        if chunk.key is not None and chunk.num_tokens == self._chunk_size:
            self._note(ChunkRemoved(chunk.key))

    def take(self) -> list[ChunkStored | ChunkRemoved] | None:
        """Each event once; None if there were more than are noted: then nothing that was told before holds."""
        events, has_overflowed = list(self._events), self._has_overflowed
        self._events.clear()
        self._has_overflowed = False
        return None if has_overflowed else events

    def _note(self, event: ChunkStored | ChunkRemoved) -> None:
        if len(self._events) >= MAX_EVENTS:
            self._events.clear()
            self._has_overflowed = True
        if not self._has_overflowed:
            self._events.append(event)
