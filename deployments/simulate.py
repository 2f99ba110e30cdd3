"""`pensieve simulate FILE.yaml`: what a cluster would do with a workload, by the scheduler, cache and router that serve.

The file is that of `pensieve-serve`, or an experiment (deployments/experiment.py). Needs no model, device or Ray cluster.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from deployments.experiment import ROUTERS, Case, read_cases
from deployments.simulated_cluster import make_cluster, make_network, make_sessions
from engine.errors import ConfigError, PensieveError
from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.group_processes import rare_collections
from engine.simulator.outcome import Outcome, Summary
from engine.simulator.report import Result, format_csv, format_html, format_table
from engine.simulator.simulator import Simulator
from engine.simulator.windows import WindowedSimulator
from engine.workloads.arrivals import USAGE as ARRIVALS


def main(arguments: Sequence[str] | None = None) -> int:
    """0 = done, 1 = the file or a workload is wrong, 2 = usage."""
    options = _parse(arguments)
    try:
        cases, seeds = read_cases(options.config, _overrides(options))
        if options.out is not None:
            _make_folder(options.out)
        results = run_cases(cases, seeds, options.jobs)
    except PensieveError as error:
        print(f"pensieve simulate: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(format_table(results))
    if options.out is not None:
        (options.out / "cases.csv").write_text(format_csv(results, seeds))
        notes = [(case.name or "all", describe(case)) for case in cases]
        title = f"Simulation of {Path(options.config).name}"
        (options.out / "report.html").write_text(format_html(title, notes, results))
        print(f"written to {options.out}: cases.csv, report.html")
    return 0


def run_cases(cases: Sequence[Case], seeds: Sequence[int], num_jobs: int = 1) -> list[Result]:
    """Simulate each case with each seed, `num_jobs` at a time. Raises ConfigError."""
    tasks = [(case, seed) for case in cases for seed in seeds]
    if num_jobs > 1 and any(case.processes is not None for case in cases):
        raise ConfigError("each simulation has processes of its own (`processes`); leave --jobs out", param="processes")
    total_s = round(sum(case.duration_s for case, _ in tasks))
    with tqdm(total=total_s, desc="simulating", unit="s", disable=not sys.stderr.isatty()) as progress:
        if num_jobs == 1 or len(tasks) == 1:
            summaries = [_run_shown(case, seed, progress) for case, seed in tasks]
        else:
            summaries = []
            with multiprocessing.get_context("spawn").Pool(min(num_jobs, len(tasks))) as pool:
                for (case, _), summary in zip(tasks, pool.imap(_run_task, tasks), strict=True):
                    summaries.append(summary)
                    progress.update(round(case.duration_s))
    rows = [summaries[start : start + len(seeds)] for start in range(0, len(summaries), len(seeds))]
    return [_result(case, row) for case, row in zip(cases, rows, strict=True)]


def run_case(case: Case, seed: int, on_progress: Callable[[float], None] = lambda now: None) -> Summary:
    """One simulation. Raises ConfigError, also if it is too short for any turn to end.

    on_progress: is told the simulated time, about once a simulated second.
    """
    outcome = run_outcome(case, seed, on_progress)
    try:
        return outcome.summary(case.warm_up_s)
    except ValueError as error:
        raise ConfigError(f"{case.name or 'the case'}: {error}", param="duration_s") from None


def run_outcome(case: Case, seed: int, on_progress: Callable[[float], None] = lambda now: None) -> Outcome:
    """As run_case, with all that comes of it."""
    if case.processes is not None and case.engine.kv_hints != "off":
        raise ConfigError(
            "hints are simulated in one process; leave `processes` out, or set kv_hints: off", param="processes"
        )
    sessions, num_active = make_sessions(case, seed)
    cluster = make_cluster(case, seed)
    simulator = (
        Simulator(cluster, sessions, num_active=num_active)
        if case.processes is None
        else WindowedSimulator(
            cluster, sessions, num_groups=case.processes, in_processes=case.processes > 1, num_active=num_active
        )
    )
    with rare_collections():
        return simulator.run(case.duration_s, on_progress)


def describe(case: Case) -> str:
    """What was simulated, in full."""
    engine = {name: getattr(case.engine, name) for name in ("mode", "chunk_size", "eviction_policy", "max_num_seqs")}
    lines = {
        "workload": f"{case.workload} {dict(case.workload_options) or ''}",
        "arrivals": case.arrivals + (" for each replica" if case.arrivals_per_replica else ""),
        "replicas": f"{case.num_replicas}, routing {case.routing}, {case.num_ingresses} ingresses",
        "hand-over": str(make_network(case) or "none"),
        "engine": ", ".join(f"{name} {value}" for name, value in engine.items()),
        "model": str(case.model_shape),
        "device": str(case.device),
        "time": f"{case.duration_s:g} s, of which {case.warm_up_s:g} s warm up",
        "changes": "; ".join(f"{each.what} {each.rank} at {each.time_s:g} s" for each in case.changes) or "none",
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items())


def _run_shown(case: Case, seed: int, progress: tqdm[NoReturn]) -> Summary:
    start_s = progress.n

    def show(now: float) -> None:
        progress.update(start_s + round(now) - progress.n)

    summary = run_case(case, seed, show)
    show(case.duration_s)
    return summary


def _run_task(task: tuple[Case, int]) -> Summary:
    return run_case(*task)


def _result(case: Case, summaries: Sequence[Summary]) -> Result:
    """A line of a plot is what differs in anything but the load."""
    group = ", ".join(part for part in case.name.split(", ") if not part.startswith("arrivals "))
    return Result(case.name, summaries, group, float(summaries[0].turns_per_s))


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says instead of the file."""
    given: dict[str, Any] = {
        name: value
        for name in (
            "workload",
            "arrivals",
            "device",
            "model_shape",
            "routing",
            "num_replicas",
            "duration_s",
            "warm_up_s",
            "processes",
        )
        if (value := getattr(options, name)) is not None
    }
    if options.seeds is not None:
        given["seeds"] = list(range(options.seeds))
    return given


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made: {error.strerror}; name another folder", param="out") from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pensieve simulate",
        description="Simulate a cluster with a workload, by the scheduler, cache and router that serve. Several values of an "
        "option make several cases.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="FILE.yaml", help="a Serve config file, or an experiment (docs/simulator.md)")
    parser.add_argument("--workload", help="such as sharegpt-like, or mooncake:FILE")
    parser.add_argument("--arrivals", nargs="+", help=ARRIVALS)
    parser.add_argument("--device", help=f"one of {', '.join(DEVICES)} (default: a100-80gb)")
    parser.add_argument("--model-shape", help=f"one of {', '.join(MODELS)} (default: the engine's model, if it is one)")
    parser.add_argument("--routing", nargs="+", choices=ROUTERS, help=f"(default: {ROUTERS[0]})")
    parser.add_argument("--num-replicas", nargs="+", type=int, metavar="N", help="(default: the file's)")
    parser.add_argument("--duration-s", type=float, metavar="S", help="simulated time (default: 600)")
    parser.add_argument("--warm-up-s", type=float, metavar="S", help="turns sent before do not count (default: 200)")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of runs of each case (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="simulations at a time (default: 1)")
    parser.add_argument("--processes", type=int, metavar="N", help="that share a simulation, in windows of 0.5 s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write cases.csv and report.html to this folder")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "processes"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
