"""The tables of docs/paper_figures.md, from the JSON of the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.paper import published
from benchmarks.paper.published import BASELINES, PANELS, SYSTEMS

Row = Mapping[str, float]
# What a ratio may be off to count as reproduced.
TOLERANCE = 0.10


def compare_policies(by_seed: Sequence[tuple[Row, Row]]) -> dict[str, float]:
    """Of pairs (retention value, LRU) of one load, a pair for each seed: means of what differs, and the spread of one."""

    def change(name: str) -> list[float]:
        return [mine[name] / other[name] - 1 for mine, other in by_seed]

    points = [100 * (cpu_hit_rate(mine) - cpu_hit_rate(other)) for mine, other in by_seed]
    return {
        "cpu_hit_rate": float(np.mean([cpu_hit_rate(mine) for mine, _ in by_seed])),
        "cpu_hit_points": float(np.mean(points)),
        "recomputed_tokens": float(np.mean(change("num_recomputed_tokens"))),
        "recompute_s": float(np.mean(change("recompute_s"))),
        "turns_per_s": float(np.mean(change("turns_per_s"))),
        "latency_p90": float(np.mean(change("s_per_token_p90"))),
        "latency_p90_spread": float(np.std(change("s_per_token_p90"), ddof=1)) if len(by_seed) > 1 else 0.0,
    }


def cpu_hit_rate(row: Row) -> float:
    """Of the tokens that were computed before and are not on the GPU, the part that is found in the CPU tier."""
    loaded = row["hit_rate"] * row["loaded_share"]
    missing = 1 - row["hit_rate"]
    return loaded / (loaded + missing) if loaded + missing else 1.0


def ratios(rates: Mapping[str, float | None]) -> dict[str, float | None]:
    """Pensieve over each baseline."""
    mine = rates["pensieve"]
    return {
        baseline: None if mine is None or not rates[baseline] else mine / rates[baseline]  # type: ignore[operator]
        for baseline in BASELINES
    }


def count_ratios(results: Mapping[str, Mapping[str, Any]], variant: str) -> dict[str, int]:
    """Of the panels' ratios, and of the panels with both, those within the tolerance; of the last variant if it has none."""
    counts = {"ratios": 0, "ratios within": 0, "panels": 0, "panels within": 0}
    for name, panel in results.items():
        if name not in PANELS:
            continue
        paper, mine = ratios(panel["paper"]), ratios(panel.get(variant) or panel["unchanged"])
        errors = [_error(mine[baseline], paper[baseline]) for baseline in BASELINES]
        within = [error is not None and abs(error) <= TOLERANCE for error in errors]
        counts["ratios"] += len(within)
        counts["ratios within"] += sum(within)
        counts["panels"] += 1
        counts["panels within"] += all(within)
    return counts


def format_all(results: Mapping[str, Mapping[str, Any]]) -> str:
    panels = {name: result for name, result in results.items() if name in PANELS}
    parts = [_rates(panels), _ratios(panels), _digitised(panels)]
    if "12" in results:
        parts.append(_kernel(results["12"]))
    if "13" in results:
        rates = results["13"]["rate"]
        gain = _error(rates["pensieve"], rates["pensieve-separate"])
        parts.append(f"unified over separate: {_percent(gain)} (paper {published.UNIFIED_GAIN:+.0%}), {rates}")
    if "14" in results:
        parts.append(_policies(results["14"]["cells"]))
    if "15" in results:
        found = results["15"]["rate_by_think_s"]
        parts.append(_table(["mean think time (s)", *found], [["requests a second", *map(_rate, found.values())]]))
    return "\n\n".join(part for part in parts if part)


def _rates(panels: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, panel in panels.items():
        for variant in [each for each in _VARIANTS if each in panel]:
            cells = [_compare(panel[variant][system], paper) for system, paper in panel["paper"].items()]
            rows.append([f"{name} at {panel['level']:.2f}", variant, *cells])
    return _table(["panel, s/token", "constants", *SYSTEMS], rows)


def _ratios(panels: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, panel in panels.items():
        paper = ratios(panel["paper"])
        for variant in [each for each in _VARIANTS if each in panel]:
            mine = ratios(panel[variant])
            rows.append([name, variant, *(_compare(mine[each], paper[each]) for each in BASELINES)])
    counts = "; ".join(f"{variant}: {count_ratios(panels, variant)}" for variant in _VARIANTS)
    return _table(["panel", "constants", *(f"Pensieve over {each}" for each in BASELINES)], rows) + f"\n\n{counts}"


def _digitised(panels: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, panel in panels.items():
        if "digitised" not in panel:
            continue
        rows = [
            [system, *(_compare(each["simulated"], each["paper"]) for each in compared["rate_at"].values())]
            for system, compared in panel["digitised"].items()
        ]
        levels = next(iter(panel["digitised"].values()))["rate_at"]
        parts.append(f"{name}, rates by latency\n\n" + _table(["s/token", *levels], rows))
        for system, compared in panel["digitised"].items():
            errors = [
                f"{each['rate']:.2f}: {_percent(_error(each['simulated'], each['paper']))}"
                for each in compared["latency_below_the_bend"]
            ]
            parts.append(f"{name}, latency of {system}: {', '.join(errors)}")
    return "\n\n".join(parts)


def _kernel(result: Mapping[str, Any]) -> str:
    rows = [
        [name, str(passes), *(f"{each:.1f}" for each in result["paper_over_contiguous"][name])]
        for name, passes in result["passes_over_kv"].items()
    ]
    return _table(["kernel", "passes over KV", *(f"paper, {each} tokens" for each in result["contexts"])], rows)


def _policies(cells: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{cell['host_share']:.0%}",
            f"{cell['offered_per_s']:g}",
            cell["over"],
            f"{cell['cpu_hit_rate']:.3f}",
            f"{cell['cpu_hit_points']:+.1f}",
            *(f"{cell[name]:+.1%}" for name in ("recomputed_tokens", "recompute_s", "turns_per_s")),
            f"{cell['latency_p90']:+.1%} ± {cell['latency_p90_spread']:.1%}",
        ]
        for cell in cells
    ]
    heading = ["CPU tier", "offered", "over", "CPU hit rate", "points", "tokens", "seconds", "requests a second", "p90"]
    return _table(heading, rows)


_VARIANTS = ("unchanged", "one constant", "both constants", "afterwards")


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _error(value: float | None, paper: float | None) -> float | None:
    return None if value is None or not paper else value / paper - 1


def _compare(value: float | None, paper: float | None) -> str:
    return f"{_rate(paper)} / {_rate(value)} ({_percent(_error(value, paper))})"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.0%}"
