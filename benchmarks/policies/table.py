"""Policies on four workloads and four sizes of cache: what is computed again, against bounds, with intervals over seeds.

    python benchmarks/policies/table.py                        # goes on where it was cut off
    python benchmarks/policies/table.py --policies mypackage.module:MyPolicy --workloads chats
    python benchmarks/policies/table.py --report-only

Writes each run to benchmarks/results/policies/runs.csv, and table.json, table.md and table.svg from all of them.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from report import write_report
from runs import run
from tqdm import tqdm
from workloads import MOONCAKE, Setting, settings

OUT = Path(__file__).parents[1] / "results" / "policies"
BASELINE = "retention_value"
POLICIES = (
    BASELINE,
    "lru",
    "return_value:ReturnValue",
    "clairvoyant",
    "baselines:ToolTtl",
    "tail_optimised_lru",
    "baselines:OnceUsedFirst",
    "trailing_lru",
    "belady",
)
NUM_SIZES = 4
# Of the row with three tiers: the workload and size, and tokens on disk.
THREE_TIERS = ("agents", 1, 400_000)
KEY = ("workload", "size", "disk_tokens", "policy", "seed")


def wanted(policies: list[str], workloads: list[str], seeds: int) -> Iterator[tuple[str, int, int, str, int]]:
    """All runs, seed by seed, so that what is there at any time can be compared."""
    for seed in range(seeds):
        for policy in policies:
            for name in workloads:
                for size in range(NUM_SIZES):
                    yield name, size, 0, policy, seed
        if THREE_TIERS[0] in workloads:
            for policy in policies:
                yield THREE_TIERS[0], THREE_TIERS[1], THREE_TIERS[2], policy, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="names, or MODULE:NAME of your own")
    parser.add_argument("--workloads", nargs="+", default=["chats", "heavy", "mooncake", "agents"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--mooncake", type=Path, default=MOONCAKE, help="FAST25's conversation trace, or a part of it")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--nice", type=int, default=15, help="niceness of the runs")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "runs.csv"
    if not args.report_only:
        done = {tuple(row[name] for name in KEY) for row in read_runs(path)}
        keys = [key for key in wanted(args.policies, args.workloads, args.seeds) if tuple(map(str, key)) not in done]
        with ProcessPoolExecutor(args.jobs, initializer=_start, initargs=(args.mooncake, args.nice)) as pool:
            for key, figures in zip(keys, tqdm(pool.map(_run, keys), total=len(keys), desc="runs"), strict=True):
                append_run(path, dict(zip(KEY, key, strict=True)) | figures)
    write_report(read_runs(path), args.out, BASELINE)


def _start(mooncake: Path, niceness: int) -> None:
    """In each process: beside anything else that has to be done."""
    os.nice(niceness)
    _settings.update({setting.name: setting for setting in settings(mooncake)})


_settings: dict[str, Setting] = {}


def _run(key: tuple[str, int, int, str, int]) -> dict[str, float]:
    name, size, disk_tokens, policy, seed = key
    return run(_settings[name], size, policy, seed, disk_tokens=disk_tokens)


def read_runs(path: Path) -> list[dict[str, str]]:
    """The rows of all runs so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_run(path: Path, row: dict[str, object]) -> None:
    """One more row, at once, so that a cut loses nothing."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
