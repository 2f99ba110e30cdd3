"""Fairness between tenants among running requests: which gives way, after how many steps, at which cost.

The cost is time alone: all requests end, and all answers are right.
"""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.cache.index import Chunk
from engine.core.fair_shares import FairShares
from engine.core.plan import StepPlan
from engine.core.request import Request, SamplingParams
from engine.step_loop import LookAhead
from tests.engine.core.random_load import Load, random_sizes


def running_tenants(driver) -> Counter[str]:
    return Counter(request.tenant for request in driver.core._scheduler.running)


def steps_to_first_token(driver, name: str) -> int:
    num_steps = 0
    while not driver.tokens[name]:
        assert driver.step() is not None
        num_steps += 1
    return num_steps


def check_all(driver, answer) -> None:
    """Every request has ended with the answer that it would have had alone."""
    driver.run()
    for name, request in driver.requests.items():
        prompt = tuple(request.token_ids[: request.num_prompt_tokens])
        assert driver.tokens[name] == answer(prompt, request.sampling.max_tokens)
    assert driver.core.stats.num_finished == len(driver.requests)


def gave_way(plan: StepPlan, driver) -> list[str]:
    """Who was running and is not, although it has not ended."""
    return [name for name in plan.ended if name not in driver.finished]


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_waiting", [0, 50])
@pytest.mark.parametrize("look_ahead", list(LookAhead))
def test_who_has_all_places_gives_one_to_whoever_comes(make_core, answer, look_ahead, num_waiting):
    """64 long answers of one tenant, and more of them waiting.

    The other tenant's first token comes with the second step at the latest; if a step was made ahead, with the third.
    """
    driver = make_core(1000, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=64)
    driver.loop.look_ahead = look_ahead
    for number in range(64 + num_waiting):
        driver.add(f"a{number}", [number] * 4, max_tokens=25, tenant="a")
    driver.run_steps(4)
    driver.add("b", range(5), max_tokens=3, tenant="b")
    driver.plans.clear()
    assert steps_to_first_token(driver, "b") <= (3 if look_ahead is LookAhead.LAUNCH else 2)
    assert driver.requests["a63"].num_suspensions == 1, "the newest one"
    assert running_tenants(driver) == {"a": 63, "b": 1}
    check_all(driver, answer)
    assert driver.core.stats.num_gave_way == driver.core.stats.num_suspensions == 1
    assert driver.requests["a63"].num_computed_tokens == 4 + 25 - 1, "nothing of it was computed again"


def test_the_step_literally(make_core, answer):
    """ "a2" leaves in the very step in which "b" starts, in its block where there is no other."""
    driver = make_core(4, max_num_seqs=2, num_cpu_blocks=4, swap_out_watermark=0.0)
    driver.add("a1", range(2), max_tokens=6, tenant="a")
    driver.add("a2", range(10, 12), max_tokens=6, tenant="a")
    driver.run_steps(2)
    driver.add("b", range(20, 32), max_tokens=1, tenant="b")
    plan = driver.step()
    assert plan.ended == ("a2",)
    assert [(s.request_id, s.start, s.query_len) for s in plan.segments] == [("a1", 3, 1), ("b", 0, 12)]
    assert [start.request_id for start in plan.starts] == ["b"]
    assert len(plan.evictions) == 1, "a2's only block"
    plan = driver.step()
    assert [start.request_id for start in plan.starts] == ["a2"], "it comes back as soon as there is a place"
    assert len(plan.swap_ins) == 1
    check_all(driver, answer)


def test_one_tenant_alone_never_gives_way_to_itself(make_core, answer):
    driver = make_core(64, max_num_seqs=4, max_num_batched_tokens=16)
    for number in range(20):
        driver.add(f"a{number}", [number] * 5, max_tokens=9, tenant="a")
    check_all(driver, answer)
    assert driver.core.stats.num_suspensions == 0


def test_the_oldest_request_of_a_tenant_never_gives_way(make_core, answer):
    """With one place there is nothing to share; the next place is the other tenant's."""
    driver = make_core(64, max_num_seqs=1)
    driver.add("a0", range(3), max_tokens=9, tenant="a")
    driver.add("a1", range(4), max_tokens=9, tenant="a")
    driver.step()
    driver.add("b", range(5), max_tokens=2, tenant="b")
    driver.run_steps(8)
    assert set(driver.finished) == {"a0"}
    driver.run_steps(2)
    assert set(driver.finished) == {"a0", "b"}
    check_all(driver, answer)
    assert driver.core.stats.num_suspensions == 0


@pytest.mark.parametrize(
    ("weights", "places"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": 6, "b": 6}),
        ({"a": 1.0, "b": 3.0}, {"a": 3, "b": 9}),
        ({"a": 3.0, "b": 1.0}, {"a": 9, "b": 3}),
        ({"a": 1.0, "b": 100.0}, {"a": 1, "b": 11}),
        ({"a": 100.0, "b": 1.0}, {"a": 11, "b": 1}),
        ({"a": 1.0, "b": 1.0, "c": 2.0}, {"a": 3, "b": 3, "c": 6}),
    ],
)
def test_floods_end_at_shares_by_weight(make_core, weights, places):
    """The first tenant has all 12 places when the others come; each tenant has at least one then."""
    driver = make_core(2000, max_num_seqs=12, max_num_batched_tokens=64, max_model_len=400)
    for tenant, weight in weights.items():
        for number in range(20):
            driver.add(f"{tenant}{number}", [number], max_tokens=350, tenant=tenant, weight=weight)
        driver.run_steps(2)
    driver.run_steps(120)
    assert running_tenants(driver) == places
    num_gave_way = driver.core.stats.num_gave_way
    assert num_gave_way <= 12
    driver.run_steps(100)
    assert driver.core.stats.num_gave_way == num_gave_way, "and there they stay"
    assert running_tenants(driver) == places


def test_many_short_turns_beside_long_answers_cost_one_suspension_each(make_core, answer):
    driver = make_core(200, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=80)
    for number in range(6):
        driver.add(f"a{number}", [number] * 4, max_tokens=70, tenant="a")
    driver.run_steps(3)
    for number in range(30):
        driver.add(f"b{number}", [number] * 6, max_tokens=2, tenant="b")
        assert steps_to_first_token(driver, f"b{number}") <= 2
        driver.step()
        assert f"b{number}" in driver.finished
    assert 0 < driver.core.stats.num_gave_way <= 30
    check_all(driver, answer)
    # Only the newest of the four gave way, and went on in between.
    assert [driver.requests[f"a{number}"].num_suspensions for number in range(3)] == [0, 0, 0]


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cpu_blocks", [0, 40])
def test_who_has_all_blocks_gives_up_as_many_as_it_takes(make_core, answer, num_cpu_blocks):
    """20 blocks, places enough. Four answers of 5 blocks; 3 blocks are wanted."""
    driver = make_core(20, max_num_seqs=16, max_num_batched_tokens=64, num_cpu_blocks=num_cpu_blocks, max_model_len=24)
    for number in range(4):
        driver.add(f"a{number}", [number] * 17, max_tokens=4, tenant="a")
    driver.step()
    driver.add("b0", range(50, 60), max_tokens=2, tenant="b")
    plan = driver.step()
    assert (gave_way(plan, driver), [start.request_id for start in plan.starts]) == (["a3"], ["b0"])
    assert driver.tokens["b0"]
    check_all(driver, answer)
    assert driver.core.stats.num_gave_way == 1


def test_none_gives_way_in_vain(make_core, answer):
    """12 of 16 blocks are those of the oldest, so 6 could not be had: "b" waits, and no request is preempted for it."""
    driver = make_core(16, max_num_seqs=8, max_num_batched_tokens=64)
    driver.add("a0", range(45), max_tokens=4, tenant="a")
    driver.add("a1", range(60, 66), max_tokens=3, tenant="a")
    driver.add("a2", range(70, 76), max_tokens=3, tenant="a")
    driver.step()
    driver.add("b", range(100, 121), max_tokens=1, tenant="b")
    driver.step()
    assert running_tenants(driver) == {"a": 3}
    check_all(driver, answer)
    assert driver.core.stats.num_suspensions == 0


def test_out_of_blocks_the_tenant_that_uses_the_most_is_suspended(make_core, answer):
    """ "b" is the newest, but has one block; at their ninth tokens two of a's three need a third one each."""
    driver = make_core(7, max_num_seqs=8, max_num_batched_tokens=64)
    for number in range(3):
        driver.add(f"a{number}", [number] * 7, max_tokens=5, tenant="a")
    driver.add("b", range(50, 52), max_tokens=2, tenant="b")
    driver.run_steps(2)
    plan = driver.step()
    assert gave_way(plan, driver) == ["a2"]
    assert {append.request_id for append in plan.appends} == {"a0", "a1"}
    check_all(driver, answer)
    assert driver.requests["b"].num_suspensions == 0


def test_who_got_a_block_and_is_suspended_for_the_next_one_is_told_to_have_none(make_core, answer):
    """ "a1" gets the last block, then "b0" needs one, and "a1" is the newest of the tenant that uses the most."""
    driver = make_core(8, max_num_seqs=8, max_num_batched_tokens=64)
    driver.add("a0", range(3), max_tokens=9, tenant="a")
    driver.add("a1", range(10, 17), max_tokens=5, tenant="a")
    driver.add("b0", range(20, 27), max_tokens=5, tenant="b")
    driver.add("a2", range(30, 35), max_tokens=9, tenant="a")
    driver.run_steps(2)
    check_all(driver, answer)
    assert driver.core.stats.num_suspensions > 0


# -- whatever they do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cpu_blocks", [0, 30])
@pytest.mark.parametrize("seed", range(10))
def test_whoever_has_nothing_running_gets_a_token_within_a_bound(make_core, answer, seed, num_cpu_blocks):
    """Three tenants, places and blocks both short.

    A turn of a tenant that has none under way waits until the one prompt that may be in the making is computed, then
    for its own, each at the budget that decodes leave; for steps in which the others run out of blocks; and for its
    turn among the tenants.
    """
    rng = random.Random(seed)
    window, places, budget = 48, 8, rng.choice([12, 16, 40])
    driver = make_core(
        40,
        max_model_len=window,
        max_num_seqs=places,
        max_num_batched_tokens=budget,
        num_cpu_blocks=num_cpu_blocks,
        decode_reserve=0.05,
        prefill_batch_tokens=rng.choice([None, 8]),
    )
    driver.loop.look_ahead = LookAhead.LAUNCH if rng.random() < 0.5 else LookAhead.DRAFT
    weights = {"a": 1.0, "b": rng.choice([0.1, 1.0, 3.0]), "c": 1.0}
    bound = 2 * -(-window // (budget - places + 1)) + places + 2 * len(weights)
    first_of_its_tenant: dict[str, float] = {}
    num_added = 0
    while driver.now < 250 or driver.core.has_requests:
        # "a" floods; "b" comes and goes; "c" sends whatever it likes.
        for tenant, rate in [("a", 0.4), ("b", 0.05), ("c", 0.1)]:
            if driver.now < 250 and rng.random() < rate:
                name = f"{tenant}{num_added}"
                is_first = not any(r.tenant == tenant for r in driver.core._requests.values())
                prompt = [num_added] * (5 if tenant == "b" else rng.randint(1, 30))
                driver.add(name, prompt, rng.randint(1, 18), tenant=tenant, weight=weights[tenant])
                if is_first:
                    first_of_its_tenant[name] = driver.now
                num_added += 1
        driver.step()
        for name, since in list(first_of_its_tenant.items()):
            assert driver.now - since <= bound
            if driver.tokens[name]:
                del first_of_its_tenant[name]
    check_all(driver, answer)
    assert 0 < driver.core.stats.num_gave_way < num_added, "less than one for each request"


TENANTS = (("a", 1.0), ("b", 2.0), ("c", 1.0))


@pytest.mark.parametrize("num_cpu_blocks", [0, 6])
@pytest.mark.parametrize("seed", range(8))
def test_under_any_load_plans_with_drafts_and_answers_of_steps_ahead_are_the_same(
    make_core, answer, seed, num_cpu_blocks
):
    num_blocks, options = random_sizes(random.Random(seed), num_cpu_blocks)
    drafting, plain, ahead = (make_core(num_blocks, **options) for _ in range(3))
    plain.loop.look_ahead = LookAhead.NOTHING
    ahead.loop.look_ahead = LookAhead.LAUNCH
    for driver in (drafting, plain, ahead):
        Load(driver, seed, num_requests=80, tenants=TENANTS).run()
        for name, tokens in driver.tokens.items():
            request = driver.requests[name]
            assert tokens == answer(tuple(request.token_ids[: request.num_prompt_tokens]), len(tokens))
    assert drafting.plans == plain.plans
    assert drafting.tokens == plain.tokens


def test_the_loads_above_make_requests_give_way(make_core):
    """Guards the test above."""
    counts: Counter[str] = Counter()
    for seed in range(8):
        num_blocks, options = random_sizes(random.Random(seed), 6)
        driver = make_core(num_blocks, **options)
        Load(driver, seed, num_requests=80, tenants=TENANTS).run()
        stats = driver.core.stats
        counts += Counter(gave_way=stats.num_gave_way, suspended=stats.num_suspensions - stats.num_gave_way)
    assert min(counts["gave_way"], counts["suspended"]) > 5


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_exchanges_come_to_an_end(data: st.DataObject) -> None:
    """Each tenant has any number of requests of any size waiting, and nothing arrives, grows or ends.

    In whatever order they ask, the largest uses fall, and soon none gives way any more.
    """
    num_places, num_blocks = data.draw(st.integers(2, 9)), data.draw(st.integers(8, 60))
    shares = FairShares(num_places, num_blocks)
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.0, 2.0, 7.0]), min_size=2, max_size=4))
    prefixes = [[Chunk(0, [0, None]) for _ in range(data.draw(st.integers(0, 5)))] for _ in weights]

    def make(tenant: int) -> Request:
        request = Request("r", [1], SamplingParams(), tenant=str(tenant), weight=weights[tenant])
        request.chunks = [*prefixes[tenant], *(Chunk(0, [0, None]) for _ in range(data.draw(st.integers(0, 9))))]
        return request

    def rank() -> tuple[int, list[tuple[float, float]]]:
        uses = shares._count(running)
        return -len(uses), sorted(map(shares._measure, uses.values()), reverse=True)

    running = [make(data.draw(st.integers(0, len(weights) - 1))) for _ in range(num_places)]
    num_exchanges = 0
    for _ in range(60):
        newcomer = make(data.draw(st.integers(0, len(weights) - 1)))
        held = {chunk for request in running if request.tenant == newcomer.tenant for chunk in request.chunks}
        num_new = len(set(newcomer.chunks) - held)
        giving_way = shares.choose_to_give_way(newcomer, num_new, running)
        assert newcomer.tenant not in {request.tenant for request in giving_way}
        giving_way = giving_way[: data.draw(st.integers(1, 3))]
        if not giving_way:
            continue
        before, oldest = rank(), {r.tenant: r for r in reversed(running)}
        running = [request for request in running if request not in giving_way] + [newcomer]
        assert rank() < before
        assert all(request in running for request in oldest.values())
        num_exchanges += 1
    assert num_exchanges <= num_places * len(weights) * 3
