"""What a request to the Responses and Conversations API may say.

Every rejection names its parameter, every neutral value of a parameter passes, and what goes out as an item is taken
back as one.
"""

import itertools
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import conversations
from openai.types.conversations import ConversationItem
from openai.types.responses import ResponseInputMessageItem, ResponseItem, ResponseOutputMessage
from pydantic import TypeAdapter

from deployments.http.errors import wire_of
from deployments.http.function_tools import MAX_TOOLS
from deployments.http.generation_body import MAX_SESSION_KEY_CHARS
from deployments.http.parsing import Body, parse_query, parse_request
from deployments.responses.conversation_requests import (
    ConversationBody,
    ConversationUpdateBody,
    ItemsBody,
    ListQuery,
    RetrieveQuery,
)
from deployments.responses.input_items import CALL_NOT_IMPLEMENTED
from deployments.responses.items import messages_of
from deployments.responses.labels import INCLUDABLE
from deployments.responses.requests import (
    REASONING_NOT_IMPLEMENTED,
    RESPONSE_IGNORED,
    RESPONSE_NOT_IMPLEMENTED,
    ResponseBody,
)
from engine.core.request import SamplingParams
from engine.dialogue.messages import Message
from engine.errors import RequestError
from tests.deployments.refusals import refusal
from tests.deployments.sampling import SAMPLING

RESPONSE: dict[str, Any] = {"model": "m", "input": "hi"}
USER = {"role": "user", "content": "hi"}
IMAGE = {"type": "input_image", "image_url": "data:,", "detail": "auto"}
ANSWER = {
    "id": "msg_9",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}],
}
CALL = {
    "type": "function_call",
    "id": "fc_9",
    "call_id": "c1",
    "name": "f",
    "arguments": '{"a":1}',
    "status": "completed",
}
TEXT = {"type": "input_text", "text": "5"}
CALL_OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
THOUGHT = {
    "type": "reasoning",
    "id": "rs_9",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
    "status": "completed",
}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
UNSUPPORTED = "unsupported_parameter"
INVALID = "invalid_value"
UNKNOWN = "unknown_parameter"
MISSING = "missing_required_parameter"


def allowed(*tools: dict[str, Any]) -> dict[str, Any]:
    named = [{name: tool[name] for name in ("type", "name") if name in tool} for tool in tools]
    return {"type": "allowed_tools", "mode": "required", "tools": named}


def numbered() -> Callable[[str], str]:
    numbers = itertools.count(1)
    return lambda prefix: f"{prefix}_{next(numbers)}"


def parse(**changes: Any) -> ResponseBody:
    return parse_request(ResponseBody, json.dumps(RESPONSE | changes).encode())[0]


def parse_as(kind: type[Body], body: Any) -> Any:
    return parse_request(kind, json.dumps(body).encode())[0]


def test_plain_text() -> None:
    body = parse()
    assert body.input_items(numbered()) == (
        {
            "id": "msg_1",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_text", "text": "hi"}],
        },
    )
    assert body.sampling_params() == SamplingParams()
    assert body.store
    assert body.truncation == "disabled"
    assert not body.stream
    assert body.previous_response_id is body.conversation_id is body.instructions is None


def test_everything_implemented_is_taken() -> None:
    body = parse(
        **SAMPLING,
        max_output_tokens=9,
        stop="a",
        stop_token_ids=[4],
        previous_response_id="resp_1",
        store=False,
        instructions="Be brief.",
        metadata={"k": "v"},
        truncation="auto",
        stream=True,
        stream_options={"include_obfuscation": True},
        parallel_tool_calls=False,
        tool_choice="none",
        prompt_cache_key="cache",
        session_id="session",
    )
    assert body.sampling_params() == SamplingParams(max_tokens=9, stop=("a",), stop_token_ids=(4,), **SAMPLING)
    assert body.previous_response_id == "resp_1"
    assert not body.store
    assert body.instructions == "Be brief."
    assert body.metadata == {"k": "v"}
    assert body.truncation == "auto"
    assert body.stream
    assert body.tool_choice == "none"
    assert not body.parallel_tool_calls
    assert (body.prompt_cache_key, body.session_id) == ("cache", "session")


@pytest.mark.parametrize("conversation", ["conv_1", {"id": "conv_1"}])
def test_a_conversation_is_an_id_or_an_object_with_one(conversation: Any) -> None:
    assert parse(conversation=conversation).conversation_id == "conv_1"


def test_items_are_normalised() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items = parse(
        input=[
            {"type": "message", "role": "developer", "content": parts},
            {"role": "assistant", "content": "sure"},
            {"id": "msg_old", "status": None, "role": "user", "content": "c"},
            ANSWER,
        ]
    ).input_items(numbered())
    assert [item["id"] for item in items] == ["msg_1", "msg_2", "msg_3", "msg_4"]
    assert {item["status"] for item in items} == {"completed"}
    assert items[0]["content"] == parts
    assert items[1]["content"] == [{"type": "output_text", "text": "sure", "annotations": [], "logprobs": []}]
    assert items[3] == ANSWER | {"id": "msg_4"}
    assert messages_of(items, "Be brief.") == (
        Message("system", "Be brief."),
        Message("system", "ab"),
        Message("assistant", "sure"),
        Message("user", "c"),
        Message("assistant", "yes"),
    )
    assert messages_of(items[1:2]) == (Message("assistant", "sure"),)
    assert messages_of((), "") == (Message("system", ""),)
    assert messages_of(()) == ()


# Built once: each takes a second.
RESPONSE_ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)
CONVERSATION_ITEM: TypeAdapter[Any] = TypeAdapter(ConversationItem)
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "system", "developer"]),
        st.one_of(st.text(), st.lists(st.text(), min_size=1, max_size=3)),
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=50)
@given(MESSAGES)
def test_items_are_openai_s_and_are_taken_back_as_its_client_dumps_them(messages: list[tuple[str, Any]]) -> None:
    def content(role: str, texts: Any) -> Any:
        kind = "output_text" if role == "assistant" else "input_text"
        return texts if isinstance(texts, str) else [{"type": kind, "text": text} for text in texts]

    items = parse(input=[{"role": r, "content": content(r, c)} for r, c in messages]).input_items(numbered())
    joined = [
        Message("system" if r == "developer" else r, c if isinstance(c, str) else "".join(c)) for r, c in messages
    ]
    assert messages_of(items) == tuple(joined)
    for item in items:
        raw = json.dumps(item)
        of_response = RESPONSE_ITEM.validate_json(raw, strict=True)
        kind = ResponseOutputMessage if item["role"] == "assistant" else ResponseInputMessageItem
        assert type(of_response) is kind
        of_conversation = CONVERSATION_ITEM.validate_json(raw, strict=True)
        assert type(of_conversation) is conversations.Message
        for dumped in (of_response, of_conversation):
            for back in (dumped.model_dump(), dumped.model_dump(exclude_unset=True), dumped.to_dict()):
                assert parse(input=[back]).input_items(lambda prefix, item=item: item["id"]) == (item,)


@pytest.mark.parametrize("name", RESPONSE_NOT_IMPLEMENTED)
def test_what_is_not_implemented_is_refused_by_name(name: str) -> None:
    assert refusal(lambda: parse(**{name: ["something"]})) == (name, UNSUPPORTED)
    for neutral in (None, *RESPONSE_NOT_IMPLEMENTED[name]):
        assert parse(**{name: neutral}) == parse()


@pytest.mark.parametrize(("outer", "table"), [("reasoning", REASONING_NOT_IMPLEMENTED)])
def test_what_is_not_implemented_inside_is_refused_by_name(outer: str, table: dict[str, tuple[Any, ...]]) -> None:
    parse(**{outer: None})
    parse(**{outer: {}})
    for name, passing in table.items():
        assert refusal(lambda name=name: parse(**{outer: {name: "something"}})) == (f"{outer}.{name}", UNSUPPORTED)
        for neutral in (None, *passing):
            parse(**{outer: {name: neutral}})


@pytest.mark.parametrize("name", sorted(RESPONSE_IGNORED))
def test_ignored_parameters_change_nothing(name: str) -> None:
    assert parse(**{name: "x"}) == parse()


@pytest.mark.parametrize(
    "changes",
    [
        {"include": []},
        {"include": None},
        {"tool_choice": "auto"},
        {"tool_choice": None},
        {"parallel_tool_calls": True},
        {"store": None},
        {"metadata": None},
        {"metadata": {}},
        {"truncation": None},
        {"stream_options": None},
        {"temperature": None, "top_p": None, "max_output_tokens": None},
    ],
)
def test_what_asks_for_nothing_passes(changes: dict[str, Any]) -> None:
    assert parse(**changes) == parse()


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": None}, "model", MISSING),
        ({"input": None}, "input", MISSING),
        ({"input": []}, "input", INVALID),
        ({"input": 5}, "input", INVALID),
        ({"input": USER}, "input", INVALID),
        ({"input": ["hi"]}, "input[0]", INVALID),
        ({"input": [{}]}, "input[0].role", MISSING),
        ({"input": [{"role": "user"}]}, "input[0].content", MISSING),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", INVALID),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", INVALID),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content", INVALID),
        ({"input": [{"role": "user", "content": ["hi"]}]}, "input[0].content[0]", INVALID),
        ({"input": [USER | {"mood": 1}]}, "input[0].mood", UNKNOWN),
        ({"input": [{"type": "item_reference"}]}, "input[0].id", MISSING),
        ({"input": [{"id": "msg_1"}, {"id": "msg_1"}]}, "input", INVALID),
        ({"input": [USER, CALL | {"call_id": None}]}, "input[1].call_id", MISSING),
        ({"input": [CALL | {"arguments": {}}]}, "input[0].arguments", INVALID),
        ({"input": [CALL | {"name": "n" * 257}]}, "input[0].name", INVALID),
        ({"input": [CALL_OUTPUT | {"output": {"a": 1}}]}, "input[0].output", INVALID),
        ({"input": [CALL_OUTPUT | {"output": [IMAGE]}]}, "input[0].output[0].type", UNSUPPORTED),
        ({"input": [{"type": "reasoning", "content": ["x"]}]}, "input[0].content[0]", INVALID),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", UNSUPPORTED),
        ({"input": [USER | {"type": 5}]}, "input[0].type", UNSUPPORTED),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "see"}, IMAGE]}]},
            "input[0].content[1].type",
            UNSUPPORTED,
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
            UNSUPPORTED,
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "input[0].content[0].type",
            UNSUPPORTED,
        ),
        (
            {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
            "input[0].content[0].type",
            UNSUPPORTED,
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "text", "text": "chat's word"}]}]},
            "input[0].content[0].type",
            UNSUPPORTED,
        ),
        ({"input": [{"role": "user", "content": [{"text": "x"}]}]}, "input[0].content[0].type", MISSING),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", MISSING),
        (
            {"previous_response_id": "resp_1", "conversation": "conv_1"},
            "previous_response_id",
            "mutually_exclusive_parameters",
        ),
        ({"previous_response_id": 5}, "previous_response_id", INVALID),
        ({"previous_response_id": "r" * (MAX_SESSION_KEY_CHARS + 1)}, "previous_response_id", INVALID),
        ({"conversation": 5}, "conversation", INVALID),
        ({"conversation": {}}, "conversation.id", MISSING),
        ({"store": "yes"}, "store", INVALID),
        ({"instructions": ["x"]}, "instructions", INVALID),
        ({"max_output_tokens": 0}, "max_output_tokens", INVALID),
        ({"max_output_tokens": True}, "max_output_tokens", INVALID),
        ({"max_output_tokens": 1, "min_tokens": 2}, "min_tokens", INVALID),
        ({"temperature": -1}, "temperature", INVALID),
        ({"top_p": 0}, "top_p", INVALID),
        ({"truncation": "middle"}, "truncation", INVALID),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", INVALID),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            UNSUPPORTED,
        ),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", UNKNOWN),
        ({"metadata": "x"}, "metadata", INVALID),
        ({"metadata": {"k": 5}}, "metadata.k", INVALID),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", INVALID),
        ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 64, INVALID),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", INVALID),
        ({"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}, "include[1]", UNSUPPORTED),
        ({"include": [5]}, "include[0]", UNSUPPORTED),
        ({"include": "x"}, "include", INVALID),
        ({"tool_choice": "required"}, "tool_choice", INVALID),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", INVALID),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", MISSING),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", UNSUPPORTED),
        ({"tool_choice": "web_search"}, "tool_choice", UNSUPPORTED),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools", MISSING),
        ({"tool_choice": allowed({"type": "mcp"})}, "tool_choice.tools[0].type", UNSUPPORTED),
        ({"tools": [TOOL], "tool_choice": allowed(TOOL | {"name": "g"})}, "tool_choice", INVALID),
        ({"tools": [TOOL], "tool_choice": allowed()}, "tool_choice", INVALID),
        ({"tools": [TOOL, {"type": "web_search", "search_context_size": "low"}]}, "tools[1].type", UNSUPPORTED),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", MISSING),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading", UNSUPPORTED),
        ({"tools": [TOOL, TOOL]}, "tools", INVALID),
        ({"tools": [TOOL | {"name": f"f{n}"} for n in range(MAX_TOOLS + 1)]}, "tools", INVALID),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type", INVALID),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": 5}}}, "text.format.schema", INVALID),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", MISSING),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", INVALID),
        ({"text": {"verbosity": "loud"}}, "text.verbosity", INVALID),
        ({"text": {"x": 1}}, "text.x", UNKNOWN),
        ({"text": 5}, "text", INVALID),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort", INVALID),
        ({"background": True}, "background", UNSUPPORTED),
        ({"service_tier": "gold"}, "service_tier", INVALID),
        ({"top_logprobs": 2}, "top_logprobs", UNSUPPORTED),
        ({"max_tokens": 5}, "max_tokens", UNSUPPORTED),
        ({"logprobs": True}, "logprobs", UNKNOWN),
        ({"frobnicate": 1}, "frobnicate", UNKNOWN),
    ],
)
def test_refusals(changes: dict[str, Any], param: str, code: str) -> None:
    assert refusal(lambda: parse(**changes).sampling_params()) == (param, code)


def test_what_is_included_is_named() -> None:
    assert parse(include=sorted(INCLUDABLE)).include == sorted(INCLUDABLE)
    with pytest.raises(RequestError, match=r"'message\.output_text\.logprobs' is not supported"):
        parse(include=["message.output_text.logprobs"])


def test_a_refusal_does_not_repeat_megabytes() -> None:
    big = "x" * 1_000_000
    for changes in ({"include": [big]}, {"tool_choice": big}, {"input": [{"type": big}]}, {"metadata": {big: "v"}}):
        refusal(lambda changes=changes: parse(**changes))


def test_what_foreign_answers_say_besides_their_text_is_ignored() -> None:
    part = {"type": "output_text", "text": "x", "annotations": [{"type": "url_citation"}], "logprobs": [{}]}
    plain, decorated = (
        parse(input=[{"role": "assistant", "content": [content]} | more]).input_items(numbered())
        for content, more in (({"type": "output_text", "text": "x"}, {}), (part, {"phase": "commentary"}))
    )
    assert plain == decorated


@pytest.mark.parametrize("item", [CALL, CALL_OUTPUT])
@pytest.mark.parametrize("name", CALL_NOT_IMPLEMENTED)
def test_what_only_openai_s_calls_have_is_refused_by_name(item: dict[str, Any], name: str) -> None:
    assert refusal(lambda: parse(input=[item | {name: "something"}])) == (f"input[0].{name}", UNSUPPORTED)
    for neutral in (None, *CALL_NOT_IMPLEMENTED[name]):
        assert parse(input=[item | {name: neutral}]) == parse(input=[item])


def test_metadata_up_to_its_limits() -> None:
    metadata = {str(n).rjust(64): "v" * 512 for n in range(16)}
    assert parse(metadata=metadata).metadata == metadata
    assert parse_as(ConversationUpdateBody, {"metadata": metadata}).metadata == metadata


def test_conversation_bodies() -> None:
    for empty in ({}, {"items": None, "metadata": None}, {"items": []}):
        assert parse_as(ConversationBody, empty) == ConversationBody()
    created = parse_as(ConversationBody, {"metadata": {"k": "v"}, "items": [USER] * 20})
    assert created.metadata == {"k": "v"}
    assert [item["id"] for item in created.new_items(numbered())] == [f"msg_{n}" for n in range(1, 21)]
    added = parse_as(ItemsBody, {"items": [USER, ANSWER], "include": []})
    assert messages_of(added.new_items(numbered())) == (Message("user", "hi"), Message("assistant", "yes"))
    assert parse_as(ConversationUpdateBody, {"metadata": None}).metadata == {}


@pytest.mark.parametrize(
    ("kind", "body", "param", "code"),
    [
        (ConversationBody, {"items": [USER] * 21}, "items", INVALID),
        (ConversationBody, {"items": [{"type": "item_reference", "id": "msg_1"}]}, "items[0].type", UNSUPPORTED),
        (ConversationBody, {"metadata": {"k": None}}, "metadata.k", INVALID),
        (ConversationBody, {"name": "x"}, "name", UNKNOWN),
        (ConversationUpdateBody, {}, "metadata", MISSING),
        (ConversationUpdateBody, {"metadata": []}, "metadata", INVALID),
        (ItemsBody, {}, "items", MISSING),
        (ItemsBody, {"items": []}, "items", INVALID),
        (ItemsBody, {"items": [USER] * 21}, "items", INVALID),
        (ItemsBody, {"items": [USER], "include": ["x"]}, "include[0]", UNSUPPORTED),
    ],
)
def test_refusals_of_conversation_bodies(kind: type[Body], body: Any, param: str, code: str) -> None:
    assert refusal(lambda: parse_as(kind, body)) == (param, code)


def test_what_is_unknown_in_an_item_is_ignored_and_told_if_it_may_be() -> None:
    changes = {
        "input": [USER | {"mood": 1}, CALL | {"colour": 2}, CALL_OUTPUT | {"output": [TEXT | {"size": 3}]}],
        "tools": [TOOL | {"icon": "x"}],
        "tool_choice": {"type": "function", "name": "f", "why": "x"},
        "text": {"format": {"type": "text", "lines": 2}},
    }
    ignored: list[str] = []
    body, _ = parse_request(ResponseBody, json.dumps(RESPONSE | changes).encode(), ignored)
    assert sorted(ignored) == [
        "input[0].mood",
        "input[1].colour",
        "input[2].output[0].size",
        "text.format.lines",
        "tool_choice.why",
        "tools[0].icon",
    ]
    assert body == parse(
        input=[USER, CALL, CALL_OUTPUT | {"output": [TEXT]}],
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "text"}},
    )


def test_list_queries() -> None:
    assert parse_query(ListQuery, []) == ListQuery(after=None, limit=20, order="desc")
    pairs = [("after", "msg_1"), ("limit", "100"), ("order", "asc")]
    assert parse_query(ListQuery, pairs) == ListQuery(after="msg_1", limit=100, order="asc")
    assert parse_query(RetrieveQuery, [("stream", "false"), ("include_obfuscation", "true")]) == RetrieveQuery()
    pairs = [("stream", "true"), ("starting_after", "5")]
    assert parse_query(RetrieveQuery, pairs) == RetrieveQuery(stream=True, starting_after=5)


@pytest.mark.parametrize(
    ("kind", "pairs", "param", "code"),
    [
        (ListQuery, [("limit", "0")], "limit", INVALID),
        (ListQuery, [("limit", "101")], "limit", INVALID),
        (ListQuery, [("limit", "many")], "limit", INVALID),
        (ListQuery, [("limit", "")], "limit", INVALID),
        (ListQuery, [("limit", "1"), ("limit", "2")], "limit", INVALID),
        (ListQuery, [("order", "up")], "order", INVALID),
        (ListQuery, [("after", "x" * 1000)], "after", INVALID),
        (ListQuery, [("before", "x")], "before", UNKNOWN),
        (RetrieveQuery, [("stream", "maybe")], "stream", INVALID),
        (RetrieveQuery, [("starting_after", "1")], "starting_after", INVALID),
        (RetrieveQuery, [("stream", "true"), ("starting_after", "-1")], "starting_after", INVALID),
        (RetrieveQuery, [("x", "y")], "x", UNKNOWN),
    ],
)
def test_refusals_of_queries(kind: type[Body], pairs: list[tuple[str, str]], param: str, code: str) -> None:
    assert refusal(lambda: parse_query(kind, pairs)) == (param, code)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "id", "format", "effort", "{param}"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
NAMES = sorted({*ResponseBody.model_fields, *RESPONSE_NOT_IMPLEMENTED} - {"model"})


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3))
def test_any_json_is_a_request_or_refused(changes: dict[str, Any]) -> None:
    refused = None
    try:
        body = parse(**changes)
        body.sampling_params()
        stored = dict.fromkeys(body.referenced_ids, ANSWER)
        body.prompt_value(body.input_items(numbered(), stored))
    except RequestError as error:
        refused = error
    assert refused is None or (wire_of(refused).status == 400 and refused.param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": [{"role": "user", "content": ""}] * 130_000}, None),
        ({"input": [{"role": "user", "content": ""}] * 9000}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 9000}]}, "input[0].content"),
        ({"metadata": dict.fromkeys(map(str, range(90_000)), 1)}, "metadata"),
        ({"metadata": dict.fromkeys(map(str, range(17)), "x")}, "metadata"),
    ],
    ids=["items", "fewer items", "parts", "metadata that is none", "metadata"],
)
def test_the_number_of_what_a_body_holds_is_bounded_before_it_is_looked_at(
    changes: dict[str, Any], param: str | None
) -> None:
    raw = json.dumps(RESPONSE | changes).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            parse_request(ResponseBody, raw)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.param == param
    assert most_bytes < 12 * len(raw) + 10_000_000
