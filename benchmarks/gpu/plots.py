"""One picture per section, from the JSON files that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure


def plot_all(folder: Path) -> list[str]:
    """Names of the pictures that were made."""
    plots: dict[str, Callable[[Any], matplotlib.figure.Figure]] = {
        "attention": plot_attention,
        "figure_12": plot_figure_12,
        "llama": plot_model,
        "opt": plot_model,
        "conversations": lambda figures: plot_conversations(
            figures["rows"] + ((read(folder / "peer.json") or {}).get("rows") or [])
        ),
    }
    made = []
    for name, plot in plots.items():
        path = folder / f"{name}.json"
        figures = read(path)
        if figures:
            plot(figures).savefig(path.with_suffix(".png"), dpi=120)
            made.append(path.with_suffix(".png").name)
    return made


def read(path: Path) -> Any:
    """What a section measured; None if it was not run or measured nothing."""
    return json.loads(path.read_text())["figures"] if path.exists() else None


def _figure(width: float, height: float = 4.0) -> matplotlib.figure.Figure:
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def plot_attention(rows: list[dict[str, Any]]) -> matplotlib.figure.Figure:
    rows = [row for row in rows if "paged_over_contiguous" in row]
    figure = _figure(8, 1 + 0.3 * len(rows))
    axes = figure.subplots()
    names = [f"{row['model']}: {row['batch']} x {row['query_len']} over {row['context_len']}" for row in rows]
    axes.barh(names, [row["paged_over_contiguous"] for row in rows])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="time of paged attention / best contiguous kernel of torch")
    return figure


def plot_figure_12(rows: list[dict[str, Any]]) -> matplotlib.figure.Figure:
    figure = _figure(6)
    axes = figure.subplots()
    for name in ("contiguous", "copy-out and attention", "one token at a time", "ours"):
        known = [row for row in rows if name in row]
        axes.plot([row["past_tokens"] for row in known], [row[name] for row in known], "o-", label=name)
    axes.set(
        xlabel="past tokens", ylabel="ms", title="32 requests of 8 query tokens (paper, Figure 12)", ylim=(0, None)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def plot_model(figures: dict[str, Any]) -> matplotlib.figure.Figure:
    figure = _figure(14)
    left, middle, right = figure.subplots(1, 3)
    decodes = [row for row in figures.get("decode", []) if "step_ms" in row]
    batches = [row["batch"] for row in decodes]
    left.plot(batches, [row["step_ms"] for row in decodes], "o-", label="step")
    for key, rate in (("copy_floor_ms", "rate of a copy"), ("floor_ms", "read rate")):
        if all(key in row for row in decodes):
            left.plot(batches, [row[key] for row in decodes], "--", label=f"weights and KV at the {rate}")
    left.set(xlabel="decoding requests", ylabel="ms", title="decode step", ylim=(0, None))
    left.legend()
    names = [f"{row['by']}, {row['way']}" for row in figures.get("swaps", [])]
    middle.barh(names, [row["share_of_pinned_copy"] for row in figures.get("swaps", [])])
    middle.axvline(1.0, color="black", linewidth=1)
    middle.set(xlabel="share of the bandwidth of a pinned copy", title="swaps of whole blocks")
    middle.invert_yaxis()
    names = [f"{row['by']}, {row['context_len']} in, {row['num_new_tokens']} new" for row in figures.get("hidden", [])]
    right.barh(names, [row["share_hidden"] for row in figures.get("hidden", [])])
    right.set(xlabel="share of the shorter that is hidden", title="swap-ins beside computation", xlim=(0, 1))
    right.invert_yaxis()
    return figure


def plot_conversations(all_rows: list[dict[str, Any]]) -> matplotlib.figure.Figure:
    figure = _figure(6)
    axes = figure.subplots()
    names = list(dict.fromkeys(row["configuration"] for row in all_rows))
    for name in names:
        rows = sorted((row for row in all_rows if row["configuration"] == name), key=lambda row: float(row["active"]))
        axes.plot([row["turns_per_s"] for row in rows], [row["ttft_p90_s"] for row in rows], "o-", label=name)
    axes.set(
        xlabel="turns/s", ylabel="time to first token, p90, s", title="working set 3x the GPU tier", ylim=(0, None)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
