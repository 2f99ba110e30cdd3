"""The order in which a request names its session, and what stands in where it does not."""

import json
from typing import Any

import pytest

from deployments.routing.session_key import MAX_KEY_CHARS, MESSAGE_BEGINNING, PROMPT_BEGINNING, session_key

BODY: dict[str, Any] = {
    "session_id": "body",
    "conversation": {"id": "conv"},
    "prompt_cache_key": "cache",
    "messages": [{"role": "user", "content": "hi"}],
}


def test_first_that_is_present_wins() -> None:
    headers = [("X-Session-Id", "header"), ("X-Correlation-Id", "correlation")]
    assert session_key(headers, BODY) == "header"
    assert session_key(headers[1:], BODY) == "correlation"
    assert session_key([], BODY) == "body"
    assert session_key([], BODY | {"session_id": None}) == "conv"
    assert session_key([], BODY | {"session_id": None, "conversation": "plain"}) == "plain"
    assert session_key([], BODY | {"session_id": None, "conversation": None}) == "cache"


@pytest.mark.parametrize("name", ["x-session-id", "X-SESSION-ID", "X_Session_Id", "x_session-id"])
def test_header_names_ignore_case_and_underscores(name: str) -> None:
    assert session_key([("accept", "*/*"), (name, " me ")], BODY) == "me"


def test_empty_names_count_as_absent() -> None:
    assert session_key([("x-session-id", " "), ("x-correlation-id", "")], BODY | {"session_id": ""}) == "conv"


def chat(*messages: tuple[str, str]) -> str:
    return session_key([], {"messages": [{"role": role, "content": text} for role, text in messages]})


def test_unnamed_chat_keeps_its_key_while_it_grows() -> None:
    first = chat(("system", "be brief"), ("user", "hi"))
    assert first == chat(("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "bye"))
    assert first != chat(("system", "be brief"), ("user", "hello"))
    assert first != chat(("system", "be long"), ("user", "hi"))
    assert first != chat(("user", "hi"))
    assert first == chat(("developer", "be brief"), ("user", "hi"))


def test_unnamed_prompt_is_known_by_its_beginning() -> None:
    beginning = "x" * PROMPT_BEGINNING
    key = session_key([], {"prompt": beginning})
    assert key == session_key([], {"prompt": beginning + "y"}) == session_key([], {"prompt": [beginning]})
    assert key != session_key([], {"prompt": "y" + beginning})
    ids = list(range(PROMPT_BEGINNING))
    assert session_key([], {"prompt": ids}) == session_key([], {"prompt": [[*ids, 1]]})
    assert session_key([], {"prompt": ids}) != session_key([], {"prompt": ids[1:]})


def test_content_hash_never_equals_a_name() -> None:
    assert chat(("user", "hi")).startswith("content-")


@pytest.mark.parametrize("name", ["k" * 65, "k" * 8000, "\xe9" * 300, "\U0001f600" * 65])
def test_a_long_name_is_known_by_its_hash_wherever_it_comes_from(name: str) -> None:
    as_header = name.encode().decode("latin-1")  # as servers read headers
    key = session_key([("x-session-id", as_header)], {})
    assert len(key) <= MAX_KEY_CHARS
    assert key == session_key([("X_Correlation_Id", as_header)], {})
    assert key == session_key([], {"session_id": name}) == session_key([], {"conversation": name})
    assert key != session_key([], {"session_id": name + "k"})
    assert session_key([], {"session_id": "k" * MAX_KEY_CHARS}) == "k" * MAX_KEY_CHARS


def test_a_name_beyond_ascii_is_the_same_in_a_header_and_in_a_body() -> None:
    assert session_key([("x-session-id", "zo\xc3\xab")], {}) == session_key([], {"session_id": "zo\xeb"}) == "zo\xeb"
    assert session_key([("x-session-id", "zo\xeb")], {}) == "zo\xeb"  # sent as Latin-1
    assert session_key([("x-session-id", "\u4e2d")], {}) == "\u4e2d"


def test_the_beginning_of_long_messages_tells_conversations_apart() -> None:
    beginning = "x" * MESSAGE_BEGINNING
    assert chat(("user", beginning)) == chat(("user", beginning + "y")) != chat(("user", "y" + beginning))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert session_key([], {"messages": [{"role": "user", "content": parts}]}) == chat(("user", "ab"))


AGENT = [("x-claude-code-session-id", "s"), ("x-claude-code-agent-id", "a")]


def test_headers_that_agents_send_unasked() -> None:
    assert session_key(AGENT[:1], BODY) == "s"
    assert session_key(AGENT, BODY) == "s a"  # an agent within it has a conversation of its own
    assert session_key(AGENT[1:], BODY) == "body"
    assert session_key([("session_id", "codex")], BODY) == session_key([("Session-Id", "codex")], {}) == "codex"
    assert session_key([("x-opencode-session", "open")], BODY) == "open"
    assert session_key([*AGENT, ("x-session-id", "chosen")], BODY) == "chosen"


def test_names_in_bodies_of_agents() -> None:
    assert session_key([], {"conversation_id": "c", "prompt_cache_key": "cache"}) == "c"
    written = json.dumps({"device_id": "d", "session_id": "s"})
    assert session_key([], {"metadata": {"user_id": written}, "messages": []}) == "s"
    assert session_key([], {"metadata": {"user_id": "user_1_account_2_session_s"}, "messages": []}) == "s"
    assert session_key([], {"metadata": {"user_id": written}, "prompt_cache_key": "cache"}) == "cache"


@pytest.mark.parametrize(
    "metadata",
    [None, 1, "x", [], {}, {"user_id": 1}, {"user_id": "me"}, {"user_id": "[" * 1000}, {"user_id": "x" * 10**6}]
    + [{"user_id": json.dumps(user)} for user in (1, [], {}, {"session_id": 5}, {"session_id": ""})],
)
def test_metadata_that_names_no_session(metadata: Any) -> None:
    assert session_key([], {"metadata": metadata, "messages": BODY["messages"]}) == chat(("user", "hi"))


def test_the_system_prompt_of_the_messages_api_tells_conversations_apart_but_for_its_billing_line() -> None:
    def key(system: Any) -> str:
        blocks = [{"type": "tool_result", "tool_use_id": "t"}, {"type": "text", "text": "hi"}]
        return session_key([], {"system": system, "messages": [{"role": "user", "content": blocks}]})

    def billed(number: int) -> str:
        return f"x-anthropic-billing-header: cc_version=2.1.295; cch={number};"

    assert (
        key("be brief") == key([{"type": "text", "text": "be brief"}]) == chat(("system", "be brief"), ("user", "hi"))
    )
    assert key("be brief") != key("be long")
    assert key("be brief") == key(f"{billed(1)}\nbe brief") == key(f"{billed(2)}\nbe brief")
    parts = [[{"type": "text", "text": text} for text in (billed(number), "be brief")] for number in (1, 2)]
    assert key(parts[0]) == key(parts[1]) == key("be brief")
    assert key(f"be brief {billed(1)}") != key(f"be brief {billed(2)}")  # only where the line begins the prompt
