"""Bodies of the Messages API: what reaches the engine, what is refused, what is let pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.http.parsing import parse_request
from deployments.messages.requests import MAX_TOOLS, CountTokensBody, MessagesBody
from deployments.messages.signatures import signature
from engine.core.grammar import GrammarSpec
from engine.dialogue import messages as dialogue
from engine.dialogue import tools as dialogue_tools
from engine.dialogue.messages import CacheMark
from engine.text.cache_marks import CacheWish
from tests.deployments.refusals import refusal

HELLO = {"role": "user", "content": "hello"}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
TOOLS = [
    {
        "name": "weather",
        "description": "d",
        "input_schema": CITY,
        "strict": True,
        "cache_control": {"type": "ephemeral"},
    },
    {
        "type": "custom",
        "name": "mcp__time",
        "input_schema": {"type": "object"},
        "input_examples": [{}],
        "defer_loading": False,
    },
]
BILLING = "x-anthropic-billing-header: cc_version=2.1.295; cch=1;"


def parse(**changes: Any) -> MessagesBody:
    body = {"model": "m", "max_tokens": 5, "messages": [HELLO]} | changes
    return parse_request(MessagesBody, json.dumps(body).encode(), [])[0]


def said(*messages: dict[str, Any], **changes: Any) -> tuple[dialogue.Message, ...]:
    return parse(messages=messages, **changes).prompt.messages


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": None}


def use(call_id: str, **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "weather", "input": given, "caller": {"type": "direct"}}


def result(call_id: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def test_texts_and_blocks_of_them_say_the_same() -> None:
    whole = said(HELLO, system="be brief")
    assert whole == (dialogue.Message("system", "be brief"), dialogue.Message("user", "hello"))
    assert said({"role": "user", "content": [text("hello")]}, system=[text("be brief")]) == whole
    assert said({"role": "user", "content": [text("a"), text("b")]}, system=[text("c"), text(""), text("d")]) == (
        dialogue.Message("system", "c\nd"),
        dialogue.Message("user", "a\nb"),
    )


def test_messages_of_an_agent() -> None:
    """Results come before the text that was sent with them; an answer's blocks are pieces of one text."""
    assert said(
        HELLO,
        {"role": "assistant", "content": [text("Let me "), text("see."), use("t1", city="Rome"), use("t2", city="ü")]},
        {
            "role": "user",
            "content": [text("and?"), result("t1", "sunny"), result("t2", [text("no"), text("idea")], is_error=True)],
        },
        {"role": "system", "content": "hurry"},
        {"role": "user", "content": [result("t3")]},
    )[1:] == (
        dialogue.Message(
            "assistant",
            "Let me see.",
            "",
            (
                dialogue.ToolCall("weather", '{"city": "Rome"}', "t1"),
                dialogue.ToolCall("weather", '{"city": "ü"}', "t2"),
            ),
        ),
        dialogue.Message("tool", "sunny", tool_call_id="t1", name="weather"),
        dialogue.Message("tool", "Error: no\nidea", tool_call_id="t2", name="weather"),
        dialogue.Message("user", "and?"),
        dialogue.Message("system", "hurry"),
        dialogue.Message("tool", "", tool_call_id="t3"),
    )


def test_consecutive_messages_of_one_role_are_one() -> None:
    parts = [{"role": "assistant", "content": [use("t1")]}, {"role": "assistant", "content": [use("t2")]}]
    messages = said(HELLO, HELLO, *parts, {"role": "user", "content": [result("t1"), result("t2")]})
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[0].content == "hello\nhello"
    assert len(messages[1].tool_calls) == 2


@pytest.mark.parametrize(
    ("block", "kept"),
    [
        ({"type": "thinking", "thinking": "hm", "signature": signature("hm", "m")}, "hm"),
        ({"type": "thinking", "thinking": "hm", "signature": ""}, "hm"),  # of a client that keeps none
        ({"type": "thinking", "thinking": "hm"}, "hm"),
        ({"type": "thinking", "thinking": "hmm", "signature": signature("hm", "m")}, ""),  # edited
        ({"type": "thinking", "thinking": "hm", "signature": signature("hm", "other")}, ""),
        ({"type": "thinking", "thinking": "hm", "signature": "EqQBCkYIBxgCKkDo\u00fc"}, ""),
        ({"type": "thinking", "thinking": "", "signature": signature("hm", "m")}, ""),  # its text was omitted
        ({"type": "redacted_thinking", "data": "EmwKAhgB"}, ""),
    ],
)
def test_thinking_that_comes_back(block: dict[str, Any], kept: str) -> None:
    messages = said(HELLO, {"role": "assistant", "content": [block, text("yes")]}, HELLO)
    assert messages[1] == dialogue.Message("assistant", "yes", kept)


@pytest.mark.parametrize(
    ("system", "prompt"),
    [
        (f"{BILLING}\nbe brief", "be brief"),
        ([text(BILLING), text("be brief")], "be brief"),
        ([text(f"{BILLING}\nbe"), text("brief")], "be\nbrief"),
        (BILLING, None),
        (f"say: {BILLING}", f"say: {BILLING}"),  # only where it begins the prompt
        ([text("a"), text(BILLING)], f"a\n{BILLING}"),
        ("", None),
        ([], None),
    ],
)
def test_the_line_about_billing_is_no_part_of_the_prompt(system: Any, prompt: str | None) -> None:
    first = said({"role": "user", "content": BILLING}, system=system)[0]
    assert first == (dialogue.Message("user", BILLING) if prompt is None else dialogue.Message("system", prompt))


def test_an_answer_goes_on_with_what_the_assistant_has_said_last() -> None:
    begun = parse(messages=[HELLO, {"role": "assistant", "content": "It is"}]).prompt
    assert (begun.continues, begun.messages[-1].content) == (True, "It is")
    empty = parse(messages=[HELLO, {"role": "assistant", "content": []}]).prompt
    assert (empty.continues, len(empty.messages)) == (False, 1)
    assert not parse().prompt.continues


def test_tools_and_choices_reach_the_engine() -> None:
    body = parse(tools=TOOLS, tool_choice={"type": "tool", "name": "mcp__time", "disable_parallel_tool_use": True})
    tools = (dialogue_tools.Tool("weather", "d", CITY, True), dialogue_tools.Tool("mcp__time", "", {"type": "object"}))
    assert body.prompt.tools == tools
    assert body.offered_tools == tools[1:]
    assert body.chosen_calls == dialogue_tools.ToolChoice("named", "mcp__time")
    assert not body.has_parallel_calls
    assert parse(tools=TOOLS).chosen_calls == parse(tools=TOOLS, tool_choice={"type": "auto"}).chosen_calls
    assert parse(tools=TOOLS).has_parallel_calls
    assert parse(tools=TOOLS, tool_choice={"type": "any"}).chosen_calls.is_forced
    none = parse(tools=TOOLS, tool_choice={"type": "none"})
    assert none.offered_tools == ()
    assert none.prompt == parse(tools=TOOLS).prompt  # so that the cached prompt stays the same


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True, "thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, {}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "xhigh"}),
    ],
)
def test_thinking_and_effort_reach_the_template(changes: dict[str, Any], values: dict[str, Any]) -> None:
    assert parse(**changes).prompt.template_kwargs == values


def test_a_budget_of_thinking_is_the_limit_of_the_engine() -> None:
    assert parse(thinking={"type": "enabled", "budget_tokens": 1024}).sampling_params().max_thinking_tokens == 1024
    assert parse(thinking={"type": "adaptive"}, max_thinking_tokens=7).sampling_params().max_thinking_tokens == 7
    assert parse().sampling_params().max_thinking_tokens is None


@pytest.mark.parametrize("name", ["output_format", "output_config"])
def test_the_form_of_an_answer(name: str) -> None:
    form = {"type": "json_schema", "schema": CITY}
    body = parse(**{name: form if name == "output_format" else {"format": form}})
    assert body.sampling_params().grammar == GrammarSpec.json_schema(CITY, is_lenient=False)
    assert body.form_param == name


def test_sampling() -> None:
    body = parse(max_tokens=32000, stop_sequences=["x", "y"], stop=["z"], temperature=0.5, top_p=0.9, top_k=7)
    sampling = body.sampling_params()
    assert (sampling.max_tokens, sampling.stop) == (32000, ("x", "y"))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert body.clamps_max_tokens
    assert parse(max_tokens=0).sampling_params().max_tokens == 1


def test_what_clients_send_besides_is_let_pass() -> None:
    plain = parse()
    for more in (
        {"container": None, "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}, "betas": ["x"]},
        {"service_tier": "auto", "mcp_servers": [], "inference_geo": "eu", "speed": "fast"},
        {"metadata": {"user_id": "x"}, "user_profile_id": "u", "workspace_id": "w", "of_tomorrow": [1]},
        {"stream_options": {"include_usage": True}, "system": None, "tools": None, "thinking": None},
    ):
        body = parse(**more)
        assert (body.prompt, body.sampling_params()) == (plain.prompt, plain.sampling_params())
    ours = parse(messages=[HELLO | {"id": "msg_1", "type": "message", "usage": {}}])
    assert ours.prompt == plain.prompt


MARK = {"cache_control": {"type": "ephemeral"}}
HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
SKIP = {"cache_control": {"type": "skip"}}
KEPT, KEPT_FOR_AN_HOUR = CacheMark(ttl_s=300.0), CacheMark(ttl_s=3600.0)


@pytest.mark.parametrize(
    ("changes", "marks"),
    [
        ({}, [()]),
        (MARK, [(KEPT,)]),
        ({"system": [text("a") | MARK, text("bc")]}, [(CacheMark(end=1, ttl_s=300.0),), ()]),
        ({"system": [text("x-anthropic-billing-header: a"), text("bc") | MARK]}, [(KEPT,), ()]),
        ({"system": "a", "tools": [TOOLS[0] | HOUR]}, [(KEPT_FOR_AN_HOUR,), ()]),
        ({"tools": [TOOLS[0] | MARK]}, [(CacheMark(end=0, ttl_s=300.0),)]),
        (
            {"messages": [{"role": "user", "content": [text("ab"), text("cd") | SKIP, text("ef") | HOUR]}]},
            [(CacheMark(3, 5), KEPT_FOR_AN_HOUR)],
        ),
        (
            {
                "messages": [
                    HELLO,
                    {"role": "assistant", "content": [text("so") | MARK, use("t")]},
                    {"role": "user", "content": [result("t", [text("abc") | MARK, text("d")], is_error=True) | SKIP]},
                ]
            },
            [(), (CacheMark(end=2, ttl_s=300.0),), (CacheMark(end=10, ttl_s=300.0), CacheMark(0, None))],
        ),
        (
            {"messages": [HELLO, {"role": "assistant", "content": [text("so"), use("t") | MARK]}, HELLO]},
            [(), (KEPT,), ()],
        ),
    ],
)
def test_a_mark_for_the_cache_has_its_place_wherever_it_is(changes: dict[str, Any], marks: list[Any]) -> None:
    assert [message.cache_marks for message in parse(**changes).prompt.messages] == marks


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"cache_control": {"type": "skip"}}, "cache_control.type"),
        ({"cache_control": {"type": "ephemeral", "ttl": "1d"}}, "cache_control.ttl"),
        ({"cache_control": {}}, "cache_control.type"),
        ({"tools": [TOOLS[0] | SKIP]}, "tools[0].cache_control.type"),
        ({"system": [text("a") | {"cache_control": {"type": "ephemeral", "ttl": 300}}]}, "system[0].cache_control.ttl"),
        ({"diagnostics": {"previous_message_id": "x" * 1000}}, "diagnostics.previous_message_id"),
    ],
)
def test_a_mark_that_says_nothing_known_is_refused(changes: dict[str, Any], param: str) -> None:
    assert refusal(lambda: parse(**changes))[0] == param


def test_what_a_request_is_compared_with() -> None:
    assert parse(diagnostics={"previous_message_id": "msg_1"}).cache_wish == CacheWish(compared_to="msg_1")
    assert parse(diagnostics={"previous_message_id": None}).cache_wish == CacheWish()
    assert parse(max_tokens=0).is_prewarm
    assert not parse().is_prewarm


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"max_tokens": None}, "max_tokens", "missing_required_parameter"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, "messages[0].content[0]", "invalid_value"),
        ({"system": [{"type": "text"}]}, "system[0].text", "missing_required_parameter"),
        ({"messages": [HELLO | {"content": [use("t")]}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": [result("t")]}]}, "messages[0].content", "invalid_value"),
        ({"messages": [HELLO, {"role": "assistant", "content": [use("t")]}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": [use("t")] * 129}]}, "messages[0].content", "invalid_value"),
        ({"system": {}}, "system", "invalid_value"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "invalid_value"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences", "invalid_value"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers", "unsupported_parameter"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "invalid_value"),
        ({"tools": [{"name": f"t{i}", "input_schema": {}} for i in range(MAX_TOOLS + 1)]}, "tools", "invalid_value"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name", "invalid_value"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema", "missing_required_parameter"),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type", "invalid_value"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name", "missing_required_parameter"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "tool_choice", "invalid_value"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "missing_required_parameter"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "output_config.format.schema", "invalid_value"),
        ({"output_format": {"type": "json_schema", "schema": {"enum": ["x" * 200_000]}}}, "output_format", "invalid_value"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], param: str, code: str) -> None:
    assert refusal(lambda: parse(**changes)) == (param, code)


@pytest.mark.parametrize(
    ("block", "remedy"),
    [
        ({"type": "image", "source": {"type": "url", "url": "https://x"}}, "describe the image in a text block"),
        ({"type": "document", "source": {"type": "text", "data": "x"}}, "send the document's text in a text block"),
        ({"type": "search_result", "content": []}, "in a text block"),
        ({"type": "server_tool_use", "id": "x"}, "blocks here are of type text"),
        ({"type": "{kind}" * 100}, "blocks here are of type text"),
    ],
)
def test_what_the_model_cannot_read_is_refused_with_what_to_do(block: dict[str, Any], remedy: str) -> None:
    for content in ([block], [result("t", [block])]):
        with pytest.raises(Exception, match=remedy) as caught:
            parse(messages=[{"role": "user", "content": content}])
        assert type(caught.value).__name__ == "UnsupportedParameterError"
        assert len(str(caught.value)) < 300


def test_tokens_are_counted_for_any_request() -> None:
    body = {"model": "m", "messages": [HELLO], "tools": TOOLS, "max_tokens": 5, "stop_sequences": ["x"]}
    counted = parse_request(CountTokensBody, json.dumps(body).encode(), [])[0]
    assert counted.prompt == parse(tools=TOOLS).prompt
