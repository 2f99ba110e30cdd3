"""What an engine shows of its cache to each tenant: with the embedded model, over real turns."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from engine import cache_view
from engine.async_engine import AsyncEngine
from engine.cache_view import CacheQuery, CacheView, CacheWatch
from engine.config import EngineConfig
from engine.core.cache_map import Eviction
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.request import SamplingParams
from engine.core.tier_table import TierSpec
from engine.generation import Generation
from engine.tenant import Tenant
from engine.text.prompt import ChatPrompt
from engine.text.transcript import ConversationTable, Transcript

OPTIONS = {"num_threads": 1, "dtype": "float32", "chunk_size": 4, "num_gpu_blocks": 64, "num_cpu_blocks": 64}
ACME, OTHER = Tenant("acme"), Tenant("other")


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig.from_options({**OPTIONS, "max_model_len": 256}))
    yield engine
    await engine.check_integrity()
    await engine.shutdown()


async def say(engine: AsyncEngine, text: str, session_id: str, tenant: Tenant = ACME) -> str:
    prompt = ChatPrompt((("user", text),))
    sampling = SamplingParams(temperature=0.0, max_tokens=16)
    generation = Generation(f"{session_id}-{text}", session_id, prompt, sampling, tenant=tenant)
    return "".join([delta.text async for delta in engine.generate(generation)])


def named(view: CacheView) -> list[tuple[str, str]]:
    return [(row.tenant, row.session_id) for row in view.conversations]


async def test_a_tenant_sees_its_own_conversations_the_latest_first(engine: AsyncEngine) -> None:
    for session_id, tenant in (("one", ACME), ("two", OTHER), ("three", ACME)):
        await say(engine, "my cat is called Mia", session_id, tenant)
    assert named(await engine.map_cache(CacheQuery(("acme",)))) == [("acme", "three"), ("acme", "one")]
    assert named(await engine.map_cache(CacheQuery(("other",)))) == [("other", "two")]
    assert named(await engine.map_cache(CacheQuery(("nobody",)))) == []
    everything = await engine.map_cache(CacheQuery(("other",), sees_all=True))
    assert named(everything) == [("acme", "three"), ("other", "two"), ("acme", "one")]
    (row, *_) = everything.conversations
    assert row.status == "idle"
    assert row.num_chunks == len(row.cells) > 3
    assert {cell.state for cell in row.cells} == {"gpu"}
    assert all(cell.idle_s is not None and cell.retention_value for cell in row.cells)
    (gpu, cpu) = everything.tiers
    # Those of one tenant share what they have in common, which is everything.
    assert (gpu.name, gpu.num_blocks, gpu.num_used, gpu.num_held) == ("gpu", 64, 2 * row.num_chunks, 0)
    assert (cpu.name, cpu.num_blocks, cpu.num_used, cpu.num_held) == ("cpu", 64, 0, 0)
    assert sum(everything.hit_rates.values()) == pytest.approx(1.0)
    assert everything.hit_rates["gpu"] > 0


async def test_evictions_name_whose_chunk_it_was_to_its_tenant(engine: AsyncEngine) -> None:
    await say(engine, "my cat is called Mia", "one")
    await say(engine, "i live in Rome", "two", OTHER)
    await engine.map_cache(CacheQuery(("acme",)))
    await engine.hold_back(gpu_blocks_left=0, cpu_blocks_left=0)
    view = await engine.map_cache(CacheQuery(("acme",)))
    (row,) = view.conversations
    assert {cell.state for cell in row.cells} == {"dropped"}
    mine = [eviction for eviction in view.evictions if eviction.tenant is not None]
    assert {(e.tenant, e.session_id) for e in mine} == {("acme", "one")}
    assert sorted(e.position for e in mine) == list(range(row.num_chunks))
    assert len(view.evictions) > len(mine)  # of the other tenant, without a name
    assert {(e.reason, e.source, e.target) for e in view.evictions} == {("gpu_dropped", "gpu", "dropped")}
    assert all(e.retention_value and e.idle_s > 0 and e.ago_s >= 0 for e in view.evictions)
    assert [(tier.num_used, tier.num_held) for tier in view.tiers] == [(64, 64), (64, 64)]
    # Nothing is lost but time.
    assert "Mia" in await say(engine, "my cat is called Mia", "one")
    await engine.hold_back()
    assert [tier.num_held for tier in (await engine.map_cache(CacheQuery())).tiers] == [0, 0]


async def test_a_request_that_runs_is_shown(engine: AsyncEngine) -> None:
    prompt = ChatPrompt((("user", "my cat is called Mia"),))
    sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    deltas = engine.generate(Generation("r", "one", prompt, sampling, tenant=ACME))
    await anext(deltas)
    (row,) = (await engine.map_cache(CacheQuery(("acme",)))).conversations
    assert (row.session_id, row.status) == ("one", "running")
    assert "computing" in {cell.state for cell in row.cells}
    await deltas.aclose()


async def test_nothing_is_queued_while_nobody_looks(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Callable[[], None]] = []
    put = engine._thread.put
    monkeypatch.setattr(engine._thread, "put", lambda command: (commands.append(command), put(command)))
    await engine.map_cache(CacheQuery(("acme",)))
    assert len(commands) == 2
    await asyncio.sleep(0.2)
    assert len(commands) == 2
    await say(engine, "my cat is called Mia", "one")
    assert len(commands) == 3  # the request itself


async def call(function: Callable[[], Any]) -> Any:
    """As an engine thread with nothing else to do."""
    return function()


async def at_once(function: Callable[..., Any], *args: Any) -> Any:
    """As another thread."""
    return function(*args)


async def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many conversations there are, and however long they are; and names are found anew only for what has changed."""
    core = EngineCore(CacheConfig(num_gpu_blocks=4, chunk_size=4), SchedulingConfig(max_model_len=16))
    table = ConversationTable(1 << 30, {})
    for number in range(200):
        tenant = "acme" if number % 2 else "other"
        table.record_turn(f"{tenant}\n{number}", Transcript(array("I", range(4000)), "text"), [1], "a")
    num_named = 0

    def count_keys(*args: Any, **options: Any) -> Any:
        nonlocal num_named
        num_named += 1
        return make_keys(*args, **options)

    make_keys = cache_view.context_keys
    monkeypatch.setattr(cache_view, "context_keys", count_keys)

    watch = CacheWatch(core, table, call, time.monotonic)
    view = await watch.look(CacheQuery(("acme",), sees_all=True), at_once)
    assert sum(row.tenant == "acme" for row in view.conversations) == cache_view.MAX_TENANT_CONVERSATIONS
    assert len(view.conversations) <= cache_view.MAX_CONVERSATIONS
    assert {len(row.cells) for row in view.conversations} == {cache_view.MAX_CHUNKS}
    assert {row.num_chunks for row in view.conversations} == {1000}
    assert num_named == len(view.conversations)
    await watch.look(CacheQuery(("acme",), sees_all=True), at_once)
    assert num_named == len(view.conversations)


async def test_two_that_look_at_the_same_time_see_their_own() -> None:
    """Two replicas of the ingress, for instance."""
    core = EngineCore(CacheConfig(num_gpu_blocks=4, chunk_size=4), SchedulingConfig(max_model_len=16))
    table = ConversationTable(1 << 30, {})
    for tenant in ("acme", "other"):
        table.record_turn(f"{tenant}\n1", Transcript(array("I", range(8)), "text"), [1], "a")

    async def call_late(function: Callable[[], Any]) -> Any:
        """The engine thread has another command before this one."""
        if is_named:
            is_named.clear()
            await watch.look(CacheQuery(("other",)), at_once)
        return function()

    async def note_named(function: Callable[..., Any], *args: Any) -> Any:
        is_named.append(True)
        return function(*args)

    is_named: list[bool] = []
    watch = CacheWatch(core, table, call_late, time.monotonic)
    (row,) = (await watch.look(CacheQuery(("acme",)), note_named)).conversations
    assert (row.session_id, len(row.cells)) == ("1", 2)


async def test_evictions_of_a_slow_tier_have_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = TierSpec(name="local_ssd", num_blocks=4, is_fast=False)
    cache = CacheConfig(num_gpu_blocks=4, num_cpu_blocks=4, chunk_size=4, slow_tiers=(slow,))
    core = EngineCore(cache, SchedulingConfig(max_model_len=16))
    watch = CacheWatch(core, ConversationTable(1 << 30, {}), call, time.monotonic)
    evictions = [
        Eviction(number, 0.0, reason, b"", 0, 4, 1.0, None) for number, reason in enumerate(core.stats.evictions)
    ]
    monkeypatch.setattr(core, "latest_evictions", lambda: evictions)

    view = await watch.look(CacheQuery(), at_once)
    assert {(e.reason, e.source, e.target) for e in view.evictions} >= {
        ("cpu_reclaimed", "cpu", "local_ssd"),
        ("local_ssd_dropped", "local_ssd", "dropped"),
        ("local_ssd_copy_dropped", "local_ssd", "cpu"),
    }
