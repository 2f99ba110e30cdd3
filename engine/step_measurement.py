"""Measures how long steps take on this machine, for simulations; see engine/simulator/step_table.py."""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

from tqdm import tqdm

from engine.config import EngineConfig
from engine.core.executor_protocol import Executor
from engine.core.plan import QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.executor.group import make_executor
from engine.profile import describe_machine, measure_swaps, timed
from engine.simulator.step_table import StepTable

MAX_TOKENS = 512
NUM_COPIED_BLOCKS = 64
# Requests of the steps by which the cost of a decode's context is measured.
NUM_DECODES = 8


def measure_steps(config: EngineConfig, *, repeats: int = 5) -> StepTable:
    """Load the model and time steps of several sizes; a minute for a small one. Raises ConfigError."""
    probe = replace(config, num_gpu_blocks=1, num_cpu_blocks=0, mode="pensieve", profile=None, kv_disk_path=None)
    executor = make_executor(probe)
    window = executor.facts.model.window(config.max_model_len)
    executor.shutdown()
    num_blocks = max(-(-window // config.chunk_size), NUM_COPIED_BLOCKS)
    sizes = [1 << power for power in range(min(MAX_TOKENS, window // 2).bit_length())]
    if len(sizes) < 4:
        raise ConfigError(f"a window of {window} tokens is too small to measure steps", param="max_model_len")
    executor = make_executor(replace(probe, num_gpu_blocks=num_blocks, num_cpu_blocks=NUM_COPIED_BLOCKS))
    try:
        steps = _Steps(executor, config.chunk_size, window)
        short, long = window // 8, window - 1
        plans = {f"tokens {num}": steps.prompt(0, num) for num in sizes}
        plans |= {"prompt short": steps.prompt(short, 64), "prompt long": steps.prompt(long - 64, 64)}
        plans |= {"decode short": steps.decodes(short), "decode long": steps.decodes(long)}
        seconds: dict[str, list[float]] = {name: [] for name in plans}
        for number in tqdm(range(repeats + 1), desc="steps", unit="round", disable=not sys.stderr.isatty()):
            for name, plan in plans.items():
                took_s = timed(executor, plan)
                if number:  # the first round warms up
                    seconds[name].append(took_s)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        pair_s = max(0.0, median["prompt long"] - median["prompt short"]) / (64 * (long - 64 - short))
        context_token_s = max(0.0, median["decode long"] - median["decode short"]) / (NUM_DECODES * (long - short))
        num_tokens_s = {num: max(1e-9, median[f"tokens {num}"] - pair_s * num * (num + 1) / 2) for num in sizes}
        facts = executor.facts
        return StepTable(
            measured_on=describe_machine(config, facts),
            chunk_size=config.chunk_size,
            bytes_per_block=facts.bytes_per_block,
            num_tokens_s=num_tokens_s,
            pair_s=pair_s,
            context_token_s=context_token_s,
            load_s=measure_swaps(executor, repeats, is_in=True),
            store_s=measure_swaps(executor, repeats, is_in=False),
            overlaps_copies=not facts.is_on_cpu,
        )
    finally:
        executor.shutdown()


class _Steps:
    """Plans of steps in contexts that share their blocks: only their times count."""

    def __init__(self, executor: Executor, chunk_size: int, window: int) -> None:
        """Starts all requests, and writes every position once, so that no step reads what was never computed."""
        self._token_ids = tuple(number % executor.facts.model.vocab_size for number in range(window))
        table = tuple(range(-(-window // chunk_size)))
        sampling = SamplingParams(temperature=0.0)
        names = ["steps", *(f"steps-{number}" for number in range(NUM_DECODES))]
        starts = tuple(RequestStart(name, window, window, sampling, (), table) for name in names)
        for begin in range(0, window, MAX_TOKENS):
            end = min(begin + MAX_TOKENS, window)
            segment = QuerySegment("steps", begin, self._token_ids[begin:end])
            executor.execute(StepPlan(0, (segment,), starts if not begin else ()))

    def prompt(self, start: int, num_tokens: int) -> StepPlan:
        token_ids = self._token_ids[start : start + num_tokens]
        return StepPlan(0, (QuerySegment("steps", start, token_ids, samples=True),))

    def decodes(self, start: int) -> StepPlan:
        token_ids = self._token_ids[start : start + 1]
        return StepPlan(
            0, tuple(QuerySegment(f"steps-{number}", start, token_ids, samples=True) for number in range(NUM_DECODES))
        )
