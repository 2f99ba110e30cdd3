"""How answers are told in the Messages API: whole, in events however they are cut, and why they ended."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic_core import from_json

from deployments.errors import ReplicaLostError
from deployments.generation import ErrorItem
from deployments.messages.answers import MessageFormat
from deployments.messages.requests import MessagesBody
from deployments.messages.signatures import signature
from engine.core.retention import KeptSpan, RetentionHint, RetentionOutcome
from engine.dialogue.formats import CALL_FORMATS, AnswerFormat
from engine.dialogue.reasoning import THINK
from engine.text.comparisons import NOT_FOUND, CacheComparison, Difference, Loss
from engine.text.output import OutputDelta

TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("weather", "time")]
FORM = AnswerFormat(CALL_FORMATS["hermes"][0], THINK, "")
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city":  "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {"city": "a\\"b", "days": [1, 2.5]}}\n</tool_call>'
)
ANSWERS = {
    "calls": (CALLS, "stop"),
    "text behind a call": (f"{CALLS}\nDone.", "stop"),
    "no arguments": ('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', "stop"),
    "thinking": (f"<think>\nI wonder.\n</think>\n\n{CALLS}", "stop"),
    "thinking and text": ("<think>\nI wonder.\n</think>\n\nSunny.", "stop"),
    "text": ("Sunny.", "stop"),
    "nothing": ("", "stop"),
    "cut": (CALLS[:-25], "length"),
    "cut name": (CALLS[:35], "length"),
    "cut arguments": (CALLS[:66], "length"),
    "cut thinking": ("<think>\nI won", "length"),
    "malformed": ('<tool_call>\n{"name" "weather"}\n</tool_call> oh', "stop"),
}
END = {"num_prompt_tokens": 7, "num_cached_tokens": 3, "num_output_tokens": 5}


def make_format(**changes: Any) -> MessageFormat:
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "tools": TOOLS} | changes
    return MessageFormat("msg_1", "req_1", MessagesBody.model_validate(body))


def told_whole(text: str, reason: str, stop_string: str | None = None, **changes: Any) -> dict[str, Any]:
    delta = OutputDelta(text, finish_reason=reason, stop_string=stop_string, answer_format=FORM, **END)
    return make_format(**changes).whole(delta)


async def events_of(
    pieces: list[str], reason: str, firsts: tuple[int, ...] = (0,), **changes: Any
) -> list[dict[str, Any]]:
    """firsts: the pieces that are the first ones of a replica."""
    form = make_format(**changes)
    deltas = [
        OutputDelta(piece, answer_format=FORM if index in firsts else None, **END) for index, piece in enumerate(pieces)
    ]
    deltas.append(OutputDelta("", finish_reason=reason, answer_format=None if pieces else FORM, **END))
    told = "".join([await form.events(delta) for delta in deltas])
    events = []
    for block in told.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together. Checks the order of what comes."""
    assert [events[0]["type"], events[-2]["type"], events[-1]["type"]] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    message = events[0]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    message |= events[-2]["delta"] | {"usage": message["usage"] | events[-2]["usage"]}
    is_open, written = False, ""
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            is_open, written = True, ""
            continue
        assert is_open
        assert event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if written:
                assert block["type"] == "tool_use"
                block["input"] = from_json(written, allow_partial=True)
            continue
        delta = event["delta"]
        assert not block.get("signature"), "the signature is the end of a thinking block"
        match delta["type"]:
            case "input_json_delta":
                written += delta["partial_json"]
            case kind:
                block[kind.removesuffix("_delta")] += delta[kind.removesuffix("_delta")]
    assert not is_open
    return message


@pytest.mark.parametrize("name", ANSWERS)
async def test_streamed_is_whole_however_it_is_cut(name: str) -> None:
    text, reason = ANSWERS[name]
    whole = told_whole(text, reason)
    assert put_together(await events_of(list(text), reason)) == whole
    for at in range(len(text) + 1):
        pieces = [text[:at], text[at:]]
        assert put_together(await events_of(pieces, reason)) == whole
        assert put_together(await events_of(pieces, reason, firsts=(0, 1))) == whole  # another replica went on


async def test_the_order_of_events() -> None:
    events = await events_of([ANSWERS["thinking"][0]], "stop")
    assert [event.get("delta", event.get("content_block", event))["type"] for event in events[:-2]] == [
        "message_start",
        *("thinking", "thinking_delta", "signature_delta", "content_block_stop"),
        *("text", "text_delta", "content_block_stop"),
        *("tool_use", "input_json_delta", "content_block_stop"),
        *("tool_use", "input_json_delta", "content_block_stop"),
    ]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]


def test_a_message() -> None:
    message = told_whole(*ANSWERS["thinking"])
    thinking, text, weather, time = message.pop("content")
    assert thinking == {"type": "thinking", "thinking": "I wonder.", "signature": signature("I wonder.", "m")}
    assert text == {"type": "text", "text": "Let me see."}
    assert weather.pop("id") != time.pop("id")
    assert weather == {"type": "tool_use", "name": "weather", "input": {"city": "Rome"}}
    assert time == {"type": "tool_use", "name": "time", "input": {"city": 'a"b', "days": [1, 2.5]}}
    assert message == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 5,
        },
    }


def test_calls_have_ids_that_every_telling_gives_them() -> None:
    ids = [block["id"] for block in told_whole(*ANSWERS["calls"])["content"][1:]]
    assert all(re.fullmatch("toolu_[a-z0-9]{24}", each) for each in ids)
    assert ids == [block["id"] for block in told_whole(*ANSWERS["calls"])["content"][1:]]


def test_arguments_that_were_cut_are_what_there_is_of_them() -> None:
    assert told_whole(*ANSWERS["cut arguments"])["content"][1]["input"] == {}
    assert told_whole(*ANSWERS["cut"])["content"][2]["input"] == {"city": 'a"b'}


def test_tokens_that_are_written_to_the_cache_count_as_that_as_far_as_they_were_marked() -> None:
    hint = RetentionHint((KeptSpan(0, 5, ttl_s=3600.0), KeptSpan(5, 6, ttl_s=300.0)))
    usage = make_format().whole(OutputDelta("x", finish_reason="stop", hint=hint, **END))["usage"]
    assert (usage["input_tokens"], usage["cache_creation_input_tokens"], usage["cache_read_input_tokens"]) == (1, 3, 3)
    assert usage["cache_creation"] == {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2}
    assert "cache_creation" not in told_whole("x", "stop")["usage"]


def test_what_became_of_a_mark_is_told() -> None:
    outcome = RetentionOutcome("clipped", "why", 5, 1700000000.5)
    delta = OutputDelta("x", finish_reason="stop", hint=RetentionHint(), retention=outcome, **END)
    assert make_format().whole(delta)["usage"]["prompt_cache_hint"] == {
        "outcome": "clipped",
        "reason": "why",
        "kept_tokens": 5,
        "expires_at": 1700000000,
    }


DIFFERENCE = Difference(3, "messages", 1, "user", "was", "is")
SHOWN = {"token": 3, "message": 1, "role": "user", "before": "was", "now": "is"}


@pytest.mark.parametrize(
    ("comparison", "told"),
    [
        (NOT_FOUND, {"cache_miss_reason": {"type": "previous_message_not_found"}}),
        (CacheComparison(is_found=True, num_same=6), None),
        (
            CacheComparison(is_found=True, num_same=3, num_different=3, difference=DIFFERENCE),
            {
                "cache_miss_reason": {
                    "type": "messages_changed",
                    "cache_missed_input_tokens": 3,
                    "first_difference": SHOWN,
                }
            },
        ),
        (
            CacheComparison(is_found=True, num_same=6, losses=(Loss("gpu_dropped", 4, 1.23456),)),
            {
                "cache_miss_reason": {
                    "type": "unavailable",
                    "lost": [{"reason": "gpu_dropped", "tokens": 4, "ago_s": 1.235}],
                }
            },
        ),
    ],
)
async def test_why_something_was_not_cached_is_told(comparison: CacheComparison, told: Any) -> None:
    delta = OutputDelta("x", finish_reason="stop", comparison=comparison, **END)
    assert make_format().whole(delta)["diagnostics"] == told
    assert "diagnostics" not in told_whole("x", "stop")


@pytest.mark.parametrize(("part", "kind"), [("tools", "tools_changed"), ("system", "system_changed")])
def test_what_was_changed_is_named(part: str, kind: str) -> None:
    difference = DIFFERENCE._replace(part=part)
    comparison = CacheComparison(is_found=True, num_same=3, num_different=3, difference=difference)
    delta = OutputDelta("x", finish_reason="stop", comparison=comparison, **END)
    assert make_format().whole(delta)["diagnostics"]["cache_miss_reason"]["type"] == kind


def test_usage_tells_thinking_and_what_was_computed_again() -> None:
    delta = OutputDelta("x", finish_reason="stop", num_reasoning_tokens=2, recomputed=("edited", 3), **END)
    usage = make_format().whole(delta)["usage"]
    assert (usage["output_tokens_details"], usage["recomputed"]) == ({"thinking_tokens": 2}, {"edited": 3})


def test_usage_tells_guesses_that_were_verified() -> None:
    delta = OutputDelta("x", finish_reason="stop", num_guessed_tokens=5, num_accepted_tokens=3, **END)
    expected = {"thinking_tokens": 0, "accepted_prediction_tokens": 3, "rejected_prediction_tokens": 2}
    assert make_format().whole(delta)["usage"]["output_tokens_details"] == expected


@pytest.mark.parametrize(
    ("text", "reason", "stop_string", "max_tokens", "expected"),
    [
        ("x", "stop", None, 5, "end_turn"),
        (CALLS, "stop", None, 5, "tool_use"),
        (CALLS, "length", None, 5, "max_tokens"),
        (CALLS[:-20], "stop", None, 5, "end_turn"),  # not all of its calls can be made
        ("x", "stop", "END", 5, "stop_sequence"),
        (CALLS, "stop", "END", 5, "stop_sequence"),
        ("x", "length", None, 5, "max_tokens"),
        ("x", "length", None, 6, "model_context_window_exceeded"),
    ],
)
def test_why_an_answer_ended(text: str, reason: str, stop_string: str | None, max_tokens: int, expected: str) -> None:
    message = told_whole(text, reason, stop_string, max_tokens=max_tokens)
    assert (message["stop_reason"], message["stop_sequence"]) == (expected, stop_string)


def test_no_call_is_read_if_none_may_be_made() -> None:
    message = told_whole(CALLS, "stop", tool_choice={"type": "none"})
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": CALLS}], "end_turn")


async def test_omitted_thinking_leaves_its_signature() -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    text = ANSWERS["thinking and text"][0]
    message = told_whole(text, "stop", thinking=thinking)
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": signature("I wonder.", "m")}
    assert put_together(await events_of(list(text), "stop", thinking=thinking)) == message


async def test_a_prompt_that_is_only_to_be_cached_has_an_answer_without_content() -> None:
    message = told_whole("x", "length", max_tokens=0)
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")
    assert put_together(await events_of(["x"], "length", max_tokens=0)) == message


async def test_an_error_is_the_last_event_of_a_stream() -> None:
    told = await make_format().error(ErrorItem.of(ReplicaLostError("lost")))
    name, data = told.strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "api_error", "message": "lost"},
        "request_id": "req_1",
    }


@pytest.mark.parametrize("name", ANSWERS)
async def test_anthropics_client_puts_the_same_message_together(name: str) -> None:
    pytest.importorskip("anthropic")
    from anthropic.lib.streaming._messages import accumulate_event
    from anthropic.types import Message

    text, reason = ANSWERS[name]
    snapshot, buffers = None, {}
    for event in await events_of(list(text), reason):
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)  # type: ignore[arg-type]
    whole = Message.model_validate(told_whole(text, reason))
    assert snapshot is not None
    assert snapshot.to_dict(exclude_none=True) == whole.to_dict(exclude_none=True)
