"""Turns -> figures: one set of definitions for what was measured and what was simulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

QUANTILES = {"p50": 50, "p90": 90, "p99": 99}
# Of an experiment's time, for graphs over it.
NUM_WINDOWS = 30
# A turn that finds less of what its session had before than this share began cold.
WARM = 0.9
# Counters of an engine (get_statistics) that are summed over the replicas; those of tiers come with them.
COUNTERS = (
    *("num_prompt_tokens", "num_output_tokens", "num_dropped_tokens", "num_not_loaded_tokens", "num_new_tokens"),
    *("num_suspensions", "num_refused", "num_finished"),
)


class PlayedTurn(NamedTuple):
    """One answered turn; times in seconds from the beginning of the run, counts in tokens.

    replica: the rank that answered. num_known_tokens: of the prompt, those that the session had before.
    """

    session: str
    number: int
    replica: str
    sent_s: float
    first_token_s: float
    finished_s: float
    num_prompt_tokens: int
    num_known_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Played:
    """What came of one run.

    lives: of each replica, its rank and from when to when it was there, in seconds. counters: of all replicas together.
    """

    turns: Sequence[PlayedTurn]
    warm_up_s: float
    ended_s: float
    lives: Sequence[tuple[str, float, float]]
    counters: Mapping[str, float] = field(default_factory=dict)
    num_errors: int = 0

    @property
    def counted(self) -> list[PlayedTurn]:
        """Sent after the warm-up, and finished in time."""
        return [turn for turn in self.turns if turn.sent_s >= self.warm_up_s and turn.finished_s <= self.ended_s]

    @property
    def replica_seconds(self) -> float:
        """After the warm-up, of all replicas together."""
        return sum(max(0.0, min(end, self.ended_s) - max(start, self.warm_up_s)) for _, start, end in self.lives)


def figures_of(played: Played) -> dict[str, float]:
    """By name; times in seconds, shares from 0 to 1. Without counted turns, only their number and that of the errors.

    turns_per_s, output_tokens_per_s: of what finished after the warm-up. s_per_token: from sending to the end of the answer,
    over its tokens. hit_rate: of the tokens that sessions had before, those found in a cache. cached_TIER: of all prompts'
    tokens, those found in that tier. balance: tokens computed, the busiest replica's over the mean. moved: of the turns after
    a session's first one, those that another replica answered. cold: of the turns, those that found less than nine tenths of
    what their session had before; cold_in_a_row: the most of them that a session had one after the other.
    replica_s_per_turn: what a turn costs.
    """
    counted = played.counted
    figures: dict[str, float] = {"turns": len(counted), "errors": played.num_errors}
    if not counted:
        return figures
    seconds = max(played.ended_s - played.warm_up_s, 1e-9)
    within = [turn for turn in played.turns if played.warm_up_s <= turn.finished_s <= played.ended_s]
    figures["turns_per_s"] = len(within) / seconds
    figures["output_tokens_per_s"] = sum(turn.num_output_tokens for turn in within) / seconds
    figures |= _spread("s_per_token", ((turn.finished_s - turn.sent_s) / turn.num_output_tokens for turn in counted))
    figures |= _spread("first_token_s", (turn.first_token_s - turn.sent_s for turn in counted))
    figures["prompt_tokens_mean"] = float(np.mean([turn.num_prompt_tokens for turn in counted]))
    figures["hit_rate"] = _hit_rate(counted)
    figures |= _shares(played.counters)
    ranks = sorted({rank for rank, _, _ in played.lives} | {turn.replica for turn in counted})
    work = work_by_replica(counted, ranks)
    if mean := sum(work.values()) / max(1, len(work)):
        figures["balance"] = max(work.values()) / mean
    cold = _cold_runs(counted)
    figures["cold"] = sum(cold) / len(counted)
    figures["cold_in_a_row"] = max(cold, default=0)
    figures["moved"] = _moved(played.turns, played.warm_up_s)
    figures["replica_s_per_turn"] = played.replica_seconds / max(1, len(within))
    return figures


def work_by_replica(turns: Iterable[PlayedTurn], ranks: Iterable[str]) -> dict[str, int]:
    """Tokens that each computed: of prompts what was not cached, and of answers all."""
    work: Counter[str] = Counter(dict.fromkeys(ranks, 0))
    for turn in turns:
        work[turn.replica] += turn.num_prompt_tokens - turn.num_cached_tokens + turn.num_output_tokens
    return dict(work)


def rows_by_time(played: Played, duration_s: float) -> list[dict[str, Any]]:
    """The whole run in windows: what was sent in each of them, and how many replicas there were in its middle."""
    width_s = duration_s / NUM_WINDOWS
    groups: dict[int, list[PlayedTurn]] = {}
    for turn in played.turns:
        groups.setdefault(int(turn.sent_s / width_s), []).append(turn)
    rows = []
    for number in range(NUM_WINDOWS):
        middle_s = (number + 0.5) * width_s
        row: dict[str, Any] = {
            "time_s": middle_s,
            "replicas": sum(start <= middle_s <= end for _, start, end in played.lives),
        }
        if group := groups.get(number):
            row |= {"turns_per_s": len(group) / width_s, "hit_rate": _hit_rate(group)}
            row |= _spread("s_per_token", ((each.finished_s - each.sent_s) / each.num_output_tokens for each in group))
            row |= _spread("first_token_s", (each.first_token_s - each.sent_s for each in group))
        rows.append(row)
    return rows


def summed_counters(statistics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of several engines together: COUNTERS, and the tokens found in each tier."""
    total: Counter[str] = Counter()
    for each in statistics:
        for name in (*COUNTERS, *(f"num_{tier}_cached_tokens" for tier in each["tiers"])):
            total[name] += each.get(name, 0)
    return dict(total)


def _spread(name: str, values: Iterable[float]) -> dict[str, float]:
    percentiles = np.percentile(list(values), list(QUANTILES.values()))
    return {f"{name}_{label}": float(value) for label, value in zip(QUANTILES, percentiles, strict=True)}


def _hit_rate(turns: Sequence[PlayedTurn]) -> float:
    known = sum(turn.num_known_tokens for turn in turns)
    return sum(min(turn.num_cached_tokens, turn.num_known_tokens) for turn in turns) / known if known else 0.0


def _shares(counters: Mapping[str, float]) -> dict[str, float]:
    """Of the tokens of all prompts, over the whole run."""
    prompt = counters.get("num_prompt_tokens", 0)
    if not prompt:
        return {}
    shares = {
        f"cached_{name.removeprefix('num_').removesuffix('_cached_tokens')}": count / prompt
        for name, count in counters.items()
        if name.endswith("_cached_tokens")
    }
    again = counters["num_dropped_tokens"] + counters["num_not_loaded_tokens"]
    return shares | {"recomputed": again / prompt, "suspensions": counters["num_suspensions"]}


def _cold_runs(turns: Iterable[PlayedTurn]) -> list[int]:
    """Of each session, the lengths of its rows of turns that began cold."""
    runs: list[int] = []
    last: dict[str, int] = {}  # the number of the session's latest cold turn
    run_of: dict[str, int] = {}
    for turn in sorted(turns, key=lambda turn: (turn.session, turn.number)):
        if turn.num_cached_tokens >= WARM * turn.num_known_tokens:
            continue
        if last.get(turn.session) == turn.number - 1:
            runs[run_of[turn.session]] += 1
        else:
            run_of[turn.session] = len(runs)
            runs.append(1)
        last[turn.session] = turn.number
    return runs


def _moved(turns: Sequence[PlayedTurn], warm_up_s: float) -> float:
    homes = {(turn.session, turn.number): turn.replica for turn in turns}
    later = [
        homes[turn.session, turn.number - 1] != turn.replica
        for turn in turns
        if turn.sent_s >= warm_up_s and (turn.session, turn.number - 1) in homes
    ]
    return sum(later) / len(later) if later else 0.0
