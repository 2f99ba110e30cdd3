"""The objects and events of the Responses and Conversations API, exactly.

By the types of OpenAI's client, through its own accumulator of streams, and under the agents SDK.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import agents
import httpx
import openai
import pytest
from agents.memory import OpenAIConversationsSession
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.conversations import Conversation, ConversationDeletedResource, ConversationItemList
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from openai.types.shared import Reasoning
from pydantic import BaseModel, TypeAdapter

from deployments.errors import TenantLimitError
from deployments.generation import ErrorItem
from deployments.http.errors import ERRORS, MAX_MESSAGE_CHARS, error_body
from deployments.http.parsing import Body, parse_query, parse_request
from deployments.responses.answers import (
    ResponseObject,
    ResponseStream,
    cancelled,
    closing_event,
    conversation_object,
    deleted_conversation,
    deleted_response,
    error_event,
    failed,
    interrupted,
    list_object,
    response_usage,
    sse_named_event,
)
from deployments.responses.conversation_requests import ConversationBody, ItemsBody, ListQuery
from deployments.responses.items import messages_of
from deployments.responses.output import Event
from deployments.responses.requests import ResponseBody
from engine.errors import EngineStoppedError, ExecutorError, OverloadedError, PensieveError, RequestError
from engine.text.output import OutputDelta, merge_deltas

STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DELTAS = (
    OutputDelta("Hel", (1,), (), (7, 8), 5, 3, 1),
    OutputDelta("", (2,), (), (), 5, 3, 2),
    OutputDelta("lo", (3, 4), (), (), 5, 3, 4, "stop"),
)
ANSWER = merge_deltas(DELTAS)
PART = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
MESSAGE = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [PART]}
USAGE = {
    "input_tokens": 5,
    "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 9,
}
ERROR = ErrorItem.of(ExecutorError("the step failed"))


def response_object(**changes: Any) -> ResponseObject:
    body = {"model": "m", "input": "hi"} | changes
    return ResponseObject("resp_1", 1700000000, ResponseBody.model_validate(body), lambda prefix: f"{prefix}_1")


def whole_response(form: ResponseObject, *deltas: OutputDelta) -> dict[str, Any]:
    stream = ResponseStream(form)
    for delta in deltas:
        stream.read(delta)
    return stream.whole()


def told(stream: ResponseStream, *deltas: OutputDelta) -> list[Event]:
    """The numbered events of an answer."""
    events = [event for delta in deltas for event in stream.read(delta)]
    if deltas[-1].finish_reason is not None:
        events.append(closing_event(stream.whole()))
    return stream.numbered(events)


def check(kind: type[BaseModel], value: Any, *more_fields: str) -> Any:
    """Strictly of that type, from JSON, and nothing in it that the type does not know but more_fields."""
    checked = kind.model_validate_json(json.dumps(value), strict=True)
    assert set(_unknown_fields(checked)) <= {*more_fields}
    return checked


def check_event(event: tuple[str, dict[str, Any]]) -> Any:
    name, data = event
    checked = STREAM_EVENT.validate_json(json.dumps(data), strict=True)
    assert name == data["type"] == checked.type
    assert set(_unknown_fields(checked)) <= {"store"}
    return checked


def _unknown_fields(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _unknown_fields(item)]
    if not isinstance(value, BaseModel):
        return []
    inner = [name for field in type(value).model_fields for name in _unknown_fields(getattr(value, field))]
    return [*(value.model_extra or {}), *inner]


def test_a_whole_response() -> None:
    body = {
        "previous_response_id": "resp_0",
        "instructions": "Be brief.",
        "metadata": {"k": "v"},
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 9,
        "truncation": "auto",
        "store": False,
        "prompt_cache_key": "cache",
        "prompt_cache_options": None,
        "prompt_cache_retention": None,
        "parallel_tool_calls": False,
        "tool_choice": "none",
    }
    whole = whole_response(response_object(**body), ANSWER)
    assert whole == {
        **body,
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "m",
        "output": [MESSAGE],
        "usage": USAGE,
        "conversation": None,
        "background": False,
        "max_tool_calls": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tools": [],
        "top_logprobs": 0,
    }
    assert check(Response, whole, "store").output_text == "Hello"


def test_defaults_are_said_and_nothing_is_cached_is_said_too() -> None:
    whole = whole_response(response_object(conversation="conv_1"), OutputDelta("x", (1,), (), (7,), 5, 0, 1, "stop"))
    assert whole["conversation"] == {"id": "conv_1"}
    assert whole["usage"]["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 5}
    assert (whole["temperature"], whole["top_p"], whole["truncation"]) == (1.0, 1.0, "disabled")
    assert (whole["store"], whole["metadata"], whole["max_output_tokens"]) == (True, {}, None)
    check(Response, whole, "store")


def test_a_response_that_ran_out_of_tokens() -> None:
    whole = whole_response(response_object(), OutputDelta("Hel", (1,), (), (7,), 5, 3, 1, "length"))
    assert whole["status"] == whole["output"][0]["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    check(Response, whole, "store")


def test_other_ends() -> None:
    started = response_object().in_progress()
    assert (started["status"], started["output"], started["usage"]) == ("in_progress", [], None)
    stream = ResponseStream(response_object())
    stream.read(OutputDelta("Hel", (1,), (), (), 5, 3, 1))
    half = stream.in_progress()
    assert (half["status"], half["output"][0]["status"]) == ("in_progress", "in_progress")
    for begun in (started, half):
        before = json.dumps(begun)
        ends = {
            "cancelled": cancelled(begun),
            "incomplete": interrupted(begun),
            "failed": failed(begun, ERROR),
        }
        for status, end in ends.items():
            assert end["status"] == check(Response, end, "store").status == status
            assert {item["status"] for item in end["output"]} <= {"incomplete"}
            changed = {"status", "error", "output"}
            assert {k: v for k, v in end.items() if k not in changed} == {
                k: v for k, v in begun.items() if k not in changed
            }
        assert ends["cancelled"]["error"] is None
        assert ends["incomplete"]["error"]["message"] == (
            "the server stopped, or the client left, before the answer was complete"
        )
        assert ends["failed"]["error"] == {
            "code": "server_error",
            "message": "the step failed",
            "type": "server_error",
            "param": None,
        }
        assert json.dumps(begun) == before
        check(Response, begun, "store")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (RequestError, "invalid_prompt"),
        (OverloadedError, "rate_limit_exceeded"),
        (ExecutorError, "server_error"),
        (EngineStoppedError, "server_error"),
    ],
)
def test_codes_of_failure(kind: type[PensieveError], code: str) -> None:
    end = failed(response_object().in_progress(), ErrorItem.of(kind("m" * 5000, "p")))
    said = "m" * MAX_MESSAGE_CHARS
    assert end["error"] == {"code": code, "message": said, "type": ERRORS[kind].type, "param": "p"}
    check(Response, end, "store")


def test_the_events_of_a_stream() -> None:
    events = told(ResponseStream(response_object()), *DELTAS)
    for event in events:
        check_event(event)
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    empty = PART | {"text": ""}
    begun = response_object().in_progress()
    assert events == [
        (data["type"], {"sequence_number": number} | data)
        for number, data in enumerate(
            [
                {"type": "response.created", "response": begun},
                {"type": "response.in_progress", "response": begun},
                {
                    "type": "response.output_item.added",
                    "output_index": 0,
                    "item": MESSAGE | {"status": "in_progress", "content": []},
                },
                {"type": "response.content_part.added", **where, "part": empty},
                {"type": "response.output_text.delta", **where, "delta": "Hel", "logprobs": []},
                {"type": "response.output_text.delta", **where, "delta": "lo", "logprobs": []},
                {"type": "response.output_text.done", **where, "text": "Hello", "logprobs": []},
                {"type": "response.content_part.done", **where, "part": PART},
                {"type": "response.output_item.done", "output_index": 0, "item": MESSAGE},
                {"type": "response.completed", "response": whole_response(response_object(), ANSWER)},
            ]
        )
    ]


def test_a_stream_that_fails() -> None:
    stream = ResponseStream(response_object())
    events = told(stream, DELTAS[0])
    half = stream.in_progress()
    (event,) = stream.numbered([closing_event(failed(half, ERROR))])
    assert event == (
        "response.failed",
        {"type": "response.failed", "sequence_number": len(events), "response": failed(half, ERROR)},
    )
    assert [part["text"] for item in half["output"] for part in item["content"]] == ["Hel"]
    check_event(event)


def test_an_error_event() -> None:
    stream = ResponseStream(response_object())
    (event,) = stream.numbered([error_event(ErrorItem.of(TenantLimitError("busy" * 5000, "p")))])
    assert event[1] == {
        "type": "error",
        "sequence_number": 0,
        "code": "rate_limit_error",
        "message": ("busy" * 5000)[:MAX_MESSAGE_CHARS],
        "param": "p",
    }
    check_event(event)


def test_the_wording_of_an_event() -> None:
    assert sse_named_event(("error", {"type": "error", "message": "é\n"})) == (
        'event: error\ndata: {"type":"error","message":"é\\n"}\n\n'
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=4), min_size=1, max_size=6), st.sampled_from(["stop", "length"]))
def test_however_an_answer_is_cut_the_stream_ends_in_the_whole_one(texts: list[str], reason: str) -> None:
    deltas = [
        OutputDelta(text, (n,), (), (9,) if n == 0 else (), 5, 3, n + 1, reason if n == len(texts) - 1 else None)
        for n, text in enumerate(texts)
    ]
    events = [check_event(event) for event in told(ResponseStream(response_object()), *deltas)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    spoken = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert all(spoken)
    assert "".join(spoken) == "".join(texts)
    whole = Response.model_validate(whole_response(response_object(), merge_deltas(deltas)))
    assert events[-1].response.to_dict() == whole.to_dict()
    assert events[-1].type == f"response.{whole.status}"


def test_the_objects_around_responses() -> None:
    items = [MESSAGE | {"id": f"msg_{n}"} for n in range(3)]
    listed = {"object": "list", "data": items, "first_id": "msg_0", "last_id": "msg_2", "has_more": True}
    assert list_object(items, has_more=True) == listed
    none = {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}
    assert list_object([], has_more=False) == none
    for page in (listed, none):
        check(ResponseItemList, page)
        check(ConversationItemList, page)
    conversation = conversation_object("conv_1", 1700000000, {"k": "v"})
    assert conversation == {"id": "conv_1", "object": "conversation", "created_at": 1700000000, "metadata": {"k": "v"}}
    check(Conversation, conversation)
    check(ConversationDeletedResource, deleted_conversation("conv_1"))
    assert deleted_response("resp_1") == {"id": "resp_1", "object": "response", "deleted": True}


class FakeServer:
    """The modules under test behind a transport: answers "Hello", keeps what it was asked, and conversations."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.prompts: list[list[tuple[str, str]]] = []
        self.items: dict[str, dict[str, Any]] = {}
        self.deltas: tuple[OutputDelta, ...] = DELTAS
        self.fails = False
        self._num_ids = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._answer(request)
        except RequestError as error:
            return httpx.Response(400, json=error_body(ErrorItem.of(error)))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        match request.method, request.url.path.removeprefix("/v1/").split("/"):
            case "POST", ["responses"]:
                return self._respond(self._parse(ResponseBody, request))
            case "DELETE", ["responses", response_id]:
                return httpx.Response(200, json=deleted_response(response_id))
            case "POST", ["conversations"]:
                self._add(self._parse(ConversationBody, request).new_items(self._new_id))
                return httpx.Response(200, json=conversation_object("conv_1", 1700000000, {}))
            case "DELETE", ["conversations", conversation_id]:
                return httpx.Response(200, json=deleted_conversation(conversation_id))
            case "POST", ["conversations", _, "items"]:
                items = self._parse(ItemsBody, request).new_items(self._new_id)
                self._add(items)
                return httpx.Response(200, json=list_object(items, has_more=False))
            case "GET", ["conversations", _, "items"]:
                query = parse_query(ListQuery, request.url.params.multi_items())
                ids = list(self.items) if query.order == "asc" else list(self.items)[::-1]
                rest = ids[ids.index(query.after) + 1 :] if query.after else ids
                page = [self.items[item_id] for item_id in rest[: query.limit]]
                return httpx.Response(200, json=list_object(page, has_more=len(rest) > query.limit))
        return httpx.Response(404)

    def _parse(self, kind: type[Body], request: httpx.Request) -> Any:
        body, data = parse_request(kind, request.content)
        self.bodies.append(data)
        return body

    def _respond(self, body: ResponseBody) -> httpx.Response:
        messages = messages_of(body.input_items(self._new_id), body.instructions)
        self.prompts.append([(message.role, message.content) for message in messages])
        response = ResponseObject(self._new_id("resp"), 1700000000, body, self._new_id)
        if not body.stream:
            return httpx.Response(200, json=whole_response(response, *self.deltas))
        stream = ResponseStream(response)
        events = told(stream, *self.deltas[:1] if self.fails else self.deltas)
        if self.fails:
            events += stream.numbered([closing_event(failed(stream.in_progress(), ERROR))])
        text = "".join(map(sse_named_event, events))
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    def _add(self, items: tuple[dict[str, Any], ...]) -> None:
        self.items |= {item["id"]: item for item in items}

    def _new_id(self, prefix: str) -> str:
        self._num_ids += 1
        return f"{prefix}_{self._num_ids}"


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(server)) as http_client:
        yield openai.AsyncOpenAI(
            api_key="k",
            base_url="http://localhost/v1",
            http_client=http_client,
            max_retries=0,
            _strict_response_validation=True,
        )


async def test_openai_s_client_accumulates_a_stream(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="m", input="hi") as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots == ["Hel", "Hello"]
    assert final.output_text == "Hello"
    assert final.status == "completed"
    assert final.usage.total_tokens == 9
    whole = await client.responses.create(model="m", input="hi")
    ids = {"id", "output"}
    assert whole.model_dump(exclude=ids) == final.model_dump(exclude=ids)


async def test_openai_s_client_sees_an_incomplete_and_a_failed_stream(
    client: openai.AsyncOpenAI, server: FakeServer
) -> None:
    server.deltas = (OutputDelta("Hel", (1,), (), (), 5, 3, 1, "length"),)
    async with client.responses.stream(model="m", input="hi") as stream:
        events = [event async for event in stream]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    server.fails = True
    async with client.responses.stream(model="m", input="hi") as stream:
        events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the step failed"


async def test_openai_s_client_keeps_conversations(client: openai.AsyncOpenAI, server: FakeServer) -> None:
    assert (await client.conversations.create()).id == "conv_1"
    await client.conversations.create(items=[{"role": "user", "content": "a"}], metadata={"k": "v"})
    added = await client.conversations.items.create("conv_1", items=[{"role": "user", "content": "b"}] * 20)
    assert len(added.data) == 20
    listed = [item async for item in client.conversations.items.list("conv_1", limit=7, order="asc")]
    assert [item.id for item in listed] == list(server.items)
    assert (await client.conversations.delete("conv_1")).deleted
    await client.responses.delete("resp_1")


@pytest.fixture
def make_agent(client: openai.AsyncOpenAI) -> Callable[..., agents.Agent]:
    def make(**options: Any) -> agents.Agent:
        model = agents.OpenAIResponsesModel(model="m", openai_client=client)
        return agents.Agent(name="a", instructions="Be brief.", model=model, **options)

    return make


async def run(agent: agents.Agent, say: Any, *, stream: bool, **options: Any) -> Any:
    options["run_config"] = agents.RunConfig(tracing_disabled=True)
    if not stream:
        return await agents.Runner.run(agent, say, **options)
    result = agents.Runner.run_streamed(agent, say, **options)
    deltas = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert deltas == ["Hel", "lo"]
    return result


@pytest.mark.parametrize("stream", [False, True])
async def test_agents_hold_a_conversation_by_previous_response(
    server: FakeServer, make_agent: Callable[..., agents.Agent], stream: bool
) -> None:
    agent, previous = make_agent(), None
    for text in ("one", "two", "three"):
        result = await run(agent, text, stream=stream, previous_response_id=previous)
        assert result.final_output == "Hello"
        assert server.bodies[-1].get("previous_response_id") == previous
        assert server.prompts[-1] == [("system", "Be brief."), ("user", text)]
        previous = result.last_response_id
        assert previous.startswith("resp_")
    usage = result.context_wrapper.usage
    assert (usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens) == (5, 4, 3)


@pytest.mark.parametrize("stream", [False, True])
async def test_agents_send_their_history_back(
    server: FakeServer, make_agent: Callable[..., agents.Agent], stream: bool
) -> None:
    agent = make_agent()
    result = await run(agent, "one", stream=stream)
    await run(agent, [*result.to_input_list(), {"role": "user", "content": "two"}], stream=stream)
    history = (("user", "one"), ("assistant", "Hello"), ("user", "two"))
    assert server.prompts[-1] == [("system", "Be brief."), *history]


async def test_agents_keep_a_session_in_a_conversation(
    server: FakeServer, client: openai.AsyncOpenAI, make_agent: Callable[..., agents.Agent]
) -> None:
    session = OpenAIConversationsSession(openai_client=client)
    for text in ("one", "two"):
        await run(make_agent(), text, stream=False, session=session)
    history = (("user", "one"), ("assistant", "Hello"), ("user", "two"))
    assert server.prompts[-1] == [("system", "Be brief."), *history]
    assert [item["role"] for item in server.items.values()] == ["user", "assistant"] * 2
    await session.clear_session()


async def test_agents_name_a_conversation(server: FakeServer, make_agent: Callable[..., agents.Agent]) -> None:
    result = await run(make_agent(), "one", stream=False, conversation_id="conv_1")
    assert server.bodies[-1]["conversation"] == "conv_1"
    assert result.final_output == "Hello"


async def test_agents_settings_that_are_implemented_or_ask_for_nothing(
    server: FakeServer, make_agent: Callable[..., agents.Agent]
) -> None:
    model_settings = agents.ModelSettings(
        temperature=0.5,
        top_p=0.9,
        max_tokens=9,
        truncation="auto",
        store=False,
        metadata={"k": "v"},
        parallel_tool_calls=False,
        tool_choice="auto",
        response_include=[],
        verbosity="medium",
        reasoning=Reasoning(effort=None),
        prompt_cache_retention="24h",
        context_management=[],
        extra_body={"top_k": 5},
        extra_args={"user": "u", "service_tier": "auto"},
    )
    await run(make_agent(model_settings=model_settings), "one", stream=False)
    assert server.bodies == [
        {
            "model": "m",
            "input": [{"role": "user", "content": "one"}],
            "instructions": "Be brief.",
            "temperature": 0.5,
            "top_p": 0.9,
            "max_output_tokens": 9,
            "truncation": "auto",
            "store": False,
            "metadata": {"k": "v"},
            "tool_choice": "auto",
            "include": [],
            "tools": [],
            "text": {"verbosity": "medium"},
            "reasoning": {"effort": None},
            "prompt_cache_retention": "24h",
            "context_management": [],
            "top_k": 5,
            "user": "u",
            "service_tier": "auto",
        }
    ]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [agents.WebSearchTool()]}, "tools[0].type"),
        ({"model_settings": agents.ModelSettings(top_logprobs=2)}, "top_logprobs"),
        ({"model_settings": agents.ModelSettings(response_include=["message.output_text.logprobs"])}, "include[0]"),
        ({"model_settings": agents.ModelSettings(tool_choice="web_search_preview")}, "tool_choice"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ],
)
async def test_agents_wishes_that_are_refused(
    make_agent: Callable[..., agents.Agent], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        await run(make_agent(**options), "one", stream=False)
    assert (info.value.param, info.value.code) == (param, "unsupported_parameter")


def test_usage_tells_why_tokens_of_the_history_were_computed_again():
    usage = response_usage(OutputDelta("x", num_prompt_tokens=9, num_cached_tokens=4, recomputed=("edited", 3)))
    assert usage["input_tokens_details"] == {"cached_tokens": 4, "cache_write_tokens": 5, "recomputed": {"edited": 3}}
    assert "recomputed" not in response_usage(OutputDelta("x", num_prompt_tokens=9))["input_tokens_details"]


def test_usage_tells_guesses_that_were_verified() -> None:
    usage = response_usage(OutputDelta("x", num_reasoning_tokens=1, num_guessed_tokens=5, num_accepted_tokens=3))
    predicted = {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 2}
    assert usage["output_tokens_details"] == {"reasoning_tokens": 1} | predicted
