"""From the runs to the table: means over seeds, and differences to the baseline with intervals, seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Two-sided 95 % quantiles of Student's distribution, by degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
BOUNDS = ("clairvoyant", "belady")
FIGURES = ("recompute_s", "recomputed_tokens", "hit_rate", "turns_per_s", "first_token_p90_s")
# What a policy has to save to be an option, and how much it may lose in any cell.
GAIN, LOSS = -0.10, 0.02

Cell = tuple[str, int, int]


def write_report(rows: Sequence[Mapping[str, str]], out: Path, baseline: str) -> None:
    """Writes table.json, table.md and table.svg. rows: of runs.csv."""
    by_cell: dict[Cell, dict[str, dict[str, Mapping[str, str]]]] = {}
    for row in rows:
        cell = row["workload"], int(row["size"]), int(row["disk_tokens"])
        by_cell.setdefault(cell, {}).setdefault(row["policy"], {})[row["seed"]] = row
    entries = [
        _entry(cell, policy, by_seed, policies, baseline)
        for cell, policies in sorted(by_cell.items())
        if baseline in policies
        for policy, by_seed in policies.items()
    ]
    (out / "table.json").write_text(json.dumps({"baseline": baseline, "rows": entries}, indent=1) + "\n")
    (out / "table.md").write_text(_markdown(entries, baseline))
    _plot(entries, out / "table.svg")


def _entry(
    cell: Cell,
    policy: str,
    by_seed: Mapping[str, Mapping[str, str]],
    policies: Mapping[str, Mapping[str, Mapping[str, str]]],
    baseline: str,
) -> dict[str, Any]:
    """One policy in one cell. Differences and regret are over the seeds that both have."""
    base = policies[baseline]
    common = sorted(by_seed.keys() & base.keys())
    entry: dict[str, Any] = {"workload": cell[0], "size": cell[1], "disk_tokens": cell[2], "policy": policy}
    entry["seeds"] = len(by_seed)
    for name in FIGURES:
        entry[name] = fmean(float(row[name]) for row in by_seed.values())
    for name in ("recompute_s", "recomputed_tokens"):
        entry[f"{name}_change"] = change(
            [float(by_seed[seed][name]) for seed in common], [float(base[seed][name]) for seed in common]
        )
    entry["regret_s"] = _regret(by_seed, [policies[bound] for bound in BOUNDS if bound in policies])
    return entry


def _regret(
    by_seed: Mapping[str, Mapping[str, str]], bounds: Sequence[Mapping[str, Mapping[str, str]]]
) -> float | None:
    """Seconds over the best bound, over the seeds that all of these have. None if there is no bound yet."""
    common = by_seed.keys() & set.intersection(*(set(bound) for bound in bounds)) if bounds else set()
    if not common:
        return None
    means = [fmean(float(rows[seed]["recompute_s"]) for seed in common) for rows in (by_seed, *bounds)]
    return means[0] - min(means[1:])


def change(values: Sequence[float], base: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean over seeds of the change relative to the baseline, and half of its 95 % interval. None if there is no pair."""
    changes = [value / other - 1 for value, other in zip(values, base, strict=True) if other]
    if not changes:
        return None
    if len(changes) < 2:
        return changes[0], None
    quantile = T_QUANTILES[len(changes) - 2] if len(changes) - 2 < len(T_QUANTILES) else 2.0
    return fmean(changes), quantile * stdev(changes) / math.sqrt(len(changes))


def _markdown(entries: Iterable[Mapping[str, Any]], baseline: str) -> str:
    lines = [
        f"Changes are to `{baseline}`, paired by seed, with 95 % intervals; seconds and tokens are those computed again.",
        "",
        "| workload, size | policy | seeds | seconds | change | tokens | regret | hit rate | turns/s | first token p90 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        place = f"{entry['workload']} {entry['size'] + 1}" + (", disk" if entry["disk_tokens"] else "")
        regret = "-" if entry["regret_s"] is None else f"{entry['regret_s']:.2f} s"
        lines.append(
            f"| {place} | {entry['policy'].split(':')[-1]} | {entry['seeds']} | {entry['recompute_s']:.2f} | "
            f"{_percent(entry['recompute_s_change'])} | {_percent(entry['recomputed_tokens_change'])} | {regret} | "
            f"{entry['hit_rate']:.3f} | {entry['turns_per_s']:.2f} | {entry['first_token_p90_s']:.3f} s |"
        )
    return "\n".join([*lines, "", *_verdicts(list(entries), baseline)]) + "\n"


def _percent(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:+.1%}" + ("" if value[1] is None else f" ± {value[1]:.1%}")


def _verdicts(entries: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """Of each policy that could be served: in how many cells it saves enough, and its worst cell."""
    lines = []
    names = dict.fromkeys(entry["policy"] for entry in entries)
    for policy in names:
        if policy == baseline or policy in BOUNDS:
            continue
        changes = [
            (entry["recompute_s_change"][0], f"{entry['workload']} {entry['size'] + 1}")
            for entry in entries
            if entry["policy"] == policy and entry["recompute_s_change"] is not None
        ]
        if not changes:
            continue
        num_gains, num_losses = (sum(x <= GAIN for x, _ in changes), sum(x > LOSS for x, _ in changes))
        (best, where_best), (worst, where_worst) = min(changes), max(changes)
        lines.append(
            f"- {policy.split(':')[-1]}: saves {-GAIN:.0%} or more of the seconds in {num_gains} of {len(changes)} cells, "
            f"is more than {LOSS:.0%} worse in {num_losses}; best {best:+.1%} ({where_best}), worst {worst:+.1%} "
            f"({where_worst})"
        )
    return lines


def _plot(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    workloads = list(dict.fromkeys(entry["workload"] for entry in entries))
    figure, axes = plt.subplots(1, max(1, len(workloads)), figsize=(3.6 * max(1, len(workloads)), 3.4), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=False):
        rows = [entry for entry in entries if entry["workload"] == workload and not entry["disk_tokens"]]
        for policy in dict.fromkeys(entry["policy"] for entry in rows):
            points = sorted((entry["size"] + 1, entry["recompute_s"]) for entry in rows if entry["policy"] == policy)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=policy.split(":")[-1])
        axis.set(title=workload, xlabel="size of the cache", ylabel="recomputed, in seconds", ylim=(0, None))
        axis.set_xticks(sorted({entry["size"] + 1 for entry in rows}))
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
