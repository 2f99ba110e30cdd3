"""A state machine drives the cache manager as a scheduler would, against a model of what lies in every block of all tiers.

The truth is a label for each slot: which token context the KV in it belongs to. A wrong match, a stale block, a shared
block that is written, a copy with the wrong source or at the wrong time shows as a slot with the wrong label. Steps are
executed in the order that StepPlan states, or fail half-way, or find that a block in the CPU tier was corrupted. With slow
tiers, their transfers end at any time between two calls, in any order, or fail.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.cache.cache_manager import CacheManager
from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import EVICTION_POLICIES
from engine.core.cache.index import Chunk, chunk_key, root_key
from engine.core.cache.transfers import StepTransfers
from engine.core.config import CacheConfig
from engine.core.handover import FoundChunks, records_of
from engine.core.plan import BlockCopy, ChunkRecord, SlowTransfer, TransferEnd
from engine.core.request import ContextAccount, Request, SamplingParams
from engine.core.stats import EngineStats
from engine.core.tier_table import PEER, TierSpec

CHUNK_SIZE = 4
MAX_TOKENS = 22
MODEL = "a model"
SYSTEM_PROMPT = (1, 1, 2, 2, 1)
TENANTS = ("acme", "umbrella")
COSTS = CostModel(constant=1.0, per_context_token=0.25, chunk_size=CHUNK_SIZE)  # 2, 3, 4, ... for chunks 0, 1, 2, ...

settings.register_profile(
    "default-machine",
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("nightly", settings.get_profile("default-machine"), max_examples=2000)

# Whose context the KV of a slot belongs to: the tenant, and all tokens up to and including that position.
Label = tuple[str, tuple[int, ...]]
GARBAGE: Label = ("nobody", ())

tokens = st.lists(st.integers(1, 2), min_size=1, max_size=7).map(tuple)


def label(request: Request, position: int) -> Label:
    return request.tenant, tuple(request.token_ids[: position + 1])


def key_of(tenant: str, token_ids: tuple[int, ...]) -> bytes:
    """The key of the chunk that ends with the last of `token_ids`, from nothing but the definition."""
    key = root_key(MODEL, "", tenant)
    for start in range(0, len(token_ids), CHUNK_SIZE):
        key = chunk_key(key, token_ids[start : start + CHUNK_SIZE])
    return key


Segment = tuple[Request, int, int]
Slots = list[list[Label]]

# The watermark, the most swap-outs of the step, and whether they run as late as they may.
swap_outs = st.tuples(st.integers(0, 12), st.sampled_from([0, 0, 1, 3]), st.booleans())


class CacheManagerMachine(RuleBasedStateMachine):
    """One plan at a time: releases and appended blocks first, then admissions, ahead-of-time swap-outs, then the step."""

    SLOW_TIERS: tuple[str, ...] = ()  # a tier of peers comes last
    KV_HINTS = "off"

    @initialize(
        num_blocks=st.integers(6, 10),
        num_cpu_blocks=st.integers(0, 7),
        policy=st.sampled_from(EVICTION_POLICIES),
        swap_in_cost=st.sampled_from([0.0, 0.0, 1.0, 2.5]),
        write_through=st.booleans(),
        keep=st.integers(0, 9),
        slow_sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        load_cost=st.sampled_from([0.0, 0.0, 0.0, 2.5]),
        stores_first_use=st.sampled_from([True, True, True, False]),
        contexts=st.lists(st.lists(st.integers(1, 2), min_size=6, max_size=18), min_size=2, max_size=8),
    )
    def start(
        self,
        num_blocks: int,
        num_cpu_blocks: int,
        policy: str,
        swap_in_cost: float,
        write_through: bool,
        keep: int,
        slow_sizes: tuple[int, int],
        load_cost: float,
        stores_first_use: bool,
        contexts: list[list[int]],
    ) -> None:
        self.keep = keep > 0  # one example in ten is stateless
        self.costs = replace(COSTS, load_costs={"cpu": swap_in_cost, **dict.fromkeys(self.SLOW_TIERS, load_cost)})
        self.write_through = write_through
        num_cpu_blocks = max(num_cpu_blocks, bool(self.SLOW_TIERS)) if self.keep else 0
        slow_tiers = tuple(
            TierSpec(
                name=name,
                num_blocks=size,
                is_fast=False,
                stores_first_use=stores_first_use,
                is_store=name != PEER,
            )
            for name, size in zip(self.SLOW_TIERS, slow_sizes, strict=False)
        )
        self.config = config = CacheConfig(
            chunk_size=CHUNK_SIZE,
            num_gpu_blocks=num_blocks,
            num_cpu_blocks=num_cpu_blocks,
            eviction_policy=policy if self.KV_HINTS == "off" else "retention_value",
            kv_hints=self.KV_HINTS,
            cost_model=self.costs,
            model=MODEL,
            keep=self.keep,
            write_through=write_through,
            slow_tiers=slow_tiers,
        )
        self.stats = EngineStats([tier.name for tier in config.tiers])
        self.cache = CacheManager(config, self.stats)
        self.slots: Slots = [[GARBAGE] * CHUNK_SIZE for _ in range(num_blocks)]
        self.cpu_slots: Slots = [[GARBAGE] * CHUNK_SIZE for _ in range(num_cpu_blocks)]
        self.slow_slots: dict[str, Slots] = {
            tier.name: [[GARBAGE] * CHUNK_SIZE for _ in range(tier.num_blocks)] for tier in slow_tiers
        }
        # What each block's content says of itself, for the process after this one; evicted chunks included.
        self.slow_records: dict[str, dict[int, ChunkRecord]] = {tier.name: {} for tier in slow_tiers}
        self.slow_in_flight: dict[int, tuple[SlowTransfer, list[Label]]] = {}  # with what the source held
        self.num_slow_ended = dict.fromkeys(self.stats.slow_transfers, 0)
        self.loading: dict[Request, set[int]] = {}  # requests that wait for slow transfers
        self.asked: dict[bytes, int] = {}  # how often peers asked for a chunk since it was last sent or declined
        self.offers: set[str] = set()  # of peers, not ended yet
        self.corrupted: set[int] = set()  # CPU blocks that do not hold what was swapped out to them
        self.names: dict[bytes, Label] = {}  # what each key must mean
        self.cached_once: set[Label] = set()  # contexts up to the end of each full chunk that was ever cached
        self.now = 0.0
        self.is_held_back = False
        self.num_requests = 0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.tables: dict[str, list[int | None]] = {}  # block tables, as a worker was told them
        self.histories: list[tuple[str, str, tuple[int, ...]]] = []  # tenant, conversation, tokens of a finished turn
        self.starts: list[Request] = []  # admitted in the plan being made
        self.num_copies = dict.fromkeys(("evictions", "local_copies", "swap_ins", "swap_outs"), 0)
        self.num_corrupted_swaps = 0
        for number, context in enumerate(contexts):
            self.add(TENANTS[0], f"c{number}", tuple(context))
            self.all_run_to_their_end([1, 2] * 4, 3, (0, 0, False))
            self.after_each_context()

    def after_each_context(self) -> None:
        """To bring the machine into an interesting state before its first rule."""

    # -- requests arrive -----------------------------------------------------------------------------------------------

    def add(self, tenant: str, conversation: str, token_ids: tuple[int, ...]) -> None:
        self.num_requests += 1
        request = Request(
            f"r{self.num_requests}",
            token_ids[:MAX_TOKENS],
            SamplingParams(),
            conversation_id=conversation,
            tenant=tenant,
        )
        for length in range(1, request.num_tokens + 1):
            self.learn_name(tenant, tuple(request.token_ids[:length]))
        self.waiting.append(request)

    def learn_name(self, tenant: str, token_ids: tuple[int, ...]) -> None:
        self.names[key_of(tenant, token_ids)] = tenant, token_ids

    @rule(tenant=st.sampled_from(TENANTS), conversation=st.sampled_from("ab"), new=tokens, with_system=st.booleans())
    def a_new_context_arrives(self, tenant: str, conversation: str, new: tuple[int, ...], with_system: bool) -> None:
        self.add(tenant, conversation, (SYSTEM_PROMPT if with_system else ()) + new)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), new=tokens)
    def a_conversation_goes_on(self, data: st.DataObject, new: tuple[int, ...]) -> None:
        tenant, conversation, history = data.draw(st.sampled_from(self.histories))
        self.add(tenant, conversation, history + new)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), new=st.lists(st.integers(1, 2), max_size=5).map(tuple), tenant=st.sampled_from(TENANTS))
    def a_fork_arrives(self, data: st.DataObject, new: tuple[int, ...], tenant: str) -> None:
        """Another conversation, perhaps of another tenant, begins with any part of a history, or all of it."""
        _, _, history = data.draw(st.sampled_from(self.histories))
        length = data.draw(st.integers(1, len(history)))
        self.add(tenant, f"fork of {length}", history[:length] + new)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), conversation=st.sampled_from(["a", "b", "c"]), num_cut=st.integers(0, 3))
    def what_was_computed_is_asked_again(self, data: st.DataObject, conversation: str, num_cut: int) -> None:
        tenant, _, history = data.draw(st.sampled_from(self.histories))
        self.add(tenant, conversation, history[: max(1, len(history) - num_cut)])

    @rule(num_gpu_blocks=st.sampled_from([0, 0, 1, 3, 10]), num_cpu_blocks=st.sampled_from([0, 0, 1, 7]))
    def blocks_are_held_back_or_given_back(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        self.cache.allocator.hold_back({"gpu": num_gpu_blocks, "cpu": num_cpu_blocks}, self.now)
        self.is_held_back = num_gpu_blocks + num_cpu_blocks > 0

    # -- the plan ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.running and not self.starts)
    @rule(suspend=st.booleans(), newest=st.booleans(), data=st.data(), idle=st.integers(0, 3))
    def a_request_leaves(self, suspend: bool, newest: bool, data: st.DataObject, idle: int) -> None:
        """Suspended or aborted, between two steps."""
        self.now += idle
        request = self.running[-1] if newest else data.draw(st.sampled_from(self.running))
        self.release(request)
        if suspend:
            self.waiting.insert(0, request)

    def release(self, request: Request, *, step_failed: bool = False) -> None:
        self.running.remove(request)
        if not self.keep:
            self.note_cached(request, 0, CHUNK_SIZE * sum(chunk.num_tokens == CHUNK_SIZE for chunk in request.chunks))
        self.cache.release(request, self.now, step_failed=step_failed)
        assert (request.chunks, request.pending) == ([], [])
        self.histories.append((request.tenant, request.conversation_id, tuple(request.token_ids)))
        del self.histories[:-8]

    @precondition(lambda self: self.waiting)
    @rule(reserve=st.integers(0, 3), idle=st.integers(0, 2))
    def the_oldest_is_admitted(self, reserve: int, idle: int) -> None:
        self.now += idle
        request = self.waiting[0]
        num_cached, account = self.cached_by_brute_force(request)
        before = self.snapshot()
        if not self.cache.try_admit(request, reserve, self.now):
            assert self.snapshot() == before
            assert (request.chunks, request.pending) == ([], [])
            assert self.running or reserve, "a context that fits the tier alone must be admitted"
            return
        assert len(request.chunks) == self.cache.num_chunks(request.num_tokens)
        assert request.num_tokens - request.num_pending_tokens == num_cached
        assert request.account == account
        assert request.pending[-1][1] == request.num_tokens, "the last token is always computed"
        assert all(a[1] < b[0] for a, b in zip(request.pending, request.pending[1:], strict=False))
        assert self.cache.num_available_blocks >= reserve
        request.loads = {}
        self.expect_no_more(request)
        self.waiting.pop(0)
        self.running.append(request)
        self.starts.append(request)
        self.tables[request.request_id] = [chunk.blocks[0] for chunk in request.chunks]

    def note_cached(self, request: Request, start: int, end: int) -> None:
        """The full chunks that end in (start, end] have been computed, and can be found (in stateless mode: have been)."""
        for position in range(start // CHUNK_SIZE, end // CHUNK_SIZE):
            self.cached_once.add((request.tenant, tuple(request.token_ids[: (position + 1) * CHUNK_SIZE])))

    def snapshot(self) -> tuple[object, ...]:
        cache, planned = self.cache, self.cache.transfers.planned
        return (
            [(tier.pool.num_free, dict(tier.lent)) for tier in cache.tiers],
            set(cache.index),
            cache.count_idle_chunks(),
            [len(getattr(planned, name)) for name in self.num_copies],
            self.stats.as_dict(),
        )

    def cached_by_brute_force(self, request: Request) -> tuple[int, ContextAccount]:
        """Tokens of the context that named chunks hold, the last one left out, by looking at every chunk.

        First those to be used; then, of the prompt, those to be loaded, those that cost more to load than to compute,
        and those that were cached.
        """
        best: dict[int, Chunk] = {}
        for chunk in self.cache.index:
            tenant, token_ids = self.names[chunk.key]
            if (tenant, token_ids) == (request.tenant, tuple(request.token_ids[: len(token_ids)])) and (
                chunk.position not in best or best[chunk.position].num_tokens < chunk.num_tokens
            ):
                best[chunk.position] = chunk
        num_cached = num_left_out = num_dropped = 0
        num_loaded: dict[str, int] = {}
        for position in range(-(-request.num_tokens // CHUNK_SIZE)):
            start, end = position * CHUNK_SIZE, (position + 1) * CHUNK_SIZE
            num_prompt = max(0, request.num_prompt_tokens - start)
            chunk = best.get(position)
            if chunk is None:
                if end <= request.num_tokens and (request.tenant, tuple(request.token_ids[:end])) in self.cached_once:
                    num_dropped += min(CHUNK_SIZE, request.num_tokens - 1 - start, num_prompt)
                continue
            num_usable = min(chunk.num_tokens, request.num_tokens - 1 - start)
            if chunk.blocks[0] is None and num_usable:
                if (
                    chunk.blocks[1] is None
                    or self.costs.load_costs["cpu"] > self.costs.chunk_cost(position) * num_usable / CHUNK_SIZE
                ):
                    num_left_out += min(num_usable, num_prompt)
                    continue
                tier = request.loads.get(chunk.key, "cpu")
                num_loaded[tier] = num_loaded.get(tier, 0) + max(0, min(num_usable, num_prompt))
            num_cached += num_usable
        num_loaded = {tier: num for tier, num in num_loaded.items() if num}
        return num_cached, ContextAccount(num_loaded, num_left_out, num_dropped)

    # -- the step ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.running)
    @rule(
        lengths=st.lists(st.integers(0, 9), min_size=8, max_size=8),
        next_tokens=st.lists(st.integers(1, 2), min_size=8, max_size=8),
        ends=st.lists(st.booleans(), min_size=8, max_size=8),
        swap_outs=swap_outs,
    )
    def a_step_is_computed(
        self, lengths: list[int], next_tokens: list[int], ends: list[bool], swap_outs: tuple[int, int, bool]
    ) -> None:
        self.now += 1
        segments = list(self.plan_segments(lengths))
        self.execute(self.take_plan(swap_outs), segments, is_late=swap_outs[2])
        self.starts = []
        for request, start, end in segments:
            if request not in self.running:
                continue  # read a corrupted block
            self.cache.commit(request, start, end)
            if self.keep:
                self.note_cached(request, start, end)
            if end < request.pending[0][1]:
                request.pending[0] = (end, request.pending[0][1])
            else:
                del request.pending[0]
        for request in list(self.running):
            if request.pending:
                continue
            index = int(request.request_id[1:]) % 8
            request.token_ids.append(next_tokens[index])
            self.learn_name(request.tenant, tuple(request.token_ids))
            request.pending = [(request.num_tokens - 1, request.num_tokens)]
            if ends[index] or request.num_tokens >= MAX_TOKENS:
                self.release(request)
                continue
            self.append_block(request)

    @precondition(lambda self: self.histories and not self.starts)
    @rule(
        arrivals=st.lists(
            st.tuples(
                st.sampled_from(["cpu", "evicted", "loading", "any"]),
                st.integers(0, 9),
                st.sampled_from([(), (1,), (2, 1, 1), (1, 2, 2, 1, 2, 1)]),
                st.booleans(),
            ),
            max_size=4,
        ),
        reserve=st.integers(0, 1),
        lengths=st.lists(st.integers(0, 9), min_size=8, max_size=8),
        next_tokens=st.lists(st.integers(1, 2), min_size=8, max_size=8),
        ends=st.lists(st.booleans(), min_size=8, max_size=8),
        swap_outs=swap_outs,
        outcome=st.sampled_from(["computed", "computed", "failed", "computation failed", "corrupted"]),
    )
    def conversations_go_on_and_a_step_is_made(
        self,
        arrivals: list[tuple[str, int, tuple[int, ...], bool]],
        reserve: int,
        lengths: list[int],
        next_tokens: list[int],
        ends: list[bool],
        swap_outs: tuple[int, int, bool],
        outcome: str,
    ) -> None:
        """What the rules above and below do one by one, together, because it takes several requests in one plan."""
        for where, number, new, is_fork in arrivals:
            tenant, conversation, history = self.find_history(where, number)
            kept = history[: max(1, len(history) - max(0, number - 4))]
            self.add(tenant, f"fork of {conversation}" if is_fork else conversation, kept + new)
            self.waiting.insert(0, self.waiting.pop())
            self.the_oldest_is_admitted(reserve if self.running else 0, idle=1)
            self.the_books_balance()
            self.chunks_hold_what_their_names_say()
        if not self.running:
            return
        if outcome.endswith("failed"):
            self.a_step_fails(lengths, swap_outs, are_copies_made=outcome == "computation failed")
            return
        if outcome == "corrupted":
            planned = self.cache.transfers.planned
            on_its_way = {copy.target for _, copy in planned.evictions}
            for source in [copy.source for _, _, copy in planned.swap_ins if copy.source not in on_its_way][:2]:
                self.corrupt(source)
        self.a_step_is_computed(lengths, next_tokens, ends, swap_outs)

    def find_history(self, where: str, number: int) -> tuple[str, str, tuple[int, ...]]:
        """A finished turn, or the context of a chunk that is where `where` says.

        That is one that this very plan evicts or loads, or that is not in the GPU tier.
        """
        planned = self.cache.transfers.planned
        chunks = {
            "any": [],
            "evicted": [chunk for chunk, _ in planned.evictions],
            "loading": [target for _, target, _ in planned.swap_ins],
            "cpu": sorted(
                (chunk for chunk in self.cache.index if chunk.blocks[0] is None),
                key=lambda chunk: [-1 if block is None else block for block in chunk.blocks],
            ),
        }[where]
        chunks = [chunk for chunk in chunks if chunk.key is not None]
        if not chunks:
            return self.histories[number % len(self.histories)]
        chunk = chunks[number % len(chunks)]
        return self.names[chunk.key][0], chunk.owner_id or "nobody's", self.names[chunk.key][1]

    @precondition(lambda self: not self.running and self.cache.count_idle_chunks()["gpu"])
    @rule(swap_outs=swap_outs, fails=st.booleans(), idle=st.integers(0, 2))
    def blocks_move_while_nobody_runs(self, swap_outs: tuple[int, int, bool], fails: bool, idle: int) -> None:
        self.now += idle
        transfers = self.take_plan(swap_outs)
        assert not transfers.swap_ins
        assert not transfers.local_copies
        if fails:
            self.fail(transfers, [], are_copies_made=False)
        else:
            self.execute(transfers, [], is_late=swap_outs[2])

    def take_plan(self, swap_outs: tuple[int, int, bool]) -> StepTransfers:
        """Plan the ahead-of-time swap-outs, and take all transfers."""
        watermark, limit, _ = swap_outs
        cache = self.cache
        idle = {chunk for chunk in cache.index if not chunk.pins and chunk.blocks[1] is None}
        num_wanted = watermark - cache.tiers.primary.pool.num_free - cache.count_idle_chunks()["both"]
        cache.allocator.plan_swap_outs(watermark, limit, self.now)
        cache.allocator.plan_stores(watermark / 12, limit, self.now)
        self.the_books_balance()
        self.chunks_hold_what_their_names_say()
        planned = [chunk for chunk, _ in cache.transfers.planned.swap_outs]
        self.plan_handover()
        self.take_slow_transfers()
        transfers = cache.transfers.take()
        assert len(planned) <= (limit if self.write_through or num_wanted > 0 else 0)
        assert len(planned) == len(set(planned))
        # One that lost its copy to another one may be next.
        assert all(chunk in idle or self.stats.evictions["cpu_copy_dropped"] for chunk in planned)
        for name in self.num_copies:
            self.num_copies[name] += len(getattr(transfers, name))
        return transfers

    def execute(self, transfers: StepTransfers, segments: list[Segment], *, is_late: bool) -> None:
        """The step as StepPlan orders it, then what EngineCore makes of its result."""
        move(self.slots, self.cpu_slots, self.corrupted, transfers, swap_outs=not is_late)
        failed = [copy.target for _, _, copy in transfers.swap_ins if copy.source in self.corrupted]
        misled = [request for request in self.running if not set(self.tables[request.request_id]).isdisjoint(failed)]
        for request in self.running:
            if request not in misled:
                self.check_content(request)
        for request, start, end in segments:
            for position in range(start, end):
                self.write(request, position, GARBAGE if request in misled else label(request, position))
        if is_late:
            move_out(self.slots, self.cpu_slots, self.corrupted, transfers.swap_outs)
        reached = [self.cache.transfers.fail_swap_in(gpu_block, self.now) for gpu_block in failed]
        self.num_corrupted_swaps += len(failed)
        for request in reversed(list(self.running)):
            if not set(reached).isdisjoint(request.chunks):
                misled.remove(request)
                self.running.remove(request)
                self.cache.release(request, self.now, step_failed=True)
                self.waiting.insert(0, request)
        assert not misled, "a request has read a corrupted block and goes on"
        self.cache.transfers.complete()

    def take_slow_transfers(self) -> None:
        """They begin: until they end, their targets hold garbage."""
        for transfer in self.cache.slow_transfers.take():
            copy = transfer.copy
            source, target = self.slots_of(copy.source_tier), self.slots_of(copy.target_tier)
            assert not any(copy.target == other.copy.target for other in self.open_transfers(copy.target_tier))
            if copy.target_tier == PEER:
                del self.asked[transfer.key]
                num_tokens = transfer.record.num_tokens
                if copy.source not in self.corrupted:
                    assert source[copy.source][:num_tokens] == self.labels_of(transfer.key)
            self.slow_in_flight[transfer.transfer_id] = (transfer, source[copy.source][:])
            target[copy.target] = [GARBAGE] * CHUNK_SIZE
            if copy.target_tier == "cpu":
                self.corrupted.discard(copy.target)
            else:
                self.slow_records[copy.target_tier].pop(copy.target, None)

    def end_slow_transfer(self, transfer_id: int, *, ok: bool) -> None:
        """Not ok: nothing has arrived; a corrupted block is never stored."""
        transfer, before = self.slow_in_flight.pop(transfer_id)
        copy = transfer.copy
        is_load = copy.target_tier == "cpu"
        source, target = self.slots_of(copy.source_tier), self.slots_of(copy.target_tier)
        ok = ok and (is_load or copy.source not in self.corrupted)
        if ok:
            assert source[copy.source] == before, "the source of a transfer has changed"
            target[copy.target] = before
            if not is_load:
                self.slow_records[copy.target_tier][copy.target] = transfer.record
        else:
            assert target[copy.target] == [GARBAGE] * CHUNK_SIZE, "something else was written to the target"
            if is_load:
                source[copy.source] = [GARBAGE] * CHUNK_SIZE  # lost
                self.slow_records[copy.source_tier].pop(copy.source, None)
        tier = copy.source_tier if is_load else copy.target_tier
        gone = not ok and transfer_id % 2 > 0
        end = "gone" if gone and tier == PEER else "failed"
        if is_load:
            outcome = "loaded" if ok else f"load_{end}"
        elif tier == PEER:
            outcome = "sent" if ok else f"send_{end}"
        else:
            outcome = "stored" if ok else f"store_{end}"
        self.num_slow_ended[f"{tier}_{outcome}"] += 1
        self.cache.complete_transfer(TransferEnd(transfer_id, ok, gone=gone), self.now)
        for request, transfer_ids in list(self.loading.items()):
            transfer_ids.discard(transfer_id)
            if not transfer_ids:
                del self.loading[request]
                self.waiting.insert(0, request)

    def open_transfers(self, target_tier: str) -> list[SlowTransfer]:
        return [transfer for transfer, _ in self.slow_in_flight.values() if transfer.copy.target_tier == target_tier]

    def labels_of(self, key: bytes) -> list[Label]:
        """What the chunk of that name holds."""
        tenant, token_ids = self.names[key]
        start = (len(token_ids) - 1) // CHUNK_SIZE * CHUNK_SIZE
        return [(tenant, token_ids[: position + 1]) for position in range(start, len(token_ids))]

    def plan_handover(self) -> None:
        handover = self.cache.handover
        if handover is None:
            return
        handover.plan(self.now)
        self.the_books_balance()
        self.chunks_hold_what_their_names_say()
        for key in handover.take_declined():
            del self.asked[key]
        self.offers.difference_update(handover.take_ended_offers())

    def expect_no_more(self, request: Request) -> None:
        if self.cache.handover is not None:
            self.cache.handover.forget(request.request_id)

    def slots_of(self, tier: str) -> Slots:
        return {"gpu": self.slots, "cpu": self.cpu_slots, **self.slow_slots}[tier]

    def append_block(self, request: Request) -> None:
        """A decode that needs a block gets it, or is suspended for want of one."""
        if self.cache.num_chunks(request.num_tokens) == len(request.chunks):
            return
        before = self.snapshot()
        block_id = self.cache.try_append_block(request, self.now)
        if block_id is not None:
            self.tables[request.request_id].append(block_id)
        else:
            assert self.snapshot() == before
            assert self.cache.num_available_blocks == 0
            self.release(request)
            self.waiting.insert(0, request)

    @rule(
        next_tokens=st.lists(st.integers(1, 2), min_size=8, max_size=8),
        answer_len=st.integers(1, 6),
        swap_outs=swap_outs,
    )
    def all_run_to_their_end(self, next_tokens: list[int], answer_len: int, swap_outs: tuple[int, int, bool]) -> None:
        for num_steps in range(200):
            if not self.waiting and not self.running:
                return
            if self.waiting:
                self.the_oldest_is_admitted(reserve=1 if self.running else 0, idle=1)
            self.the_books_balance()
            if self.running:
                self.a_step_is_computed([9] * 8, next_tokens, [num_steps % answer_len == 0] * 8, swap_outs)
        raise AssertionError("a request waits for ever")

    @precondition(lambda self: self.running)
    @rule(
        lengths=st.lists(st.integers(0, 9), min_size=8, max_size=8), swap_outs=swap_outs, are_copies_made=st.booleans()
    )
    def a_step_fails(self, lengths: list[int], swap_outs: tuple[int, int, bool], are_copies_made: bool) -> None:
        """Whatever the step was to compute, and unless `are_copies_made` to copy, may hold anything; its requests end."""
        self.now += 1
        segments = list(self.plan_segments(lengths))
        self.fail(self.take_plan(swap_outs), segments, are_copies_made=are_copies_made)
        self.starts = []
        for request in self.running:
            self.check_content(request)

    def fail(self, transfers: StepTransfers, segments: list[Segment], *, are_copies_made: bool) -> None:
        named = set(self.cache.index)
        arriving = {target for _, target, _ in transfers.swap_ins}
        store_of = self.cache.tiers.store_of
        lost = {chunk for chunk, _ in transfers.evictions if store_of(chunk) is None or chunk in arriving}
        if are_copies_made and not any(copy.source in self.corrupted for _, _, copy in transfers.swap_ins):
            move(self.slots, self.cpu_slots, self.corrupted, transfers, swap_outs=True)
            lost = set()
            self.cache.transfers.complete()
        else:
            for copy in (*transfers.local_copies, *(copy for _, _, copy in transfers.swap_ins)):
                self.slots[copy.target] = [GARBAGE] * CHUNK_SIZE
            for _, copy in (*transfers.evictions, *transfers.swap_outs):
                self.cpu_slots[copy.target] = [GARBAGE] * CHUNK_SIZE
            self.cache.transfers.abort(self.now)
        for request, start, end in segments:
            for position in range(start, end):
                self.write(request, position, GARBAGE)
        for request in dict.fromkeys(request for request, _, _ in segments):
            self.release(request, step_failed=True)
        assert self.is_held_back or set(self.cache.index) == named - lost, (
            "lost are only those whose only copy was on its way"
        )

    @precondition(
        lambda self: not self.cache.transfers.planned and any(chunk.blocks[1] is not None for chunk in self.cache.index)
    )
    @rule(data=st.data())
    def a_block_in_the_cpu_tier_is_corrupted(self, data: st.DataObject) -> None:
        in_use = sorted(chunk.blocks[1] for chunk in self.cache.index if chunk.blocks[1] is not None)
        block_id = data.draw(st.sampled_from(in_use))
        self.corrupt(block_id)

    def corrupt(self, cpu_block: int) -> None:
        self.cpu_slots[cpu_block] = [GARBAGE] * CHUNK_SIZE
        self.corrupted.add(cpu_block)

    def plan_segments(self, lengths: list[int]) -> Iterator[tuple[Request, int, int]]:
        """As the scheduler does: pending ranges front first; a request that is admitted computes something at once."""
        for index, request in enumerate(self.running):
            budget = lengths[index % 8]
            if request in self.starts:
                budget = max(1, budget)
            for start, end in request.pending:
                length = min(end - start, budget)
                if length:
                    yield request, start, start + length
                    budget -= length

    def write(self, request: Request, position: int, content: Label) -> None:
        chunk = request.chunks[position // CHUNK_SIZE]
        assert chunk.key is None, "a chunk that others may use is written"
        assert sum(chunk in other.chunks for other in self.running) == 1
        block_id = self.tables[request.request_id][position // CHUNK_SIZE]
        assert block_id is not None
        self.slots[block_id][position % CHUNK_SIZE] = content

    # -- the truth -----------------------------------------------------------------------------------------------------

    def check_content(self, request: Request) -> None:
        """Every position that is not pending has the right KV."""
        pending = {position for start, end in request.pending for position in range(start, end)}
        for position in set(range(request.num_tokens)) - pending:
            block_id = self.tables[request.request_id][position // CHUNK_SIZE]
            assert block_id is not None
            assert self.slots[block_id][position % CHUNK_SIZE] == label(request, position), (request, position)

    @invariant()
    def the_books_balance(self) -> None:
        self.cache.check_integrity(self.running, self.now)

    @invariant()
    def workers_know_the_block_tables(self) -> None:
        for request in self.running:
            assert self.tables[request.request_id] == [chunk.blocks[0] for chunk in request.chunks]

    @invariant()
    def chunks_hold_what_their_names_say(self) -> None:
        """In both tiers, now where nothing is on its way there, and after the transfers of the plan being made."""
        planned = self.cache.transfers.planned
        slots, cpu_slots, corrupted = (
            [row[:] for row in self.slots],
            [row[:] for row in self.cpu_slots],
            set(self.corrupted),
        )
        move(slots, cpu_slots, corrupted, planned, swap_outs=True)
        swapped_out = {copy.target for _, copy in (*planned.evictions, *planned.swap_outs)}
        swapped_in = {copy.target: copy.source for _, _, copy in planned.swap_ins}
        for chunk in self.cache.index:
            tenant, token_ids = self.names[chunk.key]
            start, size = chunk.position * CHUNK_SIZE, chunk.num_tokens
            assert len(token_ids) == start + size
            expected = [(tenant, token_ids[: position + 1]) for position in range(start, start + size)]
            if chunk.blocks[0] is not None and swapped_in.get(chunk.blocks[0]) not in corrupted:
                assert slots[chunk.blocks[0]][:size] == expected, chunk
                if chunk.blocks[0] not in swapped_in:
                    assert self.slots[chunk.blocks[0]][:size] == expected, chunk
            for block_id, tier_slots in zip(chunk.blocks[2:], self.slow_slots.values(), strict=True):
                assert block_id is None or tier_slots[block_id][:size] == expected, chunk
            if chunk.blocks[1] is not None and chunk.blocks[1] not in corrupted:
                assert cpu_slots[chunk.blocks[1]][:size] == expected, chunk
                if chunk.blocks[1] not in swapped_out:
                    assert self.cpu_slots[chunk.blocks[1]][:size] == expected, chunk

    @invariant()
    def counts_conserve(self) -> None:
        num_copies, stats = self.num_copies, self.stats
        assert stats.num_swap_ins == num_copies["swap_ins"]
        assert stats.num_local_copies == num_copies["local_copies"]
        assert stats.num_swap_outs == num_copies["evictions"] + num_copies["swap_outs"]
        num_evictions = num_copies["evictions"] + len(self.cache.transfers.planned.evictions)
        assert stats.evictions["gpu_swapped_out"] == num_evictions
        assert stats.num_corrupted_swaps == self.num_corrupted_swaps
        assert stats.slow_transfers == self.num_slow_ended
        if not self.cache.tiers.secondary.pool.num_blocks:
            assert sum(stats.evictions.values()) == stats.evictions["gpu_dropped"]

    @invariant()
    def stateless_shares_and_keeps_nothing(self) -> None:
        if self.keep:
            return
        assert not len(self.cache.index)
        assert not self.cache.transfers.planned
        num_held = self.cache.count_held_blocks()["gpu"]
        assert self.cache.tiers.primary.pool.num_used == num_held + sum(len(request.chunks) for request in self.running)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.take_slow_transfers()
        for transfer_id in list(self.slow_in_flight):
            self.end_slow_transfer(transfer_id, ok=True)
        if self.running:
            self.a_step_is_computed([9] * 8, [1] * 8, [True] * 8, (0, 0, False))
        for request in list(self.running):
            self.release(request)
        if self.cache.transfers.planned:
            self.blocks_move_while_nobody_runs((0, 0, False), fails=False, idle=0)
        self.cache.check_integrity([])
        self.chunks_hold_what_their_names_say()
        cache, idle = self.cache, self.cache.count_idle_chunks()
        assert cache.num_available_blocks == cache.tiers.primary.pool.num_blocks
        self.take_slow_transfers()
        for transfer_id in list(self.slow_in_flight):
            self.end_slow_transfer(transfer_id, ok=True)
        idle = cache.count_idle_chunks()
        num_far = sum(not any_block(chunk.blocks[:2]) for chunk in cache.index)
        assert idle["gpu"] + idle["both"] + idle["cpu"] + num_far == len(cache.index)
        for tier in cache.tiers.slow:
            assert tier.pool.num_used == idle[tier.name]
        held = cache.count_held_blocks()
        assert cache.tiers.primary.pool.num_used == idle["gpu"] + idle["both"] + held["gpu"]
        assert cache.tiers.secondary.pool.num_used == idle["cpu"] + idle["both"] + held["cpu"]


class SlowTiersMachine(CacheManagerMachine):
    """The same with a slow tier."""

    SLOW_TIERS = ("dict",)

    def after_each_context(self) -> None:
        if self.slow_slots:
            self.everything_moves_down(2)

    @precondition(lambda self: self.waiting and self.slow_slots)
    @rule(idle=st.integers(0, 2))
    def the_oldest_waits_for_a_slow_tier(self, idle: int) -> None:
        self.now += idle
        request = self.waiting[0]
        tried = set(request.loads)
        wait = self.cache.start_loads(request, self.now)
        for key in request.loads.keys() - tried:
            tenant, token_ids = self.names[key]
            assert (tenant, token_ids) == (request.tenant, tuple(request.token_ids[: len(token_ids)]))
        self.take_slow_transfers()
        if wait is None:
            return
        assert wait.transfer_ids or self.cache.slow_transfers.num_loads, "nothing to wait for"
        assert wait.transfer_ids <= self.slow_in_flight.keys()
        self.loading[self.waiting.pop(0)] = wait.transfer_ids

    @precondition(lambda self: self.loading)
    @rule(aborts=st.booleans())
    def a_request_waits_no_longer(self, aborts: bool) -> None:
        request = next(iter(self.loading))
        del self.loading[request]
        if aborts:
            self.expect_no_more(request)
        else:
            self.waiting.insert(0, request)

    @precondition(lambda self: self.slow_in_flight)
    @rule(number=st.integers(0, 20), ok=st.sampled_from([True, True, True, False]), idle=st.integers(0, 1))
    def a_slow_transfer_ends(self, number: int, ok: bool, idle: int) -> None:
        self.now += idle
        self.end_slow_transfer(list(self.slow_in_flight)[number % len(self.slow_in_flight)], ok=ok)

    @precondition(lambda self: self.slow_slots and self.cache.count_idle_chunks()["cpu"])
    @rule(ok=st.booleans())
    def what_lies_in_the_cpu_tier_is_stored(self, ok: bool) -> None:
        self.now += 1
        self.cache.allocator.plan_stores(1.0, 16, self.now)
        self.take_slow_transfers()
        for transfer_id in list(self.slow_in_flight):
            self.end_slow_transfer(transfer_id, ok=ok or transfer_id % 2 > 0)

    @precondition(lambda self: not self.running and not self.starts and self.slow_slots)
    @rule(num_rounds=st.integers(1, 4))
    def everything_moves_down(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            self.now += 2
            if self.cache.count_idle_chunks()["gpu"]:
                self.blocks_move_while_nobody_runs((12, 3, False), fails=False, idle=0)
            self.what_lies_in_the_cpu_tier_is_stored(ok=True)

    @precondition(lambda self: self.slow_slots and any(not any_block(chunk.blocks[:2]) for chunk in self.cache.index))
    @rule(
        number=st.integers(0, 9),
        new=tokens,
        is_fork=st.booleans(),
        arrives=st.sampled_from(["all", "all", "half", "none"]),
    )
    def a_conversation_in_the_slow_tier_goes_on(
        self, number: int, new: tuple[int, ...], is_fork: bool, arrives: str
    ) -> None:
        """It waits until all of it is there, or is lost."""
        chunks = [chunk for chunk in self.cache.index if not any_block(chunk.blocks[:2])]
        chunk = max(chunks, key=lambda chunk: (chunk.position + number) % 7)
        tenant, token_ids = self.names[chunk.key]
        self.add(tenant, "fork" if is_fork else chunk.owner_id or "nobody's", token_ids + new)
        request = self.waiting.pop()
        self.waiting.insert(0, request)
        for _ in range(20):
            self.the_oldest_waits_for_a_slow_tier(1)
            if request not in self.loading:
                break
            while request in self.loading:
                transfer_id = max(self.loading[request] or self.slow_in_flight)
                ok = arrives == "all" or (arrives == "half" and transfer_id % 2 > 0)
                self.end_slow_transfer(transfer_id, ok=ok)
                self.the_books_balance()
                self.chunks_hold_what_their_names_say()
            self.waiting.remove(request)
            self.waiting.insert(0, request)
        assert request not in self.loading, "a request loads for ever"
        self.the_oldest_is_admitted(reserve=0, idle=0)

    @precondition(lambda self: self.slow_slots and self.keep and not self.starts)
    @rule(drains=st.booleans(), at_once=st.booleans())
    def the_process_ends_and_another_one_starts(self, drains: bool, at_once: bool) -> None:
        """It knows what lies in the slow tiers and nothing else; transfers under way have left nothing."""
        for request in list(self.running):
            self.release(request)
        self.waiting, self.loading = [], {}
        if self.cache.transfers.planned:
            self.blocks_move_while_nobody_runs((0, 0, False), fails=False, idle=0)
        if drains:
            self.drain()
        self.stats = EngineStats([tier.name for tier in self.config.tiers])
        self.cache = CacheManager(self.config, self.stats)
        self.slots = [[GARBAGE] * CHUNK_SIZE for _ in self.slots]
        self.cpu_slots = [[GARBAGE] * CHUNK_SIZE for _ in self.cpu_slots]
        self.slow_in_flight, self.corrupted, self.is_held_back = {}, set(), False
        self.num_slow_ended = dict.fromkeys(self.num_slow_ended, 0)
        self.num_copies = dict.fromkeys(self.num_copies, 0)
        self.num_corrupted_swaps = 0
        self.cached_once = set()
        self.asked, self.offers = {}, set()
        for name, records in self.slow_records.items():
            if name == PEER:
                continue
            self.cache.await_records(name)
            self.cache.check_integrity([])
            blocks = range(len(self.slow_slots[name]))
            for part in (blocks,) if at_once else (blocks[1::2], blocks[::2]):
                self.cache.restore(name, {block: records.get(block) for block in part}, self.now)
                self.cache.check_integrity([])
        self.cached_once = {self.names[chunk.key] for chunk in self.cache.index if chunk.num_tokens == CHUNK_SIZE}

    def drain(self) -> None:
        for transfer_id in list(self.slow_in_flight):
            self.end_slow_transfer(transfer_id, ok=True)
        self.now += 40  # no tier is paused
        before = len(self.cache.index)
        self.cache.start_drain(self.now)
        drain = self.cache.drain
        assert drain is not None
        for _ in range(100):
            if drain.is_done(self.now):
                break
            drain.plan(self.now)
            self.the_books_balance()
            self.plan_handover()
            self.take_slow_transfers()
            transfers = self.cache.transfers.take()
            assert not any((transfers.swap_ins, transfers.evictions, transfers.local_copies))
            self.num_copies["swap_outs"] += len(transfers.swap_outs)
            self.execute(transfers, [], is_late=False)
            for transfer_id in list(self.slow_in_flight):
                self.end_slow_transfer(transfer_id, ok=True)
            self.the_books_balance()
        assert drain.is_done(self.now), "never done"
        has_room = self.cache.tiers.stores[0].pool.num_free > 0
        is_all_worth_it = not any(self.stats.slow_refusals.values())
        if has_room and is_all_worth_it and not self.is_held_back:
            left = [chunk for chunk in self.cache.index if self.cache.tiers.store_of(chunk) is None]
            left = [chunk for chunk in left if any_block(chunk.blocks[:2])]
            assert not self.corrupted or len(left) <= before
            assert self.corrupted or not left, "something was left behind"


class TwoSlowTiersMachine(SlowTiersMachine):
    """And with another one behind it, of which nothing is stored in yet: no rule may depend on their number."""

    SLOW_TIERS = ("dict", "list")


class PeersMachine(SlowTiersMachine):
    """And with peers: chunks come from them at any time, or do not, and they ask for ours."""

    SLOW_TIERS = ("dict", PEER)
    num_offers = 0

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "cache") and self.cache.handover is not None:
            self.everything_comes_to_its_end()

    def fill_places(self) -> None:
        """A peer has what the names say."""
        for chunk in self.cache.index:
            place = chunk.blocks[-1]
            if place is not None:
                labels = self.labels_of(chunk.key)
                self.slow_slots[PEER][place] = labels + [GARBAGE] * (CHUNK_SIZE - len(labels))
                if chunk.num_tokens == CHUNK_SIZE:
                    self.cached_once.add(self.names[chunk.key])

    @precondition(lambda self: self.waiting and self.cache.handover)
    @rule(
        which=st.sampled_from(["all", "all", "odd", "last"]),
        tails=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=3),
        waits=st.booleans(),
    )
    def a_peer_has_what_the_oldest_needs(self, which: str, tails: list[tuple[int, int]], waits: bool) -> None:
        request, handover = self.waiting[0], self.cache.handover
        query = handover.missing_chunks(request)
        if query is None:
            return
        assert self.cache.index.match(query.keys[1]) is None if len(query.keys) > 1 else True
        places = range(len(query.keys))
        places = {"all": places, "odd": places[1::2], "last": places[-1:]}[which]
        found = FoundChunks(dict.fromkeys(places, 1.0), tuple(tails))
        records = records_of(query, found, request, CHUNK_SIZE)
        for record in records:
            tenant, token_ids = self.names[record.key]
            assert (tenant, token_ids) == (request.tenant, tuple(request.token_ids[: len(token_ids)]))
            assert len(token_ids) == record.position * CHUNK_SIZE + record.num_tokens
        handover.expect(records, request.request_id, self.now)
        self.fill_places()
        if waits:
            self.the_oldest_waits_for_a_slow_tier(0)

    @precondition(lambda self: self.waiting)
    @rule()
    def the_oldest_is_aborted(self) -> None:
        self.expect_no_more(self.waiting.pop(0))

    @precondition(lambda self: self.histories and self.cache.handover)
    @rule(data=st.data(), idle_s=st.sampled_from([0.0, 1.0, 30.0]), new=tokens, num_cut=st.integers(0, 4))
    def a_peer_that_ends_offers_a_conversation(
        self, data: st.DataObject, idle_s: float, new: tuple[int, ...], num_cut: int
    ) -> None:
        tenant, owner, history = data.draw(st.sampled_from(self.histories))
        context = (history[: max(1, len(history) - num_cut)] + new)[:MAX_TOKENS]
        records = []
        for start in range(0, len(context), CHUNK_SIZE):
            end = min(start + CHUNK_SIZE, len(context))
            self.learn_name(tenant, context[:end])
            records.append(
                ChunkRecord(
                    key=key_of(tenant, context[:end]),
                    parent_key=key_of(tenant, context[:start]),
                    position=start // CHUNK_SIZE,
                    num_tokens=end - start,
                    owner_id=None if end - start == CHUNK_SIZE else owner,
                    idle_s=idle_s,
                )
            )
        self.num_offers += 1
        self.offers.add(f"offer {self.num_offers}")
        self.cache.handover.accept_offer(records, f"offer {self.num_offers}", self.now)
        self.fill_places()

    @precondition(lambda self: self.cache.handover)
    @rule(numbers=st.lists(st.integers(0, 99), max_size=6), where=st.sampled_from(["gpu", "far", "any"]))
    def peers_ask(self, numbers: list[int], where: str) -> None:
        chunks = {
            "gpu": [chunk for chunk in self.cache.index if chunk.blocks[1] is None and chunk.blocks[0] is not None],
            "far": [chunk for chunk in self.cache.index if not any_block(chunk.blocks[:2])],
            "any": list(self.cache.index),
        }[where]
        keys = [chunks[number % len(chunks)].key for number in numbers if chunks]
        keys += [bytes([number]) * 32 for number in numbers[:1]]
        before = self.snapshot()
        found = self.cache.handover.find_chunks(keys, self.now)
        assert self.snapshot() == before
        for place, key in enumerate(keys):
            chunk = self.cache.index.match(key)
            if place in found.idle_s:
                assert any_block(chunk.blocks[:-1]), "what is expected from a peer is not had"
        self.cache.handover.start_sends(keys, self.now)
        self.asked |= dict.fromkeys(keys, 0)

    @precondition(lambda self: not self.running and not self.starts and self.cache.handover)
    @rule(fails=st.booleans(), num_steps=st.integers(1, 4))
    def nothing_runs_but_peers_are_served(self, fails: bool, num_steps: int) -> None:
        for _ in range(num_steps):
            self.plan_handover()
            self.take_slow_transfers()
            transfers = self.cache.transfers.take()
            self.num_copies["swap_outs"] += len(transfers.swap_outs)
            self.num_copies["evictions"] += len(transfers.evictions)
            if fails:
                self.fail(transfers, [], are_copies_made=False)
            else:
                self.execute(transfers, [], is_late=False)
            self.the_books_balance()
            for transfer_id in list(self.slow_in_flight)[::2]:
                self.end_slow_transfer(transfer_id, ok=True)

    @invariant()
    def no_more_is_lent_than_may_be(self) -> None:
        if self.cache.handover is not None:
            max_copies = self.cache.handover.sends.max_copies
            assert len(self.open_transfers(PEER)) <= max_copies
            assert len(self.cache.handover.expectations._loading) <= max_copies

    def everything_comes_to_its_end(self) -> None:
        """No place in the peers' tier is kept, each chunk that was asked for is sent or declined, each offer ends."""
        for request in (*self.waiting, *self.loading):
            self.expect_no_more(request)
        for _ in range(100):
            if not (self.asked or self.offers or self.slow_in_flight):
                break
            self.now += 1
            self.nothing_runs_but_peers_are_served(fails=False, num_steps=1)
        assert not self.slow_in_flight
        self.plan_handover()
        assert not self.asked
        assert not self.offers
        assert not self.cache.tiers.by_name[PEER].pool.num_used
        assert all(any_block(chunk.blocks[:-1]) for chunk in self.cache.index)


class OnlyPeersMachine(PeersMachine):
    """Without a tier that keeps anything behind the CPU tier."""

    SLOW_TIERS = (PEER,)

    def drain(self) -> None:
        self.cache.start_drain(self.now)
        assert self.cache.drain is None


def any_block(blocks: list[int | None]) -> bool:
    return any(block is not None for block in blocks)


def move(slots: Slots, cpu_slots: Slots, corrupted: set[int], transfers: StepTransfers, *, swap_outs: bool) -> None:
    """The copies of a step in the order of StepPlan. A corrupted block brings garbage."""
    move_out(slots, cpu_slots, corrupted, transfers.evictions)
    contents = [slots[copy.source][:] for copy in transfers.local_copies]
    for copy, content in zip(transfers.local_copies, contents, strict=True):
        slots[copy.target] = content
    if swap_outs:
        move_out(slots, cpu_slots, corrupted, transfers.swap_outs)
    for _, _, copy in transfers.swap_ins:
        slots[copy.target] = cpu_slots[copy.source][:]


def move_out(slots: Slots, cpu_slots: Slots, corrupted: set[int], copies: list[tuple[Chunk, BlockCopy]]) -> None:
    for _, copy in copies:
        cpu_slots[copy.target] = slots[copy.source][:]
        corrupted.discard(copy.target)


PROFILE = settings.get_profile("nightly" if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else "default-machine")
TestCacheManager = CacheManagerMachine.TestCase
TestCacheManager.settings = PROFILE
TestSlowTier = SlowTiersMachine.TestCase
TestSlowTier.settings = settings(PROFILE, max_examples=PROFILE.max_examples // 2)
TestPeers = PeersMachine.TestCase
TestPeers.settings = settings(PROFILE, max_examples=PROFILE.max_examples // 2)
TestOnlyPeers = OnlyPeersMachine.TestCase
TestOnlyPeers.settings = settings(PROFILE, max_examples=PROFILE.max_examples // 3)
TestTwoSlowTiers = TwoSlowTiersMachine.TestCase
TestTwoSlowTiers.settings = settings(PROFILE, max_examples=PROFILE.max_examples // 6)
