"""Chats with tools: what a request says, how answers with calls are told, and loops of calls through an engine."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from deployments.completions.answers import ChatFormat
from deployments.completions.requests import ChatCompletionBody
from deployments.http.function_tools import MAX_TOOLS, MAX_TOOLS_CHARS
from deployments.http.parsing import parse_request
from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from engine.dialogue import messages as dialogue
from engine.dialogue import tools as dialogue_tools
from engine.dialogue.formats import CALL_FORMATS, AnswerFormat
from engine.dialogue.reasoning import THINK
from engine.tenant import LOCAL_TENANT as TENANT
from engine.text.output import OutputDelta
from engine.text.prompt import AnswerBeginning
from tests.deployments.engine_here import EngineHere
from tests.deployments.refusals import refusal

MODEL = "pensieve-recall-0.6m"
USER = {"role": "user", "content": "how is the weather?"}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}


def tool(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": CITY, **more}}


TOOLS = [tool(), tool("time")]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
NAMED = {"type": "function", "function": {"name": "time"}}


def parse(**changes: Any) -> ChatCompletionBody:
    return parse_request(ChatCompletionBody, json.dumps({"model": "m", "messages": [USER]} | changes).encode())[0]


def test_tools_and_choices_reach_the_engine() -> None:
    body = parse(tools=[tool(strict=True), tool("time")], tool_choice=NAMED, parallel_tool_calls=False)
    tools = (dialogue_tools.Tool("weather", "d", CITY, True), dialogue_tools.Tool("time", "d", CITY))
    assert body.prompt_value().tools == tools
    assert body.offered_tools == tools[1:]
    assert body.chosen_calls == dialogue_tools.ToolChoice("named", "time")
    assert not body.has_parallel_calls
    assert parse(tools=TOOLS).chosen_calls == parse(tools=TOOLS, tool_choice="auto").chosen_calls
    assert parse(tools=TOOLS, tool_choice="required").chosen_calls.is_forced
    none = parse(tools=TOOLS, tool_choice="none")
    assert none.offered_tools == ()
    assert none.prompt_value() == parse(tools=TOOLS).prompt_value()  # so that the cached prompt stays the same


def test_messages_of_an_agent() -> None:
    calls = [CALL, CALL | {"id": "call_2", "index": 1, "function": {"name": "time", "arguments": ""}}]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}], "name": "weather"},
        {"role": "function", "name": "time", "content": "noon"},
    ]
    assert parse(messages=messages).prompt_value().messages[1:] == (
        dialogue.Message(
            "assistant",
            "",
            "hm",
            (
                dialogue.ToolCall("weather", '{"city": "Rome"}', "call_1"),
                dialogue.ToolCall("time", "{}", "call_2"),
            ),
        ),
        dialogue.Message("tool", "sunny", tool_call_id="call_1", name="weather"),
        dialogue.Message("tool", "noon", name="time"),
    )


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"tools": {}}, "tools", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [tool("a" * 65)]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [tool(), tool()]}, "tools", "invalid_value"),
        ({"tools": [tool(f"t{i}") for i in range(MAX_TOOLS + 1)]}, "tools", "invalid_value"),
        ({"tools": [tool(description="x" * MAX_TOOLS_CHARS)]}, "tools", "invalid_value"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "invalid_value"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters.type", "invalid_value"),
        (
            {"tools": [tool(parameters={"properties": []})]},
            "tools[0].function.parameters.properties",
            "invalid_value",
        ),
        ({"tools": [tool(parameters={"required": 5})]}, "tools[0].function.parameters.required", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [tool()], "tool_choice": NAMED}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": "function"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice.type", "invalid_value"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0].tool_calls", "invalid_value"),
        ({"messages": [USER | {"tool_call_id": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name", "missing_required_parameter"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]},
            "messages[0].tool_calls",
            "invalid_value",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], param: str, code: str) -> None:
    assert refusal(lambda: parse(**changes)) == (param, code)


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_form_goes_with_tools(choice: str) -> None:
    body = parse(tools=TOOLS, tool_choice=choice, response_format={"type": "json_object"})
    assert body.sampling_params().grammar is not None
    assert body.form_param == "response_format"


# -- how answers are told ----------------------------------------------------------------------------------------------

FORM = AnswerFormat(CALL_FORMATS["hermes"][0], THINK, "")
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city":  "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {"city": "a\\"b"}}\n</tool_call>'
)
ANSWERS = {
    "calls": (CALLS, "stop"),
    "thinking": (f"<think>\nI wonder.\n</think>\n\n{CALLS}", "stop"),
    "text": ("Sunny.", "stop"),
    "nothing": ("", "stop"),
    "cut": (CALLS[:-20], "length"),
    "cut name": (CALLS[:35], "length"),
    "cut by a stop string": (CALLS[:-20], "stop"),
    "malformed": ('<tool_call>\n{"name" "weather"}\n</tool_call> oh', "stop"),
    "cut thinking": ("<think>\nI won", "length"),
}


def make_format(**changes: Any) -> ChatFormat:
    return ChatFormat("chatcmpl-1", 1, parse(tools=TOOLS, **changes))


def told_whole(text: str, reason: str, **changes: Any) -> dict[str, Any]:
    (choice,) = make_format(**changes).whole(OutputDelta(text, finish_reason=reason, answer_format=FORM))["choices"]
    return dict(choice)


def told_in_chunks(pieces: list[str], reason: str, firsts: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """The choice that a client puts together. Checks the order of what comes.

    firsts: the pieces that are the first ones of a replica.
    """
    form = make_format()
    deltas = [OutputDelta(piece, answer_format=FORM if index in firsts else None) for index, piece in enumerate(pieces)]
    deltas.append(OutputDelta("", finish_reason=reason, answer_format=None if pieces else FORM))
    message: dict[str, Any] = {"role": "", "content": "", "refusal": None}
    calls: list[dict[str, Any]] = []
    finish_reason = None
    for delta in deltas:
        for chunk in form.chunks(delta):
            assert finish_reason is None
            (choice,) = chunk["choices"]
            finish_reason = choice["finish_reason"]
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    (part,) = value
                    if "id" in part:
                        assert part.pop("index") == len(calls)
                        assert part["function"]["arguments"] == ""
                        calls.append(part)
                    else:
                        assert set(part) == {"index", "function"}
                        assert part["index"] == len(calls) - 1
                        calls[-1]["function"]["arguments"] += part["function"]["arguments"]
                elif value is not None:
                    message[name] = message.get(name, "") + value
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}


@pytest.mark.parametrize("name", ANSWERS)
def test_streamed_is_whole_however_it_is_cut(name: str) -> None:
    text, reason = ANSWERS[name]
    whole = told_whole(text, reason)
    assert told_in_chunks(list(text), reason) == whole
    for at in range(len(text) + 1):
        assert told_in_chunks([text[:at], text[at:]], reason) == whole
        assert told_in_chunks([text[:at], text[at:]], reason, firsts=(0, 1)) == whole  # another replica went on


def test_calls_have_ids_and_the_arguments_as_they_were_written() -> None:
    choice = told_whole(*ANSWERS["calls"])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city":  "Rome"}'},
        {"name": "time", "arguments": '{"city": "a\\"b"}'},
    ]
    ids = [call["id"] for call in calls]
    assert all(re.fullmatch("call_[a-z0-9]{24}", each) for each in ids)
    assert len(set(ids)) == 2
    assert ids == [call["id"] for call in told_whole(*ANSWERS["thinking"])["message"]["tool_calls"]]


def test_what_is_no_call_is_content() -> None:
    text, _ = ANSWERS["malformed"]
    for choice in (told_whole(text, "stop"), told_whole(CALLS, "stop", tool_choice="none")):
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
    assert told_whole(text, "stop")["message"]["content"] == text
    assert told_whole(CALLS, "stop", tool_choice="none")["message"]["content"] == CALLS


def test_an_answer_that_is_cut_in_a_call_ends_by_its_length() -> None:
    choice = told_whole(*ANSWERS["cut"])
    assert choice["finish_reason"] == "length"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather", "time"]


def test_an_answer_that_a_stop_string_ends_asks_for_its_calls_only_if_they_are_whole() -> None:
    choice = told_whole(*ANSWERS["cut by a stop string"])
    assert choice["finish_reason"] == "stop"
    assert len(choice["message"]["tool_calls"]) == 2
    assert told_whole(CALLS.removesuffix("</tool_call>"), "stop")["finish_reason"] == "tool_calls"


def test_thinking_has_both_names() -> None:
    message = told_whole(*ANSWERS["thinking"])["message"]
    assert message["reasoning_content"] == message["reasoning"] == "I wonder."


# -- with an engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def engine() -> AsyncIterator[EngineHere]:
    options = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "max_model_len": 2048}
    here = EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0)
    yield here
    await here._engine.check_integrity()
    await here.__del__()


@pytest.fixture
async def client(engine: EngineHere, tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    app = create_app(engine, IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}"), ingress_id="ingress-1")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None) as http,
    ):
        yield AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


async def ask(client: AsyncOpenAI, *, stream: bool, **body: Any) -> Any:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 200} | body
    if not stream:
        return await client.chat.completions.create(**body)
    async with client.chat.completions.stream(stream_options={"include_usage": True}, **body) as events:
        async for _ in events:
            pass
        return await events.get_final_completion()


async def loop_of_calls(client: AsyncOpenAI, session: str, *, stream: bool) -> list[Any]:
    """Five turns, each of which has to call something, as an agent's framework sends them."""
    messages: list[Any] = [USER]
    told: list[Any] = []
    for turn in range(5):
        choice = ("required", NAMED)[turn % 2]
        completion = await ask(
            client,
            stream=stream,
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=choice is NAMED,  # of which there is one in any case
            extra_body={"session_id": session},
        )
        (answer,) = completion.choices
        assert answer.finish_reason == "tool_calls"
        assert not answer.message.content
        (call,) = answer.message.tool_calls
        assert json.loads(call.function.arguments) in ({"city": "Rome"}, {"city": "Paris"})
        assert call.function.name == "time" or turn % 2 == 0
        sent = call.model_dump()
        if turn % 2:  # many clients write the arguments anew
            sent["function"]["arguments"] = json.dumps(json.loads(call.function.arguments), indent=2)
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [sent]},
            {"role": "tool", "tool_call_id": call.id, "content": f"result {turn}"},
        ]
        told.append((call.function.name, call.function.arguments, completion.usage))
    return told


async def test_a_loop_of_calls_computes_only_what_is_new(client: AsyncOpenAI) -> None:
    whole = await loop_of_calls(client, "whole", stream=False)
    streamed = await loop_of_calls(client, "streamed", stream=True)
    assert [turn[:2] for turn in streamed] == [turn[:2] for turn in whole]
    for told in (whole, streamed):
        for (*_, before), (*_, usage) in pairwise(told):
            kept = before.prompt_tokens + before.completion_tokens - 1  # the last token was never computed
            assert usage.prompt_tokens_details.cached_tokens >= kept


async def test_strict_tools_hold_calls_to_their_schema(client: AsyncOpenAI) -> None:
    """auto: the model may say anything, also nothing that is a call."""
    for seed in range(5):
        completion = await ask(
            client, stream=False, messages=[USER], tools=[tool(strict=True)], seed=seed, temperature=2.0
        )
        for call in completion.choices[0].message.tool_calls or ():
            assert json.loads(call.function.arguments) in ({"city": "Rome"}, {"city": "Paris"})


VERDICT = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]} | {
    "additionalProperties": False
}


async def test_an_answer_beside_tools_has_the_form_or_calls(client: AsyncOpenAI) -> None:
    """As frameworks ask for it that let an agent end with a value of a type."""
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT, "strict": True}}
    for choice in ("auto", "none", "required"):
        for seed in range(4):
            completion = await ask(
                client,
                stream=False,
                messages=[USER],
                tools=TOOLS,
                tool_choice=choice,
                seed=seed,
                temperature=2.0,
                parallel_tool_calls=False,
                extra_body={"response_format": form},
            )
            (answer,) = completion.choices
            calls = answer.message.tool_calls or []
            assert bool(calls) != bool(answer.message.content)
            for call in calls:
                assert json.loads(call.function.arguments) in ({"city": "Rome"}, {"city": "Paris"})
            if not calls:
                assert json.loads(answer.message.content or "") in ({"ok": True}, {"ok": False})
            assert choice == "auto" or bool(calls) == (choice == "required")


@pytest.mark.parametrize("bad", [{"pattern": "^(?=a)b$"}, {"$ref": "http://localhost/x"}, {"type": "file"}])
async def test_a_fault_in_the_schema_of_a_tool_that_is_not_strict_keeps_nothing_from_working(
    client: AsyncOpenAI, bad: dict[str, Any]
) -> None:
    tools = [tool(parameters={"type": "object", "properties": {"a": bad}, "required": ["a"]})]
    completion = await ask(client, stream=False, messages=[USER], tools=tools, tool_choice="required", max_tokens=40)
    assert completion.choices[0].message.tool_calls[0].function.arguments.startswith('{"')
    await ask(client, stream=False, messages=[USER], tools=tools, parallel_tool_calls=False, max_tokens=5)


async def test_a_schema_that_cannot_be_enforced_names_the_tools(client: AsyncOpenAI) -> None:
    bad = tool(strict=True, parameters=CITY | {"not": {}})
    with pytest.raises(Exception, match="grammar cannot be used") as caught:
        await ask(client, stream=False, messages=[USER], tools=[bad])
    assert (caught.value.status_code, caught.value.param) == (400, "tools")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "held",
    [
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}, "max_tokens": 40},
        {"parallel_tool_calls": False, "max_tokens": 40},
    ],
    ids=["forced", "form", "one"],
)
async def test_another_replica_goes_on_within_an_answer_that_is_held(engine: EngineHere, held: dict[str, Any]) -> None:
    """The grammar is made again there from the request; the text so far is with the ingress."""
    body = parse(tools=TOOLS, temperature=1.5, seed=3, stream=True, **held)
    request = body.generation_request(body.prompt_value(), request_id="r", session_id="s", tenant=TENANT)
    deltas = [delta async for delta in engine._engine.generate(request)]
    text = "".join(delta.text for delta in deltas)
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert "tool_call" in text or "tool_choice" not in held
    num_chars, beginning = 0, []
    for delta in deltas[: len(deltas) // 2]:
        num_chars += len(delta.text)
        beginning += delta.token_ids
    rest = [
        delta
        async for delta in engine._engine.generate(
            replace(request, request_id="r2", beginning=AnswerBeginning(tuple(beginning), num_chars))
        )
    ]
    assert beginning + [token_id for delta in rest for token_id in delta.token_ids] == token_ids
    assert text[:num_chars] + "".join(delta.text for delta in rest) == text
