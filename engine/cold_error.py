"""What it costs a model's answers that the cold tiers hold KV in fewer bits: measured at the start, on a text.

The text is computed as a whole, and again behind KV that was sent to the CPU tier and back. Both give the probability of each
token behind it. Uses an executor as the engine does, before the first request.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.core.executor_protocol import Executor
from engine.core.plan import BlockCopy, Logprobs, QuerySegment, RequestStart, StepPlan, StepResult
from engine.core.request import SamplingParams
from engine.core.scheduler import MAX_SCORED_ROWS
from engine.core.tier_table import CPU, GPU

logger = logging.getLogger(__name__)

# Chunks that go through the CPU tier.
MAX_CHUNKS = 8
TEXT = """\
The harbour of the old town lies between two hills. In the morning the boats come back with fish, and the market opens
before the sun is up. A baker from the lower street brings bread, a farmer brings apples, onions and eggs, and the
children buy sweets on their way to school. My grandmother, who was born in 1931, told me that in her youth there was
no bridge: whoever wanted to go to the other side had to call the ferryman, and paid him two coins. When the water was
high, he did not come. Then they waited in the inn at the landing, drank tea, and told each other stories until the
rain had stopped. Today the inn is a library. It has 12,000 books, four computers, and a reading room from which one
can see the whole bay. On Tuesdays a student reads to those who cannot see well any more, and on Fridays there is a
course in which people learn to write a letter to an office, to fill in a form, or to compute what a loan will cost
them. The library is open from nine to six. It is closed on Sundays, and in the two weeks before the new year. If you
want to borrow a book, you need a card, which is free for everybody who lives in the town. The harbour of the old town
lies between two hills, and in the morning the boats come back with fish.
"""


@dataclass(frozen=True, slots=True)
class ColdError:
    """How answers behind KV that went through the CPU tier differ from those behind exact KV.

    num_cold: tokens that went through it. num_scored: tokens behind them that were looked at.
    perplexity, cold_perplexity: of these, with exact and with restored KV.
    mean_difference, max_difference: of a token's log-probability, in nats.
    num_other_choices: how often another token was the most probable one.
    """

    num_cold: int
    num_scored: int
    perplexity: float
    cold_perplexity: float
    mean_difference: float
    max_difference: float
    num_other_choices: int

    def __str__(self) -> str:
        return (
            f"{self.num_scored} tokens behind {self.num_cold} restored ones have a perplexity of {self.cold_perplexity:.3f} "
            f"and not {self.perplexity:.3f}; log-probabilities differ by {self.mean_difference:.4f} on average and "
            f"{self.max_difference:.3f} at most; the most probable token is another one {self.num_other_choices} times"
        )


def measure_cold_error(
    executor: Executor, token_ids: Sequence[int], chunk_size: int, max_step_tokens: int
) -> ColdError | None:
    """None if there is no room: fewer tokens than two chunks, or no CPU tier.

    token_ids: of a text. max_step_tokens: that a step may compute. Uses the first blocks of both tiers, which nothing else
    may use meanwhile.
    """

    def run(plan: StepPlan) -> StepResult:
        return executor.submit(plan).result()  # in the executor's thread: torch's worker threads belong to it

    facts = executor.facts
    room = min(facts.num_gpu_blocks, facts.model.max_model_len // chunk_size, len(token_ids) // chunk_size)
    num_tail = min(MAX_SCORED_ROWS + 1, max_step_tokens, max(2, (room - 1) * chunk_size // 2)) if room > 1 else 0
    num_chunks = min(facts.num_cpu_blocks, MAX_CHUNKS, room - -(-num_tail // chunk_size))
    if num_chunks < 1 or num_tail < 2:
        return None
    num_cold = num_chunks * chunk_size
    context = tuple(token_ids[: num_cold + num_tail])
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1)
    table = tuple(range(-(-len(context) // chunk_size)))
    name = "cold error"
    start = RequestStart(name, len(context), len(context), sampling, (), table)
    begin: tuple[RequestStart, ...] = (start,)
    for first in range(0, num_cold, max_step_tokens):
        piece = context[first : min(first + max_step_tokens, num_cold)]
        run(StepPlan(0, (QuerySegment(name, first, piece),), begin))
        begin = ()
    tail = QuerySegment(name, num_cold, context[num_cold:], samples=True, targets=context[num_cold + 1 :])
    exact = run(StepPlan(0, (tail,))).prompt_logprobs
    copies = tuple((block, num_chunks - 1 - block) for block in range(num_chunks))
    run(StepPlan(0, (), swap_outs=tuple(BlockCopy(GPU, gpu, CPU, cpu) for gpu, cpu in copies)))
    back = tuple(BlockCopy(CPU, cpu, GPU, gpu) for gpu, cpu in copies)
    cold = run(StepPlan(0, (tail,), swap_ins=back)).prompt_logprobs
    run(StepPlan(0, (), ended=(name,)))
    return compare(exact, cold, num_cold)


def compare(exact: Sequence[Logprobs], cold: Sequence[Logprobs], num_cold: int) -> ColdError:
    """The same tokens twice. num_cold: tokens in front of the second ones that were restored."""
    pairs = list(zip(exact, cold, strict=True))
    differences = [abs(mine.chosen - other.chosen) for mine, other in pairs]
    return ColdError(
        num_cold=num_cold,
        num_scored=len(pairs),
        perplexity=math.exp(-sum(row.chosen for row in exact) / len(pairs)),
        cold_perplexity=math.exp(-sum(row.chosen for row in cold) / len(pairs)),
        mean_difference=sum(differences) / len(pairs),
        max_difference=max(differences),
        num_other_choices=sum(mine.top[0][0] != other.top[0][0] for mine, other in pairs),
    )


def log_cold_error(
    executor: Executor, token_ids: Sequence[int], chunk_size: int, max_step_tokens: int, kind: str
) -> None:
    """Measure it on a text, and say it in the log. kind: the option `kv_cold_dtype`."""
    error = measure_cold_error(executor, token_ids, chunk_size, max_step_tokens)
    saved = executor.facts.bytes_per_block / executor.facts.bytes_per_cold_block
    logger.info(
        "kv_cold_dtype %s is lossy, and %.2f times smaller than the GPU tier's blocks: %s",
        kind,
        saved,
        error or f"its error cannot be measured with chunks of {chunk_size} tokens, and so few blocks",
    )
