"""How fast the simulator is, and how much memory it takes: turns a second of CPU time, bytes a chunk, peak of all processes.

    python benchmarks/simulator.py --chunk-size 32 --duration-s 900
    python benchmarks/simulator.py --num-replicas 8 --processes 2 --max-turns 1000000 --out benchmarks/results/simulator.json

Chats of ShareGPT's lengths at `--rate` turns a second and replica, OPT-13B on an A100, tiers of 40 and 220 GB. A result is
added to the file, with what was asked. CPU time is that of all processes, their start included. Bytes a chunk
are what all processes have grown by since the first simulated moment, over the chunks that are cached in the end: so the
contexts of sessions and the rows of turns are in them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.experiment import Case, read_cases
from deployments.simulate import run_outcome

# Turns of a session of this workload, on average: sessions a second are turns a second over that.
MEAN_TURNS = 5.56


class Watch:
    """CPU time and peak memory of this process and its children."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._cpu_before_s = _cpu_s()
        self._peaks: dict[int, int] = {}
        self.first_mb = 0.0

    def look(self) -> None:
        for process in multiprocessing.active_children():
            if process.pid is not None and (peak := _peak_bytes(process.pid)) is not None:
                self._peaks[process.pid] = peak
        self.first_mb = self.first_mb or self.figures()["peak_mb"]

    def figures(self) -> dict[str, float]:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "cpu_s": round(_cpu_s() - self._cpu_before_s, 2),
            "wall_s": round(time.monotonic() - self._begin_s, 1),
            "peak_mb": round((own + sum(self._peaks.values())) / 1e6),
        }


def _cpu_s() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_bytes(pid: int) -> int | None:
    """The most memory that a process has had; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def make_case(options: argparse.Namespace, duration_s: float, path: Path) -> Case:
    """As `pensieve simulate` reads it."""
    engine = {
        "model": "opt-13b",
        "gpu_memory_gib": 40e9 / 2**30,
        "kv_offloading_size": 220e9 / 2**30,
        "chunk_size": options.chunk_size,
        "max_num_batched_tokens": 2048,
        "kv_handover": "off",
    }
    simulation = {
        "model_shape": "opt-13b",
        "device": "a100-80gb",
        "arrivals": f"poisson:{options.rate / MEAN_TURNS:.6g}",
        "arrivals_per_replica": True,
        "num_replicas": options.num_replicas,
        "routing": "affinity",
        "duration_s": duration_s,
        "warm_up_s": 0,
        "processes": options.processes,
    }
    path.write_text(json.dumps({"engine": engine, "simulation": simulation}))  # which is YAML, too
    try:
        (case,), _ = read_cases(path)
    finally:
        path.unlink()
    return case


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """One simulation."""
    duration_s = options.duration_s
    if options.max_turns is not None:  # the first minutes have fewer turns, until as many sessions end as begin
        duration_s = options.max_turns / options.num_replicas / options.rate + 150
    case = make_case(options, duration_s, Path(f"simulator_{time.time_ns()}.yaml"))
    watch = Watch()

    def progress(now: float) -> None:
        watch.look()
        if int(now) % 60 == 0:
            say(f"{now:.0f} of {duration_s:.0f} s, {watch.figures()}")

    outcome = run_outcome(case, options.seed, progress)
    figures = watch.figures()
    num_chunks = sum(row.counters["num_chunks"] for row in outcome.replicas)
    summary = outcome.summary()
    grown = (figures["peak_mb"] - watch.first_mb) * 1e6
    return {
        "asked": {name: value for name, value in vars(options).items() if name != "out" and value is not None},
        "simulated_s": round(outcome.ended_s),
        "num_turns": len(outcome.turns),
        "turns_per_s_of_replica": round(len(outcome.turns) / outcome.ended_s / options.num_replicas, 3),
        "hit_rate": round(summary.hit_rate, 4),
        **figures,
        "turns_per_cpu_s": round(len(outcome.turns) / figures["cpu_s"]),
        "num_chunks": num_chunks,
        "bytes_per_chunk": round(grown / num_chunks),
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-size", type=int, default=32)
    parser.add_argument("--num-replicas", type=int, default=1)
    parser.add_argument("--processes", type=int, help="that share the simulation, in windows (default: none)")
    parser.add_argument("--rate", type=float, default=3.0, help="turns a second and replica (default: 3)")
    parser.add_argument("--duration-s", type=float, default=900.0)
    parser.add_argument("--max-turns", type=int, help="about so many, instead of a duration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(result))
    if options.out is not None:
        results = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps([*results, result], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
