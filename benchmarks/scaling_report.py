"""Tables and plots of what benchmarks/scaling.py has simulated."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.cache.prices import LOAD_OVERHEAD
from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.report import plot_lines
from engine.simulator.step_cost import Roofline

CHUNK_SIZE = 128
Line = Mapping[str, Any]
# Of a table: field of a Summary, heading, format, factor.
STEADY = (
    ("turns_per_replica", "turns/s for each", ".2f"),
    ("first_token_p50_s", "first token p50", ".3f"),
    ("first_token_p90_s", "p90", ".3f"),
    ("first_token_p99_s", "p99 (s)", ".2f"),
    ("s_per_token_p50", "s/token p50", ".4f"),
    ("s_per_token_p90", "p90", ".4f"),
    ("s_per_token_p99", "p99", ".4f"),
    ("hit_rate", "hit rate", ".3f"),
    ("moved_share", "moved turns", ".3f"),
    ("pulled_gb_per_turn", "GB pulled a turn", ".3f"),
    ("requests_balance", "requests max/mean", ".2f"),
)
CHANGING = (
    ("first_token_p50_s", "first token p50", ".3f"),
    ("first_token_p90_s", "p90", ".3f"),
    ("first_token_p99_s", "p99 (s)", ".2f"),
    ("s_per_token_p90", "s/token p90", ".4f"),
    ("hit_rate", "hit rate", ".3f"),
    ("moved_share", "moved turns", ".3f"),
    ("moved_hit_rate", "their hit rate", ".3f"),
    ("moved_first_token_p90_s", "their first token p90", ".2f"),
    ("pulled_gb", "GB pulled", ".0f"),
    ("recompute_s", "s computed again", ".1f"),
)


def write_report(folder: Path) -> None:
    """tables.md, lines.csv and SVG plots in that folder, from its *.jsonl."""
    files = {path.stem: read_lines(path) for path in sorted(folder.glob("*.jsonl"))}
    _write_csv(folder / "lines.csv", [line for lines in files.values() for line in lines])
    parts = [f"## Where pulling begins to pay\n\n{break_even_table()}\n"]
    for name, lines in files.items():
        if name.endswith(("_grow", "_shrink")):
            keys, columns = ("routing", "kv_handover"), CHANGING
        else:
            keys, columns = ("num_replicas", "arrivals", "routing"), STEADY
        parts.append(f"## {name}\n\n{_table(lines, keys, columns)}\n")
        for plot, title, label, field in (
            ("first_token", "Time to first token, 90th percentile", "s", "first_token_p90_s"),
            ("hit_rate", "Hit rate", "of tokens computed before", "hit_rate"),
        ):
            if name.endswith("_sizes"):
                _plot(folder / f"{name}_{plot}.svg", title, "log2 of replicas", label, lines, field, _log_replicas)
            elif name.endswith("_load"):
                for num in sorted({line["num_replicas"] for line in lines}):
                    some = [line for line in lines if line["num_replicas"] == num]
                    where = folder / f"{name}_{num}_{plot}.svg"
                    _plot(where, f"{title}, {num} replicas", "turns a second, achieved", label, some, field, _rate)
    (folder / "tables.md").write_text("\n".join(parts))


def read_lines(path: Path) -> list[Line]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["turns_per_replica"] = line["turns_per_s"] / line["num_replicas"]
        line["pulled_gb_per_turn"] = line["pulled_gb"] / max(line["num_turns"], 1)
    return lines


def _table(lines: Sequence[Line], keys: Sequence[str], columns: Sequence[tuple[str, str, str]]) -> str:
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in keys), []).append(line)
    rows = [[*(key.replace("_", " ") for key in keys), "seeds", *(heading for _, heading, _ in columns)]]
    rows.append(["---"] * len(rows[0]))
    for key, members in sorted(groups.items()):
        rows.append([*map(str, key), str(len(members)), *(_cell(members, name, form) for name, _, form in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(lines: Sequence[Line], name: str, form: str) -> str:
    """The mean, and from where to where the seeds lie."""
    values = [line[name] for line in lines]
    text = format(float(np.mean(values)), form)
    return text if len(values) == 1 else f"{text} ({min(values):{form}}-{max(values):{form}})"


def _plot(
    path: Path, title: str, x_label: str, y_label: str, lines: Iterable[Line], field: str, x_of: Callable[[Line], float]
) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        curves.setdefault(line["routing"], []).append((x_of(line), line[field]))
    path.write_text(plot_lines(title, x_label, y_label, {name: sorted(curve) for name, curve in curves.items()}))


def _log_replicas(line: Line) -> float:
    return math.log2(line["num_replicas"])


def _rate(line: Line) -> float:
    return float(line["turns_per_s"])


def _write_csv(path: Path, lines: Sequence[Line]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def break_even_table() -> str:
    """From which bandwidth between replicas on a chunk is pulled rather than computed again, by its place in the context."""
    positions = (500, 2_000, 8_000, 32_000)
    rows = [["model", "device", "KV a token (KB)", *(f"at token {position:,}" for position in positions)]]
    rows.append(["---"] * len(rows[0]))
    for model_name, device_name, num_devices in (
        ("llama-3.1-8b", "h100-80gb", 1),
        ("llama-3.1-70b", "h100-80gb", 4),
        ("opt-13b", "a100-80gb", 1),
    ):
        shape = MODELS[model_name]
        device = replace(DEVICES[device_name], num_devices=num_devices)
        num_bytes = shape.kv_bytes_per_token * CHUNK_SIZE
        model = Roofline(shape, device, num_bytes).cost_model(CHUNK_SIZE)
        rates = [
            LOAD_OVERHEAD * num_bytes / (model.chunk_cost(position // CHUNK_SIZE) - model.swap_in_cost) * 8e-9
            for position in positions
        ]
        name = device_name if num_devices == 1 else f"{num_devices} x {device_name}"
        rows.append(
            [model_name, name, f"{shape.kv_bytes_per_token / 1e3:.0f}", *(f"{rate:.0f} Gb/s" for rate in rates)]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
