"""The exact order of victims, which is what a policy promises."""

import random

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import (
    EVICTION_POLICIES,
    LRU,
    RetentionValue,
    TailOptimisedLRU,
    TrailingLRU,
    make_policy,
)
from engine.core.cache.index import Chunk
from engine.errors import ConfigError

# Chunks 0, 1, 2, ... of 4 tokens cost 2, 3, 4, ...
COSTS = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4)


def chunk(position: int, last_active: float) -> Chunk:
    made = Chunk(position, [0, None])
    made.last_active = last_active
    return made


def victims(policy, now: float) -> list[tuple[int, float]]:
    """(position, last_active) of all that the policy holds, in the order in which they go when they all go now."""
    order = []
    while (victim := policy.choose_victim(now)) is not None:
        policy.remove(victim)
        order.append((victim.position, victim.last_active))
    assert len(policy) == 0
    return order


def filled(policy, chunks: list[tuple[int, float]]):
    for position, last_active in chunks:
        policy.insert(chunk(position, last_active))
    return policy


def test_cost_grows_with_the_context():
    assert [COSTS.chunk_cost(position) for position in range(4)] == [2.0, 3.0, 4.0, 5.0]


def test_lru_goes_by_last_use_and_within_a_turn_from_the_front():
    policy = filled(LRU(), [(0, 1.0), (1, 1.0), (0, 3.0), (1, 3.0), (2, 3.0), (0, 9.0)])
    assert victims(policy, 10.0) == [(0, 1.0), (1, 1.0), (0, 3.0), (1, 3.0), (2, 3.0), (0, 9.0)]


def test_trailing_lru_goes_by_last_use_and_within_a_turn_from_the_end():
    policy = filled(TrailingLRU(), [(0, 3.0), (1, 3.0), (2, 3.0), (0, 1.0), (1, 1.0), (0, 9.0)])
    assert victims(policy, 10.0) == [(1, 1.0), (0, 1.0), (2, 3.0), (1, 3.0), (0, 3.0), (0, 9.0)]


def test_tail_optimised_lru_takes_first_what_a_turn_computes_again_in_time():
    """Chunks of 0.05 s: the first four take 0.2 s."""
    costs = CostModel(constant=0.05, per_context_token=0.0, chunk_size=4, is_in_seconds=True)
    policy = filled(TailOptimisedLRU(costs), [(3, 9.0), (4, 1.0), (5, 1.0), (0, 3.0), (3, 3.0), (4, 9.0)])
    assert victims(policy, 10.0) == [(0, 3.0), (3, 3.0), (3, 9.0), (4, 1.0), (5, 1.0), (4, 9.0)]


def test_tail_optimised_lru_counts_tokens_if_costs_are_no_times():
    policy = filled(TailOptimisedLRU(CostModel(chunk_size=512)), [(2, 1.0), (1, 5.0), (3, 2.0), (0, 9.0)])
    assert victims(policy, 10.0) == [(1, 5.0), (0, 9.0), (2, 1.0), (3, 2.0)]


def test_retention_value_takes_the_front_of_a_conversation_first():
    policy = filled(RetentionValue(COSTS), [(0, 0.0), (1, 0.0), (2, 0.0), (0, 6.0), (1, 6.0)])
    # values at 10: 2/10, 3/10, 4/10 and 2/4, 3/4
    assert victims(policy, 10.0) == [(0, 0.0), (1, 0.0), (2, 0.0), (0, 6.0), (1, 6.0)]


def test_retention_value_spares_the_dear_end_of_an_idle_conversation():
    chunks = [(0, 0.0), (1, 0.0), (8, 0.0), (0, 4.0), (1, 4.0)]
    # values at 10: .2, .3, 1.0 and .333, .5; LRU would let the chunk at position 8 go third
    assert victims(filled(RetentionValue(COSTS), chunks), 10.0) == [(0, 0.0), (1, 0.0), (0, 4.0), (1, 4.0), (8, 0.0)]
    assert victims(filled(LRU(), chunks), 10.0)[2] == (8, 0.0)


@pytest.mark.parametrize(
    ("now", "order"),
    [
        (8.0, [(3, 0.0), (0, 6.0)]),  # 5/8 < 2/2
        (10.0, [(0, 6.0), (3, 0.0)]),  # 5/10 = 2/4: the one in front
        (20.0, [(0, 6.0), (3, 0.0)]),  # 2/14 < 5/20
    ],
)
def test_ranking_of_the_same_chunks_moves_with_time(now, order):
    assert victims(filled(RetentionValue(COSTS), [(3, 0.0), (0, 6.0)]), now) == order


def test_a_chunk_used_this_instant_goes_last_and_from_the_front():
    policy = filled(RetentionValue(COSTS), [(5, 9.0), (0, 10.0), (1, 10.0)])
    assert victims(policy, 10.0) == [(5, 9.0), (0, 10.0), (1, 10.0)]


def test_equal_chunks_go_in_order_of_insertion():
    policy = RetentionValue(COSTS)
    first, second = chunk(1, 3.0), chunk(1, 3.0)
    policy.insert(first)
    policy.insert(second)
    assert policy.choose_victim(7.0) is first
    policy.remove(first)
    assert policy.choose_victim(7.0) is second
    policy.insert(first)  # used again, at the same time
    assert policy.choose_victim(7.0) is second


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_what_comes_back_with_an_older_use_goes_by_that_use(name):
    """A chunk that lost its place for a swap is held again with the last use that it had."""
    policy = make_policy(name, COSTS)
    older, newer = chunk(1, 2.0), chunk(1, 4.0)
    policy.insert(newer)
    policy.insert(older)
    assert policy.choose_victim(5.0) is older
    policy.remove(older)
    assert policy.choose_victim(5.0) is newer
    policy.insert(older)
    assert policy.choose_victim(5.0) is older


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_a_policy_survives_many_removals(name):
    """What was removed leaves traces in a heap; they are cleared away, and never chosen."""
    policy = make_policy(name, COSTS)
    kept = chunk(3, 50.0)
    policy.insert(kept)
    for number in range(1000):
        gone = chunk(number % 5, float(number % 7))
        policy.insert(gone)
        policy.remove(gone)
    assert (list(policy), policy.choose_victim(60.0)) == ([kept], kept)


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("lru", [(0, 1.0), (1, 1.0), (0, 3.0), (2, 3.0)]),
        ("trailing_lru", [(1, 1.0), (0, 1.0), (2, 3.0), (0, 3.0)]),
        ("retention_value", [(0, 0.0), (1, 0.0), (0, 4.0), (1, 4.0), (8, 0.0)]),  # .2, .3, .333, .5, 1.0 at 10
        (
            "retention_value",
            [(0, 6.0), (3, 0.0), (5, 10.0)],
        ),  # 2/4 = 5/10: the one in front; then one used this instant
    ],
)
def test_goes_before_is_the_order_of_the_victims(name, chunks):
    policy = make_policy(name, COSTS)
    made = [chunk(*each) for each in chunks]
    for i, left in enumerate(made):
        for j, right in enumerate(made):
            assert policy.goes_before(left, right, 10.0) == (i < j)
    assert victims(filled(policy, chunks[::-1]), 10.0) == chunks


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_policy_holds_what_was_inserted_and_not_removed(name):
    policy = make_policy(name, COSTS)
    inside, outside = chunk(0, 1.0), chunk(0, 1.0)
    assert policy.choose_victim(1.0) is None
    policy.insert(inside)
    assert (list(policy), len(policy), inside in policy, outside in policy) == ([inside], 1, True, False)
    policy.remove(inside)
    assert (list(policy), len(policy), inside in policy) == ([], 0, False)


def test_unknown_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match="fifo"):
        make_policy("fifo", COSTS)


def test_retention_value_equals_brute_force():
    """The search over list heads finds the minimum over all chunks.

    Whatever was inserted, removed and evicted before, in whatever order of last use.
    """
    num_choices = 0
    for seed in range(1000):
        rng = random.Random(seed)
        costs = CostModel(rng.choice([0.5, 1.0, 7.0]), rng.choice([0.0, 0.25, 3.0]), rng.choice([1, 4, 32]))
        num_choices += check_history(RetentionValue(costs), retention_value(costs), rng)
    assert num_choices > 20_000


@pytest.mark.parametrize(
    ("policy", "rank"),
    [
        (LRU, lambda candidate, now: (candidate.last_active, candidate.position)),
        (TrailingLRU, lambda candidate, now: (candidate.last_active, -candidate.position)),
    ],
)
def test_lru_equals_brute_force(policy, rank):
    assert sum(check_history(policy(), rank, random.Random(seed)) for seed in range(300)) > 6_000


def retention_value(costs: CostModel):
    """Value, then position. Times and costs are small and exact, so that equal values are equal floats, and only they."""

    def rank(candidate: Chunk, now: float) -> tuple[float, int]:
        idle, cost = now - candidate.last_active, costs.chunk_cost(candidate.position)
        return (float("inf") if idle == 0 else cost / idle), candidate.position

    return rank


def check_history(policy, rank, rng: random.Random) -> int:
    """A random history, in which each victim is the minimum by `rank` over all chunks.

    Of equal ones it is the first that came in; and of any two chunks, held or not, the one of smaller rank goes before
    the other. Returns how often there was a choice.
    """
    held: list[Chunk] = []  # in order of insertion
    away: list[Chunk] = []  # removed, and may come back with the last use they had
    now, num_choices = 0.0, 0
    for _ in range(40):
        now += rng.choice([0, 0, 1, 2, 5])
        action = rng.random()
        if action < 0.45:
            last_active = now if rng.random() < 0.5 else float(rng.randint(0, int(now)))
            for position in range(rng.randrange(6)):
                held.append(chunk(position, last_active))
                policy.insert(held[-1])
        elif held and action < 0.65:  # taken out: used again, or away
            taken = held.pop(rng.randrange(len(held)))
            policy.remove(taken)
            if rng.random() < 0.5:
                taken.last_active = now
                policy.insert(taken)
                held.append(taken)
            else:
                away.append(taken)
        elif away and action < 0.85:
            held.append(away.pop(rng.randrange(len(away))))
            policy.insert(held[-1])
        victim = policy.choose_victim(now)
        assert victim is min(held, key=lambda candidate: rank(candidate, now), default=None)
        num_choices += len(held) > 1
        for other in rng.sample(held, min(3, len(held))) + away[:2]:
            assert victim is not None or other in away
            left = victim if victim is not None else away[-1]
            assert policy.goes_before(left, other, now) == (rank(left, now) < rank(other, now))
            assert policy.goes_before(other, left, now) == (rank(other, now) < rank(left, now))
            assert other in away or not policy.goes_before(other, left, now)
        if victim is not None and rng.random() < 0.4:
            policy.remove(victim)
            held.remove(victim)
        assert len(policy) == len(held)
    return num_choices


@pytest.mark.parametrize("per_context_token", [0.0, 0.01, 0.25])
@pytest.mark.parametrize("seed", range(12))
def test_retention_value_is_the_minimum_over_all_chunks(seed, per_context_token):
    """Whatever comes and goes in whichever order, at times close together and far apart."""
    rng = random.Random(seed)
    costs = CostModel(rng.choice([1.0, 1e9]), per_context_token, 4)
    policy = RetentionValue(costs)
    held: dict = {}  # with the number of the insertion: equal ones go in that order
    now, num_chosen = rng.choice([0.0, 1e6]), 0
    for number in range(400):
        now += rng.choice([0.0, 0.0, 0.03125, 1.0, 17.3])
        what = rng.random()
        if what < 0.5:
            new = chunk(rng.randrange(rng.choice([3, 40])), now - rng.choice([0.0, 0.0, 1.0, 2.0, 50 * rng.random()]))
            policy.insert(new)
            held[new] = number
        elif what < 0.7 and held:
            gone = rng.choice(list(held))
            del held[gone]
            policy.remove(gone)
        elif held:

            def rank(each, now=now):
                idle = now - each.last_active
                value = costs.chunk_cost(each.position) / idle if idle > 0 else float("inf")
                return value, each.position, each.last_active, held[each]

            assert policy.choose_victim(now) is min(held, key=rank)
            num_chosen += 1
            if rng.random() < 0.8:
                gone = policy.choose_victim(now)
                del held[gone]
                policy.remove(gone)
    assert num_chosen > 50
