"""The HTTP application over a scripted engine: what is on the wire, for good requests and for bad ones."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.types import Message

from deployments import tenants
from deployments.errors import ReplicaLostError
from deployments.generation import DeltaItem, ErrorItem, ModelCard
from deployments.ingress import IngressConfig, create_app
from deployments.tenants import TenantConfig, hash_key
from engine import __version__
from engine.errors import ContextLengthError, OverloadedError
from engine.tenant import Tenant
from engine.text.output import OutputDelta
from engine.text.prompt import ChatPrompt, TokenPrompt
from tests.deployments.conftest import MAX_BODY_BYTES

JSON = {"content-type": "application/json"}
CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": [7, 8]}
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 4,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
}


def events(response: httpx.Response) -> list[Any]:
    """The data of each event; "[DONE]" as it is. Checks the framing."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [data if (data := block[6:]) == "[DONE]" else json.loads(data) for block in blocks]


def assert_error(response: httpx.Response, status: int, code: str | None, param: str | None) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["code"], error["param"]) == (code, param)


async def test_chat(client: httpx.AsyncClient, engine: Any) -> None:
    engine.items = [DeltaItem(OutputDelta("Hello", (1, 2, 3, 4), (), (), 5, 3, 4, "stop"), 2)]
    response = await client.post(CHAT_URL, json=CHAT | {"seed": 3}, headers={"X_Session_ID": "me"})
    assert response.status_code == 200
    assert response.headers["x-pensieve-replica"] == "2"
    assert response.headers["x-pensieve-ingress"] == "ingress-1"
    answer = response.json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == USAGE
    (request,) = engine.requests
    assert request.request_id == answer["id"]
    assert request.session_id == "me"
    assert request.prompt == ChatPrompt((("user", "hi"),))
    assert request.sampling.seed == 3
    assert not request.stream
    assert (engine.num_running, engine.num_aborted) == (0, 0)


async def test_chat_stream(client: httpx.AsyncClient, engine: Any) -> None:
    response = await client.post(CHAT_URL, json=CHAT | {"stream": True})
    assert response.headers["x-pensieve-replica"] == "2"
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hel"},
        {"content": "lo"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert engine.requests[0].stream
    assert (engine.num_running, engine.num_aborted) == (0, 0)


@pytest.mark.parametrize(("url", "body"), [(CHAT_URL, CHAT), (COMPLETIONS_URL, COMPLETION)])
async def test_usage_comes_last_and_without_choices(client: httpx.AsyncClient, url: str, body: Any) -> None:
    response = await client.post(url, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == USAGE


async def test_completion(client: httpx.AsyncClient, engine: Any) -> None:
    engine.items = [DeltaItem(OutputDelta("Hello", (1, 2), (), (7, 8), 5, 0, 4, "length"), 2)]
    answer = (await client.post(COMPLETIONS_URL, json=COMPLETION | {"return_token_ids": True})).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "Hello",
            "logprobs": None,
            "finish_reason": "length",
            "token_ids": [1, 2],
            "prompt_token_ids": [7, 8],
        }
    ]
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 5}
    assert engine.requests[0].prompt == TokenPrompt((7, 8))
    assert engine.requests[0].return_prompt_token_ids


async def test_each_prompt_of_a_list_has_its_session(client: httpx.AsyncClient, engine: Any) -> None:
    """So that they are spread over the replicas; a session that the client names is theirs all."""
    engine.items = [DeltaItem(OutputDelta("Hello", (1,), num_prompt_tokens=5, finish_reason="stop"), 2)]
    body = COMPLETION | {"prompt": [[7], [8], [7]], "n": 2}
    answer = (await client.post(COMPLETIONS_URL, json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == 15
    sessions = {request.prompt: set() for request in engine.requests}
    for request in engine.requests:
        sessions[request.prompt].add(request.session_id)
    assert [len(names) for names in sessions.values()] == [1, 1]
    assert len(set.union(*sessions.values())) == 2
    alone = await client.post(COMPLETIONS_URL, json=COMPLETION | {"prompt": [7]})
    assert alone.status_code == 200
    assert engine.requests[-1].session_id in sessions[TokenPrompt((7,))]
    assert len({request.request_id for request in engine.requests}) == 7
    engine.requests.clear()
    await client.post(COMPLETIONS_URL, json=body | {"session_id": "mine"})
    assert {request.session_id for request in engine.requests} == {"mine"}


async def test_completion_stream(client: httpx.AsyncClient) -> None:
    *chunks, done = events(await client.post(COMPLETIONS_URL, json=COMPLETION | {"stream": True}))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_answer_decides_the_status(
    client: httpx.AsyncClient, engine: Any, stream: bool
) -> None:
    engine.items = [ErrorItem.of(ContextLengthError("too long"))]
    response = await client.post(CHAT_URL, json=CHAT | {"stream": stream})
    assert_error(response, 400, "context_length_exceeded", "messages")
    assert "retry-after" not in response.headers
    assert (engine.num_running, engine.num_aborted) == (0, 0)


async def test_overload_says_when_to_come_back(client: httpx.AsyncClient, engine: Any) -> None:
    engine.items = [ErrorItem.of(OverloadedError("full", retry_after_s=1.2))]
    response = await client.post(CHAT_URL, json=CHAT)
    assert_error(response, 429, "overloaded", None)
    assert response.headers["retry-after"] == "2"


async def test_an_error_in_mid_stream_is_an_event_and_the_end(client: httpx.AsyncClient, engine: Any) -> None:
    engine.items[1:] = [ErrorItem.of(ReplicaLostError("lost"))]
    response = await client.post(CHAT_URL, json=CHAT | {"stream": True})
    assert response.status_code == 200
    *_, error = events(response)
    assert error == {"error": {"message": "lost", "type": "service_unavailable", "param": None, "code": "replica_lost"}}


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (b"{", None, None),
        (b"", None, None),
        (b"[1]", None, None),
        (b"\xff\xfe\x00", None, None),
        (json.dumps(CHAT | {"temperature": "hot"}).encode(), "temperature", "invalid_value"),
        (json.dumps(CHAT | {"temperature": -1}).encode(), "temperature", "invalid_value"),
        (json.dumps(CHAT | {"messages": []}).encode(), "messages", "invalid_value"),
        (json.dumps(CHAT | {"tools": [{}]}).encode(), "tools[0].type", "missing_required_parameter"),
    ],
)
async def test_bad_requests_do_not_reach_the_engine(
    client: httpx.AsyncClient, engine: Any, content: bytes, param: str | None, code: str | None
) -> None:
    assert_error(await client.post(CHAT_URL, content=content, headers=JSON), 400, code, param)
    assert engine.requests == []
    assert engine.num_describes == 0


async def test_unknown_model(client: httpx.AsyncClient, engine: Any) -> None:
    assert_error(await client.post(CHAT_URL, json=CHAT | {"model": "gpt"}), 404, "model_not_found", "model")
    assert engine.requests == []


async def test_too_large(client: httpx.AsyncClient, engine: Any) -> None:
    assert_error(await client.post(CHAT_URL, content=b"x" * 10_000, headers=JSON), 413, "body_too_large", None)

    async def chunks() -> Any:
        for _ in range(10):
            yield b"x" * 1000

    assert_error(await client.post(CHAT_URL, content=chunks(), headers=JSON), 413, "body_too_large", None)
    assert engine.requests == []
    fits = json.dumps(CHAT).encode().ljust(MAX_BODY_BYTES)
    assert (await client.post(CHAT_URL, content=fits, headers=JSON)).status_code == 200
    assert (await client.post(CHAT_URL, content=fits + b" ", headers=JSON)).status_code == 413


async def test_unknown_route_and_wrong_method(client: httpx.AsyncClient) -> None:
    assert_error(await client.get("/v2/chat"), 404, "unknown_url", None)
    response = await client.get(CHAT_URL)
    assert_error(response, 405, "method_not_allowed", None)
    assert response.headers["allow"] == "OPTIONS, POST"


async def test_a_bug_is_an_error_body_too(client: httpx.AsyncClient, engine: Any) -> None:
    engine.items = [None]
    assert_error(await client.post(CHAT_URL, json=CHAT), 500, None, None)


async def test_models(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 100)
    assert (await client.get("/v1/models/tiny")).json() == model
    assert_error(await client.get("/v1/models/some/other"), 404, "model_not_found", "model")


async def test_liveness_readiness_version(client: httpx.AsyncClient, engine: Any) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).status_code == 200
    assert (await client.get("/version")).json() == {"version": __version__}
    engine.is_up = False
    assert (await client.get("/health")).status_code == 200
    response = await client.get("/ready")
    assert_error(response, 503, "engine_stopped", None)
    assert response.headers["retry-after"] == "1"


class Connection:
    """One POST of a client that may leave, as an ASGI server gives it to the application.

    refuses: whatever is sent to it is an error, as when it has left.
    """

    def __init__(
        self, app: FastAPI, body: dict[str, Any], spec_version: str, path: str = CHAT_URL, *, refuses: bool = False
    ) -> None:
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        scope = {
            "type": "http",
            "asgi": {"spec_version": spec_version},
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [],
        }
        self._refuses = refuses
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._take))

    async def _take(self, message: Message) -> None:
        if self._refuses:
            await asyncio.sleep(0)
            raise OSError("the connection is closed")
        await self.sent.put(message)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})


@pytest.mark.parametrize("path", [CHAT_URL, "/v1/responses"])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_client_that_leaves_before_the_stream_begins_is_told_to_the_engine(
    app: FastAPI, client: httpx.AsyncClient, engine: Any, spec_version: str, path: str
) -> None:
    """So early that no event is ever asked for, as ASGI servers of both kinds say it."""
    engine.hangs, engine.items = True, engine.items[:2]
    body = CHAT | {"stream": True}
    conversation = None
    if path != CHAT_URL:
        conversation = (await client.post("/v1/conversations")).json()["id"]
        body = {"model": "tiny", "input": "hi", "conversation": conversation, "stream": True}
    connection = Connection(app, body, spec_version, path, refuses=True)
    connection.leave()
    try:
        await connection.task
    except (OSError, ClientDisconnect):
        assert spec_version == "2.4"
    async with asyncio.timeout(10):
        while engine.num_running:
            await asyncio.sleep(0.01)
    assert engine.num_aborted == 1
    if conversation is not None:  # is free for the next turn
        engine.hangs, engine.items = False, [DeltaItem(OutputDelta("Hello", (1,), finish_reason="stop"), 2)]
        async with asyncio.timeout(10):
            while (await client.post(path, json=body | {"stream": False})).status_code == 409:
                await asyncio.sleep(0.01)
        items = (await client.get(f"/v1/conversations/{conversation}/items")).json()["data"]
        assert [item["role"] for item in items] == ["assistant", "user"]


async def test_client_that_leaves_in_mid_stream_is_told_to_the_engine(app: FastAPI, engine: Any) -> None:
    engine.hangs, engine.items = True, engine.items[:2]
    connection = Connection(app, CHAT | {"stream": True}, spec_version="2.3")
    assert (await connection.sent.get())["type"] == "http.response.start"
    assert b"Hel" in (await connection.sent.get())["body"]
    assert engine.num_running == 1
    connection.leave()
    await connection.task
    assert (engine.num_running, engine.num_aborted) == (0, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_request_that_serve_cancels_is_told_to_the_engine(app: FastAPI, engine: Any, stream: bool) -> None:
    engine.hangs, engine.items = True, engine.items[:2] if stream else []
    connection = Connection(app, CHAT | {"stream": stream}, spec_version="2.4")
    while engine.num_running == 0:
        await asyncio.sleep(0)
    if stream:
        await connection.sent.get()
        await connection.sent.get()
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert (engine.num_running, engine.num_aborted) == (0, 1)


# -- tenants -----------------------------------------------------------------------------------------------------------

KEYS = {"a": "sk-a", "b": "sk-b"}


@pytest.fixture
async def tenants_client(engine: Any, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    both = tuple(TenantConfig(id=name, api_keys_sha256=(hash_key(key),), weight=3.0) for name, key in KEYS.items())
    config = IngressConfig(tenants=both, store_url=f"sqlite:///{tmp_path / 'conversations.db'}")
    transport = httpx.ASGITransport(create_app(engine, config, ingress_id="i"))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def test_the_key_says_who_asks(tenants_client: httpx.AsyncClient, engine: Any) -> None:
    for name, key in KEYS.items():
        headers = {"authorization": f"Bearer {key}", "x-session-id": "same"}
        assert (await tenants_client.post(CHAT_URL, json=CHAT, headers=headers)).status_code == 200
        assert engine.requests[-1].tenant == Tenant(name, 3.0)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer sk-c"}, {"authorization": "Basic sk-a"}], ids=str)
async def test_nothing_but_health_is_open_to_strangers(
    tenants_client: httpx.AsyncClient, engine: Any, headers: dict[str, str]
) -> None:
    for method, path in [("POST", CHAT_URL), ("POST", COMPLETIONS_URL), ("GET", "/v1/models"), ("GET", "/v1/models/x")]:
        response = await tenants_client.request(method, path, json=CHAT, headers=headers)
        assert_error(response, 401, "invalid_api_key", None)
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/version"):
        assert (await tenants_client.get(path, headers=headers)).status_code == 200
    assert engine.requests == []


async def test_without_keys_another_machine_is_refused(app: FastAPI, engine: Any) -> None:
    transport = httpx.ASGITransport(app, client=("10.1.2.3", 4567))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert_error(await client.post(CHAT_URL, json=CHAT), 403, "no_api_keys_configured", None)
        assert (await client.get("/health")).status_code == 200
    assert engine.requests == []


async def test_a_deadline_is_an_error_before_the_answer_and_an_event_in_it(
    client: httpx.AsyncClient, engine: Any
) -> None:
    engine.hangs = True
    engine.items = engine.items[:1]
    response = await client.post(CHAT_URL, json=CHAT | {"stream": True, "timeout": 0.05})
    assert events(response)[-1]["error"]["code"] == "timeout"
    engine.items = []
    assert_error(await client.post(CHAT_URL, json=CHAT | {"timeout": 0.05}), 504, "timeout", "timeout")
    assert engine.num_running == 0
    assert_error(await client.post(CHAT_URL, json=CHAT | {"timeout": 0}), 400, "invalid_value", "timeout")


async def test_keys_of_a_changed_file_count_in_a_running_server(engine: Any, tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"

    def write(key: str, **limits: int) -> TenantConfig:
        tenant = TenantConfig(id="a", api_keys_sha256=(hash_key(key),), **limits)
        file.write_text(json.dumps({"tenants": [tenant.model_dump(mode="json")]}))
        return tenant

    built = write("sk-old")
    by_environment = TenantConfig(id="default", api_keys_sha256=(hash_key("sk-environment"),))
    config = IngressConfig(
        tenants=(built, by_environment),
        tenants_file=str(file),
        environment_tenants=(by_environment,),
        store_url=f"sqlite:///{tmp_path / 'conversations.db'}",
    )

    async def statuses(client: httpx.AsyncClient) -> list[int]:
        keys = ("sk-old", "sk-new", "sk-environment")
        headers = [{"authorization": f"Bearer {key}"} for key in keys]
        return [(await client.post(CHAT_URL, json=CHAT, headers=header)).status_code for header in headers]

    write("sk-new", tokens_per_minute=1)  # between the build and the start of this replica
    app = create_app(engine, config, ingress_id="i")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert await statuses(client) == [401, 200, 200]
        assert await statuses(client) == [401, 429, 200]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tenants, "WATCH_PERIOD_S", 0.01)
            async with app.router.lifespan_context(app), asyncio.timeout(10):
                write("sk-old")
                while (found := await statuses(client)) != [200, 401, 200]:
                    assert found[2] == 200
                    await asyncio.sleep(0.01)


# -- overload ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def full_server(engine: Any, url: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Three engine replicas with room for 4 requests each, which never come to an end."""

    async def model_card() -> ModelCard:
        return ModelCard("tiny", 100, 4)

    engine.hangs, engine.items, engine.model_card = True, [], model_card
    app = create_app(engine, IngressConfig(store_url=url, **options), ingress_id="i", num_engine_replicas=lambda: 3)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT_URL, CHAT), (COMPLETIONS_URL, COMPLETION), ("/v1/responses", {"model": "tiny", "input": "x"})],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_no_engine_has_room_for_is_refused_at_once(
    engine: Any, tmp_path: Path, path: str, body: dict[str, Any], stream: bool
) -> None:
    """50 at once, where the engines take 12: they hear nothing of the others."""
    async with full_server(engine, f"sqlite:///{tmp_path / 'conversations.db'}") as client:
        body = body | {"stream": stream, **({"store": False} if "input" in body else {})}
        asking = [asyncio.create_task(client.post(path, json=body)) for _ in range(50)]
        async with asyncio.timeout(30):
            while sum(task.done() for task in asking) < 38:
                await asyncio.sleep(0.01)
        refused = [task.result() for task in asking if task.done()]
        assert len(refused) == 38
        for response in refused:
            assert_error(response, 429, "overloaded", None)
            assert response.headers["retry-after"] == "1"
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        async with asyncio.timeout(30):
            while engine.num_running:
                await asyncio.sleep(0.01)
        assert len(engine.requests) == 12
        # Every place is free again.
        engine.hangs, engine.items = False, [DeltaItem(OutputDelta("Hello", (1,), finish_reason="stop"), 2)]
        answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(12)))
        assert {answer.status_code for answer in answers} == {200}


async def test_bad_requests_and_refusals_leave_their_places(client: httpx.AsyncClient, engine: Any) -> None:
    engine.items = [ErrorItem.of(ContextLengthError("too long"))]
    for _ in range(130):  # more than there are places
        assert (await client.post(CHAT_URL, json=CHAT)).status_code == 400
    engine.items = [None]
    for _ in range(130):
        assert (await client.post(CHAT_URL, json=CHAT)).status_code == 500


async def test_a_full_server_lets_a_tenant_with_less_than_its_share_ask_the_engines(
    engine: Any, tmp_path: Path
) -> None:
    both = tuple(TenantConfig(id=name, api_keys_sha256=(hash_key(key),)) for name, key in KEYS.items())
    async with full_server(engine, f"sqlite:///{tmp_path / 'conversations.db'}", tenants=both) as client:
        headers = {name: {"authorization": f"Bearer {key}"} for name, key in KEYS.items()}
        flood = [asyncio.create_task(client.post(CHAT_URL, json=CHAT, headers=headers["a"])) for _ in range(20)]
        async with asyncio.timeout(30):
            while engine.num_running < 12:
                await asyncio.sleep(0.01)
        other = asyncio.create_task(client.post(CHAT_URL, json=CHAT, headers=headers["b"]))
        async with asyncio.timeout(30):
            while engine.num_running < 13:
                await asyncio.sleep(0.01)
        assert engine.requests[-1].tenant.tenant_id == "b"
        assert (await client.post(CHAT_URL, json=CHAT, headers=headers["a"])).status_code == 429
        for task in (*flood, other):
            task.cancel()
        await asyncio.gather(*flood, other, return_exceptions=True)


async def test_many_who_ask_for_readiness_at_once_are_one_question(client: httpx.AsyncClient, engine: Any) -> None:
    answers = await asyncio.gather(*(client.get("/ready") for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert engine.num_describes == 1


# -- sizes -------------------------------------------------------------------------------------------------------------


async def test_what_cannot_fit_the_window_is_not_sent_to_an_engine(client: httpx.AsyncClient, engine: Any) -> None:
    """The window is 100 tokens, and a message is at least one."""
    many = [{"role": "user", "content": ""}] * 101
    response = await client.post(CHAT_URL, json=CHAT | {"messages": many})
    assert_error(response, 400, "context_length_exceeded", "messages")
    response = await client.post(COMPLETIONS_URL, json=COMPLETION | {"prompt": [1] * 101})
    assert_error(response, 400, "context_length_exceeded", "prompt")
    for path, body in (
        (CHAT_URL, CHAT),
        (COMPLETIONS_URL, COMPLETION),
        ("/v1/responses", {"model": "tiny", "input": "x"}),
    ):
        over = {"min_tokens": 10**299, "max_tokens": None}
        assert_error(await client.post(path, json=body | over), 400, "invalid_value", "min_tokens")
    assert engine.requests == []
    assert (await client.post(CHAT_URL, json=CHAT | {"min_tokens": 100})).status_code == 200


async def test_an_error_does_not_repeat_megabytes(client: httpx.AsyncClient) -> None:
    for changes in ({"model": "x" * 3000}, {"messages": [{"role": "user", "content": {"x" * 3000: 1}}]}):
        assert len((await client.post(CHAT_URL, json=CHAT | changes)).content) < 1500


# -- browsers and proxies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"origin": "http://evil.example"}, 403, "cross_origin_request"),
        ({"sec-fetch-site": "cross-site"}, 403, "cross_origin_request"),
        ({"host": "evil.example"}, 403, "no_api_keys_configured"),
        ({"x-forwarded-for": "127.0.0.1"}, 403, "no_api_keys_configured"),
    ],
    ids=str,
)
async def test_an_open_server_serves_no_web_pages_and_no_proxies(
    client: httpx.AsyncClient, engine: Any, headers: dict[str, str], status: int, code: str
) -> None:
    for path, body in ((CHAT_URL, CHAT), ("/v1/responses", {"model": "tiny", "input": "x"}), ("/v1/conversations", {})):
        response = await client.post(path, content=json.dumps(body), headers=JSON | headers)
        assert_error(response, status, code, None)
    if status == 403:
        assert (await client.get("/v1/models", headers=headers)).status_code == 403
    assert engine.requests == []


async def test_with_keys_it_does_not_matter_where_a_request_comes_from(tenants_client: httpx.AsyncClient) -> None:
    headers = {
        "authorization": "Bearer sk-a",
        "content-type": "text/plain",
        "host": "llm.example.org",
        "origin": "https://chat.example.org",
        "x-forwarded-for": "8.8.8.8",
    }
    response = await tenants_client.post(CHAT_URL, content=json.dumps(CHAT), headers=headers)
    assert response.status_code == 200


UNASKED = {
    "frobnicate": 1,
    "messages": [{"role": "user", "content": "hi", "mood": {"a": 1}, "tone": None}],
    "user": "u",
}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_names_unknown_parameters_that_were_ignored(client: httpx.AsyncClient, stream: bool) -> None:
    response = await client.post(CHAT_URL, json=CHAT | UNASKED | {"stream": stream})
    assert response.status_code == 200
    assert response.headers["x-pensieve-ignored"] == "frobnicate,messages[0].mood"
    assert "x-pensieve-ignored" not in (await client.post(CHAT_URL, json=CHAT | {"user": "u"})).headers


async def test_so_do_answers_of_what_the_server_keeps(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/v1/conversations", json={"metadata": {}, "items": [{"role": "user", "x": 1, "content": "a"}]}
    )
    assert response.status_code == 200
    assert response.headers["x-pensieve-ignored"] == "items[0].x"
    listed = await client.get(f"/v1/conversations/{response.json()['id']}/items?limit=5&api-version=2026-10")
    assert listed.status_code == 200
    assert listed.headers["x-pensieve-ignored"] == "api-version"


async def test_whatever_names_unknown_parameters_have_the_header_is_one(client: httpx.AsyncClient) -> None:
    names = ["a,b", "\r\nset-cookie: x=1", "größe", *(f"{number:064}" for number in range(40))]
    response = await client.post(CHAT_URL, json=CHAT | dict.fromkeys(names, 1))
    assert response.status_code == 200
    first, second, third, *others, end = response.headers["x-pensieve-ignored"].split(",")
    assert (first, second, third) == ("a?b", "??set-cookie:?x?1", "gr??e")
    assert others
    assert set(others) <= set(names)
    assert end in names or end == "..."
    assert "set-cookie" not in response.headers


async def test_strict_parameters_refuse_what_is_unknown(engine: Any, tmp_path: Path) -> None:
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'conversations.db'}", strict_parameters=True)
    transport = httpx.ASGITransport(create_app(engine, config, ingress_id="ingress-1"))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert_error(await client.post(CHAT_URL, json=CHAT | {"frobnicate": 1}), 400, "unknown_parameter", "frobnicate")
        assert_error(await client.post(CHAT_URL, json=CHAT | UNASKED), 400, "unknown_parameter", "messages[0].mood")
        listed = await client.get("/v1/conversations/conv_1/items?api-version=1")
        assert_error(listed, 400, "unknown_parameter", "api-version")
        document = (await client.get("/openapi.json")).json()
        assert document["components"]["schemas"]["ChatCompletionBody"]["additionalProperties"] is False
        assert (await client.post(CHAT_URL, json=CHAT | {"user": "u", "frobnicate": None})).status_code == 200


# -- what clients expect of any server ---------------------------------------------------------------------------------


def make_client(engine: Any, tmp_path: Path, client_host: str = "127.0.0.1", **options: Any) -> httpx.AsyncClient:
    metrics = options.pop("application_metrics", None)
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'conversations.db'}", **options)
    more = {} if metrics is None else {"application_metrics": metrics}
    app = create_app(engine, config, ingress_id="ingress-1", **more)
    transport = httpx.ASGITransport(app, client=(client_host, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_a_slash_at_the_end_is_forgiven(client: httpx.AsyncClient) -> None:
    assert (await client.post(f"{CHAT_URL}/", json=CHAT)).status_code == 200
    assert (await client.get("/v1/models/tiny//")).json()["id"] == "tiny"
    assert (await client.get("/")).headers["content-type"].startswith("text/html")
    wrong = await client.request("GET", httpx.URL("http://localhost", raw_path=b"//v1/models"))
    assert wrong.json()["error"]["message"] == "GET //v1/models: Not Found"


async def test_head_is_answered_like_get(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/ping", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"):
        head, get = await client.head(path), await client.get(path)
        assert (head.status_code, head.headers) == (200, get.headers)
    for path in ("/v1/cache/map", CHAT_URL):  # the one would not end, the other is no GET
        assert (await client.head(path)).status_code == 405


async def test_options_tell_the_methods(client: httpx.AsyncClient) -> None:
    response = await client.options(CHAT_URL)
    assert (response.status_code, response.headers["allow"]) == (204, "OPTIONS, POST")
    assert_error(await client.options("/v2/chat"), 404, "unknown_url", None)


async def test_the_load_is_what_the_engines_have(engine: Any, tmp_path: Path) -> None:
    async with make_client(engine, tmp_path) as client:
        engine.num_running = 3
        assert (await client.get("/load")).json() == {"server_load": 3}
        assert (await client.get("/ping")).json() == {"status": "ok"}
        engine.is_up = False
        assert_error(await client.get("/load"), 503, "engine_stopped", None)
        assert (await client.get("/ping")).status_code == 200


async def test_metrics_are_for_those_who_have_a_key(engine: Any, tmp_path: Path) -> None:
    async def metrics() -> str:
        return 'ray_pensieve_num_requests_running{application="a"} 1.0\n'

    tenants = (TenantConfig(id="a", api_keys_sha256=(hash_key("sk-a"),)),)
    async with make_client(engine, tmp_path, tenants=tenants, application_metrics=metrics) as client:
        assert_error(await client.get("/metrics"), 401, "invalid_api_key", None)
        response = await client.get("/metrics", headers={"authorization": "Bearer sk-a"})
        assert (response.status_code, response.text) == (200, await metrics())
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


PAGE = "https://chat.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}


async def test_pages_of_other_hosts_are_not_served_by_default(client: httpx.AsyncClient) -> None:
    preflight = await client.options(CHAT_URL, headers=PREFLIGHT)
    assert "access-control-allow-origin" not in preflight.headers
    assert_error(await client.post(CHAT_URL, json=CHAT, headers={"origin": PAGE}), 403, "cross_origin_request", None)


@pytest.mark.parametrize("stream", [False, True])
async def test_pages_of_named_origins_are_served(engine: Any, tmp_path: Path, stream: bool) -> None:
    async with make_client(engine, tmp_path, cors_allowed_origins=(PAGE,)) as client:
        preflight = await client.options(CHAT_URL, headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        response = await client.post(CHAT_URL, json=CHAT | {"stream": stream, "x": 1}, headers={"origin": PAGE})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "x-pensieve-ignored" in response.headers["access-control-expose-headers"]
        refused = await client.post(CHAT_URL, json={}, headers={"origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, PAGE)
        other = await client.post(CHAT_URL, json=CHAT, headers={"origin": "https://evil.example"})
        assert_error(other, 403, "cross_origin_request", None)
        assert "access-control-allow-origin" not in other.headers
    async with make_client(engine, tmp_path, "10.0.0.9", cors_allowed_origins=(PAGE,)) as client:
        remote = await client.post(CHAT_URL, json=CHAT, headers={"origin": PAGE})
        assert_error(remote, 403, "no_api_keys_configured", None)


async def test_all_origins_are_none_without_keys(engine: Any, tmp_path: Path) -> None:
    async with make_client(engine, tmp_path, cors_allowed_origins=("*",)) as client:
        response = await client.post(CHAT_URL, json=CHAT, headers={"origin": PAGE})
        assert_error(response, 403, "cross_origin_request", None)
    tenants = (TenantConfig(id="a", api_keys_sha256=(hash_key("sk-a"),)),)
    async with make_client(engine, tmp_path, cors_allowed_origins=("*",), tenants=tenants) as client:
        headers = {"origin": PAGE, "authorization": "Bearer sk-a"}
        response = await client.post(CHAT_URL, json=CHAT, headers=headers)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "*")


async def test_compressed_bodies(client: httpx.AsyncClient, engine: Any) -> None:
    raw = gzip.compress(json.dumps(CHAT).encode())
    response = await client.post(CHAT_URL, content=raw, headers=JSON | {"content-encoding": "gzip"})
    assert response.status_code == 200
    bomb = gzip.compress(json.dumps(CHAT).encode() + b" " * 10_000_000)
    response = await client.post(CHAT_URL, content=bomb[:MAX_BODY_BYTES], headers=JSON | {"content-encoding": "gzip"})
    assert_error(response, 413, "body_too_large", None)
    response = await client.post(CHAT_URL, content=raw, headers=JSON | {"content-encoding": "br"})
    assert_error(response, 415, "unsupported_content_encoding", None)
    assert len(engine.requests) == 1
