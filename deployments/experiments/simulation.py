"""A cell in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.experiments.cells import Cell
from deployments.experiments.figures import Played, PlayedTurn, figures_of, rows_by_time, summed_counters
from deployments.simulate import run_outcome
from engine.simulator.outcome import Outcome


def simulate_cell(cell: Cell, on_progress: Callable[[float], None] = lambda now: None) -> dict[str, Any]:
    """What results.py keeps of it. Raises ConfigError and WorkloadError."""
    outcome = run_outcome(cell.case, cell.seed, on_progress)
    played = played_of(outcome, cell.case.warm_up_s)
    return {
        "figures": figures_of(played),
        "by_time": rows_by_time(played, cell.case.duration_s),
        "events": list(outcome.messages),
        "refusal": "",
    }


def played_of(outcome: Outcome, warm_up_s: float) -> Played:
    turns = [
        PlayedTurn(
            str(row.session),
            row.number,
            str(row.rank),
            row.sent_s,
            row.first_token_s,
            row.finished_s,
            row.num_prompt_tokens,
            row.num_known_tokens,
            row.num_cached_tokens,
            row.num_output_tokens,
        )
        for row in outcome.turns
    ]
    lives = [(str(row.rank), row.started_s, row.ended_s) for row in outcome.replicas]
    counters = summed_counters(row.counters for row in outcome.replicas)
    return Played(turns, warm_up_s, outcome.ended_s, lives, counters)
