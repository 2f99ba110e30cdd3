"""Several models in one application: a request goes to the replicas of the one that it names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import NoReplicaError
from deployments.generation import CacheHold, GenerationRequest, ModelCard, ReplicaCache
from deployments.ingress import IngressConfig, create_app
from deployments.routing.models import Models
from engine.cache_view import CacheQuery, CacheView
from engine.core.request import SamplingParams
from engine.errors import AdapterError, EngineStoppedError
from engine.text.prompt import TextPrompt
from tests.deployments.conftest import ScriptedEngine


class NamedEngine(ScriptedEngine):
    """Two replicas of a model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.error: Exception | None = None
        self.adapters: tuple[str, ...] = ()

    async def describe(self) -> ModelCard:
        if self.error is not None:
            raise self.error
        return ModelCard(
            self.name,
            100,
            128,
            (f"the disk of {self.name} is full",),
            adapters=self.adapters,
            may_load_adapters=bool(self.adapters) or self.name == "meta/large",
        )

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]:
        return [ReplicaCache(rank, CacheView(32, (), {}, (), ())) for rank in range(2)]

    async def hold_back(self, hold: CacheHold) -> list[int]:
        return [0, 1]


@pytest.fixture
def engines() -> dict[str, NamedEngine]:
    return {name: NamedEngine(name) for name in ("small", "meta/large")}


def asked(model: str) -> GenerationRequest:
    return GenerationRequest("r", "s", TextPrompt("hi"), SamplingParams(max_tokens=4), stream=True, model=model)


@asynccontextmanager
async def served(engines: Any, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engines, IngressConfig(store_url=f"sqlite:///{tmp_path / 's.db'}"), ingress_id="i")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
        ("/tokenize", {"prompt": "hi"}),
    ],
)
async def test_a_request_goes_to_its_model(
    engines: dict[str, NamedEngine], tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    async with served(engines, tmp_path) as client:
        for name in ("meta/large", "small", "meta/large"):
            response = await client.post(path, json={**body, "model": name})
            assert response.status_code == 200, response.text
        response = await client.post(path, json={**body, "model": "other"})
    assert response.status_code == 404
    assert "use one of 'small', 'meta/large'" in response.text
    if path != "/v1/messages":  # Anthropic's errors have no code
        assert response.json()["error"]["code"] == "model_not_found"
    assert [len(engine.requests) for engine in engines.values()] == [1, 2]


async def test_models_are_listed_and_told_apart(engines: dict[str, NamedEngine], tmp_path: Path) -> None:
    async with served(engines, tmp_path) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["small", "meta/large"]
        assert (await client.get("/v1/models/meta/large")).json()["id"] == "meta/large"
        assert (await client.get("/v1/models/large")).status_code == 404
        assert (await client.get("/ready")).json()["warnings"] == [
            "small: the disk of small is full",
            "meta/large: the disk of meta/large is full",
        ]


async def test_a_model_that_is_not_there_is_not_listed_and_not_ready(
    engines: dict[str, NamedEngine], tmp_path: Path
) -> None:
    engines["small"].error = NoReplicaError("no engine replica is ready")
    async with served(engines, tmp_path) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["meta/large"]
        response = await client.get("/ready")
        assert (response.status_code, response.json()["error"]["message"][:6]) == (503, "small:")
        body = {"model": "meta/large", "messages": [{"role": "user", "content": "hi"}]}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        engines["meta/large"].error = NoReplicaError("nor this one")
        assert (await client.get("/v1/models")).status_code == 503


async def test_a_model_that_is_busy_stays_listed(engines: dict[str, NamedEngine]) -> None:
    models = Models(engines)
    await models.model_cards()
    engines["small"].error = EngineStoppedError("no answer within 5 seconds")
    assert [card.model_name for card in await models.model_cards()] == ["small", "meta/large"]


async def test_replicas_are_numbered_through(engines: dict[str, NamedEngine]) -> None:
    models = Models(engines)
    assert [cache.replica_rank for cache in await models.map_cache(CacheQuery((), True))] == [0, 1, 2, 3]
    assert await models.hold_back(CacheHold()) == [0, 1, 2, 3]
    engines["small"].num_running, engines["meta/large"].num_running = 2, 3
    assert await models.load() == 5


async def test_an_adapter_takes_no_name_of_another_model(engines: dict[str, NamedEngine]) -> None:
    engines["small"].adapters = ("meta/large", "poet")  # the name of a model that was added later, and a good one
    models = Models(engines)
    await models.model_cards()
    assert (await models.model_card("meta/large")).adapter == ""
    assert (await models.model_card("poet")).parent == "small"
    _ = [item async for item in models.generate(asked("meta/large"))]
    assert [len(engine.requests) for engine in engines.values()] == [0, 1]

    # Another ingress replica has loaded "poet"; this one has not asked since.
    with pytest.raises(AdapterError, match="'poet' is the name of a model, or of an adapter"):
        await Models(engines).load_adapter("poet", "poet", "meta/large")


async def test_a_single_one_may_have_any_name(tmp_path: Path) -> None:
    async with served(NamedEngine("only"), tmp_path) as client:
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["only"]
        response = await client.post("/v1/completions", json={"prompt": "hi", "model": "other"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "use 'only'" in response.text
