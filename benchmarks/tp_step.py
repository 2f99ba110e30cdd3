"""What a tensor-parallel step costs besides computing.

From the engine thread's plan on rank 0 until a worker has the same plan, over the connection that serves; and what
rank 0 itself spends more than an executor without a group. No collective is included: these depend on the devices.

    python benchmarks/tp_step.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import transformers
from machine import write_result
from random_llama import save_random_llama
from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.plan import BlockAppend, QuerySegment, StepPlan
from engine.executor.group import make_executor
from engine.executor.plan_channel import PlanReceiver, PlanSender, encode_plan
from engine.executor.process_group import GroupMember

CHUNK_SIZE = 32


def decode_plan_of(step_id: int, num_requests: int) -> StepPlan:
    """A step in which so many requests decode, of which one in CHUNK_SIZE gets a block, as in a server."""
    ids = [f"chatcmpl-{number:032x}" for number in range(num_requests)]
    segments = tuple(QuerySegment(name, 1000 + step_id, None, samples=True) for name in ids)
    appends = tuple(BlockAppend(name, 7) for name in ids[step_id % CHUNK_SIZE :: CHUNK_SIZE])
    return StepPlan(step_id, segments, appends=appends)


def receive_all(member: GroupMember, results: Connection) -> None:
    """A worker that only notes when each plan is in its hands.

    The clock is the machine's, the same in all processes.
    """
    receiver = PlanReceiver(member)
    times = []
    while receiver.receive() is not None:
        times.append(time.perf_counter())
    receiver.close()
    results.send(times)


def measure_transport(num_requests: int, num_steps: int, step_s: float, host: str | None) -> dict[str, float]:
    """Seconds of each step until the send returns on rank 0, and until the plan is there on rank 1."""
    with tempfile.TemporaryDirectory() as folder:
        sender = PlanSender(2, host=host, path=f"{folder}/plans", on_lost=lambda rank, why: None)
        results, theirs = get_context("spawn").Pipe()
        member = GroupMember(1, 2, "", sender.address, sender.authkey)
        process = get_context("spawn").Process(target=receive_all, args=(member, theirs))
        process.start()
        sender.accept(lambda: None, 60)
        sampled = tuple(range(1000, 1000 + num_requests))
        begun, sent = [], []
        for step_id in range(num_steps):
            plan = decode_plan_of(step_id, num_requests)
            time.sleep(step_s)  # the worker waits, as after a step
            begun.append(time.perf_counter())
            sender.send(sampled, plan, 60)
            sent.append(time.perf_counter())
        sender.end_step()
        time.sleep(0.1)
        sender.close(5)
        received = results.recv()
        process.join()
    skipped = num_steps // 10  # caches and branch predictors are cold at first
    there = [(b - a) * 1e6 for a, b in zip(begun, received, strict=True)][skipped:]
    gone = [(b - a) * 1e6 for a, b in zip(begun, sent, strict=True)][skipped:]
    return {
        "num_requests": num_requests,
        "num_bytes": len(encode_plan(sampled, decode_plan_of(0, num_requests))),
        "sent_p50_us": statistics.median(gone),
        "received_p50_us": statistics.median(there),
        "received_p99_us": statistics.quantiles(there, n=100)[98],
    }


def measure_rank_0(num_steps: int, step_s: float) -> dict[str, float]:
    """Microseconds of a step that computes nothing, in an executor without a group and on rank 0 of two."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder), hidden=128, layers=1)
        for size in (1, 2):
            options = {"num_gpu_blocks": 4, "num_cpu_blocks": 0, "num_threads": 1, "attention_backend": "reference"}
            executor = make_executor(EngineConfig(model=folder, tensor_parallel_size=size, **options))
            samples = []
            for step_id in range(num_steps):
                time.sleep(step_s)
                begin = time.perf_counter()
                executor.execute(StepPlan(step_id, ()))
                samples.append((time.perf_counter() - begin) * 1e6)
            executor.shutdown()
            samples = samples[num_steps // 10 :]
            figures[f"ranks_{size}_p50_us"] = statistics.median(samples)
            figures[f"ranks_{size}_p99_us"] = statistics.quantiles(samples, n=100)[98]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-requests", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--step-ms", type=float, default=2.0, help="pause between two steps")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for transport, host in (("Unix socket", None), ("TCP, loopback", "127.0.0.1")):
        for num_requests in tqdm(arguments.num_requests, desc=transport):
            figures = measure_transport(num_requests, arguments.num_steps, arguments.step_ms / 1e3, host)
            rows.append({"transport": transport, **figures})
    print(
        f"a plan's way from rank 0 to rank 1, {arguments.num_steps} steps {arguments.step_ms} ms apart, in microseconds"
    )
    print(f"{'transport':>14} {'decoding':>9} {'bytes':>6} {'sent p50':>9} {'there p50':>10} {'there p99':>10}")
    for row in rows:
        print(
            f"{row['transport']:>14} {row['num_requests']:>9} {row['num_bytes']:>6} {row['sent_p50_us']:>9.1f} "
            f"{row['received_p50_us']:>10.1f} {row['received_p99_us']:>10.1f}"
        )
    rank_0 = measure_rank_0(arguments.num_steps, arguments.step_ms / 1e3)
    print(
        "an empty step on rank 0, p50: " + ", ".join(f"{rank_0[f'ranks_{n}_p50_us']:.1f} ({n} ranks)" for n in (1, 2))
    )
    write_result("tp_step", {**vars(arguments), "rows": rows, "empty_step": rank_0})


if __name__ == "__main__":
    main()
