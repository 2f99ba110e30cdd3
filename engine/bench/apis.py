"""The APIs that a load goes through: what is sent for a turn, and what comes back piece by piece.

A conversation keeps what its next request needs. With `chat` and `responses` that is all messages; with `responses-stored`
the server keeps them; `completions` sends the token ids of everything, for which answers have to tell theirs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.workloads.conversations import text_of
from engine.workloads.session import Session, Span, Turn
from engine.workloads.tokens import TokenContext, random_tokens, random_words

Json = dict[str, Any]
# By name: the path, and what the most tokens of an answer are called.
APIS = {
    "chat": ("/chat/completions", "max_tokens"),
    "completions": ("/completions", "max_tokens"),
    "responses": ("/responses", "max_output_tokens"),
    "responses-stored": ("/responses", "max_output_tokens"),
}
CHAT_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Content:
    """What stands in for tokens that have no text.

    seed: another one gives other words, so that no cache serves two runs.
    mark: put in front of sessions that have a text, for the same reason; empty = nothing.
    first_token_id, vocab_size: ids of `completions`; nearly all models have these, and no special tokens among them.
    """

    seed: int = 0
    mark: str = ""
    first_token_id: int = 100
    vocab_size: int = 1000

    def words(self, span: Span) -> str:
        return random_words(span, self.seed)

    def token_ids(self, span: Span) -> list[int]:
        return random_tokens(span, self.vocab_size, self.first_token_id, self.seed)


@dataclass(slots=True)
class Heard:
    """What an answer has said so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    response_id: str = ""
    finish_reason: str = ""
    usage: Json = field(default_factory=dict)
    error: str = ""
    num_cached_tokens: int | None = None

    def say(self, piece: Any) -> bool:
        """Whether this is a piece of the answer."""
        if not isinstance(piece, str) or not piece:
            return False
        self.text.append(piece)
        return True


class Conversation(Protocol):
    """One session in one API."""

    def ask(self, turn: Turn) -> Json:
        """The fields of the next request that say what is asked."""

    def hear(self, chunk: Json, heard: Heard) -> bool:
        """Take one event of the stream. Whether it has a piece of the answer."""

    def keep(self, turn: Turn, heard: Heard) -> None:
        """The answer is complete: it is part of the context now."""


def make_conversation(api: str, session: Session, content: Content) -> Conversation:
    """api: one of APIS."""
    if api == "completions":
        return TokenConversation(session, content)
    if api == "chat":
        return ChatConversation(session, content)
    return ResponsesConversation(session, content, is_stored=api == "responses-stored")


class _Messages:
    """The messages of a session, with words where it has no text."""

    def __init__(self, session: Session, content: Content) -> None:
        # A recorded prompt stands in place of the conversation before it, also of the answers that were heard.
        self._is_recorded = any(turn.keep_tokens is not None for turn in session.turns)
        self._content = content
        self._spans: list[Span] = []
        self.all: list[Json] = []
        self.new: list[Json] = []

    def add(self, turn: Turn) -> None:
        """`new` are those of the turn then."""
        if self._is_recorded:
            self._spans = [*first_spans(self._spans, turn.keep_tokens), *turn.new]
            self.all.clear()
            self.new = [{"role": "user", "content": self._words(self._spans)}]
        elif turn.messages:
            said = [(each.role if each.role in CHAT_ROLES else "user", text_of(each)) for each in turn.messages]
            if not self.all and self._content.mark:
                said[0] = (said[0][0], f"{self._content.mark} {said[0][1]}")
            self.new = [{"role": role, "content": text} for role, text in said]
        else:
            # What a session begins with is its system prompt, if it says more than that.
            *before, last = turn.new
            system = [{"role": "system", "content": self._words(before)}] if before and not self.all else []
            said_last = self._words([last] if system else turn.new)
            self.new = [*system, {"role": "user", "content": said_last}]
        self.all += self.new

    def add_answer(self, heard: Heard) -> None:
        if not self._is_recorded:
            self.all.append({"role": "assistant", "content": "".join(heard.text)})

    def _words(self, spans: Sequence[Span]) -> str:
        return " ".join(map(self._content.words, spans))


class ChatConversation:
    """Chat completions: all messages each time."""

    def __init__(self, session: Session, content: Content) -> None:
        self._messages = _Messages(session, content)

    def ask(self, turn: Turn) -> Json:
        self._messages.add(turn)
        return {"messages": self._messages.all}

    def hear(self, chunk: Json, heard: Heard) -> bool:
        is_piece = False
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            is_piece |= heard.say(delta.get("content"))
            # Thinking and calls are generated tokens, too.
            is_piece |= bool(delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"))
            heard.finish_reason = choice.get("finish_reason") or heard.finish_reason
        take_usage(chunk, heard)
        return is_piece

    def keep(self, turn: Turn, heard: Heard) -> None:
        self._messages.add_answer(heard)


class ResponsesConversation:
    """Responses: all items each time, or only the new ones if the server keeps the others."""

    def __init__(self, session: Session, content: Content, *, is_stored: bool) -> None:
        self._messages = _Messages(session, content)
        self._is_stored = is_stored
        self._previous = ""

    def ask(self, turn: Turn) -> Json:
        self._messages.add(turn)
        if not self._is_stored:
            return {"input": self._messages.all, "store": False}
        previous = {"previous_response_id": self._previous} if self._previous else {}
        return {"input": self._messages.new, "store": True, **previous}

    def hear(self, chunk: Json, heard: Heard) -> bool:
        kind = str(chunk.get("type", ""))
        response = chunk.get("response") or {}
        heard.response_id = response.get("id") or heard.response_id
        if kind in ("response.completed", "response.incomplete"):
            reason = (response.get("incomplete_details") or {}).get("reason", "incomplete")
            heard.finish_reason = "stop" if kind == "response.completed" else str(reason)
            take_usage(response, heard)
        elif kind in ("response.failed", "error"):
            heard.error = heard.error or str((response.get("error") or chunk).get("message") or kind)
        elif kind.endswith(".delta"):
            is_text = kind == "response.output_text.delta"
            return heard.say(chunk.get("delta")) if is_text else bool(chunk.get("delta"))
        return False

    def keep(self, turn: Turn, heard: Heard) -> None:
        self._previous = heard.response_id
        self._messages.add_answer(heard)


class TokenConversation:
    """Completions of token ids: all of them each time."""

    def __init__(self, session: Session, content: Content) -> None:
        self._context = TokenContext(content.token_ids)
        self._content = content
        self._session_id = session.session_id
        self._num_turns = 0

    def ask(self, turn: Turn) -> Json:
        return {"prompt": list(self._context.ask(turn))}

    def hear(self, chunk: Json, heard: Heard) -> bool:
        is_piece = False
        for choice in chunk.get("choices") or ():
            token_ids = choice.get("token_ids")
            if isinstance(token_ids, list):
                heard.token_ids += token_ids
            is_piece |= heard.say(choice.get("text")) or bool(token_ids)
            heard.finish_reason = choice.get("finish_reason") or heard.finish_reason
        take_usage(chunk, heard)
        return is_piece

    def keep(self, turn: Turn, heard: Heard) -> None:
        """If the server does not tell the ids of its answer, others stand for it, which no cache can have."""
        self._num_turns += 1
        answer = Span(zlib.crc32(f"{self._session_id}.{self._num_turns}".encode()), len(heard.text))
        self._context.add_answer(heard.token_ids or self._content.token_ids(answer))


def first_spans(spans: Sequence[Span], num_tokens: int | None) -> list[Span]:
    """The spans of the first tokens; None = all of them."""
    if num_tokens is None:
        return list(spans)
    kept = []
    for span in spans:
        if num_tokens <= 0:
            break
        kept.append(Span(span.stream, min(span.num_tokens, num_tokens), span.start))
        num_tokens -= span.num_tokens
    return kept


def take_usage(chunk: Json, heard: Heard) -> None:
    """From the chunk that has it: OpenAI's `usage`, or llama.cpp's `timings`, which also tell what was cached."""
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        heard.usage = usage
    timings = chunk.get("timings")
    if isinstance(timings, dict) and isinstance(timings.get("cache_n"), int):
        heard.num_cached_tokens = timings["cache_n"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens as a server counts them; None if it does not say."""

    num_prompt_tokens: int | None
    num_output_tokens: int | None
    num_cached_tokens: int | None
    cached_by: tuple[tuple[str, int], ...]


def counts_of(heard: Heard) -> Counts:
    usage = heard.usage
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens")
    by = details.get("cached_tokens_by_tier") or {}
    return Counts(
        _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
        heard.num_cached_tokens if cached is None else _count(cached),
        tuple((str(name), value) for name, value in by.items() if isinstance(value, int)),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None
