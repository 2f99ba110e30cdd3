"""1 to 256 replicas, by router, with hand-over and without: the cases of experiments/scale, simulated one by one.

    python benchmarks/scaling.py run [--most-replicas 64] [--files llama_8b_grow ...]
    python benchmarks/scaling.py report

`run` takes up where it was cut off: each case and seed is a line of benchmarks/results/simulator/scaling/FILE.jsonl as soon
as it is done, and the smallest ones come first. `report` makes the tables and plots of docs/scaling.md from these lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.experiment import Case, read_cases
from deployments.simulate import run_case

FOLDER = Path(__file__).parent
EXPERIMENTS = FOLDER.parent / "experiments" / "scale"
RESULTS = FOLDER / "results" / "simulator" / "scaling"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--most-replicas", type=int, default=256, metavar="N", help="leave out larger cases")
    parser.add_argument("--most-seeds", type=int, default=3, metavar="N", help="leave out further seeds")
    parser.add_argument("--files", nargs="+", default=None, metavar="NAME", help="(default: all)")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.what == "report":
        from benchmarks.scaling_report import write_report

        write_report(RESULTS)
        return 0
    names = options.files or sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    for name, case, seed in _missing(names, options.most_replicas, options.most_seeds):
        line = _simulate(name, case, seed)
        with (RESULTS / f"{name}.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        print(f"{name}: {case.name}, seed {seed}: {line['cpu_s']:.0f} s of CPU", file=sys.stderr)
    return 0


def read_lines(name: str) -> list[dict[str, Any]]:
    """What is there of a file."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _missing(names: list[str], most_replicas: int, most_seeds: int) -> Iterator[tuple[str, Case, int]]:
    todo = []
    for name in names:
        cases, seeds = read_cases(EXPERIMENTS / f"{name}.yaml")
        done = {(line["case"], line["seed"]) for line in read_lines(name)}
        for seed in seeds[:most_seeds]:
            todo += [(name, case, seed) for case in cases if (case.name, seed) not in done]
    todo = [each for each in todo if each[1].num_replicas <= most_replicas]
    return iter(
        sorted(todo, key=lambda each: (each[1].num_replicas * each[1].duration_s, each[2], names.index(each[0])))
    )


def _simulate(name: str, case: Case, seed: int) -> dict[str, Any]:
    start_s = time.process_time()
    summary = run_case(case, seed)
    gc.collect()
    return {
        "file": name,
        "case": case.name,
        "seed": seed,
        "num_replicas": case.num_replicas,
        "routing": case.routing,
        "arrivals": case.arrivals,
        "kv_handover": case.engine.kv_handover,
        "cpu_s": round(time.process_time() - start_s, 1),
        **{key: float(f"{value:.6g}") for key, value in summary.as_dict().items()},
    }


if __name__ == "__main__":
    sys.exit(main())
