"""The paper's figures, simulated on the scheduler and cache that serve, beside the points read off the paper.

    python benchmarks/paper/figures.py --figure 10a

Writes results/paper/figure_10a.{csv,svg,json}. The constants are in constants.py.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # as `python benchmarks/paper/figures.py`
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.machine import RESULTS, write_result
from benchmarks.paper import constants
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.simulator.devices import MODELS, find_device
from engine.simulator.outcome import Summary
from engine.simulator.report import plot_lines
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Cluster, Simulator
from engine.simulator.step_cost import Roofline, StepWork
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.distributions import Exponential, Lognormal
from engine.workloads.synthetic import Synthetic, draw_sessions, sharegpt

DIGITISED = Path(__file__).parent / "digitised_10ab.csv"
FOLDER = RESULTS / "paper"
FIGURES = {"10a": ("opt-13b", sharegpt), "10b": ("llama-2-13b-gqa", sharegpt)}
# Latencies up to this one are below the bend of a curve.
BEND_S = 0.08
SYSTEMS = ("vllm-0.2.0", "pensieve-gpu-only", "pensieve")
Point = tuple[float, float]


class SeparateBatches(Roofline):
    """As vLLM 0.2.0: prompts and decodes are never in one batch, so a step with both is two, and reads all weights twice."""

    def step_time(self, work: StepWork) -> float:
        if not (work.num_decodes and work.num_prompt_tokens):
            return super().step_time(work)
        prompts = work._replace(num_decodes=0, decode_context_len=0)
        decodes = StepWork(work.num_decodes, work.decode_context_len)
        return super().step_time(prompts) + super().step_time(decodes)


def simulate(figure: str, system: str, rate: float, seed: int, duration_s: float, warm_up_s: float) -> Summary:
    """rate: of requests offered, in turns a second."""
    model, workload = FIGURES[figure]
    shape = MODELS[model]
    device = replace(find_device(constants.DEVICE), step_overhead_s=constants.OVERHEAD_S[system])
    bytes_per_block = shape.kv_bytes_per_token * constants.CHUNK_SIZE
    kind = SeparateBatches if system == "vllm-0.2.0" else Roofline
    cost = kind(shape, device, bytes_per_block)
    cache = CacheConfig(
        chunk_size=constants.CHUNK_SIZE,
        num_gpu_blocks=int(constants.GPU_BYTES / bytes_per_block),
        num_cpu_blocks=int(constants.HOST_BYTES / bytes_per_block) if system == "pensieve" else 0,
        keep=system != "vllm-0.2.0",
        swap_out_watermark=constants.WATERMARK,
        cost_model=cost.cost_model(constants.CHUNK_SIZE),
    )
    scheduling = SchedulingConfig(
        max_model_len=constants.WINDOW,
        max_num_seqs=constants.MAX_NUM_SEQS,
        max_num_batched_tokens=constants.MAX_NUM_BATCHED_TOKENS,
        max_num_queued_reqs=1_000_000,
        decode_reserve=constants.RESERVE,
    )
    spec = with_spreads(workload(10**7))
    rate_of_sessions = rate / mean_turns(spec)
    sessions = arrange(draw_sessions(spec, seed), Poisson(rate_of_sessions), seed)
    cluster = Cluster(make_core=lambda: EngineCore(cache, scheduling), cost=cost, router=LeastLoaded())
    return Simulator(cluster, sessions).run(duration_s).summary(warm_up_s)


def with_spreads(spec: Synthetic) -> Synthetic:
    """The means of a data set with the spreads of constants.py."""

    def spread(distribution: Lognormal, sigma: float) -> Lognormal:
        return Lognormal(distribution.mean, sigma)

    return replace(
        spec,
        turns=spread(spec.turns, constants.TURN_SIGMA),  # type: ignore[arg-type]
        new_tokens=spread(spec.new_tokens, constants.LENGTH_SIGMA),  # type: ignore[arg-type]
        output_tokens=spread(spec.output_tokens, constants.LENGTH_SIGMA),  # type: ignore[arg-type]
        think_s=Exponential(constants.THINK_S),
        max_context_len=constants.WINDOW,
    )


def mean_turns(spec: Synthetic, num_drawn: int = 4000) -> float:
    """Of sessions as they are drawn: rounding and the window change the mean a little."""
    sample = replace(spec, num_sessions=num_drawn)
    return float(np.mean([len(session.turns) for session in draw_sessions(sample, seed=12345)]))


def read_digitised(figure: str) -> dict[str, list[Point]]:
    """(requests a second, seconds a token) by system."""
    points: dict[str, list[Point]] = {}
    with DIGITISED.open() as stream:
        for row in csv.DictReader(stream):
            if row["figure"] == figure:
                point = (float(row["request_rate_per_s"]), float(row["latency_s_per_token"]))
                points.setdefault(row["system"], []).append(point)
    return points


def rate_at(points: Sequence[Point], level: float) -> float | None:
    """The rate at which a curve passes a latency, between two of its points; None if it does not."""
    for (rate, latency), (next_rate, next_latency) in pairwise(points):
        if latency <= level < next_latency:
            return rate + (next_rate - rate) * (level - latency) / (next_latency - latency)
    return None


def latency_at(points: Sequence[Point], rate: float) -> float | None:
    """The latency of a curve at a rate, between two of its points; None beyond them."""
    for (left, latency), (right, next_latency) in pairwise(points):
        if left <= rate <= right:
            return latency + (next_latency - latency) * (rate - left) / (right - left)
    return None


def simulate_all(figure: str, seeds: int, duration_s: float, warm_up_s: float) -> None:
    """Simulate all systems of a figure, and write a row for each system and rate."""
    rows: list[dict[str, float | str]] = []
    tasks = [
        (system, rate)
        for system in SYSTEMS
        for rate in constants.RATES[figure]
        if rate <= constants.SATURATED[figure][system]
    ]
    for system, rate in tqdm(tasks, desc=f"figure {figure}", disable=not sys.stderr.isatty()):
        summaries = [simulate(figure, system, rate, seed, duration_s, warm_up_s) for seed in range(seeds)]
        mean = {name: float(np.mean([each.as_dict()[name] for each in summaries])) for name in summaries[0].as_dict()}
        rows.append({"system": system, "offered_per_s": rate, **mean})
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"figure_{figure}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)


def read_simulated(figure: str) -> dict[str, list[Point]]:
    """(requests a second that were achieved, seconds a token) by system, of the last simulation."""
    curves: dict[str, list[Point]] = {}
    with (FOLDER / f"figure_{figure}.csv").open() as stream:
        for row in csv.DictReader(stream):
            point = (float(row["turns_per_s"]), float(row[constants.METRIC]))
            curves.setdefault(row["system"], []).append(point)
    return curves


def compare(figure: str, run: dict[str, float]) -> None:
    """The simulated curves beside the paper's: a plot, rates at given latencies, and latencies below the bend."""
    paper, curves = read_digitised(figure), read_simulated(figure)
    lines = {f"{system}, simulated": points for system, points in curves.items()}
    lines |= {f"{system}, paper": paper[system] for system in SYSTEMS}
    pairs = {f"{system}, paper": f"{system}, simulated" for system in SYSTEMS}
    plot = plot_lines(
        f"Figure {figure}", "requests a second, achieved", "s/token, 90th percentile", lines, y_max=0.35, dashed=pairs
    )
    (FOLDER / f"figure_{figure}.svg").write_text(plot + "\n")
    rates = {
        system: {
            str(level): {"paper": rate_at(paper[system], level), "simulated": rate_at(curves[system], level)}
            for level in constants.LEVELS[figure]
        }
        for system in SYSTEMS
    }
    below = {
        system: [
            {"rate": rate, "paper": latency, "simulated": latency_at(curves[system], rate)}
            for rate, latency in paper[system]
            if latency <= BEND_S
        ]
        for system in SYSTEMS
    }
    write_result(f"figure_{figure}", {**run, "rate_at": rates, "latency_below_the_bend": below}, FOLDER)
    print(f"{'rate at s/token':20}" + "".join(f"{level:>24}" for level in constants.LEVELS[figure]))
    for system, row in rates.items():
        print(f"{system:20}" + "".join(f"{_compare(each):>24}" for each in row.values()))
    for system, points in below.items():
        errors = [
            f"{each['rate']:.2f}: {each['simulated'] / each['paper'] - 1:+.0%}" for each in points if each["simulated"]
        ]
        print(f"latency of {system} at requests a second: {', '.join(errors)}")


def _compare(rates: dict[str, float | None]) -> str:
    paper, simulated = rates["paper"], rates["simulated"]
    if paper is None or simulated is None:
        return "-"
    return f"{paper:.2f} / {simulated:.2f} ({simulated / paper - 1:+.0%})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", choices=list(FIGURES), default="10a")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--duration-s", type=float, default=constants.DURATION_S)
    parser.add_argument("--warm-up-s", type=float, default=constants.WARM_UP_S)
    parser.add_argument("--compare-only", action="store_true", help="Compare what was simulated last")
    options = parser.parse_args()
    if not options.compare_only:
        simulate_all(options.figure, options.seeds, options.duration_s, options.warm_up_s)
    compare(options.figure, {name: getattr(options, name) for name in ("seeds", "duration_s", "warm_up_s")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
