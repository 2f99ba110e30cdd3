"""What the engine streams: text as it becomes complete, with its tokens. Plain data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from engine.core.retention import Miss, RetentionHint, RetentionOutcome
from engine.core.stats import RequestStats
from engine.dialogue.formats import AnswerFormat
from engine.explanation import Explanation
from engine.text.comparisons import CacheComparison
from engine.text.transcript import Transcript


class TokenLogprob(NamedTuple):
    """A token with its natural-log probability.

    token_bytes: what it adds to the text, maybe a part of a character; None for a special token, which is no text.
    text: these bytes, those that are no UTF-8 as \\xNN; of a special token, its name.
    text_offset: characters of the answer before the one that it begins in.
    top: the most probable tokens in its place, best first, without alternatives of their own.

    It is a tuple, because up to 21 are made per token and travel between processes.
    """

    token_id: int
    text: str
    token_bytes: bytes | None
    logprob: float
    text_offset: int = 0
    top: tuple[TokenLogprob, ...] = ()


class PromptToken(NamedTuple):
    """A token of the prompt, with the probability that it had in its place.

    rank: among all tokens there, the most probable one being 1; 0 for the first token, which nothing predicted and whose
        log-probability means nothing.
    """

    token: TokenLogprob
    rank: int


@dataclass(frozen=True, slots=True)
class ToldPrompt:
    """What a client is told of its prompt.

    tokens: all of them, with offsets in the text; empty if their log-probabilities were not asked for.
    """

    text: str
    tokens: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What is new of one answer; concatenated, the deltas' `text` and `token_ids` are the answer.

    text: may lag behind token_ids: a character may take several tokens, and a text that could begin a stop string is
        held back.
    num_prompt_tokens, num_cached_tokens, num_output_tokens: totals so far.
    num_guessed_tokens: that were verified so far, and num_accepted_tokens, of these; see engine/core/speculation.py.
    misses: in the first delta, if they were asked for: why tokens of the prompt were computed.
    cached_by_tier: the cached ones by the tier that had them, the fastest first, without tiers that had none.
    num_reasoning_tokens: of the output so far, those of thinking and its end, in a chat.
    recomputed: (reason, tokens), if tokens of the prompt that the conversation had were computed again: see text/turns.py.
    finish_reason: "stop" or "length"; it ends the stream.
    stop_string: with the finish_reason, the stop string that ended the answer; None = none did.
    stats: the account of the request, with the finish_reason.
    transcript: with the finish_reason, if there is a conversation: all that was said in it, as it was computed.
    prompt_token_ids: in the first delta, if they were asked for.
    prompt_token_names: what the tokenizer calls these, if the prompt was to be spelled; `text` is theirs then.
    told_prompt: in the first delta, if it was asked for.
    prompt_transcript: in the first delta, if the conversation knew tokens of the prompt that tokenising its text may not
        give.
    answer_format: in the first delta, if it was asked for and the prompt is a chat: how the text is to be read.
    hint: what is to become of the context's KV, if anything was said of that. retention: with the finish_reason, what came
        of it, with a Unix time as its end. num_lost_marks: with that, how many marks have no place in the prompt.
    comparison: if the request was to be compared with an earlier one.
    explanation: with the finish_reason, how the answer came about, if that was asked for.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: str | None = None
    stats: RequestStats | None = None
    transcript: Transcript | None = None
    told_prompt: ToldPrompt | None = None
    prompt_transcript: Transcript | None = None
    answer_format: AnswerFormat | None = None
    num_reasoning_tokens: int = 0
    recomputed: tuple[str, int] | None = None
    stop_string: str | None = None
    prompt_token_names: tuple[str, ...] = ()
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)
    hint: RetentionHint | None = None
    retention: RetentionOutcome | None = None
    num_lost_marks: int = 0
    comparison: CacheComparison | None = None
    misses: tuple[Miss, ...] = ()
    num_guessed_tokens: int = 0
    num_accepted_tokens: int = 0
    explanation: Explanation | None = None


def with_unix_time(outcome: RetentionOutcome) -> RetentionOutcome:
    """The same with its end as Unix time: an engine's clock means nothing elsewhere."""
    if outcome.until_s is None:
        return outcome
    return replace(outcome, until_s=time.time() + outcome.until_s - time.monotonic())


def merge_deltas(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Several consecutive deltas, at least one, as a single one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return OutputDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        prompt_token_ids=deltas[0].prompt_token_ids,
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        cached_by_tier=last.cached_by_tier,
        num_output_tokens=last.num_output_tokens,
        num_reasoning_tokens=last.num_reasoning_tokens,
        recomputed=last.recomputed,
        finish_reason=last.finish_reason,
        stats=last.stats,
        transcript=last.transcript,
        told_prompt=deltas[0].told_prompt,
        prompt_transcript=deltas[0].prompt_transcript,
        answer_format=deltas[0].answer_format,
        stop_string=last.stop_string,
        hint=last.hint,
        retention=last.retention,
        num_lost_marks=last.num_lost_marks,
        comparison=last.comparison,
        misses=deltas[0].misses,
        num_guessed_tokens=last.num_guessed_tokens,
        num_accepted_tokens=last.num_accepted_tokens,
        explanation=last.explanation,
    )
