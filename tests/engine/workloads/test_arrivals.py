"""When sessions start."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from engine.errors import WorkloadError
from engine.workloads.arrivals import ClosedLoop, Poisson, Ramp, TraceTime, arrange, parse_arrivals
from engine.workloads.session import Session, Span, Turn

SESSIONS = [Session(f"s{number}", (Turn((Span(0, 8),), 4),), start_s=10.0 - number) for number in range(4)]


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        ("closed:8", ClosedLoop(8)),
        ("poisson:0.5", Poisson(0.5)),
        ("ramp:0:2:60", Ramp(0.0, 2.0, 60.0)),
        ("ramp:0:2:60:0:9:1:3", Ramp(0.0, 2.0, 60.0, Ramp(2.0, 0.0, 9.0, Ramp(0.0, 1.0, 3.0)))),
        ("trace", TraceTime()),
        ("trace:0.1", TraceTime(0.1)),
    ],
)
def test_arrivals_by_name(text: str, arrivals: object) -> None:
    assert parse_arrivals(text) == arrivals


@pytest.mark.parametrize(
    "text",
    [
        "closed",
        "closed:0",
        "closed:1.5",
        "poisson:-1",
        "poisson:nan",
        "ramp:1:2",
        "ramp:1:0:9",
        "ramp:1:2:9:1",
        "ramp:1:2:9:0:9",
        "gamma:2",
    ],
)
def test_other_arrivals_are_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(WorkloadError, match="write closed:SESSIONS, poisson:"):
        parse_arrivals(text)


def test_poisson_arrivals_are_those_of_their_seed() -> None:
    rng = random.Random("arrivals.7")
    gaps = [rng.expovariate(1.0) / 2 for _ in SESSIONS]
    starts = [session.start_s for session in arrange(SESSIONS, Poisson(2.0), seed=7)]
    assert starts == pytest.approx([sum(gaps[: number + 1]) for number in range(4)])
    assert [session.session_id for session in arrange(SESSIONS, Poisson(2.0), seed=7)] == ["s0", "s1", "s2", "s3"]
    assert starts != [session.start_s for session in arrange(SESSIONS, Poisson(2.0), seed=8)]


@pytest.mark.parametrize("ramp", [Ramp(0.0, 4.0, 10.0), Ramp(4.0, 1.0, 10.0), Ramp(2.0, 2.0, 5.0)])
def test_a_ramp_inverts_the_integral_of_its_rate(ramp: Ramp) -> None:
    def expected_until(time_s: float) -> float:
        within = min(time_s, ramp.seconds)
        slope = (ramp.to_per_s - ramp.from_per_s) / ramp.seconds
        return ramp.from_per_s * within + slope * within**2 / 2 + ramp.to_per_s * max(0.0, time_s - ramp.seconds)

    times = [ramp.time_of(number / 4) for number in range(160)]
    assert times[0] == 0.0
    assert all(before < after for before, after in pairwise(times))
    assert [expected_until(time_s) for time_s in times] == pytest.approx([number / 4 for number in range(160)])


def test_a_ramp_goes_on_with_the_next_one() -> None:
    whole, first, then = Ramp(0.0, 4.0, 10.0, Ramp(4.0, 1.0, 10.0)), Ramp(0.0, 4.0, 10.0), Ramp(4.0, 1.0, 10.0)
    assert [whole.time_of(number) for number in range(21)] == [first.time_of(number) for number in range(21)]
    assert [whole.time_of(20 + number) for number in range(30)] == pytest.approx(
        [10 + then.time_of(number) for number in range(30)]
    )
    assert (whole.most_per_s, whole.times(2)) == (4.0, Ramp(0.0, 8.0, 10.0, Ramp(8.0, 2.0, 10.0)))


def test_a_closed_loop_starts_at_once_and_leaves_pacing_to_its_driver() -> None:
    assert [session.start_s for session in arrange(SESSIONS, ClosedLoop(2))] == [0.0] * 4


def test_trace_time_scales_starts_and_pauses_and_sorts() -> None:
    session = Session("s", (Turn((Span(0, 8),), 4), Turn((Span(0, 8, 8),), 4, pause_s=3.0)), start_s=8.0)
    early, late = arrange([session, SESSIONS[3]], TraceTime(0.5))
    assert (early.session_id, early.start_s) == ("s3", 3.5)
    assert (late.session_id, late.start_s, late.turns[1].pause_s) == ("s", 4.0, 1.5)
