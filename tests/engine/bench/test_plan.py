"""The order of runs, and the ways to say a load."""

from __future__ import annotations

import pytest

from engine.bench.plan import Cell, Level, levels_of, order_of
from engine.errors import ConfigError
from engine.workloads.arrivals import ClosedLoop, Poisson, Ramp
from engine.workloads.session import Session


def test_endpoints_take_turns_and_none_is_always_first() -> None:
    assert list(order_of(2, 2, 2)) == [
        *(Cell(0, 0, 0), Cell(1, 0, 0), Cell(1, 1, 0), Cell(0, 1, 0)),
        *(Cell(1, 0, 1), Cell(0, 0, 1), Cell(0, 1, 1), Cell(1, 1, 1)),
    ]


def test_loads(sessions: list[Session]) -> None:
    assert levels_of([6.0], [], None, sessions) == [Level("6 turns/s", Poisson(2.0), 6.0, "turns/s offered")]
    assert [level.arrivals for level in levels_of([], [1, 8], None, sessions)] == [ClosedLoop(1), ClosedLoop(8)]
    assert [level.arrivals for level in levels_of([], [], "ramp:1:2:9", sessions)] == [Ramp(1.0, 2.0, 9.0)]
    assert [level.label for level in levels_of([], [], None, sessions)] == ["4 sessions"]


@pytest.mark.parametrize(
    ("rates", "concurrencies", "arrivals", "problem"),
    [
        ([1.0], [1], None, "give one of them"),
        ([0.0], [], None, "--rate must be above 0"),
        ([], [0], None, "--concurrency must be at least 1"),
        ([], [], "now", "unknown arrivals 'now'; write closed:SESSIONS"),
        ([1.0] * 101, [], None, "at most 100 loads"),
    ],
)
def test_what_is_no_load(
    sessions: list[Session], rates: list[float], concurrencies: list[int], arrivals: str | None, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        levels_of(rates, concurrencies, arrivals, sessions)
