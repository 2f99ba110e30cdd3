"""Recorded steps against the same steps launched one operation after the other.

A graph that reads the wrong memory is as fast as a right one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from setting import CHUNK_SIZE

from engine.core.plan import QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.executor.local import LocalExecutor
from engine.executor.step_graphs import StepGraphs

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
# Of the largest logit, what is still rounding: half of the rows may differ by the first, a row by the second. Rows of a wrong
# graph differ by about 1. These are for `TOLERANCE_LAYERS` layers: each layer rounds anew, so that differences grow with
# the root of their number. (On an H100 in bfloat16, they are 0.9 to 1.2 % after 2 layers, and 4.3 % after 32.)
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float16: (2e-2, 1e-1), torch.bfloat16: (3e-2, 2e-1)}
TOLERANCE_LAYERS = 2
# Whatever the depth: a wrong graph has to fail.
LARGEST_TOLERANCE = 0.5


@dataclass(frozen=True, slots=True)
class Difference:
    """Between the logits of graphs and of eager steps, relative to the largest logit of a row.

    num_other_tokens: rows in which rounding made another token the largest.
    """

    num_rows: int
    num_other_tokens: int
    median: float
    largest: float


@contextmanager
def without_graphs(executor: LocalExecutor) -> Iterator[None]:
    runner = executor.runner
    graphs = runner.graphs, runner.prompt_graphs
    runner.graphs, runner.prompt_graphs = StepGraphs(), StepGraphs()
    try:
        yield
    finally:
        runner.graphs, runner.prompt_graphs = graphs


@contextmanager
def logits_kept(executor: LocalExecutor) -> Iterator[list[torch.Tensor]]:
    """Of each step: [number of sampling segments, vocabulary]."""
    kept: list[torch.Tensor] = []
    # A copy, because the next replay writes to the same place.
    executor.runner.see_logits = lambda logits: kept.append(logits.clone())
    try:
        yield kept
    finally:
        executor.runner.see_logits = None


def compare_with_eager(executor: LocalExecutor, context_lens: Sequence[int], num_steps: int) -> Difference:
    """Decode steps of so many requests over random KV in shuffled blocks, by graphs and without.

    The first token of each request is given, the later ones are those that the graphs sampled, which stay on the device.
    Overwrites the GPU tier. Raises AssertionError if there is no graph for such a batch, or if logits or tokens differ by
    more than rounding.
    """
    n = len(context_lens)
    assert executor.runner.graphs.size_for(n) is not None, f"no graph is recorded for {n} requests"
    with torch.inference_mode():
        executor.gpu_store.storage.normal_()
    blocks_each = -(-(max(context_lens) + num_steps) // CHUNK_SIZE)
    blocks = list(range(executor.num_gpu_blocks))
    random.Random(n).shuffle(blocks)
    assert n * blocks_each <= len(blocks), "the GPU tier is too small for this comparison"
    tables = [tuple(blocks[i * blocks_each : (i + 1) * blocks_each]) for i in range(n)]
    starts = tuple(RequestStart(str(i), 1, 1, GREEDY, (), tables[i]) for i in range(n))
    executor.execute(StepPlan(0, (), starts))
    tokens: list[tuple[int, ...]] = [tuple(8 + i for i in range(n))]

    def step(number: int, *, is_given: bool) -> StepPlan:
        return StepPlan(
            0,
            tuple(
                QuerySegment(str(i), length + number, (tokens[number][i],) if is_given else None, True)
                for i, length in enumerate(context_lens)
            ),
        )

    try:
        with logits_kept(executor) as by_graph:
            for number in range(num_steps):
                tokens.append(executor.execute(step(number, is_given=number == 0)).token_ids)
        with without_graphs(executor), logits_kept(executor) as eager:
            for number in range(num_steps):
                executor.execute(step(number, is_given=True))
    finally:
        executor.execute(StepPlan(0, (), ended=tuple(map(str, range(n)))))
    median_tolerance, tolerance = _tolerances(executor.loaded.dtype, len(executor.gpu_store.layer_slices))
    return _compare(torch.cat(by_graph).float(), torch.cat(eager).float(), tokens[1:], median_tolerance, tolerance)


def _tolerances(dtype: torch.dtype, num_layers: int) -> tuple[float, float]:
    """For the median of the rows, and for each of them."""
    growth = max(1.0, math.sqrt(num_layers / TOLERANCE_LAYERS))
    median, row = (min(LARGEST_TOLERANCE, growth * tolerance) for tolerance in TOLERANCES[dtype])
    return median, row


def compare_prompts_with_eager(executor: LocalExecutor, lengths: Sequence[tuple[int, int]]) -> Difference:
    """One step of segments (new tokens, tokens before them) over random KV in shuffled blocks, by a graph and without.

    Overwrites the GPU tier. Raises AssertionError if there is no graph for such a step, or if logits or tokens differ by more
    than rounding.
    """
    n, num_rows = len(lengths), sum(length for length, _ in lengths)
    assert executor.runner.prompt_graphs.size_for(num_rows) is not None, f"no graph is recorded for {num_rows} rows"
    with torch.inference_mode():
        executor.gpu_store.storage.normal_()
    blocks = list(range(executor.num_gpu_blocks))
    rng = random.Random(num_rows)
    rng.shuffle(blocks)
    starts, segments = [], []
    for i, (length, before) in enumerate(lengths):
        table = tuple(blocks.pop() for _ in range(-(-(before + length) // CHUNK_SIZE)))
        starts.append(RequestStart(str(i), 1, 1, GREEDY, (), table))
        segments.append(QuerySegment(str(i), before, tuple(rng.randrange(8, 2000) for _ in range(length)), True))
    plan = StepPlan(0, tuple(segments))
    executor.execute(StepPlan(0, (), tuple(starts)))
    try:
        with logits_kept(executor) as by_graph:
            tokens = executor.execute(plan).token_ids
        with without_graphs(executor), logits_kept(executor) as eager:
            executor.execute(plan)
    finally:
        executor.execute(StepPlan(0, (), ended=tuple(map(str, range(n)))))
    median_tolerance, tolerance = _tolerances(executor.loaded.dtype, len(executor.gpu_store.layer_slices))
    return _compare(torch.cat(by_graph).float(), torch.cat(eager).float(), [tokens], median_tolerance, tolerance)


def compare_steps(
    executor: LocalExecutor, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> Difference:
    """Compare logits of steps with those of the same steps; raises AssertionError if they differ by more than rounding."""
    logits, others = torch.cat(list(actual)).float(), torch.cat(list(expected)).float()
    tolerances = _tolerances(executor.loaded.dtype, len(executor.gpu_store.layer_slices))
    return _compare(logits, others, [logits.argmax(dim=1).tolist()], *tolerances)


def _compare(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tokens: Sequence[Sequence[int]],
    median_tolerance: float,
    tolerance: float,
) -> Difference:
    """actual, expected: [rows, vocabulary]. tokens: what was sampled from `actual`, by step."""
    assert actual.isfinite().all(), "a graph gave logits that are no numbers"
    largest = expected.abs().amax(dim=1)
    errors = (actual - expected).abs().amax(dim=1) / largest
    chosen = torch.tensor([token for row in tokens for token in row], device=expected.device)
    behind = (expected.amax(dim=1) - expected.gather(1, chosen[:, None])[:, 0]) / largest
    difference = Difference(len(chosen), int((behind > 0).sum()), float(errors.median()), float(errors.max()))
    assert difference.median <= median_tolerance, f"graphs give other logits than eager steps: {difference}"
    assert difference.largest <= tolerance, f"graphs give other logits than eager steps: {difference}"
    assert float(behind.max()) <= min(LARGEST_TOLERANCE, 2 * tolerance), (
        f"graphs choose other tokens than eager steps: {difference}"
    )
    return difference
