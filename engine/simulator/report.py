"""What simulations gave, for people: a table, CSV, and one page of HTML with its plots in it."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.simulator.outcome import Summary

# Columns of the table: field of a Summary, heading, format.
COLUMNS = (
    ("turns_per_s", "turns/s", ".2f"),
    ("s_per_token_p50", "s/token p50", ".4f"),
    ("s_per_token_p90", "p90", ".4f"),
    ("s_per_token_p99", "p99", ".4f"),
    ("first_token_p50_s", "first token p50 (s)", ".3f"),
    ("first_token_p90_s", "p90", ".3f"),
    ("first_token_p99_s", "p99", ".3f"),
    ("hit_rate", "hit rate", ".3f"),
    ("loaded_share", "of it loaded", ".3f"),
    ("recompute_s", "recomputed (s)", ".1f"),
    ("num_suspensions", "suspensions", ".0f"),
    ("busy", "busy", ".2f"),
    ("requests_balance", "requests max/mean", ".2f"),
    ("moved_share", "moved", ".3f"),
    ("pulled_gb", "pulled (GB)", ".0f"),
)
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
WIDTH, HEIGHT, MARGIN = 560, 320, 56


@dataclass(frozen=True, slots=True)
class Result:
    """One case: its name, and the summaries of its seeds. group, x: the line and the place on it, in plots over the load."""

    name: str
    summaries: Sequence[Summary]
    group: str = ""
    x: float | None = None

    def mean(self, name: str) -> float:
        return float(np.mean([getattr(each, name) for each in self.summaries]))

    def spread(self, name: str) -> float:
        """Half the width of a 95 % interval of the mean, by Student's t; 0 for one seed."""
        values = [getattr(each, name) for each in self.summaries]
        if len(values) < 2:
            return 0.0
        return float(_t_95(len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def format_table(results: Sequence[Result]) -> str:
    """Means over the seeds, in aligned columns."""
    rows = [["case", *(heading for _, heading, _ in COLUMNS)]]
    rows += [[each.name or "all", *(format(each.mean(name), form) for name, _, form in COLUMNS)] for each in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if not column else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def format_csv(results: Sequence[Result], seeds: Sequence[int]) -> str:
    """A row for each case and seed, with all figures."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["case", "seed", *results[0].summaries[0].as_dict()])
    for each in results:
        for seed, summary in zip(seeds, each.summaries, strict=True):
            writer.writerow([each.name, seed, *(f"{value:.6g}" for value in summary.as_dict().values())])
    return stream.getvalue()


def format_html(title: str, notes: Sequence[tuple[str, str]], results: Sequence[Result]) -> str:
    """One page that needs nothing else. notes: (name, text) of what was simulated."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for _, heading, _ in COLUMNS)
    body = "".join(
        f"<tr><td>{html.escape(each.name or 'all')}</td>"
        + "".join(f"<td>{each.mean(name):{form}}{_plus_minus(each, name, form)}</td>" for name, _, form in COLUMNS)
        + "</tr>"
        for each in results
    )
    known = "".join(f"<dt>{html.escape(name)}</dt><dd><pre>{html.escape(text)}</pre></dd>" for name, text in notes)
    plots = "".join(f"<figure>{plot}</figure>" for plot in _plots(results))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>"
        "body{font:14px system-ui,sans-serif;margin:2em auto;max-width:1200px}table{border-collapse:collapse;font-size:12px}"
        "td,th{padding:.25em .6em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}"
        "figure{display:inline-block;margin:1em .5em}pre{white-space:pre-wrap;margin:0}dt{font-weight:600;margin-top:.5em}"
        f"</style><h1>{html.escape(title)}</h1>{plots}<table><tr><th>case</th>{head}</tr>{body}</table>"
        f"<h2>What was simulated</h2><dl>{known}</dl></html>\n"
    )


def plot_lines(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    y_max: float | None = None,
    dashed: Mapping[str, str] | None = None,
) -> str:
    """An SVG of lines through points, by name, with axes from 0.

    y_max: what is above is drawn at the edge; None = nothing is. dashed: lines by name, and those whose colors they share.
    """
    points = [point for line in lines.values() for point in line]
    x_step, x_end = _ticks(max((x for x, _ in points), default=1.0))
    y_step, y_end = _ticks(y_max or max((y for _, y in points), default=1.0))

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + x / x_end * (WIDTH - MARGIN - 10), HEIGHT - MARGIN - min(y / y_end, 1.0) * (
            HEIGHT - MARGIN - 30
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + 16 * len(lines)}" '
        f'font-family="sans-serif" font-size="11"><text x="{WIDTH / 2}" y="16" text-anchor="middle" font-size="13">'
        f"{html.escape(title)}</text>"
    ]
    for number in range(round(y_end / y_step) + 1):
        left, at_y = place(0, number * y_step)
        parts.append(
            f'<line x1="{left}" y1="{at_y:.1f}" x2="{WIDTH - 10}" y2="{at_y:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 4}" y="{at_y + 4:.1f}" text-anchor="end">{number * y_step:.3g}</text>'
        )
    for number in range(round(x_end / x_step) + 1):
        at_x, low = place(number * x_step, 0)
        parts.append(f'<text x="{at_x:.1f}" y="{low + 14}" text-anchor="middle">{number * x_step:.3g}</text>')
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 22}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2})">'
        f"{html.escape(y_label)}</text>"
    )
    for number, (name, line) in enumerate(lines.items()):
        shared = (dashed or {}).get(name)
        color = COLORS[(number if shared is None else list(lines).index(shared)) % len(COLORS)]
        dash = "" if shared is None else ' stroke-dasharray="5 4"'
        places = [place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        at = HEIGHT - 6 + 16 * number
        parts.append(
            f'<line x1="{MARGIN}" y1="{at}" x2="{MARGIN + 14}" y2="{at}" stroke="{color}" stroke-width="3"{dash}/>'
            f'<text x="{MARGIN + 18}" y="{at + 5}">{html.escape(name or "all")}</text>'
        )
    return "".join(parts) + "</svg>"


def _plots(results: Sequence[Result]) -> list[str]:
    groups: dict[str, list[Result]] = {}
    for each in results:
        if each.x is not None:
            groups.setdefault(each.group, []).append(each)
    if not any(len(group) > 1 for group in groups.values()):
        return []
    plots = []
    for name, title, label in (
        ("s_per_token_p90", "Latency, 90th percentile", "s/token"),
        ("first_token_p90_s", "Time to first token, 90th percentile", "s"),
        ("hit_rate", "Hit rate", "of tokens computed before"),
        ("recompute_s", "Time spent on computing again", "s"),
    ):
        lines = {
            group: sorted((each.mean("turns_per_s"), each.mean(name)) for each in members)
            for group, members in groups.items()
        }
        plots.append(plot_lines(title, "turns a second, achieved", label, lines))
    return plots


def _ticks(most: float) -> tuple[float, float]:
    """A round distance of some five to ten ticks from 0 that reach `most`, and the last of them."""
    power = 10 ** math.floor(math.log10(most)) if most > 0 else 1.0
    step = next(power * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if most <= 10 * power * part)
    return step, step * max(1, math.ceil(most / step - 1e-9))


def _plus_minus(result: Result, name: str, form: str) -> str:
    spread = result.spread(name)
    return f" ± {spread:{form}}" if spread else ""


def _t_95(num_degrees: int) -> float:
    """Of Student's distribution, two-sided; a table, as numpy has none."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[num_degrees - 1] if num_degrees <= len(table) else 2.0
