"""A plan that is made, and executed, before the one in front of it has a result.

What it may hold, and that what was computed for nothing is never seen.
"""

import random

import pytest

from engine.core.plan import BlockAppend, QuerySegment
from engine.core.request import FinishReason
from engine.step_loop import LookAhead
from tests.engine.core.random_load import Load, random_sizes


def decode(request_id: str, start: int) -> QuerySegment:
    return QuerySegment(request_id, start, None, True)


@pytest.fixture
def make_runner(make_core):
    """As make_core, but it runs ahead."""

    def make(num_gpu_blocks: int, **options: object):
        driver = make_core(num_gpu_blocks, **options)
        driver.loop.look_ahead = LookAhead.LAUNCH
        return driver

    return make


def num_in_flight(driver) -> int:
    return len(driver.loop.in_flight)


def test_decodes_and_the_rest_of_a_prompt_run_ahead_with_the_blocks_that_they_need(make_runner, answer):
    driver = make_runner(16, max_num_batched_tokens=4)
    b = tuple(range(50, 60))
    driver.add("a", range(3), max_tokens=5)
    driver.add("b", b, max_tokens=4)
    driver.step()
    assert num_in_flight(driver) == 1
    driver.run()
    assert [plan.segments for plan in driver.plans] == [
        (QuerySegment("a", 0, (0, 1, 2), True), QuerySegment("b", 0, b[:1])),
        (decode("a", 3), QuerySegment("b", 1, b[1:4])),
        (decode("a", 4), QuerySegment("b", 4, b[4:7])),
        (decode("a", 5), QuerySegment("b", 7, b[7:10], True)),
        (decode("a", 6), decode("b", 10)),
        (decode("b", 11),),
        (decode("b", 12),),
    ]
    assert [plan.appends for plan in driver.plans if plan.appends] == [(BlockAppend("a", 4),), (BlockAppend("b", 5),)]
    assert driver.core.stats.num_steps_ahead == 6
    assert driver.tokens == {"a": answer((0, 1, 2), 5), "b": answer(b, 4)}


def test_whom_a_stop_token_ends_is_computed_once_in_vain(make_runner, answer):
    prompt = tuple(range(5))
    stop = answer(prompt, 2)[1]
    driver = make_runner(8)
    driver.add("a", prompt, max_tokens=9, eos_token_ids=[stop])
    driver.add("b", range(50, 53), max_tokens=5)
    driver.run()
    assert [plan.segments for plan in driver.plans[1:]] == [
        (decode("a", 5), decode("b", 3)),
        (decode("a", 6), decode("b", 4)),
        (decode("b", 5),),
        (decode("b", 6),),
    ]
    assert driver.tokens["a"] == answer(prompt, 2)
    assert driver.reason("a") is FinishReason.STOP
    assert [plan.step_id for plan in driver.plans if "a" in plan.ended] == [4]
    assert driver.core.stats.num_output_tokens == 7


def test_what_a_conversation_left_is_right_although_a_step_in_vain_wrote_to_its_tail(make_runner, answer):
    prompt = tuple(range(5))
    output = answer(prompt, 2)
    driver = make_runner(8)
    driver.add("a", prompt, max_tokens=9, eos_token_ids=[output[1]], conversation_id="c")
    driver.run()
    driver.settle()
    turn = (*prompt, *output, 70, 71)
    driver.add("a2", turn, max_tokens=3, conversation_id="c")
    driver.run()
    assert driver.tokens["a2"] == answer(turn, 3)
    assert driver.requests["a2"].num_cached_tokens == 6


def test_nothing_runs_ahead_of_a_result_that_may_let_somebody_start(make_runner):
    """As many run as may: "c" starts when "a" and "b" end, which is foreseen."""
    driver = make_runner(8, max_num_seqs=2)
    for name in "abc":
        driver.add(name, range(3), max_tokens=4)
    driver.step()
    driver.step()
    assert num_in_flight(driver) == 1
    driver.step()
    assert num_in_flight(driver) == 1
    driver.step()
    assert num_in_flight(driver) == 0
    assert [start.request_id for start in driver.step().starts] == ["c"]


def test_decodes_run_ahead_of_who_was_refused_for_lack_of_blocks(make_runner):
    """The blocks that "b" needs are held by "a" until it ends: three of four.

    While the prompt of "a" is computed, it is not known whether "b" may share it.
    """
    driver = make_runner(4)
    driver.add("a", range(9), max_tokens=4)
    driver.add("b", range(50, 59), max_tokens=1)
    driver.step()
    assert num_in_flight(driver) == 0
    driver.step()
    assert num_in_flight(driver) == 1
    driver.add("c", range(3), max_tokens=1)  # not before "b"
    driver.step()
    assert num_in_flight(driver) == 1
    assert driver.step().segments == (decode("a", 11),)
    assert num_in_flight(driver) == 0
    assert [start.request_id for start in driver.step().starts] == ["b", "c"]


@pytest.mark.parametrize("end", ["stop token", "abort"])
def test_nothing_runs_ahead_once_somebody_has_made_room(make_runner, answer, end):
    driver = make_runner(4)
    stop = answer(tuple(range(9)), 2)[1]
    driver.add("a", range(9), max_tokens=4, eos_token_ids=[stop] if end == "stop token" else ())
    driver.add("b", range(50, 59), max_tokens=1)
    driver.step()
    driver.step("a" if end == "abort" else None)
    assert num_in_flight(driver) == 1
    driver.step()
    assert num_in_flight(driver) == 0
    assert [start.request_id for start in driver.step().starts] == ["b"]


def test_who_arrives_meanwhile_starts_when_nothing_is_in_flight(make_runner):
    driver = make_runner(8)
    driver.add("a", range(3), max_tokens=9)
    driver.step()
    driver.add("b", range(50, 53), max_tokens=2)
    assert driver.step().segments == (decode("a", 3),)
    assert driver.step().segments == (decode("a", 4), QuerySegment("b", 0, (50, 51, 52), True))


def test_nothing_runs_ahead_where_somebody_has_to_be_suspended(make_runner, answer):
    """4 blocks: at their fifth tokens "a" gets the last one, and "b" the one that "c" gives up."""
    driver = make_runner(4)
    prompts = {name: tuple(range(first, first + 3)) for name, first in [("a", 0), ("b", 20), ("c", 40)]}
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=9)
    driver.step()
    assert num_in_flight(driver) == 1
    driver.step()
    assert num_in_flight(driver) == 0
    plan = driver.step()
    assert plan.segments == (decode("a", 4), decode("b", 4))
    assert plan.ended == ("c",)
    driver.run()
    assert driver.tokens == {name: answer(prompt, 9) for name, prompt in prompts.items()}


@pytest.mark.parametrize("moment", ["before the plan ahead", "after it", "after the step"])
def test_an_aborted_request_ends_with_the_oldest_step(make_runner, moment):
    """Odd steps look ahead before an abort in flight, even ones after it."""
    driver = make_runner(8)
    driver.add("a", range(5), max_tokens=9)
    driver.add("b", range(50, 53), max_tokens=4)
    if moment == "before the plan ahead":
        driver.step()
    driver.step(None if moment == "after the step" else "a")
    if moment == "after the step":
        assert "a" in driver.core._requests
        driver.core.abort("a", driver.now)  # with the step that is in flight
    else:
        assert "a" not in driver.core._requests
    driver.run()
    assert driver.core.stats.num_aborted == 1
    assert len(driver.tokens["a"]) <= 1
    assert len(driver.tokens["b"]) == 4


def test_an_id_used_again_while_its_old_request_is_computed_in_vain(make_runner, answer):
    driver = make_runner(8)
    driver.add("a", range(5), max_tokens=9)
    driver.step("a")
    assert num_in_flight(driver) == 1
    assert "a" not in driver.core._requests
    driver.add("a", range(20, 24), max_tokens=4)
    driver.run()
    assert driver.tokens["a"] == answer(tuple(range(20, 24)), 4)


def test_a_stopped_request_may_be_in_flight(make_runner, answer):
    driver = make_runner(8)
    driver.add("a", range(5), max_tokens=9, conversation_id="c")
    driver.step()
    driver.step()
    assert num_in_flight(driver) == 1
    driver.core.stop("a", driver.now, num_kept_output_tokens=1)
    driver.core.check_integrity()
    while driver.loop.in_flight:
        driver.step()
    turn = (*range(5), *answer(tuple(range(5)), 1), 70)
    driver.add("a2", turn, max_tokens=3, conversation_id="c")
    driver.run()
    assert driver.tokens["a2"] == answer(turn, 3)


def test_a_step_behind_a_failed_one_serves_whom_that_did_not_concern(make_runner, answer):
    """ "b" gets nothing of the budget of the step that fails."""
    driver = make_runner(16, max_num_batched_tokens=5, max_num_seqs=3)
    driver.add("a", range(3), max_tokens=6)
    driver.add("b", range(50, 60), max_tokens=3)
    driver.step()
    driver.add("late", range(70, 75), max_tokens=1)
    while num_in_flight(driver):
        driver.step()
    driver.executor.fails = True
    driver.step()
    driver.executor.fails = False
    assert set(driver.failed) <= {"a", "b", "late"}
    driver.run()
    for name, prompt in [("a", range(3)), ("b", range(50, 60)), ("late", range(70, 75))]:
        if name in driver.finished:
            assert driver.tokens[name] == answer(tuple(prompt), len(driver.tokens[name]))


@pytest.mark.parametrize("num_cpu_blocks", [0, 4, 20])
@pytest.mark.parametrize("seed", range(12))
def test_under_any_load_every_answer_is_right(make_runner, answer, seed, num_cpu_blocks):
    """The executor looks at every slot that it reads; the driver at the books, also while two plans are in flight."""
    rng = random.Random(seed)
    num_blocks, options = random_sizes(rng, num_cpu_blocks)
    driver = make_runner(num_blocks, **options)
    Load(driver, seed, num_requests=120).run()
    for name, tokens in driver.tokens.items():
        assert tokens == answer(
            tuple(driver.requests[name].token_ids[: driver.requests[name].num_prompt_tokens]), len(tokens)
        )
    assert driver.core.stats.num_steps_ahead > 20
    assert not driver.loop.in_flight


def test_the_loads_above_have_everything_in_them(make_runner):
    """Guards the test above."""
    driver = make_runner(8, max_num_seqs=6, num_cpu_blocks=8, max_num_batched_tokens=7)
    Load(driver, seed=1, num_requests=300).run()
    stats = driver.core.stats
    assert min(stats.num_suspensions, stats.num_aborted, stats.num_failed, stats.num_corrupted_swaps) > 0
    assert min(stats.num_swap_ins, stats.num_local_copies, stats.num_steps_ahead) > 0
    assert all(stats.evictions[reason] for reason in ("gpu_reclaimed", "gpu_swapped_out", "cpu_dropped"))
    assert {output.finish_reason for output in driver.finished.values()} == {FinishReason.STOP, FinishReason.LENGTH}
