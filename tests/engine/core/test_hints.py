"""Hints from the core's side: what a request says, what comes of it, and requests that only prepare a context."""

from __future__ import annotations

import pytest

from engine.core.cache import chunk_events
from engine.core.cache.chunk_events import ChunkRemoved, ChunkStored
from engine.core.cache_map import context_keys
from engine.core.request import FinishReason, Request, SamplingParams
from engine.core.retention import KeptSpan, Miss, RetentionHint
from engine.errors import InvalidParameterError, OverloadedError

GREEDY = SamplingParams(temperature=0.0, max_tokens=1)


def request(name: str, prompt, conversation: str | None = None, max_tokens: int = 1, **options) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(name, list(prompt), sampling, conversation_id=conversation or name, **options)


def cached_after(driver, made: Request) -> int:
    driver.add_request(made)
    driver.run()
    driver.core.check_integrity()
    return made.num_cached_tokens


def test_hints_that_are_not_taken_are_refused_and_change_nothing(make_core):
    driver = make_core(8)
    made = request("a", range(10), retention=RetentionHint.of(ttl_s=60.0))
    cached_after(driver, made)
    assert made.retention_outcome.outcome == "refused"
    assert "kv_hints" in made.retention_outcome.reason
    assert driver.core.get_statistics()["retention"] == {
        "accepted": 0,
        "clipped": 0,
        "refused": 1,
        "num_kept_tokens": 0,
    }


def test_any_span_is_kept_and_what_is_between_goes_first(make_core):
    """12 tokens, chunks 0, 1, 2: the plan and the tail are worth it, the tool's output between them is not."""
    driver = make_core(6, kv_hints="client", kv_retention_share=1.0)
    spans = (KeptSpan(0, 4, ttl_s=1000.0), KeptSpan(8, None, ttl_s=1000.0))
    made = request("a", range(12), "c", retention=RetentionHint(spans, rest_priority=0))
    cached_after(driver, made)
    outcome = made.retention_outcome
    assert (outcome.outcome, outcome.num_tokens) == ("accepted", 8)
    assert driver.core.get_statistics()["retention"]["num_kept_tokens"] == 8
    cached_after(driver, request("b", range(100, 114)))  # needs 4 of 6 blocks, 3 of which are free
    again = request("a2", range(12), "c", explains_misses=True)
    assert cached_after(driver, again) == 7, "all but chunk 1 and the last token"
    (hole, last) = again.misses
    assert (hole.start, hole.end, hole.reason) == (4, 8, "released")
    assert last == Miss(11, 12, "new")


def test_more_than_the_budget_is_clipped_from_the_end(make_core):
    driver = make_core(8, kv_hints="client", kv_retention_share=0.25)  # 2 of 8 blocks
    made = request("a", range(12), retention=RetentionHint.of(ttl_s=1e6))
    cached_after(driver, made)
    outcome = made.retention_outcome
    assert (outcome.outcome, outcome.num_tokens) == ("clipped", 8)
    assert "4 more tokens are not kept" in outcome.reason
    assert "86400 seconds" in outcome.reason
    other = request("b", range(50, 58), retention=RetentionHint.of(priority=90))
    cached_after(driver, other)
    assert other.retention_outcome.outcome == "refused"


def test_what_a_conversation_said_before_is_superseded(make_core):
    """An edited message: the branch that is left keeps nothing of the budget."""
    driver = make_core(16, kv_hints="client")
    cached_after(driver, request("a", range(12), "c", retention=RetentionHint.of(ttl_s=60.0)))
    cached_after(driver, request("b", [0, 1, 2, 3, 9, 9, 9, 9], "c", retention=RetentionHint.of(ttl_s=60.0)))
    assert driver.core.get_statistics()["retention"]["num_kept_tokens"] == 8


def test_a_release_is_not_undone_by_a_turn_that_ends_later(make_core):
    driver = make_core(8, kv_hints="client")
    config = driver.core.cache_config
    keys = context_keys(range(9), model=config.model, tenant="local", chunk_size=4, max_chunks=9)
    made = request("a", range(9), "c", max_tokens=4, retention=RetentionHint.of(ttl_s=60.0))
    driver.add_request(made)
    driver.step()
    driver.core.retain("c", keys, "local", RetentionHint.of(release=True), 1.0)
    driver.run()
    assert made.retention_outcome.num_tokens == 0
    assert driver.core.get_statistics()["retention"]["num_kept_tokens"] == 0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: KeptSpan(4, 4), "behind its beginning"),
        (lambda: KeptSpan(-1, 4), "token 0"),
        (lambda: KeptSpan(priority=101), "priority"),
        (lambda: RetentionHint.of(ttl_s=0.0), "ttl_s"),
        (lambda: RetentionHint.of(expected_return_s=float("nan")), "expected_return_s"),
        (lambda: RetentionHint((KeptSpan(0, 8), KeptSpan(4, 9))), "overlap"),
        (lambda: RetentionHint((KeptSpan(0), KeptSpan(4, 9))), "the end"),
        (lambda: RetentionHint(tuple(KeptSpan(i, i + 1) for i in range(65))), "at most 64"),
    ],
    ids=["empty", "negative", "priority", "ttl", "return", "overlap", "open", "many"],
)
def test_wrong_hints_are_named(make, named):
    with pytest.raises(InvalidParameterError, match=named):
        make()


def test_who_listens_hears_which_chunks_come_and_go(make_core):
    driver = make_core(4)
    cached_after(driver, request("before", range(40, 48)))
    events = driver.core.watch_chunks()
    cached_after(driver, request("a", range(10)))
    first, second = [event for event in events.take() if isinstance(event, ChunkStored)]
    assert (first.parent_key, first.token_ids, first.position) == (None, (0, 1, 2, 3), 0)
    assert (second.parent_key, second.token_ids, second.position) == (first.key, (4, 5, 6, 7), 1)
    cached_after(driver, request("b", range(100, 115)))
    events_of_b = events.take()
    assert {ChunkRemoved(first.key), ChunkRemoved(second.key)} <= set(events_of_b)
    assert [event.position for event in events_of_b if isinstance(event, ChunkStored)] == [0, 1, 2]
    assert events.take() == []


def test_more_events_than_are_noted_are_lost_together(monkeypatch, make_core):
    monkeypatch.setattr(chunk_events, "MAX_EVENTS", 3)
    driver = make_core(8)
    events = driver.core.watch_chunks()
    cached_after(driver, request("a", range(17)))
    assert events.take() is None
    cached_after(driver, request("b", range(50, 55)))
    assert [event.token_ids for event in events.take() if isinstance(event, ChunkStored)] == [(50, 51, 52, 53)]


# -- requests that only prepare a context ------------------------------------------------------------------------------


def test_a_context_is_prepared_and_nothing_generated(make_core):
    driver = make_core(8)
    made = request("warm", range(9), "c", is_prewarm=True)
    driver.add_request(made)
    driver.run()
    assert (made.num_tokens, made.num_output_tokens) == (9, 0)
    assert driver.reason("warm") is FinishReason.STOP
    assert cached_after(driver, request("a", range(12), "c")) == 9


def test_it_makes_way_for_any_other_request(make_core):
    driver = make_core(16, max_num_batched_tokens=4)
    driver.add_request(request("warm", range(12), "c", is_prewarm=True))
    assert [s.request_id for s in driver.step().segments] == ["warm"]
    driver.add_request(request("a", range(100, 108), max_tokens=3))
    order = []
    while (plan := driver.step()) is not None:
        order += [segment.request_id for segment in plan.segments]
        driver.core.check_integrity()
    # Where a step is launched ahead, one more of it may be on its way.
    assert order in (["a"] * 4 + ["warm"] * 2, ["warm", *["a"] * 4, "warm"])
    assert driver.reason("warm") is FinishReason.STOP


def test_not_too_many_wait(make_core):
    driver = make_core(8)
    for number in range(64):
        driver.core.add_request(request(f"warm{number}", [number, 1], is_prewarm=True), 0.0)
    with pytest.raises(OverloadedError, match="64 contexts"):
        driver.core.add_request(request("one more", [1, 2], is_prewarm=True), 0.0)
    assert driver.core.get_statistics()["num_requests_waiting"] == 0
    for number in range(64):
        driver.core.abort(f"warm{number}", 1.0)
    assert not driver.core.has_requests


def test_holes_are_filled_only_where_that_costs_no_other_chunk_and_not_at_the_end(make_core):
    driver = make_core(8, kv_hints="client")
    cached_after(driver, request("a", range(12), "c"))
    cached_after(driver, request("b", range(100, 124)))  # 6 blocks: a's first chunk goes
    refill = request("refill", range(12), "c", is_refill=True)
    assert not driver.core.has_holes_to_fill(refill), "b's chunks are worth as much"
    driver.core.hold_back({"gpu": 6}, 10.0)
    driver.core.hold_back({"gpu": 0}, 10.0)
    assert driver.core.has_holes_to_fill(refill)
    driver.core.start_drain(11.0)
    assert not driver.core.has_holes_to_fill(refill)
