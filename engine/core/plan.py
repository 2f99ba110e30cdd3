"""What crosses between the core and an executor, as plain data: ints, strings, tuples.

It pickles to worker actors and compares in tests. What a step has many of is a tuple, because those are made fastest.

One step is told as a difference: a worker keeps the block table and the last sampled token of every request it was told to
start, until it is told that the request ended. A token that a worker sampled is never told back to it, so that a plan can be
made before the token is known. Example, chunk_size 4, a 10-token context of which chunk 1 is cached, and its first decode:

    starts    RequestStart("r1", num_tokens=10, block_table=(7, 3, 5), ...)
    segments  QuerySegment("r1", start=0, token_ids=(4 ids))                  positions 0..3, attends to 0..3
              QuerySegment("r1", start=8, token_ids=(2 ids), samples=True)    positions 8..9, attends to 0..9

    segments  QuerySegment("r1", start=10, token_ids=None, samples=True)      the token sampled above, attends to 0..10

If speculation is on, a decode may bring guesses at what follows; see speculation.py.

    segments  QuerySegment("r1", start=11, token_ids=(5, 8, 9), samples=True, num_guesses=2)      it chooses 3 tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.request import SamplingParams


class QuerySegment(NamedTuple):
    """Consecutive positions of one request that this step computes. Each attends causally to all before it.

    start: first position. token_ids: the tokens there, `query_len` of them; None: the one token that the request's previous
    segment with `samples` chose, since its last start. samples: the segment ends the context as it is known, so the logits
    of its last row choose the next token. targets: tokens of the prompt that follow the first so many rows, whose
    log-probabilities are wanted. num_guesses: of `token_ids`, the last so many are guesses at what the rows in front of them
    choose, to be verified: each of these rows chooses a token, too. With guesses, `samples` is set and all tokens are told;
    and so are those of the request's next segment, because what it goes on from is for the core to say.
    """

    request_id: str
    start: int
    token_ids: tuple[int, ...] | None
    samples: bool = False
    targets: tuple[int, ...] = ()
    num_guesses: int = 0

    @property
    def query_len(self) -> int:
        return 1 if self.token_ids is None else len(self.token_ids)

    @property
    def context_len(self) -> int:
        """Tokens that the last row attends to, itself included."""
        return self.start + self.query_len

    @property
    def guesses(self) -> tuple[int, ...]:
        return () if self.token_ids is None or not self.num_guesses else self.token_ids[-self.num_guesses :]

    @property
    def num_chosen(self) -> int:
        """Rows that choose a token."""
        return 1 + self.num_guesses if self.samples else 0

    def count_true(self, chosen: Sequence[int]) -> int:
        """How many of the guesses, the first ones, are what the rows in front of them have chosen.

        chosen: `num_chosen` tokens. Those behind the last true guess's next one mean nothing.
        """
        guesses = self.guesses
        return next((number for number, guess in enumerate(guesses) if guess != chosen[number]), len(guesses))


class RequestStart(NamedTuple):
    """A request that the worker is to know from this step on.

    num_tokens: of its context. num_prompt_tokens: of these, the first ones are the prompt.
    block_table: block ids of the tier that computes, in order of position.
    token_ids: the whole context if sampling needs it, for penalties or a grammar; else empty.
    adapter: the identity of a loaded adapter; "" = the model alone.
    """

    request_id: str
    num_tokens: int
    num_prompt_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    adapter: str = ""


class BlockAppend(NamedTuple):
    """A block that a started request got at the end of its block table."""

    request_id: str
    block_id: int


class BlockCopy(NamedTuple):
    """Copy block `source` of one tier to block `target` of another one, or of the same.

    source_tier, target_tier: names, see tier_table.
    num_tokens: leading tokens of the block that are valid, if it is stored; None = all.
    """

    source_tier: str
    source: int
    target_tier: str
    target: int
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRecord:
    """All that a tier has to keep with a block so that its chunk is found again after a restart.

    key: the chunk's name, which says all that the block has to hold; see index.chunk_key. parent_key: of the chunk before.
    position: number of the chunk in its context. num_tokens: leading tokens of the block that are valid.
    owner_id: the conversation that left it as its tail; None for other chunks.
    idle_s: since its last use, in seconds, when this was written.
    """

    key: bytes
    parent_key: bytes
    position: int
    num_tokens: int
    owner_id: str | None
    idle_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowTransfer:
    """Copy a block from or to a slow tier, beside the steps and for as long as it takes.

    Until its end is told, neither of its blocks is given to anything else.

    transfer_id: counts up; to tell its end by.
    record: which chunk it is.
    copy: from which block to which.
    """

    transfer_id: int
    record: ChunkRecord
    copy: BlockCopy

    @property
    def key(self) -> bytes:
        return self.record.key


@dataclass(frozen=True, slots=True)
class TransferEnd:
    """How a transfer of a slow tier has ended.

    ok: the target holds, whole and right, what the source held.
    seconds: what it took of the tier's time, without waiting; None = not measured.
    gone: not ok, but no fault of the tier: a peer no longer has the chunk, or is no longer there.
    """

    transfer_id: int
    ok: bool
    seconds: float | None = None
    gone: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, in this order; a plan without segments only copies.

    1. Forget `ended`; start `starts` and append `appends`.
    2. `evictions`: blocks that leave the tier that computes, to be written to later in this step.
    3. `local_copies`, within the tier that computes: every source is read before any target is written.
    4. `swap_ins`, to the tier that computes: a layer's KV has to be there when that layer attends.
    5. Run `segments` as one ragged batch; sample. Those of one request are in order of position, so that a dropped range
       is computed with or before what follows it.
    `swap_outs`, from the tier that computes and ahead of time, may run at any time beside 4 and 5.

    All of a plan's copies are between fast tiers, and finished when the step's result is given.
    """

    step_id: int
    segments: tuple[QuerySegment, ...]
    starts: tuple[RequestStart, ...] = ()
    appends: tuple[BlockAppend, ...] = ()
    ended: tuple[str, ...] = ()
    evictions: tuple[BlockCopy, ...] = ()
    local_copies: tuple[BlockCopy, ...] = ()
    swap_ins: tuple[BlockCopy, ...] = ()
    swap_outs: tuple[BlockCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(segment.query_len for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities in one place: of the token that stands there, and the largest ones [(token id, logprob)].

    rank: of that token among all, the most probable one being 1; 0 = not asked for.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    token_ids: `num_chosen` for each segment, in the order of the segments.
    logprobs: as many, None for those that did not ask; empty if none did.
    failed_swap_ins: target blocks to which a swap-in brought something else than was swapped out.
    prompt_logprobs: one for each target, in the order of the segments.
    failed_requests: (request id, reason) of those whose answers cannot go on within their grammars.
    swap_seconds: how long its copies between the fast tiers took, in and out, without waiting.
    """

    step_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs | None, ...] = ()
    failed_swap_ins: tuple[int, ...] = ()
    failed_requests: tuple[tuple[str, str], ...] = ()
    prompt_logprobs: tuple[Logprobs, ...] = ()
    swap_seconds: tuple[float, float] = (0.0, 0.0)
