"""Cores that take chunks from each other, while each of them evicts, computes, swaps and fails.

Whatever a peer sends comes late, out of order, badly or not at all; every answer is right all the same.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.cache.sends import MAX_DELAY_S
from engine.core.plan import TransferEnd
from engine.core.request import RequestStatus
from engine.core.tier_table import PEER
from engine.step_loop import LookAhead
from tests.delayed_tier import dict_tier
from tests.engine.core.random_load import Load, random_sizes
from tests.peer_double import connect, peer_tier


@pytest.fixture
def make_peers(make_core):
    """(number of cores, GPU blocks, options of both configs) -> drivers that know each other and make no faults."""

    def make(num_cores: int, num_gpu_blocks: int, slow_tiers=(), max_wait_s=30.0, **options):
        options = {"num_cpu_blocks": 16, **options}
        drivers = [
            make_core(num_gpu_blocks, slow_tiers=(*slow_tiers, peer_tier(64, max_wait_s)), **options)
            for _ in range(num_cores)
        ]
        connect([driver.peers for driver in drivers])
        for driver in drivers:
            driver.peers.max_delay, driver.peers.failures, driver.peers.hangs = 1, 0.0, 0.0
        return drivers

    return make


def run_all(drivers) -> None:
    """Until no request is left and nothing is on its way."""
    for _ in range(500):
        is_busy = [driver.step() is not None or driver.core.has_requests for driver in drivers]
        if not any(is_busy) and not any(num_open(driver) for driver in drivers):
            break
    else:
        raise AssertionError("never comes to rest")
    for driver in drivers:
        comes_to_rest(driver)


def num_open(driver) -> int:
    num_slow = 0 if driver.slow_tier is None else driver.slow_tier.num_open
    return num_slow + driver.peers.num_open + len(driver.core.handover.sends)


def comes_to_rest(driver) -> None:
    """Every block, place and budget that hand-over had is given back."""
    tiers, handover = driver.core._cache.tiers, driver.core.handover
    assert not tiers.peer.pool.num_used
    assert not any(tier.lent for tier in tiers)
    assert not handover.has_copies_to_plan
    assert not handover.expectations._open_offers
    assert not handover.expectations._expected
    slow = driver.core._cache.slow_transfers
    assert (slow.num_loads, slow.num_awaited_loads, slow.num_sends, slow.num_stores) == (0, 0, 0, 0)
    driver.core.check_integrity()


def test_a_conversation_goes_on_at_a_peer_with_all_of_its_context(make_peers, answer):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=2, conversation_id="a")
    run_all([first, second])
    prompt = (*range(13), *first.tokens["a1"], 7)
    request = second.add("a2", prompt, max_tokens=2, conversation_id="a")
    assert second.step() is None
    assert request.status is RequestStatus.LOADING
    run_all([first, second])
    assert second.tokens["a2"] == answer(prompt, 2)
    assert request.num_cached_tokens == 14, "with its tail"
    assert second.core.stats.cached_tokens[PEER] == 14
    assert second.core.stats.slow_transfers[f"{PEER}_loaded"] == 4
    first.add("a3", (*prompt, *second.tokens["a2"], 8), max_tokens=1, conversation_id="a")
    run_all([first, second])
    assert first.core.stats.slow_transfers[f"{PEER}_loaded"] == 2, "only what is new there, a chunk and a tail"


def test_what_is_sent_is_not_used_by_that(make_peers):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    last_active = {chunk.key: chunk.last_active for chunk in first.core._cache.index}
    first.now = second.now = 100.0
    second.add("a2", range(14), max_tokens=1, conversation_id="a")
    run_all([first, second])
    assert {chunk.key: chunk.last_active for chunk in first.core._cache.index} == last_active


def test_two_peers_pull_one_chunk(make_peers, answer):
    drivers = make_peers(3, 8)
    drivers[0].add("a1", range(13), max_tokens=1, conversation_id="a")
    drivers[0].run()
    requests = [driver.add("a2", (*range(12), 9, 9), max_tokens=2) for driver in drivers[1:]]
    for driver in drivers[1:]:
        driver.step()
    run_all(drivers)
    assert [request.num_cached_tokens for request in requests] == [12, 12]
    assert all(driver.tokens["a2"] == answer((*range(12), 9, 9), 2) for driver in drivers[1:])


def test_what_is_expected_from_a_peer_is_not_found_by_another_one(make_peers):
    """So two engines never send each other in circles."""
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    request = second.add("a2", range(14), max_tokens=1, conversation_id="a")
    handover = second.core.handover
    assert handover.missing_chunks(request) is None, "all of it is expected"
    keys = request.chunk_keys
    assert not handover.find_chunks(keys, second.now).idle_s
    handover.start_sends(keys, second.now)
    handover.plan(second.now)
    assert handover.take_declined() == keys


def test_a_request_that_ends_before_its_turn_expects_no_more(make_peers):
    first, second = make_peers(2, 8, max_num_queued_reqs=2)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    second.add("a2", range(14), max_tokens=1, conversation_id="a")
    assert second.core._cache.tiers.peer.pool.num_used > 0
    second.core.abort("a2", second.now)
    comes_to_rest(second)
    for number in range(2):
        second.add(f"a{number}", range(14), max_tokens=1, conversation_id="a")
    second.add("b", range(30, 34), max_tokens=1, tenant="other")  # one of the other tenant's is shed for it
    assert sum(name in second.core._requests for name in ("a0", "a1", "b")) == 2
    run_all([first, second])


def test_a_peer_that_never_answers_is_a_miss(make_peers, answer):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    request = second.add("a2", range(14), max_tokens=2, conversation_id="a")
    while second.core.has_requests:  # the first one does nothing any more
        second.step()
    assert second.tokens["a2"] == answer(tuple(range(14)), 2)
    assert request.num_cached_tokens == 0
    assert second.now >= 30.0
    second.peers.wake()
    run_all([first, second])


def test_what_is_gone_is_no_fault_of_the_tier(make_peers, answer):
    first, second = make_peers(2, 8)
    slow = second.core._cache.slow_transfers
    for turn in range(5):
        first.add(f"a{turn}", range(20 * turn, 20 * turn + 13), max_tokens=1)
        first.run()
        prompt = tuple(range(20 * turn, 20 * turn + 14))
        request = second.add(f"b{turn}", prompt, max_tokens=1)
        second.peers._expected.clear()  # as if no peer had it
        run_all([first, second])
        assert second.tokens[f"b{turn}"] == answer(prompt, 1)
        assert request.num_cached_tokens == 0
        assert slow.may_load(second.core._cache.tiers.peer, second.now)
    assert second.core.stats.slow_transfers[f"{PEER}_load_gone"] >= 5


def test_a_chunk_of_a_running_request_is_sent(make_peers):
    """A system prompt that is always in use would else never move."""
    first, second = make_peers(2, 12)
    running = first.add("a1", range(9), max_tokens=30)
    first.run_steps(3)
    assert running.chunks[0].pins
    request = second.add("b1", (*range(8), 7, 7), max_tokens=1)
    run_all([first, second])
    assert request.num_cached_tokens == 8


def test_what_cannot_be_had_soon_is_declined(make_peers):
    (first,) = make_peers(1, 8, num_cpu_blocks=1)
    first.add("a1", range(13), max_tokens=1)
    first.run()
    cache = first.core._cache
    cache.allocator.hold_back({"cpu": 1}, first.now)
    keys = [chunk.key for chunk in cache.index if chunk.num_tokens == 4]
    first.core.handover.start_sends(keys, first.now)
    first.core.handover.plan(first.now)
    assert first.core.handover.take_declined() == keys
    cache.allocator.hold_back({"cpu": 0}, first.now)
    first.core.handover.start_sends(keys, first.now)
    first.core.handover.plan(first.now)
    assert first.core.next_deadline_s() == first.now + MAX_DELAY_S
    first.now += MAX_DELAY_S
    first.core.handover.plan(first.now)
    assert set(first.core.handover.take_declined()) == set(keys)


def test_sends_lend_no_more_than_a_part_of_the_cpu_tier(make_peers, monkeypatch):
    monkeypatch.setattr("engine.core.cache.sends.MAX_DELAY_S", 100.0)
    first, second = make_peers(2, 40, num_cpu_blocks=24)
    first.add("a1", range(100, 181), max_tokens=1, conversation_id="a")
    first.run()
    first.peers.hangs = 1.0
    request = second.add("a2", range(100, 182), max_tokens=1, conversation_id="a")
    num_lent = set()
    for _ in range(4):
        second.step()
        first.step()
        num_lent.add(len(first.core._cache.tiers.secondary.lent))
    assert max(num_lent) == 3 == first.core.handover.sends.max_copies
    first.peers.hangs = 0.0
    first.peers.wake()
    run_all([first, second])
    assert request.num_cached_tokens > 40


def test_chunks_on_the_disk_are_loaded_to_be_sent(make_peers, answer, monkeypatch):
    monkeypatch.setattr("engine.core.cache.sends.MAX_DELAY_S", 100.0)
    first, second = make_peers(2, 4, slow_tiers=(dict_tier(32),), num_cpu_blocks=4, swap_out_watermark=0.99)
    for driver in (first, second):
        driver.slow_tier._failures, driver.slow_tier._hangs, driver.slow_tier._max_delay = 0.0, 0.0, 0
    for name, begin in (("a", 0), ("b", 20), ("c", 40)):
        first.add(f"{name}1", range(begin, begin + 13), max_tokens=1, conversation_id=name)
        run_all([first, second])
    far = [chunk for chunk in first.core._cache.index if chunk.blocks[0] is None and chunk.blocks[1] is None]
    assert len(far) >= 3
    request = second.add("a2", range(14), max_tokens=2, conversation_id="a")
    run_all([first, second])
    assert second.tokens["a2"] == answer(tuple(range(14)), 2)
    assert request.num_cached_tokens >= 8
    assert first.core.stats.slow_transfers["dict_loaded"] == first.core.stats.slow_transfers[f"{PEER}_sent"], (
        "once each"
    )


def test_before_the_end_what_was_sent_makes_room_for_the_rest(make_peers, answer, monkeypatch):
    """The CPU tier is full, and what lies in the GPU tier passes through it."""
    monkeypatch.setattr("engine.core.cache.sends.MAX_DELAY_S", 1000.0)
    monkeypatch.setattr("engine.core.cache.sends.MAX_DISPLACED", 1)
    (first,) = make_peers(1, 16, num_cpu_blocks=8, swap_out_watermark=0.0, max_wait_s=1000.0)
    (third,) = make_peers(1, 16, num_cpu_blocks=40, max_wait_s=1000.0)
    connect([first.peers, third.peers])
    names = {"a": 0, "b": 20, "c": 40, "d": 60, "e": 80, "f": 100}
    for name, begin in names.items():
        first.add(f"{name}1", range(begin, begin + 13), max_tokens=1, conversation_id=name)
        first.run()
        first.now += 10
    assert first.core._cache.tiers.secondary.pool.num_free == 0
    assert len(first.core._cache.index) == 24, "both tiers are full"
    first.core.start_drain(first.now)
    for name, begin in names.items():
        context = (*range(begin, begin + 13), *first.tokens[f"{name}1"])
        first.peers.offer(third.peers, name, context, name, "local")
    run_all([first, third])
    assert len(third.core._cache.index) == 24, "all of it has arrived"
    for name, begin in names.items():
        request = third.add(f"{name}2", range(begin, begin + 14), max_tokens=2, conversation_id=name)
        third.run()
        assert request.num_cached_tokens == 13
        assert third.tokens[f"{name}2"] == answer(tuple(range(begin, begin + 14)), 2)


# -- offers ----------------------------------------------------------------------------------------------------------------


def test_an_offer_is_taken_without_a_request(make_peers, answer):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=2, conversation_id="a")
    first.run()
    context = (*range(13), *first.tokens["a1"])
    first.peers.offer(second.peers, "one", context, "a", "local")
    run_all([first, second])
    assert second.peers.ended_offers == ["one"]
    request = second.add("a2", (*context, 7), max_tokens=2, conversation_id="a")
    second.run()
    assert request.num_cached_tokens == 14
    assert request.num_loaded_tokens == 14
    assert second.tokens["a2"] == answer((*context, 7), 2)


def test_an_offer_takes_only_what_is_worth_less(make_peers):
    """Its chunks keep their age: those here that were used later stay."""
    first, second = make_peers(2, 8, num_cpu_blocks=4)
    first.add("a1", range(13), max_tokens=2, conversation_id="a")
    first.run()
    second.now = 50.0
    second.add("b1", range(20, 33), max_tokens=2, conversation_id="b")
    second.run()
    cache = second.core._cache
    while second.step() is not None:
        pass
    cache.allocator.plan_swap_outs(8, 16, second.now)
    while second.step() is not None:
        pass
    here = {chunk.key for chunk in cache.index if chunk.blocks[1] is not None}
    assert len(here) == 4
    first.now = second.now
    first.peers.offer(second.peers, "one", (*range(13), *first.tokens["a1"]), "a", "local")
    run_all([first, second])
    assert second.peers.ended_offers == ["one"]
    assert here == {chunk.key for chunk in cache.index if chunk.blocks[1] is not None}
    assert second.core.stats.slow_transfers[f"{PEER}_loaded"] == 0


def test_offers_wait_while_a_request_loads(make_peers):
    first, second = make_peers(2, 8)
    for name, begin in (("a", 0), ("b", 20)):
        first.add(f"{name}1", range(begin, begin + 13), max_tokens=1, conversation_id=name)
        first.run()
    second.peers.hangs = 1.0
    second.add("a2", range(14), max_tokens=1, conversation_id="a")
    second.step()
    slow = second.core._cache.slow_transfers
    num_awaited = slow.num_awaited_loads
    first.peers.offer(second.peers, "one", tuple(range(20, 33)), "b", "local")
    second.step()
    assert slow.num_loads == num_awaited > 0
    second.peers.hangs = 0.0
    first.step()
    second.peers.wake()
    run_all([first, second])
    assert second.peers.ended_offers == ["one"]


def test_a_request_may_wait_for_what_an_offer_has_begun(make_peers):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    second.peers.hangs = 1.0
    first.peers.offer(second.peers, "one", tuple(range(13)), "a", "local")
    second.step()
    slow = second.core._cache.slow_transfers
    assert (slow.num_loads, slow.num_awaited_loads) == (2, 0)
    request = second.add("a2", range(14), max_tokens=1, conversation_id="a")
    second.step()
    assert request.status is RequestStatus.LOADING
    assert slow.num_awaited_loads == slow.num_loads
    second.peers.hangs = 0.0
    first.step()
    second.peers.wake()
    run_all([first, second])
    assert second.peers.ended_offers == ["one"]


def test_an_offer_ends_when_its_engine_does(make_peers):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    first.peers.offer(second.peers, "one", tuple(range(13)), "a", "local")
    second.core.start_drain(second.now)
    assert second.core.handover.take_ended_offers() == ["one"]
    comes_to_rest(second)


def test_an_offer_that_makes_no_sense_takes_nothing(make_peers):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    records = []
    first.peers.expect = lambda peer, records: None
    accept, second.core.handover.accept_offer = (
        second.core.handover.accept_offer,
        lambda found, *_: records.extend(found),
    )
    first.peers.offer(second.peers, "one", tuple(range(13)), "a", "local")
    record = records[0]
    changes = ({"num_tokens": 0}, {"num_tokens": 5}, {"position": -1}, {"key": b"short"}, {"idle_s": float("nan")})
    accept([replace(record, **change) for change in changes], "one", second.now)
    assert second.core.handover.take_ended_offers() == ["one"]
    comes_to_rest(second)


# -- anything at any time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cpu_blocks", [1, 2, 3, 12])
@pytest.mark.parametrize("with_disk", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_under_any_load_every_answer_is_right(make_core, answer, seed, with_disk, num_cpu_blocks):
    rng = random.Random(f"{seed} {with_disk} {num_cpu_blocks}")
    loads = []
    for _ in range(3):
        num_blocks, options = random_sizes(rng, num_cpu_blocks)
        options["keep"] = True
        options["cost_model"] = CostModel(1.0, 0.25, 4, load_costs={"cpu": 0.0, PEER: seed % 2})
        slow_tiers = (*([dict_tier(20)] if with_disk else []), peer_tier(rng.choice([3, 40])))
        driver = make_core(num_blocks, slow_tiers=slow_tiers, **options)
        driver.loop.look_ahead = rng.choice([LookAhead.DRAFT, LookAhead.LAUNCH])
        loads.append(Load(driver, seed, num_requests=40))  # the same conversations at the same time, or nearly
    drivers = [load.driver for load in loads]
    connect([driver.peers for driver in drivers])
    running = [load.steps() for load in loads]
    num_offers = 0
    while running:
        for steps in list(running):
            if next(steps, "ended") == "ended":
                running.remove(steps)
        source, target = rng.sample(drivers, 2)
        names = list(source.tokens)
        if names and rng.random() < 0.05:
            request = source.requests[rng.choice(names)]
            num_offers += 1
            source.peers.offer(
                target.peers, f"offer {num_offers}", request.token_ids, request.conversation_id, request.tenant
            )
        for driver in drivers:
            if rng.random() < 0.05:
                driver.peers.wake()
    for driver in drivers:
        driver.peers.hangs = driver.peers.failures = 0.0
        if driver.slow_tier is not None:
            driver.slow_tier._hangs = driver.slow_tier._failures = 0.0
    for _ in range(300):
        is_busy = [driver.step() is not None for driver in drivers]
        if not any(is_busy) and not any(num_open(driver) for driver in drivers):
            break
        for driver in drivers:
            driver.peers.wake()
            if driver.slow_tier is not None:
                driver.slow_tier.wake()
    for load in loads:
        comes_to_rest(load.driver)
        for name, prompt in load.prompts.items():
            assert load.driver.tokens[name] == answer(prompt, len(load.driver.tokens[name]))
    assert sum(len(driver.peers.ended_offers) for driver in drivers) == num_offers
    if num_cpu_blocks > 3:
        outcomes = [sum(d.core.stats.slow_transfers[f"{PEER}_{what}"] for d in drivers) for what in ("loaded", "sent")]
        assert all(outcomes), outcomes


def test_transfers_of_peers_may_end_in_any_state_of_their_chunks(make_peers):
    """Computed, swapped out, evicted and dropped while it was on its way."""
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    second.peers.hangs = 1.0
    request = second.add("a2", range(14), max_tokens=1, conversation_id="a")
    second.step()
    request.load_deadline_s = second.now  # it computes all of it now
    second.run()
    second.core._cache.allocator.plan_swap_outs(8, 16, second.now)
    while second.step() is not None:
        pass
    second.core._cache.allocator.hold_back({"gpu": 8}, second.now)
    second.core.check_integrity()
    for transfer_id in list(second.peers._loads):
        del second.peers._loads[transfer_id]
        second.core.complete_transfer(TransferEnd(transfer_id, transfer_id % 2 > 0), second.now)
        second.core.check_integrity()
    comes_to_rest(second)


def test_a_load_whose_request_has_ended_is_kept(make_peers):
    """The bytes were paid for."""
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    second.peers.hangs = 1.0
    second.add("a2", range(14), max_tokens=1, conversation_id="a")
    second.step()
    first.run_steps(1)  # swaps out what is wanted
    second.core.abort("a2", second.now)
    second.core.check_integrity()
    second.peers.hangs = 0.0
    for load in second.peers._loads.values():
        load.due = 0
    run_all([first, second])
    assert second.core.get_statistics()["num_idle_chunks"]["cpu"] == 4


def test_a_request_that_runs_expects_no_more(make_peers):
    first, second = make_peers(2, 8)
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    request = second.add("a2", range(14), max_tokens=8, conversation_id="a")
    second.core._cache.prices.is_loaded = lambda *_: False  # all of it is computed
    second.step()
    assert request.status is RequestStatus.RUNNING
    comes_to_rest(second)


def test_what_was_computed_while_it_was_on_its_way_is_not_stored_yet(make_peers):
    """One chunk has one slow transfer at a time."""
    first, second = make_peers(2, 4, slow_tiers=(dict_tier(16),), num_cpu_blocks=8, swap_out_watermark=0.99)
    second.slow_tier._failures, second.slow_tier._hangs, second.slow_tier._max_delay = 0.0, 0.0, 0
    first.add("a1", range(13), max_tokens=1, conversation_id="a")
    first.run()
    second.peers.hangs = 1.0
    request = second.add("a2", range(14), max_tokens=1, conversation_id="a")
    second.step()
    assert len(second.peers._loads) == 4
    request.load_deadline_s = second.now
    second.run()
    for _ in range(20):
        second.step()
    assert second.core.get_statistics()["num_idle_chunks"]["both"] == 4
    assert second.core.stats.slow_transfers["dict_stored"] <= 1, "at most the tail that it has just made"
    for driver in (first, second):
        driver.peers.hangs = 0.0
        driver.peers.wake()
    run_all([first, second])
