"""A request is one turn: a context to complete and how to sample.

It carries the scheduler's and the cache manager's state of that turn; it decides nothing itself.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine.core.cache.index import Chunk
from engine.core.grammar import GrammarSpec
from engine.core.phases import PhaseTimeline
from engine.core.retention import Miss, RetentionHint, RetentionOutcome
from engine.core.reuse import NO_REUSE, Reuse
from engine.core.thinking import ThinkingLimit
from engine.errors import InvalidParameterError

if TYPE_CHECKING:
    from engine.core.plan import Logprobs

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024


class RequestStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED, with two detours.

    RUNNING -> SUSPENDED -> RUNNING: preempted, because decodes run out of blocks or another tenant's request is due.
    WAITING or SUSPENDED -> LOADING -> the same again: its turn had come, and it waits for chunks from a slow tier.
    """

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    SUSPENDED = "suspended"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why an answer ended, in the words of OpenAI's API."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `temperature=0` is greedy. Raises InvalidParameterError, which names the parameter.

    max_tokens: most tokens to generate; None = what the window leaves. top_k=0, top_p=1 and min_p=0 switch those
    filters off. seed: makes sampling repeatable, per position, so that a resumed request repeats itself; None = the
    engine draws one. logprobs: how many alternatives to report for each token; 0 = only the chosen one's, None = none.
    prompt_logprobs: the same for each token of the prompt but the first, for which the prompt is computed anew.
    stop: at most MAX_STOP_STRINGS strings of at most MAX_STOP_CHARS characters that end the answer (not part of it).
    stop_token_ids: at most MAX_STOP_TOKEN_IDS. min_tokens: end-of-sequence and stop ids are barred before. logit_bias: at
    most MAX_LOGIT_BIAS pairs (token id, what is added to its logit, -100 to 100), before penalties and temperature.
    grammar: what a complete answer has to match; it ends as soon as it can only end, so min_tokens and ignore_eos
    contradict it.
    max_thinking_tokens: after so many tokens of thinking its end is forced, in a chat with a model whose thinking is known;
    None = no limit. thinking_limit: the same as the engine fits it to the answer; nothing for callers.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: GrammarSpec | None = None
    max_thinking_tokens: int | None = None
    thinking_limit: ThinkingLimit | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, must: str) -> None:
            if not ok:
                raise InvalidParameterError(f"{name} must be {must}, got {getattr(self, name)!r}", param=name)

        def check_len(length: int, most: int, name: str, of_what: str) -> None:
            if length > most:  # the value itself may be megabytes
                raise InvalidParameterError(f"{name} must be at most {most} {of_what}, got {length}", param=name)

        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            check(math.isfinite(getattr(self, name)), name, "a finite number")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        check(self.max_thinking_tokens is None or self.max_thinking_tokens >= 0, "max_thinking_tokens", "at least 0")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(self.top_k >= 0, "top_k", "at least 0 (0 = off)")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        check_len(len(self.stop), MAX_STOP_STRINGS, "stop", "strings")
        check_len(max(map(len, self.stop), default=0), MAX_STOP_CHARS, "stop", "characters each")
        check(all(self.stop), "stop", "non-empty strings")
        check_len(len(self.stop_token_ids), MAX_STOP_TOKEN_IDS, "stop_token_ids", "token ids")
        check(all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", "token ids (at least 0)")
        check(self.grammar is None or self.min_tokens == 0, "min_tokens", "0 with a grammar, which says where to end")
        check(
            self.grammar is None or not self.ignore_eos, "ignore_eos", "false with a grammar, which says where to end"
        )
        for name in ("logprobs", "prompt_logprobs"):
            num = getattr(self, name)
            check(num is None or 0 <= num <= MAX_LOGPROBS, name, f"0 to {MAX_LOGPROBS}")
        check_len(len(self.logit_bias), MAX_LOGIT_BIAS, "logit_bias", "token ids")
        check(
            len(dict(self.logit_bias)) == len(self.logit_bias) and all(i >= 0 for i, _ in self.logit_bias),
            "logit_bias",
            "different token ids (at least 0)",
        )
        check(all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias), "logit_bias", "numbers between -100 and 100")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_token_ids(self) -> bool:
        """Whether choosing a token takes the ones before it."""
        return self.has_penalties or self.grammar is not None or self.thinking_limit is not None


class ContextAccount(NamedTuple):
    """Prompt tokens that an admission did not find in the tier that computes.

    loaded_tokens: loaded from other tiers, by the tier's name.
    num_not_loaded_tokens: there, too, but cheaper to compute again.
    num_dropped_tokens: in full chunks that were cached once and are gone.
    """

    loaded_tokens: Mapping[str, int] = {}
    num_not_loaded_tokens: int = 0
    num_dropped_tokens: int = 0


class Request:
    """One turn of a conversation, and its state between arrival and end.

    Each field that changes has one owner.

    The engine core's: token_ids, the context, prompt first, then what was generated; arrival_s, first_token_s,
    max_total_tokens, num_computed_tokens, num_scored, prompt_logprobs; num_guessed_tokens, that steps have verified, and
    num_accepted_tokens, of these; and `pending` from the first step on.
    num_scored: how many positions of the prompt, from the first one on, have said how probable the tokens behind them are;
        prompt_logprobs, what they said, until it is given out.
    pending: ranges [start, end) of positions that are still to compute, in order, holes included; a decoding request has
        exactly its last token pending. The cache manager sets it when it admits the request.

    The cache manager's: chunk_keys; chunks, its row of pinned chunks, front first, empty unless it runs; account, of the last
    admission; misses, of the first one, if they were asked for; loads, the names of the chunks that were tried to load from
    slow tiers since, with the tier.

    The scheduler's: status, num_suspensions; num_known_tokens, its length when the worker was last told of it, at the last
    admission or behind guesses, after which the worker has sampled itself; load_deadline_s, until when it may wait for slow
    tiers; and the counts of cached, loaded, not loaded and dropped tokens, and of the cached ones by tier, of the first
    admission. It clears `loads` when the request starts.

    phases, where its time goes, is of the core, which tells it of the first and the last one, and of the scheduler.

    The caller's: reuse, what is known of the next use of its context, and retention; both may change until the request ends.
    retention_outcome, of the hint, is the cache manager's, and is there when the request has ended.
    """

    __slots__ = (
        "account",
        "adapter",
        "arrival_s",
        "cached_by_tier",
        "chunk_keys",
        "chunks",
        "conversation_id",
        "explains_misses",
        "first_token_s",
        "is_prewarm",
        "is_refill",
        "load_deadline_s",
        "loads",
        "max_total_tokens",
        "misses",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_dropped_tokens",
        "num_guessed_tokens",
        "num_known_tokens",
        "num_loaded_tokens",
        "num_not_loaded_tokens",
        "num_prompt_tokens",
        "num_scored",
        "num_suspensions",
        "pending",
        "phases",
        "prompt_logprobs",
        "request_id",
        "retention",
        "retention_outcome",
        "reuse",
        "sampling",
        "status",
        "stop_token_ids",
        "tenant",
        "token_ids",
        "weight",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        conversation_id: str | None = None,
        tenant: str = "local",
        adapter: str = "",
        weight: float = 1.0,
        eos_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
        chunk_keys: Sequence[bytes] = (),
        reuse: Reuse = NO_REUSE,
        retention: RetentionHint | None = None,
        is_prewarm: bool = False,
        is_refill: bool = False,
        explains_misses: bool = False,
    ) -> None:
        """A request that has not arrived yet.

        conversation_id: None = a conversation of its own.
        output_token_ids: the beginning of the answer, if another engine has generated it and the rest is wanted.
        adapter: the identity of the weights that are added to the model's; "" = the model alone. KV of one adapter is never
            used with another.
        weight: the tenant's share, relative to others.
        chunk_keys: of its first full chunks, as far as they are known: those of a request with the same model, adapter,
            tenant, chunk size and beginning. They are not made again.
        reuse: what is known of the next use of its context. Times count from the request's end.
        is_prewarm: nothing is generated: the context is only brought to the tier that computes, while no other request runs
            or waits. is_refill: that, by the engine itself: it is no use of the chunks, and only new ones get its `reuse`.
        explains_misses: it is to be noted why tokens were not cached.
        retention: what its client wants to be kept of it; counts for more than reuse.
        """
        self.request_id = request_id
        self.conversation_id = conversation_id if conversation_id is not None else request_id
        self.tenant = tenant
        self.adapter = adapter
        self.weight = weight
        self.reuse = reuse
        self.retention = retention
        self.is_prewarm = is_prewarm or is_refill
        self.is_refill = is_refill
        self.explains_misses = explains_misses
        self.misses: tuple[Miss, ...] = ()
        self.retention_outcome: RetentionOutcome | None = None
        self.token_ids = [*prompt_token_ids, *output_token_ids]
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling = sampling
        eos = () if sampling.ignore_eos else tuple(eos_token_ids)
        self.stop_token_ids = frozenset(eos + sampling.stop_token_ids)
        self.status = RequestStatus.WAITING
        self.arrival_s = 0.0
        self.first_token_s: float | None = None
        self.phases = PhaseTimeline()
        self.max_total_tokens = 0
        self.chunks: list[Chunk] = []
        self.chunk_keys = list(chunk_keys)
        self.pending: list[tuple[int, int]] = []
        self.num_cached_tokens = 0
        self.cached_by_tier: Mapping[str, int] = {}
        self.num_loaded_tokens = 0
        self.num_not_loaded_tokens = 0
        self.num_dropped_tokens = 0
        self.num_known_tokens = 0
        self.num_computed_tokens = 0
        self.num_scored = 0
        self.num_guessed_tokens = 0
        self.num_accepted_tokens = 0
        self.prompt_logprobs: list[Logprobs] = []
        self.num_suspensions = 0
        self.account = ContextAccount()
        self.loads: dict[bytes, str] = {}
        self.load_deadline_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        """Prompt tokens that are not known to have been cached."""
        return self.num_prompt_tokens - self.num_cached_tokens - self.num_not_loaded_tokens - self.num_dropped_tokens

    @property
    def unscored(self) -> range:
        """Positions of the prompt that have to be computed for their logits, whatever is cached of them."""
        if self.sampling.prompt_logprobs is None:
            return range(0)
        return range(self.num_scored, self.num_prompt_tokens - 1)

    @property
    def num_pending_tokens(self) -> int:
        return sum(end - start for start, end in self.pending)

    def __repr__(self) -> str:
        return f"Request({self.request_id}, {self.status.value}, {self.num_tokens} tokens, pending {self.pending})"


def without_front(ranges: Sequence[tuple[int, int]], num_tokens: int) -> list[tuple[int, int]]:
    """Ascending ranges [start, end) without their first `num_tokens` positions."""
    rest = []
    for start, end in ranges:
        num_dropped = min(num_tokens, end - start)
        num_tokens -= num_dropped
        if start + num_dropped < end:
            rest.append((start + num_dropped, end))
    assert not num_tokens, "more than there is"
    return rest
