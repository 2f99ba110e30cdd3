"""How much of a swap-in is hidden behind computation, layer by layer.

Compute only, transfer only, one after the other, and pipelined, side by side in one run.

    python benchmarks/swap.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import transformers
from machine import write_result
from random_llama import save_random_llama
from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.plan import BlockCopy, QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.executor.local import LocalExecutor

CHUNK_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--num-new-tokens", type=int, default=64)
    parser.add_argument("--context-lens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--num-threads", type=int, default=1, help="of the model; the copy has a thread of its own")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    longest = max(arguments.context_lens) + arguments.num_new_tokens
    num_blocks = -(-longest // CHUNK_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder), hidden=arguments.hidden, layers=arguments.layers)
        executor = LocalExecutor(
            EngineConfig(
                model=folder, num_gpu_blocks=num_blocks, num_cpu_blocks=num_blocks, num_threads=arguments.num_threads
            )
        )
    tokens = tuple(i % 2048 for i in range(longest))
    start = RequestStart("r", longest, longest, SamplingParams(temperature=0.0), (), tuple(range(num_blocks)))
    executor.execute(StepPlan(0, (QuerySegment("r", 0, tokens),), (start,)))
    executor.execute(StepPlan(0, (), swap_outs=tuple(BlockCopy(GPU, i, CPU, i) for i in range(num_blocks))))

    def timed(*plans: StepPlan) -> float:
        begin = time.perf_counter()
        for plan in plans:
            executor.execute(plan)
        return time.perf_counter() - begin

    rows = []
    for context_len in tqdm(arguments.context_lens, desc="context lengths"):
        segment = QuerySegment("r", context_len, tokens[context_len : context_len + arguments.num_new_tokens], True)
        copies = tuple(BlockCopy(CPU, i, GPU, i) for i in range(context_len // CHUNK_SIZE))
        compute, transfer = StepPlan(0, (segment,)), StepPlan(0, (), swap_ins=copies)
        pipelined = StepPlan(0, (segment,), swap_ins=copies)
        samples = [
            (timed(compute), timed(transfer), timed(transfer, compute), timed(pipelined))
            for _ in range(arguments.repeats + 1)
        ][1:]
        compute_s, transfer_s, serial_s, pipelined_s = (statistics.median(c) for c in zip(*samples, strict=True))
        rows.append(
            {
                "context_len": context_len,
                "mib": len(copies) * executor.bytes_per_block / (1 << 20),
                "compute_ms": compute_s * 1e3,
                "transfer_ms": transfer_s * 1e3,
                "serial_ms": serial_s * 1e3,
                "pipelined_ms": pipelined_s * 1e3,
                # Noise may make it more than all.
                "share_hidden": min(1.0, (compute_s + transfer_s - pipelined_s) / min(compute_s, transfer_s)),
            }
        )
    print(
        f"{arguments.num_new_tokens} new tokens behind a context that is swapped in; medians of {arguments.repeats}, in ms"
    )
    print(f"{'context':>7} {'MiB':>7} {'compute':>9} {'transfer':>9} {'serial':>9} {'pipelined':>9} {'hidden':>7}")
    for row in rows:
        print(
            f"{row['context_len']:>7} {row['mib']:>7.1f} {row['compute_ms']:>9.1f} {row['transfer_ms']:>9.1f} "
            f"{row['serial_ms']:>9.1f} {row['pipelined_ms']:>9.1f} {row['share_hidden']:>7.0%}"
        )
    write_result("swap", {**vars(arguments), "rows": rows})
    plot(rows)


def plot(rows: list[dict]) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("serial", "pipelined", "compute", "transfer"):
        axes.plot([row["context_len"] for row in rows], [row[f"{name}_ms"] for row in rows], "o-", label=name)
    axes.set(xlabel="tokens swapped in", ylabel="ms", title="swap-in and computation", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(Path(__file__).parent / "results" / "swap.png", dpi=120)


if __name__ == "__main__":
    main()
