"""What the engine streams to whoever asked: text as it becomes complete, with its tokens. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.stats import RequestStats
from engine.text.transcript import Transcript


class TokenLogprob(NamedTuple):
    """A token with its natural-log probability. (A tuple, as up to 21 are made per token and travel between processes.)

    token_bytes: what it adds to the text, maybe a part of a character; None for a special token, which is no text.
    text: these bytes, those that are no UTF-8 as \\xNN; of a special token, its name.
    text_offset: characters of the answer before the one that it begins in.
    top: the most probable tokens in its place, best first, without alternatives of their own.
    """

    token_id: int
    text: str
    token_bytes: bytes | None
    logprob: float
    text_offset: int = 0
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What is new of one answer. Concatenated `text` and `token_ids` of all deltas are the answer; the counts are totals.

    text may lag behind token_ids: a character may take several tokens, and a text that could begin a stop string is held
    back. finish_reason ("stop", "length") ends the stream; `stats` come with it, and in a conversation the
    `transcript`: all that was said in it, as it was computed. Only in the first delta: prompt_token_ids, and
    prompt_transcript, where the conversation knew tokens of the prompt which tokenising its text may not give.
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
    prompt_transcript: Transcript | None = None


def merge_deltas(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """One delta that says what several consecutive ones said. At least one is needed."""
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
        num_output_tokens=last.num_output_tokens,
        finish_reason=last.finish_reason,
        stats=last.stats,
        transcript=last.transcript,
        prompt_transcript=deltas[0].prompt_transcript,
    )
