"""What the stateful API keeps and rejects, over a scripted engine and a real store.

Quotas, rates, a full disk, histories longer than any window, clocks that jump. And that what a client is told is what
the store has.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.generation import DeltaItem, ErrorItem, ModelCard
from deployments.http.admission import Admission
from deployments.ingress import IngressConfig, create_app
from deployments.responses import store_upkeep
from deployments.responses.api import ResponsesApi
from deployments.responses.conversation_requests import ConversationBody, ItemsBody
from deployments.responses.conversations import ConversationsApi
from deployments.responses.requests import ResponseBody
from deployments.responses.store_upkeep import StoreUpkeep
from deployments.store.conversation_store import ConversationStore
from deployments.store.errors import ConversationBusyError
from deployments.store.usage import Usage
from deployments.tenants import TenantConfig, hash_key
from engine.dialogue.messages import Message
from engine.errors import ContextLengthError
from engine.tenant import LOCAL_TENANT
from engine.text.output import OutputDelta
from tests.deployments.conftest import ScriptedEngine

BODY: dict[str, Any] = {"model": "tiny", "input": "hi"}
KEY = {"authorization": "Bearer sk-a"}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'conversations.db'}"


@asynccontextmanager
async def served(engine: ScriptedEngine, url: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, IngressConfig(store_url=url, **options), ingress_id="ingress-1")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        yield client


async def usage(url: str, tenant: str = "local") -> Usage:
    store = ConversationStore(url)
    await store.open(0.0)
    try:
        return await store.usage(tenant)
    finally:
        await store.close()


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# Quotas and rates


async def test_a_tenant_keeps_no_more_than_its_quota(engine: ScriptedEngine, url: str) -> None:
    own = TenantConfig(id="a", api_keys_sha256=(hash_key("sk-a"),), max_stored_rows=6)
    async with served(engine, url, max_stored_rows=10**6, max_stored_bytes=20_000, tenants=(own,)) as http:
        first = await http.post("/v1/responses", json=BODY | {"input": "x" * 15_000}, headers=KEY)
        assert first.status_code == 200
        for path, body in (
            ("/v1/responses", BODY | {"input": "x" * 5_000}),
            ("/v1/conversations", {"items": [{"role": "user", "content": "x" * 5_000}]}),
        ):
            answer = await http.post(path, json=body, headers=KEY)
            assert error_of(answer) == (429, "storage_quota_exceeded")
            assert answer.json()["error"]["type"] == "insufficient_quota"
            assert "retry-after" not in answer.headers
        assert (await http.post("/v1/responses", json=BODY | {"store": False}, headers=KEY)).status_code == 200
        assert (await http.delete(f"/v1/responses/{first.json()['id']}", headers=KEY)).status_code == 200
        for expected in (200, 200, 429):  # of 3 rows each
            assert (await http.post("/v1/responses", json=BODY, headers=KEY)).status_code == expected


async def test_a_tenant_above_its_tokens_stores_nothing(engine: ScriptedEngine, url: str) -> None:
    own = TenantConfig(id="a", api_keys_sha256=(hash_key("sk-a"),), tokens_per_minute=5)
    async with served(engine, url, tenants=(own,)) as http:
        assert (await http.post("/v1/responses", json=BODY | {"store": False}, headers=KEY)).status_code == 200
        for stream in (False, True):
            answer = await http.post("/v1/responses", json=BODY | {"stream": stream}, headers=KEY)
            assert error_of(answer) == (429, "tokens_per_minute")
    assert await usage(url, "a") == Usage()


async def test_what_only_stores_has_a_rate(engine: ScriptedEngine, url: str) -> None:
    async with served(engine, url, store_requests_per_minute=3, store_bytes_per_minute=10_000) as http:
        talk = (await http.post("/v1/conversations")).json()["id"]
        items = {"items": [{"role": "user", "content": "x" * 20_000}]}
        assert (await http.post(f"/v1/conversations/{talk}/items", json=items)).status_code == 200
        answer = await http.post(f"/v1/conversations/{talk}", json={"metadata": {}})
        assert error_of(answer) == (429, "store_bytes_per_minute")
        assert int(answer.headers["retry-after"]) > 55
        assert (await http.post("/v1/responses", json=BODY)).status_code == 200
        assert (await http.delete(f"/v1/conversations/{talk}")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("in_conversation", [False, True])
async def test_a_turn_that_fails_before_its_answer_leaves_nothing(
    engine: ScriptedEngine, url: str, stream: bool, in_conversation: bool
) -> None:
    """Its client has no id by which to delete it."""
    engine.items = [ErrorItem.of(ContextLengthError("too long"))]
    async with served(engine, url) as http:
        body, before = BODY | {"stream": stream}, Usage()
        if in_conversation:
            body |= {"conversation": (await http.post("/v1/conversations")).json()["id"]}
            before = await usage(url)
        for _ in range(2):
            assert (await http.post("/v1/responses", json=body)).status_code == 400
        assert await usage(url) == before


async def test_instructions_are_stored_once(engine: ScriptedEngine, url: str) -> None:
    async with served(engine, url) as http:
        said = await http.post("/v1/responses", json=BODY | {"instructions": "x" * 20_000})
        assert (await usage(url)).num_bytes < 30_000
        assert (await http.get(f"/v1/responses/{said.json()['id']}")).json() == said.json()


async def test_what_is_old_is_forgotten_some_time_after_the_start(
    engine: ScriptedEngine, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ray.serve")
    forgotten = asyncio.Event()
    delete = ConversationStore.delete_older_than

    async def delete_older_than(self: ConversationStore, cutoff: float) -> int:
        num_deleted = await delete(self, cutoff)
        forgotten.set()
        return num_deleted

    monkeypatch.setattr(ConversationStore, "delete_older_than", delete_older_than)
    async with served(engine, url, retention_days=1e-9) as http:
        kept = (await http.post("/v1/responses", json=BODY)).json()["id"]
        assert "last used more than 1e-09 days ago is deleted" in caplog.text
        assert not forgotten.is_set()
        assert (await http.get(f"/v1/responses/{kept}")).status_code == 200
    monkeypatch.setattr(store_upkeep, "FIRST_SWEEP_S", 0.0)
    async with served(engine, url, retention_days=1e-9) as http:
        await http.post("/v1/conversations")
        await asyncio.wait_for(forgotten.wait(), 30)
        assert (await http.get(f"/v1/responses/{kept}")).status_code == 404


# A disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real one, of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_ready_knows_a_full_disk(
    engine: ScriptedEngine, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(engine, f"sqlite:///{small_disk / 'conversations.db'}", store_min_free_bytes=0) as http:
        stored = (await http.post("/v1/responses", json=BODY)).json()
        assert (await http.get("/ready")).status_code == 200
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "filling").write_bytes(bytes(2**20))
        statuses = {
            (await http.post("/v1/responses", json=BODY | {"input": "x" * 50_000})).status_code for _ in range(9)
        }
        assert statuses == {503}
        answer = await http.get("/ready")
        assert error_of(answer) in ((503, "store_full"), (503, "store_unavailable"))
        assert str(small_disk) not in answer.text
        assert str(small_disk) in caplog.text
        assert (await http.get(f"/v1/responses/{stored['id']}")).json() == stored
        (small_disk / "filling").unlink()
        assert (await http.get("/ready")).status_code == 200
        assert (await http.post("/v1/responses", json=BODY)).status_code == 200


async def test_before_the_disk_is_full_no_new_turn_is_stored(
    engine: ScriptedEngine, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_upkeep, "ROOM_S", 0.01)
    url = f"sqlite:///{small_disk / 'conversations.db'}"
    async with served(engine, url, store_min_free_bytes=200_000) as http:
        assert (await http.post("/v1/responses", json=BODY)).status_code == 200
        assert (await http.get("/ready")).json() == {"status": "ready"}
        (small_disk / "filling").write_bytes(bytes(300_000))
        await until_ready_says(
            http, {"status": "ready", "warnings": ["the disk of the conversation store is nearly full"]}
        )
        assert "MiB are left" in caplog.text
        (small_disk / "more").write_bytes(bytes(400_000))
        answer = await http.post("/v1/responses", json=BODY)
        assert error_of(answer) == (503, "store_full")
        assert (await http.post("/v1/responses", json=BODY | {"store": False})).status_code == 200
        for path in ("filling", "more"):
            (small_disk / path).unlink()
        await until_ready_says(http, {"status": "ready"})
        assert (await http.post("/v1/responses", json=BODY)).status_code == 200


async def until_ready_says(http: httpx.AsyncClient, expected: dict[str, Any]) -> None:
    async with asyncio.timeout(30):
        while (await http.get("/ready")).json() != expected:
            await asyncio.sleep(0.01)


# Histories longer than the window, which is 100 tokens here


async def test_a_history_that_cannot_fit_is_refused_before_it_is_read(engine: ScriptedEngine, url: str) -> None:
    async with served(engine, url) as http:
        talk = (await http.post("/v1/conversations")).json()["id"]
        for _ in range(5):
            items = {"items": [{"role": "user", "content": "x" * 30_000}]}
            await http.post(f"/v1/conversations/{talk}/items", json=items)
        before = await usage(url)
        answer = await http.post("/v1/responses", json=BODY | {"conversation": talk})
        assert error_of(answer) == (400, "context_length_exceeded")
        assert "truncation: auto" in answer.json()["error"]["message"]
        assert engine.requests == []
        for _ in range(100):  # it is forgotten beside the answer
            if await usage(url) == before:
                break
        assert await usage(url) == before


async def test_of_a_history_that_is_cut_the_end_is_read(engine: ScriptedEngine, url: str) -> None:
    async with served(engine, url) as http:
        talk = (await http.post("/v1/conversations")).json()["id"]
        for number in range(20):
            items = [{"role": role, "content": f"{number} " + "x" * 800} for role in ("user", "assistant")]
            await http.post(f"/v1/conversations/{talk}/items", json={"items": items})
        answer = await http.post("/v1/responses", json=BODY | {"conversation": talk, "truncation": "auto"})
        assert answer.status_code == 200
        messages = engine.requests[0].prompt.messages  # type: ignore[union-attr]
        assert (messages[0].role, messages[-1]) == ("user", Message("user", "hi"))
        assert 4000 < sum(len(message.content) for message in messages) < 8000
        assert messages[-2].content.startswith("19 ")


# Clocks, and what the store says


CARD = ModelCard("tiny", 100, 128)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def upkeep(url: str) -> AsyncIterator[StoreUpkeep]:
    upkeep = StoreUpkeep(ConversationStore(url), owner="this", clock=Clock())
    yield upkeep
    await upkeep.close()


@pytest.fixture
def api(engine: ScriptedEngine, upkeep: StoreUpkeep) -> ResponsesApi:
    return ResponsesApi(Admission(engine, []), upkeep, lambda ids, model: ids[0])


class Turns:
    """An engine whose answer waits for `go` after its first word."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.go, self.said = asyncio.Event(), asyncio.Event()
        engine.generate = self.generate  # type: ignore[method-assign]

    async def generate(self, request: Any) -> AsyncIterator[DeltaItem]:
        if request.stream:
            yield DeltaItem(OutputDelta("Hel", (1,), num_prompt_tokens=5, num_output_tokens=1), 0)
        self.said.set()
        await self.go.wait()
        whole = "lo" if request.stream else "Hello"
        yield DeltaItem(OutputDelta(whole, (2,), num_prompt_tokens=5, num_output_tokens=2, finish_reason="stop"), 0)


async def create(api: ResponsesApi, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The response at the end, and the names of the events, if it is streamed."""
    answer = await api.create(LOCAL_TENANT, {}, ResponseBody.model_validate(BODY | options), {}, CARD)
    if not options.get("stream"):
        return json.loads(answer.body), []
    events = [json.loads(block.partition("data: ")[2]) async for block in split(answer)]
    return events[-1].get("response", events[-1]), [event["type"] for event in events]


async def split(answer: Any) -> AsyncIterator[str]:
    async for chunk in answer.body_iterator:
        for block in chunk.split("\n\n"):
            if "data: " in block:
                yield block


@pytest.mark.parametrize("stream", [False, True])
async def test_a_clock_that_jumps_interrupts_no_turn_of_this_process(
    engine: ScriptedEngine, api: ResponsesApi, upkeep: StoreUpkeep, stream: bool
) -> None:
    turns = Turns(engine)
    conversations = ConversationsApi(Admission(engine, []), upkeep, lambda ids: ids[0])
    talk = (await conversations.create(LOCAL_TENANT, ConversationBody()))["id"]
    running = asyncio.create_task(create(api, conversation=talk, stream=stream))
    await turns.said.wait()
    upkeep.clock.now += 3600  # type: ignore[attr-defined]
    with pytest.raises(ConversationBusyError):
        await create(api, conversation=talk)
    with pytest.raises(ConversationBusyError):
        await conversations.add_items(LOCAL_TENANT, talk, ItemsBody.model_validate({"items": "x"}))
    turns.go.set()
    body, _ = await running
    assert body["status"] == "completed"
    assert (await api.get(LOCAL_TENANT, body["id"])) == body
    assert (await create(api, conversation=talk))[0]["status"] == "completed"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", ["interrupted", "cancelled", "deleted"])
async def test_the_client_is_told_what_the_store_has(
    engine: ScriptedEngine, api: ResponsesApi, upkeep: StoreUpkeep, url: str, what: str, stream: bool
) -> None:
    """Another process, whose clock is far ahead, or whose client wants something else, has changed the response."""
    turns = Turns(engine)
    running = asyncio.create_task(create(api, stream=stream))
    await turns.said.wait()
    (response_id,) = upkeep.running
    other = ConversationStore(url)
    await other.open(0.0)
    if what == "interrupted":
        assert await other.mark_interrupted(5000.0) == 1
    elif what == "cancelled":
        assert await other.cancel_response("local", response_id, 1000.0)
    else:
        await other.delete_response("local", response_id, 1000.0)
    await other.close()
    turns.go.set()
    body, events = await running
    if what == "interrupted":
        assert body == await api.get(LOCAL_TENANT, response_id)
        assert body["status"] == "incomplete"
        assert not stream or events[-1] == "response.incomplete"
    elif stream:
        assert (events[-1], body["code"]) == ("error", "response_cancelled")
    else:
        assert body["status"] == "cancelled"
        assert what == "deleted" or body == await api.get(LOCAL_TENANT, response_id)
