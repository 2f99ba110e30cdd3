"""All cells of an experiment as one plain object: what the JSON file holds, and what the plots and the page show."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.experiment import Case, Experiment
from deployments.experiments.cells import KINDS, Cell, cells_of
from deployments.experiments.page import make_page
from deployments.experiments.plots import draw_plots
from deployments.experiments.results import DONE, FAILED, Record, Results
from deployments.simulate import describe
from engine.bench.figures import intervals_of

Json = dict[str, Any]
JSON_FILE, CSV_FILE, PAGE_FILE = "report.json", "cells.csv", "report.html"


def write_report(experiment: Experiment, results: Results, command: str) -> list[Path]:
    """From the cells that there are."""
    summary = summarise(experiment, results, command)
    folder = results.folder
    (folder / JSON_FILE).write_text(json.dumps(summary, indent=1) + "\n")
    with (folder / CSV_FILE).open("w", newline="") as file:
        rows = list(_csv_rows(summary))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    plots = draw_plots(summary)
    for name, (_, image) in plots.items():
        (folder / f"{name}.svg").write_text(image)
    (folder / PAGE_FILE).write_text(make_page(summary, dict(plots.values())))
    return [folder / PAGE_FILE, folder / JSON_FILE, folder / CSV_FILE]


def summarise(experiment: Experiment, results: Results, command: str) -> Json:
    """rows: one for each case and kind, with the means over its seeds. Only cells of this experiment as it is now."""
    cells: list[Json] = []
    rows: list[Json] = []
    counts: Json = {}
    for kind in KINDS:
        wanted = cells_of(experiment, kind)
        records = results.load(kind)
        found = [(cell, records[cell.key]) for cell in wanted if cell.key in records]
        counts[kind] = {
            "all": len(wanted),
            "done": sum(record["status"] == DONE for _, record in found),
            "failed": sum(record["status"] == FAILED for _, record in found),
        }
        cells += [record for _, record in found]
        rows += _rows(found)
    order = {case.name: number for number, case in enumerate(experiment.cases)}
    rows.sort(key=lambda row: (order[row["case"]], row["kind"]))
    return {
        "title": experiment.title,
        "notes": list(experiment.notes),
        "command": command,
        "counts": counts,
        "rows": rows,
        "cells": cells,
        "cluster": asdict(experiment.cluster),
        "cases": [(case.name or "all", describe(case)) for case in experiment.cases],
    }


def _rows(found: Sequence[tuple[Cell, Record]]) -> Iterable[Json]:
    by_case: dict[str, list[tuple[Cell, Record]]] = {}
    for cell, record in found:
        by_case.setdefault(cell.case.name, []).append((cell, record))
    for name, group in by_case.items():
        case = group[0][0].case
        told = [record for _, record in group if record["status"] == DONE and record["figures"].get("turns_per_s")]
        yield {
            "case": name,
            "kind": group[0][0].kind,
            "axes": dict(case.axes),
            "num_replicas": case.num_replicas,
            "num_seeds": len(told),
            "figures": {each: asdict(value) for each, value in intervals_of([x["figures"] for x in told]).items()},
            "by_time": told[0]["by_time"] if told and _has_changed(case, told[0]) else [],
            "events": told[0]["events"] if told else [],
        }


def _has_changed(case: Case, record: Record) -> bool:
    """Whether replicas came or went, as it was said or by autoscaling."""
    return bool(case.changes) or len({row["replicas"] for row in record["by_time"]}) > 1


def _csv_rows(summary: Mapping[str, Any]) -> Iterable[Json]:
    for record in summary["cells"]:
        yield {
            "case": record["name"],
            "kind": record["kind"],
            "seed": record["seed"],
            "status": record["status"],
            "num_replicas": record["num_replicas"],
            "arrivals": record["arrivals"],
            **record.get("figures", {}),
            "refusal": record.get("refusal", ""),
            "error": record.get("error", ""),
        }
