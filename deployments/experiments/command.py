"""`pensieve experiment run FILE.yaml`: measure an experiment on a Ray cluster, simulate it, and write its report.

Cells that a folder has already are not run again: after a break, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import PensieveError

if TYPE_CHECKING:
    from deployments.experiment import Experiment
    from deployments.experiments.cells import Cell, Kind
    from deployments.experiments.results import Results

# What is imported here is quick and knows no Ray, which reads its environment when it is imported.


def main(arguments: Sequence[str] | None = None) -> int:
    """0 = all is done, 1 = a cell failed or the file is wrong, 2 = usage, 3 = cells are left (--max-cells), 130 = Ctrl-C."""
    options = _parse(arguments)
    if options.local_nodes is not None:
        from deployments.experiments.local_nodes import prepare_environment

        prepare_environment()
    try:
        return _run(options)
    except PensieveError as error:
        print(f"pensieve experiment: {error.message}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    from deployments.experiment import read_experiment
    from deployments.experiments.page import text_table
    from deployments.experiments.report import summarise, write_report
    from deployments.experiments.results import Results
    from deployments.experiments.shortened import shortened

    overrides = {} if options.num_replicas is None else {"num_replicas": options.num_replicas}
    experiment = read_experiment(options.config, overrides)
    if options.time_share is not None:
        experiment = shortened(experiment, options.time_share)
    results = Results(options.out or Path(f"{Path(options.config).stem}-results"))
    command = shlex.join(["pensieve", "experiment", *(sys.argv[1:] if sys.argv[1:] else [])])
    status = 0
    try:
        run = _simulate if options.simulate else _measure
        status = run(experiment, results, options)
    except KeyboardInterrupt:
        status = 130
    finally:
        written = write_report(experiment, results, command)
    print(text_table(summarise(experiment, results, command)))
    print(f"written: {', '.join(map(str, written))}")
    return status


def _measure(experiment: Experiment, results: Results, options: argparse.Namespace) -> int:
    from deployments.experiments.deployment import check_free, check_measurable, handle_loop, serving_options
    from deployments.experiments.local_nodes import cluster_at, local_cluster
    from deployments.experiments.measure import measure_cell

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    check_measurable(experiment)
    cells, num_left = _pending(experiment, "measured", results, options.max_cells)
    if not cells:
        return 3 if num_left else 0
    serving = serving_options(experiment)
    if options.local_nodes is None:
        cluster = cluster_at(options.address, serving)
    else:
        cluster = local_cluster(options.local_nodes, options.cpus_per_node, serving)
    with cluster, handle_loop() as loop:
        check_free()

        def measure(cell: Cell, say: Callable[[str], None]) -> dict[str, Any]:
            return measure_cell(experiment, cell, results, loop, say)

        num_failed = _run_cells(cells, results, measure)
    return 1 if num_failed else 3 if num_left else 0


def _simulate(experiment: Experiment, results: Results, options: argparse.Namespace) -> int:
    from deployments.experiment import check_simulable
    from deployments.experiments.simulation import simulate_cell

    check_simulable(experiment)
    cells, num_left = _pending(experiment, "simulated", results, options.max_cells)
    if options.jobs > 1 and len(cells) > 1:
        num_failed = 0
        with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(cells))) as pool:
            for cell, record in zip(cells, pool.imap(_simulated, cells), strict=True):
                results.save(cell, record)
                num_failed += record.get("status") == "failed"
                print(f"{cell.name}: {record.get('error') or 'done'}", file=sys.stderr)
    else:
        num_failed = _run_cells(cells, results, lambda cell, say: simulate_cell(cell))
    return 1 if num_failed else 3 if num_left else 0


def _simulated(cell: Cell) -> dict[str, Any]:
    from deployments.experiments.simulation import simulate_cell

    return _told(lambda: simulate_cell(cell))


def _pending(experiment: Experiment, kind: Kind, results: Results, max_cells: int | None) -> tuple[list[Cell], int]:
    """The cells to run now, and how many are left after them."""
    from deployments.experiments.cells import cells_of, pending
    from deployments.experiments.results import DONE

    records = results.load(kind)
    done = {key for key, record in records.items() if record["status"] == DONE}
    cells = pending(cells_of(experiment, kind), done, records.keys() - done)
    now = cells if max_cells is None else cells[:max_cells]
    return now, len(cells) - len(now)


def _run_cells(
    cells: Sequence[Cell], results: Results, run: Callable[[Cell, Callable[[str], None]], dict[str, Any]]
) -> int:
    """One after the other, each kept as it ends; one that fails is noted, and the next one follows. Returns how many did."""
    num_failed = 0
    for number, cell in enumerate(cells, 1):
        with _saying(f"[{number}/{len(cells)}] {cell.name}") as say:
            record = _told(lambda cell=cell, say=say: run(cell, say))  # type: ignore[misc]
            results.save(cell, record)
            num_failed += record.get("status") == "failed"
            say(record.get("error") or record.get("refusal") or "done")
    return num_failed


def _told(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record, or one that says what went wrong: whatever it was, the other cells are independent of it."""
    try:
        return run()
    except PensieveError as error:
        message = error.message
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return {"status": "failed", "error": " ".join(message.split())[:2000], "figures": {}, "by_time": [], "events": []}


@contextlib.contextmanager
def _saying(name: str) -> Iterator[Callable[[str], None]]:
    start_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{name}: {text} ({time.monotonic() - start_s:.0f} s)", file=sys.stderr, flush=True)

    yield say


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pensieve experiment", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    description = (
        "Run each configuration of an experiment with each load on a Ray cluster, or in the simulator, and write one "
        "report of all. The same command goes on after a break."
    )
    run = commands.add_parser("run", help="Measure or simulate an experiment", description=description)
    run.add_argument("config", metavar="FILE.yaml", help="an experiment (docs/experiments.md)")
    run.add_argument("--simulate", action="store_true", help="in the simulator, without a cluster")
    run.add_argument(
        "--num-replicas", nargs="+", type=int, metavar="N", help="in place of the file's numbers of replicas"
    )
    run.add_argument("--out", type=Path, metavar="FOLDER", help="results and report (default: FILE-results)")
    run.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS, or the one on this machine)")
    run.add_argument(
        "--local-nodes", type=int, metavar="N", help="start so many Ray nodes on this machine, for this run alone"
    )
    run.add_argument("--cpus-per-node", type=float, default=2.0, metavar="N", help="of each of these (default: 2)")
    run.add_argument("--max-cells", type=int, metavar="N", help="run at most so many now, and leave the others")
    run.add_argument(
        "--time-share", type=float, metavar="X", help="of the times that the file says, such as 0.1 for a first look"
    )
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="simulations at once (default: 1)")
    options = parser.parse_args(arguments)
    if options.local_nodes is not None and options.local_nodes < 1:
        run.error("--local-nodes must be at least 1")
    return options
