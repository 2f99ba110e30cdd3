"""The plot of benchmarks/trust.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure


def plot(title: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Throughput, time to first token by load, and its distribution: live beside simulated."""
    figure = matplotlib.figure.Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    loads = [row["num_active"] for row in rows]
    for axes, names in ((left, ("turns_per_s",)), (middle, ("first_token_p50_s", "first_token_p90_s"))):
        for number, name in enumerate(names):
            values = [row["live"][name] for row in rows]
            axes.fill_between(
                loads, [0.85 * v for v in values], [1.15 * v for v in values], color=f"C{number}", alpha=0.15
            )
            axes.plot(loads, values, "o-", color=f"C{number}", label=f"{name}, live")
            axes.plot(loads, [row["simulated"][name] for row in rows], "x--", color=f"C{number}", label="simulated")
        axes.set_xlabel("sessions at once")
        axes.legend()
    left.set_ylim(0)
    middle.set_yscale("log")
    left.set_title(f"{title}: turns/s (shaded: 15 % around live)")
    middle.set_title("time to first token, s")
    for number, row in enumerate(rows):
        for kind, style in (("live", "-"), ("simulated", "--")):
            curve = row[kind]["first_token_percentiles_s"]
            label = f"{row['num_active']} sessions" if kind == "live" else None
            right.plot(list(curve.values()), [int(number) for number in curve], style, color=f"C{number}", label=label)
    right.set(xscale="log", xlabel="time to first token, s", ylabel="% of turns", title="live -, simulated - -")
    right.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
