"""Everything that is measured on a GPU, within a time budget.

One process for each group of sections, in order of importance.

    python benchmarks/gpu/run.py --budget 470 --pack results.tgz     all of it, to benchmarks/results/gpu/*.json
    python benchmarks/gpu/run.py --groups llama tiles
    python benchmarks/gpu/run.py --smoke                             does the code run? on a CPU, tiny, Triton interpreted

A group that fails, breaks the device or runs into its limit loses none of the others, nor what it has measured by then. A
group whose estimate does not fit into what is left of the budget is skipped. Standard library only: this process leaves the
device alone. See README.md for what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from summary import summarize

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results/gpu"
# Seconds that a process has between being asked to end and being killed.
GRACE_S = 5.0
# Of the files in the folder of the results.
PACKED = (".json", ".log", ".png")
# Lines of a group's log that are printed when it ends; the whole log is beside its results.
TAIL_LINES = 4


@dataclass(frozen=True, slots=True)
class Group:
    """estimate_s: on an H100, with the start of the process. limit_s: after which it is ended."""

    name: str
    estimate_s: float
    limit_s: float


# The most telling first.
GROUPS = (
    Group("llama", 60, 140),
    Group("attention", 40, 60),
    Group("conversations", 120, 190),
    Group("accuracy", 25, 40),
    Group("tiles", 40, 60),
    Group("opt", 70, 110),
    Group("steps", 75, 110),
    Group("figure_12", 20, 30),
    Group("peer", 150, 190),
    Group("plots", 5, 30),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a group of sections ended.

    outcome: "complete", "failed" (a section, or a part of one), "device failed", "ended at its limit", "skipped".
    """

    name: str
    outcome: str
    seconds: float
    limit_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [group.name for group in GROUPS]
    parser.add_argument("--groups", nargs="+", choices=names, default=names, help="only these, in this order")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all of it (default: an hour)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results and logs")
    parser.add_argument("--pack", type=Path, help="put them into this .tgz, too, after each group")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the group that runs
    arguments.out.mkdir(parents=True, exist_ok=True)
    if {"llama", "opt"} & set(arguments.groups):
        (arguments.out / "roofs.json").unlink(missing_ok=True)  # of another machine, perhaps
    start = time.monotonic()
    outcomes: list[Outcome] = []
    groups = {group.name: group for group in GROUPS}
    for group in (groups[name] for name in arguments.groups):
        try:
            left_s = arguments.budget - (time.monotonic() - start)
            outcomes.append(run_group(group, left_s, arguments.out, is_smoke=arguments.smoke))
            report = {"budget_s": arguments.budget, "groups": [asdict(outcome) for outcome in outcomes]}
            (arguments.out / "groups.json").write_text(json.dumps(report, indent=2) + "\n")
        finally:  # when this process is asked to end, too
            if arguments.pack:
                pack(arguments.out, arguments.pack)
    print("\n".join(summarize(arguments.out)))
    incomplete = [f"{outcome.name} {outcome.outcome}" for outcome in outcomes if outcome.outcome != "complete"]
    print(f"{time.monotonic() - start:.0f} s; not complete: {', '.join(incomplete) or 'nothing'}")
    sys.exit(bool(incomplete))


def run_group(group: Group, left_s: float, out: Path, *, is_smoke: bool) -> Outcome:
    """Run one group in a process of its own, if there is time for it. Its output goes to OUT/NAME.log.

    left_s: of the budget, which is another limit.
    """
    if group.estimate_s > left_s:
        print(
            f"-- {group.name}: skipped, it takes about {group.estimate_s:.0f} s and {left_s:.0f} are left", flush=True
        )
        return Outcome(group.name, "skipped", 0.0, 0.0)
    # Of an earlier run: it would be taken for what this one measured.
    for path in out.glob(f"{group.name}*.json"):
        path.unlink()
    limit_s = min(group.limit_s, left_s)
    command = [sys.executable, str(HERE / "sections.py"), group.name, "--out", str(out), *(["--smoke"] * is_smoke)]
    log = out / f"{group.name}.log"
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # its compilers' processes end with it
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    outcome = {None: "ended at its limit", 0: "complete", 1: "failed", 3: "device failed"}.get(
        code, f"exit code {code}"
    )
    seconds = time.monotonic() - begin
    print(f"-- {group.name}: {outcome} after {seconds:.0f} s", flush=True)
    if code != 0:
        print("\n".join(f"   {line[:200]}" for line in last_lines(log)), flush=True)
    return Outcome(group.name, outcome, seconds, limit_s)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, if there are any left."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_lines(path: Path) -> list[str]:
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip()][-TAIL_LINES:]


def pack(folder: Path, archive: Path) -> None:
    """All results and logs of this benchmark; the archive is replaced whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            if path.suffix in PACKED:
                tar.add(path, path.name)
    part.replace(archive)


if __name__ == "__main__":
    main()
