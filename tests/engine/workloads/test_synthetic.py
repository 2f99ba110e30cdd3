"""Sessions drawn from distributions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.workloads.distributions import Constant, Geometric, Uniform
from engine.workloads.session import Session, Span, Statistics, Turn
from engine.workloads.synthetic import Synthetic, ToolUse, draw_sessions, sharegpt, ultrachat

CHAT = Synthetic(3, Constant(2), Constant(8), Constant(4), Constant(5.0), num_tenants=1, prefix_tokens=Constant(16))


def test_constant_distributions_give_exactly_these_sessions() -> None:
    def turns(stream: int) -> tuple[Turn, ...]:
        return (Turn((Span(0, 16), Span(stream, 8)), 4), Turn((Span(stream, 8, 8),), 4, pause_s=5.0))

    assert list(draw_sessions(CHAT)) == [
        Session(f"session-{number}", turns(1 + number), tenant="tenant-0") for number in range(3)
    ]


def test_lengths_of_a_session() -> None:
    session = next(draw_sessions(CHAT))
    assert session.prompt_lens == [24, 36]
    assert session.max_context_len == 40
    assert Statistics.of(draw_sessions(CHAT)) == Statistics(3, 6, 2.0, 16.0, 4.0, 30.0, 5.0, 40)


def test_a_session_depends_on_the_seed_and_its_number_only() -> None:
    few, many = replace(CHAT, turns=Geometric(3)), replace(CHAT, turns=Geometric(3), num_sessions=9)
    assert list(draw_sessions(few, seed=1)) == list(draw_sessions(many, seed=1))[:3]
    assert list(draw_sessions(few, seed=1)) != list(draw_sessions(few, seed=2))


def test_sessions_of_a_tenant_share_its_prefix_and_the_first_has_the_most() -> None:
    spec = replace(CHAT, num_sessions=400, num_tenants=3, tenant_skew=1.0, prefix_tokens=Uniform(10, 20))
    prefixes: dict[str, set[Span]] = {}
    counts: dict[str, int] = {}
    for session in draw_sessions(spec):
        prefixes.setdefault(session.tenant, set()).add(session.turns[0].new[0])
        counts[session.tenant] = counts.get(session.tenant, 0) + 1
    assert {tenant: len(spans) for tenant, spans in prefixes.items()} == {f"tenant-{n}": 1 for n in range(3)}
    assert len(set.union(*prefixes.values())) == 3
    assert counts["tenant-0"] > counts["tenant-1"] > counts["tenant-2"]  # 6/11, 3/11, 2/11 of them


def test_tools_take_their_share_of_the_turns_after_the_first() -> None:
    search = ToolUse("search", 0.25, Constant(2.0), Constant(30))
    spec = replace(CHAT, num_sessions=400, turns=Constant(6), tools=(search,))
    sessions = list(draw_sessions(spec))
    assert all(session.turns[0].kind == "user" for session in sessions)
    later = [turn for session in sessions for turn in session.turns[1:]]
    tools = [turn for turn in later if turn.kind == "tool"]
    assert len(tools) / len(later) == pytest.approx(0.25, abs=0.03)
    assert {(turn.tool, turn.pause_s, turn.new_tokens) for turn in tools} == {("search", 2.0, 30)}


def test_a_session_ends_before_the_turn_that_would_pass_the_window() -> None:
    (session,) = draw_sessions(replace(CHAT, num_sessions=1, turns=Constant(9), max_context_len=60))
    assert len(session.turns) == 3
    assert session.max_context_len == 52
    (cut,) = draw_sessions(replace(CHAT, num_sessions=1, new_tokens=Constant(100), max_context_len=60))
    assert (len(cut.turns), cut.max_context_len) == (1, 60)


@pytest.mark.parametrize(
    ("spec", "turns", "new", "output"),
    [(sharegpt(5_000), 5.56, 37.77, 204.58), (ultrachat(5_000), 3.86, 51.78, 257.81)],
    ids=["sharegpt", "ultrachat"],
)
def test_the_papers_means(spec: Synthetic, turns: float, new: float, output: float) -> None:
    drawn = Statistics.of(draw_sessions(spec))
    assert (drawn.mean_turns, drawn.mean_new_tokens, drawn.mean_output_tokens, drawn.mean_pause_s) == pytest.approx(
        (turns, new, output, 60.0), rel=0.03
    )
