"""The exact order of victims when something was said of chunks' next use, and who pays for what is kept."""

import math
import random

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import HintedRetention, RetentionValue, make_policy
from engine.core.cache.eviction.hinted import group_at, plain_value, stated_value
from engine.core.cache.index import Chunk
from engine.core.cache.tenant_shares import TenantShares
from engine.core.reuse import NO_REUSE, Reuse
from engine.errors import ConfigError

# Chunks 0, 1, 2, ... of 4 tokens cost 2, 3, 4, ...
COSTS = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4)
NEVER = Reuse(expected_use_s=math.inf)


def chunk(position: int, last_active: float, reuse: Reuse = NO_REUSE, tenant: str = "a") -> Chunk:
    made = Chunk(position, [0, None])
    made.last_active, made.reuse, made.tenant = last_active, reuse, tenant
    return made


def policy_of(*chunks: Chunk, num_blocks: int = 100, **weights: float) -> HintedRetention:
    shares = TenantShares()
    for tenant, weight in weights.items():
        shares.note(tenant, weight)
    policy = HintedRetention(COSTS, shares)
    policy.num_blocks = num_blocks
    for each in chunks:
        policy.insert(each)
    return policy


def victims(policy: HintedRetention, now: float) -> list[Chunk]:
    order = []
    while (victim := policy.choose_victim(now)) is not None:
        policy.remove(victim)
        order.append(victim)
    assert len(policy) == 0
    return order


def test_a_weight_is_a_factor_until_it_ends():
    kept, other = chunk(0, 0.0, Reuse(weight=4.0, keep_until_s=100.0)), chunk(0, 60.0)
    assert policy_of(kept, other).choose_victim(79.0) is kept, "8/79 against 2/19"
    assert policy_of(kept, other).choose_victim(81.0) is other, "8/81 against 2/21"
    kept, other = chunk(0, 0.0, Reuse(weight=16.0, keep_until_s=100.0)), chunk(0, 60.0)
    policy = policy_of(kept, other)
    assert [policy.choose_victim(now) for now in (99.0, 100.0)] == [other, kept]


def test_what_is_released_goes_first_and_what_comes_back_late_before_what_comes_soon():
    released, plain = chunk(5, 9.0, NEVER), chunk(0, 0.0)
    late, soon = chunk(0, 9.0, Reuse(expected_use_s=500.0)), chunk(0, 9.0, Reuse(expected_use_s=12.0))
    assert victims(policy_of(soon, plain, late, released), 10.0) == [released, late, plain, soon]
    # The time has passed, and it has not come back: only its last use counts.
    assert victims(policy_of(soon, plain), 13.0) == [plain, soon]
    overdue, used = chunk(0, 0.0, Reuse(expected_use_s=12.0)), chunk(0, 5.0)
    policy = policy_of(overdue, used)
    assert [policy.choose_victim(now) for now in (11.5, 12.0)] == [used, overdue]


def test_without_statements_it_is_the_retention_value():
    rng = random.Random(1)
    chunks = [chunk(rng.randrange(9), rng.random() * 50, tenant=rng.choice("ab")) for _ in range(200)]
    plain = RetentionValue(COSTS)
    for each in chunks:
        plain.insert(each)
    hinted = policy_of(*chunks)
    for now in range(50, 250):
        victim = plain.choose_victim(float(now))
        assert hinted.choose_victim(float(now)) is victim
        plain.remove(victim)
        hinted.remove(victim)


def test_who_keeps_a_chunk_pays_for_it_unless_another_holds_more_than_its_share():
    kept = chunk(0, 0.0, Reuse(weight=16.0, keep_until_s=100.0), "a")
    own, others = chunk(0, 40.0, tenant="a"), [chunk(0, 30.0 + i, tenant="b") for i in range(3)]
    # b holds 3 of 6 blocks, which is its share: a's own chunk goes, although b's are idle for longer.
    assert policy_of(kept, own, *others, num_blocks=6).choose_victim(50.0) is own
    # Of 5 blocks, 3 are more than its share.
    assert policy_of(kept, own, *others, num_blocks=5).choose_victim(50.0) is others[0]
    # Of twice the weight, they are not.
    assert policy_of(kept, own, *others, num_blocks=5, b=2.0).choose_victim(50.0) is own
    # a has nothing else to pay with: it does not keep the chunk.
    assert policy_of(kept, *others, num_blocks=6).choose_victim(50.0) is kept
    # A chunk that comes from a faster tier displaces none of b's either.
    policy = policy_of(*others, num_blocks=6)
    assert not policy.goes_before(others[0], kept, 50.0)
    assert policy_of(*others, num_blocks=2).goes_before(others[0], kept, 50.0)


def statement(rng: random.Random, now: float) -> Reuse:
    return rng.choice(
        [
            NO_REUSE,
            NO_REUSE,
            NEVER,
            Reuse(weight=rng.choice([0.25, 4.0, 16.0]), keep_until_s=now + rng.random() * 20),
            Reuse(expected_use_s=now + rng.random() * 20),
            Reuse(expected_use_s=now + rng.random() * 20, weight=4.0, keep_until_s=now + rng.random() * 20),
        ]
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_order_is_that_of_brute_force_and_costs_no_other_tenant_its_share(seed):
    rng = random.Random(seed)
    tenants, now, num_blocks = "abc"[: rng.randint(1, 3)], 0.0, rng.randint(8, 40)
    shares = TenantShares()
    for tenant in tenants:
        shares.note(tenant, rng.choice([0.5, 1.0, 3.0]))
    policy = HintedRetention(COSTS, shares)
    policy.num_blocks = num_blocks
    held: list[Chunk] = []

    def rank(each: Chunk) -> tuple[float, int]:
        return stated_value(COSTS, each, now), each.position

    def least(chunks: list[Chunk]) -> Chunk:
        """Of each group the head, of these the least."""
        heads = {}
        for each in sorted(chunks, key=lambda c: c.last_active):
            group = group_at(each, now)
            key = (each.last_active, each.position) if group.kind == "never" else rank(each)
            if group not in heads or key < heads[group][0]:
                heads[group] = key, each
        return min((each for _, each in heads.values()), key=rank)

    for _ in range(400):
        now += rng.random()
        if rng.random() < 0.6 or not held:
            each = chunk(rng.randrange(6), now - rng.random() * 0.01, statement(rng, now), rng.choice(tenants))
            held.append(each)
            policy.insert(each)
        elif rng.random() < 0.3:
            each = held.pop(rng.randrange(len(held)))
            policy.remove(each)
        now += rng.random() * 0.1
        if not held:
            assert policy.choose_victim(now) is None
            continue
        victim = policy.choose_victim(now)
        without_hints = min(held, key=lambda c: min(rank(c), (plain_value(COSTS, c, now), c.position)))
        total = sum(shares.weight_of(tenant) for tenant in {c.tenant for c in held})
        num_own = sum(c.tenant == victim.tenant for c in held)
        if num_own * total <= num_blocks * shares.weight_of(victim.tenant):
            without_value = min(rank(without_hints)[0], plain_value(COSTS, without_hints, now))
            assert without_hints.tenant == victim.tenant or without_value == rank(victim)[0]
        own = [c for c in held if c.tenant == victim.tenant]
        assert victim in (least(held), least(own))
        if victim is not least(held):
            assert without_hints.tenant == victim.tenant, "who pays is who keeps"
        assert set(policy) == set(held)
        assert len(policy) == len(held)
        if len(held) > num_blocks or rng.random() < 0.3:
            policy.remove(victim)
            held.remove(victim)


def test_policies_that_know_nothing_of_hints_are_refused():
    assert isinstance(make_policy("retention_value", COSTS, TenantShares()), HintedRetention)
    with pytest.raises(ConfigError, match="set kv_hints to off, or eviction_policy to retention_value"):
        make_policy("lru", COSTS, TenantShares())
