"""GET /v1/cache/map and POST /v1/cache/demo: which key sees what, and that no engine is asked while no client watches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import cache_map
from deployments.cache_map import CacheWatchers, MapQuery
from deployments.errors import NotAnOperatorError
from deployments.generation import CacheHold, ReplicaCache
from deployments.http.errors import ERRORS
from deployments.ingress import IngressConfig, create_app
from deployments.tenants import TenantConfig, hash_key
from engine.cache_view import CacheQuery, CacheView, ConversationView, EvictionView, TierView
from engine.core.cache_map import Cell
from engine.errors import OverloadedError
from engine.tenant import Tenant
from tests.deployments.conftest import ScriptedEngine

KEYS = {"acme": "sk-a", "other": "sk-b", "boss": "sk-c"}
TENANTS = tuple(
    TenantConfig(id=name, api_keys_sha256=(hash_key(key),), operator=name == "boss") for name, key in KEYS.items()
)
VIEW = CacheView(
    chunk_size=4,
    tiers=(TierView("gpu", 8, 5, 2), TierView("cpu", 4, 0, 0)),
    hit_rates={"gpu": 2 / 3, "new": 1 / 3},
    conversations=(
        ConversationView("acme", "alice", "idle", 3, (Cell("gpu", 4, 1.23456, 0.5), Cell("dropped", 4))),
        ConversationView("other", "secret-name", "running", 1, (Cell("computing", 0),)),
    ),
    evictions=(
        EvictionView(3, 0.5, "gpu_dropped", "gpu", "dropped", None, None, 7, 4, 9.0, 0.1),
        EvictionView(2, 0.5, "gpu_dropped", "gpu", "dropped", "other", "secret-name", 5, 4, 9.0, 0.1),
        EvictionView(1, 1.5, "cpu_dropped", "cpu", "dropped", "acme", "alice", 1, 4, 8.0, 0.25),
    ),
)


class MappedEngine(ScriptedEngine):
    """Shows VIEW to every watcher, and notes each query."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[CacheQuery] = []
        self.holds: list[CacheHold] = []

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]:
        self.queries.append(query)
        return [ReplicaCache(1, VIEW)]

    async def hold_back(self, hold: CacheHold) -> list[int]:
        self.holds.append(hold)
        return [1]


@pytest.fixture
def engine() -> MappedEngine:
    return MappedEngine()


def make_client(engine: MappedEngine, tmp_path: Path, **options: Any) -> httpx.AsyncClient:
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'store.db'}", **options)
    transport = httpx.ASGITransport(create_app(engine, config, ingress_id="i"), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.fixture
async def client(engine: MappedEngine, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with make_client(engine, tmp_path, tenants=TENANTS, demo=True) as client:
        yield client


def headers(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


async def look(client: httpx.AsyncClient, tenant: str | None = None, **query: Any) -> list[dict[str, Any]]:
    query = {"num_events": 1, **query}
    answer = await client.get("/v1/cache/map", params=query, headers=headers(tenant) if tenant else {})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


async def test_a_tenant_sees_its_own_conversations_only(client: httpx.AsyncClient, engine: MappedEngine) -> None:
    (event,) = await look(client, "acme")
    assert event == {
        "object": "cache.map",
        "operator": False,
        "demo": False,
        "replicas": [
            {
                "replica": 1,
                "chunk_size": 4,
                "tiers": [
                    {"name": "gpu", "blocks": 8, "used": 3, "held": 2},
                    {"name": "cpu", "blocks": 4, "used": 0, "held": 0},
                ],
                "hit_rates": {"gpu": 0.6667, "new": 0.3333},
                "conversations": [
                    {
                        "id": "alice",
                        "tenant": "acme",
                        "status": "idle",
                        "num_chunks": 3,
                        "cells": [
                            {"state": "gpu", "tokens": 4, "idle_s": 1.235, "retention_value": 0.5},
                            {"state": "dropped", "tokens": 4, "idle_s": None, "retention_value": None},
                        ],
                    }
                ],
                "evictions": [
                    {
                        "number": 1,
                        "ago_s": 1.5,
                        "reason": "cpu_dropped",
                        "from": "cpu",
                        "to": "dropped",
                        "conversation": "alice",
                        "position": 1,
                        "tokens": 4,
                        "idle_s": 8.0,
                        "retention_value": 0.25,
                    }
                ],
            }
        ],
    }
    assert engine.queries == [CacheQuery(("acme",), sees_all=False)]


async def test_an_operator_sees_all_but_no_names(client: httpx.AsyncClient, engine: MappedEngine) -> None:
    (event,) = await look(client, "boss")
    assert engine.queries == [CacheQuery(("boss",), sees_all=True)]
    (replica,) = event["replicas"]
    assert [row["tenant"] for row in replica["conversations"]] == ["acme", "other"]
    names = [row["id"] for row in replica["conversations"]]
    assert all(name.startswith("hidden-") for name in names)
    assert len(set(names)) == 2
    assert [eviction["conversation"] for eviction in replica["evictions"]] == [None, names[1], names[0]]
    assert "secret" not in json.dumps(event)
    assert (event["operator"], event["demo"]) == (True, True)


async def test_without_keys_the_one_tenant_sees_all(engine: MappedEngine, tmp_path: Path) -> None:
    async with make_client(engine, tmp_path) as client:
        (event,) = await look(client)
        assert (event["operator"], event["demo"]) == (True, False)
        assert len(event["replicas"][0]["conversations"]) == 2
        assert (await client.post("/v1/cache/demo", json={})).status_code == 404  # not without `demo`
    assert engine.queries == [CacheQuery(("local",), sees_all=True)]


@pytest.mark.parametrize(
    "query", ["interval=0.1", "interval=61", "interval=x", "num_events=0", "num_events=1&num_events=2"]
)
async def test_queries_that_are_refused(client: httpx.AsyncClient, engine: MappedEngine, query: str) -> None:
    answer = await client.get(f"/v1/cache/map?{query}", headers=headers("acme"))
    assert answer.status_code == 400
    assert engine.queries == []


async def test_only_an_operator_makes_the_tiers_smaller(client: httpx.AsyncClient, engine: MappedEngine) -> None:
    refused = await client.post("/v1/cache/demo", json={"gpu_blocks": 1}, headers=headers("acme"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, ERRORS[NotAnOperatorError].code)
    assert engine.holds == []
    done = await client.post("/v1/cache/demo", json={"gpu_blocks": 1}, headers=headers("boss"))
    assert done.json() == {"object": "cache.demo", "replicas": [1]}
    await client.post("/v1/cache/demo", headers=headers("boss"))
    assert engine.holds == [CacheHold(1, None), CacheHold(None, None)]


# -- those who watch ---------------------------------------------------------------------------------------------------


class Clock:
    """Stands still but for sleeps, which it makes short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.1
        self.sleeps: list[float] = []
        self._sleep = asyncio.sleep
        monkeypatch.setattr(cache_map.asyncio, "sleep", self.sleep)

    async def sleep(self, delay: float) -> None:
        self.sleeps.append(delay)
        self.now += delay
        await self._sleep(0)

    def __call__(self) -> float:
        return self.now


def watch(
    watchers: CacheWatchers, tenant: str = "acme", *, is_operator: bool = False, **query: Any
) -> AsyncGenerator[str, None]:
    return watchers.events(Tenant(tenant), MapQuery(**query), lambda: is_operator)


async def test_nothing_is_asked_while_nobody_looks(engine: MappedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watchers = CacheWatchers(engine, can_hold_back=False, clock=clock)
    leave = watchers.enter(Tenant("acme"), is_operator=False)
    assert engine.queries == []
    events = watch(watchers)
    for _ in range(3):
        await anext(events)
    assert clock.sleeps == [pytest.approx(0.9), pytest.approx(1.0)]
    assert len(engine.queries) == 3
    await events.aclose()
    leave()
    before = asyncio.all_tasks()
    await clock.sleep(100.0)
    assert len(engine.queries) == 3
    assert before == {asyncio.current_task()}  # and nothing is left that could ask


async def test_all_who_watch_share_one_question(engine: MappedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    watchers = CacheWatchers(engine, can_hold_back=False, clock=lambda: 0.1)
    for tenant in ("acme", "other", "boss"):
        watchers.enter(Tenant(tenant), is_operator=tenant == "boss")
    rows = []
    for tenant in ("acme", "other", "boss"):
        event = await anext(watch(watchers, tenant, is_operator=tenant == "boss"))
        rows.append([row["tenant"] for row in json.loads(event.removeprefix("data: "))["replicas"][0]["conversations"]])
    assert engine.queries == [CacheQuery(("acme", "boss", "other"), sees_all=True)]
    assert rows == [["acme"], ["other"], ["acme", "other"]]


async def test_who_comes_right_after_a_question_waits_for_the_next(
    engine: MappedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchers = CacheWatchers(engine, can_hold_back=False, clock=Clock(monkeypatch))
    watchers.enter(Tenant("acme"), is_operator=False)
    await anext(watch(watchers, "acme"))
    watchers.enter(Tenant("other"), is_operator=False)
    event = json.loads((await anext(watch(watchers, "other"))).removeprefix("data: "))
    assert [row["tenant"] for row in event["replicas"][0]["conversations"]] == ["other"]
    assert engine.queries == [CacheQuery(("acme",)), CacheQuery(("acme", "other"))]


async def test_a_slow_stream_says_that_it_is_alive(engine: MappedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    watchers = CacheWatchers(engine, can_hold_back=False, clock=Clock(monkeypatch))
    watchers.enter(Tenant("acme"), is_operator=False)
    events = watch(watchers, interval=40.0, num_events=2)
    said = [event async for event in events]
    assert [event[:5] for event in said] == ["data:", ": ali", ": ali", "data:"]


async def test_a_key_that_is_withdrawn_sees_no_more(engine: MappedEngine) -> None:
    watchers = CacheWatchers(engine, can_hold_back=False, clock=lambda: 0.0)
    watchers.enter(Tenant("acme"), is_operator=False)

    def refuse() -> bool:
        raise NotAnOperatorError("withdrawn")

    said = [event async for event in watchers.events(Tenant("acme"), MapQuery(), refuse)]
    assert len(said) == 1
    assert json.loads(said[0].removeprefix("data: "))["error"]["code"] == ERRORS[NotAnOperatorError].code


async def test_so_many_may_watch(engine: MappedEngine) -> None:
    watchers = CacheWatchers(engine, can_hold_back=False)
    leaves = [watchers.enter(Tenant("acme"), is_operator=True) for _ in range(cache_map.MAX_WATCHERS)]
    with pytest.raises(OverloadedError):
        watchers.enter(Tenant("acme"), is_operator=False)
    watchers.enter(Tenant("other"), is_operator=False)()  # one tenant does not take all places
    for leave in leaves:
        leave()
    watchers.enter(Tenant("acme"), is_operator=False)
    await anext(watch(watchers))
    assert engine.queries == [CacheQuery(("acme",), sees_all=False)]


async def test_a_client_that_leaves_gives_its_place_back(
    engine: MappedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_map, "MAX_WATCHERS", 1)
    async with make_client(engine, tmp_path) as client:
        for _ in range(3):
            await look(client)


# -- the page's files --------------------------------------------------------------------------------------------------


async def test_the_page_is_sent_to_anybody_and_loads_nothing_from_elsewhere(
    engine: MappedEngine, tmp_path: Path
) -> None:
    async with make_client(engine, tmp_path, tenants=TENANTS) as client:
        for path, media_type in (
            ("/", "text/html"),
            ("/page.css", "text/css"),
            ("/page.js", "text/javascript"),
            ("/markdown.js", "text/javascript"),
        ):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(media_type)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "innerHTML" not in answer.text
            assert "://" not in answer.text
        assert (await client.post("/")).status_code == 405


async def test_the_page_is_off_by_option(engine: MappedEngine, tmp_path: Path) -> None:
    async with make_client(engine, tmp_path, page=False) as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/page.js")).status_code == 404
