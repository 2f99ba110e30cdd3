"""The first steps of an executor, one of each kind that launches other kernels than the rest.

So no request has to wait for what is compiled, or loaded, when it is launched for the first time. Knows kinds of steps
and no kernel.
"""

from __future__ import annotations

import logging

from engine.config import EngineConfig
from engine.core.plan import QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.core.scheduler import MAX_SCORED_ROWS
from engine.executor.model_loader import LoadedModel
from engine.executor.model_runner import ModelRunner
from engine.executor.step_graphs import StepGraphs
from engine.executor.tiers.kv_store import KVStore

logger = logging.getLogger(__name__)

# Contexts of the largest steps: what attention needs besides does not grow further, and it splits them.
MAX_CONTEXT_LEN = 16 * 1024
# Rows of a prompt that fill the largest tiles.
PROMPT_LEN = 128


def step_of(segments: list[tuple[int, int]], sampling: SamplingParams, chunk_size: int) -> StepPlan:
    """A step that starts a request for each segment, (query_len, context_len), all in block 0; all sample.

    Of prompt_logprobs it brings as many as a step may.
    """
    starts, queries = [], []
    num_scorable = 0 if sampling.prompt_logprobs is None else MAX_SCORED_ROWS
    for number, (query_len, context_len) in enumerate(segments):
        table = (0,) * -(-context_len // chunk_size)
        token_ids = (0,) * context_len if sampling.needs_token_ids else ()
        starts.append(RequestStart(str(number), context_len, 1, sampling, (), table, token_ids))
        targets = (0,) * min(query_len - 1, num_scorable)
        num_scorable -= len(targets)
        queries.append(QuerySegment(str(number), context_len - query_len, (0,) * query_len, True, targets))
    return StepPlan(0, tuple(queries), tuple(starts))


def end_of(step: StepPlan) -> StepPlan:
    """Forget the requests that a step started."""
    return StepPlan(0, (), ended=tuple(start.request_id for start in step.starts))


def longest_context(config: EngineConfig, loaded: LoadedModel) -> int:
    """Of any step here, in tokens: as the window allows, and enough for a prompt that fills the budget."""
    return min(loaded.facts.window(config.max_model_len), max(MAX_CONTEXT_LEN, config.max_num_batched_tokens))


def kinds_of_steps(config: EngineConfig, longest: int) -> dict[str, list[tuple[int, int]]]:
    """(query_len, context_len) of the segments of a step, for each kind of step.

    longest: the longest context, in tokens.
    """
    prompt_len = min(config.max_num_batched_tokens - 1, longest - 1, PROMPT_LEN)
    kinds = {"decodes": [(1, longest)]}
    if prompt_len > 1:
        kinds["prompts"] = [(prompt_len, longest)]
        if config.max_num_seqs > 1:
            # Few rows, so that their contexts are split whatever runs at once: what combines the splits is compiled, too.
            kinds["a prompt among decodes"] = [(1, longest), (2, longest)]
    return kinds


def warm_up(config: EngineConfig, loaded: LoadedModel, store: KVStore, runner: ModelRunner) -> None:
    """Run a step of each kind, over block 0 of the tier, which nothing uses yet. Raises what steps raise.

    Of a model with compiled layers it says in the log how many forwards, those that were recorded included, ran by them.
    """
    store.storage[0].zero_()
    longest = min(longest_context(config, loaded), store.num_blocks * store.chunk_size)
    recorded, runner.prompt_graphs = runner.prompt_graphs, StepGraphs()  # those ran when they were recorded
    for segments in kinds_of_steps(config, longest).values():
        step = step_of(segments, SamplingParams(temperature=0.0), store.chunk_size)
        runner.execute(step)
        runner.execute(end_of(step))
    runner.prompt_graphs = recorded
    if loaded.has_compiled_layers:
        num_compiled = runner.num_forwards - runner.num_eager_forwards
        level = logging.INFO if runner.num_eager_forwards == 0 else logging.WARNING
        logger.log(
            level, "compiled layers: %d of %d forwards before the first request", num_compiled, runner.num_forwards
        )
