"""The cache manager's state machine, with hints: budgets hold, and what one tenant says costs no other one its share."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from engine.core.cache.eviction import HintedRetention
from engine.core.cache.eviction.hinted import plain_value, stated_value
from engine.core.cache.index import Chunk
from engine.core.cache_map import context_keys
from engine.core.request import Request
from engine.core.retention import KeptSpan, RetentionHint
from tests.engine.core.cache.test_cache_manager_machine import (
    CHUNK_SIZE,
    MODEL,
    PROFILE,
    CacheManagerMachine,
    SlowTiersMachine,
)

WEIGHTS = {"acme": 2.0, "umbrella": 1.0}

spans = st.lists(st.integers(0, 24), min_size=2, max_size=4, unique=True).map(sorted)
priorities = st.sampled_from([0, 20, 50, 70, 80, 100])
hints = st.one_of(
    st.builds(
        RetentionHint.of,
        ttl_s=st.sampled_from([None, 3.0, 40.0]),
        priority=st.sampled_from([None, 0, 20, 80, 100]),
        expected_return_s=st.sampled_from([None, None, 2.0, 30.0]),
        release=st.sampled_from([False, False, True]),
    ),
    st.builds(
        lambda bounds, priority, ttl_s, rest: RetentionHint(
            tuple(KeptSpan(start, end, priority, ttl_s) for start, end in zip(bounds[::2], bounds[1::2], strict=False)),
            rest_priority=rest,
        ),
        spans,
        priorities,
        st.sampled_from([None, 4.0]),
        priorities,
    ),
)


class HintsMachine(CacheManagerMachine):
    """Whatever is said, whenever."""

    KV_HINTS = "client"

    def add(self, tenant: str, conversation: str, token_ids: tuple[int, ...]) -> None:
        self.cache.shares.note(tenant, WEIGHTS[tenant])
        super().add(tenant, conversation, token_ids)

    def after_each_context(self) -> None:
        """Every second one is to be kept, so that tenants meet chunks that others keep."""
        super().after_each_context()
        tenant, conversation, history = self.histories[-1]
        if self.cache.retention is not None and len(self.histories) % 2:
            keys = context_keys(history, model=MODEL, tenant=tenant, chunk_size=CHUNK_SIZE, max_chunks=99)
            self.cache.retain(conversation, keys, tenant, RetentionHint.of(priority=100, ttl_s=100.0), self.now)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data(), hint=hints)
    def a_request_brings_a_hint(self, data: st.DataObject, hint: RetentionHint) -> None:
        data.draw(st.sampled_from([*self.running, *self.waiting])).retention = hint

    def release(self, request: Request, *, step_failed: bool = False) -> None:
        tenant, hint, retention = request.tenant, request.retention, self.cache.retention
        super().release(request, step_failed=step_failed)
        if retention is None:
            assert hint is None or request.retention_outcome.outcome == "refused"
            return
        assert (request.retention_outcome is None) == (hint is None)
        if hint is not None:
            self.check_budget(tenant, request.retention_outcome.num_tokens)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), hint=hints, conversation=st.sampled_from("abz"))
    def a_hint_comes_between_two_turns(self, data: st.DataObject, hint: RetentionHint, conversation: str) -> None:
        tenant, _, history = data.draw(st.sampled_from(self.histories))
        keys = context_keys(history, model=MODEL, tenant=tenant, chunk_size=CHUNK_SIZE, max_chunks=99)
        outcome = self.cache.retain(conversation, keys, tenant, hint, self.now)
        if self.cache.retention is not None:
            self.check_budget(tenant, outcome.num_tokens)
        else:
            assert outcome.outcome == "refused"

    def check_budget(self, tenant: str, num_tokens: int) -> None:
        """What a hint has just got is within the budget; others' may keep more only since there were fewer tenants."""
        retention = self.cache.retention
        if num_tokens:
            assert retention.count_kept(tenant) <= self.max_budget(tenant)

    def max_budget(self, tenant: str) -> int:
        """While it was alone."""
        config = self.config
        return int(config.kv_retention_share * (config.num_gpu_blocks + config.num_cpu_blocks))

    @rule(idle=st.integers(1, 30))
    def time_passes(self, idle: int) -> None:
        self.now += idle

    @invariant()
    def nobody_pays_with_a_share_for_what_another_tenant_said(self) -> None:
        if self.cache.retention is None:
            return
        named = list(self.cache.index)
        for tier in self.cache.tiers:
            here = [chunk for chunk in named if chunk.blocks[tier.number] is not None]
            total = sum(map(self.cache.shares.weight_of, {chunk.tenant for chunk in here}))
            for policy in (tier.sole, tier.copied):
                assert isinstance(policy, HintedRetention)
                victim = policy.choose_victim(self.now)
                if victim is None:
                    continue
                share = tier.pool.num_blocks * self.cache.shares.weight_of(victim.tenant) / total
                if sum(chunk.tenant == victim.tenant for chunk in here) > share:
                    continue
                first = min(policy, key=self.value_without_hints)
                assert first.tenant == victim.tenant or self.value_without_hints(first) == self.value_without_hints(
                    victim
                )

    def value_without_hints(self, chunk: Chunk) -> float:
        """What is said may make a chunk go sooner; that costs no other tenant anything."""
        return min(stated_value(self.costs, chunk, self.now), plain_value(self.costs, chunk, self.now))


class HintsAndSlowTierMachine(HintsMachine, SlowTiersMachine):
    """With chunks whose tenant is not known, because another process has left them."""


TestHints = HintsMachine.TestCase
TestHints.settings = settings(PROFILE, max_examples=PROFILE.max_examples // 5)
TestHintsAndSlowTier = HintsAndSlowTierMachine.TestCase
TestHintsAndSlowTier.settings = settings(PROFILE, max_examples=PROFILE.max_examples // 10)
