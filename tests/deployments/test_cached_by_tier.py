"""What `usage` says of the tiers that had a prompt's tokens, over HTTP: after a restart, with the KV on disk.

Through the clients of OpenAI and Anthropic, whole and streamed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI

from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from engine.core.cache.prices import LoadPrices
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
NAMES = ("Mia", "Bob", "Zoe", "Tim", "Eva", "Max", "Ann", "Leo")
OPTIONS: dict[str, Any] = {
    "num_threads": 1,
    "dtype": "float32",
    "chunk_size": 8,
    "num_gpu_blocks": 96,
    "num_cpu_blocks": 64,
    "max_model_len": 512,
    "kv_disk_size": 0.01,
}
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0}


@pytest.fixture(autouse=True)
def any_load_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is: what is observed does not count."""
    monkeypatch.setattr(LoadPrices, "note_load", lambda *_: None)
    monkeypatch.setattr("engine.executor.tiers.disk_tier.MAX_WAIT_S", 60.0)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[FastAPI, EngineHere]]:
    """An application that keeps its KV on disk when it ends."""
    config = EngineConfig.from_options(OPTIONS | {"kv_disk_path": str(folder / "kv")})
    here = EngineHere(config, stream_interval_s=0.0, drain_s=60.0)
    app = create_app(here, IngressConfig(store_url=f"sqlite:///{folder / 'c.db'}"), ingress_id="ingress-1")
    async with app.router.lifespan_context(app):
        yield app, here
    await here.check_integrity()
    await here.__del__()


def openai_client(app: FastAPI) -> AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=None)
    return AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


def anthropic_client(app: FastAPI) -> Any:
    anthropic, httpx2 = pytest.importorskip("anthropic"), pytest.importorskip("httpx2")
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost", timeout=None)
    return anthropic.AsyncAnthropic(base_url="http://localhost", api_key="none", http_client=http, max_retries=0)


def told(name: str) -> Any:
    return [{"role": "user", "content": f"My cat is called {name}. " + "It is a good cat. " * 4}]


def text(name: str) -> str:
    return f"{name} is a cat. " * 8


async def begin(app: FastAPI) -> str:
    """Something said about each name; the id of a response."""
    client = openai_client(app)
    for name in NAMES[:5]:
        await client.chat.completions.create(messages=told(name), max_tokens=8, **GREEDY)
    for name in NAMES[5:7]:
        await client.completions.create(prompt=text(name), max_tokens=8, **GREEDY)
    response = await client.responses.create(input=told(NAMES[7]), max_output_tokens=8, **GREEDY)
    return response.id


def check(details: Any, num_cached: int, *tiers: str) -> None:
    """These tiers had it, and no others."""
    by_tier = details.model_extra["cached_tokens_by_tier"]
    assert sum(by_tier.values()) == num_cached > 0
    assert tuple(by_tier) == tiers, by_tier
    assert min(by_tier.values()) > 0


async def test_chats_and_completions(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, _):
        await begin(app)
    async with serving(tmp_path) as (app, here):
        chat, completions = openai_client(app).chat.completions, openai_client(app).completions

        async def whole(name: str, **more: Any) -> Any:
            answer = await chat.create(messages=told(name), max_tokens=8, **GREEDY, **more)
            return answer.usage.prompt_tokens_details

        first = await whole(NAMES[0])
        check(first, first.cached_tokens, "disk")
        again = await whole(NAMES[0])
        check(again, again.cached_tokens, "gpu")
        many = await whole(NAMES[1], n=3)  # one prompt, which all three have
        check(many, many.cached_tokens, "disk")

        options = {"stream_options": {"include_usage": True}, "stream": True}
        stream = await chat.create(messages=told(NAMES[2]), max_tokens=8, **GREEDY, **options)
        usages = [chunk.usage async for chunk in stream if chunk.usage is not None]
        check(usages[-1].prompt_tokens_details, usages[-1].prompt_tokens_details.cached_tokens, "disk")

        prompts = [text(NAMES[5]), text(NAMES[6]), text(NAMES[5])]
        answer = await completions.create(prompt=prompts, n=2, max_tokens=8, **GREEDY)
        details = answer.usage.prompt_tokens_details
        by_tier = details.model_extra["cached_tokens_by_tier"]
        assert sum(by_tier.values()) == details.cached_tokens
        assert by_tier["disk"] > 0
        statistics = await here.get_statistics()
        assert statistics["num_disk_cached_tokens"] > 0
        unknown = await chat.create(messages=[{"role": "user", "content": "?"}], max_tokens=1, **GREEDY)
        assert unknown.usage.prompt_tokens_details.to_dict() == {
            "cached_tokens": 0,
            "cache_write_tokens": unknown.usage.prompt_tokens,
        }


async def test_responses(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, _):
        response_id = await begin(app)
    async with serving(tmp_path) as (app, _):
        client = openai_client(app)
        options = GREEDY | {"input": "And?", "previous_response_id": response_id, "max_output_tokens": 8}
        whole = await client.responses.create(**options)
        details = whole.usage.input_tokens_details
        check(details, details.cached_tokens, "disk")
        async with client.responses.stream(**options) as stream:
            streamed = await stream.get_final_response()
        details = streamed.usage.input_tokens_details
        check(details, details.cached_tokens, "gpu")
        stored = await client.responses.retrieve(streamed.id)
        assert stored.usage == streamed.usage


async def test_messages(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, _):
        await begin(app)
    async with serving(tmp_path) as (app, _):
        client = anthropic_client(app)
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "extra_body": {"temperature": 0}}
        whole = await client.messages.create(messages=told(NAMES[3]), **options)
        check(whole.usage, whole.usage.cache_read_input_tokens, "disk")
        async with client.messages.stream(messages=told(NAMES[4]), **options) as stream:
            streamed = await stream.get_final_message()
        check(streamed.usage, streamed.usage.cache_read_input_tokens, "disk")
