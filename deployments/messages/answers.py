"""The answers of Anthropic's Messages API, made from OutputDeltas: whole, or as events.

A whole answer is put together from the events that its stream would have, so that the two cannot differ. Knows no engine
and no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic_core import from_json

from deployments.generation import ErrorItem
from deployments.http.answer_reader import AnswerReader, made_call_id
from deployments.http.cache_details import cache_details, hint_report, message_diagnostics, written_spans
from deployments.http.cache_hints import TTL_S
from deployments.http.event_stream import sse_event
from deployments.http.explanations import explanation_field
from deployments.http.prediction_details import prediction_details
from deployments.messages.errors import error_body
from deployments.messages.requests import MessagesBody
from deployments.messages.signatures import signature
from engine.dialogue.events import Arguments, CallCut, CallEnd, CallStart, Event, Reasoning, Text
from engine.text.output import OutputDelta

CALL_PREFIX = "toolu_"
# What of its block a piece goes on with.
PIECES = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


def message_usage(delta: OutputDelta) -> dict[str, Any]:
    """The prompt's tokens in three counts, whose sum is all of them.

    What was computed of the part that is marked for the cache counts as written to it, by the time that it is to be kept.
    """
    written = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
    for span, num_tokens in written_spans(delta):
        written[f"ephemeral_{'5m' if (span.ttl_s or 0) < TTL_S['1h'] else '1h'}_input_tokens"] += num_tokens
    num_written = sum(written.values())
    usage: dict[str, Any] = {
        "input_tokens": delta.num_prompt_tokens - delta.num_cached_tokens - num_written,
        "cache_creation_input_tokens": num_written,
        "cache_read_input_tokens": delta.num_cached_tokens,
        "output_tokens": delta.num_output_tokens,
    }
    if delta.hint is not None:
        usage["cache_creation"] = written
    predicted = prediction_details([delta])
    if delta.num_reasoning_tokens or predicted:  # Anthropic's client takes it that thinking_tokens is always in it
        usage["output_tokens_details"] = {"thinking_tokens": delta.num_reasoning_tokens, **predicted}
    return usage | cache_details([delta]) | hint_report([delta]) | explanation_field(delta)


class MessageFormat:
    """One message, whole or as events. See EventFormat."""

    def __init__(self, answer_id: str, request_id: str, body: MessagesBody) -> None:
        self._answer_id = answer_id
        self._request_id = request_id
        self._body = body
        self._reader = AnswerReader(body.offered_tools)
        self._is_first = True
        self._num_blocks = 0  # begun so far
        self._open = ""  # the type of the block that goes on, if any
        self._thoughts: list[str] = []  # in that block

    def whole(self, delta: OutputDelta) -> dict[str, Any]:
        """The message."""
        return {
            **self._head(delta),
            "content": _folded(self._block_events(delta)),
            "stop_reason": self._stop_reason(delta),
            "stop_sequence": delta.stop_string,
        }

    async def events(self, delta: OutputDelta) -> str:
        """See EventFormat.events."""
        told: list[dict[str, Any]] = []
        if self._is_first:
            self._is_first = False
            told.append({"type": "message_start", "message": self._head(delta)})
        told += self._block_events(delta)
        if delta.finish_reason is not None:
            ended = {"stop_reason": self._stop_reason(delta), "stop_sequence": delta.stop_string}
            told.append({"type": "message_delta", "delta": ended, "usage": message_usage(delta)})
            told.append({"type": "message_stop"})
        return "".join(sse_event(event, event["type"]) for event in told)

    async def error(self, error: ErrorItem) -> str:
        """See EventFormat.error."""
        return sse_event(error_body(error, self._request_id), "error")

    def _head(self, delta: OutputDelta) -> dict[str, Any]:
        """A message of which nothing is said yet."""
        return {
            "id": self._answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": message_usage(delta),
            **({} if delta.comparison is None else {"diagnostics": message_diagnostics(delta.comparison)}),
        }

    def _stop_reason(self, delta: OutputDelta) -> str:
        """Clients make the calls of an answer that ends with "tool_use": all of them have to be whole."""
        if not self._body.max_tokens:
            return "max_tokens"
        if delta.stop_string is not None:
            return "stop_sequence"
        if delta.finish_reason == "length":
            is_full = delta.num_output_tokens < self._body.max_tokens
            return "model_context_window_exceeded" if is_full else "max_tokens"
        return "tool_use" if self._reader.has_calls and not self._reader.is_cut else "end_turn"

    def _block_events(self, delta: OutputDelta) -> Iterator[dict[str, Any]]:
        """What is new in the content. The delta with a finish_reason also ends the last block."""
        for event in self._reader.read(delta) if self._body.max_tokens else ():
            yield from self._told(event)
        if delta.finish_reason is not None:
            yield from self._close()

    def _told(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Text(text):
                yield from self._begin("text", text="")
                yield self._piece("text_delta", text)
            case Reasoning(text):
                yield from self._begin("thinking", thinking="", signature="")
                self._thoughts.append(text)
                if not self._body.omits_thinking:
                    yield self._piece("thinking_delta", text)
            case CallStart(index, name, call_id):
                yield from self._close()
                call_id = call_id or made_call_id(self._answer_id, index, CALL_PREFIX)
                yield from self._begin("tool_use", id=call_id, name=name, input={})
            case Arguments(_, text):
                yield self._piece("input_json_delta", text)
            case CallEnd() | CallCut():
                yield from self._close()

    def _begin(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Begins a block of this type, unless one goes on."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._num_blocks += 1
        block = {"type": kind, **fields}
        yield {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}

    def _piece(self, kind: str, text: str) -> dict[str, Any]:
        delta = {"type": kind, PIECES[kind]: text}
        return {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        if self._open == "thinking":
            yield self._piece("signature_delta", signature("".join(self._thoughts), self._body.model))
            self._thoughts.clear()
        self._open = ""
        yield {"type": "content_block_stop", "index": self._num_blocks - 1}


def _folded(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that these events make, as clients put them together."""
    blocks: list[dict[str, Any]] = []
    pieces: dict[str, list[str]] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            name = PIECES[event["delta"]["type"]]
            pieces.setdefault(name, []).append(event["delta"][name])
        else:
            texts = {name: "".join(some) for name, some in pieces.items()}
            is_call = blocks[-1]["type"] == "tool_use"
            blocks[-1] |= {"input": _arguments(texts.get("partial_json", ""))} if is_call else texts
            pieces.clear()
    return blocks


def _arguments(text: str) -> dict[str, Any]:
    """The object that a call's arguments stand for, as far as they got."""
    try:
        value = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
