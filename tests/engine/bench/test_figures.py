"""Figures of turns, exactly: nothing here is measured."""

from __future__ import annotations

import pytest

from engine.bench.figures import (
    Interval,
    Lag,
    Limits,
    errors_of,
    figures_of,
    intervals_of,
    position_of,
    rows_by,
    turn_of,
)
from engine.bench.turns import LoopLag, TurnRecord


def turn(
    number: int, sent_s: float, ttft_s: float, tokens: int = 5, per_token_s: float = 0.1, **others: object
) -> TurnRecord:
    first_s = sent_s + ttft_s
    values = {"due_s": sent_s, "num_prompt_tokens": 100, "num_cached_tokens": 0, **others}
    return TurnRecord(
        "s",
        number,
        "user",
        sent_s=sent_s,
        first_s=first_s,
        end_s=first_s + (tokens - 1) * per_token_s,
        num_output_tokens=tokens,
        **values,  # type: ignore[arg-type]
    )


RECORDS = [
    turn(0, 0.0, 0.2),
    turn(1, 2.0, 0.4, num_prompt_tokens=300, num_cached_tokens=200, cached_by=(("gpu", 150), ("disk", 50))),
    TurnRecord("t", 0, "user", 1.0, 1.0, None, 1.5, error="503: full"),
    turn(0, 1.0, 0.6, tokens=1),
]


def test_times_of_a_turn() -> None:
    record = turn(0, 1.0, 0.2, due_s=0.9)
    assert (record.lag_s, record.ttft_s, record.total_s) == pytest.approx((0.1, 0.2, 0.6))
    assert (record.s_per_token, record.normalised_s) == pytest.approx((0.1, 0.12))
    assert turn(0, 0.0, 0.2, tokens=1).s_per_token is None


def test_figures_of_a_run() -> None:
    figures = figures_of(RECORDS, Limits(ttft=0.5, s_per_token=0.2))
    assert figures["turns"], figures["errors"] == (3, 1)
    assert figures["seconds"] == pytest.approx(2.8)  # from 0.0, when the first was due, to the end of the last
    assert figures["turns_per_s"] == pytest.approx(3 / 2.8)
    assert figures["output_tokens_per_s"] == pytest.approx(11 / 2.8)
    assert (figures["ttft_mean"], figures["ttft_p50"]) == pytest.approx((0.4, 0.4))
    assert figures["ttft_p90"] == pytest.approx(0.56)
    assert figures["s_per_token_p99"] == pytest.approx(0.1)  # of the two that have later tokens
    assert figures["normalised_p50"] == pytest.approx(0.16)  # of 0.12, 0.16 and 0.6
    assert figures["cached_share"] == pytest.approx(0.4)
    assert (figures["cached_share_gpu"], figures["cached_share_disk"]) == pytest.approx((0.3, 0.1))
    # Two of four turns: one failed, one was late.
    assert figures["goodput_share"] == 0.5
    assert figures["goodput_turns_per_s"] == pytest.approx(2 / 2.8)


def test_without_limits_there_is_no_goodput_and_without_answers_no_times() -> None:
    assert "goodput_share" not in figures_of(RECORDS, Limits())
    assert figures_of(RECORDS[2:3], Limits()) == {"turns": 0, "errors": 1, "sessions": 1}
    assert figures_of([], Limits()) == {"turns": 0, "errors": 0, "sessions": 0}


def test_a_server_that_tells_nothing_of_its_cache_has_no_share() -> None:
    silent = [turn(0, 0.0, 0.2, num_cached_tokens=None)]
    assert "cached_share" not in figures_of(silent, Limits())
    assert "prompt_tokens_mean" not in figures_of([turn(0, 0.0, 0.2, num_prompt_tokens=None)], Limits())


def test_intervals_over_repeats() -> None:
    assert Interval.of([3.0]) == Interval(3.0, None, 1)
    two = Interval.of([2.0, 4.0])
    assert (two.mean, two.half_width) == pytest.approx((3.0, 12.706))  # t of one degree of freedom, times 1
    assert Interval.of([1.0] * 40).half_width == 0.0
    assert intervals_of([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": Interval.of([1.0, 3.0])}
    assert intervals_of([]) == {}


def test_rows_by_turn_and_by_position() -> None:
    first, second = rows_by(RECORDS, turn_of)
    assert (first["key"], first["turns"], first["ttft_p50"]) == pytest.approx((1, 2, 0.4))
    assert (second["key"], second["turns"], second["cached_share"]) == pytest.approx((2, 1, 2 / 3))
    assert [(row["key"], row["turns"]) for row in rows_by(RECORDS, position_of)] == [(128, 2), (512, 1)]
    assert [position_of(turn(0, 0, 1, num_prompt_tokens=each)) for each in (None, 1, 128, 129)] == [None, 128, 128, 256]


def test_errors_are_counted_by_what_they_say() -> None:
    assert errors_of([*RECORDS, RECORDS[2]]) == {"503: full": 2}


def test_a_client_that_is_late_is_told() -> None:
    on_time = [turn(0, 0.0, 0.2, due_s=-0.001)] * 100
    assert Lag.of(on_time, [LoopLag(0.002, 0.5)]).why_refused(on_time) == ""
    late = [turn(0, 0.0, 0.2, due_s=-0.03)] * 100
    lag = Lag.of(late, [])
    assert (lag.schedule_p99_s, lag.schedule_max_s, lag.loop_max_s) == pytest.approx((0.03, 0.03, 0.0))
    assert lag.why_refused(late).startswith(
        "the client sent turns 30 ms late (99th percentile; 25 ms are allowed): use more"
    )
    assert lag.why_refused(late, max_lag_s=0.05) == ""
    # A tenth of half a second is allowed where a turn takes that long to say something.
    slow = [turn(0, 0.0, 0.5, due_s=-0.03)] * 100
    assert Lag.of(slow, []).why_refused(slow) == ""
    assert "noticed events 90 ms late" in Lag.of(slow, [LoopLag(0.001, 0.1), LoopLag(0.09, 0.1)]).why_refused(slow)
