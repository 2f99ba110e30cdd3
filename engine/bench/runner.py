"""All runs of a plan, one after the other."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.bench.apis import Content
from engine.bench.client import Endpoint
from engine.bench.driver import Load
from engine.bench.figures import Lag, Limits, figures_of
from engine.bench.plan import Cell, Level, order_of
from engine.bench.processes import SESSIONS_PER_PROCESS, Workers
from engine.bench.turns import TurnRecord
from engine.workloads.arrivals import ClosedLoop, arrange
from engine.workloads.session import Session


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is to be run.

    num_processes: of the client; None = by the number of sessions.
    max_lag_s: see Lag.why_refused. max_s: of one run.
    is_marked: each run has words of its own, so that no run finds what another one left in a cache.
    """

    endpoints: tuple[Endpoint, ...]
    levels: tuple[Level, ...]
    sessions: Sequence[Session]
    num_repeats: int = 1
    limits: Limits = field(default_factory=Limits)
    num_processes: int | None = None
    max_lag_s: float | None = None
    max_s: float = 600.0
    warm_up_s: float = 0.0
    seed: int = 0
    is_marked: bool = True
    token_ids: tuple[int, int] = (100, 1000)


@dataclass(frozen=True, slots=True)
class CellResult:
    """One run. records: all turns; the figures leave out those due before the warm-up ended.

    refusal: why its figures would say nothing of the server; then there are none.
    """

    cell: Cell
    records: tuple[TurnRecord, ...]
    measured: tuple[TurnRecord, ...]
    lag: Lag
    refusal: str
    figures: dict[str, float]
    is_interrupted: bool = False


def run_plan(
    plan: BenchPlan,
    begin: Callable[[Cell, int], None],
    advance: Callable[[Sequence[TurnRecord]], None],
) -> list[CellResult]:
    """Run all cells; Ctrl-C ends with what there is.

    begin: is told of each run and its number of turns. advance: of the turns that ended.
    """
    run_name = f"{os.getpid():x}{time.time_ns() // 1_000_000 & 0xFFFFFF:x}"
    results = []
    workers = Workers()
    try:
        for cell in order_of(len(plan.endpoints), len(plan.levels), plan.num_repeats):
            results.append(_run_cell(plan, cell, run_name, workers, begin, advance))
            if results[-1].is_interrupted:
                break
    finally:
        workers.close()
    return results


def _run_cell(
    plan: BenchPlan,
    cell: Cell,
    run_name: str,
    workers: Workers,
    begin: Callable[[Cell, int], None],
    advance: Callable[[Sequence[TurnRecord]], None],
) -> CellResult:
    arrivals = plan.levels[cell.level].arrivals
    sessions = list(arrange(plan.sessions, arrivals, plan.seed + cell.repeat))
    num_active = arrivals.num_active if isinstance(arrivals, ClosedLoop) else None
    load = Load(f"{run_name}.{cell.run_id}", _content(plan, cell, run_name), num_active, plan.max_s)
    num_processes = plan.num_processes or _num_processes(num_active or len(sessions))
    begin(cell, sum(len(session.turns) for session in sessions))
    run = workers.run(plan.endpoints[cell.endpoint], load, sessions, num_processes, advance)
    measured = tuple(record for record in run.records if record.due_s >= plan.warm_up_s)
    lag = Lag.of(run.records, run.lags)
    refusal = run.fault or lag.why_refused(run.records, plan.max_lag_s)
    figures = {} if refusal else figures_of(measured, plan.limits)
    return CellResult(cell, tuple(run.records), measured, lag, refusal, figures, run.is_interrupted)


def _content(plan: BenchPlan, cell: Cell, run_name: str) -> Content:
    """The same words for all endpoints of a repeat would be cached if two of them are one server: each run has its own."""
    first_id, vocab_size = plan.token_ids
    if not plan.is_marked:
        return Content(plan.seed, "", first_id, vocab_size)
    name = f"{run_name}.{cell.run_id}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest())
    return Content(seed, f"[{name}]", first_id, vocab_size)


def _num_processes(num_sessions: int) -> int:
    """As few as drive so many with ease, and no more than there are cores."""
    return max(1, min(-(-num_sessions // SESSIONS_PER_PROCESS), os.cpu_count() or 1))
