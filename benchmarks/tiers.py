"""Turns per second and time to first token with a disk tier and without, by working set and speed of the disk.

Conversations take turns in one engine, one after the other, and all of them come back in each round. The working set is told
in multiples of what the GPU and the CPU tier hold together. The disk is the real one, and the real one slowed down to so many
MB/s. Wanted: at no point more than 3 % slower than without.

    python benchmarks/tiers.py [--model smollm2] [--context-len 512] [--plot]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from machine import RESULTS, write_result
from tqdm import tqdm

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.executor.tiers.disk_store import DiskStore
from engine.generation import Generation
from engine.text.prompt import TokenPrompt

CHUNK_SIZE = 32
CONVERSATIONS_IN_TIERS = 4
NUM_NEW_TOKENS = 16
# Two until the second use has admitted what there is to the disk; the rest are measured.
NUM_FIRST_ROUNDS, NUM_ROUNDS = 2, 4
ANSWER = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


def throttled(speed_mb_s: float | None) -> mock._patch_dict | Any:
    """A disk that reads at most so many MB a second; None = as it is."""
    read, measure = DiskStore.read, DiskStore.measure

    def wait(num_bytes: int, begin_s: float) -> None:
        if speed_mb_s is not None:
            time.sleep(max(0.0, num_bytes / speed_mb_s / 1e6 - (time.perf_counter() - begin_s)))

    def slow_read(self: DiskStore, block: int, keys: Any, buffers: Any) -> list[bool]:
        begin_s = time.perf_counter()
        results = read(self, block, keys, buffers)
        wait(len(keys) * self.layout.slot_bytes, begin_s)
        return results

    def slow_measure(self: DiskStore) -> float:
        seconds = measure(self)
        return seconds if speed_mb_s is None else max(seconds, self.layout.slot_bytes / speed_mb_s / 1e6)

    return mock.patch.multiple(DiskStore, read=slow_read, measure=slow_measure)


async def measure(config: EngineConfig, num_conversations: int, context_len: int) -> dict[str, Any]:
    engine = AsyncEngine(config)
    rng = random.Random(0)
    contexts = [[rng.randrange(500, 1000) for _ in range(context_len)] for _ in range(num_conversations)]
    first_s: list[float] = []
    begin_s = 0.0
    for round_number in range(NUM_FIRST_ROUNDS + NUM_ROUNDS):
        if round_number == NUM_FIRST_ROUNDS:
            before, begin_s = engine.get_statistics(), time.perf_counter()
        for number, context in enumerate(contexts):
            request_id = f"{number}.{round_number}"
            asked_s = time.perf_counter()
            is_first = True
            generation = Generation(request_id, str(number), TokenPrompt(tuple(context)), ANSWER)
            async for delta in engine.generate(generation):
                if is_first and round_number >= NUM_FIRST_ROUNDS:
                    first_s.append(time.perf_counter() - asked_s)
                is_first = False
                context.extend(delta.token_ids)
            context.extend(rng.randrange(500, 1000) for _ in range(NUM_NEW_TOKENS))
    elapsed_s = time.perf_counter() - begin_s
    after = engine.get_statistics()
    await engine.shutdown()
    return {
        "turns_per_s": len(first_s) / elapsed_s,
        "first_token_s": statistics.median(first_s),
        "cached": 1
        - (after["num_computed_tokens"] - before["num_computed_tokens"]) / sum(map(len, contexts)) / NUM_ROUNDS,
        "loaded_bytes": after["num_slow_transfer_bytes"].get("disk_loaded", 0),
        "stored_bytes": after["num_slow_transfer_bytes"].get("disk_stored", 0),
        "refused": after.get("slow_refusals", {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, default=None)
    parser.add_argument("--context-len", type=int, default=512)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--speeds", type=float, nargs="+", default=[20, 100, 500], help="MB/s; the real disk is added")
    parser.add_argument("--path", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    final_len = args.context_len + (NUM_FIRST_ROUNDS + NUM_ROUNDS) * (NUM_NEW_TOKENS + ANSWER.max_tokens)
    num_chunks = -(-final_len // CHUNK_SIZE)
    half = CONVERSATIONS_IN_TIERS // 2 * num_chunks
    options = {
        "model": args.model,
        "dtype": args.dtype,
        "num_threads": args.num_threads,
        "chunk_size": CHUNK_SIZE,
        "num_gpu_blocks": half + num_chunks // 2,
        "num_cpu_blocks": half + num_chunks // 2,
        "max_model_len": final_len + CHUNK_SIZE,
        "decode_reserve": 0.02,
    }
    rows: list[dict[str, Any]] = []
    print(f"{'set':>4} {'disk':>10} {'turns/s':>8} {'first token':>12} {'cached':>7} {'loaded':>9} {'stored':>9}")
    modes: list[tuple[str, float | None]] = [("none", None), *((f"{s:g} MB/s", s) for s in args.speeds), ("disk", None)]
    for multiple in tqdm(args.multiples, desc="working sets"):
        for name, speed in modes:
            with tempfile.TemporaryDirectory(dir=args.path) as folder, throttled(speed):
                disk = {} if name == "none" else {"kv_disk_path": folder, "kv_disk_size": 8}
                config = EngineConfig.from_options({**options, **disk})
                num_conversations = CONVERSATIONS_IN_TIERS * multiple
                figures = asyncio.run(measure(config, num_conversations, args.context_len))
            rows.append({"working_set": multiple, "disk": name, **figures})
            tqdm.write(describe(rows[-1]))
    write_result("tiers", {"options": options, "context_len": args.context_len, "rows": rows})
    if args.plot:
        plot(rows, RESULTS / "tiers.png")


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['working_set']:>3}x {row['disk']:>10} {row['turns_per_s']:>8.2f} {row['first_token_s'] * 1e3:>9.1f} ms "
        f"{row['cached']:>7.1%} {row['loaded_bytes'] / 1e6:>6.0f} MB {row['stored_bytes'] / 1e6:>6.0f} MB"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    speed_axes, latency_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(row["disk"] for row in rows):
        own = [row for row in rows if row["disk"] == name]
        sizes = [row["working_set"] for row in own]
        style = "k--" if name == "none" else "o-"
        speed_axes.plot(sizes, [row["turns_per_s"] for row in own], style, label=name)
        latency_axes.plot(sizes, [row["first_token_s"] * 1e3 for row in own], style, label=name)
    speed_axes.set(title="turns per second", xlabel="working set / (GPU tier + CPU tier)", xscale="log")
    latency_axes.set(
        title="median time to first token (ms)", xlabel="working set / (GPU tier + CPU tier)", xscale="log"
    )
    for axes in (speed_axes, latency_axes):
        axes.set_xticks(sizes, [f"{size}x" for size in sizes])
        axes.legend(title="disk tier")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
