"""Plots of an experiment, as SVG: over replicas, over the load, over time.

Measured lines are solid, simulated ones dashed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.simulator.report import plot_lines

Json = Mapping[str, Any]
Lines = dict[str, list[tuple[float, float]]]
# Figure, title, label of its axis.
OVER_REPLICAS = (
    ("turns_per_s", "Throughput", "turns a second"),
    ("s_per_token_p90", "Latency, 90th percentile", "s/token"),
    ("first_token_s_p90", "Time to first token, 90th percentile", "s"),
    ("hit_rate", "Hit rate", "of tokens computed before"),
    ("balance", "Balance of the replicas", "busiest / mean, tokens computed"),
    ("moved", "Turns that another replica answered", "share"),
    ("replica_s_per_turn", "Cost of a turn", "replica-seconds"),
)
OVER_LOAD = (
    ("s_per_token_p90", "Latency, 90th percentile", "s/token"),
    ("first_token_s_p90", "Time to first token, 90th percentile", "s"),
    ("hit_rate", "Hit rate", "of tokens computed before"),
    ("replica_s_per_turn", "Cost of a turn", "replica-seconds"),
)
OVER_TIME = (
    ("s_per_token_p90", "Latency over time, 90th percentile", "s/token"),
    ("first_token_s_p90", "Time to first token over time, 90th percentile", "s"),
    ("hit_rate", "Hit rate over time", "of tokens computed before"),
    ("turns_per_s", "Turns sent over time", "turns a second"),
    ("replicas", "Replicas over time", "replicas"),
)


def draw_plots(summary: Json) -> dict[str, tuple[str, str]]:
    """By file name: the title and the SVG. Those that would have no line are left out."""
    rows = [row for row in summary["rows"] if row["figures"]]
    drawn = {}
    for name, title, label in OVER_REPLICAS:
        lines = _lines(rows, name, without=("num_replicas",), x_of=lambda row: float(row["num_replicas"]))
        drawn[f"replicas_{name}"] = (f"{title} by replicas", title, "replicas", label, lines)
    for name, title, label in OVER_LOAD:
        lines = _lines(rows, name, without=("arrivals",), x_of=lambda row: float(row["figures"]["turns_per_s"]["mean"]))
        drawn[f"load_{name}"] = (f"{title} by load", title, "turns a second, achieved", label, lines)
    for name, title, label in OVER_TIME:
        drawn[f"time_{name}"] = (title, title, "s", label, _lines_over_time(rows, name))
    return {
        name: (heading, plot_lines(title, x_label, label, lines, dashed=_dashed(lines)))
        for name, (heading, title, x_label, label, lines) in drawn.items()
        if any(len(line) > 1 for line in lines.values())
    }


def _lines(rows: Sequence[Json], name: str, without: Sequence[str], x_of: Any) -> Lines:
    """A line for what differs in anything else, ascending; those of a single point are left out."""
    lines: Lines = {}
    for row in rows:
        if name in row["figures"] and any(axis in row["axes"] for axis in without):
            what = ", ".join(f"{axis} {value}" for axis, value in row["axes"].items() if axis not in without)
            lines.setdefault(_named(what, row["kind"]), []).append((x_of(row), row["figures"][name]["mean"]))
    return {name: sorted(line) for name, line in lines.items() if len(line) > 1}


def _lines_over_time(rows: Sequence[Json], name: str) -> Lines:
    return {
        _named(row["case"], row["kind"]): [(each["time_s"], each[name]) for each in row["by_time"] if name in each]
        for row in rows
        if row["by_time"]
    }


def _named(what: str, kind: str) -> str:
    return f"{what}, {kind}" if what else kind


def _dashed(lines: Lines) -> dict[str, str]:
    """The simulated lines that have the color of a measured one."""
    pairs = {name: name.removesuffix("simulated") + "measured" for name in lines if name.endswith("simulated")}
    return {name: other for name, other in pairs.items() if other in lines}
