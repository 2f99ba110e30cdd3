"""What a router's decisions are called, and that it forgets the longest idle session first."""

from __future__ import annotations

from deployments.routing.decisions import RouterDecisions


def test_words() -> None:
    decisions = RouterDecisions()
    assert decisions.classify("a", home_rank=0, chosen_rank=0) == "new"
    assert decisions.classify("a", home_rank=0, chosen_rank=0) == "sticky"
    assert decisions.classify("a", home_rank=0, chosen_rank=1) == "spill"
    assert decisions.classify("a", home_rank=0, chosen_rank=0) == "sticky"
    assert decisions.classify("b", home_rank=0, chosen_rank=0) == "new"


def test_a_home_that_moved_is_told_once() -> None:
    decisions = RouterDecisions()
    decisions.classify("a", home_rank=0, chosen_rank=0)
    assert decisions.classify("a", home_rank=1, chosen_rank=1) == "rehash"  # rank 0 died
    assert decisions.classify("a", home_rank=1, chosen_rank=1) == "sticky"
    assert decisions.classify("a", home_rank=0, chosen_rank=0) == "rehash"  # and was replaced


def test_the_first_word_that_is_true() -> None:
    decisions = RouterDecisions()
    assert decisions.classify("a", home_rank=0, chosen_rank=1) == "new"
    assert decisions.classify("a", home_rank=2, chosen_rank=1) == "rehash"


def test_a_spilled_request_does_not_move_the_home() -> None:
    decisions = RouterDecisions()
    decisions.classify("a", home_rank=0, chosen_rank=0)
    decisions.classify("a", home_rank=0, chosen_rank=1)
    assert decisions.classify("a", home_rank=0, chosen_rank=0) == "sticky"


def test_forgets_the_session_that_was_idle_longest() -> None:
    decisions = RouterDecisions(max_sessions=2)
    for session_id in ("a", "b", "a", "c"):
        decisions.classify(session_id, home_rank=0, chosen_rank=0)
    assert [decisions.classify(s, home_rank=0, chosen_rank=0) for s in ("a", "c", "b")] == ["sticky", "sticky", "new"]
