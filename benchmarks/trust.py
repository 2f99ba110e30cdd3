"""A live engine beside its simulation: the same sessions, and step times that were measured on the same machine.

    nice -n -10 taskset -c 1 python benchmarks/trust.py measure --model random   # ten minutes of one core
    python benchmarks/trust.py compare --model random                            # simulates; figures and plot

`measure` times steps as `pensieve profile --steps` does, before the live runs, in the middle and behind them, because a
machine that others use is not always as fast; a run is compared with the mean of the times before and behind it. Clients are
closed loops of sessions with think times, in the engine's process: AsyncEngine without HTTP and Ray. Both tiers together are
too small for what the sessions leave. Nothing is fitted to the live runs.

    --folder: of what was measured (live_MODEL.json, not kept).
    results: benchmarks/results/simulator/trust_MODEL.json and .png
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import RESULTS, describe_run, write_result
from trust_live import STEP_FIELDS, TURN_FIELDS, run_live
from trust_plot import plot

from deployments.experiment import Case
from deployments.simulated_cluster import make_cluster
from engine.config import EngineConfig
from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.outcome import Outcome
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import StepWork
from engine.simulator.step_table import StepTable
from engine.step_measurement import measure_steps
from engine.workloads.distributions import Exponential, Lognormal
from engine.workloads.session import Session
from engine.workloads.sources import WorkloadOptions, load_workload

WINDOW = 1024
WARM_UP_S = 20.0
# The simulation goes on for so long, so that turns that were sent before the end are answered, as live.
HEARD_OUT_S = 120.0
# How much slower or faster all steps are in the simulations that show how much a small error of the step times matters.
SLOWER = (0.97, 1.03)
COMPARED = ("turns_per_s", "first_token_p50_s", "first_token_p90_s")
COPIES = ("num_swap_ins", "num_evictions", "num_swap_outs")
COUNTERS = ("num_swap_ins", "num_swap_outs", "num_dropped_tokens", "num_suspensions")
PERCENTILES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)


@dataclass(frozen=True)
class Setting:
    """A model, its tiers in blocks, and the loads: so many sessions at once, in a run each."""

    model: str
    dtype: str
    num_gpu_blocks: int
    num_cpu_blocks: int
    num_active: Sequence[int]
    duration_s: float = 100.0

    def config(self, model: str) -> EngineConfig:
        return EngineConfig(
            model=model,
            dtype=self.dtype,
            num_threads=1,
            num_gpu_blocks=self.num_gpu_blocks,
            num_cpu_blocks=self.num_cpu_blocks,
            max_model_len=WINDOW,
            max_num_seqs=16,
        )


SETTINGS = {
    "random": Setting("random", "float32", 96, 160, (8, 16, 24, 48)),
    "smollm2": Setting("smollm2", "bfloat16", 96, 160, (8, 16, 24, 48)),
}


def make_sessions() -> list[Session]:
    """Chats with short answers, as a small model on one core can give them."""
    options = WorkloadOptions(
        num_sessions=600,
        max_context_len=WINDOW - 1,
        turns=Lognormal(8.0, 0.5),
        new_tokens=Lognormal(24.0, 0.7, 200),
        output_tokens=Lognormal(10.0, 0.5, 40),
        think_s=Exponential(4.0),
    )
    return load_workload("synthetic", options)


def make_warm_up() -> list[Session]:
    """Two turns each of some other sessions."""
    return [
        replace(
            each,
            session_id=f"warm-up-{number}",
            turns=tuple(replace(turn, pause_s=0.0) for turn in each.turns[:2]),
        )
        for number, each in enumerate(make_sessions()[-8:])
    ]


# -- live --------------------------------------------------------------------------------------------------------------


@contextmanager
def model_folder(name: str, dtype: str) -> Iterator[str]:
    """What the option `model` has to be."""
    if name != "random":
        yield name
        return
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from model import save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), dtype)
        yield folder


def measure(setting: Setting, path: Path) -> None:
    runs: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with model_folder(setting.model, setting.dtype) as model:
        config = setting.config(model)

        def add_table() -> None:
            load = os.getloadavg()[0]
            table = replace(measure_steps(config, repeats=2), measured_on=f"{setting.model}, {setting.dtype}")
            tables.append({"num_runs_before": len(runs), "load": load, "table": asdict(table)})

        for number, num_active in enumerate(setting.num_active):
            if number in (0, len(setting.num_active) // 2):
                add_table()
            load = os.getloadavg()[0]
            run = asyncio.run(run_live(config, make_sessions(), make_warm_up(), num_active, setting.duration_s))
            runs.append({"load": load, **run})
            print(f"{num_active} sessions: {figures(np.array(run['turns']).T, setting.duration_s)}", flush=True)
        add_table()
    measured = {"run": describe_run(), "setting": asdict(setting), "tables": tables, "runs": runs}
    path.write_text(json.dumps(measured) + "\n")


# -- simulated ---------------------------------------------------------------------------------------------------------


def table_of(tables: Sequence[Mapping[str, Any]], number: int) -> StepTable:
    """For a run, by its number: the mean of the steps that were measured last before it and first behind it."""
    before = [each["table"] for each in tables if each["num_runs_before"] <= number][-1]
    after = next(each["table"] for each in tables if each["num_runs_before"] > number)

    def mean(left: Any, right: Any) -> Any:
        if isinstance(left, dict):
            return {int(num): (seconds + right[num]) / 2 for num, seconds in left.items()}
        return (left + right) / 2 if isinstance(left, float) else left

    return StepTable(**{name: mean(value, after[name]) for name, value in before.items()})


def slower(table: StepTable, factor: float) -> StepTable:
    """All steps take so many times as long."""

    def scaled(value: Any) -> Any:
        if isinstance(value, dict):
            return {num: seconds * factor for num, seconds in value.items()}
        return value * factor if isinstance(value, float) else value

    return StepTable(**{name: scaled(value) for name, value in asdict(table).items()})


def simulate(setting: Setting, table: StepTable, num_active: int, until_s: float) -> Outcome:
    """What `pensieve simulate` does with `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.json"
        table.save(steps)
        # Shape and device play no part: steps and tiers are given.
        case = Case(
            engine=setting.config(setting.model),
            device=DEVICES["a100-80gb"],
            model_shape=MODELS["smollm2"],
            steps=str(steps),
        )
        cluster = make_cluster(case, 0)
    return Simulator(cluster, make_sessions(), num_active=num_active).run(until_s)


def simulated_figures(setting: Setting, table: StepTable, num_active: int) -> dict[str, Any]:
    outcome = simulate(setting, table, num_active, setting.duration_s + HEARD_OUT_S)
    return figures([outcome.turns.column(name) for name in TURN_FIELDS], setting.duration_s)


def figures(turns: Sequence[np.ndarray], until_s: float) -> dict[str, Any]:
    """Of the turns that were sent in the time that counts; throughput by those that ended in it."""
    sent_s, first_s, finished_s, num_prompt, num_cached, _ = turns
    is_counted = (sent_s >= WARM_UP_S) & (sent_s < until_s)
    has_ended = (finished_s >= WARM_UP_S) & (finished_s < until_s)
    first_token_s = (first_s - sent_s)[is_counted]
    return {
        "num_turns": int(is_counted.sum()),
        "turns_per_s": float(has_ended.sum() / (until_s - WARM_UP_S)),
        "first_token_p50_s": float(np.percentile(first_token_s, 50)),
        "first_token_p90_s": float(np.percentile(first_token_s, 90)),
        "cached_share": float(num_cached[is_counted].sum() / num_prompt[is_counted].sum()),
        "first_token_percentiles_s": {number: float(np.percentile(first_token_s, number)) for number in PERCENTILES},
    }


def explain_steps(table: StepTable, steps: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """What the table says of the live steps themselves, by kind: predicted over measured time."""
    rows = [dict(zip(STEP_FIELDS, row, strict=True)) for row in steps]
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        work = StepWork(*(int(row[name]) for name in StepWork._fields))
        kind = "decodes" if not work.num_prompt_tokens else "prompts"
        if any(row[name] for name in COPIES):
            kind += " and copies"
        kinds.setdefault(kind, []).append((table.step_time(work), row["took_s"]))
    return {
        kind: {
            "num_steps": len(pairs),
            "measured_s": sum(measured for _, measured in pairs),
            "predicted_over_measured": sum(predicted for predicted, _ in pairs)
            / sum(measured for _, measured in pairs),
        }
        for kind, pairs in sorted(kinds.items())
    }


def compare(path: Path) -> None:
    live = json.loads(path.read_text())
    setting = Setting(**live["setting"])
    rows = []
    for number, run in enumerate(live["runs"]):
        table, num_active = table_of(live["tables"], number), run["num_active"]
        measured = figures(np.array(run["turns"]).T, setting.duration_s)
        simulated = simulated_figures(setting, table, num_active)
        others = [simulated_figures(setting, slower(table, by), num_active) for by in SLOWER]
        counters = simulate(setting, table, num_active, setting.duration_s).replicas[0].counters
        row = {
            "num_active": num_active,
            "live": measured,
            "simulated": simulated,
            "error": {name: simulated[name] / measured[name] - 1 for name in COMPARED},
            "simulated_with_other_steps": [
                {"factor": by, **{name: other[name] for name in COMPARED}}
                for by, other in zip(SLOWER, others, strict=True)
            ],
            # Live, with what turns under way at the end still did.
            "live_counters": {name: run["counters"][name] for name in COUNTERS},
            "simulated_counters": {name: counters[name] for name in COUNTERS},
            "steps": explain_steps(table, run["steps"]),
            "live_steps_s": sum(step[1] for step in run["steps"]),
            "live_cpu_s": run["cpu_s"],
            "load_before": run["load"],
        }
        rows.append(row)
        print(describe(row))
    result = {"measured": live["run"], "setting": live["setting"], "tables": live["tables"], "runs": rows}
    write_result(f"trust_{setting.model}", result, RESULTS / "simulator")
    plot(f"{setting.model}, {setting.dtype}", rows, RESULTS / "simulator" / f"trust_{setting.model}.png")


def describe(row: Mapping[str, Any]) -> str:
    """A line: live, simulated, difference."""
    parts = [
        f"{name} {row['live'][name]:.3f} {row['simulated'][name]:.3f} {row['error'][name]:+.1%}" for name in COMPARED
    ]
    return f"{row['num_active']:3d} sessions: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "compare"))
    parser.add_argument("--model", choices=sorted(SETTINGS), default="random")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pensieve-trust")
    arguments = parser.parse_args()
    path = arguments.folder / f"live_{arguments.model}.json"
    if arguments.what == "measure":
        measure(SETTINGS[arguments.model], path)
    else:
        compare(path)


if __name__ == "__main__":
    main()
