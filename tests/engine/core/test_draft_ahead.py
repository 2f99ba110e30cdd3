"""A plan that was drafted while the step before it ran is the plan that would have been made after it."""

import io
import pickle
import random
from types import FunctionType

import pytest

from engine.core.engine_core import EngineCore
from engine.core.plan import BlockAppend, QuerySegment, StepPlan
from engine.core.request import FinishReason
from engine.step_loop import LookAhead
from tests.engine.core.random_load import Load, random_sizes


def drafts(driver) -> tuple[int, int]:
    """How many were used, and how many discarded."""
    return driver.core.stats.num_used_drafts, driver.core.stats.num_discarded_drafts


def decode(request_id: str, start: int) -> QuerySegment:
    return QuerySegment(request_id, start, None, True)


# -- what is foreseen, and what is not ---------------------------------------------------------------------------------


def test_decodes_and_the_rest_of_a_prompt_are_foreseen(make_core):
    """ "a" decodes, and "b" takes what its token leaves of the budget; "a" needs a third block at its ninth token."""
    driver = make_core(16, max_num_batched_tokens=4)
    b = tuple(range(50, 60))
    driver.add("a", range(3), max_tokens=20)
    driver.add("b", b, max_tokens=20)
    driver.run_steps(6)
    assert [plan.segments for plan in driver.plans] == [
        (QuerySegment("a", 0, (0, 1, 2), True), QuerySegment("b", 0, b[:1])),
        (decode("a", 3), QuerySegment("b", 1, b[1:4])),
        (decode("a", 4), QuerySegment("b", 4, b[4:7])),
        (decode("a", 5), QuerySegment("b", 7, b[7:10], True)),
        (decode("a", 6), decode("b", 10)),
        (decode("a", 7), decode("b", 11)),
    ]
    assert driver.step().appends == (BlockAppend("a", 5), BlockAppend("b", 6))
    assert drafts(driver) == (6, 0)


def test_holes_are_foreseen_too(make_core):
    driver = make_core(4, max_num_batched_tokens=3, max_num_seqs=1)
    first = tuple(range(11))
    driver.add("turn 1", first, max_tokens=1, conversation_id="a")
    driver.run()
    driver.add("other", range(50, 55), max_tokens=1)
    driver.run()
    driver.add("turn 2", (*first, *driver.tokens["turn 1"], 70), max_tokens=1, conversation_id="a")
    used, _ = drafts(driver)
    assert [(s.start, s.query_len) for s in driver.step().segments] == [(0, 3)]
    assert [(s.start, s.query_len) for s in driver.step().segments] == [(3, 1), (11, 2)]
    assert drafts(driver) == (used + 1, 0)


def test_who_reaches_its_length_is_left_out(make_core):
    driver = make_core(8)
    driver.add("a", range(3), max_tokens=2)
    driver.add("b", range(50, 53), max_tokens=4)
    driver.add("c", range(80, 83), max_tokens=1)
    driver.run()
    assert [plan.segments for plan in driver.plans[1:]] == [
        (decode("a", 3), decode("b", 3)),
        (decode("b", 4),),
        (decode("b", 5),),
    ]
    assert drafts(driver) == (3, 0)


def test_a_stop_token_is_not_foreseen(make_core, answer):
    prompt = tuple(range(5))
    stop = answer(prompt, 2)[1]
    driver = make_core(8)
    driver.add("a", prompt, max_tokens=9, eos_token_ids=(stop,))
    driver.add("b", range(50, 53), max_tokens=4)
    driver.run()
    assert driver.reason("a") is FinishReason.STOP
    assert [plan.segments for plan in driver.plans[1:]] == [
        (decode("a", 5), decode("b", 3)),
        (decode("b", 4),),
        (decode("b", 5),),
    ]
    assert drafts(driver) == (2, 1)


def test_a_stop_string_is_not_foreseen(make_core):
    driver = make_core(8)
    driver.add("a", range(5), max_tokens=9)
    driver.add("b", range(50, 53), max_tokens=3)
    driver.step()
    driver.core.stop("a", driver.now)
    assert driver.step().segments == (decode("b", 3),)
    assert drafts(driver) == (0, 1)


@pytest.mark.parametrize("moment", ["before the draft", "after the draft", "after the step"])
def test_an_abort_is_not_foreseen(make_core, moment):
    driver = make_core(8)
    driver.add("a", range(5), max_tokens=9)
    driver.add("b", range(50, 53), max_tokens=3)
    plan = driver.core.schedule(1.0)
    if moment == "before the draft":
        driver.core.abort("a", 1.0)
    driver.core.draft_ahead(plan)
    if moment == "after the draft":
        driver.core.abort("a", 1.0)
    driver.execute(plan)
    if moment == "after the step":
        driver.core.abort("a", 1.0)
    assert driver.step().segments == (decode("b", 3),)
    assert drafts(driver) == (0, 1)


def test_an_arrival_during_the_step_is_admitted_in_the_next_one(make_core):
    driver = make_core(8, max_num_batched_tokens=4)
    driver.add("a", range(3), max_tokens=9)
    plan = driver.core.schedule(1.0)
    driver.core.draft_ahead(plan)
    driver.add("b", range(50, 58), max_tokens=9)
    driver.execute(plan)
    assert driver.step().segments == (decode("a", 3), QuerySegment("b", 0, (50, 51, 52)))
    assert drafts(driver) == (1, 0)


def test_a_failed_step_is_not_foreseen(make_core):
    driver = make_core(8)
    driver.add("a", range(5), max_tokens=9)
    driver.step()
    driver.executor.fails = True
    driver.add("b", range(50, 53), max_tokens=3)
    driver.step()
    driver.executor.fails = False
    assert driver.failed == ["a", "b"]
    driver.add("c", range(80, 83), max_tokens=1)
    assert driver.step().segments == (QuerySegment("c", 0, (80, 81, 82), True),)
    assert drafts(driver) == (1, 1)


def test_a_corrupted_swap_in_is_not_foreseen(make_core, answer):
    driver = make_core(4, num_cpu_blocks=8, swap_out_watermark=0.0)
    prompt = tuple(range(11))
    driver.add("turn 1", prompt, 1, "a")
    driver.run()
    driver.add("other", range(50, 65), 1, "b")
    driver.run()
    driver.executor.corrupted = {1}
    driver.add("turn 2", (*prompt, 70), 2, "a")
    assert len(driver.step().swap_ins) == 3
    plan = driver.step()
    assert [start.request_id for start in plan.starts] == ["turn 2"]
    assert drafts(driver)[1] == 1
    driver.run()
    assert driver.tokens["turn 2"] == answer((*prompt, 70), 2)


def test_a_suspension_is_not_foreseen_and_who_has_its_block_already_keeps_it(make_core):
    """4 blocks, 3 taken: at the fifth token "a" gets the last one, "b" none, so "c" gives up its own."""
    driver = make_core(4)
    for name, first in [("a", 0), ("b", 20), ("c", 40)]:
        driver.add(name, range(first, first + 3), max_tokens=9)
    driver.run_steps(2)
    plan = driver.step()
    assert plan.segments == (decode("a", 4), decode("b", 4))
    assert plan.appends == (BlockAppend("a", 3), BlockAppend("b", 2))
    assert plan.ended == ("c",)
    assert drafts(driver) == (1, 1)


# -- whatever the load -------------------------------------------------------------------------------------------------


class CorePickler(pickle.Pickler):
    def reducer_override(self, value: object) -> object:
        """The eviction policies hold functions."""
        return (str, (value.__qualname__,)) if isinstance(value, FunctionType) else NotImplemented


def pickled_without_draft(core: EngineCore) -> bytes:
    core._scheduler._ahead = None
    stream = io.BytesIO()
    CorePickler(stream).dump(core)
    return stream.getvalue()


@pytest.mark.parametrize("num_cpu_blocks", [0, 4, 20])
@pytest.mark.parametrize("seed", range(12))
def test_under_any_load_the_plans_are_the_same_with_drafts_and_without(make_core, seed, num_cpu_blocks):
    rng = random.Random(seed)
    num_blocks, options = random_sizes(rng, num_cpu_blocks)
    ahead, behind = make_core(num_blocks, **options), make_core(num_blocks, **options)
    behind.loop.look_ahead = LookAhead.NOTHING
    for driver in (ahead, behind):
        Load(driver, seed).run()
    assert ahead.plans == behind.plans
    assert ahead.tokens == behind.tokens
    assert ahead.finished == behind.finished
    stats, others = ahead.core.stats.as_dict(), behind.core.stats.as_dict()
    used, discarded = stats.pop("num_used_drafts"), stats.pop("num_discarded_drafts")
    assert (others.pop("num_used_drafts"), others.pop("num_discarded_drafts")) == (0, 0)
    assert stats == others
    assert used > 30
    assert discarded > 10


def test_the_loads_above_have_everything_in_them(make_core):
    """Guards the test above: evictions in both tiers, suspensions, stops, aborts, failures, corrupted blocks."""
    driver = make_core(8, max_num_seqs=6, num_cpu_blocks=8, max_num_batched_tokens=7)
    Load(driver, seed=1, num_requests=200).run()
    stats = driver.core.stats
    assert min(stats.num_suspensions, stats.num_aborted, stats.num_failed, stats.num_corrupted_swaps) > 0
    assert min(stats.num_swap_ins, stats.num_local_copies) > 0
    assert all(stats.evictions[reason] for reason in ("gpu_reclaimed", "gpu_swapped_out", "cpu_dropped"))
    reasons = [output.finish_reason for output in driver.finished.values()]
    assert {FinishReason.STOP, FinishReason.LENGTH} == set(reasons)


def test_drafting_changes_nothing(make_core, monkeypatch):
    """Not one bit of the core but the draft itself, at any moment of a load."""
    driver = make_core(8, max_num_seqs=6, num_cpu_blocks=8, max_num_batched_tokens=7)
    num_drafts = 0
    draft_ahead = EngineCore.draft_ahead

    def checked(core: EngineCore, plan: StepPlan) -> None:
        nonlocal num_drafts
        before = pickled_without_draft(core)
        draft_ahead(core, plan)
        core.check_integrity()
        num_drafts += core._scheduler._ahead is not None
        assert pickled_without_draft(core) == before
        draft_ahead(core, plan)

    monkeypatch.setattr(EngineCore, "draft_ahead", checked)
    Load(driver, seed=1).run()
    assert num_drafts > 50
    assert drafts(driver)[0] > 30
