"""Simulated runs, kept in a CSV so that none is simulated twice, and the rate at which a system reaches a latency."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.paper import constants
from benchmarks.paper.published import Point, rate_at
from benchmarks.paper.systems import Run

Row = dict[str, float]
# Of a Summary, in the file.
FIGURES = (
    *(
        "turns_per_s",
        "num_turns",
        "num_unfinished",
        "s_per_token_mean",
        "s_per_token_p50",
        "s_per_token_p90",
        "s_per_token_p99",
    ),
    *("first_token_p50_s", "first_token_p90_s", "first_token_p99_s", "hit_rate", "loaded_share"),
    *("recompute_s", "num_recomputed_tokens", "num_suspensions", "busy"),
)
# The search doubles its step from this one until it has passed the latency, and ends when its rates are this close.
FIRST_STEP, CLOSE, MOST_RUNS = 1.15, 1.08, 10


class Runs:
    """The rows of one CSV file, by Run.key; what is missing is simulated, and appended at once."""

    def __init__(self, path: Path, is_complete: bool = False) -> None:
        """is_complete: nothing is simulated; a run that the file lacks is a KeyError."""
        self._path = path
        self._is_complete = is_complete
        self._rows: dict[str, Row] = {}
        if path.exists():
            with path.open(newline="") as stream:
                for row in csv.DictReader(stream):
                    self._rows[row["key"]] = {name: float(row[name]) for name in FIGURES}

    def row(self, run: Run) -> Row:
        if run.key not in self._rows and self._is_complete:
            raise KeyError(f"{self._path.name} has no run of {run}; simulate it without --compare-only")
        if run.key not in self._rows:
            figures = run.simulate().as_dict()
            summary = {name: float(f"{figures[name]:.6g}") for name in FIGURES}
            self._rows[run.key] = summary
            self._append({**_describe(run), **summary})
        return self._rows[run.key]

    def point(self, run: Run) -> Point:
        """Requests a second that were achieved (the paper's points move left, too, if a system is saturated); s/token."""
        row = self.row(run)
        return row["turns_per_s"], row[constants.METRIC]

    def _append(self, row: dict[str, str | float]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, list(row), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def _describe(run: Run) -> dict[str, str | float]:
    """What a run was of, for who reads the file; the key alone identifies it."""
    return {
        "key": run.key,
        "panel": f"{run.panel.model} {run.panel.dataset}",
        "system": run.system,
        "changed": "+".join(run.changed),
        "chunk_size": run.chunk_size,
        "think_s": run.think_s,
        "host_share": run.host_share,
        "seed": run.seed,
        "duration_s": run.duration_s,
        "warm_up_s": run.warm_up_s,
        "offered_per_s": run.rate,
    }


def curve(runs: Runs, run: Run, rates: Sequence[float], level: float, guess: float) -> tuple[list[Point], float | None]:
    """Points of a system's curve in order of the rates offered, and its rate at `level`.

    run: whatever its rate. rates: simulated besides those that the search from `guess` tries.
    """
    points = {rate: runs.point(replace(run, rate=rate)) for rate in rates}

    def latency(rate: float) -> float:
        points[rate] = runs.point(replace(run, rate=rate))
        return points[rate][1]

    search(latency, level, guess)
    ordered = [points[rate] for rate in sorted(points)]
    return ordered, rate_at(ordered, level)


def search(latency: Callable[[float], float], level: float, guess: float) -> None:
    """Try rates until two that are close have the level between their latencies; gives up after MOST_RUNS."""
    low, high = 0.0, math.inf
    low_latency = high_latency = level
    rate, step = guess, FIRST_STEP
    for _ in range(MOST_RUNS):
        rate = float(f"{rate:.4g}")
        tried = latency(rate)
        if tried <= level:
            low, low_latency = rate, tried
        else:
            high, high_latency = rate, tried
        if high < low * CLOSE:
            return
        if low and high < math.inf:
            # Latencies bend upwards: between the two in the middle of the rates, and where a line of the logarithms passes.
            share = math.log(level / low_latency) / math.log(high_latency / low_latency)
            rate = low + (high - low) * (0.5 + min(0.9, max(0.1, share))) / 2
        else:
            rate, step = (low * step if low else high / step), step**2
