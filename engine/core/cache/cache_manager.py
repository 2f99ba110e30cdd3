"""Owns every chunk: finds what a context already has, gives blocks to what it lacks, moves chunks between the tiers and
evicts. Decides where KV lies; the executor moves it. Knows no scheduler and no clock.

What happens to the blocks of a context, by token range, when a request arrives with 17 tokens (chunk_size 4):

    GPU chunk 0 | CPU chunk 1 | dropped chunk 2 | tail of 3 tokens + new prompt, chunks 3 and 4
    [0 1 2 3]     [4 5 6 7]     [8 9 10 11]       [12 13 14 | 15] [16]
     pinned        GPU block,    GPU block,        the tail's block, taken over (same conversation)
                   swapped in    recomputed        or copied (another one); a new block for chunk 4

The request's row holds all five, pinned. Full chunks are named in the index when they are computed; the last, partial one
when the request ends. An unnamed chunk at the end of its request is nobody's: its block is freed.

A transfer is prepared by whatever needs it, told with the next plan, and completed or aborted when that plan's result is
there: the transfers of a step are finished when the step is. Until then it pins its chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from engine.core.cache.block_pool import BlockPool
from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import EvictionPolicy, make_policy
from engine.core.cache.index import Chunk, ChunkIndex, Residency, Tier, chunk_key, root_key
from engine.core.cache_map import Cell, ContextKeys, EvictionLog, retention_value
from engine.core.config import CacheConfig
from engine.core.plan import BlockCopy
from engine.core.request import ContextAccount, Request
from engine.core.stats import EngineStats

# Keys of dropped chunks that are remembered, for the statistics: some 14 MB, four million tokens in chunks of 32.
MAX_DROPPED_KEYS = 1 << 17


@dataclass(slots=True)
class ContextMatch:
    """What the cache holds of a context; valid until the cache manager is next changed.

    full: position -> chunk to share as it is. tails: position -> (chunk, number of its leading tokens that are valid for
    the context, at least 1). num_cached_tokens: sum over both. dropped: position -> number of tokens, of the full chunks
    that were cached once and are gone.
    """

    full: dict[int, Chunk] = field(default_factory=dict)
    tails: dict[int, tuple[Chunk, int]] = field(default_factory=dict)
    num_cached_tokens: int = 0
    dropped: dict[int, int] = field(default_factory=dict)

    def select_in_cpu_tier(self) -> dict[int, int]:
        """Position -> number of valid tokens, of the chunks that have no GPU block; front first."""
        chunks = {position: (chunk, chunk.num_tokens) for position, chunk in self.full.items()} | self.tails
        return {position: num for position, (chunk, num) in sorted(chunks.items()) if chunk.gpu_block is None}

    def leave_out(self, position: int) -> None:
        """Compute that chunk, whatever is cached of it."""
        chunk = self.full.pop(position, None)
        self.num_cached_tokens -= self.tails.pop(position)[1] if chunk is None else chunk.num_tokens


@dataclass(slots=True)
class Transfers:
    """The block copies of one plan; see StepPlan for their order. swap_ins: (chunk that is read, chunk that is written),
    the same one where a shared chunk comes back to the GPU tier."""

    evictions: list[tuple[Chunk, BlockCopy]] = field(default_factory=list)
    gpu_copies: list[BlockCopy] = field(default_factory=list)
    swap_ins: list[tuple[Chunk, Chunk, BlockCopy]] = field(default_factory=list)
    swap_outs: list[tuple[Chunk, BlockCopy]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.evictions or self.gpu_copies or self.swap_ins or self.swap_outs)


class CacheManager:
    """The chunks of all conversations in both tiers.

    Unpinned chunks are filed where they may be taken from: `_gpu_only` and `_both` by what their GPU block costs to take
    (a swap-out or nothing), `_cpu` for all that have a CPU block. keep: False is the stateless mode, where nothing
    outlives its request and nothing is shared.
    """

    def __init__(self, config: CacheConfig, stats: EngineStats) -> None:
        self.config = config
        self.chunk_size = config.chunk_size
        self.gpu_pool = BlockPool(Tier.GPU, config.num_gpu_blocks)
        self.cpu_pool = BlockPool(Tier.CPU, config.num_cpu_blocks if config.keep else 0)
        self.index = ChunkIndex(config.chunk_size)
        self.keep = config.keep
        self._cost_model = config.cost_model or CostModel(chunk_size=config.chunk_size)
        self._gpu_only: EvictionPolicy = make_policy(config.eviction_policy, self._cost_model)
        self._both: EvictionPolicy = make_policy(config.eviction_policy, self._cost_model)
        self._cpu: EvictionPolicy = make_policy(config.eviction_policy, self._cost_model)
        # Pinned chunks whose CPU copy nobody needs as long as they are in use; oldest first.
        self._spare_copies: dict[Chunk, None] = {}
        self._write_through = config.write_through and self.cpu_pool.num_blocks > 0
        self._unwritten: dict[Chunk, None] = {}
        self._planned = Transfers()
        self._in_flight: list[Transfers] = []
        # Whose GPU block, and whose CPU block, a transfer that is planned or in flight writes to.
        self._loading: set[Chunk] = set()
        self._storing: set[Chunk] = set()
        # Full chunks that were cached once and are gone, the latest of them: exact as long as no more are dropped.
        self._dropped: dict[bytes, None] = {}
        # Blocks that nobody may use, and how many there are to be; see hold_back.
        self._held: dict[Tier, list[int]] = {Tier.GPU: [], Tier.CPU: []}
        self._num_to_hold = {Tier.GPU: 0, Tier.CPU: 0}
        self.eviction_log = EvictionLog(self._cost_model)
        self._stats = stats
        self._model = config.model

    @property
    def num_available_blocks(self) -> int:
        """GPU blocks that a request could get: free ones, those of chunks that nobody pins, and those held back."""
        return self.gpu_pool.num_free + len(self._gpu_only) + len(self._both) + len(self._held[Tier.GPU])

    def num_chunks(self, num_tokens: int) -> int:
        """Chunks (= blocks) that a context of `num_tokens` takes."""
        return -(-num_tokens // self.chunk_size)

    # -- looking up ----------------------------------------------------------------------------------------------------

    def match_context(self, request: Request) -> ContextMatch:
        """What is cached of the request's context, anywhere in it. Leaves the last token out, whatever is cached: its
        logits are wanted, so it has to be computed."""
        match = ContextMatch()
        size, token_ids = self.chunk_size, request.token_ids
        self._extend_keys(request)
        last_full = (len(token_ids) - 1) // size  # chunks before this one lie wholly before the last token
        for position in range(self.num_chunks(len(token_ids))):
            start = position * size
            chunk = key = None
            if position < len(request.chunk_keys):
                key = request.chunk_keys[position]
                chunk = self.index.match(key)
            if chunk is None:
                chunk = self.index.match_tail(self._parent_key(request, position), token_ids[start : start + size])
            if chunk is None:
                if key in self._dropped:
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

    # -- a request's row of chunks -------------------------------------------------------------------------------------

    def try_admit(self, request: Request, reserve_blocks: int, now: float) -> bool:
        """Pin what is cached of the request's context and give a GPU block to every other chunk of it; sets its `chunks`,
        `pending` and `account` and plans the transfers. False, and nothing changed, if fewer than `reserve_blocks` would
        stay available."""
        match = self.match_context(request)
        not_loaded = self._leave_out_expensive_loads(match)
        taken_over = self._select_own_tails(request, match)
        kept = [*match.full.values(), *(match.tails[position][0] for position in taken_over)]
        if self.num_available_blocks - self._count_taken_blocks(request, kept) < reserve_blocks:
            return False

        request.account = ContextAccount(
            num_swapped_in_tokens=self._count_prompt_tokens(request, match.select_in_cpu_tier()),
            num_not_loaded_tokens=self._count_prompt_tokens(request, not_loaded),
            num_dropped_tokens=self._count_prompt_tokens(request, match.dropped),
        )
        # Pins first, then allocations, which evict. A GPU block that is only copied from may be evicted meanwhile: a step
        # makes its copies before anything writes to a block, so the id is enough.
        sources = {position: match.tails[position][0] for position in match.tails.keys() - taken_over}
        source_blocks = {position: self._arrived_gpu_block(chunk) for position, chunk in sources.items()}
        pinned = [*kept, *(chunk for position, chunk in sources.items() if source_blocks[position] is None)]
        for chunk in pinned:
            self._pin(chunk)
        row: list[Chunk] = []
        for position in range(self.num_chunks(request.num_tokens)):
            if position in match.full:
                chunk = match.full[position]
                self._load(chunk, chunk, now)
            elif position in taken_over:
                chunk = match.tails[position][0]
                self._take_over(chunk, now)
            else:
                chunk = self._new_chunk(position, now)
                if position in sources:
                    self._copy(sources[position], source_blocks[position], chunk)
            row.append(chunk)
        for chunk in pinned[len(kept) :]:  # the planned swap-in pins it from here on
            self._unpin(chunk)
        for position, (_, num_valid) in match.tails.items():
            row[position].num_tokens = num_valid
        request.chunks = row
        request.pending = self._missing_ranges(row, match.full.keys(), request.num_tokens)
        return True

    def count_taken_blocks(self, request: Request) -> int:
        """How many of the available GPU blocks `try_admit` would take for the request."""
        match = self.match_context(request)
        self._leave_out_expensive_loads(match)
        own_tails = self._select_own_tails(request, match)
        return self._count_taken_blocks(
            request, [*match.full.values(), *(match.tails[position][0] for position in own_tails)]
        )

    def count_given_blocks(self, requests: Iterable[Request]) -> Iterator[int]:
        """How many GPU blocks become available when the first of `requests` is released, the first two, and so on. At least;
        a transfer in flight may hold more back until it is complete."""
        num_pins: dict[Chunk, int] = {}
        num_blocks = 0
        for request in requests:
            for chunk in request.chunks:
                num_pins[chunk] = num_pins.get(chunk, 0) + 1
                num_blocks += num_pins[chunk] == chunk.pins
            yield num_blocks

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
            if not self.keep or chunk.num_tokens < size:
                continue
            self._extend_keys(request)
            key = request.chunk_keys[position]
            if not self._insert(chunk, key, self._parent_key(request, position)):
                self._merge(request, chunk, key)

    def release(self, request: Request, now: float, *, step_failed: bool = False) -> None:
        """Unpin the row of a request that ends or is suspended. What it computed stays, as long as there is room.

        step_failed: nobody knows what the last step wrote or copied, so what has no name yet is not kept."""
        if not self.keep:
            self._extend_keys(request)
            for chunk, key in zip(request.chunks, request.chunk_keys, strict=False):
                if chunk.num_tokens == self.chunk_size:
                    self._remember_dropped(key)
        for chunk in request.chunks:
            if chunk.key is None and self.keep and not step_failed:
                self._try_name(request, chunk)
            chunk.last_active = now
            self._unpin(chunk)
            if self._write_through and chunk.key is not None and chunk.cpu_block is None:
                self._unwritten[chunk] = None
        request.chunks, request.pending = [], []
        self._hold(now)

    def hold_back(self, num_gpu_blocks: int, num_cpu_blocks: int, now: float) -> None:
        """Make the tiers smaller by so many blocks, for a demonstration: what lies in them is evicted as for a request that
        needs them. Blocks that are pinned are taken when they no longer are; those of the GPU tier are given back to
        a request that finds no other, until it ends. 0 and 0: all blocks are in use again."""
        for tier, pool, num in (
            (Tier.GPU, self.gpu_pool, num_gpu_blocks),
            (Tier.CPU, self.cpu_pool, num_cpu_blocks),
        ):
            self._num_to_hold[tier] = min(num, pool.num_blocks)
            while len(self._held[tier]) > self._num_to_hold[tier]:
                pool.free(self._held[tier].pop())
        self._hold(now)

    def count_held_blocks(self) -> dict[str, int]:
        """Blocks that are held back, by tier."""
        return {tier.value: len(blocks) for tier, blocks in self._held.items()}

    # -- what is where -------------------------------------------------------------------------------------------------

    def map_context(self, keys: ContextKeys, now: float) -> list[Cell]:
        """Where the chunks of a context lie that no request is at. O(chunks), nothing changed."""
        cells = [self._cell(self.index.match(key), self.chunk_size, now) for key in keys.full]
        if keys.tails:
            tail = next((chunk for _, key in keys.tails if (chunk := self.index.match(key)) is not None), None)
            cells.append(self._cell(tail, keys.tails[0][0], now))
        return cells

    def map_row(self, request: Request, max_chunks: int, now: float) -> list[Cell]:
        """Where the chunks of a running request lie, the first `max_chunks` of them."""
        computing: set[int] = set()
        for start, end in request.pending:
            last = min(-(-end // self.chunk_size), max_chunks)
            computing.update(range(start // self.chunk_size, last))
        cells = [
            Cell("computing", chunk.num_tokens)
            if chunk.position in computing and chunk not in self._loading
            else self._cell(chunk, chunk.num_tokens, now)
            for chunk in request.chunks[:max_chunks]
        ]
        # A token that was sampled just now may begin a chunk that gets its block with the next step.
        num_new = min(self.num_chunks(request.num_tokens), max_chunks) - len(cells)
        return cells + [Cell("computing", 0)] * num_new

    def _cell(self, chunk: Chunk | None, num_tokens: int, now: float) -> Cell:
        """num_tokens: of a chunk that is gone."""
        if chunk is None:
            return Cell(Residency.DROPPED.value, num_tokens)
        state = chunk.residency.value
        if chunk in self._loading:
            state = "loading"
        elif chunk in self._storing:
            state = "storing"
        if chunk.pins:
            return Cell(state, chunk.num_tokens)
        idle_s = now - chunk.last_active
        return Cell(state, chunk.num_tokens, idle_s, retention_value(self._cost_model, chunk.position, idle_s))

    # -- transfers -----------------------------------------------------------------------------------------------------

    @property
    def num_planned_swap_ins(self) -> int:
        return len(self._planned.swap_ins)

    @property
    def has_transfers(self) -> bool:
        """Whether the next plan has copies to tell."""
        return bool(self._planned)

    def plan_swap_outs(self, watermark_blocks: int, max_blocks: int, now: float) -> None:
        """Swap out ahead of time, the smallest retention value first: at most `max_blocks`, until `watermark_blocks` are
        free or reclaimable; before that, with write-through, what the last turns left."""
        if not self.cpu_pool.num_blocks:
            return
        while max_blocks and self._unwritten:
            chunk = next(iter(self._unwritten))
            del self._unwritten[chunk]
            if chunk in self._gpu_only:
                max_blocks -= self._try_swap_out(chunk, now)
        num_underway = sum(len(transfers.swap_outs) for transfers in (self._planned, *self._in_flight))
        num_wanted = watermark_blocks - self.gpu_pool.num_free - len(self._both) - num_underway
        for _ in range(min(num_wanted, max_blocks)):
            victim = self._gpu_only.choose_victim(now)
            if victim is None or not self._try_swap_out(victim, now):
                return

    def take_transfers(self) -> Transfers:
        """What the plan being made has to tell; in flight from now on."""
        transfers, self._planned = self._planned, Transfers()
        self._in_flight.append(transfers)
        self._stats.num_gpu_copies += len(transfers.gpu_copies)
        self._stats.num_swap_ins += len(transfers.swap_ins)
        self._stats.num_swap_outs += len(transfers.swap_outs) + len(transfers.evictions)
        return transfers

    def complete_transfers(self) -> None:
        """The oldest plan in flight has been executed."""
        transfers = self._in_flight.pop(0)
        for chunk, _ in (*transfers.evictions, *transfers.swap_outs):
            self._storing.discard(chunk)
            self._unpin(chunk)
            self._note_spare_copy(chunk)
        for source, target, _ in transfers.swap_ins:
            self._loading.discard(target)
            if target.key is None and source is target:  # a tail taken over: its copy is stale once it is written to
                self._free_cpu_block(source)
            self._unpin(source)
            self._note_spare_copy(source)

    def abort_transfers(self) -> None:
        """The executor failed at the oldest plan in flight: whatever it was to write is not to be trusted. Chunks keep the
        copy that was read, and those whose only copy was on its way are dropped."""
        transfers = self._in_flight.pop(0)
        for chunk, _ in (*transfers.evictions, *transfers.swap_outs):
            self._storing.discard(chunk)
            self._spare_copies.pop(chunk, None)
            self._free_cpu_block(chunk)
            if chunk.gpu_block is None or chunk in self._loading:  # evicted, or evicted and on its way back
                self._drop(chunk)
            self._unpin(chunk)
        for source, target, _ in transfers.swap_ins:
            self._unload(source, target)

    def fail_swap_in(self, gpu_block: int) -> Chunk | None:
        """A swap-in of the oldest plan in flight brought something else than what was swapped out: forget the chunk in both
        tiers. Returns the chunk that was to be written, in whoever's row it is; None where there is no such swap-in."""
        for transfer in self._in_flight[0].swap_ins:
            source, target, copy = transfer
            if copy.target == gpu_block:
                self._in_flight[0].swap_ins.remove(transfer)
                self._loading.discard(target)
                for chunk in {source, target}:
                    self._drop(chunk)
                    self._spare_copies.pop(chunk, None)
                self._free_cpu_block(source)
                self._unpin(source)
                self._stats.num_corrupted_swaps += 1
                return target
        return None

    # -- inside: loading, copying, evicting ----------------------------------------------------------------------------

    def _leave_out_expensive_loads(self, match: ContextMatch) -> dict[int, int]:
        """Take those chunks in the CPU tier out of the match that cost more to load than to compute again; returns their
        positions and how many tokens of each were valid. See CostModel.is_loaded for the rule."""
        is_loaded = self._cost_model.is_loaded
        not_loaded = {p: num for p, num in match.select_in_cpu_tier().items() if not is_loaded(p, num)}
        for position in not_loaded:
            match.leave_out(position)
        return not_loaded

    def _select_own_tails(self, request: Request, match: ContextMatch) -> set[int]:
        """Positions of the tails that the request may write on in place, because nobody uses them and its own conversation
        left them."""
        return {
            position
            for position, (chunk, _) in match.tails.items()
            if chunk.num_tokens < self.chunk_size and not chunk.pins and chunk.owner_id == request.conversation_id
        }

    def _count_taken_blocks(self, request: Request, kept: Sequence[Chunk]) -> int:
        """All of the request's row but those of the chunks it keeps that are pinned already."""
        num_pinned = sum(chunk.gpu_block is not None and chunk.pins > 0 for chunk in kept)
        return self.num_chunks(request.num_tokens) - num_pinned

    def _count_prompt_tokens(self, request: Request, num_tokens: Mapping[int, int]) -> int:
        """Of `num_tokens` leading tokens of the chunk at each position, those that belong to the prompt."""
        left = [min(num, request.num_prompt_tokens - p * self.chunk_size) for p, num in num_tokens.items()]
        return sum(num for num in left if num > 0)

    def _load(self, source: Chunk, target: Chunk, now: float) -> None:
        """A GPU block for `target`, unless it has one, and the swap-in of `source` to it. `source` is pinned."""
        if target.gpu_block is not None:
            return
        target.gpu_block = self._new_block(now)
        self._plan_swap_in(source, target)

    def _plan_swap_in(self, source: Chunk, target: Chunk) -> None:
        assert source.cpu_block is not None
        assert target.gpu_block is not None
        self._pin(source)
        self._spare_copies.pop(source, None)
        self._loading.add(target)
        self._planned.swap_ins.append((source, target, BlockCopy(source.cpu_block, target.gpu_block)))

    def _take_over(self, chunk: Chunk, now: float) -> None:
        """Make a pinned tail its new writer's alone. Its CPU copy, if any, will be stale."""
        self.index.remove(chunk)
        self._spare_copies.pop(chunk, None)
        if chunk.gpu_block is None:
            self._load(chunk, chunk, now)
        elif chunk.cpu_block is not None:
            self._free_cpu_block(chunk)

    def _arrived_gpu_block(self, chunk: Chunk) -> int | None:
        return None if chunk in self._loading else chunk.gpu_block

    def _copy(self, source: Chunk, source_block: int | None, target: Chunk) -> None:
        """Fill a new chunk from `source`: from its GPU block as it was before the step, or else from the CPU tier."""
        assert target.gpu_block is not None
        if source_block is not None:
            self._planned.gpu_copies.append(BlockCopy(source_block, target.gpu_block))
        else:
            self._plan_swap_in(source, target)

    def _unload(self, source: Chunk, target: Chunk) -> None:
        """Undo a planned swap-in that did not arrive. A shared chunk is in the CPU tier again; a private one goes with its
        request."""
        self._loading.discard(target)
        if source is target and target.key is not None:
            assert target.gpu_block is not None
            self.gpu_pool.free(target.gpu_block)
            target.gpu_block = None
        elif source is target:
            self._free_cpu_block(source)
        self._unpin(source)

    def _merge(self, request: Request, chunk: Chunk, key: bytes) -> None:
        """`chunk` has been computed, but an equal one has its name. Where that one has no GPU block, it gets this one; else
        the row keeps its own, unnamed."""
        named = self.index.match(key)
        assert named is not None
        if named is chunk or named.gpu_block is not None:
            return
        self._pin(named)
        named.gpu_block, chunk.gpu_block = chunk.gpu_block, None
        self._note_spare_copy(named)
        request.chunks[chunk.position] = named

    def _new_chunk(self, position: int, now: float) -> Chunk:
        """A pinned, unnamed chunk with a GPU block; the caller has made sure that one is available."""
        chunk = Chunk(position, self._new_block(now))
        chunk.pins = 1
        return chunk

    def _new_block(self, now: float) -> int:
        if not self.gpu_pool.num_free:
            self._evict(now)
        block_id = self.gpu_pool.try_allocate()
        assert block_id is not None
        return block_id

    def _evict(self, now: float) -> None:
        """Free one GPU block: at no cost that of a chunk in both tiers, else by swapping out or dropping a victim. If there
        is none, one that is held back."""
        victim = self._both.choose_victim(now) or self._gpu_only.choose_victim(now)
        if victim is None:
            self.gpu_pool.free(self._held[Tier.GPU].pop())
            return
        gpu_block = victim.gpu_block
        assert gpu_block is not None
        self._unfile(victim)
        victim.gpu_block = None
        self.gpu_pool.free(gpu_block)
        if victim.cpu_block is not None:
            self._note_eviction("gpu_reclaimed", victim, now)
            self._file(victim)
            return
        cpu_block = self._try_cpu_block(victim, now)
        if cpu_block is None:
            self._note_eviction("gpu_dropped", victim, now)
            self._drop(victim)
            return
        self._note_eviction("gpu_swapped_out", victim, now)
        victim.cpu_block = cpu_block
        victim.pins += 1
        self._storing.add(victim)
        self._planned.evictions.append((victim, BlockCopy(gpu_block, cpu_block)))

    def _try_swap_out(self, chunk: Chunk, now: float) -> bool:
        """Plan an ahead-of-time copy of an unpinned chunk to the CPU tier, if that has a block for it."""
        cpu_block = self._try_cpu_block(chunk, now, is_ahead_of_time=True)
        if cpu_block is None:
            return False
        assert chunk.gpu_block is not None
        self._pin(chunk)
        chunk.cpu_block = cpu_block
        self._storing.add(chunk)
        self._planned.swap_outs.append((chunk, BlockCopy(chunk.gpu_block, cpu_block)))
        return True

    def _try_cpu_block(self, chunk: Chunk, now: float, *, is_ahead_of_time: bool = False) -> int | None:
        """A CPU block for `chunk`: a free one, a copy that is not needed, or that of a chunk which goes before it. Ahead of
        time not that of a chunk in both tiers: one copy made for another one lost gains nothing."""
        if not self.cpu_pool.num_free:
            victim = None if self._spare_copies else self._cpu.choose_victim(now)
            if not self._spare_copies:
                if victim is None or not self._cpu.goes_before(victim, chunk, now):
                    return None
                if is_ahead_of_time and victim.gpu_block is not None:
                    return None
            self._evict_from_cpu_tier(victim, now)
        return self.cpu_pool.try_allocate()

    def _evict_from_cpu_tier(self, victim: Chunk | None, now: float) -> None:
        """Free the CPU block of `victim`, or if that is None the oldest spare copy's."""
        if victim is None:
            spare = next(iter(self._spare_copies))
            del self._spare_copies[spare]
            self._note_eviction("cpu_copy_dropped", spare, now)
            self._free_cpu_block(spare)
            return
        self._unfile(victim)
        self._free_cpu_block(victim)
        if victim.gpu_block is None:
            self._note_eviction("cpu_dropped", victim, now)
            self._drop(victim)
        else:
            self._note_eviction("cpu_copy_dropped", victim, now)
            self._file(victim)

    def _note_eviction(self, reason: str, chunk: Chunk, now: float) -> None:
        self._stats.evictions[reason] += 1
        self.eviction_log.note(reason, chunk, now)

    def _hold(self, now: float) -> None:
        """Take blocks out of use until as many are as there are to be, or no more can be had. The CPU tier first: what leaves
        the GPU tier then finds the room that it is to have."""
        held = self._held[Tier.CPU]
        while len(held) < self._num_to_hold[Tier.CPU]:
            if not self.cpu_pool.num_free:
                victim = None if self._spare_copies else self._cpu.choose_victim(now)
                if not self._spare_copies and victim is None:
                    break
                self._evict_from_cpu_tier(victim, now)
            block_id = self.cpu_pool.try_allocate()
            assert block_id is not None
            held.append(block_id)
        held = self._held[Tier.GPU]
        while len(held) < self._num_to_hold[Tier.GPU]:
            if not (self.gpu_pool.num_free or len(self._both) or len(self._gpu_only)):
                break
            held.append(self._new_block(now))

    # -- inside: books -------------------------------------------------------------------------------------------------

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
            self._insert(chunk, key, parent)

    def _insert(self, chunk: Chunk, key: bytes, parent_key: bytes) -> bool:
        """Name a chunk; False, and nothing changed, if an equal one has the name."""
        self._dropped.pop(key, None)
        return self.index.insert(chunk, key, parent_key)

    def _remember_dropped(self, key: bytes) -> None:
        self._dropped.pop(key, None)
        self._dropped[key] = None
        if len(self._dropped) > MAX_DROPPED_KEYS:
            del self._dropped[next(iter(self._dropped))]

    def _missing_ranges(self, row: list[Chunk], full: Iterable[int], num_tokens: int) -> list[tuple[int, int]]:
        """[start, end) of what is not in the row's blocks yet, front first, adjacent ranges joined."""
        ranges: list[tuple[int, int]] = []
        size, resident = self.chunk_size, set(full)
        for position, chunk in enumerate(row):
            if position in resident:
                continue
            start, end = position * size + chunk.num_tokens, min((position + 1) * size, num_tokens)
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
        return ranges

    def _pin(self, chunk: Chunk) -> None:
        if not chunk.pins:
            self._unfile(chunk)
        chunk.pins += 1
        self._note_spare_copy(chunk)

    def _unpin(self, chunk: Chunk) -> None:
        chunk.pins -= 1
        if chunk.pins:
            return
        self._spare_copies.pop(chunk, None)
        if chunk.key is not None:
            self._file(chunk)
            return
        if chunk.gpu_block is not None:
            self.gpu_pool.free(chunk.gpu_block)
            chunk.gpu_block = None
        self._free_cpu_block(chunk)

    def _note_spare_copy(self, chunk: Chunk) -> None:
        """A chunk in use that lies in both tiers could do without its CPU copy, unless a transfer is at it."""
        is_in_both = chunk.gpu_block is not None and chunk.cpu_block is not None
        if chunk.pins and is_in_both and chunk not in self._loading and chunk not in self._storing:
            self._spare_copies.setdefault(chunk)

    def _file(self, chunk: Chunk) -> None:
        if chunk.gpu_block is not None:
            (self._gpu_only if chunk.cpu_block is None else self._both).insert(chunk)
        if chunk.cpu_block is not None:
            self._cpu.insert(chunk)

    def _unfile(self, chunk: Chunk) -> None:
        if chunk.gpu_block is not None:
            (self._gpu_only if chunk.cpu_block is None else self._both).remove(chunk)
        if chunk.cpu_block is not None:
            self._cpu.remove(chunk)

    def _drop(self, chunk: Chunk) -> None:
        """Take the name away from a chunk that nobody can use any more."""
        if chunk.key is not None:
            if chunk.num_tokens == self.chunk_size:
                self._remember_dropped(chunk.key)
            self.index.remove(chunk)

    def _free_cpu_block(self, chunk: Chunk) -> None:
        if chunk.cpu_block is not None:
            self.cpu_pool.free(chunk.cpu_block)
            chunk.cpu_block = None

    # -- proof ---------------------------------------------------------------------------------------------------------

    def count_idle_chunks(self) -> dict[str, int]:
        """Chunks that nobody uses, by residency."""
        num_both = len(self._both)
        return {"gpu": len(self._gpu_only), "both": num_both, "cpu": len(self._cpu) - num_both}

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless every block of each tier is exactly one of free or owned by one chunk, pins count the
        rows and the transfers that use a chunk, and unpinned chunks are filed where their blocks say. `requests`: all that
        hold a row. O(everything)."""
        pins: dict[Chunk, int] = {}

        def count_pin(chunk: Chunk) -> None:
            pins[chunk] = pins.get(chunk, 0) + 1

        for request in requests:
            for position, chunk in enumerate(request.chunks):
                assert chunk.position == position, f"{request} holds {chunk} at {position}"
                assert chunk.gpu_block is not None, f"{request} holds {chunk}"
                count_pin(chunk)
        storing, loading = set(), set()
        for transfers in (self._planned, *self._in_flight):
            for chunk, copy in (*transfers.evictions, *transfers.swap_outs):
                assert chunk.cpu_block == copy.target
                storing.add(chunk)
                count_pin(chunk)
            for source, target, copy in transfers.swap_ins:
                assert (source.cpu_block, target.gpu_block) == (copy.source, copy.target)
                loading.add(target)
                count_pin(source)
        assert (self._storing, self._loading) == (storing, loading)
        named = set(self.index)
        assert self._dropped.keys().isdisjoint(chunk.key for chunk in named)
        chunks = named | pins.keys()
        for chunk in chunks:
            assert chunk.pins == pins.get(chunk, 0), f"{chunk} is pinned by {pins.get(chunk, 0)}"
            assert chunk.gpu_block is not None or chunk.cpu_block is not None, f"{chunk} has no block"
            assert 0 <= chunk.num_tokens <= self.chunk_size
            assert (chunk.key is not None) == (chunk in named)
        for policy, residencies in (
            (self._gpu_only, {Residency.GPU}),
            (self._both, {Residency.BOTH}),
            (self._cpu, {Residency.BOTH, Residency.CPU}),
        ):
            expected = {chunk for chunk in named if not chunk.pins and chunk.residency in residencies}
            assert len(policy) == len(expected)
            assert set(policy) == expected
        for chunk in self._spare_copies:
            assert chunk.pins, chunk
            assert chunk.gpu_block is not None, chunk
            assert chunk.cpu_block is not None, chunk
        assert all(len(blocks) <= self._num_to_hold[tier] for tier, blocks in self._held.items())
        for pool, owned in (
            (self.gpu_pool, [chunk.gpu_block for chunk in chunks if chunk.gpu_block is not None]),
            (self.cpu_pool, [chunk.cpu_block for chunk in chunks if chunk.cpu_block is not None]),
        ):
            pool.check_integrity(owned + self._held[pool.tier])
