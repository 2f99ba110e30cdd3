"""When a request waits at home and when it goes elsewhere: exact, on small numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.routing.load import HALF_LIFE_S, LoadMeter, ReplicaLoad, SessionSizes, num_passed_over

IDLE = ReplicaLoad(num_requests=0, num_ahead=-4, turn_s=0.0, compute_s=None)
# 10 s of waiting; 1000 tokens are computed in 1 s + 4 s.
BUSY = ReplicaLoad(num_requests=30, num_ahead=20, turn_s=0.5, compute_s=(0.001, 0.000008))
ORDER = [2, 0, 1]


def passed(home: ReplicaLoad, second: ReplicaLoad, third: ReplicaLoad = IDLE, **known: int) -> int:
    loads = {2: home, 0: second, 1: third}
    num_fallbacks = known.get("num_fallbacks", 1)
    return num_passed_over(ORDER, loads, num_fallbacks, known.get("num_tokens", 0), known.get("last_rank"))


@pytest.mark.parametrize("num_tokens", [0, 1000])
def test_home_if_nothing_waits_there(num_tokens: int) -> None:
    for num_ahead in (-1, 0):
        assert passed(ReplicaLoad(16, num_ahead, 0.5, (0.0, 0.0)), IDLE, num_tokens=num_tokens) == 0


def test_away_if_the_kv_costs_less_than_the_wait() -> None:
    assert passed(BUSY, IDLE, num_tokens=1000, last_rank=2) == 1, "5 s to compute"
    assert passed(BUSY, IDLE, num_tokens=1500, last_rank=2) == 0, "10.5 s"
    for pull_s, expected in ((0.005, 1), (0.007, 0)):  # 7.5 s, 10.5 s
        assert passed(BUSY, replace(IDLE, pull_s=pull_s), num_tokens=1500, last_rank=2) == expected
    assert passed(BUSY, replace(IDLE, pull_s=9.0), num_tokens=1000, last_rank=2) == 1, "it is computed then"
    assert passed(BUSY, IDLE, num_tokens=1500, last_rank=0) == 1, "it is there already"
    assert passed(BUSY, IDLE) == 1, "a session that begins has none"


def test_the_gain_has_to_be_worth_it() -> None:
    for num_ahead, expected in ((2, 0), (3, 1)):
        assert passed(ReplicaLoad(30, num_ahead, 0.5, (0.0, 0.0)), IDLE) == expected


def test_where_as_many_wait_nothing_is_gained() -> None:
    assert passed(BUSY, BUSY) == 0
    slower = ReplicaLoad(30, 10, 1.0, None)
    assert passed(BUSY, slower) == 0
    never_seen_busy = ReplicaLoad(30, 15, 0.0, None)
    assert passed(BUSY, never_seen_busy) == 1
    assert passed(BUSY, ReplicaLoad(30, 19, 0.0, None)) == 0


def test_the_best_of_those_that_may_be_asked() -> None:
    assert passed(BUSY, ReplicaLoad(20, 10, 0.5, None), IDLE) == 1
    assert passed(BUSY, ReplicaLoad(20, 10, 0.5, None), IDLE, num_fallbacks=2) == 2
    assert passed(BUSY, IDLE, IDLE, num_fallbacks=2) == 1
    assert passed(BUSY, IDLE, num_fallbacks=0) == 0


def test_what_is_not_known_is_not_risked() -> None:
    unknown = ReplicaLoad(30, 20, 0.5, None)
    assert passed(unknown, IDLE, num_tokens=1) == 0
    assert passed(unknown, replace(IDLE, pull_s=1.0), num_tokens=1) == 1
    assert passed(ReplicaLoad(30, 20, 0.0, (0.0, 0.0)), IDLE) == 0, "the queue may be fast"


def test_a_queue_is_timed_while_some_wait() -> None:
    meter = LoadMeter()
    assert meter.turn_s(100, 5, 10.0) == 0.0
    assert meter.turn_s(102, 4, 11.0) == pytest.approx(0.5)
    assert meter.turn_s(102, 0, 40.0) == pytest.approx(0.5), "a pause tells nothing"
    assert meter.turn_s(102, 3, 60.0) == pytest.approx(0.5)
    seconds = 0.5 ** (2 / HALF_LIFE_S) + 2
    ended = 2 * 0.5 ** (2 / HALF_LIFE_S) + 1
    assert meter.turn_s(103, 3, 62.0) == pytest.approx(seconds / ended)


def test_a_queue_that_stands_still_grows_slower() -> None:
    meter = LoadMeter()
    meter.turn_s(0, 5, 0.0)
    assert [meter.turn_s(0, 5, now) for now in (HALF_LIFE_S, 2 * HALF_LIFE_S)] == [HALF_LIFE_S, 1.5 * HALF_LIFE_S]


def test_sizes_of_the_latest_sessions_are_known() -> None:
    sizes = SessionSizes(max_sessions=2)
    assert sizes.find("a") == (0, None)
    sizes.note("a", 10, 1)
    sizes.note("b", 20, 0)
    sizes.note("a", 30, 2)
    sizes.note("c", 40, 1)
    assert [sizes.find(name) for name in "abc"] == [(30, 2), (0, None), (40, 1)]
