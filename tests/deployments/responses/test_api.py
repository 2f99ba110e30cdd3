"""The stateful API over HTTP, with the embedded model's engine and a real store behind it and without Ray.

Conversations by id, forks, restarts, cancellations, failures of engine and store.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest, ModelCard
from deployments.ingress import IngressConfig, create_app
from deployments.responses import store_upkeep
from deployments.store.conversation_store import ConversationStore
from deployments.store.values import NewItem, NewResponse
from deployments.tenants import TenantConfig, hash_key
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.dialogue.messages import Message
from engine.errors import ExecutorError, PensieveError
from tests.conftest import save_tiny_model

MODEL = "pensieve-recall-0.6m"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 40}
KEYS = {"a": "sk-a", "b": "sk-b"}


class EngineHere:
    """An engine in this process, with the face of EngineClient. Can be told to fail, and to wait after the first item."""

    def __init__(self, **more: Any) -> None:
        options = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "max_model_len": 1024, **more}
        self.engine = AsyncEngine(EngineConfig.from_options(options))
        self.requests: list[GenerationRequest] = []
        self.error: ErrorItem | None = None
        self.num_items_before_error = 0
        self.go = asyncio.Event()
        self.go.set()
        self.num_running = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        self.requests.append(request)
        self.num_running += 1
        try:
            num_items = 0
            deltas = self.engine.generate(request)
            if not request.stream:
                from engine.text.output import merge_deltas

                yield DeltaItem(merge_deltas([delta async for delta in deltas]), 0)
                return
            async for delta in deltas:
                if self.error is not None and num_items == self.num_items_before_error:
                    yield self.error
                    return
                yield DeltaItem(delta, 0)
                num_items += 1
                await self.go.wait()
        except PensieveError as error:
            yield ErrorItem.of(error)
        finally:
            self.num_running -= 1

    async def describe(self) -> ModelCard:
        return ModelCard(self.engine.model_name, self.engine.max_model_len, 128)

    model_card = describe

    async def load(self) -> int:
        return self.num_running

    def choose_session_id(self, candidates: Sequence[str]) -> str:
        return candidates[-1]


@asynccontextmanager
async def served(engine: Any, url: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app: FastAPI = create_app(engine, IngressConfig(store_url=url, **options), ingress_id="ingress-1")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client,
    ):
        yield client


def openai_client(http: httpx.AsyncClient, key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture
async def engine() -> AsyncIterator[EngineHere]:
    here = EngineHere()
    yield here
    await here.engine.check_integrity()
    await here.engine.shutdown()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'conversations.db'}"


@pytest.fixture
async def http(engine: EngineHere, url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with served(engine, url) as client:
        yield client


@pytest.fixture
def client(http: httpx.AsyncClient) -> AsyncOpenAI:
    return openai_client(http)


TURNS = ("my cat is called Mia", "i live in Rome", "what is my cat called?", "where do i live?")


async def ask(client: AsyncOpenAI, text: str, *, stream: bool = False, **options: Any) -> Any:
    if not stream:
        return await client.responses.create(input=text, **(GREEDY | options))
    async with client.responses.stream(input=text, **(GREEDY | options)) as events:
        async for _ in events:
            pass
        return await events.get_final_response()


# -- turns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_by_previous_response_id(client: AsyncOpenAI, stream: bool) -> None:
    """Only the new input travels, and each turn computes its new tokens only.

    The answers are those of a client that sends its history.
    """
    messages: list[Any] = []
    previous, known = None, 0
    for text in TURNS:
        options = {} if previous is None else {"previous_response_id": previous}
        response = await ask(client, text, stream=stream, **options)
        messages.append({"role": "user", "content": text})
        chat = await client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, extra_headers={"x-session-id": "chat"}
        )
        assert response.status == "completed"
        assert response.output_text == chat.choices[0].message.content
        assert response.usage.input_tokens == chat.usage.prompt_tokens
        assert response.usage.input_tokens_details.cached_tokens == known
        assert response.previous_response_id == previous
        stored = await client.responses.retrieve(response.id)
        assert (stored.status, stored.output_text, stored.usage) == ("completed", response.output_text, response.usage)
        known = response.usage.total_tokens - 1
        previous = response.id
        messages.append({"role": "assistant", "content": response.output_text})
    assert "Mia" in messages[5]["content"]
    assert "Rome" in messages[7]["content"]


async def test_ids_are_chosen_for_what_begins_a_session(
    engine: EngineHere, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for what goes on in one: its home is known, and drawing would count a load that does not come."""
    chosen: list[str] = []

    def choose(candidates: Sequence[str]) -> str:
        chosen.append(candidates[0])
        return candidates[0]

    monkeypatch.setattr(engine, "choose_session_id", choose)
    async with served(engine, url) as http:
        client = openai_client(http)
        first = await ask(client, "my cat is called Mia")
        await ask(client, "what is my cat called?", previous_response_id=first.id)
        conversation = await client.conversations.create()
        await ask(client, "i live in Rome", conversation=conversation.id)
    assert chosen == [first.id, conversation.id]


async def test_a_conversation_by_conversation_id(client: AsyncOpenAI) -> None:
    first_item = {"type": "message", "role": "user", "content": "my dog is called Rex"}
    answer_item = {"type": "message", "role": "assistant", "content": "ok, your dog is called Rex."}
    conversation = await client.conversations.create(items=[first_item, answer_item], metadata={"topic": "pets"})
    for text in TURNS:
        response = await ask(client, text, conversation=conversation.id)
        assert response.conversation.id == conversation.id
    response = await ask(client, "what is my dog called?", conversation=conversation.id, stream=True)
    assert "Rex" in response.output_text
    said = [item async for item in client.conversations.items.list(conversation.id, order="asc", limit=3)]
    assert [item.role for item in said] == ["user", "assistant"] * 6
    assert said[2].content[0].text == TURNS[0]
    assert said[-1].content[0].text == response.output_text
    assert (await client.conversations.retrieve(conversation.id)).metadata == {"topic": "pets"}
    await client.conversations.update(conversation.id, metadata={"topic": "all"})
    assert (await client.conversations.retrieve(conversation.id)).metadata == {"topic": "all"}
    # What is taken out of a conversation is not said again.
    for item in said[:2]:
        await client.conversations.items.delete(item.id, conversation_id=conversation.id)
    added = await client.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "user", "content": "my dog is called Bello"}]
    )
    assert len(added.data) == 1
    assert (await client.conversations.items.retrieve(added.data[0].id, conversation_id=conversation.id)).role == "user"
    assert (await client.conversations.delete(conversation.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.conversations.retrieve(conversation.id)


async def test_forks_share_what_came_before(client: AsyncOpenAI) -> None:
    root = await ask(client, "my cat is called Mia. " * 8)
    forks = await asyncio.gather(
        ask(client, "my dog is called Rex", previous_response_id=root.id),
        ask(client, "my dog is called Bello", previous_response_id=root.id, stream=True),
    )
    for fork, name in zip(forks, ("Rex", "Bello"), strict=True):
        # The last chunk is partial: one of them writes on in it, and the other one may have to wait for a copy.
        assert fork.usage.input_tokens_details.cached_tokens >= (root.usage.total_tokens - 1) // 32 * 32 > 0
        answer = await ask(client, "what is my dog called?", previous_response_id=fork.id)
        assert name in answer.output_text
        assert answer.usage.input_tokens_details.cached_tokens == fork.usage.total_tokens - 1


async def test_instructions_do_not_carry_over(client: AsyncOpenAI, engine: EngineHere) -> None:
    root = await ask(client, TURNS[0], instructions="be brief")
    assert root.instructions == "be brief"
    await ask(client, TURNS[2], previous_response_id=root.id)
    await ask(client, TURNS[2], previous_response_id=root.id, instructions="be long")
    prompts = [request.prompt.messages for request in engine.requests]
    assert prompts[0][0] == Message("system", "be brief")
    assert [message.role for message in prompts[1]] == ["user", "assistant", "user"]
    assert prompts[2] == (Message("system", "be long"), *prompts[1])


async def test_nothing_is_kept_with_store_false(client: AsyncOpenAI) -> None:
    root = await ask(client, TURNS[0])
    response = await ask(client, TURNS[2], previous_response_id=root.id, store=False)
    assert "Mia" in response.output_text
    assert response.usage.input_tokens_details.cached_tokens == root.usage.total_tokens - 1
    for response_id in (response.id, (await ask(client, TURNS[0], store=False)).id):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response_id)


async def test_an_answer_that_is_cut_can_be_continued(client: AsyncOpenAI) -> None:
    cut = await ask(client, TURNS[0], max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert await client.responses.retrieve(cut.id) == cut
    assert (await ask(client, TURNS[2], previous_response_id=cut.id)).status == "completed"


async def test_truncation(client: AsyncOpenAI, engine: EngineHere) -> None:
    conversation = await client.conversations.create()
    long_text = "my cat is called Mia and " * 20
    for _ in range(12):
        response = await ask(client, long_text, conversation=conversation.id, truncation="auto", max_output_tokens=8)
    assert response.usage.total_tokens <= 1024
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, long_text, conversation=conversation.id)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):  # nothing that could be left out
        await ask(client, long_text * 20, truncation="auto")
    response = await ask(client, TURNS[2], conversation=conversation.id, truncation="auto")
    assert response.usage.input_tokens > 900
    assert len([item async for item in client.conversations.items.list(conversation.id, limit=100)]) == 26


# -- stored things -----------------------------------------------------------------------------------------------------


async def test_input_items_and_deletion(client: AsyncOpenAI) -> None:
    items = [{"role": "user", "content": f"fact {number}"} for number in range(5)]
    response = await client.responses.create(input=items, **GREEDY)
    listed = [item async for item in client.responses.input_items.list(response.id, order="asc", limit=2)]
    assert [item.content[0].text for item in listed] == [item["content"] for item in items]
    child = await ask(client, "and?", previous_response_id=response.id)
    await client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            await call(response.id)
    with pytest.raises(openai.NotFoundError):
        await ask(client, "more", previous_response_id=response.id)
    # What continued it goes on.
    assert (await ask(client, "more", previous_response_id=child.id)).status == "completed"


async def test_cancelling_what_is_complete_changes_nothing(client: AsyncOpenAI) -> None:
    response = await ask(client, TURNS[0])
    assert await client.responses.cancel(response.id) == response


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/responses", {"previous_response_id": "{resp}"}),
        ("POST", "/v1/responses", {"previous_response_id": "{resp}", "store": False}),
        ("POST", "/v1/responses", {"conversation": "{conv}"}),
        ("POST", "/v1/responses", {"conversation": {"id": "{conv}"}, "store": False, "stream": True}),
        ("GET", "/v1/responses/{resp}", None),
        ("DELETE", "/v1/responses/{resp}", None),
        ("POST", "/v1/responses/{resp}/cancel", None),
        ("GET", "/v1/responses/{resp}/input_items", None),
        ("GET", "/v1/conversations/{conv}", None),
        ("POST", "/v1/conversations/{conv}", {"metadata": {}}),
        ("DELETE", "/v1/conversations/{conv}", None),
        ("GET", "/v1/conversations/{conv}/items", None),
        ("POST", "/v1/conversations/{conv}/items", {"items": [{"role": "user", "content": "x"}]}),
        ("GET", "/v1/conversations/{conv}/items/{item}", None),
        ("DELETE", "/v1/conversations/{conv}/items/{item}", None),
    ],
)
async def test_ids_of_another_tenant_do_not_exist(
    engine: EngineHere, url: str, method: str, path: str, body: dict[str, Any] | None
) -> None:
    tenants = tuple(TenantConfig(id=name, api_keys_sha256=(hash_key(key),)) for name, key in KEYS.items())
    async with served(engine, url, tenants=tenants) as http:
        owner = openai_client(http, KEYS["a"])
        conversation = await owner.conversations.create(items=[{"role": "user", "content": "mine"}])
        items = await owner.conversations.items.list(conversation.id)
        response = await ask(owner, TURNS[0])
        names = {"{resp}": response.id, "{conv}": conversation.id, "{item}": items.data[0].id}
        text = json.dumps(None if body is None else {"input": "hi", **GREEDY, **body} if "responses" in path else body)
        unknown = text
        for name, real in names.items():
            path, text = path.replace(name, real), text.replace(name, real)
            unknown = unknown.replace(name, real[:-4] + "0000")
        headers = {"authorization": f"Bearer {KEYS['b']}"}
        answer = await http.request(method, path, content=text, headers=headers)
        assert answer.status_code == 404, answer.text
        other_path = path
        for real in names.values():
            other_path = other_path.replace(real, real[:-4] + "0000")
        missing = await http.request(method, other_path, content=unknown, headers=headers)
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == answer.json()["error"]["code"]
        assert (await http.request(method, path, content=text)).status_code == 401
        # The owner's are all there.
        assert (await owner.responses.retrieve(response.id)).id == response.id
        assert len((await owner.conversations.items.list(conversation.id)).data) == 1


async def test_equal_prompts_of_two_tenants_share_nothing(engine: EngineHere, url: str) -> None:
    tenants = tuple(TenantConfig(id=name, api_keys_sha256=(hash_key(key),)) for name, key in KEYS.items())
    async with served(engine, url, tenants=tenants) as http:
        for key in KEYS.values():
            for expected in (False, True):
                response = await ask(openai_client(http, key), "my cat is called Mia " * 5)
                assert (response.usage.input_tokens_details.cached_tokens > 0) is expected


# -- what goes wrong ---------------------------------------------------------------------------------------------------


async def test_a_flood_of_one_tenant_makes_room_for_another(url: str) -> None:
    tenants = tuple(TenantConfig(id=name, api_keys_sha256=(hash_key(key),)) for name, key in KEYS.items())
    here = EngineHere(max_num_seqs=2, max_num_queued_reqs=2)
    ended: list[tuple[str, int]] = []
    async with served(here, url, tenants=tenants) as http:

        async def ask_as(name: str, max_tokens: int) -> None:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
            headers = {"authorization": f"Bearer {KEYS[name]}"}
            answer = await http.post("/v1/chat/completions", json=body | {"max_tokens": max_tokens}, headers=headers)
            ended.append((name, answer.status_code))

        async def are(num_running: int, num_waiting: int) -> None:
            async def is_so() -> bool:
                statistics = here.engine.get_statistics()
                return (statistics["num_requests_running"], statistics["num_requests_waiting"]) == (
                    num_running,
                    num_waiting,
                )

            await until(is_so)

        flood = [asyncio.create_task(ask_as("a", 900)) for _ in range(2)]
        await are(2, 0)
        flood += [asyncio.create_task(ask_as("a", 900)) for _ in range(10)]
        await are(2, 2)
        await ask_as("b", 2)
        assert ended[-1] == ("b", 200)
        await asyncio.gather(*flood)
    # Eight came too late, one had to make room; and of the three that were left two had begun before the other tenant came.
    assert ended.count(("a", 429)) == 9
    assert ended.index(("b", 200)) < len(ended) - 1
    assert ended[-1] == ("a", 200)
    await here.engine.shutdown()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


class Streaming:
    """A streamed request that the application is really streaming (httpx's own transport would collect it)."""

    def __init__(self, app: FastAPI, body: dict[str, Any]) -> None:
        self.events: list[dict[str, Any]] = []
        self.status = 0
        self._gone = asyncio.Event()
        self._raw = json.dumps(GREEDY | {"stream": True} | body).encode()
        self._sent = False
        self.task = asyncio.create_task(app(self._scope(), self._receive, self._send))

    @staticmethod
    def _scope() -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/responses",
            "raw_path": b"/v1/responses",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._raw, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        for block in message["body"].decode().split("\n\n"):
            if "data: " in block:
                self.events.append(json.loads(block.partition("data: ")[2]))

    def hang_up(self) -> None:
        self._gone.set()

    async def response_id(self) -> str:
        async with asyncio.timeout(30):
            while not self.events:
                await asyncio.sleep(0.01)
        return str(self.events[0]["response"]["id"])


@pytest.fixture
async def app(engine: EngineHere, url: str) -> AsyncIterator[FastAPI]:
    app = create_app(engine, IngressConfig(store_url=url), ingress_id="ingress-2")
    async with app.router.lifespan_context(app):
        yield app


@pytest.mark.parametrize("end", ["hang up", "cancel here", "cancel through another ingress", "delete"])
async def test_a_turn_that_is_given_up_is_marked_and_ends_in_the_engine(
    client: AsyncOpenAI, app: FastAPI, engine: EngineHere, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(store_upkeep, "RENEWAL_S", 0.05)
    conversation = await client.conversations.create()
    await ask(client, TURNS[0], conversation=conversation.id)
    engine.go.clear()
    streaming = Streaming(app, {"input": TURNS[1], "conversation": conversation.id})
    response_id = await streaming.response_id()
    in_progress = await client.responses.retrieve(response_id)
    assert (in_progress.status, in_progress.output) == ("in_progress", [])
    with pytest.raises(openai.ConflictError):
        await ask(client, TURNS[2], conversation=conversation.id)
    with pytest.raises(openai.BadRequestError):
        await ask(client, TURNS[2], previous_response_id=response_id)

    if end == "hang up":
        streaming.hang_up()
    elif end == "delete":
        await client.responses.delete(response_id)
    elif end == "cancel here":
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as same:
            assert (await openai_client(same).responses.cancel(response_id)).status == "cancelled"
    else:
        assert (await client.responses.cancel(response_id)).status == "cancelled"
    await streaming.task

    async def is_idle() -> bool:
        return engine.num_running == 0

    await until(is_idle)
    if end == "delete":
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response_id)
    else:
        expected = "incomplete" if end == "hang up" else "cancelled"

        async def is_marked() -> bool:
            return (await client.responses.retrieve(response_id)).status == expected

        await until(is_marked)
    if end != "hang up":
        assert streaming.events[-1]["type"] == "error"
        assert streaming.events[-1]["code"] == "response_cancelled"
    # The turn was never there: neither in the conversation, nor in the way of the next one.
    engine.go.set()
    assert len((await client.conversations.items.list(conversation.id)).data) == 2
    answer = await ask(client, TURNS[2], conversation=conversation.id)
    assert "Mia" in answer.output_text


async def test_a_client_that_leaves_while_its_turn_is_being_recorded(
    client: AsyncOpenAI, app: FastAPI, engine: EngineHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, go = asyncio.Event(), asyncio.Event()
    begin = ConversationStore.begin_response

    async def begin_response(self: ConversationStore, *args: Any) -> Any:
        response = await begin(self, *args)
        recorded.set()
        await go.wait()
        return response

    monkeypatch.setattr(store_upkeep, "LEASE_S", 3600.0)
    conversation = await client.conversations.create()
    monkeypatch.setattr(ConversationStore, "begin_response", begin_response)
    streaming = Streaming(app, {"input": TURNS[0], "conversation": conversation.id})
    await recorded.wait()
    streaming.task.cancel()  # what Serve does then
    with pytest.raises(asyncio.CancelledError):
        await streaming.task
    monkeypatch.undo()
    with pytest.raises(openai.ConflictError) as caught:
        await ask(client, TURNS[0], conversation=conversation.id)
    go.set()
    response_id = str(caught.value).split("'resp_")[1].split("'")[0]

    async def is_marked() -> bool:
        return (await client.responses.retrieve(f"resp_{response_id}")).status == "incomplete"

    await until(is_marked)  # and not when its lease is over
    assert engine.requests == []
    assert (await ask(client, TURNS[0], conversation=conversation.id)).status == "completed"


@pytest.mark.parametrize("num_items", [0, 1, 3])
async def test_an_engine_that_fails_fails_the_turn(
    client: AsyncOpenAI, app: FastAPI, engine: EngineHere, num_items: int
) -> None:
    conversation = await client.conversations.create()
    engine.error = ErrorItem.of(ExecutorError("the step failed"))
    engine.num_items_before_error = num_items
    streaming = Streaming(app, {"input": TURNS[0], "conversation": conversation.id})
    await streaming.task
    if num_items:
        *_, last = streaming.events
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["message"] == "the step failed"
        stored = await client.responses.retrieve(last["response"]["id"])
        assert (stored.status, stored.error.code) == ("failed", "server_error")
    else:
        assert streaming.status == 500
    engine.error = None
    assert (await ask(client, TURNS[0], conversation=conversation.id)).status == "completed"


async def test_a_turn_whose_process_is_gone_is_interrupted(client: AsyncOpenAI, url: str) -> None:
    root = await ask(client, TURNS[0])
    store = ConversationStore(url)
    await store.open(0.0)
    dead = NewResponse(
        id="resp_dead",
        model=MODEL,
        input=[NewItem("user", {"id": "msg_1", "type": "message", "role": "user", "content": []}, "msg_1")],
        owner="gone",
        lease_until=1.0,
        previous_response_id=root.id,
        params=root.to_dict() | {"id": "resp_dead", "status": "in_progress", "output": [], "usage": None},
    )
    await store.begin_response("local", dead, 0.5)
    await store.close()
    response = await client.responses.retrieve("resp_dead")
    assert response.status == "incomplete"
    assert "the server stopped" in response.error.message
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, TURNS[2], previous_response_id="resp_dead")
    assert caught.value.code == "previous_response_not_complete"
    assert "Mia" in (await ask(client, TURNS[2], previous_response_id=root.id)).output_text


async def test_conversations_survive_a_restart_of_everything(url: str) -> None:
    """Answers are as undisturbed ones, because the token ids come from the store.

    Text, here with bytes that are no UTF-8, would not do.
    """
    odd: dict[str, Any] = {"temperature": 2.0, "max_output_tokens": 60}
    questions = [TURNS[2], TURNS[3]]
    async with AsyncExitStack() as stack:
        one = EngineHere()
        stack.push_async_callback(one.engine.shutdown)
        client = openai_client(await stack.enter_async_context(served(one, url)))
        for seed in range(20):
            root = await ask(client, TURNS[0], **odd, extra_body={"min_tokens": 50, "seed": seed})
            if "\ufffd" in root.output_text:
                break
        assert "\ufffd" in root.output_text
        undisturbed = await ask(client, questions[0], previous_response_id=root.id)
        undisturbed_2 = await ask(client, questions[1], previous_response_id=undisturbed.id)
    async with AsyncExitStack() as stack:
        two = EngineHere()
        stack.push_async_callback(two.engine.shutdown)
        client = openai_client(await stack.enter_async_context(served(two, url)))
        again = await ask(client, questions[0], previous_response_id=root.id)
        again_2 = await ask(client, questions[1], previous_response_id=undisturbed.id, stream=True)
        for first, second in ((undisturbed, again), (undisturbed_2, again_2)):
            assert first.output_text == second.output_text
            assert first.usage.input_tokens == second.usage.input_tokens
        assert again.usage.input_tokens_details.cached_tokens == 0
        assert len(two.requests[0].history.token_ids) == root.usage.total_tokens


def save_chat_model(folder: Path, vocab_size: int, first_id: int) -> Path:
    """A random model with a byte-level vocabulary from that id on, and a common chat template."""
    save_tiny_model("llama", folder, vocab_size=vocab_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: first_id + i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    fast.chat_template = turns + "<|im_start|>assistant\n"
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sizes", [((288, 0), (1024, 600)), ((1024, 600), (288, 0))], ids=["larger", "smaller"])
async def test_another_model_behind_the_same_store(tmp_path: Path, url: str, sizes: Any) -> None:
    """With the old one's template and name, but another vocabulary: it reads what was said, and not the old ids."""
    spoken = GREEDY | {"instructions": "be brief", "max_output_tokens": 12}
    previous = None
    messages = [{"role": "system", "content": "be brief"}]
    for number, size in enumerate(sizes):
        model = save_chat_model(tmp_path / f"model-{number}", *size)
        async with AsyncExitStack() as stack:
            here = EngineHere(model=str(model), served_model_name=MODEL, max_model_len=512)
            stack.push_async_callback(here.engine.shutdown)
            client = openai_client(await stack.enter_async_context(served(here, url)))
            for text in TURNS[:2]:
                response = await ask(client, text, previous_response_id=previous, **spoken)
                messages.append({"role": "user", "content": text})
                chat = await client.chat.completions.create(
                    model=MODEL,
                    messages=messages,
                    temperature=0,
                    max_tokens=12,
                    extra_headers={"x-session-id": "fresh"},
                )
                if number:  # on the first one both know what was generated, here both know its text
                    assert response.output_text == chat.choices[0].message.content
                    assert response.usage.input_tokens == chat.usage.prompt_tokens
                assert here.requests[0].history is None or here.requests[0].history.fingerprint
                messages.append({"role": "assistant", "content": response.output_text})
                previous = response.id


async def test_without_its_store_the_server_says_so_and_recovers(
    client: AsyncOpenAI, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    root = await ask(client, TURNS[0])
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    database = [path for path in tmp_path.iterdir() if path.name.startswith("conversations.db")]
    for path in database:
        os.rename(path, hidden / path.name)
    (tmp_path / "conversations.db").mkdir()  # so that no process makes an empty one
    answer = await http.post("/v1/responses", json=GREEDY | {"input": "hi", "previous_response_id": root.id})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert "retry-after" in answer.headers
    assert (await http.get("/ready")).status_code == 503
    assert (await http.get("/health")).status_code == 200
    chat = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert chat.choices
    (tmp_path / "conversations.db").rmdir()
    for path in hidden.iterdir():
        os.rename(path, tmp_path / path.name)
    assert (await http.get("/ready")).status_code == 200
    assert "Mia" in (await ask(client, TURNS[2], previous_response_id=root.id)).output_text


async def test_many_who_find_no_store_wait_for_one_attempt(engine: EngineHere) -> None:
    """Each attempt may take seconds: one after the other, the last of many would wait for minutes."""
    num_connections, give_up = 0, asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await give_up.wait()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with served(engine, f"postgresql://user@127.0.0.1:{port}/x") as http:
            requests = [asyncio.create_task(http.post("/v1/conversations")) for _ in range(20)]

            async def is_tried() -> bool:
                return num_connections > 0

            await until(is_tried)
            give_up.set()
            answers = await asyncio.gather(*requests)
            assert {answer.json()["error"]["code"] for answer in answers} == {"store_unavailable"}
            num_first = num_connections
            assert num_first < 4  # with TLS and without
            assert (await http.post("/v1/conversations")).status_code == 503  # and a later request tries again
            assert num_connections > num_first


async def test_leases_are_renewed_whatever_happened_to_the_last_renewal(
    client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_calls = 0
    renew = ConversationStore.renew_leases

    async def renew_leases(self: ConversationStore, *args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("a defect")
        return await renew(self, *args)

    monkeypatch.setattr(store_upkeep, "RENEWAL_S", 0.01)
    monkeypatch.setattr(ConversationStore, "renew_leases", renew_leases)
    await client.conversations.create()

    async def goes_on() -> bool:
        return num_calls > 3

    await until(goes_on)
    assert "a defect" in caplog.text


# -- another client ----------------------------------------------------------------------------------------------------


async def test_the_agents_sdk_holds_a_conversation(client: AsyncOpenAI) -> None:
    from agents import Agent, OpenAIResponsesModel, RunConfig, Runner

    agent = Agent(name="pet", model=OpenAIResponsesModel(MODEL, client))
    config = RunConfig(tracing_disabled=True)
    previous = None
    for text in TURNS[:3]:
        result = await Runner.run(agent, text, previous_response_id=previous, run_config=config)
        previous = result.last_response_id
    streamed = Runner.run_streamed(agent, TURNS[2], previous_response_id=previous, run_config=config)
    async for _ in streamed.stream_events():
        pass
    assert isinstance(streamed.final_output, str)
    assert streamed.final_output
