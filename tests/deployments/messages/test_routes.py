"""The endpoints of the Messages API over a scripted engine: headers, errors, pings, and any body at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.errors import ReplicaLostError, TooManyTokensError
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.http.parsing import parse_request
from deployments.ingress import IngressConfig, create_app
from deployments.messages import routes
from deployments.messages.errors import status_of
from deployments.messages.requests import CountTokensBody, MessagesBody
from deployments.routing.session_key import session_key
from deployments.tenants import TenantConfig, hash_key
from engine.errors import ContextLengthError, OverloadedError, PensieveError, RequestError
from engine.text.output import OutputDelta
from tests.deployments.conftest import MAX_BODY_BYTES, ScriptedEngine

HELLO = {"role": "user", "content": "hello"}
BODY = {"model": "tiny", "max_tokens": 5, "messages": [HELLO]}
WHOLE = DeltaItem(OutputDelta("Hello", (1, 2), (), (), 5, 3, 2, "stop"), 2)


def read_events(text: str) -> list[dict[str, Any]]:
    blocks = [block.split("\n") for block in text.split("\n\n")[:-1]]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    return events


async def test_a_message_and_its_headers(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.items = [WHOLE]
    headers = {"anthropic-beta": "a,b", "anthropic-version": "2023-06-01", "x-claude-code-session-id": "s"}
    answer = await client.post("/v1/messages?beta=true", json=BODY, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["request-id"].startswith("req_")
    assert answer.headers["x-pensieve-replica"] == "2"
    message = answer.json()
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": "Hello"}], "end_turn")
    assert message["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 2,
    }
    (request,) = engine.requests
    assert (request.session_id, request.request_id) == ("s", message["id"])
    assert request.clamps_max_tokens


async def test_more_tokens_than_any_window_has_are_not_asked_for(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    """A tenant's account would be charged with them until the answer ends."""
    for asked, expected in ((32_000, 100), (7, 7), (0, 1)):
        engine.items = [WHOLE]
        await client.post("/v1/messages", json=BODY | {"max_tokens": asked})
        assert engine.requests[-1].sampling.max_tokens == expected


async def test_a_stream(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/messages", json=BODY | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-pensieve-replica"] == "2"
    assert answer.headers["request-id"].startswith("req_")
    events = read_events(answer.text)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 2,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[-2]["usage"]["output_tokens"] == 4


async def test_tokens_are_counted_by_the_session_s_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.items = [DeltaItem(OutputDelta(num_prompt_tokens=7, finish_reason="stop"), 0)]
    body = {"model": "tiny", "messages": [HELLO]}
    answer = await client.post("/v1/messages/count_tokens", json=body, headers={"x-session-id": "s"})
    assert (answer.status_code, answer.json()) == (200, {"input_tokens": 7})
    assert answer.headers["request-id"].startswith("req_")
    (request,) = engine.requests
    assert (request.session_id, request.only_encodes, request.stream) == ("s", True, False)


def check_error(answer: httpx.Response, status: int, kind: str, message: str) -> None:
    assert answer.status_code == status
    error = answer.json()
    assert set(error) == {"type", "error", "request_id"}
    assert (error["type"], error["error"]["type"]) == ("error", kind)
    assert message in error["error"]["message"]
    assert error["request_id"] == answer.headers["request-id"]


LONG = [{"role": role, "content": "x"} for role in ("user", "assistant") * 51]


@pytest.mark.parametrize(
    ("changes", "status", "kind", "message"),
    [
        ({"model": "x"}, 404, "not_found_error", "the model 'x' is not served"),
        ({"messages": 5}, 400, "invalid_request_error", "messages: "),
        ({"system": "x" * MAX_BODY_BYTES}, 413, "request_too_large", "larger than"),
        ({"messages": LONG}, 400, "invalid_request_error", "prompt is too long: "),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_requests_that_are_wrong(
    client: httpx.AsyncClient, path: str, changes: dict[str, Any], status: int, kind: str, message: str
) -> None:
    check_error(await client.post(path, json=BODY | changes), status, kind, message)


@pytest.mark.parametrize(
    ("error", "status", "kind", "message"),
    [
        (OverloadedError("full"), 529, "overloaded_error", "full"),
        (TooManyTokensError("many", retry_after_s=2.5), 429, "rate_limit_error", "many"),
        (ContextLengthError("long"), 400, "invalid_request_error", "prompt is too long: long"),
        (ReplicaLostError("lost"), 503, "api_error", "lost"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_engine(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    error: PensieveError,
    status: int,
    kind: str,
    message: str,
    stream: bool,
) -> None:
    engine.items = [ErrorItem.of(error)]
    answer = await client.post("/v1/messages", json=BODY | {"stream": stream})
    check_error(answer, status, kind, message)
    retries = error.retry_after_s is not None
    assert ("retry-after" in answer.headers) is retries
    if not stream:
        check_error(await client.post("/v1/messages/count_tokens", json=BODY), status, kind, message)


async def test_a_defect_is_told_in_the_same_form(
    client: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        raise ValueError("a secret")
        yield

    monkeypatch.setattr(engine, "generate", fail)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = await client.post(path, json=BODY)
        check_error(answer, 500, "api_error", "internal error")
        assert "secret" not in answer.text


async def test_keys(engine: ScriptedEngine, tmp_path: Path) -> None:
    tenants = (TenantConfig(id="a", api_keys_sha256=(hash_key("sk-a"),)),)
    url = f"sqlite:///{tmp_path / 'conversations.db'}"
    app = create_app(engine, IngressConfig(store_url=url, tenants=tenants), ingress_id="ingress-1")
    engine.items = [WHOLE]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for headers in ({"x-api-key": "sk-a"}, {"authorization": "Bearer sk-a"}):
            assert (await client.post("/v1/messages", json=BODY, headers=headers)).status_code == 200
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for headers in (
            {},
            {"x-api-key": "sk-b"},
            {"x-api-key": ""},
            {"authorization": "Bearer x", "x-api-key": "sk-a"},
        ):
            answer = await client.post("/v1/messages", json=BODY, headers=headers)
            check_error(answer, 401, "authentication_error", "x-api-key")
            assert answer.headers["www-authenticate"] == "Bearer"


def make_slow(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first item comes after many turns of the event loop, each of which is time for a ping."""
    generate = engine.generate

    async def generate_late(request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        for _ in range(50):
            await asyncio.sleep(0)
        async with aclosing(generate(request)) as items:
            async for item in items:
                yield item

    monkeypatch.setattr(engine, "generate", generate_late)
    monkeypatch.setattr(routes, "PING_PERIOD_S", 0.0)


async def test_a_stream_that_has_to_wait_says_pings(
    client: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins before anything is known of the answer; what comes then is the same."""
    at_once = read_events((await client.post("/v1/messages", json=BODY | {"stream": True})).text)
    make_slow(engine, monkeypatch)
    answer = await client.post("/v1/messages", json=BODY | {"stream": True})
    assert answer.status_code == 200
    first, *events = read_events(answer.text)
    assert first == {"type": "ping"}
    told = [event for event in events if event["type"] != "ping"]
    told[0]["message"]["id"] = at_once[0]["message"]["id"]
    assert told == at_once


async def test_an_error_after_pings_is_an_event(
    client: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_slow(engine, monkeypatch)
    engine.items = [ErrorItem.of(OverloadedError("full"))]
    answer = await client.post("/v1/messages", json=BODY | {"stream": True})
    last = read_events(answer.text)[-1]
    assert last["error"] == {"type": "overloaded_error", "message": "full"}
    assert last["request_id"] == answer.headers["request-id"]


@pytest.mark.parametrize("period_s", [0.0, 60.0])
@pytest.mark.parametrize("num_items", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    monkeypatch: pytest.MonkeyPatch,
    period_s: float,
    num_items: int,
    stream: bool,
) -> None:
    monkeypatch.setattr(routes, "PING_PERIOD_S", period_s)
    engine.items, engine.hangs = engine.items[:num_items], True
    asking = asyncio.create_task(client.post("/v1/messages", json=BODY | {"stream": stream}))
    while not engine.num_running:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (engine.num_running, engine.num_aborted) == (0, 1)


# -- any body ----------------------------------------------------------------------------------------------------------

RICH: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "x-anthropic-billing-header: a"}, {"type": "text", "text": "be brief"}],
    "messages": [
        HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1, {"b": None}]}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]}],
        },
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {}}}}],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u_session_1"},
    "mcp_servers": [],
    "stream": True,
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "role", "content", "name", "id", "x"]) | st.text(), inner)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all parts of a body."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in parts for found in places(part, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(places(RICH)), ANYTHING), min_size=1, max_size=3, unique_by=lambda pair: pair[0])
)
def test_any_body_is_taken_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    """Longer paths first, so that each is still there."""
    data: Any = RICH
    for path, new in sorted(changes, key=lambda change: -len(change[0])):
        data = replaced(data, path, new)
    for kind in (MessagesBody, CountTokensBody):
        try:
            body, plain = parse_request(kind, json.dumps(data).encode(errors="replace"), [])
        except RequestError as error:
            refused = status_of(ErrorItem.of(error))
        else:
            assert body.prompt.num_chars > 0
            assert body.sampling_params().max_tokens
            assert session_key([], plain)
            continue
        assert refused == 400
