"""Turns with tools: what a request says of them, and how answers with calls and thinking are told."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from deployments.responses.answers import ResponseObject, ResponseStream, closing_event, retold_events
from deployments.responses.items import messages_of
from deployments.responses.output import Event
from deployments.responses.requests import ResponseBody
from engine.dialogue.formats import CALL_FORMATS, AnswerFormat
from engine.dialogue.messages import Message, ToolCall
from engine.dialogue.reasoning import THINK
from engine.dialogue.tools import Tool, ToolChoice
from engine.text.output import OutputDelta

MODEL = "pensieve-recall-0.6m"
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}


def tool(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "description": "d", "parameters": CITY, **more}


TOOLS = [tool(), tool("time")]
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def body(**changes: Any) -> ResponseBody:
    return ResponseBody.model_validate({"model": "m", "input": "hi"} | changes)


def test_tools_and_choices_reach_the_engine() -> None:
    asked = body(
        tools=[tool(strict=True), tool("time")],
        tool_choice={"type": "function", "name": "time"},
        parallel_tool_calls=False,
        reasoning={"effort": "none", "summary": "auto"},
        chat_template_kwargs={"style": "brief"},
    )
    tools = (Tool("weather", "d", CITY, True), Tool("time", "d", CITY))
    prompt = asked.prompt_value(asked.input_items(lambda prefix: prefix))
    assert prompt.tools == tools
    assert prompt.template_kwargs == {
        "reasoning_effort": "none",
        "enable_thinking": False,
        "thinking": False,
        "style": "brief",
    }
    assert asked.offered_tools == tools[1:]
    assert asked.chosen_calls == ToolChoice("named", "time")
    assert not asked.has_parallel_calls
    assert body(tools=TOOLS, tool_choice="none").offered_tools == ()
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]}
    some = body(tools=TOOLS, tool_choice=allowed)
    assert some.chosen_calls == ToolChoice("auto", allowed=("time",))
    assert [tool.name for tool in some.offered_tools] == ["time"]
    assert some.prompt_value(()) == body(tools=TOOLS).prompt_value(())  # so that the cached prompt stays the same
    assert some.shown()["tool_choice"] == allowed


def test_a_form_of_the_text_reaches_the_engine() -> None:
    asked = body(text={"format": {"type": "json_schema", "name": "n", "schema": CITY, "strict": True}})
    grammar = asked.sampling_params().grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", CITY)
    assert asked.form_param == "text.format"
    assert body(text={"format": {"type": "text"}}).sampling_params().grammar is None
    lenient = body(text={"format": {"type": "json_schema", "name": "n", "schema": CITY}}).sampling_params().grammar
    assert lenient is not None
    assert lenient.kind == "lenient_json_schema"
    assert body(text={"format": {"type": "json_object"}}, tools=TOOLS, tool_choice="none").sampling_params().grammar


def call(name: str, call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{call_id}", "call_id": call_id, "name": name, "arguments": '{"a":1}'}


def test_what_the_model_said_in_one_turn_is_one_message() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    items = [
        {"role": "user", "content": "hi"},
        thought,
        {"role": "assistant", "content": "Let me see."},
        call("f", "c1"),
        call("g", "c2"),
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sunny"}]},
        {"type": "function_call_output", "call_id": "c1", "output": "noon", "name": "f"},
        thought | {"content": None, "encrypted_content": "x"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Anything else?"},
        thought,
        call("f", "c3"),
    ]
    kept = body(input=items).input_items(lambda prefix: prefix)
    assert [item["id"] for item in kept] == [
        "msg",
        "rs",
        "msg",
        "fc",
        "fc",
        "fco",
        "fco",
        "rs",
        "msg",
        "msg",
        "rs",
        "fc",
    ]
    assert messages_of(kept) == (
        Message("user", "hi"),
        Message("assistant", "Let me see.", "hm", (ToolCall("f", '{"a":1}', "c1"), ToolCall("g", '{"a":1}', "c2"))),
        Message("tool", "sunny", tool_call_id="c2"),
        Message("tool", "noon", tool_call_id="c1", name="f"),
        Message("assistant", "Done."),
        Message("assistant", "Anything else?"),
        Message("assistant", "", "hm", (ToolCall("f", '{"a":1}', "c3"),)),
    )


# -- how answers are told ----------------------------------------------------------------------------------------------

FORM = AnswerFormat(CALL_FORMATS["hermes"][0], THINK, "")
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city":  "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {"city": "a\\"b"}}\n</tool_call>'
)
ONE_CALL = CALLS.rpartition("\n<tool_call>")[0]
THOUGHT = f"<think>\nI wonder.\n</think>\n\n{CALLS}"
# What the model writes, what ends it, and the kinds and statuses of the items that are told.
ANSWERS = {
    "calls": (CALLS, "stop", "message completed, function_call completed, function_call completed"),
    "thinking": (
        THOUGHT,
        "stop",
        "reasoning completed, message completed, function_call completed, function_call completed",
    ),
    "text": ("Sunny.", "stop", "message completed"),
    "long text": ("Sunny.", "length", "message incomplete"),
    "nothing": ("", "stop", "message completed"),
    "cut": (CALLS[:-20], "length", "message completed, function_call completed, function_call incomplete"),
    "cut behind a call": (
        CALLS + "\n",
        "length",
        "message completed, function_call completed, function_call completed",
    ),
    "cut by a stop string": (
        CALLS[:-20],
        "stop",
        "message completed, function_call completed, function_call incomplete",
    ),
    "malformed": ('<tool_call>\n{"name" "weather"}\n</tool_call> oh', "stop", "message completed"),
    "cut thinking": ("<think>\nI won", "length", "reasoning incomplete"),
    "text behind a call": (
        ONE_CALL + " Good.",
        "stop",
        "message completed, function_call completed, message completed",
    ),
}


def told(
    pieces: list[str], reason: str, firsts: tuple[int, ...] = (0,), **changes: Any
) -> tuple[list[Event], dict[str, Any]]:
    """The events of a stream, and the response at its end. firsts: the pieces that are the first ones of a replica."""
    numbers = iter(range(1000))
    stream = ResponseStream(
        ResponseObject("resp_1", 1, body(**{"tools": TOOLS} | changes), lambda prefix: f"{prefix}_{next(numbers)}")
    )
    deltas = [OutputDelta(piece, answer_format=FORM if index in firsts else None) for index, piece in enumerate(pieces)]
    deltas.append(OutputDelta("", finish_reason=reason, answer_format=None if pieces else FORM))
    events = [event for delta in deltas for event in stream.read(delta)]
    whole = stream.whole()
    return stream.numbered([*events, closing_event(whole)]), whole


def put_together(events: list[Event]) -> list[dict[str, Any]]:
    """The items that a client makes of a stream. Checks the order of what comes."""
    items: list[dict[str, Any]] = []
    text, is_open = "", False
    for number, (name, data) in enumerate(events):
        assert (data["type"], data["sequence_number"]) == (name, number)
        kind = name.removeprefix("response.")
        if number < 2 or number == len(events) - 1:
            assert kind == (["created", "in_progress"][number] if number < 2 else data["response"]["status"])
            continue
        assert data["output_index"] == len(items) - (kind != "output_item.added")
        if kind == "output_item.added":
            assert not is_open
            is_open, text = True, ""
            items.append(data["item"])
            assert (data["item"]["status"], data["item"].get("arguments", "")) == ("in_progress", "")
            assert data["item"].get("content", []) == []
            continue
        assert is_open
        if kind == "output_item.done":
            is_open = False
            item = items[-1] = data["item"]
            assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
            continue
        assert data["item_id"] == items[-1]["id"]
        if kind.endswith(".delta"):
            text += data["delta"]
        elif kind == "content_part.added":
            assert data["part"]["text"] == ""
        elif kind == "content_part.done":
            assert data["part"]["text"] == text
        else:
            assert kind.endswith(".done")
            assert data.get("text", data.get("arguments")) == text
    assert not is_open
    return items


@pytest.mark.parametrize("name", ANSWERS)
def test_streamed_is_whole_however_it_is_cut(name: str) -> None:
    text, reason, expected = ANSWERS[name]
    events, whole = told([text], reason)
    Response.model_validate_json(json.dumps(whole), strict=True)
    assert ", ".join(f"{item['type']} {item['status']}" for item in whole["output"]) == expected
    assert whole["status"] == ("incomplete" if reason == "length" else "completed")
    assert put_together(events) == whole["output"]
    for at in range(0, len(text) + 1, 3):
        for firsts in ((0,), (0, 1)):  # a second replica may go on
            events, cut = told([text[:at], text[at:]], reason, firsts)
            assert cut == whole
            assert put_together(events) == whole["output"]
    events, cut = told(list(text), reason)
    assert cut == whole
    assert put_together(events) == whole["output"]
    for _, data in events[-30:]:
        STREAM_EVENT.validate_json(json.dumps(data), strict=True)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_stored_answer_is_told_again(name: str) -> None:
    text, reason, _ = ANSWERS[name]
    live, whole = told([text], reason)
    again = retold_events(whole)
    assert put_together(again) == whole["output"]
    assert again[-1][1]["response"] == live[-1][1]["response"]
    for number in range(len(again) - 1):
        assert retold_events(whole, starting_after=number) == again[number + 1 :]
    ((name, last),) = retold_events(whole, starting_after=1000)  # of the first telling, which had more pieces
    assert (name, last["sequence_number"], last["response"]) == (again[-1][0], 1001, whole)


def test_calls_have_ids_and_the_arguments_as_they_were_written() -> None:
    _, whole = told([CALLS], "stop")
    message, *calls = whole["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert [(item["name"], item["arguments"]) for item in calls] == [
        ("weather", '{"city":  "Rome"}'),
        ("time", '{"city": "a\\"b"}'),
    ]
    assert all(re.fullmatch("call_[a-z0-9]{24}", item["call_id"]) for item in calls)
    assert len({item["call_id"] for item in calls} | {item["id"] for item in calls}) == 4


def test_without_a_choice_of_calls_they_are_text() -> None:
    _, whole = told([CALLS], "stop", tool_choice="none")
    (message,) = whole["output"]
    assert message["content"][0]["text"] == CALLS


def test_the_response_repeats_how_it_was_made() -> None:
    asked = {
        "tools": [tool(strict=True)],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "max_tool_calls": 3,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    }
    _, whole = told(["x"], "stop", **asked)
    assert {name: whole[name] for name in asked} == asked
    _, whole = told(
        ["x"], "stop", tool_choice="none", text={"format": {"type": "json_schema", "name": "n", "schema": CITY}}
    )
    said = Response.model_validate_json(json.dumps(whole), strict=True)
    assert said.text is not None
    assert said.text.format.to_dict() == {
        "type": "json_schema",
        "name": "n",
        "description": None,
        "schema": CITY,
        "strict": False,
    }
