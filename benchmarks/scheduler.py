"""Milliseconds of scheduling and cache management per step of 256 requests of 8k tokens, without model.

Target: under 1 ms per decode step. Drafting the next step (`draft_ahead`) runs while the model computes and is not counted.

    python benchmarks/scheduler.py
"""

from __future__ import annotations

import random
import statistics
import time

from machine import write_result
from tqdm import tqdm

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.plan import StepPlan, StepResult
from engine.core.request import Request, SamplingParams

NUM_REQUESTS = 256
CONTEXT_LEN = 8192
NUM_STEPS = 300


def result_of(plan: StepPlan) -> StepResult:
    return StepResult(plan.step_id, tuple(7 for segment in plan.segments if segment.samples))


def main() -> None:
    num_blocks = NUM_REQUESTS * (CONTEXT_LEN + NUM_STEPS + 64) // 32 + 64
    core = EngineCore(
        CacheConfig(num_gpu_blocks=num_blocks, num_cpu_blocks=num_blocks),
        SchedulingConfig(
            max_model_len=2 * CONTEXT_LEN,
            max_num_seqs=NUM_REQUESTS,
            max_num_batched_tokens=NUM_REQUESTS * CONTEXT_LEN,
            decode_reserve=0.0,
        ),
    )
    rng = random.Random(0)
    for i in range(NUM_REQUESTS):
        tokens = rng.choices(range(32000), k=CONTEXT_LEN)
        core.add_request(Request(f"r{i}", tokens, SamplingParams(max_tokens=CONTEXT_LEN)), 0.0)
    now, schedule_s, ahead_s, update_s = 0.0, [], [], []
    start = time.perf_counter()
    plan = core.schedule(now)  # admits all: hashes and allocates 2M tokens
    admission_s = time.perf_counter() - start
    assert plan is not None
    core.update(plan, result_of(plan), now)
    for _ in tqdm(range(NUM_STEPS), desc="decode steps", unit="step"):
        now += 0.05
        begin = time.perf_counter()
        plan = core.schedule(now)
        middle = time.perf_counter()
        assert plan is not None
        assert len(plan.segments) == NUM_REQUESTS
        result = result_of(plan)
        aside = time.perf_counter()
        core.draft_ahead(plan)
        resume = time.perf_counter()
        core.update(plan, result, now)
        schedule_s.append(middle - begin)
        ahead_s.append(resume - aside)
        update_s.append(time.perf_counter() - resume)
    total = [a + b for a, b in zip(schedule_s, update_s, strict=True)]
    figures = {
        "num_requests": NUM_REQUESTS,
        "context_len": CONTEXT_LEN,
        "admission_ms_per_request": admission_s / NUM_REQUESTS * 1e3,
        "schedule_ms": statistics.median(schedule_s) * 1e3,
        "draft_ahead_ms": statistics.median(ahead_s) * 1e3,
        "update_ms": statistics.median(update_s) * 1e3,
        "step_ms": statistics.median(total) * 1e3,
        "step_p99_ms": statistics.quantiles(total, n=100)[98] * 1e3,
    }
    for name, value in figures.items():
        print(f"{name:<26} {value:.3f}" if isinstance(value, float) else f"{name:<26} {value}")
    write_result("scheduler", figures)


if __name__ == "__main__":
    main()
