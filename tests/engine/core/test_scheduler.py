"""What each step computes, literally, on tiny numbers; and what must hold under any load."""

import random

import pytest

from engine.core.cache import index
from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import EVICTION_POLICIES
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.plan import BlockAppend, BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.core.request import FinishReason, Request, SamplingParams
from engine.errors import ConfigError, ContextLengthError, InvalidParameterError


def segments(plan: StepPlan) -> list[tuple[str, int, int]]:
    """As (request, start, query_len)."""
    return [(s.request_id, s.start, s.query_len) for s in plan.segments]


def start(request_id: str, prompt, max_tokens: int, block_table: tuple[int, ...]) -> RequestStart:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return RequestStart(request_id, len(prompt), len(prompt), sampling, (), block_table)


# -- the plan of a step ------------------------------------------------------------------------------------------------


def test_plans_of_one_request_literally(make_core, answer):
    """10 prompt tokens under a budget of 8, then 4 answers; the last one is never computed."""
    driver = make_core(8, max_num_batched_tokens=8)
    prompt = tuple(range(1, 11))
    driver.add("a", prompt, max_tokens=4)
    driver.run()
    assert driver.plans == [
        StepPlan(1, (QuerySegment("a", 0, prompt[:8]),), starts=(start("a", prompt, 4, (0, 1, 2)),)),
        StepPlan(2, (QuerySegment("a", 8, prompt[8:], True),)),
        StepPlan(3, (QuerySegment("a", 10, None, True),)),
        StepPlan(4, (QuerySegment("a", 11, None, True),)),
        StepPlan(5, (QuerySegment("a", 12, None, True),), appends=(BlockAppend("a", 3),)),
    ]
    assert driver.tokens["a"] == answer(prompt, 4)
    assert driver.reason("a") is FinishReason.LENGTH
    assert driver.core.schedule(99.0) is None


def test_only_who_is_penalised_for_its_tokens_tells_them_all_at_its_start(make_core):
    driver = make_core(8)
    for name, options in [("plain", {}), ("penalised", {"frequency_penalty": 0.5})]:
        sampling = SamplingParams(temperature=0.0, max_tokens=2, **options)
        driver.add_request(Request(name, range(3), sampling))
    plan = driver.step()
    assert [(start.num_tokens, start.token_ids) for start in plan.starts] == [(3, ()), (3, (0, 1, 2))]


def test_the_next_plan_tells_who_ended(make_core):
    driver = make_core(8)
    driver.add("a", range(3), max_tokens=1)
    driver.run()
    driver.add("b", range(50, 53), max_tokens=2)
    assert driver.step().ended == ("a",)
    assert driver.step().ended == ()


def test_decodes_come_first_and_prompts_fill_the_rest_of_the_budget(make_core):
    driver = make_core(16, max_num_batched_tokens=8)
    driver.add("a", range(5), max_tokens=9)
    driver.step()
    driver.add("b", range(50, 53), max_tokens=9)
    driver.add("c", range(80, 92), max_tokens=9)
    assert segments(driver.step()) == [("a", 5, 1), ("b", 0, 3), ("c", 0, 4)]
    assert segments(driver.step()) == [("a", 6, 1), ("b", 3, 1), ("c", 4, 6)]
    assert segments(driver.step()) == [("a", 7, 1), ("b", 4, 1), ("c", 10, 2)]
    assert segments(driver.step()) == [("a", 8, 1), ("b", 5, 1), ("c", 12, 1)]


def test_prompts_join_a_step_until_its_prompts_have_enough_tokens(make_core):
    driver = make_core(32, max_num_batched_tokens=16, prefill_batch_tokens=4)
    driver.add("a", range(3), max_tokens=9)
    driver.add("b", range(20, 29), max_tokens=9)
    driver.add("c", range(30, 32), max_tokens=9)
    driver.add("d", range(40, 59), max_tokens=9)
    driver.add("e", range(60, 62), max_tokens=9)
    assert segments(driver.step()) == [("a", 0, 3), ("b", 0, 9)]  # 3 are not enough, 12 are
    assert segments(driver.step()) == [("a", 3, 1), ("b", 9, 1), ("c", 0, 2), ("d", 0, 12)]  # decodes do not count
    assert segments(driver.step())[3:] == [("d", 12, 7)]  # what is left of one does
    assert segments(driver.step())[4:] == [("e", 0, 2)]


def test_a_decode_goes_before_an_older_prompt(make_core):
    driver = make_core(16, max_num_batched_tokens=8)
    driver.add("long", range(22), max_tokens=2)
    driver.add("short", range(50, 52), max_tokens=3)
    assert segments(driver.step()) == [("long", 0, 8)]
    assert segments(driver.step()) == [("long", 8, 8)]
    assert segments(driver.step()) == [("long", 16, 6), ("short", 0, 2)]
    driver.add("third", range(70, 90), max_tokens=2)
    assert segments(driver.step()) == [("long", 22, 1), ("short", 2, 1), ("third", 0, 6)]
    assert segments(driver.step()) == [("short", 3, 1), ("third", 6, 7)]


def test_the_first_in_the_queue_is_not_overtaken(make_core):
    """ "wide" does not fit beside "a"; "tiny" would, but came later."""
    driver = make_core(4)
    driver.add("a", range(5), max_tokens=2)
    driver.add("wide", range(50, 61), max_tokens=1)
    driver.add("tiny", range(80, 82), max_tokens=1)
    assert segments(driver.step()) == [("a", 0, 5)]
    assert segments(driver.step()) == [("a", 5, 1)]
    assert segments(driver.step()) == [("wide", 0, 11), ("tiny", 0, 2)]


def test_no_more_than_max_num_seqs_run(make_core):
    driver = make_core(16, max_num_seqs=2)
    for name in "abc":
        driver.add(name, [ord(name)], max_tokens=2)
    assert segments(driver.step()) == [("a", 0, 1), ("b", 0, 1)]
    assert segments(driver.step()) == [("a", 1, 1), ("b", 1, 1)]
    assert segments(driver.step()) == [("c", 0, 1)]


def test_admission_keeps_the_decode_reserve_free(make_core):
    """10 blocks, 2 in reserve, 3 taken: a request for 6 waits although 7 are free, until it would run alone."""
    driver = make_core(10, decode_reserve=0.2)
    driver.add("a", range(9), max_tokens=3)
    driver.add("b", range(50, 74), max_tokens=1)
    assert segments(driver.step()) == [("a", 0, 9)]
    assert segments(driver.step()) == [("a", 9, 1)]
    assert segments(driver.step()) == [("a", 10, 1)]
    assert segments(driver.step()) == [("b", 0, 24)]


def test_five_blocks_fit_beside_the_reserve(make_core):
    driver = make_core(10, decode_reserve=0.2)
    driver.add("a", range(9), max_tokens=3)
    driver.add("b", range(50, 70), max_tokens=1)
    assert segments(driver.step()) == [("a", 0, 9), ("b", 0, 20)]


def test_a_dropped_range_is_computed_before_what_follows_it(make_core, answer):
    driver = make_core(4)
    first = tuple(range(11))
    driver.add("turn 1", first, max_tokens=1, conversation_id="a")
    driver.run()
    driver.add("other", range(50, 55), max_tokens=1)  # a free block and turn 1's first
    driver.run()
    history = first + driver.tokens["turn 1"]
    driver.add("turn 2", (*history, 70), max_tokens=1, conversation_id="a")
    plan = driver.step()
    assert segments(plan) == [("turn 2", 0, 4), ("turn 2", 11, 2)]
    assert [s.samples for s in plan.segments] == [False, True]
    assert driver.tokens["turn 2"] == answer((*history, 70), 1)


def test_a_hole_may_take_a_step_of_its_own(make_core):
    driver = make_core(4, max_num_batched_tokens=3, max_num_seqs=1)
    first = tuple(range(11))
    driver.add("turn 1", first, max_tokens=1, conversation_id="a")
    driver.run()
    driver.add("other", range(50, 55), max_tokens=1)
    driver.run()
    driver.add("turn 2", (*first, *driver.tokens["turn 1"], 70), max_tokens=1, conversation_id="a")
    assert segments(driver.step()) == [("turn 2", 0, 3)]
    assert segments(driver.step()) == [("turn 2", 3, 1), ("turn 2", 11, 2)]


# -- suspension --------------------------------------------------------------------------------------------------------


def test_the_newest_is_suspended_and_resumes_without_computing_what_is_still_there(make_core, answer):
    """4 blocks. At 8 tokens each, "a" needs a third: "b" gives up both of its own, of which "a" takes one."""
    driver = make_core(4)
    a, b = tuple(range(7)), tuple(range(50, 57))
    driver.add("a", a, max_tokens=3)
    driver.add("b", b, max_tokens=4)
    assert segments(driver.step()) == [("a", 0, 7), ("b", 0, 7)]
    assert segments(driver.step()) == [("a", 7, 1), ("b", 7, 1)]
    plan = driver.step()
    assert (segments(plan), plan.appends, plan.ended) == ([("a", 8, 1)], (BlockAppend("a", 2),), ("b",))
    assert driver.tokens["a"] == answer(a, 3)
    assert driver.finished.keys() == {"a"}
    plan = driver.step()
    # b's chunk 0 was in the block that "a" took, its chunk 1 stayed; 9 tokens are 3 chunks.
    assert segments(plan) == [("b", 0, 4), ("b", 8, 1)]
    assert plan.starts[0].block_table[1] == 3
    assert [segment.token_ids for segment in plan.segments] == [b[:4], answer(b, 2)[1:]]
    assert (plan.starts[0].num_tokens, plan.starts[0].token_ids) == (9, ())
    assert plan.starts[0].num_prompt_tokens == 7
    driver.run()
    assert driver.tokens["b"] == answer(b, 4)
    assert driver.core.stats.num_suspensions == 1
    assert driver.finished["b"].stats.num_suspensions == 1
    assert driver.finished["b"].num_cached_tokens == 0, "what it finds again of its own is no cache hit"


def test_suspended_requests_go_before_waiting_ones_and_keep_their_order(make_core):
    driver = make_core(6)
    for name, first in [("a", 0), ("b", 50), ("c", 80)]:
        driver.add(name, range(first, first + 7), max_tokens=10)
    driver.add("d", [99], max_tokens=1)
    suspended = []
    while not driver.finished:
        suspended += driver.step().ended
    assert suspended == ["c", "b"]
    driver.run()
    order = [s.request_id for plan in driver.plans for s in plan.starts]
    assert sorted(order[:3]) == ["a", "b", "c"]
    resumed = order[3:]
    assert resumed.index("b") < resumed.index("c") < resumed.index("d")


def test_whoever_was_suspended_does_not_take_its_blocks_back_in_the_same_step(make_core):
    driver = make_core(4)
    driver.add("a", range(7), max_tokens=9)
    driver.add("b", range(50, 57), max_tokens=9)
    while driver.core.stats.num_suspensions == 0:
        plan = driver.step()
    assert plan.ended == ("b",)
    assert plan.starts == ()


# -- two tiers ---------------------------------------------------------------------------------------------------------


def swaps_out(*copies: tuple[int, ...]) -> tuple[BlockCopy, ...]:
    """Each (source, target), or (source, target, number of tokens) of a tail."""
    return tuple(BlockCopy("gpu", source, "cpu", target, *of_tail) for source, target, *of_tail in copies)


def swaps_in(*pairs: tuple[int, int]) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy("cpu", source, "gpu", target) for source, target in pairs)


def idle_chunks(driver) -> dict[str, int]:
    return driver.core.get_statistics()["num_idle_chunks"]


def converse(driver, name: str, new, max_tokens: int = 1, conversation: str = "a", history=()) -> tuple[int, ...]:
    """A turn from its arrival to its end; returns the conversation's tokens so far."""
    prompt = (*history, *new)
    driver.add(name, prompt, max_tokens, conversation)
    driver.run()
    return prompt + driver.tokens[name]


def with_turn_1_in_the_cpu_tier(make_core, num_cpu_blocks: int = 16, **options):
    """4 GPU blocks; the driver, and the tokens of conversation "a", whose turn is in the CPU tier.

    It has 11 tokens, in CPU blocks 0, 1 and 2 (its tail of 3). In the GPU tier is all of "b", in blocks 3, 0, 1 and 2.
    """
    driver = make_core(4, num_cpu_blocks=num_cpu_blocks, swap_out_watermark=0.0, **options)
    history = converse(driver, "turn 1", range(11))
    converse(driver, "other", range(50, 65), conversation="b")
    assert driver.plans[-1].evictions == swaps_out((0, 0), (1, 1), (2, 2, 3))
    assert idle_chunks(driver) == {"gpu": 4, "both": 0, "cpu": 3}
    return driver, history


def test_a_full_gpu_tier_gives_way_by_swapping_out_and_no_more_than_it_must(make_core, answer):
    driver = make_core(4, num_cpu_blocks=8, swap_out_watermark=0.0)
    history = converse(driver, "turn 1", range(7))
    other = tuple(range(50, 61))
    converse(driver, "other", other, conversation="b")
    # values: 2 and 3 over the same time, so chunk 0 goes; its block is the third of the newcomer
    assert driver.plans[1] == StepPlan(
        2,
        (QuerySegment("other", 0, other, True),),
        starts=(start("other", other, 1, (2, 3, 0)),),
        ended=("turn 1",),
        evictions=swaps_out((0, 0)),
    )
    longer = (*history, 70)
    driver.add("turn 2", longer, 1, "a")
    # chunk 0 comes back, the tail is where it was, chunk 2 is new: two of b's chunks leave for them
    assert driver.step() == StepPlan(
        3,
        (QuerySegment("turn 2", 7, longer[7:], True),),
        starts=(start("turn 2", longer, 1, (2, 1, 3)),),
        ended=("other",),
        evictions=swaps_out((2, 1), (3, 2)),
        swap_ins=swaps_in((0, 2)),
    )
    assert driver.tokens["turn 2"] == answer(longer, 1)
    stats = driver.core.stats
    assert stats.evictions == {**dict.fromkeys(stats.evictions, 0), "gpu_swapped_out": 3}
    assert (stats.num_swap_ins, stats.num_swap_outs) == (1, 3)


def test_a_returning_conversation_is_swapped_in_block_by_block_and_computes_nothing_again(make_core, answer):
    driver, history = with_turn_1_in_the_cpu_tier(make_core)
    longer = (*history, 70)
    driver.add("turn 2", longer, 2, "a")
    assert driver.step() == StepPlan(
        3,
        (QuerySegment("turn 2", 11, longer[11:], True),),
        starts=(start("turn 2", longer, 2, (3, 0, 1, 2)),),
        ended=("other",),
        evictions=swaps_out((3, 3), (0, 4), (1, 5), (2, 6, 3)),
        swap_ins=swaps_in((0, 3), (1, 0), (2, 1)),
    )
    # 7 chunks are or were in the CPU tier, and the copy of the tail is free again: it is written to from here on
    assert driver.core.get_statistics()["num_cpu_blocks_free"] == 16 - 6
    driver.run()
    assert driver.tokens["turn 2"] == answer(longer, 2)
    stats = driver.core.stats
    assert (stats.cached_tokens, stats.num_dropped_tokens) == ({"gpu": 0, "cpu": 11}, 0)
    assert driver.finished["turn 2"].stats.num_computed_tokens == 3
    # the full chunks' copies stay valid after the swap-in, so that they leave again for free
    assert idle_chunks(driver) == {"gpu": 2, "both": 2, "cpu": 4}
    converse(driver, "more", range(90, 94), conversation="c")
    assert driver.plans[-1].evictions == ()
    assert stats.evictions["gpu_reclaimed"] == 1


def test_a_fork_copies_a_tail_from_the_cpu_tier_and_its_owner_finds_it_later(make_core, answer):
    driver, history = with_turn_1_in_the_cpu_tier(make_core)
    fork = (*history[:11], 80)
    driver.add("fork", fork, 1, "b")
    assert driver.step() == StepPlan(
        3,
        (QuerySegment("fork", 11, (80,), True),),
        starts=(start("fork", fork, 1, (3, 0, 1)),),
        ended=("other",),
        evictions=swaps_out((3, 3), (0, 4), (1, 5)),
        swap_ins=swaps_in((0, 3), (1, 0), (2, 1)),
    )
    assert driver.tokens["fork"] == answer(fork, 1)
    assert idle_chunks(driver) == {"gpu": 2, "both": 2, "cpu": 4}
    longer = (*history, 70)
    driver.add("turn 2", longer, 1, "a")
    plan = driver.step()
    assert segments(plan) == [("turn 2", 11, 2)]
    assert [copy.source for copy in plan.swap_ins] == [2]
    assert driver.tokens["turn 2"] == answer(longer, 1)


def test_one_conversation_is_loaded_for_two_requests_at_once(make_core, answer):
    """Shared chunks come once. The tail is being read for the fork, so its owner gets a copy of its own, too."""
    driver = make_core(8, num_cpu_blocks=16, swap_out_watermark=0.0)
    history = converse(driver, "turn 1", range(11))
    converse(driver, "other", range(50, 81), conversation="b")
    fork, longer = (*history[:11], 80), (*history, 70)
    driver.add("fork", fork, 1, "c")
    driver.add("turn 2", longer, 1, "a")
    plan = driver.step()
    assert segments(plan) == [("fork", 11, 1), ("turn 2", 11, 2)]
    assert [copy.source for copy in plan.swap_ins] == [0, 1, 2, 2]
    assert plan.starts[0].block_table[:2] == plan.starts[1].block_table[:2]
    assert driver.tokens == {**driver.tokens, "fork": answer(fork, 1), "turn 2": answer(longer, 1)}


def test_swap_outs_ahead_of_time_keep_the_watermark_and_are_reclaimed_for_nothing(make_core):
    """8 blocks; once fewer than 4 are free or reclaimable, a step swaps out 2."""
    driver = make_core(8, num_cpu_blocks=8, swap_out_watermark=0.5, max_swap_outs=2)
    converse(driver, "turn 1", range(27))
    assert driver.plans[-1].swap_outs == (), "what is in use stays"
    assert driver.settle() == [
        StepPlan(2, (), ended=("turn 1",), swap_outs=swaps_out((0, 0), (1, 1))),
        StepPlan(3, (), swap_outs=swaps_out((2, 2), (3, 3))),
    ]
    assert idle_chunks(driver) == {"gpu": 3, "both": 4, "cpu": 0}
    other = tuple(range(50, 69))
    driver.add("other", other, 1, "b")
    # a free block and four to reclaim; then the next two ahead of time
    assert driver.step() == StepPlan(
        4,
        (QuerySegment("other", 0, other, True),),
        starts=(start("other", other, 1, (7, 0, 1, 2, 3)),),
        swap_outs=swaps_out((4, 4), (5, 5)),
    )
    evictions = driver.core.stats.evictions
    assert evictions == {**dict.fromkeys(evictions, 0), "gpu_reclaimed": 4}
    assert driver.settle() == [StepPlan(5, (), ended=("other",), swap_outs=swaps_out((6, 6, 3), (7, 7)))]
    assert idle_chunks(driver) == {"gpu": 4, "both": 4, "cpu": 4}
    assert driver.core.schedule(99.0) is None


def test_swap_outs_yield_to_swap_ins(make_core):
    """12 blocks wanted, 8 a step: a quarter of that beside a swap-in."""
    driver = make_core(12, num_cpu_blocks=24, swap_out_watermark=1.0, max_swap_outs=8)
    converse(driver, "turn 1", range(20))
    assert [plan.swap_outs for plan in driver.settle()] == [swaps_out((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))]
    converse(driver, "other", range(100, 147), conversation="b")
    driver.add("turn 2", range(21), 1, "a")
    plan = driver.step()
    assert plan.swap_ins == swaps_in((0, 5), (1, 6), (2, 7), (3, 8), (4, 9))
    assert plan.swap_outs == swaps_out((11, 11), (0, 12))
    assert [len(plan.swap_outs) for plan in driver.settle()] == [5]


def test_write_through_copies_what_a_turn_leaves_at_its_end(make_core):
    driver = make_core(8, num_cpu_blocks=8, swap_out_watermark=0.0, write_through=True, max_swap_outs=2)
    history = converse(driver, "turn 1", range(10))
    assert [plan.swap_outs for plan in driver.settle()] == [swaps_out((0, 0), (1, 1)), swaps_out((2, 2, 2))]
    converse(driver, "turn 2", (70, 71), history=history)  # 12 of 13 tokens: the tail became a full chunk, and is new
    assert [plan.swap_outs for plan in driver.settle()] == [swaps_out((2, 2), (3, 3, 1))]
    assert idle_chunks(driver) == {"gpu": 0, "both": 4, "cpu": 0}


@pytest.mark.parametrize(
    ("swap_in_cost", "swap_ins", "num_computed"),
    [
        (0.0, swaps_in((0, 3), (1, 0), (2, 1)), 1),
        (2.0, swaps_in((0, 3), (1, 0), (2, 1)), 1),
        (2.5, swaps_in((1, 0), (2, 1)), 5),
        (3.5, swaps_in((2, 1)), 9),
        (9.0, (), 13),
    ],
)
def test_a_chunk_is_loaded_where_that_is_cheaper_than_to_compute_it(
    make_core, answer, swap_in_cost, swap_ins, num_computed
):
    """Chunks cost 2, 3 and 4, however many others are loaded. What was computed joins the copy in the CPU tier."""
    costs = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4, load_costs={"cpu": swap_in_cost})
    driver = make_core(4, num_cpu_blocks=8, swap_out_watermark=0.0, cost_model=costs)
    converse(driver, "turn 1", range(12))
    converse(driver, "other", range(50, 65), conversation="b")
    assert idle_chunks(driver) == {"gpu": 4, "both": 0, "cpu": 3}
    driver.add("turn 2", range(13), 1, "a")
    plan = driver.step()
    assert (plan.swap_ins, plan.num_tokens) == (swap_ins, num_computed)
    assert plan.starts[0].block_table == (3, 0, 1, 2)
    assert driver.tokens["turn 2"] == answer(tuple(range(13)), 1)
    stats = driver.core.stats
    assert (stats.cached_tokens["cpu"], stats.num_not_loaded_tokens) == (13 - num_computed, num_computed - 1)
    assert stats.num_dropped_tokens == 0
    assert idle_chunks(driver) == {"gpu": 1, "both": 3, "cpu": 4}, "each of the three is stored once per tier"


def test_a_suspended_request_swaps_out_and_resumes_without_computing_again(make_core, answer):
    """As above with one tier: "a" takes one of b's two blocks. Its content comes back."""
    driver = make_core(4, num_cpu_blocks=4, swap_out_watermark=0.0)
    a, b = tuple(range(7)), tuple(range(50, 57))
    driver.add("a", a, max_tokens=3)
    driver.add("b", b, max_tokens=4)
    driver.step()
    driver.step()
    assert driver.step() == StepPlan(
        3,
        (QuerySegment("a", 8, None, True),),
        appends=(BlockAppend("a", 2),),
        ended=("b",),
        evictions=swaps_out((2, 0)),
    )
    context = b + answer(b, 2)
    assert driver.step() == StepPlan(
        4,
        (QuerySegment("b", 8, context[8:], True),),
        starts=(RequestStart("b", 9, 7, SamplingParams(temperature=0.0, max_tokens=4), (), (0, 3, 1)),),
        ended=("a",),
        evictions=swaps_out((0, 1), (1, 2)),
        swap_ins=swaps_in((0, 0)),
    )
    driver.run()
    assert (driver.tokens["a"], driver.tokens["b"]) == (answer(a, 3), answer(b, 4))
    assert (driver.core.stats.num_suspensions, driver.core.stats.num_resumed_tokens) == (1, 1)


def test_nothing_moves_between_the_tiers_in_stateless_mode(make_core):
    driver = make_core(4, num_cpu_blocks=8, swap_out_watermark=1.0, write_through=True, keep=False)
    for name in "ab":
        converse(driver, name, range(14), 2)
    assert driver.settle() == []
    assert not any(plan.evictions or plan.local_copies or plan.swap_ins or plan.swap_outs for plan in driver.plans)
    assert driver.core.get_statistics()["num_cpu_blocks"] == 0


# -- two tiers, and something goes wrong -------------------------------------------------------------------------------


def found(driver, history, conversation: str) -> int:
    """Tokens of a context that are in the cache."""
    request = Request("probe", (*history, 99), SamplingParams(), conversation_id=conversation)
    return driver.core._cache.match_context(request).num_cached_tokens


def test_a_failed_step_drops_what_had_its_only_copy_on_the_way_and_nothing_else(make_core, answer):
    """ "turn 2" loads a's three blocks; for that and a new one, all four of b's leave, and it is unknown which arrived."""
    driver, history = with_turn_1_in_the_cpu_tier(make_core)
    safe = converse(driver, "safe", range(30, 34), conversation="c")  # one of b's chunks has left before
    assert driver.plans[-1].evictions == swaps_out((3, 3))
    driver.executor.fails = True
    driver.add("turn 2", (*history, 70), 2, "a")
    plan = driver.step()
    driver.executor.fails = False
    assert driver.failed == ["turn 2"]
    # values: b's chunks 1, 2 and 3 cost 3, 4 and 5 over 2 seconds, c's chunk 0 costs 2 over 1
    assert plan.evictions == swaps_out((0, 4), (3, 5), (1, 6), (2, 7, 3))
    assert plan.swap_ins == swaps_in((0, 0), (1, 3), (2, 1))
    assert found(driver, range(50, 65), "b") == 4, "the chunk that was in the CPU tier before"
    assert found(driver, safe, "c") == 0
    assert found(driver, history, "a") == 8, "full chunks keep the copy that was read; the tail went with its request"
    statistics = driver.core.get_statistics()
    assert (statistics["num_gpu_blocks_free"], statistics["num_cpu_blocks_free"]) == (4, 16 - 3)
    longer = (*history, 70)
    driver.add("again", longer, 2, "a")
    driver.run()
    assert driver.tokens["again"] == answer(longer, 2)


def test_a_failed_step_leaves_the_chunks_that_it_copied_ahead_of_time_on_the_gpu(make_core, answer):
    driver = make_core(8, num_cpu_blocks=8, swap_out_watermark=1.0)
    history = converse(driver, "turn 1", range(11))
    driver.executor.fails = True
    driver.add("other", range(50, 55), 2, "b")
    plan = driver.step()
    assert plan.swap_outs == swaps_out((0, 0), (1, 1), (2, 2, 3))
    assert idle_chunks(driver) == {"gpu": 3, "both": 0, "cpu": 0}
    plan = driver.step()
    assert (plan.segments, plan.swap_outs) == ((), swaps_out((0, 2), (1, 1), (2, 0, 3)))
    assert idle_chunks(driver) == {"gpu": 3, "both": 0, "cpu": 0}, "a plan that only copies failed too"
    driver.executor.fails = False
    driver.settle()
    assert idle_chunks(driver) == {"gpu": 0, "both": 3, "cpu": 0}
    assert found(driver, history, "a") == 11


def test_a_computation_that_failed_loses_its_own_tail_only(make_core, answer):
    """The copies were made: b's chunks are in the CPU tier, a's shared ones in both."""
    driver, history = with_turn_1_in_the_cpu_tier(make_core)
    driver.executor.computation_fails = True
    driver.add("turn 2", (*history, 70), 2, "a")
    driver.step()
    driver.executor.computation_fails = False
    assert driver.failed == ["turn 2"]
    assert idle_chunks(driver) == {"gpu": 0, "both": 2, "cpu": 4}
    assert found(driver, range(50, 65), "b") == 15
    assert found(driver, history, "a") == 8
    longer = (*range(50, 65), *driver.tokens["other"], 70)
    driver.add("b again", longer[:15], 1, "b")
    driver.run()
    assert driver.tokens["b again"] == answer(longer[:15], 1)


def test_a_corrupted_swap_in_restarts_exactly_the_requests_that_it_reached(make_core, answer):
    """Of "a" chunk 1 is bad: its turn and a fork wait one step longer; "b", loaded beside them, and "c" go on."""
    driver = make_core(16, num_cpu_blocks=24, swap_out_watermark=0.0, max_model_len=56)
    a = converse(driver, "a1", range(11))
    b = converse(driver, "b1", range(30, 37), conversation="b")
    converse(driver, "filler", range(100, 155), conversation="f")
    converse(driver, "filler 2", range(200, 207), conversation="f2")
    assert found(driver, a, "a") == 11
    prompts = {"c": tuple(range(70, 75)), "a2": (*a, 1), "fork": (*a[:9], 2), "b2": (*b, 3)}
    driver.add("c", prompts["c"], 4, "c")
    driver.step()
    driver.add("a2", prompts["a2"], 3, "a")
    driver.add("fork", prompts["fork"], 3, "d")
    driver.add("b2", prompts["b2"], 3, "b")
    [bad] = [chunk for chunk in driver.core._cache.index if chunk.position == 1 and chunk.key == _key(driver, "a2", 1)]
    driver.executor.corrupted = {bad.blocks[1]}
    plan = driver.step()
    assert [s.request_id for s in plan.segments] == ["c", "a2", "fork", "b2"]
    assert {name: len(tokens) for name, tokens in driver.tokens.items() if name in prompts} == {
        "c": 2,
        "a2": 0,
        "fork": 0,
        "b2": 1,
    }
    plan = driver.step()
    assert plan.ended[-2:] == ("fork", "a2")
    assert [s.request_id for s in plan.starts] == ["a2", "fork"], "in order of arrival"
    assert segments(plan) == [("c", 6, 1), ("b2", 9, 1), ("a2", 4, 9), ("fork", 4, 6)], "chunk 0 arrived, 1 is computed"
    driver.run()
    for name, prompt in prompts.items():
        assert driver.tokens[name] == answer(prompt, len(driver.tokens[name]))
    assert driver.core.stats.num_corrupted_swaps == 1
    assert driver.core.stats.num_suspensions == 0
    assert driver.core.stats.num_failed == 0


def _key(driver, request_id: str, position: int) -> bytes:
    request = driver.requests[request_id]
    driver.core._cache.match_context(request)
    return request.chunk_keys[position]


@pytest.mark.parametrize("fails", [False, True])
def test_an_abort_in_the_middle_of_a_swap_is_done_after_it(make_core, fails):
    driver, history = with_turn_1_in_the_cpu_tier(make_core)
    driver.add("turn 2", (*history, 70), 3, "a")
    driver.executor.fails = fails
    driver.step(abort_in_flight="turn 2")
    driver.executor.fails = False
    assert not driver.core.has_requests
    assert driver.tokens["turn 2"] == ()
    stats = driver.core.stats
    assert (stats.num_aborted, stats.num_failed) == ((0, 1) if fails else (1, 0))
    assert driver.core.get_statistics()["num_gpu_blocks_pinned"] == 0
    # What the turn computed before it ended is kept: 11 tokens came back, 2 were computed.
    assert found(driver, (*history, 70), "a") == (8 if fails else 13)
    assert driver.core.schedule(99.0) is None


def test_an_aborted_request_that_read_a_corrupted_block_ends(make_core):
    driver, history = with_turn_1_in_the_cpu_tier(make_core)
    driver.add("turn 2", (*history, 70), 3, "a")
    driver.executor.corrupted = {1}
    driver.step(abort_in_flight="turn 2")
    assert not driver.core.has_requests
    assert (driver.core.stats.num_aborted, driver.core.stats.num_corrupted_swaps) == (1, 1)
    assert found(driver, history, "a") == 4, "chunk 1 is gone, the tail went with its request"


def test_an_abort_after_the_plan_waits_for_nothing(make_core):
    driver, history = with_turn_1_in_the_cpu_tier(make_core)
    driver.add("turn 2", (*history, 70), 3, "a")
    driver.step()
    driver.core.abort("turn 2", driver.now)
    driver.core.check_integrity()
    assert found(driver, (*history, 70), "a") == 13


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_the_answer_but_not_before_min_tokens(make_core, answer):
    prompt = tuple(range(5))
    expected = answer(prompt, 6)
    stop = expected[1]
    assert expected.index(stop) == 1
    driver = make_core(8)
    driver.core.add_request(Request("a", prompt, SamplingParams(temperature=0.0), eos_token_ids=(stop,)), 0.0)
    driver.tokens["a"] = ()
    driver.run()
    assert (driver.tokens["a"], driver.reason("a")) == (expected[:2], FinishReason.STOP)
    sampling = SamplingParams(temperature=0.0, min_tokens=2, max_tokens=6)
    driver.core.add_request(Request("b", prompt, sampling, eos_token_ids=(stop,)), 0.0)
    driver.tokens["b"] = ()
    driver.run()
    assert driver.tokens["b"] == expected, "this executor bars nothing, so the stop token comes, and must be ignored"
    assert driver.reason("b") is FinishReason.LENGTH


def test_ignore_eos_ignores_the_models_end_but_not_the_requests_own(make_core, answer):
    prompt = tuple(range(5))
    expected = answer(prompt, 4)
    driver = make_core(8)
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, stop_token_ids=(expected[2],))
    driver.core.add_request(Request("a", prompt, sampling, eos_token_ids=(expected[0],)), 0.0)
    driver.tokens["a"] = ()
    driver.run()
    assert (driver.tokens["a"], driver.reason("a")) == (expected[:3], FinishReason.STOP)


def test_without_max_tokens_the_window_is_the_end(make_core):
    driver = make_core(3, max_model_len=10)
    driver.add("a", range(7), max_tokens=None)
    driver.run()
    assert len(driver.tokens["a"]) == 3
    assert driver.reason("a") is FinishReason.LENGTH


def test_an_aborted_request_frees_its_blocks_and_its_cache_stays(make_core):
    driver = make_core(8, max_num_batched_tokens=8)
    driver.add("running", range(12), max_tokens=4)
    driver.step()
    driver.add("waiting", range(50, 55))
    driver.core.abort("waiting", 2.0)
    driver.core.abort("running", 2.0)
    driver.core.abort("unknown", 2.0)
    driver.core.check_integrity()
    statistics = driver.core.get_statistics()
    assert not driver.core.has_requests
    assert (statistics["num_aborted"], statistics["num_gpu_blocks_pinned"]) == (2, 0)
    driver.add("again", range(12), max_tokens=1)
    plan = driver.step()
    assert plan.ended == ("running",), "the waiting one never started"
    assert segments(plan) == [("again", 8, 4)]


def test_an_id_may_be_used_again_once_its_request_has_ended(make_core, answer):
    driver = make_core(8)
    for prompt in [tuple(range(5)), tuple(range(50, 57))]:
        driver.add("same id", prompt, max_tokens=3)
        driver.run()
        assert driver.tokens["same id"] == answer(prompt, 3)


def test_stop_ends_a_request_whose_text_is_complete(make_core):
    driver = make_core(8)
    driver.add("a", range(5), max_tokens=9)
    driver.step()
    account = driver.core.stop("a", 7.0)
    assert (account.num_output_tokens, account.first_token_s, account.finished_s) == (1, 1.0, 7.0)
    assert driver.core.stop("a", 8.0) is None
    assert driver.core.stats.num_finished == 1
    driver.core.check_integrity()


# -- a step that fails -------------------------------------------------------------------------------------------------


def test_a_failed_step_ends_its_requests_and_no_others(make_core, answer):
    driver = make_core(16, max_num_batched_tokens=8, max_num_seqs=2)
    driver.add("before", range(4), max_tokens=1)
    driver.run()
    driver.add("a", range(20, 25), max_tokens=9)
    driver.add("b", range(50, 55), max_tokens=9)
    driver.add("later", range(80, 85), max_tokens=3)
    driver.executor.fails = True
    assert driver.step().ended == ("before",)
    driver.executor.fails = False
    assert driver.failed == ["a", "b"]
    plan = driver.step()
    assert plan.ended == ("before", "a", "b"), "who ended in the failed plan is told again"
    assert segments(plan) == [("later", 0, 5)]
    driver.run()
    assert driver.tokens["later"] == answer(tuple(range(80, 85)), 3)
    statistics = driver.core.get_statistics()
    assert (statistics["num_failed"], statistics["num_finished"], statistics["num_gpu_blocks_pinned"]) == (2, 2, 0)


def test_a_running_request_that_the_failed_step_left_out_goes_on(make_core, answer):
    driver = make_core(16, max_num_batched_tokens=4, max_num_seqs=4)
    prompts = {"a": tuple(range(1)), "b": tuple(range(20, 21)), "c": tuple(range(50, 56))}
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=6)
    driver.step()  # a, b, and 2 of c's tokens
    driver.add("d", (70,), max_tokens=6)
    driver.step()  # a and b decode, 2 more of c's
    driver.step()  # the last 2 of c's
    driver.core.abort("d", 3.0)
    driver.executor.fails = True
    failing = driver.step()
    driver.executor.fails = False
    assert [s.request_id for s in failing.segments] == ["a", "b", "c"] == driver.failed
    driver.add("c", prompts["c"], max_tokens=6)
    driver.run()
    assert driver.tokens["c"] == answer(prompts["c"], 6)


def test_the_tail_of_a_failed_step_is_not_kept(make_core, answer):
    """The step may have written half of it. The chunk that was whole before the step stays."""
    driver = make_core(8)
    prompt = tuple(range(6))
    driver.add("turn 1", prompt, max_tokens=1, conversation_id="a")
    driver.run()
    longer = (*prompt, *driver.tokens["turn 1"], 60)
    driver.add("turn 2", longer, conversation_id="a")
    driver.executor.fails = True
    assert segments(driver.step()) == [("turn 2", 6, 2)]
    driver.executor.fails = False
    driver.add("again", longer, max_tokens=2, conversation_id="a")
    assert segments(driver.step()) == [("again", 4, 4)]
    driver.run()
    assert driver.tokens["again"] == answer(longer, 2)


def test_a_copied_tail_of_a_failed_step_is_not_kept_but_its_source_is(make_core, answer):
    driver = make_core(8)
    prompt = tuple(range(6))
    driver.add("turn 1", prompt, max_tokens=1, conversation_id="a")
    driver.run()
    fork = (*prompt, 60)
    driver.add("fork", fork, conversation_id="b")
    driver.executor.fails = True
    plan = driver.step()
    assert len(plan.local_copies) == 1
    driver.executor.fails = False
    driver.add("again", fork, max_tokens=2, conversation_id="b")
    assert segments(driver.step()) == [("again", 6, 1)]
    driver.run()
    assert driver.tokens["again"] == answer(fork, 2)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "needs"),
    [(9, 4, "room for max_tokens=4"), (12, None, "room for one token of answer"), (13, None, "prompt has 13")],
)
def test_what_can_never_fit_is_refused_at_once(make_core, prompt_len, max_tokens, needs):
    driver = make_core(3)
    with pytest.raises(ContextLengthError, match="context window is 12 tokens") as error:
        driver.add("a", range(prompt_len), max_tokens=max_tokens)
    assert needs in str(error.value)
    assert not driver.core.has_requests
    assert driver.core.stats.num_requests == 0


def test_what_just_fits_is_served(make_core):
    driver = make_core(3)
    driver.add("a", range(9), max_tokens=3)
    driver.add("b", range(50, 61), max_tokens=None)
    driver.run()
    assert [len(driver.tokens[name]) for name in "ab"] == [3, 1]


def test_an_empty_prompt_is_refused(make_core):
    driver = make_core(3)
    with pytest.raises(InvalidParameterError, match="empty") as error:
        driver.add("a", ())
    assert error.value.param == "prompt"
    assert not driver.core.has_requests


def test_an_id_that_is_running_is_refused_and_the_first_goes_on(make_core, answer):
    driver = make_core(8)
    driver.add("a", range(5), max_tokens=2)
    with pytest.raises(InvalidParameterError, match="'a' is running") as error:
        driver.core.add_request(Request("a", range(3), SamplingParams()), 0.0)
    assert error.value.param == "request_id"
    driver.run()
    assert driver.tokens["a"] == answer(tuple(range(5)), 2)


def test_a_window_that_the_tier_cannot_hold_is_an_error_at_start():
    cache = CacheConfig(num_gpu_blocks=8, chunk_size=4)
    with pytest.raises(ConfigError, match="max_model_len is 33") as error:
        EngineCore(cache, SchedulingConfig(max_model_len=33))
    assert error.value.param == "max_model_len"
    assert EngineCore(cache, SchedulingConfig(max_model_len=32)).schedule(0.0) is None


# -- whatever the load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_cpu_blocks", [0, 4, 20])
@pytest.mark.parametrize("policy", EVICTION_POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_under_any_load_all_requests_end_in_time_and_right(make_core, answer, seed, policy, num_cpu_blocks):
    """Tiny tiers, many conversations, forks, aborts, failing steps and corrupted blocks.

    The oldest request makes progress in every step, so none waits longer than all that came before it take one by one.
    """
    rng = random.Random(seed)
    num_blocks = rng.randint(5, 9)
    driver = make_core(
        num_blocks,
        max_num_batched_tokens=rng.choice([4, 7, 64]),
        max_num_seqs=4,
        decode_reserve=rng.choice([0.0, 0.2]),
        eviction_policy=policy,
        num_cpu_blocks=num_cpu_blocks,
        swap_out_watermark=rng.choice([0.0, 0.25, 0.8]),
        max_swap_outs=rng.choice([1, 4, 16]),
        write_through=rng.random() < 0.3,
        cost_model=CostModel(1.0, 0.25, 4, load_costs={"cpu": rng.choice([0.0, 0.0, 1.0])}),
        prefill_batch_tokens=rng.choice([None, 1, 5]),
    )
    window = num_blocks * 4
    system_prompt = tuple(rng.choices(range(9), k=6))
    histories = dict.fromkeys("abcdef", system_prompt)
    arrived: dict[str, tuple[float, int]] = {}  # request -> time of arrival, and the tokens of all unfinished up to it
    prompts: dict[str, tuple[int, ...]] = {}
    conversations: dict[str, str] = {}
    num_fails = num_aborts = 0
    while len(arrived) < 60 or driver.core.has_requests:
        idle = [c for c in histories if c not in conversations.values()]
        if len(arrived) < 60 and idle and rng.random() < 0.4:
            name, conversation = f"r{len(arrived)}", rng.choice(idle)
            history = histories[rng.choice(list(histories)) if rng.random() < 0.3 else conversation]
            prompt = (*history, *rng.choices(range(9), k=rng.randint(1, 9)))
            if len(prompt) > window - 8:
                prompt = system_prompt
            driver.add(name, prompt, rng.randint(1, 8), conversation)
            unfinished = [*conversations, name]
            arrived[name] = driver.now, sum(driver.requests[r].max_total_tokens for r in unfinished)
            prompts[name], conversations[name] = prompt, conversation
        driver.executor.fails = rng.random() < 0.02
        driver.executor.computation_fails = rng.random() < 0.02
        if num_cpu_blocks and rng.random() < 0.05:
            driver.executor.corrupted.add(rng.randrange(num_cpu_blocks))
        driver.failed.clear()
        aborted = rng.choice([*conversations]) if conversations and rng.random() < 0.03 else None
        if driver.step(aborted) is None:
            continue
        if aborted is not None and aborted not in driver.failed and aborted not in driver.finished:
            num_aborts += 1
            del conversations[aborted]
        for name in driver.failed:
            num_fails += 1
            del conversations[name]
        for name in [name for name in conversations if name in driver.finished]:
            conversation = conversations.pop(name)
            histories[conversation] = prompts[name] + driver.tokens[name]
            assert driver.tokens[name] == answer(prompts[name], len(driver.tokens[name]))
            at, bound = arrived[name]
            assert driver.now - at <= bound
    stats = driver.core.stats
    assert stats.num_finished + num_fails + num_aborts == 60
    assert (stats.num_failed, stats.num_aborted) == (num_fails, num_aborts)
    assert (
        stats.cached_tokens["gpu"]
        + stats.cached_tokens["cpu"]
        + stats.num_not_loaded_tokens
        + stats.num_dropped_tokens
        + stats.num_new_tokens
        == stats.num_prompt_tokens
    )
    assert stats.cached_tokens["gpu"] > 0
    assert sum(number for reason, number in stats.evictions.items() if reason.startswith("gpu")) > 0
    assert bool(stats.num_swap_outs) == bool(num_cpu_blocks)
    assert driver.core.get_statistics()["num_gpu_blocks_pinned"] == 0


def test_the_loads_above_suspend_and_fail(make_core):
    """Guards the test above: its tiers are small enough to suspend."""
    driver = make_core(5, max_num_seqs=4)
    for number in range(8):
        driver.add(f"r{number}", range(number * 10, number * 10 + 4), max_tokens=12)
    driver.run()
    assert driver.core.stats.num_suspensions > 0
    assert driver.core.stats.num_finished == 8


def test_prompt_tokens_are_told_apart_by_where_they_were(make_core):
    driver = make_core(4)
    first = tuple(range(7))
    driver.add("turn 1", first, max_tokens=2, conversation_id="a")
    driver.run()  # 8 of 9 tokens computed
    history = first + driver.tokens["turn 1"]
    driver.add("other", range(50, 61), max_tokens=1)  # 3 blocks: turn 1's chunk 0 goes
    driver.run()
    driver.add("turn 2", (*history, 70, 71), max_tokens=1, conversation_id="a")
    driver.run()
    stats = driver.core.stats
    assert driver.finished["turn 2"].num_cached_tokens == 4
    assert (stats.cached_tokens["gpu"], stats.num_dropped_tokens, stats.num_new_tokens) == (4, 4, 7 + 11 + 3)
    assert driver.finished["turn 2"].stats.num_computed_tokens == 7


def test_what_was_never_evicted_is_not_dropped(make_core):
    """Turn 2 is an edit inside a chunk, turn 3 forks inside the tail.

    Both compute tokens that earlier turns computed, but no chunk of theirs is gone.
    """
    driver = make_core(16)
    history = converse(driver, "turn 1", range(10), max_tokens=5)
    converse(driver, "turn 2", (*history[:6], 70, 71, 72))
    converse(driver, "turn 3", (*history[:13], 80))
    stats = driver.core.stats
    assert sum(stats.evictions.values()) == 0
    assert (stats.num_dropped_tokens, stats.num_new_tokens) == (0, 10 + (9 - 4) + (14 - 12))


def test_a_stranger_that_sends_what_was_dropped_finds_it_dropped(make_core):
    """By content, whatever the conversation; once computed again it is cached, and what was never sent is new."""
    driver = make_core(4)
    converse(driver, "first", range(9), conversation="a")
    converse(driver, "filler", range(50, 65), conversation="b")
    stats = driver.core.stats
    converse(driver, "other", (*range(8), 60, 61), conversation="c")
    assert (stats.num_dropped_tokens, stats.num_new_tokens) == (8, 9 + 15 + 2)
    converse(driver, "again", (*range(8), 62), conversation="d")
    assert (stats.cached_tokens["gpu"], stats.num_dropped_tokens) == (8, 8)


def test_the_last_chunks_that_were_dropped_are_remembered_and_no_more(make_core, monkeypatch):
    monkeypatch.setattr(index, "MIN_DROPPED_KEYS", 3)
    monkeypatch.setattr(index, "MAX_DROPPED_KEYS", 3)
    driver = make_core(2)
    for number in range(4):  # one full chunk each; the first two and the next two take turns
        converse(driver, f"r{number}", range(10 * number, 10 * number + 5), conversation=f"c{number}")
    stats = driver.core.stats
    assert stats.evictions["gpu_dropped"] >= 3
    assert len(driver.core._cache.index._dropped) == 3
    converse(driver, "filler", range(90, 97), conversation="f")
    converse(driver, "forgotten", range(5), conversation="c0")
    assert stats.num_dropped_tokens == 0
    converse(driver, "remembered", range(30, 35), conversation="c3")
    assert stats.num_dropped_tokens == 4


def test_in_stateless_mode_what_a_request_computed_is_dropped_at_its_end(make_core):
    driver = make_core(16, keep=False)
    history = converse(driver, "turn 1", range(9), max_tokens=4)
    assert driver.core.stats.num_dropped_tokens == 0
    converse(driver, "turn 2", (70, 71), history=history)
    stats = driver.core.stats
    assert (stats.num_dropped_tokens, stats.num_new_tokens) == (12, 9 + 3)
    assert stats.cached_tokens["gpu"] == 0
