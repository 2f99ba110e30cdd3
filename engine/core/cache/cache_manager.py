"""Which chunk is where: finds what a context has, gives blocks to what it lacks, keeps what it computed.

Decides where KV lies; the executor moves it. Knows no scheduler and no clock. What happens to the blocks of a context, by
token range, when a request arrives with 17 tokens (chunk_size 4, the primary tier is the GPU's):

    GPU chunk 0 | CPU chunk 1 | dropped chunk 2 | tail of 3 tokens + new prompt, chunks 3 and 4
    [0 1 2 3]     [4 5 6 7]     [8 9 10 11]       [12 13 14 | 15] [16]
     pinned        GPU block,    GPU block,        the tail's block, taken over (same conversation)
                   swapped in    recomputed        or copied (another one); a new block for chunk 4

The request's row holds all five, pinned. Full chunks are named in the index when they are computed; the last, partial one
when the request ends. A chunk still without a name when its request ends is freed.

The parts: `index` finds chunks by content, `matching` whole contexts; `tier` files chunks by where their blocks may be
taken; `allocation` gives out blocks; `transfers` are the copies of steps, `slow_transfers` those that outlive steps;
`handover` is what engines give each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from engine.core.cache.allocation import Allocator
from engine.core.cache.chunk_events import ChunkEvents
from engine.core.cache.cost_model import CostModel
from engine.core.cache.drain import Drain
from engine.core.cache.eviction import make_policies
from engine.core.cache.handover import Handover
from engine.core.cache.index import Chunk, ChunkIndex, chunk_key
from engine.core.cache.matching import ContextMatch, ContextMatcher
from engine.core.cache.prices import LoadPrices
from engine.core.cache.retention import HINTS_ARE_OFF, Retention
from engine.core.cache.slow_transfers import SlowTransfers
from engine.core.cache.tenant_shares import TenantShares
from engine.core.cache.tier import Tier, Tiers
from engine.core.cache.transfers import Transfers
from engine.core.cache_map import CacheMap, ContextKeys, EvictionLog
from engine.core.config import CacheConfig
from engine.core.plan import ChunkRecord, TransferEnd
from engine.core.request import ContextAccount, Request
from engine.core.retention import Miss, RetentionHint, RetentionOutcome
from engine.core.reuse import Reuse
from engine.core.stats import EngineStats
from engine.core.tier_table import BOTH

# A request waits that long for a slow tier, in seconds, even if computing would take less: one step may take as long.
MIN_LOAD_WAIT_S = 0.5
# Of a step, if it is not known how many the device can copy beside it.
DEFAULT_MAX_SWAP_OUTS = 16


class LoadWait(NamedTuple):
    """What a request waits for.

    transfer_ids: the loads that were planned for it, and those under way for others. Empty if it should wait until some of
        the others' are through.
    max_wait_s: for so long.
    """

    transfer_ids: set[int]
    max_wait_s: float


class CacheManager:
    """The chunks of all conversations, in all tiers.

    In the stateless mode (`keep` is False) nothing outlives its request and nothing is shared.

    transfers: the copies of steps.
    slow_transfers: those from and to slow tiers.
    allocator: makes copies ahead of time, and tiers smaller.
    prices: of loading from slow tiers.
    handover: of chunks between this engine and others; None unless there is a tier for it.
    drain: brings everything to the slow tiers; None unless the engine is about to end.
    map: what an observer is shown.
    events: chunks that come and go; None = not noted, because no index elsewhere has asked.
    shares: the tenants' weights. retention: carries out hints; None = none are taken.
    """

    def __init__(self, config: CacheConfig, stats: EngineStats) -> None:
        self.config = config
        self.chunk_size = config.chunk_size
        self.keep = config.keep
        self._max_swap_outs = config.max_swap_outs or DEFAULT_MAX_SWAP_OUTS
        self.index = ChunkIndex(config.chunk_size, sum(tier.num_blocks for tier in config.tiers))
        self._cost_model = config.cost_model or CostModel(chunk_size=config.chunk_size)
        self.shares = TenantShares()
        takes_hints = config.keep and config.kv_hints != "off"
        make_policy, self._reuse_observer = make_policies(
            config.eviction_policy, config.own_policy, self._cost_model, self.shares if takes_hints else None
        )
        self.tiers = Tiers(config.tiers, make_policy)
        self.events: ChunkEvents | None = None
        self.retention: Retention | None = None
        if takes_hints:
            self.tiers.tell_policies_their_size()
            num_blocks = config.num_gpu_blocks + config.num_cpu_blocks
            self.retention = Retention(
                self.tiers, self.shares, int(config.kv_retention_share * num_blocks), config.chunk_size
            )
            self.index.on_drop.append(self.retention.forget)
        self._primary, self._secondary = self.tiers.primary, self.tiers.secondary
        self.transfers = Transfers(self.tiers, self.index, stats)
        self.eviction_log = EvictionLog(self._cost_model)
        self.map = CacheMap(self.tiers, self.index, self._cost_model)
        self.prices = LoadPrices(self._cost_model)
        self.slow_transfers = SlowTransfers(self.tiers, self.index, self.prices, stats)
        self.drain: Drain | None = None
        self._is_ending = False
        self._stats = stats
        self.allocator = Allocator(
            self.tiers,
            self.index,
            self.transfers,
            self.slow_transfers,
            self.prices,
            stats,
            self.eviction_log,
            write_through=config.write_through,
        )
        self._matcher = ContextMatcher(self.index, config.model)
        self.match_context = self._matcher.match
        self.handover: Handover | None = None
        if self.tiers.peer is not None:
            self.handover = Handover(
                self.tiers,
                self.index,
                self._matcher,
                self.transfers,
                self.slow_transfers,
                self.allocator,
                self.prices,
                self.tiers.peer,
                stats,
            )

    @property
    def num_blocks(self) -> int:
        """Blocks that running requests share: those of the primary tier."""
        return self._primary.pool.num_blocks

    @property
    def num_available_blocks(self) -> int:
        """Blocks that a request could get: free ones, those of chunks that are not pinned, and those held back."""
        return self._primary.num_available

    @property
    def has_slow_chunks(self) -> bool:
        """Whether there may be something in a slow tier."""
        return any(tier.pool.num_used for tier in self.tiers.slow)

    def num_chunks(self, num_tokens: int) -> int:
        """Chunks (= blocks) that a context of `num_tokens` takes."""
        return -(-num_tokens // self.chunk_size)

    # -- a request's row of chunks -------------------------------------------------------------------------------------

    def try_admit(self, request: Request, reserve_blocks: int, now: float) -> bool:
        """Pin what is cached of the request's context and give a block to every other chunk of it.

        Sets its `chunks`, `pending` and `account` and plans the transfers. False, and nothing changed, if fewer than
        `reserve_blocks` would stay available.
        """
        match = self.match_context(request)
        not_loaded = self._leave_out_expensive_loads(match)
        taken_over = self._select_own_tails(request, match)
        kept = [*match.full.values(), *(match.tails[position][0] for position in taken_over)]
        if self.num_available_blocks - self._count_taken_blocks(request, kept) < reserve_blocks:
            return False

        if self._reuse_observer is not None:
            self._reuse_observer.note_start(request, now)
        request.account = self._account(request, match, not_loaded)
        # Pins first, then allocations, which evict. A block that is only copied from may be evicted meanwhile: a step
        # makes its copies before anything writes to a block, so the id is enough.
        sources = {position: match.tails[position][0] for position in match.tails.keys() - taken_over}
        source_blocks = {position: self._arrived_block(chunk) for position, chunk in sources.items()}
        pinned = [*kept, *(chunk for position, chunk in sources.items() if source_blocks[position] is None)]
        for chunk in pinned:
            self.tiers.pin(chunk)
            chunk.is_to_store = True  # this is at least its second use
        is_returning = self._is_returning(request, match, not_loaded)
        row: list[Chunk] = []
        for position in range(self.num_chunks(request.num_tokens)):
            if position in match.full:
                chunk = match.full[position]
                self._load(chunk, now)
            elif position in taken_over:
                chunk = match.tails[position][0]
                self._take_over(chunk, now)
            else:
                chunk = self.tiers.new_chunk(position, self.allocator.new_block(now))
                chunk.is_to_store |= is_returning
                if position in sources:
                    self._copy(sources[position], source_blocks[position], chunk)
            row.append(chunk)
        for chunk in pinned[len(kept) :]:  # the planned swap-in pins it from here on
            self.tiers.unpin(chunk)
        for position, (_, num_valid) in match.tails.items():
            row[position].num_tokens = num_valid
        request.chunks = row
        request.pending = self._missing_ranges(row, match.full.keys(), request.num_tokens)
        if request.explains_misses:
            request.explains_misses = False
            request.misses = self._explain(request, match, not_loaded)
        return True

    def start_loads(self, request: Request, now: float) -> LoadWait | None:
        """Plan to load what slow tiers have of the request's context, if that is cheaper than to compute it.

        None if there is nothing to wait for. Changes the request's `loads`, in which each chunk is tried once.
        """
        match = self.match_context(request)
        wanted = self._choose_loads(request, match, now)
        if not wanted:
            return None
        for chunk in (*match.full.values(), *(chunk for chunk, _ in match.tails.values())):
            self.tiers.touch(chunk, now)
        transfer_ids: set[int] = set()
        has_to_wait = False
        for _, chunk, _, tier in reversed(wanted):  # the end of a context costs most to compute
            transfer = self.slow_transfers.find(chunk)
            if transfer is None:
                if self.slow_transfers.num_loads >= max(1, self._secondary.pool.num_blocks // 2):
                    has_to_wait = True  # more at once would evict each other
                    break
                block_id = self.allocator.try_block_for_load(now)
                if block_id is not None:
                    transfer = self.slow_transfers.plan_load(chunk, tier, block_id, now)
            if chunk.key is not None:
                request.loads[chunk.key] = tier.name
            if transfer is not None and self.slow_transfers.is_load(transfer):
                self.slow_transfers.await_load(transfer)
                transfer_ids.add(transfer.transfer_id)
        if not transfer_ids and not has_to_wait:
            return None
        slowest = max((tier for *_, tier in wanted), key=lambda tier: tier.number)
        compute_s = self.prices.compute_s(slowest.name, ((position, num) for position, _, num, _ in wanted))
        max_wait_s = slowest.spec.max_wait_s
        if compute_s is not None:
            max_wait_s = min(max_wait_s, max(MIN_LOAD_WAIT_S, 2 * compute_s))
        return LoadWait(transfer_ids, max_wait_s)

    def _choose_loads(self, request: Request, match: ContextMatch, now: float) -> list[tuple[int, Chunk, int, Tier]]:
        """What of the match is to be loaded from slow tiers: (position, chunk, number of valid tokens, tier), front first.

        Each chunk has to cost less to load than to compute, and all together too, with the loads in front of them. If they do
        not, and the price is old, the last one is loaded without a request that waits for it, to see what that costs now.
        """
        wanted: list[tuple[int, Chunk, int, Tier]] = []
        refused: list[tuple[int, Chunk, int, Tier]] = []
        for position, chunk, num_valid in match.outside_primary_tier():
            tier = self.tiers.slow_tier_of(chunk)
            if chunk.blocks[1] is not None or tier is None or chunk.key in request.loads:
                continue
            if self.slow_transfers.may_load(tier, now):
                is_cheap = self.prices.is_loaded(tier.name, position, num_valid)
                (wanted if is_cheap else refused).append((position, chunk, num_valid, tier))
        if wanted:
            compute_cost = self.prices.compute_cost((position, num) for position, _, num, _ in wanted)
            load_cost = sum(self.prices.load_cost(tier.name) for *_, tier in wanted)
            queued_cost = self.slow_transfers.num_loads * self.prices.load_cost(wanted[-1][-1].name)
            if load_cost + queued_cost > compute_cost:
                refused, wanted = wanted, []
        if refused and not request.loads:
            tier = refused[-1][-1]
            self._stats.slow_refusals[f"{tier.name}_load"] += len(refused)
            chunk = refused[-1][1]
            if self.prices.needs_probe(tier.name, now) and self.slow_transfers.find(chunk) is None:
                block_id = self.allocator.try_block_for_load(now)
                if block_id is not None:
                    self.slow_transfers.plan_load(chunk, tier, block_id, now)
        return wanted

    def complete_transfer(self, end: TransferEnd, now: float) -> None:
        """A slow transfer has ended."""
        transfer = self.slow_transfers.complete(end, now)
        if self.handover is not None:
            self.handover.end_transfer(transfer, ok=end.ok)

    def plan_copies(self, watermark_blocks: int, now: float) -> None:
        """Plan what goes beside the next step: copies ahead of time, or those of a drain; and what peers have asked for."""
        if (
            self.handover is not None
        ):  # first, so that what was brought to be sent is not evicted for a copy ahead of time
            self.handover.plan(now)
        if self.drain is None:
            max_swap_outs = self._max_swap_outs
            if self.transfers.planned.swap_ins:
                max_swap_outs //= 4  # the two directions slow each other down (paper section 5)
            self.allocator.plan_swap_outs(watermark_blocks, max_swap_outs, now)
            self.allocator.plan_stores(self.config.swap_out_watermark, max_swap_outs, now)
        else:
            self.drain.plan(now)

    def watch_chunks(self) -> ChunkEvents:
        """The events of chunks, noted from the first call on."""
        if self.events is None:
            self.events = ChunkEvents(self.chunk_size)
            self.index.on_drop.append(self.events.note_removed)
        return self.events

    def await_records(self, tier_name: str) -> None:
        """Give out no block of that tier until `restore` tells what lies there. Before the first request."""
        tier = self.tiers.by_name[tier_name]
        tier.unread = set(range(tier.pool.num_blocks))
        tier.pool.allocate_all()

    def restore(self, tier_name: str, records: Mapping[int, ChunkRecord | None], now: float) -> None:
        """What an earlier process has left in blocks of a slow tier that were unread; None = nothing that can be used."""
        tier = self.tiers.by_name[tier_name]
        for block_id, record in records.items():
            tier.unread.remove(block_id)
            if record is None or self.index.match(record.key) is not None:
                tier.pool.free(block_id)
                continue
            chunk = self.tiers.restored_chunk(tier, block_id, record, now)
            self.index.insert(chunk, record.key, record.parent_key)
            self.tiers.file(chunk)

    def may_complete(self, request: Request, other: Request) -> bool:
        """Whether a chunk that a decoding request computes next may be part of the context of `other`."""
        position = len(request.chunks) - 1
        if not self.keep or position >= len(other.chunk_keys):
            return False
        if position and len(request.chunk_keys) >= position:
            return request.chunk_keys[position - 1] == other.chunk_keys[position - 1]
        return True

    def block_table(self, request: Request) -> tuple[int, ...]:
        """The blocks of an admitted request's row, front first."""
        return tuple(block for chunk in request.chunks if (block := chunk.blocks[0]) is not None)

    def count_taken_blocks(self, request: Request) -> int:
        """How many of the available blocks `try_admit` would take for the request."""
        match = self.match_context(request)
        self._leave_out_expensive_loads(match)
        own_tails = self._select_own_tails(request, match)
        return self._count_taken_blocks(
            request, [*match.full.values(), *(match.tails[position][0] for position in own_tails)]
        )

    def count_given_blocks(self, requests: Iterable[Request]) -> Iterator[int]:
        """How many blocks become available when the first of `requests` is released, the first two, and so on.

        At least; a transfer in flight may hold more back until it is complete.
        """
        num_pins: dict[Chunk, int] = {}
        num_blocks = 0
        for request in requests:
            for chunk in request.chunks:
                num_pins[chunk] = num_pins.get(chunk, 0) + 1
                num_blocks += num_pins[chunk] == chunk.pins
            yield num_blocks

    def try_append_block(self, request: Request, now: float) -> int | None:
        """One more block at the end of a running request's row, by eviction if none is free.

        None, and nothing changed, if every block is pinned.
        """
        if not (self._primary.pool.num_free or self._primary.num_available):
            return None
        block_id = self.allocator.new_block(now)
        chunk = self.tiers.new_chunk(len(request.chunks), block_id)
        chunk.is_to_store = request.chunks[-1].is_to_store
        request.chunks.append(chunk)
        return block_id

    def commit(self, request: Request, start: int, end: int) -> None:
        """The KV of positions [start, end) is written. Names the chunks that this completes, so that others find them."""
        size = self.chunk_size
        first = start // size
        if end < (first + 1) * size:  # most steps of a decode
            request.chunks[first].num_tokens = end - first * size
            return
        for position in range(first, -(-end // size)):
            chunk = request.chunks[position]
            chunk.num_tokens = num_tokens = min(end - position * size, size)
            if num_tokens < size or not self.keep:
                continue
            self._matcher.extend_keys(request)
            key = request.chunk_keys[position]
            parent_key = self._matcher.parent_key(request, position)
            if not self.index.insert(chunk, key, parent_key):
                self._merge(request, chunk, key)
            elif self.events is not None:
                token_ids = request.token_ids[position * size : (position + 1) * size]
                self.events.note_stored(key, parent_key, token_ids, position)

    def release(self, request: Request, now: float, *, step_failed: bool = False, is_preempted: bool = False) -> None:
        """Unpin the row of a request that ends or is preempted. What it computed stays, as long as there is room.

        step_failed: what the last step wrote or copied is unknown, so what has no name yet is not kept.
        is_preempted: the request goes on later, so its turn is no use of the chunks yet, and says nothing of the next one.
        """
        if not self.keep:
            self._matcher.extend_keys(request)
            for chunk, key in zip(request.chunks, request.chunk_keys, strict=False):
                if chunk.num_tokens == self.chunk_size:
                    self.index.remember_dropped(key, "stateless", now)
        conversation_id, observer = request.conversation_id, self._reuse_observer
        reuse = (request.reuse if observer is None else observer.stamp(request)).since(now)
        is_use = not (is_preempted or request.is_refill)
        stated = None if not is_use else self._carry_out_hint(request, reuse, now, step_failed)
        for chunk in request.chunks:
            if chunk.key is None and self.keep and not step_failed:
                self._try_name(request, chunk)
            chunk.last_active = now
            if stated is not None and self.retention is not None:
                chunk.note_use(conversation_id, stated[chunk.position], now)
                chunk.is_to_store |= chunk.reuse.weight > 1
                self.retention.note(chunk, now)
            elif is_use:
                chunk.note_use(conversation_id, reuse, now)
            elif request.is_refill and not chunk.num_uses:
                chunk.tenant, chunk.reuse, chunk.last_user_id, chunk.num_users = (
                    request.tenant,
                    reuse,
                    conversation_id,
                    1,
                )
            self.tiers.unpin(chunk)
            self.allocator.note_end_of_turn(chunk)
        if observer is not None and is_use:
            observer.note_end(request, now)
        request.chunks, request.pending = [], []
        self.allocator.hold(now)

    def _carry_out_hint(self, request: Request, reuse: Reuse, now: float, step_failed: bool) -> Sequence[Reuse] | None:
        """What the request says of each chunk of its row, by its hint; None = of all what `reuse` says."""
        if self.retention is None:
            if request.retention is not None:
                request.retention_outcome = self._refuse_hint()
            return None
        for chunk in request.chunks:
            if chunk.key is None and not step_failed:
                self._try_name(request, chunk)
            chunk.tenant = request.tenant
        stated, request.retention_outcome = self.retention.say_at_end(
            request.retention, request.chunks, request.conversation_id, request.tenant, reuse, now
        )
        return stated

    def _refuse_hint(self) -> RetentionOutcome:
        self._stats.num_refused_hints += 1
        return HINTS_ARE_OFF

    def retain(
        self, conversation_id: str, keys: ContextKeys, tenant: str, hint: RetentionHint, now: float
    ) -> RetentionOutcome:
        """Say that of what is cached of a conversation of which no request runs; see Retention."""
        if self.retention is None:
            return self._refuse_hint()
        return self.retention.say_while_idle(hint, self.idle_chunks(keys), conversation_id, tenant, now)

    def idle_chunks(self, keys: ContextKeys) -> list[Chunk]:
        """The unpinned chunks of a context, wherever they lie, front first."""
        tail = next((chunk for _, key in keys.tails if (chunk := self.index.match(key)) is not None), None)
        chunks = [*map(self.index.match, keys.full), tail]
        return [chunk for chunk in chunks if chunk is not None and not chunk.pins]

    def idle_chunks_of(self, request: Request) -> list[Chunk]:
        """The unpinned chunks of the context of a request that has ended."""
        match = self.match_context(request)
        chunks = (*match.full.values(), *(chunk for chunk, _ in match.tails.values()))
        return [chunk for chunk in chunks if not chunk.pins]

    def has_holes_to_fill(self, request: Request) -> bool:
        """Whether something of its context is to be computed, and what it takes is free, or copied to the secondary tier."""
        match = self.match_context(request)
        num_missing = request.num_tokens - 1 - match.num_cached_tokens
        num_blocks = sum(chunk.blocks[0] is None for chunk in match.full.values())
        num_blocks += self.num_chunks(request.num_tokens) - len(match.full)
        return num_missing > 0 and num_blocks <= self.allocator.num_ready_blocks and not self._is_ending

    # -- before the engine ends ----------------------------------------------------------------------------------------

    def start_drain(self, now: float) -> None:
        """From now on, bring everything to the first slow tier that keeps it, if there is one. No request may follow."""
        self._is_ending = True
        if self.handover is not None:
            self.handover.start_drain()
        if self.tiers.stores:
            self.drain = Drain(
                self.tiers, self.index, self.transfers, self.slow_transfers, self.allocator, self._cost_model, now
            )

    # -- what is where -------------------------------------------------------------------------------------------------

    def count_held_blocks(self) -> dict[str, int]:
        """Blocks that are held back, by tier."""
        return {tier.name: len(tier.held) for tier in self.tiers}

    def count_idle_chunks(self) -> dict[str, int]:
        """Unpinned chunks by where they lie.

        In the primary tier and not in the secondary one; in both; in the secondary tier and not in the primary one;
        and all that lie in each slow tier.
        """
        num_both = len(self._primary.copied)
        return {
            self._primary.name: len(self._primary.sole),
            BOTH: num_both,
            self._secondary.name: self._secondary.count_idle_chunks() - num_both,
        } | {tier.name: tier.count_idle_chunks() for tier in self.tiers.slow}

    # -- inside: matching ----------------------------------------------------------------------------------------------

    def _leave_out_expensive_loads(self, match: ContextMatch) -> dict[int, int]:
        """Take those chunks out of the match that cost more to load than to compute again.

        Returns their positions and how many tokens of each were valid. See CostModel.is_loaded for the rule.
        """
        not_loaded = {}
        for position, chunk, num_valid in match.outside_primary_tier():
            is_near = chunk.blocks[1] is not None  # else it is in a slow tier, from which no step loads
            if not is_near or not self._cost_model.is_loaded(self._secondary.name, position, num_valid):
                not_loaded[position] = num_valid
                match.leave_out(position)
        return not_loaded

    def _select_own_tails(self, request: Request, match: ContextMatch) -> set[int]:
        """Positions of the tails that the request may write on in place.

        They are not pinned, and the request's own conversation left them.
        """
        return {
            position
            for position, (chunk, _) in match.tails.items()
            if chunk.num_tokens < self.chunk_size and not chunk.pins and chunk.owner_id == request.conversation_id
        }

    def _count_taken_blocks(self, request: Request, kept: Sequence[Chunk]) -> int:
        """All of the request's row but those of the chunks it keeps that are pinned already."""
        num_pinned = sum(chunk.blocks[0] is not None and chunk.pins > 0 for chunk in kept)
        return self.num_chunks(request.num_tokens) - num_pinned

    def _is_returning(self, request: Request, match: ContextMatch, not_loaded: Mapping[int, int]) -> bool:
        """Whether most of the prompt has been here before: what follows it will be asked for again, too."""
        num_known = match.num_cached_tokens + sum(not_loaded.values()) + sum(match.dropped.values())
        return 2 * num_known >= request.num_prompt_tokens

    def _account(self, request: Request, match: ContextMatch, not_loaded: Mapping[int, int]) -> ContextAccount:
        def count_prompt_tokens(num_tokens: Mapping[int, int]) -> int:
            """Of `num_tokens` leading tokens of the chunk at each position, those that belong to the prompt."""
            left = [min(num, request.num_prompt_tokens - p * self.chunk_size) for p, num in num_tokens.items()]
            return sum(num for num in left if num > 0)

        loaded: dict[str, dict[int, int]] = {}
        for position, chunk, num_valid in match.outside_primary_tier():
            tier = self._secondary.name if chunk.key is None else request.loads.get(chunk.key, self._secondary.name)
            loaded.setdefault(tier, {})[position] = num_valid
        return ContextAccount(
            loaded_tokens={tier: num for tier, tokens in loaded.items() if (num := count_prompt_tokens(tokens))},
            num_not_loaded_tokens=count_prompt_tokens(not_loaded),
            num_dropped_tokens=count_prompt_tokens(match.dropped),
        )

    # -- inside: rows --------------------------------------------------------------------------------------------------

    def _load(self, chunk: Chunk, now: float) -> None:
        """A block of the primary tier for a pinned chunk, and its swap-in, unless it has one."""
        if chunk.blocks[0] is None:
            chunk.blocks[0] = self.allocator.new_block(now)
            self.transfers.plan_swap_in(chunk, chunk)

    def _take_over(self, chunk: Chunk, now: float) -> None:
        """Make a pinned tail its new writer's alone. Its copies in other tiers, if any, will be stale."""
        self.index.remove(chunk)
        if chunk.blocks[0] is None:
            self._load(chunk, now)
        else:
            self.tiers.free_copies(chunk)

    def _arrived_block(self, chunk: Chunk) -> int | None:
        return None if chunk in self._primary.arriving else chunk.blocks[0]

    def _copy(self, source: Chunk, source_block: int | None, target: Chunk) -> None:
        """Fill a new chunk from `source`: from its block as it was before the step, or else from the secondary tier."""
        if source_block is not None:
            self.transfers.plan_local_copy(source_block, target)
        else:
            self.transfers.plan_swap_in(source, target)

    def _merge(self, request: Request, chunk: Chunk, key: bytes) -> None:
        """Make one of two equal chunks, the named one and `chunk`, which has just been computed.

        If the named one has no block in the primary tier, it gets this one's; else the row keeps its own chunk, unnamed.
        """
        named = self.index.match(key)
        if named is None or named is chunk or named.blocks[0] is not None:
            return
        self.tiers.pin(named)
        named.is_to_store = True
        named.blocks[0], chunk.blocks[0] = chunk.blocks[0], None
        self.tiers.note_spare_copies(named)
        request.chunks[chunk.position] = named

    def _try_name(self, request: Request, chunk: Chunk) -> None:
        """Name a chunk that is not named at the end of its request, as far as the context goes.

        That is the tail, or a full chunk that had a twin. It stays unnamed if nothing of it is valid or the twin is
        still there.
        """
        start = chunk.position * self.chunk_size
        chunk.num_tokens = max(0, min(chunk.num_tokens, request.num_tokens - start))
        if chunk.num_tokens > 0:
            parent = self._matcher.parent_key(request, chunk.position)
            key = chunk_key(parent, request.token_ids[start : start + chunk.num_tokens])
            chunk.owner_id = request.conversation_id
            is_named = self.index.insert(chunk, key, parent)
            if is_named and self.events is not None and chunk.num_tokens == self.chunk_size:
                self.events.note_stored(key, parent, request.token_ids[start : start + self.chunk_size], chunk.position)

    def _explain(self, request: Request, match: ContextMatch, not_loaded: Mapping[int, int]) -> tuple[Miss, ...]:
        """Why the pending tokens of the prompt are, neighbours of one reason and time together."""
        misses: list[Miss] = []
        size = self.chunk_size
        for start, end in request.pending:
            for position in range(start // size, -(-min(end, request.num_prompt_tokens) // size)):
                drop = self.index.why_dropped(request.chunk_keys[position]) if position in match.dropped else None
                reason = "not_loaded" if position in not_loaded else "new" if drop is None else drop.reason
                miss = Miss(
                    max(start, position * size),
                    min(end, (position + 1) * size, request.num_prompt_tokens),
                    reason,
                    None if drop is None else drop.time_s,
                )
                if misses and misses[-1].end == miss.start and misses[-1][2:] == miss[2:]:
                    miss = miss._replace(start=misses.pop().start)
                misses.append(miss)
        return tuple(misses)

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

    # -- proof ---------------------------------------------------------------------------------------------------------

    def check_integrity(self, requests: Iterable[Request], now: float | None = None) -> None:
        """Raises AssertionError unless the books balance. O(everything).

        Every block of each tier is exactly one of free or owned by one chunk, pins count the rows and the transfers that
        use a chunk, and unpinned chunks are filed where their blocks say.

        requests: all that hold a row. now: to check hints, too.
        """
        pins: dict[Chunk, int] = {}
        for request in requests:
            for position, chunk in enumerate(request.chunks):
                assert chunk.position == position, f"{request} holds {chunk} at {position}"
                assert chunk.blocks[0] is not None, f"{request} holds {chunk}"
                pins[chunk] = pins.get(chunk, 0) + 1
        for chunk in self.transfers.check_integrity():
            pins[chunk] = pins.get(chunk, 0) + 1
        self.index.check_integrity()
        named = set(self.index)
        chunks = named | pins.keys()
        for chunk in chunks:
            assert chunk.pins == pins.get(chunk, 0), f"{chunk} is pinned by {pins.get(chunk, 0)}"
            assert any(block is not None for block in chunk.blocks), f"{chunk} has no block"
            assert 0 <= chunk.num_tokens <= self.chunk_size
            assert (chunk.key is not None) == (chunk in named)
        self.tiers.check_integrity(named, chunks)
        self.slow_transfers.check_integrity()
        if self.retention is not None and now is not None:
            self.retention.check_integrity(named, now)
        if self.handover is not None:
            self.handover.check_integrity()
