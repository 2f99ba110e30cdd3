"""Our own JSONL: a session a line, with all that a Session says.

By hand, `text` or `new_tokens` do for what a turn appends:
{"session_id": "ada", "turns": [{"text": "hello", "output_tokens": 9}, {"new_tokens": 20, "output_tokens": 9, "pause_s": 5}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.dialogue.messages import Message, ToolCall
from engine.workloads.conversations import estimate_tokens, text_of
from engine.workloads.records import MAX_TOKENS, MAX_TURNS, Record, read_jsonl
from engine.workloads.session import Session, Span, Turn

_MAX_STREAM = 2**32 - 1
# Streams of turns that say `new_tokens` or `text` only: from the top down, so that they meet none that a file names.
_FIRST_PRIVATE_STREAM = _MAX_STREAM


def read_sessions(path: Path, count_tokens: Callable[[str], int] = estimate_tokens) -> Iterator[Session]:
    """Raises WorkloadError."""
    streams: dict[str, int] = {}
    for number, record in enumerate(read_jsonl(path)):
        records = record.records("turns")
        if not 1 <= len(records) <= MAX_TURNS:
            record.fail(f"'turns' must hold 1 to {MAX_TURNS} turns, got {len(records)}")
        session_id = record.text("session_id", f"session-{number}")
        turns, num_used = [], 0
        for each in records:
            turn = _turn(each, session_id, num_used, streams, count_tokens)
            num_used += turn.new_tokens
            turns.append(turn)
        yield Session(session_id, tuple(turns), record.seconds("start_s"), record.text("tenant", ""))


def write_sessions(sessions: Iterable[Session], path: Path) -> None:
    with path.open("w") as file:
        for session in sessions:
            fields = {
                "session_id": session.session_id,
                "start_s": session.start_s,
                "tenant": session.tenant,
                "turns": [_fields(turn) for turn in session.turns],
            }
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _turn(
    record: Record, session_id: str, num_used: int, streams: dict[str, int], count_tokens: Callable[[str], int]
) -> Turn:
    def stream_of(key: str) -> int:
        return streams.setdefault(key, _FIRST_PRIVATE_STREAM - len(streams))

    messages: tuple[Message, ...] = ()
    if record.has("messages"):
        messages = tuple(_message(each) for each in record.records("messages"))
    elif record.has("text"):
        messages = (Message("user", record.text("text")),)
    if record.has("new"):
        new = tuple(_span(record, value) for value in record.items("new"))
    elif messages:
        new = tuple(Span(stream_of(f"t{text_of(each)}"), max(1, count_tokens(text_of(each)))) for each in messages)
    elif record.has("new_tokens"):
        new = (Span(stream_of(f"s{session_id}"), record.integer("new_tokens", 1), num_used),)
    else:
        record.fail("a turn needs 'text', 'messages', 'new_tokens' or 'new', which say what it appends")
    kind = record.text("kind", "user")
    if kind not in ("user", "tool"):
        record.fail(f'\'kind\' must be "user" or "tool", got {kind!r}')
    answer = _message(record.record("answer")) if record.has("answer") else None
    if answer is not None and not record.has("output_tokens"):
        output_tokens = max(1, count_tokens(text_of(answer)))
    else:
        output_tokens = record.integer("output_tokens", 1)
    return Turn(
        new,
        output_tokens,
        record.seconds("pause_s"),
        "tool" if kind == "tool" else "user",
        record.text("tool", ""),
        record.integer("keep_tokens", 0) if record.has("keep_tokens") else None,
        messages,
        answer,
        record.integer("answer_stream", 0, _MAX_STREAM) if record.has("answer_stream") else None,
    )


def _span(record: Record, value: Any) -> Span:
    limits = (_MAX_STREAM, MAX_TOKENS, MAX_TOKENS)
    is_row = isinstance(value, list) and 2 <= len(value) <= 3
    if not is_row or not all(
        type(each) is int and 0 <= each <= limit for each, limit in zip(value, limits, strict=False)
    ):
        record.fail(
            "'new' must be a list of [stream, number of tokens] or [stream, number of tokens, start], whole numbers"
        )
    return Span(*value)


def _message(record: Record) -> Message:
    calls = record.records("tool_calls") if record.has("tool_calls") else []
    return Message(
        record.text("role", "user"),
        record.text("content", ""),
        tool_calls=tuple(
            ToolCall(each.text("name"), each.text("arguments", "{}"), each.text("id", "")) for each in calls
        ),
        tool_call_id=record.text("tool_call_id", ""),
        name=record.text("name", ""),
    )


def _fields(turn: Turn) -> dict[str, Any]:
    """What differs from the default, so that a million lines stay short."""
    fields: dict[str, Any] = {
        "new": [[span.stream, span.num_tokens, *([span.start] if span.start else [])] for span in turn.new],
        "output_tokens": turn.output_tokens,
    }
    for name in ("pause_s", "tool"):
        if getattr(turn, name):
            fields[name] = getattr(turn, name)
    if turn.kind != "user":
        fields["kind"] = turn.kind
    for name in ("keep_tokens", "answer_stream"):
        if getattr(turn, name) is not None:
            fields[name] = getattr(turn, name)
    if turn.messages:
        fields["messages"] = [_message_fields(message) for message in turn.messages]
    if turn.answer is not None:
        fields["answer"] = _message_fields(turn.answer)
    return fields


def _message_fields(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments, "id": call.call_id} for call in message.tool_calls
        ]
    for name in ("tool_call_id", "name"):
        if getattr(message, name):
            fields[name] = getattr(message, name)
    return fields
