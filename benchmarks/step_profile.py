"""Where the time of a step goes.

Decoder layers that are two calls each (their matrix multiplications included), other matrix multiplications, attention
(writing KV included), the rest of the model, sampling, scheduling, and what else the executor does. One plot over decode
steps of several sizes and a prefill step.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --dtype bfloat16 --context-len 900 --name step_profile_bfloat16
    python benchmarks/step_profile.py --dtype bfloat16 --model smollm2 --quantization int8 --name step_profile_int8

The model is a random Llama of 102M parameters, or another one. Timers around the model's layers cost about a microsecond a
call; they are in "rest of the model".
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from machine import RESULTS, write_result
from tqdm import tqdm

from engine.attention.transformers_door import PagedAttention
from engine.config import EngineConfig
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.request import Request, SamplingParams
from engine.errors import EngineError
from engine.executor.fused_layers import FusedLayer
from engine.executor.local import LocalExecutor
from engine.executor.packed_linear import PackedLinear
from engine.executor.sampler import Draw, SamplingBatch
from engine.step_loop import LookAhead, StepLoop

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from model import VOCAB_SIZE, save_model

PARTS = (
    *("decoder layers", "other matrix multiplications", "attention", "rest of the model"),
    *("sampling", "rest of the executor", "scheduling"),
)
NUM_STEPS = 20


class Clock:
    """Seconds by part of the step under way.

    Parts are nested: what an inner one takes is not the outer one's.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                total = time.perf_counter() - start
                self.seconds[part] += total - self._inner.pop()
                self._inner[-1] += total

        return call


class Discarded:
    """Takes the outputs of the steps; a step that fails raises."""

    def add(self, outputs: Iterable[RequestOutput]) -> None: ...

    def deliver(self) -> None: ...

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        raise error


@contextmanager
def instrumented(executor: LocalExecutor, core: EngineCore, clock: Clock) -> Iterator[None]:
    """Everything that the parts consist of reports to `clock`."""
    places: list[tuple[Any, str, str]] = [
        (FusedLayer, "__call__", "decoder layers"),
        (PackedLinear, "forward", "other matrix multiplications"),
        (torch.nn.Linear, "forward", "other matrix multiplications"),
        (PagedAttention, "attend", "attention"),
        (executor.loaded.model, "forward", "rest of the model"),
        (SamplingBatch, "__init__", "sampling"),
        (SamplingBatch, "draw", "sampling"),
        (Draw, "finish", "sampling"),
        (executor, "execute", "rest of the executor"),
        (core, "schedule", "scheduling"),
        (core, "update", "scheduling"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def profile_steps(executor: LocalExecutor, num_requests: int, context_len: int, num_new: int) -> dict[str, float]:
    """Return median seconds by part over steps of `num_requests` requests.

    num_new: 1 = decodes; more = a prefill of so many tokens after a cached context.
    """
    core = EngineCore(
        CacheConfig(num_gpu_blocks=executor.num_gpu_blocks),
        SchedulingConfig(
            max_model_len=executor.loaded.max_model_len,
            max_num_seqs=max(64, num_requests),
            max_num_batched_tokens=512,
        ),
    )
    loop = StepLoop(core, executor, Discarded(), lambda: 0.0, LookAhead.NOTHING)
    rng = random.Random(0)
    clock = Clock()
    steps: list[dict[str, float]] = []

    def add(name: str, token_ids: list[int], max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        core.add_request(Request(name, token_ids, sampling, conversation_id=name.split(".")[0]), 0.0)

    def step(*, is_counted: bool) -> None:
        clock.seconds.clear()
        assert loop.step() is not None
        if is_counted:
            steps.append(dict(clock.seconds))

    contexts = [[rng.randrange(300, VOCAB_SIZE) for _ in range(context_len)] for _ in range(num_requests)]
    with instrumented(executor, core, clock):
        if num_new == 1:
            for index, context in enumerate(contexts):
                add(f"c{index}.0", context, NUM_STEPS + num_requests * context_len // 512 + 20)
            while core.get_statistics()["num_computed_tokens"] < num_requests * context_len:
                step(is_counted=False)
            for number in range(NUM_STEPS + 2):
                step(is_counted=number >= 2)
        else:
            add("c0.0", contexts[0], 1)
            while core.has_requests:
                step(is_counted=False)
            for number in range(8):
                new = [rng.randrange(300, VOCAB_SIZE) for _ in range(num_new)]
                add(f"c0.{number + 1}", contexts[0] + new, 1)
                step(is_counted=number >= 2)
    for request_id in [f"c{i}.0" for i in range(num_requests)]:
        core.abort(request_id, 0.0)
    while loop.step() is not None:
        pass
    return {part: statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--context-len", type=int, default=250)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", help="default: a random Llama")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--name", default="step_profile", help="of the result files")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            save_model(Path(folder), arguments.dtype)
        executor = LocalExecutor(
            EngineConfig(
                model=arguments.model or folder,
                dtype=arguments.dtype,
                quantization=arguments.quantization,
                num_threads=arguments.num_threads,
                num_gpu_blocks=64 * (-(-(arguments.context_len + 120) // 32)) + 64,
                num_cpu_blocks=0,
            )
        )
        cases = [(f"{n} decodes", n, 1) for n in (1, 4, 8, 32, 64)] + [("prefill of 200", 1, 200)]
        for name, num_requests, num_new in tqdm(cases, unit="case"):
            seconds = profile_steps(executor, num_requests, arguments.context_len, num_new)
            total = sum(seconds.values())
            model = sum(seconds[part] for part in PARTS[:4])
            rows.append(
                {
                    "name": name,
                    "step_ms": 1e3 * total,
                    "outside_model_ms": 1e3 * (total - model),
                    "outside_model_share": (total - model) / total,
                    **{part: 1e3 * value for part, value in seconds.items()},
                }
            )
            shares = ", ".join(f"{part} {100 * seconds[part] / total:.1f} %" for part in PARTS)
            tqdm.write(f"{name}: {1e3 * total:.1f} ms; {shares}")
        executor.shutdown()
    write_result(
        arguments.name,
        {
            "num_threads": arguments.num_threads,
            "context_len": arguments.context_len,
            "dtype": arguments.dtype,
            "model": arguments.model,
            "quantization": arguments.quantization,
            "steps": rows,
        },
    )
    figure, axis = plt.subplots(figsize=(10, 4))
    left = [0.0] * len(rows)
    for part in PARTS:
        shares = [100 * row[part] / row["step_ms"] for row in rows]
        axis.barh([f"{row['name']} ({row['step_ms']:.0f} ms)" for row in rows], shares, left=left, label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("% of the step")
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.15), ncol=3, frameon=False)
    axis.set_title(f"{arguments.dtype}, context {arguments.context_len}, {arguments.num_threads} threads")
    figure.tight_layout()
    figure.savefig(RESULTS / f"{arguments.name}.png", dpi=110)


if __name__ == "__main__":
    main()
