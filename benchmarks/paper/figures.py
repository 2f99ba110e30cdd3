"""The paper's figures, simulated on the scheduler and cache that serve, beside the points read off the paper.

    python benchmarks/paper/figures.py 10a 10b 10c 10d 11a 11b 12 13 14 15
    python benchmarks/paper/figures.py --compare-only       # of what was simulated; writes no new runs
    python benchmarks/paper/figures.py --table              # the tables of docs/paper_figures.md

Writes results/paper/figure_10a.{csv,svg,json} and so on. A run that is in the CSV is not simulated again. The constants are
in constants.py, what the paper shows in published.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as `python benchmarks/paper/figures.py`
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.machine import RESULTS, write_result
from benchmarks.paper import constants, tables
from benchmarks.paper.published import (
    KERNEL_CONTEXTS,
    KERNEL_MS,
    PANELS,
    SYSTEMS,
    Panel,
    Point,
    latency_at,
    rate_at,
    read_digitised,
)
from benchmarks.paper.runs import Runs, curve
from benchmarks.paper.systems import INTERCONNECT, KV_SHARE, LENGTHS, TURNS, Run
from engine.simulator.report import plot_lines

FOLDER = RESULTS / "paper"
FIGURES = (*PANELS, "12", "13", "14", "15")
UNCHANGED, ONE_CONSTANT, BOTH, AFTERWARDS = "unchanged", "one constant", "both constants", "afterwards"


def variants(panel: Panel) -> dict[str, tuple[str, ...]]:
    """What is changed in each simulation of a panel; that of 10a is the one that was fitted."""
    turns = (TURNS,) if panel.dataset == "ultrachat" else ()
    of_model = constants.ONE_CONSTANT[panel.model]
    named = {UNCHANGED: (), ONE_CONSTANT: (*of_model, *turns)}
    if panel.num_gpus > 1 and panel.model in constants.KV_SHARE:
        named[BOTH] = (KV_SHARE, INTERCONNECT)
    if panel.dataset == "ultrachat":
        named[AFTERWARDS] = (*of_model, TURNS, LENGTHS)
    return {name: changed for name, changed in named.items() if changed or name == UNCHANGED}


def chunk_size(panel: Panel) -> int:
    return constants.CHUNK_SIZE if panel.model == "opt-13b" else constants.COARSE_CHUNK_SIZE


def figure_of_panel(name: str, runs: Runs) -> dict[str, Any]:
    """Figures 10 and 11: curves of all systems, and their rates at the panel's latency."""
    panel, digitised = PANELS[name], read_digitised(name)
    named = variants(panel)
    best = BOTH if BOTH in named else ONE_CONSTANT if ONE_CONSTANT in named else UNCHANGED
    rates: dict[str, dict[str, float | None]] = {}
    lines: dict[str, Sequence[Point]] = {}
    for variant, changed in named.items():
        rates[variant] = {}
        for system in SYSTEMS:
            shares = constants.FRACTIONS.get(name, ()) if variant == best else ()
            guess = panel.rate(system)
            run = Run(panel=panel, system=system, rate=guess, changed=changed, chunk_size=chunk_size(panel))
            offered = [float(f"{share * guess:.4g}") for share in shares]
            points, rates[variant][system] = curve(runs, run, offered, panel.level, guess)
            if variant == best:
                lines[f"{system}, simulated"] = points
    result: dict[str, Any] = {"level": panel.level, "paper": dict(zip(SYSTEMS, panel.rates, strict=True)), **rates}
    if digitised:
        result["digitised"] = _compare_curves(digitised, {system: lines[f"{system}, simulated"] for system in SYSTEMS})
    paper = digitised or {system: [(panel.rate(system), panel.level)] for system in SYSTEMS}
    lines |= {f"{system}, paper": paper[system] for system in SYSTEMS}
    _plot(name, f"{panel.model}, {panel.dataset}, {best}", lines, 3 * panel.level)
    return result


def _compare_curves(paper: Mapping[str, list[Point]], simulated: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Rates at several latencies, and latencies below the bend at the paper's rates."""
    return {
        system: {
            "rate_at": {
                str(level): {"paper": rate_at(paper[system], level), "simulated": rate_at(curve_points, level)}
                for level in constants.LEVELS
            },
            "latency_below_the_bend": [
                {"rate": rate, "paper": latency, "simulated": latency_at(curve_points, rate)}
                for rate, latency in paper[system]
                if latency <= constants.BEND_S
            ],
        }
        for system, curve_points in simulated.items()
    }


def figure_12() -> dict[str, Any]:
    """Attention over KV that lies in pieces, by what each way reads and writes: no device was at hand to time it.

    In passes over the KV of the context, of 8 query tokens a request: one of a kernel that reads pieces; copy-out reads,
    writes and reads again; and as many as there are query tokens if each is a decode of its own.
    """
    passes = {"contiguous": 1, "copy-out": 3, "multi-round": 8, "pensieve": 1}
    return {
        "contexts": KERNEL_CONTEXTS,
        "passes_over_kv": passes,
        "paper_over_contiguous": {
            name: [ms / best for ms, best in zip(times, KERNEL_MS["contiguous"], strict=True)]
            for name, times in KERNEL_MS.items()
        },
        "paper_growth_from_first_to_last": {name: times[-1] / times[0] for name, times in KERNEL_MS.items()},
        "simulated_growth": KERNEL_CONTEXTS[-1] / KERNEL_CONTEXTS[0],
    }


def figure_13(runs: Runs) -> dict[str, Any]:
    """Unified against separate batches: Llama-2-13B, at 0.12 s/token."""
    panel = replace(PANELS["10b"], level=0.12)
    found: dict[str, float | None] = {}
    lines: dict[str, Sequence[Point]] = {}
    for system in ("pensieve", "pensieve-separate"):
        run = Run(
            panel=panel, system=system, rate=0, changed=variants(panel)[ONE_CONSTANT], chunk_size=chunk_size(panel)
        )
        guess = panel.rate("pensieve") * 0.95
        lines[system], found[system] = curve(runs, run, [float(f"{guess * 0.6:.4g}")], panel.level, guess)
    _plot("13", "unified and separate batches", lines, 3 * panel.level)
    return {"level": panel.level, "rate": found}


def figure_14(runs: Runs) -> dict[str, Any]:
    """Retention value against LRU: OPT-13B; latency, hits in the CPU tier, and tokens recomputed, by load.

    Of a context, `lru` evicts the first chunks first, as retention value does, and `trailing_lru` the last ones.
    """
    cells = []
    for share in constants.EVICTION_HOST_SHARES:
        for rate in constants.EVICTION_RATES:
            for other in ("pensieve-lru", "pensieve-trailing-lru"):
                by_seed = []
                for seed in constants.EVICTION_SEEDS:
                    run = Run(panel=PANELS["10a"], system="pensieve", rate=rate, host_share=share, seed=seed)
                    by_seed.append((runs.row(run), runs.row(replace(run, system=other))))
                cell = {"host_share": share, "offered_per_s": rate, "over": other}
                cells.append({**cell, **tables.compare_policies(by_seed)})
    return {"cells": cells}


def figure_15(runs: Runs) -> dict[str, Any]:
    """Requests a second of Pensieve at 0.12 s/token by the mean think time: OPT-13B, ShareGPT."""
    panel = PANELS["10a"]
    found: dict[str, float | None] = {}
    guess = panel.rate("pensieve")
    for think_s in constants.THINK_TIMES_S:
        run = Run(
            panel=panel,
            system="pensieve",
            rate=guess,
            chunk_size=constants.FIGURE_15_CHUNK_SIZE,
            think_s=think_s,
            duration_s=20 * think_s,
            warm_up_s=10 * think_s,
        )
        found[f"{think_s:g}"] = curve(runs, run, (), panel.level, guess)[1]
        guess = found[f"{think_s:g}"] or guess
    points = [(float(think_s), rate) for think_s, rate in found.items() if rate is not None]
    plot = plot_lines("Figure 15", "mean think time (s)", "requests a second at 0.12 s/token", {"pensieve": points})
    (FOLDER / "figure_15.svg").write_text(plot + "\n")
    return {"level": panel.level, "rate_by_think_s": found}


def _plot(name: str, title: str, lines: Mapping[str, Sequence[Point]], y_max: float) -> None:
    pairs = {f"{system}, paper": f"{system}, simulated" for system in SYSTEMS if f"{system}, paper" in lines}
    plot = plot_lines(
        f"Figure {name}: {title}",
        "requests a second, achieved",
        "s/token, 90th percentile",
        lines,
        y_max=y_max,
        dashed=pairs,
    )
    (FOLDER / f"figure_{name}.svg").write_text(plot + "\n")


def make(name: str, is_complete: bool = False) -> dict[str, Any]:
    """One figure: its runs, its plot, and its JSON. is_complete: of the runs that there are."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = Runs(FOLDER / f"figure_{name}.csv", is_complete)
    others = {"13": figure_13, "14": figure_14, "15": figure_15}
    if name in PANELS:
        result = figure_of_panel(name, runs)
    else:
        result = figure_12() if name == "12" else others[name](runs)
    write_result(f"figure_{name}", result, FOLDER)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], help="default: all")
    parser.add_argument("--compare-only", action="store_true", help="compare the runs that there are")
    parser.add_argument("--table", action="store_true", help="print the tables of the figures that there are")
    options = parser.parse_args()
    if not options.table:
        for name in options.figures or FIGURES:
            make(name, options.compare_only)
            print(f"figure {name}: {FOLDER / f'figure_{name}.json'}", flush=True)
    results = {
        name: json.loads((FOLDER / f"figure_{name}.json").read_text())
        for name in FIGURES
        if (FOLDER / f"figure_{name}.json").exists()
    }
    print(tables.format_all(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
