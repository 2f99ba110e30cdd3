"""Plots of a bench, as PNGs. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from engine.bench.summary import Json

SIZE = (10.0, 4.2)
DPI = 110
STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--")


def write_plots(folder: Path, summary: Json, turns: Sequence[Json]) -> dict[str, Path]:
    """The files by their titles, without those for which there are no figures."""
    rows = [row for row in summary["rows"] if row["figures"].get("ttft_p50")]
    if not rows:
        return {}
    drawn: dict[str, tuple[str, Callable[[Any], None]]] = {
        "Latency against throughput": ("latency.png", lambda figure: _latency(figure, rows)),
        "By turn": ("turns.png", lambda figure: _by(figure, rows, "by_turn", "turn")),
        "By position": (
            "positions.png",
            lambda figure: _by(figure, rows, "by_position", "tokens of the prompt, up to"),
        ),
        "Distribution": ("distribution.png", lambda figure: _distribution(figure, turns)),
    }
    if not any(row["by_position"] for row in rows):
        del drawn["By position"]
    paths = {}
    for title, (name, draw) in drawn.items():
        figure = matplotlib.figure.Figure(figsize=SIZE, layout="constrained")
        draw(figure)
        paths[title] = folder / name
        figure.savefig(paths[title], dpi=DPI)
    return paths


def _latency(figure: Any, rows: Sequence[Json]) -> None:
    """One line for each endpoint, one point for each load."""
    axes = figure.subplots(1, 2)
    measures = (
        ("ttft_p90", "time to first token, p90 (ms)"),
        ("normalised_p90", "time / tokens of the answer, p90 (ms)"),
    )
    for axis, (name, title) in zip(axes, measures, strict=True):
        for number, endpoint in enumerate(dict.fromkeys(row["endpoint"] for row in rows)):
            own = [row["figures"] for row in rows if row["endpoint"] == endpoint and name in row["figures"]]
            axis.errorbar(
                [each["turns_per_s"]["mean"] for each in own],
                [each[name]["mean"] * 1e3 for each in own],
                xerr=_half_widths(own, "turns_per_s", 1.0),
                yerr=_half_widths(own, name, 1e3),
                fmt=STYLES[number % len(STYLES)],
                capsize=3,
                label=endpoint,
            )
        axis.set(xlabel="turns/s", title=title)
        _finish(axis)


def _half_widths(figures: Sequence[Json], name: str, factor: float) -> list[float] | None:
    """Of the intervals; None if there are none, because of one repeat."""
    widths = [each[name]["half_width"] for each in figures]
    return [width * factor for width in widths] if all(width is not None for width in widths) else None


def _by(figure: Any, rows: Sequence[Json], table: str, label: str) -> None:
    """Time to first token, and what was cached if it is known, against the turn or the position; a line for each row."""
    knows_cache = any("cached_share" in each for row in rows for each in row[table])
    axes = figure.subplots(1, 2 if knows_cache else 1, squeeze=False)[0]
    measures = (
        ("ttft_p50", "time to first token, median (ms)", 1e3),
        ("cached_share", "cached part of the prompt (%)", 100.0),
    )
    for axis, (name, title, factor) in zip(axes, measures, strict=False):
        for number, row in enumerate(rows):
            points = [(each["key"], each[name] * factor) for each in row[table] if name in each]
            keys, values = zip(*points, strict=True) if points else ((), ())
            axis.plot(
                keys, values, STYLES[number % len(STYLES)], label=f"{row['endpoint']}, {row['level']}", markersize=4
            )
        axis.set(xlabel=label, title=title)
        if table == "by_position":
            axis.set_xscale("log", base=2)
        else:
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        _finish(axis)


def _distribution(figure: Any, turns: Sequence[Json]) -> None:
    """Which part of the turns was as fast as that."""
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(
        axes, ("ttft_s", "s_per_token"), ("time to first token (ms)", "time per later token (ms)"), strict=True
    ):
        series: dict[str, list[float]] = {}
        for turn in turns:
            if turn["is_measured"] and not turn["error"] and turn[name] is not None:
                series.setdefault(f"{turn['endpoint']}, {turn['level']}", []).append(turn[name] * 1e3)
        for number, (label, values) in enumerate(series.items()):
            shares = np.arange(1, len(values) + 1) / len(values)
            axis.step(sorted(values), shares, STYLES[number % len(STYLES)].lstrip("os^DvP"), where="post", label=label)
        axis.set(xlabel=title, title="share of turns that are as fast", xscale="log")
        _finish(axis)


def _finish(axis: Any) -> None:
    axis.margins(0.08)
    if axis.get_xscale() == "log":
        axis.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    else:
        axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if len(axis.get_legend_handles_labels()[1]) <= 12:
        axis.legend(fontsize="small")
