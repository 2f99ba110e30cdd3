"""What the cache holds of a request's context, found chunk by chunk by content.

Changes nothing but the request's own row of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.core.cache.index import Chunk, ChunkIndex, full_chunk_keys, root_key
from engine.core.request import Request


@dataclass(slots=True)
class ContextMatch:
    """What the cache holds of a context; valid until the cache manager is next changed.

    full: position -> chunk to share as it is.
    tails: position -> (chunk, number of its leading tokens that are valid for the context, at least 1).
    num_cached_tokens: sum over both.
    dropped: position -> number of tokens, of the full chunks that were cached once and are gone.
    """

    full: dict[int, Chunk] = field(default_factory=dict)
    tails: dict[int, tuple[Chunk, int]] = field(default_factory=dict)
    num_cached_tokens: int = 0
    dropped: dict[int, int] = field(default_factory=dict)

    def outside_primary_tier(self) -> Iterator[tuple[int, Chunk, int]]:
        """(position, chunk, number of valid tokens) of those that have no block in the primary tier, front first."""
        chunks = [(position, chunk, chunk.num_tokens) for position, chunk in self.full.items()]
        chunks += [(position, chunk, num_valid) for position, (chunk, num_valid) in self.tails.items()]
        return iter(sorted((row for row in chunks if row[1].blocks[0] is None), key=lambda row: row[0]))

    def leave_out(self, position: int) -> None:
        """Compute that chunk, whatever is cached of it."""
        chunk = self.full.pop(position, None)
        self.num_cached_tokens -= self.tails.pop(position)[1] if chunk is None else chunk.num_tokens


class ContextMatcher:
    """Finds contexts in the index, by the keys of their chunks."""

    def __init__(self, index: ChunkIndex, model: str) -> None:
        """model: fingerprint of the model, part of each key."""
        self._index = index
        self._model = model
        self._chunk_size = index.chunk_size

    def match(self, request: Request) -> ContextMatch:
        """What is cached of the request's context, in whichever tier.

        Leaves the last token out, whatever is cached: its logits are wanted, so it has to be computed. So do the chunks
        of `request.unscored`.
        """
        match = ContextMatch()
        index, size, token_ids = self._index, self._chunk_size, request.token_ids
        self.extend_keys(request)
        unscored = request.unscored
        last_full = (len(token_ids) - 1) // size  # chunks before this one lie wholly before the last token
        for position in range(-(-len(token_ids) // size)):
            start = position * size
            if unscored and start < unscored.stop and start + size > unscored.start:
                continue
            chunk = key = None
            if position < len(request.chunk_keys):
                key = request.chunk_keys[position]
                chunk = index.match(key)
            if chunk is None:
                chunk = index.match_tail(self.parent_key(request, position), token_ids[start : start + size])
            if chunk is None:
                if key is not None and index.was_dropped(key):
                    match.dropped[position] = min(size, len(token_ids) - 1 - start)
                continue
            num_valid = min(chunk.num_tokens, len(token_ids) - 1 - start)
            if chunk.num_tokens == size and position < last_full:
                match.full[position] = chunk
            elif num_valid > 0:
                match.tails[position] = (chunk, num_valid)
            else:
                continue
            match.num_cached_tokens += num_valid
        return match

    def extend_keys(self, request: Request) -> None:
        """Make the keys of all full chunks of the context."""
        keys, size = request.chunk_keys, self._chunk_size
        if len(keys) < request.num_tokens // size:
            parent = self.parent_key(request, len(keys))
            keys += full_chunk_keys(parent, request.token_ids[len(keys) * size :], size)

    def parent_key(self, request: Request, position: int) -> bytes:
        """The key of the chunk before that position; that one has to be full."""
        if position:
            return request.chunk_keys[position - 1]
        return root_key(self._model, request.adapter, request.tenant)
