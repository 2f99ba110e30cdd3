"""Adapters over HTTP: an engine replica in this process behind the whole application, with a dict as Ray's control store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from ray import serve

from deployments import llm_server
from deployments.generation import GenerationItem, GenerationRequest, ModelCard
from deployments.ingress import IngressConfig, create_app
from deployments.llm_server import LLMServer
from deployments.routing import engine_client
from deployments.routing.rendezvous import read_routing_name
from deployments.tenants import TenantConfig
from engine.adapters import with_adapter
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from tests.lora import merge_adapter, save_adapter

PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom"


class Handle:
    """Of a deployment with these replicas: a request goes to the first one, and what all are asked to all."""

    app_name, deployment_name = "app", "LLMServer"

    def __init__(self, replicas: Sequence[LLMServer]) -> None:
        self.replicas = list(replicas)
        self.routed: list[str] = []

    def options(self, *, session_id: str, stream: bool = False) -> SimpleNamespace:
        self.routed.append(read_routing_name(session_id)[0])
        return SimpleNamespace(
            generate=SimpleNamespace(remote=lambda request: Items(self.replicas[0].generate(request)))
        )

    def broadcast(self, method: str, *arguments: object) -> SimpleNamespace:
        async def ask(timeout_s: float, return_exceptions: bool) -> list[object]:
            calls = [getattr(replica, method)(*arguments) for replica in self.replicas]
            return await asyncio.gather(*calls, return_exceptions=True)

        return SimpleNamespace(results_async=ask)


class Items:
    """A streaming response of Serve."""

    def __init__(self, items: AsyncGenerator[GenerationItem, None]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncGenerator[GenerationItem, None]:
        return self._items

    def cancel(self) -> None: ...


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """The model, two adapters of it below one folder, and one elsewhere."""
    model, root = tiny_model("llama"), tmp_path_factory.mktemp("adapters")
    return {
        "model": model,
        "root": root,
        "pirate": save_adapter(model, root / "pirate", 1, "all-linear"),
        "poet": save_adapter(model, root / "poet", 2, ["q_proj", "v_proj"]),
        "elsewhere": save_adapter(model, tmp_path_factory.mktemp("other") / "x", 3, ["q_proj"]),
    }


@pytest.fixture
def records(monkeypatch) -> dict[str, str]:
    """What is in Ray's control store."""
    kept: dict[str, str] = {}

    class Records:
        def __init__(self, app_name: str, deployment_name: str) -> None: ...

        def read(self) -> dict[str, str]:
            return dict(kept)

        def add(self, name: str, folder: str) -> bool:
            return kept.setdefault(name, folder) is folder

        def remove(self, name: str) -> bool:
            return kept.pop(name, None) is not None

    monkeypatch.setattr(engine_client, "AdapterRecords", Records)
    monkeypatch.setattr(
        serve,
        "get_replica_context",
        lambda: SimpleNamespace(rank=SimpleNamespace(rank=0), replica_id=SimpleNamespace()),
    )
    return kept


def make_replica(folders: dict[str, Path], records: dict[str, str]) -> LLMServer:
    config = EngineConfig(
        model=str(folders["model"]),
        served_model_name="tiny",
        dtype="float32",
        num_threads=1,
        chunk_size=8,
        num_gpu_blocks=100,
        num_cpu_blocks=0,
        kv_handover="off",
        adapters={"pirate": str(folders["pirate"])},
        adapter_folder=str(folders["root"]),
        max_adapters=2,
    )
    return LLMServer(config, 0.0, lambda config, *_: AsyncEngine(config), wanted_adapters=lambda: dict(records))


@pytest.fixture
async def server(folders, records, tmp_path) -> AsyncIterator[SimpleNamespace]:
    """The application, its client, the handle of its replicas, and `replica` to make a further one."""
    handle = Handle([make_replica(folders, records)])
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 's.db'}")
    app = create_app(engine_client.EngineClient(handle), config, ingress_id="i")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client,
    ):
        yield SimpleNamespace(client=client, handle=handle, replica=lambda: make_replica(folders, records))
    for replica in handle.replicas:
        await replica.__del__()


async def complete(client: httpx.AsyncClient, model: str, **fields: object) -> dict:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "session_id": "s", **fields}
    answer = await client.post("/v1/completions", json=body)
    return answer.json() if answer.status_code == 200 else {"status": answer.status_code, **answer.json()}


def cached(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_models_are_listed_chosen_loaded_and_unloaded(server, folders, records, tmp_path):
    client = server.client
    listed = {each["id"]: each.get("parent") for each in (await client.get("/v1/models")).json()["data"]}
    assert listed == {"tiny": None, "pirate": "tiny"}
    assert (await client.get("/v1/models/pirate")).json()["parent"] == "tiny"
    assert (await complete(client, "poet"))["status"] == 404

    loaded = await client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'poet' added successfully.")
    assert records == {"poet": "poet"}

    # All at once: in one batch.
    names = ["tiny", "pirate", "poet"]
    answers = await asyncio.gather(*(complete(client, name) for name in names))
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert len(set(texts)) == 3
    assert [answer["model"] for answer in answers] == names
    assert [cached(answer) for answer in answers] == [0, 0, 0]
    # The same tokens are found again with the same adapter; a session with another adapter is another one to the router.
    again = [await complete(client, name) for name in names]
    assert [answer["choices"][0]["text"] for answer in again] == texts
    assert all(cached(answer) > 60 for answer in again)
    assert server.handle.routed == ["s", "s\npirate", "s\npoet"] * 2

    merged = merge_adapter(folders["model"], folders["poet"], tmp_path / "merged", 2.0)
    alone = AsyncEngine(
        EngineConfig(model=str(merged), dtype="float32", num_threads=1, num_gpu_blocks=50, num_cpu_blocks=0)
    )
    poet = LLMServer(EngineConfig(kv_handover="off"), 0.0, lambda *_: alone)
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'other.db'}")
    app = create_app(engine_client.EngineClient(Handle([poet])), config, ingress_id="i")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60) as other:
        assert (await complete(other, alone.model_name))["choices"][0]["text"] == texts[2]
    await poet.__del__()

    unloaded = await client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
    assert unloaded.status_code == 200
    assert (await complete(client, "poet"))["error"]["code"] == "model_not_found"
    assert records == {}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_every_api_takes_an_adapter_as_a_model(path, server):
    message = [{"role": "user", "content": PROMPT}]
    body = {"input": message} if "responses" in path else {"messages": message, "max_tokens": 8}
    texts = []
    for name in ("tiny", "pirate"):
        answer = await server.client.post(path, json={"model": name, "temperature": 0, **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        texts.append(str(answer.json().get("content") or answer.json().get("output") or answer.json()["choices"]))
    assert texts[0] != texts[1]
    assert (await server.client.post(path, json={"model": "other", **body})).status_code == 404


async def test_a_response_goes_on_with_another_adapter(server):
    first = (
        await server.client.post("/v1/responses", json={"model": "tiny", "input": PROMPT, "max_output_tokens": 16})
    ).json()
    body = {"model": "pirate", "previous_response_id": first["id"], "input": "and?", "max_output_tokens": 16}
    second = (await server.client.post("/v1/responses", json=body)).json()
    assert second["status"] in ("completed", "incomplete")
    assert second["usage"]["input_tokens_details"]["cached_tokens"] == 0
    third = (await server.client.post("/v1/responses", json={**body, "previous_response_id": second["id"]})).json()
    assert third["usage"]["input_tokens_details"]["cached_tokens"] > 60


async def test_a_replica_that_starts_later_has_what_was_loaded(server):
    await server.client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"})
    expected = (await complete(server.client, "poet"))["choices"][0]["text"]
    server.handle.replicas.insert(0, server.replica())
    assert "poet" not in server.handle.replicas[0]._engine.adapter_names
    assert (await complete(server.client, "poet"))["choices"][0]["text"] == expected


async def test_running_requests_go_on_with_an_adapter_that_is_unloaded(server):
    await server.client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"})
    expected = (await complete(server.client, "poet", max_tokens=60, session_id="a"))["choices"][0]["text"]
    running = asyncio.create_task(complete(server.client, "poet", max_tokens=60, session_id="b"))
    engine = server.handle.replicas[0]._engine
    while not engine.get_statistics()["num_requests_running"]:
        await asyncio.sleep(0.001)
    await server.client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
    assert engine.adapter_names == ("pirate",)
    assert (await running)["choices"][0]["text"] == expected
    await engine.check_integrity()
    assert len(engine._executor.loaded.adapters._loaded) == 1, "its memory is freed with the last request"


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("pirate", "poet", "is the name of a model"),
        ("tiny", "poet", "name of the model"),
        ("poet", "../x", "not below adapter_folder"),
        ("poet", "/etc", "not below adapter_folder"),
        ("poet", ".", "not below adapter_folder"),
        ("poet", "nothing", "No such file"),
        ("poet", "nul\0", "is no path"),
        ("poet", "~nosuchuser/x", "is no path"),
        ("po et", "poet", "an adapter's name"),
    ],
)
async def test_what_cannot_be_loaded_is_refused_and_leaves_nothing(name, path, message, server, records):
    answer = await server.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert records == {}
    assert (await complete(server.client, "tiny"))["usage"]


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (OSError("the disk is broken"), 400, "internal error while loading"),
        (TimeoutError(), 503, "has loaded its adapters within"),
    ],
)
async def test_a_replica_that_fails_leaves_the_others_without_the_adapter(
    failure, status, message, server, records, monkeypatch
):
    other = server.replica()
    server.handle.replicas.append(other)

    async def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(other._engine, "load_adapter", fail)
    if isinstance(failure, TimeoutError):  # of all answers together
        broadcast = server.handle.broadcast
        monkeypatch.setattr(
            server.handle,
            "broadcast",
            lambda method: (
                SimpleNamespace(results_async=fail_late) if method == "adjust_adapters" else broadcast(method)
            ),
        )

        async def fail_late(**_: object) -> None:
            await asyncio.gather(*(each.adjust_adapters() for each in server.handle.replicas))
            raise failure

    answer = await server.client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"})
    assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert records == {}
    assert all("poet" not in replica._engine.adapter_names for replica in server.handle.replicas)
    assert (await server.client.get("/ready")).status_code == 200


async def test_a_client_that_leaves_while_its_adapter_is_loaded(server, records, monkeypatch):
    replica = server.handle.replicas[0]
    is_loading, may_load = asyncio.Event(), asyncio.Event()
    load = replica._engine.load_adapter

    async def load_slowly(name: str, folder: str) -> None:
        is_loading.set()
        await may_load.wait()
        await load(name, folder)

    monkeypatch.setattr(replica._engine, "load_adapter", load_slowly)
    monkeypatch.setattr(llm_server, "DESCRIBE_WAIT_S", 0.01)
    records["poet"] = "poet"
    asking = asyncio.create_task(replica.adjust_adapters())
    await is_loading.wait()
    asking.cancel()
    assert (await replica.describe()).adapters == ("pirate",), "a replica that loads says so, and is there"
    may_load.set()
    assert await replica.adjust_adapters() == {}
    assert replica._engine.adapter_names == ("pirate", "poet")
    assert await replica.adjust_adapters() == {}
    assert replica._engine.adapter_names == ("pirate", "poet"), "what was loaded is known to have been"


async def test_no_more_than_max_adapters(server, folders):
    for name, status in (("one", 200), ("two", 400)):
        answer = await server.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "poet"})
        assert answer.status_code == status
    assert "max_adapters is 2" in answer.json()["error"]["message"]
    assert (await server.client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"})).status_code == 400


async def test_tenants_do_not_load_adapters(engine, tmp_path):
    keys = {key: (hashlib.sha256(key.encode()).hexdigest(),) for key in ("key", "other")}
    tenants = (
        TenantConfig(id="acme", api_keys_sha256=keys["key"]),
        TenantConfig(id="root", api_keys_sha256=keys["other"], operator=True),
    )
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 's.db'}", tenants=tenants)
    app = create_app(engine, config, ingress_id="i")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for key, status, code in (("key", 403, "not_an_operator"), ("other", 400, "adapter_not_loadable")):
            headers = {"authorization": f"Bearer {key}"}
            body = {"lora_name": "a", "lora_path": "a"}
            answer = await client.post("/v1/load_lora_adapter", json=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_the_routing_key_has_the_adapter():
    card = ModelCard("tiny", 100, 8, adapters=("pirate",)).of_adapter("pirate")
    assert (card.model_name, card.parent, card.adapter) == ("pirate", "tiny", "pirate")
    assert GenerationRequest.routing_key.fget(SimpleNamespace(session_id="s", adapter="x")) == with_adapter("s", "x")
