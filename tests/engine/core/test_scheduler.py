"""What each step computes, literally, on tiny numbers; and what must hold under any load."""

import random

import pytest

from engine.core.engine_core import CoreConfig, EngineCore
from engine.core.plan import BlockAppend, QuerySegment, RequestStart, StepPlan
from engine.core.request import FinishReason, Request, SamplingParams
from engine.errors import ConfigError, ContextLengthError, InvalidParameterError


def segments(plan: StepPlan) -> list[tuple[str, int, int]]:
    """(request, start, query_len)"""
    return [(s.request_id, s.start, s.query_len) for s in plan.segments]


def start(request_id: str, prompt, max_tokens: int, block_table: tuple[int, ...]) -> RequestStart:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return RequestStart(request_id, tuple(prompt), len(prompt), sampling, (), block_table)


# -- the plan of a step ------------------------------------------------------------------------------------------------


def test_plans_of_one_request_literally(make_core, answer):
    """10 prompt tokens under a budget of 8, then 4 answers; the last one is never computed."""
    driver = make_core(8, max_num_batched_tokens=8)
    prompt = tuple(range(1, 11))
    driver.add("a", prompt, max_tokens=4)
    driver.run()
    t = answer(prompt, 4)
    assert driver.plans == [
        StepPlan(1, (QuerySegment("a", 0, prompt[:8]),), starts=(start("a", prompt, 4, (0, 1, 2)),)),
        StepPlan(2, (QuerySegment("a", 8, prompt[8:], True),)),
        StepPlan(3, (QuerySegment("a", 10, t[:1], True),)),
        StepPlan(4, (QuerySegment("a", 11, t[1:2], True),)),
        StepPlan(5, (QuerySegment("a", 12, t[2:3], True),), appends=(BlockAppend("a", 3),)),
    ]
    assert driver.tokens["a"] == t
    assert driver.reason("a") is FinishReason.LENGTH
    assert driver.core.schedule(99.0) is None


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
    assert plan.starts[0].token_ids == b + answer(b, 2)
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
    assert len(plan.gpu_copies) == 1
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
    with pytest.raises(ConfigError, match="max_model_len is 33") as error:
        EngineCore(CoreConfig(max_model_len=33, num_gpu_blocks=8, chunk_size=4))
    assert error.value.param == "max_model_len"
    assert EngineCore(CoreConfig(max_model_len=32, num_gpu_blocks=8, chunk_size=4)).schedule(0.0) is None


# -- whatever the load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["retention_value", "lru"])
@pytest.mark.parametrize("seed", range(8))
def test_under_any_load_all_requests_end_in_time_and_right(make_core, answer, seed, policy):
    """A tiny tier, many conversations, forks and failing steps. The oldest request makes progress in every step, so nobody
    waits longer than all that came before him take one by one."""
    rng = random.Random(seed)
    num_blocks = rng.randint(5, 9)
    driver = make_core(
        num_blocks,
        max_num_batched_tokens=rng.choice([4, 7, 64]),
        max_num_seqs=4,
        decode_reserve=rng.choice([0.0, 0.2]),
        eviction_policy=policy,
    )
    window = num_blocks * 4
    system_prompt = tuple(rng.choices(range(9), k=6))
    histories = dict.fromkeys("abcdef", system_prompt)
    arrived: dict[str, tuple[float, int]] = {}  # request -> time of arrival, and the tokens of all unfinished up to it
    prompts: dict[str, tuple[int, ...]] = {}
    conversations: dict[str, str] = {}
    num_fails = 0
    while len(arrived) < 60 or driver.core.has_requests:
        idle = [c for c in histories if c not in conversations.values()]
        if len(arrived) < 60 and idle and rng.random() < 0.4:
            name, conversation = f"r{len(arrived)}", rng.choice(idle)
            history = histories[rng.choice(list(histories)) if rng.random() < 0.3 else conversation]
            prompt = (*history, *rng.choices(range(9), k=rng.randint(1, 9)))
            if len(prompt) > window - 8:
                prompt = system_prompt
            driver.add(name, prompt, rng.randint(1, 8), conversation, num_history_tokens=min(len(history), len(prompt)))
            unfinished = [*conversations, name]
            arrived[name] = driver.now, sum(driver.requests[r].max_total_tokens for r in unfinished)
            prompts[name], conversations[name] = prompt, conversation
        driver.executor.fails = rng.random() < 0.02
        driver.failed = []
        if driver.step() is None:
            continue
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
    assert stats.num_finished + num_fails == 60
    assert stats.num_failed == num_fails
    assert (
        stats.num_gpu_cached_tokens + stats.num_cpu_cached_tokens + stats.num_dropped_tokens + stats.num_new_tokens
        == stats.num_prompt_tokens
    )
    assert stats.num_gpu_cached_tokens > 0
    assert stats.evictions["gpu_dropped"] > 0
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
    driver.add("turn 2", (*history, 70, 71), max_tokens=1, conversation_id="a", num_history_tokens=8)
    driver.run()
    stats = driver.core.stats
    assert driver.finished["turn 2"].num_cached_tokens == 4
    assert (stats.num_gpu_cached_tokens, stats.num_dropped_tokens, stats.num_new_tokens) == (4, 4, 7 + 11 + 3)
    assert driver.finished["turn 2"].stats.num_computed_tokens == 7
