"""Owns every chunk: finds what a context already has, gives blocks to what it lacks, and evicts. Decides where KV lies;
the executor moves it. Knows no scheduler and no clock.

What happens to the blocks of a context, by token range, when a request arrives with 9 tokens (chunk_size 4):

    cached chunk 0 | dropped chunk 1 | tail of 1 token + ...
    [0 1 2 3]        [4 5 6 7]         [8]
     pinned           new block         the tail's block, taken over (same conversation) or copied (another one)

The request's row holds all three, pinned. Full chunks are named in the index when they are computed; the last, partial one
when the request ends. An unnamed chunk at the end of its request is nobody's: its block is freed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.core.block_pool import BlockPool
from engine.core.chunk_index import Chunk, ChunkIndex, Tier, chunk_key, root_key
from engine.core.eviction import EvictionPolicy
from engine.core.plan import BlockCopy
from engine.core.request import Request
from engine.core.stats import EngineStats


@dataclass(slots=True)
class ContextMatch:
    """What the cache holds of a context; valid until the cache manager is next changed.

    full: position -> chunk to share as it is. tails: position -> (chunk, number of its leading tokens that are valid for
    the context, at least 1). num_cached_tokens: sum over both.
    """

    full: dict[int, Chunk] = field(default_factory=dict)
    tails: dict[int, tuple[Chunk, int]] = field(default_factory=dict)
    num_cached_tokens: int = 0


class CacheManager:
    """The chunks of all conversations in the GPU tier (and, from the two-tier cache on, the CPU tier).

    keep: False is the stateless mode, where nothing outlives its request and nothing is shared.
    """

    def __init__(
        self,
        *,
        chunk_size: int,
        num_gpu_blocks: int,
        policy: EvictionPolicy,
        stats: EngineStats,
        model: str = "",
        keep: bool = True,
    ) -> None:
        self.chunk_size = chunk_size
        self.gpu_pool = BlockPool(Tier.GPU, num_gpu_blocks)
        self.index = ChunkIndex(chunk_size)
        self.keep = keep
        self._policy = policy
        self._stats = stats
        self._model = model

    @property
    def num_available_blocks(self) -> int:
        """Blocks that a request could get: free ones and those of chunks that nobody pins."""
        return self.gpu_pool.num_free + len(self._policy)

    def num_chunks(self, num_tokens: int) -> int:
        """Chunks (= blocks) that a context of `num_tokens` takes."""
        return -(-num_tokens // self.chunk_size)

    # -- looking up ----------------------------------------------------------------------------------------------------

    def match_context(self, request: Request) -> ContextMatch:
        """What is cached of the request's context, anywhere in it. Leaves the last token out, whatever is cached: its
        logits are wanted, so it has to be computed."""
        match = ContextMatch()
        if not self.keep:
            return match
        size, token_ids = self.chunk_size, request.token_ids
        self._extend_keys(request)
        last_full = (len(token_ids) - 1) // size  # chunks before this one lie wholly before the last token
        for position in range(self.num_chunks(len(token_ids))):
            start = position * size
            chunk = None
            if position < len(request.chunk_keys):
                chunk = self.index.match(request.chunk_keys[position])
            if chunk is None:
                chunk = self.index.match_tail(self._parent_key(request, position), token_ids[start : start + size])
            if chunk is None:
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

    # -- a request's row of chunks -------------------------------------------------------------------------------------

    def try_admit(self, request: Request, reserve_blocks: int, now: float) -> tuple[BlockCopy, ...] | None:
        """Pin what is cached of the request's context and give a block to every other chunk of it; sets its `chunks` and
        `pending`. Returns the copies that the step must make first. None, and nothing changed, where fewer than
        `reserve_blocks` would stay available."""
        match = self.match_context(request)
        taken_over = {
            position: tail
            for position, tail in match.tails.items()
            if tail[0].num_tokens < self.chunk_size and not tail[0].pins and tail[0].owner_id == request.conversation_id
        }
        # Noted before anything is allocated, which may evict a source. Its copy is still right then, because a step makes
        # its copies before anything writes to a block.
        source_blocks = {position: chunk.gpu_block for position, (chunk, _) in match.tails.items()}
        num_row = self.num_chunks(request.num_tokens)
        num_new = num_row - len(match.full) - len(taken_over)
        kept = [*match.full.values(), *(chunk for chunk, _ in taken_over.values())]
        num_available = self.num_available_blocks - sum(chunk.pins == 0 for chunk in kept)
        if num_available - num_new < reserve_blocks:
            return None

        for chunk in kept:
            self._pin(chunk)
        copies: list[BlockCopy] = []
        row: list[Chunk] = []
        pending: list[tuple[int, int]] = []
        size, num_tokens = self.chunk_size, request.num_tokens
        for position in range(num_row):
            end = min((position + 1) * size, num_tokens)
            if position in match.full:
                row.append(match.full[position])
                continue
            if position in taken_over:
                chunk = taken_over[position][0]
                self.index.remove(chunk)
            else:
                chunk = self._new_chunk(position, now)
                source_block = source_blocks.get(position)
                if source_block is not None:
                    assert chunk.gpu_block is not None
                    copies.append(BlockCopy(source_block, chunk.gpu_block))
            num_valid = match.tails[position][1] if position in match.tails else 0
            chunk.num_tokens = num_valid
            row.append(chunk)
            start = position * size + num_valid
            if pending and pending[-1][1] == start:
                pending[-1] = (pending[-1][0], end)
            else:
                pending.append((start, end))
        request.chunks, request.pending = row, pending
        self._stats.num_gpu_copies += len(copies)
        return tuple(copies)

    def try_append_block(self, request: Request, now: float) -> int | None:
        """One more block at the end of a running request's row, by eviction where none is free. None, and nothing
        changed, where every block is pinned."""
        if not self.num_available_blocks:
            return None
        chunk = self._new_chunk(len(request.chunks), now)
        request.chunks.append(chunk)
        return chunk.gpu_block

    def commit(self, request: Request, start: int, end: int) -> None:
        """The KV of positions [start, end) is written. Names the chunks that this completes, so that others find them."""
        size = self.chunk_size
        for position in range(start // size, self.num_chunks(end)):
            chunk = request.chunks[position]
            chunk.num_tokens = min(end - position * size, size)
            if self.keep and chunk.num_tokens == size:
                self._extend_keys(request)
                self.index.insert(chunk, request.chunk_keys[position], self._parent_key(request, position))

    def release(self, request: Request, now: float, *, step_failed: bool = False) -> None:
        """Unpin the row of a request that ends or is suspended. What it computed stays, as long as there is room.

        step_failed: nobody knows what the last step wrote or copied, so what has no name yet is not kept."""
        for chunk in request.chunks:
            chunk.pins -= 1
            if chunk.key is None and self.keep and not step_failed:
                self._try_name(request, chunk)
            if chunk.pins:
                continue
            if chunk.key is None:
                self._free_block(chunk)
            else:
                chunk.last_active = now
                self._policy.insert(chunk)
        request.chunks, request.pending = [], []

    # -- inside --------------------------------------------------------------------------------------------------------

    def _extend_keys(self, request: Request) -> None:
        keys, size = request.chunk_keys, self.chunk_size
        for position in range(len(keys), request.num_tokens // size):
            tokens = request.token_ids[position * size : (position + 1) * size]
            keys.append(chunk_key(self._parent_key(request, position), tokens))

    def _parent_key(self, request: Request, position: int) -> bytes:
        return request.chunk_keys[position - 1] if position else root_key(self._model, "", request.tenant)

    def _try_name(self, request: Request, chunk: Chunk) -> None:
        """Name a chunk that is not named at the end of its request: the tail, as far as the context goes, or a full chunk
        that had a twin. Leaves it alone where nothing of it is valid or the twin is still there."""
        start = chunk.position * self.chunk_size
        chunk.num_tokens = min(chunk.num_tokens, request.num_tokens - start)
        if chunk.num_tokens > 0:
            parent = self._parent_key(request, chunk.position)
            key = chunk_key(parent, request.token_ids[start : start + chunk.num_tokens])
            chunk.owner_id = request.conversation_id
            self.index.insert(chunk, key, parent)

    def _pin(self, chunk: Chunk) -> None:
        if not chunk.pins:
            self._policy.remove(chunk)
        chunk.pins += 1

    def _new_chunk(self, position: int, now: float) -> Chunk:
        """A pinned, unnamed chunk with a block; the caller has made sure that one is available."""
        block_id = self.gpu_pool.try_allocate()
        if block_id is None:
            self._evict(now)
            block_id = self.gpu_pool.try_allocate()
        assert block_id is not None
        chunk = Chunk(position, block_id)
        chunk.pins = 1
        return chunk

    def _evict(self, now: float) -> None:
        victim = self._policy.choose_victim(now)
        assert victim is not None
        self._policy.remove(victim)
        self.index.remove(victim)
        self._free_block(victim)
        self._stats.evictions[Tier.GPU.value] += 1

    def _free_block(self, chunk: Chunk) -> None:
        assert chunk.gpu_block is not None
        self.gpu_pool.free(chunk.gpu_block)
        chunk.gpu_block = None

    # -- proof ---------------------------------------------------------------------------------------------------------

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless every block is exactly one of free or owned by one chunk, pins count the rows
        that hold a chunk, and the policy holds exactly the named chunks that nobody pins. `requests`: all that hold a
        row. O(everything)."""
        pins: dict[Chunk, int] = {}
        for request in requests:
            for position, chunk in enumerate(request.chunks):
                assert chunk.position == position, f"{request} holds {chunk} at {position}"
                pins[chunk] = pins.get(chunk, 0) + 1
        named = set(self.index)
        for chunk in named | pins.keys():
            assert chunk.pins == pins.get(chunk, 0), f"{chunk} is pinned by {pins.get(chunk, 0)} rows"
            assert chunk.gpu_block is not None, f"{chunk} has no block"
            assert 0 <= chunk.num_tokens <= self.chunk_size
            assert (chunk.key is not None) == (chunk in named)
        evictable = set(self._policy)
        assert len(evictable) == len(self._policy)
        assert evictable == {chunk for chunk in named if not chunk.pins}, "evictable != named and unpinned"
        self.gpu_pool.check_integrity([chunk.gpu_block for chunk in named | pins.keys() if chunk.gpu_block is not None])
