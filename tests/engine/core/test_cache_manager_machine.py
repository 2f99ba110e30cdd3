"""A state machine drives the cache manager as a scheduler would, against a model of what lies in every block.

The truth is a label for each slot: which token context the KV in it belongs to. A wrong match, a stale block, a shared
block that is written, or a copy with the wrong source shows as a slot with the wrong label.
"""

import os
from collections.abc import Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.cache_manager import CacheManager
from engine.core.chunk_index import Chunk, chunk_key, root_key
from engine.core.cost_model import CostModel
from engine.core.eviction import make_policy
from engine.core.plan import BlockCopy
from engine.core.request import Request, SamplingParams
from engine.core.stats import EngineStats

CHUNK_SIZE = 4
MAX_TOKENS = 22
MODEL = "a model"
SYSTEM_PROMPT = (1, 1, 2, 2, 1)
TENANTS = ("acme", "umbrella")

settings.register_profile(
    "default-machine",
    max_examples=300,
    stateful_step_count=40,
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


class CacheManagerMachine(RuleBasedStateMachine):
    """One plan at a time: releases and appended blocks first, then admissions, then the step itself."""

    @initialize(
        num_blocks=st.integers(6, 12), policy=st.sampled_from(["retention_value", "lru"]), keep=st.integers(0, 9)
    )
    def start(self, num_blocks: int, policy: str, keep: int) -> None:
        self.stats = EngineStats()
        self.keep = keep > 0  # one example in ten is stateless
        self.cache = CacheManager(
            chunk_size=CHUNK_SIZE,
            num_gpu_blocks=num_blocks,
            policy=make_policy(policy, CostModel(chunk_size=CHUNK_SIZE)),
            stats=self.stats,
            model=MODEL,
            keep=self.keep,
        )
        self.slots: list[list[Label]] = [[GARBAGE] * CHUNK_SIZE for _ in range(num_blocks)]
        self.now = 0.0
        self.num_requests = 0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.histories: list[tuple[str, str, tuple[int, ...]]] = []  # tenant, conversation, tokens of a finished turn
        self.starts: list[Request] = []  # admitted in the plan being made
        self.copies: list[BlockCopy] = []

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
        self.waiting.append(request)

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
        """Another conversation, perhaps of another tenant, begins with any part of a history; the whole of it again
        included."""
        _, _, history = data.draw(st.sampled_from(self.histories))
        length = data.draw(st.integers(1, len(history)))
        self.add(tenant, f"fork of {length}", history[:length] + new)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), conversation=st.sampled_from(["a", "b", "c"]), num_cut=st.integers(0, 3))
    def what_was_computed_is_asked_again(self, data: st.DataObject, conversation: str, num_cut: int) -> None:
        tenant, _, history = data.draw(st.sampled_from(self.histories))
        self.add(tenant, conversation, history[: max(1, len(history) - num_cut)])

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
        self.cache.release(request, self.now, step_failed=step_failed)
        assert (request.chunks, request.pending) == ([], [])
        self.histories.append((request.tenant, request.conversation_id, tuple(request.token_ids)))
        del self.histories[:-6]

    @precondition(lambda self: self.waiting)
    @rule(reserve=st.integers(0, 3), idle=st.integers(0, 2))
    def the_oldest_is_admitted(self, reserve: int, idle: int) -> None:
        self.now += idle
        request = self.waiting[0]
        expected_cached = self.num_cached_by_brute_force(request) if self.keep else 0
        before = self.snapshot()
        copies = self.cache.try_admit(request, reserve, self.now)
        if copies is None:
            assert self.snapshot() == before
            assert (request.chunks, request.pending) == ([], [])
            assert self.running or reserve, "a context that fits the tier alone must be admitted"
            return
        assert len(request.chunks) == self.cache.num_chunks(request.num_tokens)
        assert request.num_tokens - request.num_pending_tokens == expected_cached
        assert request.pending[-1][1] == request.num_tokens, "the last token is always computed"
        assert all(a[1] < b[0] for a, b in zip(request.pending, request.pending[1:], strict=False))
        assert self.cache.num_available_blocks >= reserve
        self.copies.extend(copies)
        self.waiting.pop(0)
        self.running.append(request)
        self.starts.append(request)

    def snapshot(self) -> tuple[object, ...]:
        cache = self.cache
        return cache.gpu_pool.num_free, set(cache.index), cache.num_available_blocks, self.stats.as_dict()

    def num_cached_by_brute_force(self, request: Request) -> int:
        """Tokens of the context that some named chunk holds, the last one left out, by looking at every chunk."""
        best: dict[int, int] = {}
        for chunk in self.cache.index:
            labels = self.labels(chunk)
            start = chunk.position * CHUNK_SIZE
            if start + len(labels) <= request.num_tokens and labels[-1] == label(request, start + len(labels) - 1):
                usable = min(len(labels), request.num_tokens - 1 - start)
                best[chunk.position] = max(best.get(chunk.position, 0), usable)
        return sum(best.values())

    # -- the step ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.running)
    @rule(
        lengths=st.lists(st.integers(0, 9), min_size=8, max_size=8),
        next_tokens=st.lists(st.integers(1, 2), min_size=8, max_size=8),
        ends=st.lists(st.booleans(), min_size=8, max_size=8),
    )
    def a_step_is_computed(self, lengths: list[int], next_tokens: list[int], ends: list[bool]) -> None:
        self.now += 1
        segments = list(self.plan_segments(lengths))
        self.make_copies()
        for request in self.running:
            self.check_content(request)
        for request, start, end in segments:
            for position in range(start, end):
                self.write(request, position, label(request, position))
        self.starts, self.copies = [], []
        for request, start, end in segments:
            self.cache.commit(request, start, end)
            if end < request.pending[0][1]:
                request.pending[0] = (end, request.pending[0][1])
            else:
                del request.pending[0]
        for request in list(self.running):
            if request.pending:
                continue
            index = int(request.request_id[1:]) % 8
            request.token_ids.append(next_tokens[index])
            request.pending = [(request.num_tokens - 1, request.num_tokens)]
            if ends[index] or request.num_tokens >= MAX_TOKENS:
                self.release(request)
                continue
            self.append_block(request)

    def append_block(self, request: Request) -> None:
        """A decode that needs a block gets it, or is suspended for want of one."""
        if self.cache.num_chunks(request.num_tokens) == len(request.chunks):
            return
        before = self.snapshot()
        if self.cache.try_append_block(request, self.now) is None:
            assert self.snapshot() == before
            assert self.cache.num_available_blocks == 0
            self.release(request)
            self.waiting.insert(0, request)

    @rule(next_tokens=st.lists(st.integers(1, 2), min_size=8, max_size=8), answer_len=st.integers(1, 6))
    def all_run_to_their_end(self, next_tokens: list[int], answer_len: int) -> None:
        for num_steps in range(200):
            if not self.waiting and not self.running:
                return
            if self.waiting:
                self.the_oldest_is_admitted(reserve=1 if self.running else 0, idle=1)
            self.the_books_balance()
            if self.running:
                self.a_step_is_computed([9] * 8, next_tokens, [num_steps % answer_len == 0] * 8)
        raise AssertionError("a request waits for ever")

    @precondition(lambda self: self.running)
    @rule(lengths=st.lists(st.integers(0, 9), min_size=8, max_size=8))
    def a_step_fails(self, lengths: list[int]) -> None:
        """Whatever the step was to write may hold anything; its requests end."""
        self.now += 1
        segments = list(self.plan_segments(lengths))
        for copy in self.copies:
            self.slots[copy.target] = [GARBAGE] * CHUNK_SIZE
        for request, start, end in segments:
            for position in range(start, end):
                self.write(request, position, GARBAGE)
        self.starts, self.copies = [], []
        for request in dict.fromkeys(request for request, _, _ in segments):
            self.release(request, step_failed=True)

    def plan_segments(self, lengths: list[int]) -> Iterator[tuple[Request, int, int]]:
        """As the scheduler does: pending ranges front first; whoever is admitted computes something at once."""
        for index, request in enumerate(self.running):
            budget = lengths[index % 8]
            if request in self.starts:
                budget = max(1, budget)
            for start, end in request.pending:
                length = min(end - start, budget)
                if length:
                    yield request, start, start + length
                    budget -= length

    def make_copies(self) -> None:
        """Every source is read before any target is written."""
        sources = [list(self.slots[copy.source]) for copy in self.copies]
        for copy, content in zip(self.copies, sources, strict=True):
            self.slots[copy.target] = content

    def write(self, request: Request, position: int, content: Label) -> None:
        chunk = request.chunks[position // CHUNK_SIZE]
        assert chunk.key is None, "a chunk that others may use is written"
        assert chunk.pins == 1
        assert chunk.gpu_block is not None
        self.slots[chunk.gpu_block][position % CHUNK_SIZE] = content

    # -- the truth -----------------------------------------------------------------------------------------------------

    def check_content(self, request: Request) -> None:
        """Every position that is not pending has the right KV."""
        pending = {position for start, end in request.pending for position in range(start, end)}
        for position in set(range(request.num_tokens)) - pending:
            block_id = request.chunks[position // CHUNK_SIZE].gpu_block
            assert block_id is not None
            assert self.slots[block_id][position % CHUNK_SIZE] == label(request, position), (request, position)

    def labels(self, chunk: Chunk) -> list[Label]:
        assert chunk.gpu_block is not None
        return self.slots[chunk.gpu_block][: chunk.num_tokens]

    @invariant()
    def the_books_balance(self) -> None:
        self.cache.check_integrity(self.running)

    @invariant()
    def named_chunks_hold_what_their_key_says(self) -> None:
        for chunk in self.cache.index:
            labels = self.labels(chunk)
            tenant, token_ids = labels[-1]
            start = chunk.position * CHUNK_SIZE
            assert labels == [(tenant, token_ids[: start + i + 1]) for i in range(len(labels))]
            assert key_of(tenant, token_ids) == chunk.key

    @invariant()
    def stateless_shares_and_keeps_nothing(self) -> None:
        if self.keep:
            return
        assert not len(self.cache.index)
        assert not self.copies
        assert self.cache.gpu_pool.num_used == sum(len(request.chunks) for request in self.running)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for request in list(self.running):
            self.release(request)
        self.cache.check_integrity([])
        assert self.cache.num_available_blocks == self.cache.gpu_pool.num_blocks
        assert self.cache.gpu_pool.num_used == len(self.cache.index)


TestCacheManager = CacheManagerMachine.TestCase
TestCacheManager.settings = settings.get_profile(
    "nightly" if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else "default-machine"
)
