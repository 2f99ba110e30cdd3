"""Where a request's time goes: each second in one phase, whatever happens to the request."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.core.phases import MAX_SPANS, Phase, PhaseSpan, PhaseTimeline
from tests.delayed_tier import dict_tier
from tests.engine.core.random_load import Load, random_sizes


def phases_of(driver, request_id):
    return driver.finished[request_id].stats.phases


def check(driver):
    """The phases of all requests that finished add up, and follow one another."""
    for output in driver.finished.values():
        stats = output.stats
        phases = stats.phases
        total = phases.queue_s + phases.load_s + phases.prefill_s + phases.decode_s + phases.suspended_s
        assert total == pytest.approx(stats.finished_s - stats.arrival_s)
        ends = [stats.arrival_s, *(span.end_s for span in phases.spans)]
        assert [span.start_s for span in phases.spans] == ends[:-1]
        assert ends[-1] == stats.finished_s or len(phases.spans) == MAX_SPANS
        assert phases.spans[0].phase is Phase.QUEUE


def test_a_request_that_waits_for_its_turn_computes_its_prompt_in_two_steps_and_decodes(make_core):
    driver = make_core(8, max_num_seqs=1, max_num_batched_tokens=4)
    driver.add("first", range(4), max_tokens=3)
    driver.add("second", range(50, 56), max_tokens=3)
    driver.run()
    # Step 1 is the prompt of the first one, steps 2 and 3 give its other tokens, and the clock is the number of the step.
    assert phases_of(driver, "second").spans == (
        PhaseSpan(Phase.QUEUE, 0.0, 4.0),
        PhaseSpan(Phase.PREFILL, 4.0, 5.0),
        PhaseSpan(Phase.DECODE, 5.0, 7.0),
    )
    phases = phases_of(driver, "second")
    assert (phases.queue_s, phases.prefill_s, phases.decode_s) == (4.0, 1.0, 2.0)
    assert (phases.load_s, phases.suspended_s) == (0.0, 0.0)


def test_a_preempted_request_is_suspended_and_goes_on_decoding(make_core):
    driver = make_core(4)
    driver.add("a", range(5), max_tokens=8)
    driver.add("b", range(50, 55), max_tokens=8)
    driver.run()
    assert driver.finished["b"].stats.num_suspensions == 1
    kinds = [span.phase for span in phases_of(driver, "b").spans]
    assert kinds == [Phase.QUEUE, Phase.PREFILL, Phase.DECODE, Phase.SUSPENDED, Phase.DECODE]
    assert phases_of(driver, "b").suspended_s > 0
    assert phases_of(driver, "a").suspended_s == 0
    check(driver)


def test_a_request_waits_for_a_slow_tier(make_core):
    driver = make_core(4, num_cpu_blocks=4, slow_tiers=(dict_tier(16),), swap_out_watermark=1.0)
    driver.slow_tier._failures = driver.slow_tier._hangs = 0.0
    for name, first in (("a", 0), ("b", 20), ("c", 40)):
        driver.add(f"{name}1", range(first, first + 13), max_tokens=1, conversation_id=name)
        driver.run()
        driver.settle()
    driver.slow_tier._hangs = 1.0
    driver.add("a2", range(14), max_tokens=2, conversation_id="a")
    driver.step()
    driver.step()
    driver.slow_tier._hangs = 0.0
    driver.slow_tier.wake()
    driver.run()
    kinds = [span.phase for span in phases_of(driver, "a2").spans]
    assert kinds[:2] == [Phase.QUEUE, Phase.LOAD]
    assert kinds[-2:] == [Phase.PREFILL, Phase.DECODE]
    assert phases_of(driver, "a2").load_s >= 2.0
    by_tier = driver.finished["a2"].stats.cached_by_tier
    assert sum(by_tier.values()) == driver.finished["a2"].stats.num_cached_tokens
    check(driver)


def test_phases_add_up_under_random_loads(make_core):
    seen = set()
    for seed in range(8):
        num_gpu_blocks, options = random_sizes(random.Random(seed), 6)
        driver = make_core(num_gpu_blocks, slow_tiers=(dict_tier(16),), **options)
        Load(driver, seed).run()
        check(driver)
        for output in driver.finished.values():
            seen |= {span.phase for span in output.stats.phases.spans if span.end_s > span.start_s}
    assert seen == set(Phase)


def test_only_so_many_spans_are_kept_and_the_totals_are_exact():
    timeline = PhaseTimeline()
    for number in range(100):
        timeline.enter(Phase.DECODE if number % 2 else Phase.SUSPENDED, float(number))
    phases = timeline.end(100.0)
    assert len(phases.spans) == MAX_SPANS
    assert (phases.decode_s, phases.suspended_s) == (50.0, 50.0)
    assert timeline.end(200.0) == phases


def test_the_time_of_swaps_is_summed_up(make_core):
    driver = make_core(8)
    driver.add("a", range(5), max_tokens=3)
    execute = driver.executor._execute
    driver.executor._execute = lambda plan: replace(execute(plan), swap_seconds=(0.5, 0.25))
    driver.run()
    statistics = driver.core.get_statistics()
    assert (statistics["swap_in_seconds"], statistics["swap_out_seconds"]) == (1.5, 0.75)
