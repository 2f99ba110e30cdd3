"""The hints of benchmarks/retention.py in the simulator: three workloads, five seeds, each mode of `kv_hints`.

Mooncake's conversations, tau-bench's sessions with made-up pauses, and synthetic agents with intervals among chats.

    python benchmarks/retention_simulated.py [--mooncake FILE]

Clients that give hints know of the next turn only its kind, and what such a pause usually is; see engine/simulator/hints.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import write_result

sys.path.append(str(Path(__file__).parent / "policies"))
from workloads import MOONCAKE, Setting, _agents, settings

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.simulator.cluster import Cluster
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.session import Session

MODES = ("off", "client", "learned")
FIGURES = ("first_token_p50_s", "first_token_p90_s", "first_token_p99_s", "recomputed_share")


def tau_bench(seed: int) -> list[Session]:
    """Agents only, with people between their tools."""
    rng = random.Random(f"tau-bench.{seed}")
    agents = _agents(seed, rng)
    numbered = (replace(next(agents), session_id=f"agent-{number}") for number in range(120))
    return list(arrange(numbered, Poisson(0.12), seed))


def run(setting: Setting, mode: str, seed: int) -> dict[str, float]:
    bytes_per_block = setting.model.kv_bytes_per_token * setting.chunk_size
    cost = Roofline(setting.model, setting.device, bytes_per_block)
    num_gpu_tokens, num_cpu_tokens = setting.sizes[0]
    cache = CacheConfig(
        chunk_size=setting.chunk_size,
        num_gpu_blocks=num_gpu_tokens // setting.chunk_size,
        num_cpu_blocks=num_cpu_tokens // setting.chunk_size,
        cost_model=cost.cost_model(setting.chunk_size),
        kv_hints=mode,
    )
    scheduling = SchedulingConfig(
        max_model_len=setting.window, max_num_seqs=256, max_num_batched_tokens=2048, max_num_queued_reqs=10_000
    )
    cluster = Cluster(
        make_core=lambda: EngineCore(cache, scheduling),
        cost=cost,
        router=LeastLoaded(),
        bytes_per_block=bytes_per_block,
        kv_hints=mode,
    )
    outcome = Simulator(cluster, setting.sessions(seed)).run(setting.duration_s)
    summary = outcome.summary(setting.warm_up_s)
    is_counted = outcome.turns.column("sent_s") >= setting.warm_up_s
    known = outcome.turns.column("num_known_tokens")[is_counted].sum()
    recomputed = sum(
        outcome.turns.column(name)[is_counted].sum() for name in ("num_dropped_tokens", "num_not_loaded_tokens")
    )
    return {
        "first_token_p50_s": summary.first_token_p50_s,
        "first_token_p90_s": summary.first_token_p90_s,
        "first_token_p99_s": summary.first_token_p99_s,
        "recomputed_share": float(recomputed / max(1, known)),
        "num_turns": summary.num_turns,
    }


def gains(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Of each mode against none: the mean over seeds of what each figure changes by, and the smallest and largest."""
    by_key = {(row["mode"], row["seed"]): row for row in rows if row["workload"] == name}
    seeds = [seed for mode, seed in by_key if mode == "off" and all((other, seed) in by_key for other in MODES)]
    changes: dict[str, Any] = {"num_seeds": len(seeds)}
    for mode in MODES[1:] if seeds else ():
        for figure in FIGURES:
            ratios = [by_key[mode, seed][figure] / max(by_key["off", seed][figure], 1e-9) - 1 for seed in seeds]
            changes[f"{mode} {figure}"] = [statistics.fmean(ratios), min(ratios), max(ratios)]
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mooncake", type=Path, default=MOONCAKE)
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--name", default="retention_simulated", help="name of the result file")
    arguments = parser.parse_args()
    known = {setting.name: setting for setting in settings(arguments.mooncake)}
    agents: Callable[..., Setting] = replace
    chosen = [
        agents(known["agents"], name="tau-bench", sessions=tau_bench, sizes=((20_000, 20_000),)),
        agents(known["agents"], sizes=((40_000, 60_000),)),
        agents(known["mooncake"], sizes=((200_000, 500_000),), duration_s=1200.0),
    ]
    if not arguments.mooncake.exists():
        print(f"{arguments.mooncake} is not there: Mooncake is left out")
        chosen.pop()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.num_seeds):
        for setting in chosen:
            for mode in MODES:
                figures = run(setting, mode, seed)
                rows.append({"workload": setting.name, "mode": mode, "seed": seed, **figures})
                print(rows[-1], flush=True)
            changes = {each.name: gains(rows, each.name) for each in chosen}
            write_result(arguments.name, {"num_seeds": arguments.num_seeds, "gains": changes, "rows": rows})


if __name__ == "__main__":
    main()
