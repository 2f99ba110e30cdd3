"""Measures how long steps take on this machine, for simulations; see engine/simulator/step_table.py.

Steps of prompts and copies are timed in the executor. Decodes are timed as a client of the engine sees them, from token to
token: what scheduling, text and delivery add to a step is in them, as far as it does not go beside the computation. Copies by
the cores that compute are timed in steps that compute: they cost more there than alone.

All sizes are timed in turn, several times over, so that a machine that is slower for some seconds is slower for all of them.
Means and not medians: simulations add steps up, and the slow ones count.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.executor_protocol import Executor, PendingStep
from engine.core.plan import BlockCopy, QuerySegment, RequestStart, StepPlan, StepResult
from engine.core.request import SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.errors import ConfigError
from engine.executor.group import make_executor
from engine.generation import Generation
from engine.profile import describe_machine, measure_swaps, timed
from engine.simulator.step_table import StepTable
from engine.text.prompt import TokenPrompt

MAX_DECODES = 64
MIN_WINDOW = 128
NUM_COPIED_BLOCKS = 64
# Tokens of the prompt by which the time before a request begins is measured.
NUM_PROMPT_TOKENS = 64
SHORT_CONTEXT = 8
# Steps in which all requests of a measurement decode, at least.
NUM_STEPS = 12
# Tokens of each request if fewer did not show such a step: what the smallest window holds. And how often that is tried.
MOST_DECODED, NUM_MORE_TRIES = MIN_WINDOW * 3 // 4, 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the steps that are timed, in tokens; at most what the window allows.

    max_tokens: of a prompt.
    num_asked: of the prompts by which the cost of a prompt's context is measured.
    num_decodes, long_context: requests by which the cost of a decode's context is measured, and the context of each.
    """

    max_tokens: int
    num_asked: int
    num_decodes: int
    long_context: int

    @classmethod
    def of(cls, config: EngineConfig, window: int, *, is_on_cpu: bool) -> Sizes:
        """On a GPU larger ones: launching a prompt takes so long that what small ones compute does not show."""
        if is_on_cpu:
            return cls(min(512, window // 2), min(64, window // 4), 8, min(512, window // 4))
        budget = config.max_num_batched_tokens  # no step may have more, so no place for more is made
        return cls(min(8192, window // 2, budget), min(1024, window // 4, budget), 16, min(2048, window // 4))


def measure_steps(config: EngineConfig, *, repeats: int = 5) -> StepTable:
    """Load the model and time steps of several sizes; a minute or two for a small one. Raises ConfigError."""
    probe = replace(config, num_gpu_blocks=1, num_cpu_blocks=0, mode="pensieve", profile=None, kv_disk_path=None)
    executor = make_executor(replace(probe, enforce_eager=True))  # it only says what it has
    facts = executor.facts
    executor.shutdown()
    config = with_tiers_for_steps(config, facts.model.window(config.max_model_len), is_on_cpu=facts.is_on_cpu)
    return measure_steps_of(config, make_executor(config), repeats=repeats)


def with_tiers_for_steps(config: EngineConfig, window: int, *, is_on_cpu: bool) -> EngineConfig:
    """The same with tiers that are just large enough for what is timed. Raises ConfigError.

    window: of the model and the config together.
    """
    if window < MIN_WINDOW:
        raise ConfigError(f"a window of {window} tokens is too small to measure steps", param="max_model_len")
    sizes = Sizes.of(config, window, is_on_cpu=is_on_cpu)
    # Beside the requests that decode together, the reserve stays free.
    most_decoding = max(sizes.num_decodes * (sizes.long_context + MIN_WINDOW), MAX_DECODES * MIN_WINDOW)
    most_tokens = max(window, int(most_decoding / (1 - config.decode_reserve)))
    return replace(
        config,
        num_gpu_blocks=max(-(-most_tokens // config.chunk_size) + 1, NUM_COPIED_BLOCKS),
        num_cpu_blocks=NUM_COPIED_BLOCKS,
        mode="pensieve",
        profile=None,
        kv_disk_path=None,
    )


def measure_steps_of(config: EngineConfig, executor: Executor, *, repeats: int = 5) -> StepTable:
    """`measure_steps` with an executor that was made with such a config, which it shuts down. Raises ConfigError."""
    facts = executor.facts
    window = facts.model.window(config.max_model_len)
    sizes = Sizes.of(config, window, is_on_cpu=facts.is_on_cpu)
    try:
        prompts = _measure_prompts(executor, config.chunk_size, window, sizes, repeats)
        load_s, store_s = prompts.load_s, prompts.store_s
        if not facts.is_on_cpu:
            load_s, store_s = (measure_swaps(executor, repeats, is_in=is_in) for is_in in (True, False))
    except BaseException:
        executor.shutdown()
        raise
    # Nothing is kept, so that nothing is copied beside the steps. Shuts the executor down.
    watched = _WatchedExecutor(executor)
    engine = AsyncEngine(replace(config, mode="stateless"), lambda _: watched)
    decodes = asyncio.run(_measure_decodes(engine, watched, sizes, repeats))
    # What a token of context adds to a prompt of several tokens: a pair for each of them, and that its KV is read.
    pair_s = max(0.0, prompts.context_token_s - decodes.context_token_s) / (prompts.num_asked - 1)
    return StepTable(
        measured_on=describe_machine(config, facts),
        chunk_size=config.chunk_size,
        bytes_per_block=facts.bytes_per_cold_block,
        num_tokens_s={
            num: max(1e-9, took_s - pair_s * num * (num + 1) / 2) for num, took_s in prompts.num_tokens_s.items()
        },
        decodes_s=decodes.decodes_s,
        pair_s=pair_s,
        context_token_s=decodes.context_token_s,
        request_s=decodes.request_s,
        load_s=load_s,
        store_s=store_s,
        overlaps_copies=not facts.is_on_cpu,
    )


def _numbers(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on: what kernels do differs most between small numbers."""
    sizes = {size for power in range(largest.bit_length()) for size in (1 << power, 3 << power)}
    return sorted({*(size for size in sizes if size <= largest), largest})


# -- prompts, in the executor ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Seconds of steps.

    num_tokens_s: by the tokens of a prompt without context, attention included.
    context_token_s: more for each token in front of a prompt of `num_asked` tokens.
    load_s, store_s: of a block, beside a token.
    """

    num_tokens_s: dict[int, float]
    num_asked: int
    context_token_s: float
    load_s: float
    store_s: float


def _measure_prompts(executor: Executor, chunk_size: int, window: int, sizes: Sizes, repeats: int) -> _Prompts:
    steps = _Steps(executor, chunk_size, window, sizes.max_tokens)
    numbers = _numbers(sizes.max_tokens)
    num_asked = sizes.num_asked
    short, long = window // 8, window - num_asked
    plans = {f"tokens {num}": steps.prompt(0, num) for num in numbers}
    plans |= {"short": steps.prompt(short, num_asked), "long": steps.prompt(long, num_asked)}
    loads = tuple(BlockCopy(CPU, number, GPU, number) for number in range(NUM_COPIED_BLOCKS))
    stores = tuple(BlockCopy(GPU, number, CPU, number) for number in range(NUM_COPIED_BLOCKS))
    plans |= {
        "store": replace(steps.prompt(0, 1), swap_outs=stores),
        "load": replace(steps.prompt(0, 1), swap_ins=loads),
    }
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for number in tqdm(range(repeats + 1), desc="prompts", unit="round", disable=not sys.stderr.isatty()):
        for name, plan in plans.items():
            took_s = timed(executor, plan)
            if number:  # the first round warms up
                seconds[name].append(took_s)
    steps.end()
    mean = {name: statistics.mean(values) for name, values in seconds.items()}
    copies_s = [max(1e-9, mean[name] - mean["tokens 1"]) / NUM_COPIED_BLOCKS for name in ("load", "store")]
    return _Prompts(
        {num: mean[f"tokens {num}"] for num in numbers},
        num_asked,
        max(0.0, mean["long"] - mean["short"]) / (long - short),
        *copies_s,
    )


class _Steps:
    """Plans of steps of one request: only their times count."""

    def __init__(self, executor: Executor, chunk_size: int, window: int, max_tokens: int) -> None:
        """Starts the request, and writes every position once, so that no step reads what was never computed."""
        self._executor = executor
        self._token_ids = tuple(number % executor.facts.model.vocab_size for number in range(window))
        table = tuple(range(-(-window // chunk_size)))
        start = RequestStart("steps", window, window, SamplingParams(temperature=0.0), (), table)
        for begin in range(0, window, max_tokens):
            end = min(begin + max_tokens, window)
            segment = QuerySegment("steps", begin, self._token_ids[begin:end])
            executor.execute(StepPlan(0, (segment,), (start,) if not begin else ()))

    def prompt(self, start: int, num_tokens: int) -> StepPlan:
        token_ids = self._token_ids[start : start + num_tokens]
        return StepPlan(0, (QuerySegment("steps", start, token_ids, samples=True),))

    def end(self) -> None:
        self._executor.execute(StepPlan(0, (), ended=("steps",)))


# -- decodes, as a client sees them ------------------------------------------------------------------------------------


class _WatchedExecutor:
    """Notes when steps begin; the executor itself in all else."""

    def __init__(self, executor: Executor) -> None:
        self.begun_s: list[float] = []
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def execute(self, plan: StepPlan) -> StepResult:
        self.begun_s.append(time.perf_counter())
        return self._executor.execute(plan)

    def submit(self, plan: StepPlan) -> PendingStep:
        self.begun_s.append(time.perf_counter())
        return self._executor.submit(plan)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """As StepTable has them."""

    decodes_s: dict[int, float]
    context_token_s: float
    request_s: float


async def _measure_decodes(engine: AsyncEngine, executor: _WatchedExecutor, sizes: Sizes, repeats: int) -> _Decodes:
    """Shuts the engine down."""
    vocab_size = executor.facts.model.vocab_size
    numbers = _numbers(min(engine.config.max_num_seqs, MAX_DECODES))
    num_long = max(num for num in numbers if num <= sizes.num_decodes)
    long_context = sizes.long_context
    prompt_tokens = MIN_WINDOW if executor.facts.is_on_cpu else engine.config.max_num_batched_tokens
    cases = [*((num, SHORT_CONTEXT) for num in numbers), (num_long, long_context)]
    timed_steps: dict[tuple[int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    begun_after_s = []
    try:
        await _time_decodes(engine, 1, SHORT_CONTEXT, vocab_size)  # warms up
        for _ in tqdm(range(repeats), desc="decodes", unit="round", disable=not sys.stderr.isatty()):
            for num, context_len in cases:
                executor.begun_s.clear()
                sent_s = time.perf_counter()
                await _time_decodes(engine, 1, NUM_PROMPT_TOKENS, vocab_size, num_steps=1)
                begun_after_s.append(executor.begun_s[0] - sent_s)
                timed_steps[num, context_len].append(
                    await _time_decodes(engine, num, context_len, vocab_size, prompt_tokens=prompt_tokens)
                )
    finally:
        await engine.shutdown()
    means = {
        case: [statistics.mean(column) for column in zip(*rows, strict=True)] for case, rows in timed_steps.items()
    }
    (long_s, long_len), (short_s, short_len) = means[num_long, long_context], means[num_long, SHORT_CONTEXT]
    context_token_s = max(0.0, long_s - short_s) / (long_len - short_len)
    decodes_s = {}
    for num in numbers:
        step_s, num_tokens = means[num, SHORT_CONTEXT]
        decodes_s[num] = max(1e-9, step_s - context_token_s * num_tokens)
    return _Decodes(decodes_s, context_token_s, statistics.mean(begun_after_s))


async def _time_decodes(
    engine: AsyncEngine,
    num: int,
    context_len: int,
    vocab_size: int,
    num_steps: int = NUM_STEPS,
    prompt_tokens: int = MIN_WINDOW,
) -> tuple[float, float]:
    """(seconds of a step of so many decodes, tokens that these attend to together), each request with a prompt of its own.

    prompt_tokens: of prompts, so many are computed in a step at least, if there are as many.

    On a machine that is busy with something else, the first request may end before the last one is heard of. They are all
    asked once more then, for more tokens. Raises ConfigError if that never helps.
    """
    # Until the last request has its first token, the others decode.
    num_prompt_steps = -(-num * context_len // prompt_tokens) + 1
    for max_tokens in (num_steps + num_prompt_steps, *[MOST_DECODED] * NUM_MORE_TRIES):
        stamps = await _stamp_decodes(engine, num, context_len, vocab_size, max_tokens)
        begin_s, end_s = max(each[0] for each in stamps), min(each[-1] for each in stamps)
        last_begun = max(stamps, key=lambda each: each[0])
        steps_s = [right - left for left, right in pairwise(last_begun) if left >= begin_s and right <= end_s]
        if steps_s:
            num_before = statistics.mean(sum(stamp < begin_s for stamp in each) for each in stamps)
            return statistics.mean(steps_s), num * (context_len + num_before + len(steps_s) / 2)
    raise ConfigError(
        f"{num} requests that were sent together never decoded together, because this machine is busy with something"
        " else; measure its steps when it is idle"
    )


async def _stamp_decodes(
    engine: AsyncEngine, num: int, context_len: int, vocab_size: int, max_tokens: int
) -> list[list[float]]:
    """For each request, when each of its tokens came."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    rng = random.Random(num)
    stamps: list[list[float]] = [[] for _ in range(num)]

    async def ask(number: int) -> None:
        prompt = TokenPrompt(tuple(rng.randrange(vocab_size) for _ in range(context_len)))
        async for delta in engine.generate(Generation(f"{num}.{context_len}.{number}", None, prompt, sampling)):
            stamps[number] += [time.perf_counter()] * len(delta.token_ids)

    await asyncio.gather(*(ask(number) for number in range(num)))
    return stamps
