"""A third tier that ends its transfers late, out of order, badly or not at all.

Every answer is right all the same, and a request that waits for it keeps no other from running.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.cache.prices import PROBE_AFTER_S
from engine.core.plan import QuerySegment
from engine.core.request import Request, RequestStatus, SamplingParams
from engine.core.tier_table import TierSpec
from engine.engine_thread import EngineThread
from engine.errors import ConfigError
from engine.step_loop import LookAhead
from tests.delayed_tier import NAME, dict_tier
from tests.engine.core.random_load import Load, random_sizes


def with_a_context_in_the_slow_tier(make_core, **options):
    """Conversation a's first turn of 13 tokens is in no other tier; its last chunk is a tail of one token."""
    driver = make_core(4, num_cpu_blocks=4, slow_tiers=(dict_tier(16),), swap_out_watermark=1.0, **options)
    driver.slow_tier.__init__(
        driver.executor.read_slots, driver.executor.write_slots, max_delay=0, failures=0.0, hangs=0.0
    )
    for name, first in (("a", 0), ("b", 20), ("c", 40)):
        driver.add(f"{name}1", range(first, first + 13), max_tokens=1, conversation_id=name)
        driver.run()
        driver.settle()
    return driver


def test_a_request_waits_for_a_slow_tier_and_computes_the_rest(make_core, answer):
    driver = with_a_context_in_the_slow_tier(make_core)
    request = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    assert driver.step() is None
    assert request.status is RequestStatus.LOADING
    driver.run()
    assert driver.tokens["a2"] == answer(tuple(range(14)), 2)
    stats = driver.core.stats
    assert stats.cached_tokens[NAME] == request.num_loaded_tokens
    assert request.num_loaded_tokens >= 8
    assert stats.slow_transfers[f"{NAME}_loaded"] == -(-request.num_loaded_tokens // 4)


@pytest.mark.parametrize("look_ahead", LookAhead)
def test_a_request_that_waits_keeps_no_other_from_running(make_core, answer, look_ahead):
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.loop.look_ahead = look_ahead
    driver.slow_tier._hangs = 1.0
    waiting = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.add("short", range(60, 65), max_tokens=3)
    while "short" not in driver.finished:
        driver.step()
        assert waiting.status is RequestStatus.LOADING
    assert driver.tokens["short"] == answer(tuple(range(60, 65)), 3)
    driver.slow_tier.wake()
    driver.run()
    assert driver.tokens["a2"] == answer(tuple(range(14)), 2)


def test_a_request_waits_no_longer_than_the_tier_says(make_core, answer):
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._hangs = 1.0
    request = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    assert driver.step() is None
    deadline = driver.core.next_deadline_s()
    assert deadline == driver.now + 30.0
    driver.now = deadline - 1
    assert driver.step() is not None
    driver.run()
    assert driver.tokens["a2"] == answer(tuple(range(14)), 2)
    assert request.num_not_loaded_tokens >= 8
    driver.slow_tier.wake()  # what arrives too late is kept
    driver.settle()
    driver.core.check_integrity()


def test_a_deadline_is_kept_while_steps_are_launched_ahead(make_core, answer):
    """`schedule` is not called as long as `schedule_ahead` gives plans."""
    driver = with_a_context_in_the_slow_tier(make_core, max_num_seqs=2)
    driver.loop.look_ahead = LookAhead.LAUNCH
    driver.slow_tier._hangs = 1.0
    waiting = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.add("long", range(60, 62), max_tokens=12)
    driver.run_steps(3)
    assert waiting.status is RequestStatus.LOADING
    assert driver.core.stats.num_steps_ahead >= 3
    driver.now = driver.core.next_deadline_s()
    driver.run_steps(3)
    assert waiting.status is not RequestStatus.LOADING
    assert "long" not in driver.finished
    driver.run()
    assert driver.tokens["a2"] == answer(tuple(range(14)), 2)
    assert driver.tokens["long"] == answer(tuple(range(60, 62)), 12)


def test_the_engine_thread_goes_on_when_a_deadline_is_there(make_core):
    """Though no command comes, and the transfer never ends."""
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._hangs = 1.0
    driver.loop._now = lambda: driver.now + time.monotonic() - begin_s
    begin_s = time.monotonic()
    ended = threading.Event()
    request = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    assert driver.loop.step() is None
    assert request.status is RequestStatus.LOADING
    request.load_deadline_s = driver.loop._now() + 0.05
    thread = EngineThread(
        driver.loop, after_step=lambda: driver.core.has_requests or ended.set(), on_end=lambda error: None
    )
    try:
        assert ended.wait(60)
    finally:
        thread.stop()
    assert "a2" in driver.finished
    driver.core.check_integrity()


def test_how_long_the_loop_may_pause(make_core):
    driver = with_a_context_in_the_slow_tier(make_core)
    assert driver.loop.max_pause_s() is None
    driver.slow_tier._hangs = 1.0
    driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    assert driver.step() is None
    assert driver.loop.max_pause_s() == 30.0
    driver.now += 31
    assert driver.loop.max_pause_s() == 0.0


def test_a_tenant_whose_requests_wait_for_a_slow_tier_leaves_room_in_the_queue(make_core):
    """Requests whose turn had come are never shed, so only so many may wait outside of their tenant's queue."""
    driver = with_a_context_in_the_slow_tier(make_core, max_num_seqs=2, max_num_queued_reqs=4)
    driver.slow_tier._hangs = 1.0
    requests = [driver.add(f"fork {n}", (*range(12), 70 + n, 80), max_tokens=2) for n in range(4)]
    driver.core.schedule(driver.now)
    while driver.core.get_statistics()["num_requests_waiting"] < 4:
        requests.append(driver.add(f"fork {len(requests)}", (*range(12), 70 + len(requests), 80), max_tokens=2))
    newcomer = Request("other", (1, 2, 3), SamplingParams(max_tokens=2), tenant="other")
    assert driver.core.add_request(newcomer, driver.now) == [requests[-1].request_id]
    assert [request.status for request in requests].count(RequestStatus.LOADING) == 2


def test_statistics_may_be_asked_for_while_a_transfer_ends(make_core, monkeypatch):
    """From another thread, so at any moment."""
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._hangs = 1.0
    driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.step()
    driver.slow_tier.wake()

    def count_tokens(request):
        for end in driver.slow_tier.poll():
            driver.core.complete_transfer(end, driver.now)
        return len(request.token_ids)

    monkeypatch.setattr(Request, "num_tokens", property(count_tokens))
    assert driver.core.get_statistics()["num_tokens_waiting"] == 14


def test_what_cannot_be_loaded_is_forgotten_and_computed(make_core, answer):
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._failures = 1.0
    driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.run()
    assert driver.tokens["a2"] == answer(tuple(range(14)), 2)
    stats = driver.core.stats
    assert stats.slow_transfers[f"{NAME}_load_failed"] >= 2
    assert stats.slow_transfers[f"{NAME}_loaded"] == 0


def test_an_abort_ends_the_waiting_at_once(make_core):
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._hangs = 1.0
    driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.step()
    driver.core.abort("a2", driver.now)
    assert not driver.core.has_requests
    driver.core.check_integrity()
    driver.slow_tier.wake()
    driver.settle()
    assert driver.core.stats.slow_transfers[f"{NAME}_loaded"] >= 2, "the bytes were paid for"


def test_two_requests_wait_for_one_transfer_of_a_chunk(make_core, answer):
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._hangs = 1.0
    requests = [driver.add(f"fork {n}", (*range(12), 70 + n, 80), max_tokens=2) for n in range(2)]
    driver.step()
    assert [request.status for request in requests] == [RequestStatus.LOADING] * 2
    driver.slow_tier._hangs = 0.0
    driver.slow_tier.wake()
    driver.run()
    assert driver.core.stats.slow_transfers[f"{NAME}_loaded"] == 3, "each chunk once"
    for request in requests:
        assert driver.tokens[request.request_id] == answer(tuple(request.token_ids[:14]), 2)


def test_a_request_waits_until_others_loads_leave_room_for_its_own(make_core, answer):
    """Only half of the CPU tier is loaded to at a time, here two blocks: more would evict each other."""
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._hangs = 1.0
    driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    late = driver.add("b2", range(20, 34), max_tokens=2, conversation_id="b")
    driver.step()
    assert driver.core._cache.slow_transfers.num_loads == 2
    assert late.status is RequestStatus.LOADING
    assert late.loads == {}
    driver.slow_tier._hangs = 0.0
    driver.slow_tier.wake()
    driver.run()
    assert late.num_loaded_tokens > 0
    assert driver.tokens["b2"] == answer(tuple(range(20, 34)), 2)


def test_what_has_arrived_is_not_the_next_to_go(make_core):
    driver = with_a_context_in_the_slow_tier(make_core)
    request = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.step()
    driver.now += 5
    for end in driver.slow_tier.poll():
        driver.core.complete_transfer(end, driver.now)
    cache = driver.core._cache
    arrived = [chunk for chunk in cache.index if chunk.key in request.loads and chunk.blocks[1] is not None]
    assert len(arrived) == 2
    assert all(chunk.last_active == driver.now for chunk in arrived)
    assert cache.tiers.secondary.choose_victim(driver.now) not in arrived


def test_a_tail_that_is_written_on_loses_its_copies_in_all_tiers(make_core):
    driver = make_core(8, num_cpu_blocks=4, slow_tiers=(dict_tier(16),), swap_out_watermark=1.0)
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    driver.add("a1", range(6), max_tokens=1, conversation_id="a")
    driver.run()
    driver.settle()
    (tail,) = [chunk for chunk in driver.core._cache.index if chunk.num_tokens < 4]
    assert all(block is not None for block in tail.blocks)
    driver.add("a2", range(8), max_tokens=2, conversation_id="a")
    driver.step()
    assert tail.blocks[1:] == [None, None]
    assert tail.blocks[0] is not None


def test_no_load_that_costs_more_than_computing(make_core):
    prices = {"cpu": 0.5, NAME: 1.5}
    costs = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4, load_costs=prices, is_in_seconds=True)
    driver = with_a_context_in_the_slow_tier(make_core, cost_model=costs)
    driver.core.note_load_price(NAME, 2.5, driver.now)  # what is stored has become more expensive
    request = driver.add("a2", range(14), max_tokens=2, conversation_id="a")  # chunks cost 2, 3 and 4
    driver.step()
    assert request.status is RequestStatus.LOADING
    assert [key in request.loads for key in request.chunk_keys] == [False, False, True]


def test_no_store_unless_loading_will_be_clearly_cheaper_than_computing(make_core):
    """By a quarter at least."""
    costs = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4, load_costs={NAME: 2.9})
    driver = with_a_context_in_the_slow_tier(make_core, cost_model=costs)
    stored = [chunk.position for chunk in driver.core._cache.index if chunk.blocks[2] is not None]
    assert set(stored) == {2}, "chunks cost 2, 3 and 4"
    assert driver.core.stats.slow_refusals[f"{NAME}_store"] > 0


@pytest.mark.parametrize("num_cpu_blocks", [2, 4, 6])
def test_of_a_context_larger_than_the_secondary_tier_the_end_is_loaded(make_core, answer, num_cpu_blocks):
    """As much as there are blocks; what costs least is computed."""
    driver = make_core(14, num_cpu_blocks=num_cpu_blocks, slow_tiers=(dict_tier(64),), swap_out_watermark=1.0)
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    for turn in range(3):
        for name, first in (("a", 0), ("b", 60), ("c", 120)):
            request = driver.add(f"{name}{turn}", range(first, first + 41), max_tokens=2, conversation_id=name)
            driver.run()
            driver.settle()
            assert driver.tokens[f"{name}{turn}"] == answer(tuple(range(first, first + 41)), 2)
    assert request.num_loaded_tokens >= 4 * num_cpu_blocks - 3


def test_a_tier_that_fails_is_left_alone_for_a_while(make_core):
    driver = make_core(4, num_cpu_blocks=4, slow_tiers=(dict_tier(16),), swap_out_watermark=1.0)
    driver.slow_tier._failures, driver.slow_tier._hangs = 1.0, 0.0
    driver.add("a1", range(13), max_tokens=1, conversation_id="a")
    driver.run()
    num_before = len(driver.settle())
    failed = driver.core.stats.slow_transfers[f"{NAME}_store_failed"]
    assert 0 < failed <= 4 * (num_before + 20), "stores are tried again and again"
    assert driver.core.stats.slow_transfers[f"{NAME}_stored"] == 0


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("num_slow_blocks", [2, 30])
@pytest.mark.parametrize("seed", range(12))
def test_under_any_load_every_answer_is_right(make_core, answer, seed, num_slow_blocks, runs_ahead):
    num_blocks, options = random_sizes(random.Random(seed), 6)
    options["cost_model"] = replace(options["cost_model"], load_costs={"cpu": 0.0, NAME: seed % 3})
    driver = make_core(num_blocks, slow_tiers=(dict_tier(num_slow_blocks),), **options)
    driver.loop.look_ahead = LookAhead.LAUNCH if runs_ahead else LookAhead.DRAFT
    load = Load(driver, seed)
    load.run()
    assert any(driver.tokens.values())
    for name, prompt in load.prompts.items():
        assert driver.tokens[name] == answer(prompt, len(driver.tokens[name]))


def test_the_loads_above_have_everything_in_them(make_core):
    driver = make_core(8, max_num_seqs=6, num_cpu_blocks=8, slow_tiers=(dict_tier(30),), max_num_batched_tokens=7)
    driver.loop.look_ahead = LookAhead.LAUNCH
    Load(driver, seed=1, num_requests=300).run()
    stats = driver.core.stats
    assert all(stats.slow_transfers.values()), stats.slow_transfers
    assert min(stats.num_suspensions, stats.num_aborted, stats.num_failed, stats.num_corrupted_swaps) > 0
    assert min(stats.cached_tokens.values()) > 0
    assert min(stats.evictions[reason] for reason in ("cpu_reclaimed", f"{NAME}_dropped")) > 0


@pytest.mark.parametrize(
    ("num_cpu_blocks", "tiers", "complaint"),
    [
        (0, (dict_tier(4),), "needs a CPU tier"),
        (4, (replace(dict_tier(4), name="cpu"),), "must be unique"),
        (4, (replace(dict_tier(4), is_fast=True),), "is_fast=False"),
    ],
)
def test_tiers_that_do_not_go_together(make_core, num_cpu_blocks, tiers, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_core(4, num_cpu_blocks=num_cpu_blocks, slow_tiers=tiers)


# -- prices, admission, restarts -------------------------------------------------------------------------------------------


def stored_keys(driver) -> set[bytes]:
    return {chunk.key for chunk in driver.core._cache.index if chunk.blocks[2] is not None}


def test_what_is_slower_to_load_is_neither_loaded_nor_stored(make_core, answer):
    driver = with_a_context_in_the_slow_tier(make_core)
    num_stored = len(stored_keys(driver))
    prices = driver.core._cache.prices
    prices.note_step([QuerySegment("x", 0, tuple(range(8)))], 4.0)  # a unit is a second
    prices.note_load(NAME, 1000.0, driver.now)
    request = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.run()
    driver.settle()
    assert driver.tokens["a2"] == answer(tuple(range(14)), 2)
    assert request.num_loaded_tokens == 0
    stats = driver.core.stats
    assert stats.slow_refusals[f"{NAME}_load"] >= 2
    assert stats.slow_refusals[f"{NAME}_store"] >= 1
    assert stats.slow_transfers[f"{NAME}_loaded"] == 0
    assert len(stored_keys(driver)) <= num_stored


def test_all_loads_together_must_be_worth_it_with_those_in_front(make_core):
    """Each alone is cheaper than computing; behind a long queue of others they are not."""
    costs = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4, load_costs={NAME: 1.5})
    driver = with_a_context_in_the_slow_tier(make_core, cost_model=costs)
    cache = driver.core._cache
    request = Request("a2", range(14), SamplingParams(max_tokens=2), conversation_id="a")
    match = cache.match_context(request)
    wanted = cache._choose_loads(request, match, driver.now)
    assert len(wanted) >= 2
    cache.slow_transfers._num_loads = 100
    assert cache._choose_loads(request, match, driver.now) == []
    cache.slow_transfers._num_loads = 0
    assert driver.core.stats.slow_refusals[f"{NAME}_load"] == len(wanted)


def test_the_price_of_a_refused_tier_is_measured_again_now_and_then(make_core):
    driver = with_a_context_in_the_slow_tier(make_core)
    prices = driver.core._cache.prices
    prices.note_step([QuerySegment("x", 0, tuple(range(8)))], 4.0)
    prices.note_load(NAME, 1000.0, driver.now)
    driver.now += PROBE_AFTER_S + 1
    request = driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    assert driver.step() is not None, "it does not wait"
    assert request.status is RequestStatus.RUNNING
    driver.run()
    driver.settle()
    assert driver.core.stats.slow_transfers[f"{NAME}_loaded"] == 1


def second_use_only(num_blocks: int, **changes) -> TierSpec:
    return replace(dict_tier(num_blocks), stores_first_use=False, **changes)


def test_only_what_is_used_again_is_stored(make_core):
    driver = make_core(6, num_cpu_blocks=12, slow_tiers=(second_use_only(16),), swap_out_watermark=0.99)
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    driver.add("a1", range(9), max_tokens=2, conversation_id="a")
    driver.add("b1", range(50, 59), max_tokens=2, conversation_id="b")
    driver.run()
    driver.settle()
    assert stored_keys(driver) == set()
    second = driver.add("a2", (*range(9), *driver.tokens["a1"], 7, 7, 7, 7), max_tokens=2, conversation_id="a")
    driver.run()
    driver.settle()
    assert stored_keys(driver) >= set(second.chunk_keys), "with what followed in its second turn"
    of_b = {chunk.key for chunk in driver.core._cache.index} - stored_keys(driver)
    assert of_b


def test_what_was_dropped_and_computed_again_is_stored(make_core):
    """Else a tier behind small ones would stay empty: all would be dropped before its second use."""
    driver = make_core(4, num_cpu_blocks=1, slow_tiers=(second_use_only(16),), swap_out_watermark=0.99)
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    for turn in range(3):
        for name, first in (("a", 0), ("b", 20), ("c", 40)):
            driver.add(f"{name}{turn}", range(first, first + 13), max_tokens=1, conversation_id=name)
            driver.run()
            driver.settle()
    assert driver.core.stats.num_dropped_tokens > 0
    assert driver.core.stats.slow_transfers[f"{NAME}_stored"] > 0


def test_no_more_is_stored_in_a_time_than_the_tier_holds(make_core):
    driver = make_core(4, num_cpu_blocks=4, slow_tiers=(replace(dict_tier(6), rewrite_s=1e9),), swap_out_watermark=0.99)
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    for number in range(12):
        driver.add(f"r{number}", range(20 * number, 20 * number + 13), max_tokens=1)
        driver.run()
        driver.settle()
    assert driver.core.stats.slow_transfers[f"{NAME}_stored"] == 6
    driver.now += 0.5e9
    for number in range(12, 24):
        driver.add(f"r{number}", range(20 * number, 20 * number + 13), max_tokens=1)
        driver.run()
        driver.settle()
    assert driver.core.stats.slow_transfers[f"{NAME}_stored"] == 9


def test_a_tier_that_hangs_is_left_alone_until_it_has_ended(make_core, answer):
    driver = with_a_context_in_the_slow_tier(make_core)
    driver.slow_tier._hangs = 1.0
    driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.step()
    num_open = driver.slow_tier.num_open
    assert driver.core.hanging_tiers(driver.now) == []
    driver.now += 31
    assert driver.core.hanging_tiers(driver.now) == [NAME]
    request = driver.add("b2", range(20, 34), max_tokens=2, conversation_id="b")
    driver.run()
    assert driver.tokens["b2"] == answer(tuple(range(20, 34)), 2)
    assert request.num_loaded_tokens == 0
    assert driver.slow_tier.num_open == num_open, "nothing more was begun"
    driver.slow_tier.wake()
    driver.settle()
    assert driver.core.hanging_tiers(driver.now) == []


def test_a_drain_comes_back_to_chunks_that_the_policy_would_let_go_before_those_in_the_cpu_tier(make_core):
    driver = make_core(
        8, num_cpu_blocks=1, slow_tiers=(second_use_only(16),), write_through=True, eviction_policy="trailing_lru"
    )
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    driver.add("a", range(13), max_tokens=1)  # its last chunk is the most valuable one, and the first to go
    driver.run()
    driver.settle()
    (in_cpu,) = driver.core._cache.tiers.secondary.sole
    assert in_cpu.position == 0
    driver.now += 1000
    driver.core.start_drain(driver.now)
    while not driver.core.is_drained(driver.now):
        driver.step()
        driver.slow_tier.wake()
    assert all(driver.core._cache.tiers.store_of(chunk) for chunk in driver.core._cache.index)


@pytest.mark.parametrize("num_cpu_blocks", [1, 3, 16])
def test_what_a_drain_has_stored_is_found_by_the_next_process(make_core, answer, num_cpu_blocks):
    options = {"num_cpu_blocks": num_cpu_blocks, "slow_tiers": (second_use_only(16),), "write_through": True}
    driver = make_core(8, **options)
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    records = {}
    start = driver.slow_tier.start

    def note(transfer):
        records[transfer.copy.target] = replace(transfer.record, idle_s=transfer.record.idle_s + 10)
        start(transfer)

    driver.slow_tier.start = note
    for name, first in (("a", 0), ("b", 20)):
        driver.add(f"{name}1", range(first, first + 13), max_tokens=1, conversation_id=name)
        driver.run()
    driver.settle()
    assert not records
    driver.now += 1000  # the position decides: all have been idle for about as long
    driver.core.start_drain(driver.now)
    while not driver.core.is_drained(driver.now):
        driver.step()
        driver.slow_tier.wake()
    assert len(records) == len(driver.core._cache.index) == 8
    positions = [record.position for record in records.values()]
    assert num_cpu_blocks < 16 or positions == [3, 3, 2, 2, 1, 1, 0, 0], "the most valuable ones first"

    after = make_core(8, **options)
    after.slow_tier._contents = driver.slow_tier._contents
    after.slow_tier._failures = after.slow_tier._hangs = 0.0
    after.core.await_records(NAME)
    after.core.check_integrity()
    first_use = after.add("c1", range(40, 45), max_tokens=1)
    after.run()
    assert after.tokens["c1"] == answer(tuple(range(40, 45)), 1), "it serves before it knows"
    assert first_use.num_loaded_tokens == 0
    after.core.restore(NAME, {block: records.get(block) for block in range(16)}, after.now)
    after.core.check_integrity()
    for name, first in (("a", 0), ("b", 20)):
        prompt = (*range(first, first + 13), *driver.tokens[f"{name}1"], 9)
        request = after.add(f"{name}2", prompt, max_tokens=2, conversation_id=name)
        after.run()
        assert after.tokens[f"{name}2"] == answer(prompt, 2)
        assert request.num_cached_tokens == request.num_loaded_tokens
        # Four chunks pass through the CPU tier; what does not fit there is computed.
        assert request.num_loaded_tokens == {1: 1, 3: 9, 16: 13}[num_cpu_blocks]
