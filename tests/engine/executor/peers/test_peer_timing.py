"""What bounds the transport in time."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executor.peers.timing import BURST_S, BackOff, Deadlines, Rate


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 3)), min_size=1), st.integers(1, 1000))
def test_a_rate_is_kept_by_all_together(moves, bytes_per_s):
    """Up to any moment, no more is let through than the rate and one burst allow; and never less than that."""
    rate, now, allowed = Rate(bytes_per_s), 100.0, []
    for num_bytes, pause_s in moves:
        now += pause_s
        allowed.append((now + rate.reserve(num_bytes, now), num_bytes))
    for first, (begin_s, _) in enumerate(allowed):
        for last in range(first, len(allowed)):
            moved = sum(num_bytes for _, num_bytes in allowed[first:last])  # the last one is only about to be moved
            assert moved <= bytes_per_s * (allowed[last][0] - begin_s + BURST_S) * (1 + 1e-9) + 1e-6
    assert allowed[0][0] == 100.0 + moves[0][1], "the first one does not wait"


def test_without_a_rate_nothing_waits():
    rate = Rate(0)
    assert [rate.reserve(1 << 40, 0.0) for _ in range(3)] == [0.0] * 3


def test_a_wait_ends_with_its_connection():
    rate, stop = Rate(1.0), threading.Event()
    rate.reserve(1_000_000, 0.0)
    stop.set()
    rate.wait(1_000_000, stop)


def test_a_peer_is_left_alone_for_longer_and_longer():
    back_off, now, pauses = BackOff(), 0.0, []
    assert back_off.is_over(now)
    for _ in range(7):
        back_off.fail(now)
        back_off.fail(now + 0.1)  # of the same outage
        pauses.append(next(pause for pause in range(1, 100) if back_off.is_over(now + pause)))
        now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    back_off.end()
    assert back_off.is_over(0.0)
    back_off.fail(now)
    assert not back_off.is_over(now + 0.9)
    assert back_off.is_over(now + 1.0)


def test_deadlines_are_met_in_order_and_end():
    deadlines, seen, done = Deadlines("deadlines"), [], threading.Event()

    def fail() -> None:
        seen.append("fails")
        raise ValueError("one that fails")

    deadlines.call_after(0.04, done.set)
    deadlines.call_after(0.02, lambda: seen.append("second"))
    deadlines.call_after(0.0, fail)
    deadlines.call_after(1000.0, lambda: seen.append("never"))
    assert done.wait(20)
    assert seen == ["fails", "second"]
    assert deadlines.close(20)
    deadlines.call_after(0.0, lambda: seen.append("never"))
    assert deadlines.close(20)
    assert seen == ["fails", "second"]


@pytest.mark.parametrize("is_used", [True, False])
def test_deadlines_may_be_closed_at_any_time(is_used):
    deadlines = Deadlines("deadlines")
    if is_used:
        deadlines.call_after(1000.0, lambda: None)
    assert deadlines.close(20)
