"""The load generator against our own server, in each API: what a turn said before is cached, and nothing fails."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI

from deployments.ingress import IngressConfig, create_app
from engine.bench.apis import APIS, Content
from engine.bench.client import Client, Endpoint
from engine.bench.driver import Driver, Load
from engine.bench.probe import probe
from engine.bench.turns import TurnRecord
from engine.config import EngineConfig
from engine.workloads.sources import load_workload, parse_options
from tests.deployments.engine_here import EngineHere
from tests.deployments.serving import serving

CHUNK_SIZE = 16


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("bench")
    options = {"model": "embedded", "num_threads": 1, "num_gpu_blocks": 512, "chunk_size": CHUNK_SIZE}
    engines: list[EngineHere] = []

    async def make_app() -> FastAPI:
        engines.append(EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0))
        config = IngressConfig(store_url=f"sqlite:///{folder / 'conversations.db'}")
        return create_app(engines[0], config, ingress_id="ingress-1")

    async def end() -> None:
        await engines[0].check_integrity()
        await engines[0].__del__()

    with serving(make_app, end) as address:
        yield f"{address}/v1"


@pytest.mark.parametrize("api", APIS)
def test_turns_find_what_was_said_before_in_the_cache(url: str, api: str) -> None:
    drawn = {"num_sessions": 3, "turns": 3, "new_tokens": 20, "output_tokens": 6, "think_s": 0, "prefix_tokens": 40}
    sessions = load_workload("synthetic", parse_options(drawn))
    records: list[TurnRecord] = []

    async def run() -> tuple[str, ...]:
        probed = await probe(Endpoint("ours", url, api))
        client = Client(probed.endpoint)
        load = Load(f"run-{api}", Content(seed=len(api)), num_active=2)
        try:
            await Driver(client, load, time.perf_counter(), records.append).run(sessions, itertools.count().__next__)
        finally:
            await client.close()
        return probed.notes

    assert asyncio.run(run()) == ()
    assert [record.error for record in records] == [""] * 9
    assert {record.num_output_tokens for record in records} == {6}
    for session in {record.session_id for record in records}:
        own = [record for record in records if record.session_id == session]
        for before, record in itertools.pairwise(own):
            # All that was said is there; the last token of an answer has no KV yet.
            assert record.num_prompt_tokens is not None
            said = (before.num_prompt_tokens or 0) + before.num_output_tokens
            assert said - 1 <= (record.num_cached_tokens or 0) < record.num_prompt_tokens
    # The prefix that all share: some session found it on its first turn.
    firsts = [record.num_cached_tokens or 0 for record in records if record.turn == 0]
    assert max(firsts) >= 40 // CHUNK_SIZE * CHUNK_SIZE
    if api == "completions":
        assert sorted(record.num_prompt_tokens or 0 for record in records) == sorted([60, 86, 112] * 3)


def test_a_recorded_prompt_that_replaces_the_last_one_finds_what_they_share(url: str) -> None:
    (session,) = load_workload(
        "synthetic", parse_options({"num_sessions": 1, "turns": 2, "new_tokens": 64, "output_tokens": 4})
    )
    first, second = session.turns
    recorded = replace(session, turns=(first, replace(second, keep_tokens=48, pause_s=0.0)))
    records: list[TurnRecord] = []

    async def run() -> None:
        client = Client((await probe(Endpoint("ours", url, "completions"))).endpoint)
        driver = Driver(client, Load("recorded", Content(seed=99)), time.perf_counter(), records.append)
        await driver.run([recorded], itertools.count().__next__)
        await client.close()

    asyncio.run(run())
    assert [(record.num_prompt_tokens, record.num_cached_tokens) for record in records] == [(64, 0), (48 + 64, 48)]
