"""The results of all runs as one plain object: what the JSON file holds, and what plots and page show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from engine.bench.figures import (
    Interval,
    cached_share,
    errors_of,
    intervals_of,
    position_of,
    rows_by,
    turn_of,
)
from engine.bench.runner import BenchPlan, CellResult
from engine.bench.turns import TurnRecord
from engine.workloads.session import Statistics

Json = dict[str, Any]
# What a table shows: the figure, its title, its unit's factor and digits.
COLUMNS = (
    ("turns_per_s", "turns/s", 1.0, 2),
    ("output_tokens_per_s", "tokens/s", 1.0, 1),
    ("ttft_p50", "first token p50, ms", 1e3, 1),
    ("ttft_p90", "first token p90", 1e3, 1),
    ("ttft_p99", "first token p99", 1e3, 1),
    ("s_per_token_p50", "per token p50", 1e3, 2),
    ("s_per_token_p90", "per token p90", 1e3, 2),
    ("normalised_p90", "normalised p90", 1e3, 1),
    ("cached_share", "cached", 100.0, 1),
    ("goodput_share", "good turns", 100.0, 1),
    ("errors", "errors", 1.0, 1),
)
PERCENT = {"cached_share", "goodput_share"}


def summarise(
    plan: BenchPlan, results: Sequence[CellResult], notes: Mapping[str, Sequence[str]], about: Mapping[str, Any]
) -> Json:
    """notes: of each endpoint by name. about: what else is to be kept, such as the command."""
    return {
        **about,
        "is_interrupted": any(result.is_interrupted for result in results),
        "num_cells": len(plan.endpoints) * len(plan.levels) * plan.num_repeats,
        "workload": asdict(Statistics.of(plan.sessions)),
        "limits": asdict(plan.limits),
        "endpoints": [
            {
                "name": each.name,
                "url": each.url,
                "api": each.api,
                "model": each.model,
                "fields": dict(each.fields),
                "notes": list(notes.get(each.name, ())),
            }
            for each in plan.endpoints
        ],
        "rows": [row for level in range(len(plan.levels)) for row in _rows_of(plan, results, level)],
        "cells": [_cell(plan, result) for result in results],
    }


def _rows_of(plan: BenchPlan, results: Sequence[CellResult], level: int) -> list[Json]:
    """One for each endpoint: its repeats at a level together."""
    rows = []
    for number, endpoint in enumerate(plan.endpoints):
        own = [result for result in results if (result.cell.endpoint, result.cell.level) == (number, level)]
        if not own:
            continue
        told = [result for result in own if not result.refusal]
        turns = [record for result in told for record in result.measured]
        rows.append(
            {
                "endpoint": endpoint.name,
                "level": plan.levels[level].label,
                "value": plan.levels[level].value,
                "unit": plan.levels[level].unit,
                "num_repeats": len(told),
                "refusals": [result.refusal for result in own if result.refusal],
                "figures": {name: asdict(interval) for name, interval in _intervals(told).items()},
                "by_turn": rows_by(turns, turn_of),
                "by_position": rows_by(turns, position_of),
                "cached": cached_share([record for record in turns if record.is_good]),
                "errors": errors_of(record for result in own for record in result.records),
            }
        )
    return rows


def _intervals(told: Sequence[CellResult]) -> dict[str, Interval]:
    return intervals_of([result.figures for result in told])


def _cell(plan: BenchPlan, result: CellResult) -> Json:
    return {
        "endpoint": plan.endpoints[result.cell.endpoint].name,
        "level": plan.levels[result.cell.level].label,
        "repeat": result.cell.repeat,
        "is_interrupted": result.is_interrupted,
        "refusal": result.refusal,
        "lag": asdict(result.lag),
        "figures": result.figures,
    }


def turn_rows(plan: BenchPlan, results: Sequence[CellResult]) -> list[Json]:
    """A row for each turn of all runs, also of those whose figures were refused."""
    return [_turn_row(plan, result, record) for result in results for record in result.records]


def _turn_row(plan: BenchPlan, result: CellResult, record: TurnRecord) -> Json:
    first_s = record.first_s
    return {
        "endpoint": plan.endpoints[result.cell.endpoint].name,
        "level": plan.levels[result.cell.level].label,
        "repeat": result.cell.repeat,
        "session_id": record.session_id,
        "turn": record.turn + 1,
        "kind": record.kind,
        "due_s": round(record.due_s, 6),
        "lag_s": round(record.lag_s, 6),
        "ttft_s": None if first_s is None else round(record.ttft_s, 6),
        "latency_s": round(record.total_s, 6),
        "s_per_token": None if record.s_per_token is None else round(record.s_per_token, 6),
        "max_gap_s": round(record.max_gap_s, 6),
        "prompt_tokens": record.num_prompt_tokens,
        "output_tokens": record.num_output_tokens,
        "cached_tokens": record.num_cached_tokens,
        "cached_by": " ".join(f"{name}={count}" for name, count in record.cached_by),
        "finish_reason": record.finish_reason,
        "error": record.error,
        "replica": record.replica,
        "is_measured": not result.refusal and record.due_s >= plan.warm_up_s,
    }


def shown(name: str, interval: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    """A figure with its interval, such as `41.2 ±1.3`; empty if there is none."""
    if interval is None:
        return ""
    unit = " %" if name in PERCENT else ""
    text = f"{interval['mean'] * factor:.{digits if name != 'errors' or interval['mean'] % 1 else 0}f}{unit}"
    if interval["half_width"]:
        text += f" ±{interval['half_width'] * factor:.{digits}f}"
    return text


def table_of(summary: Json) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of all rows; columns that no row has are left out."""
    columns = [each for each in COLUMNS if any(each[0] in row["figures"] for row in summary["rows"])]
    titles = ["endpoint", "load", *(title for _, title, _, _ in columns)]
    cells = []
    for row in summary["rows"]:
        figures = [shown(name, row["figures"].get(name), factor, digits) for name, _, factor, digits in columns]
        cells.append([row["endpoint"], row["level"], *figures])
    return titles, cells
