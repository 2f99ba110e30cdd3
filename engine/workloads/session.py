"""Sessions and their turns, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.dialogue.messages import Message

TurnKind = Literal["user", "tool"]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens: those from `start` on of a stream.

    A stream is an endless row of tokens with a number (0 <= stream < 2**32). Where spans of one stream overlap, their
    tokens are equal, in whatever session they stand: that is how a shared prefix is told.
    """

    stream: int
    num_tokens: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session, and the answer to it.

    new: what it appends to the context.
    output_tokens: of the answer.
    pause_s: from the end of the answer before until this is sent; of a first turn 0.
    kind: "user", or "tool" if the result of a call is sent. tool: the name of what was called, if it is known.
    keep_tokens: leading tokens of the context that stay in front of `new`; None = all of it, with the answer.
    messages: the text of `new`, if there is one.
    answer: the recorded answer, if there is one.
    answer_stream: of the recorded answer's tokens; for replays that put it, and not their own answer, into the context.
    """

    new: tuple[Span, ...]
    output_tokens: int
    pause_s: float = 0.0
    kind: TurnKind = "user"
    tool: str = ""
    keep_tokens: int | None = None
    messages: tuple[Message, ...] = ()
    answer: Message | None = None
    answer_stream: int | None = None

    @property
    def new_tokens(self) -> int:
        return sum(span.num_tokens for span in self.new)


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation.

    start_s: when its first turn is sent, from the beginning of the run.
    tenant: whose it is; sessions of different tenants share no cache.
    turns: at least one.
    """

    session_id: str
    turns: tuple[Turn, ...]
    start_s: float = 0.0
    tenant: str = ""

    @property
    def prompt_lens(self) -> list[int]:
        """Tokens of the prompt of each turn, if all answers have the length that they are to have."""
        lens, context_len = [], 0
        for turn in self.turns:
            kept = context_len if turn.keep_tokens is None else min(context_len, turn.keep_tokens)
            lens.append(kept + turn.new_tokens)
            context_len = lens[-1] + turn.output_tokens
        return lens

    @property
    def max_context_len(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(
            prompt_len + turn.output_tokens for prompt_len, turn in zip(self.prompt_lens, self.turns, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a workload is like. Lengths are means over turns; pauses leave out first turns."""

    num_sessions: int
    num_turns: int
    mean_turns: float
    mean_new_tokens: float
    mean_output_tokens: float
    mean_prompt_tokens: float
    mean_pause_s: float
    max_context_len: int

    @classmethod
    def of(cls, sessions: Iterable[Session]) -> Statistics:
        """Raises ValueError if there are no sessions."""
        num_sessions = num_turns = new = output = prompt = longest = 0
        pauses: list[float] = []
        for session in sessions:
            num_sessions += 1
            num_turns += len(session.turns)
            new += sum(turn.new_tokens for turn in session.turns)
            output += sum(turn.output_tokens for turn in session.turns)
            prompt += sum(session.prompt_lens)
            longest = max(longest, session.max_context_len)
            pauses += [turn.pause_s for turn in session.turns[1:]]
        if not num_sessions:
            raise ValueError("a workload without sessions has no statistics")
        return cls(
            num_sessions,
            num_turns,
            num_turns / num_sessions,
            new / num_turns,
            output / num_turns,
            prompt / num_turns,
            math.fsum(pauses) / len(pauses) if pauses else 0.0,
            longest,
        )


def shortened(sessions: Iterable[Session], max_context_len: int) -> list[Session]:
    """The sessions, each up to the last turn that fits a window; sessions whose first turn does not fit are left out."""
    kept = []
    for session in sessions:
        num_fitting = _num_fitting(session.prompt_lens, session.turns, max_context_len)
        if num_fitting == len(session.turns):
            kept.append(session)
        elif num_fitting:
            kept.append(Session(session.session_id, session.turns[:num_fitting], session.start_s, session.tenant))
    return kept


def _num_fitting(prompt_lens: Sequence[int], turns: Sequence[Turn], max_context_len: int) -> int:
    for number, (prompt_len, turn) in enumerate(zip(prompt_lens, turns, strict=True)):
        if prompt_len + turn.output_tokens > max_context_len:
            return number
    return len(turns)
