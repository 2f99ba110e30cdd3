"""What clients are told that ask how an answer came about: through all endpoints, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI

from deployments.generation import CacheHold
from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
CONFIG = EngineConfig.from_options(
    {"num_threads": 1, "dtype": "float32", "chunk_size": 8, "num_gpu_blocks": 96, "num_cpu_blocks": 0}
    | {"max_model_len": 512}
)
PHASES = ["prepare", "queue", "load", "prefill", "decode", "suspended"]
MESSAGES: Any = [{"role": "user", "content": "My cat is called Mia. " * 8}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0}
EXPLAIN: dict[str, Any] = {"extra_body": {"explain": True}}
BY_HEADER: dict[str, Any] = {"extra_headers": {"X-Pensieve-Explain": "true"}}


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[FastAPI, EngineHere]]:
    here = EngineHere(CONFIG, stream_interval_s=0.0)
    app = create_app(here, IngressConfig(store_url=f"sqlite:///{folder / 'c.db'}"), ingress_id="ingress-1")
    async with app.router.lifespan_context(app):
        yield app, here
    await here.__del__()


def openai_client(app: FastAPI) -> AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=None)
    return AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


def check(told: Any, num_prompt: int, num_cached: int) -> None:
    """The numbers are those of `usage`, and no phase is missing."""
    assert list(told["seconds"]) == PHASES
    assert told["seconds"]["prefill"] > 0
    assert all(value >= 0 for value in told["seconds"].values())
    assert sum(told["cached_tokens_by_tier"].values()) == num_cached
    assert sum(told["computed_tokens_by_reason"].values()) == num_prompt - num_cached
    assert told["suspensions"] == 0


async def test_chats(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, here):
        create = openai_client(app).chat.completions.create
        plain = await create(messages=MESSAGES, max_tokens=8, **GREEDY)
        assert "explanation" not in plain.choices[0].model_extra

        for how in (EXPLAIN, BY_HEADER):
            told = await create(messages=MESSAGES, max_tokens=8, **GREEDY, **how)
            cached = told.usage.prompt_tokens_details.cached_tokens
            check(told.choices[0].model_extra["explanation"], told.usage.prompt_tokens, cached)
            assert told.choices[0].message == plain.choices[0].message
            assert cached > 0

        await here.hold_back(CacheHold(gpu_blocks=2))
        await here.hold_back(CacheHold())
        many = await create(messages=MESSAGES, max_tokens=8, n=2, **GREEDY, **EXPLAIN)
        first, second = (choice.model_extra["explanation"] for choice in many.choices)
        assert first["computed_tokens_by_reason"]["gpu_dropped"] > first["computed_tokens_by_reason"].get("new", 0)
        assert sum(second["cached_tokens_by_tier"].values()) > 0

        stream = await create(messages=MESSAGES, max_tokens=8, stream=True, **GREEDY, **EXPLAIN)
        choices = [chunk.choices[0] async for chunk in stream]
        assert [("explanation" in choice.model_extra) for choice in choices] == [*[False] * (len(choices) - 1), True]
        check(choices[-1].model_extra["explanation"], many.usage.prompt_tokens, cached)


async def test_completions(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, _):
        create = openai_client(app).completions.create
        prompts = ["Mia is a cat. " * 8, "Bob is a dog. " * 8]
        both = await create(prompt=prompts, max_tokens=4, **GREEDY, **EXPLAIN)
        explanations = [choice.model_extra["explanation"] for choice in both.choices]
        num_computed = [sum(told["computed_tokens_by_reason"].values()) for told in explanations]
        assert sum(num_computed) == both.usage.prompt_tokens - both.usage.prompt_tokens_details.cached_tokens
        stream = await create(prompt=prompts[0], max_tokens=4, stream=True, **GREEDY, **BY_HEADER)
        choices = [chunk.choices[0] async for chunk in stream]
        assert list(choices[-1].model_extra["explanation"]["seconds"]) == PHASES
        plain = await create(prompt=prompts[0], max_tokens=4, **GREEDY)
        assert "explanation" not in plain.choices[0].model_extra


async def test_responses(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, _):
        client = openai_client(app)
        options: Any = GREEDY | {"input": MESSAGES, "max_output_tokens": 8}
        plain = await client.responses.create(**options)
        assert "explanation" not in plain.model_extra
        whole = await client.responses.create(**options, **EXPLAIN)
        usage = whole.usage
        check(whole.model_extra["explanation"], usage.input_tokens, usage.input_tokens_details.cached_tokens)
        async with client.responses.stream(**options, **BY_HEADER) as stream:
            streamed = await stream.get_final_response()
        usage = streamed.usage
        check(streamed.model_extra["explanation"], usage.input_tokens, usage.input_tokens_details.cached_tokens)


async def test_messages(tmp_path: Path) -> None:
    anthropic, httpx2 = pytest.importorskip("anthropic"), pytest.importorskip("httpx2")
    async with serving(tmp_path) as (app, _):
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost", timeout=None)
        client = anthropic.AsyncAnthropic(base_url="http://localhost", api_key="none", http_client=http, max_retries=0)
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "messages": MESSAGES}
        whole = await client.messages.create(**options, extra_body={"temperature": 0, "explain": True})
        check(
            whole.usage.model_extra["explanation"],
            whole.usage.input_tokens + whole.usage.cache_read_input_tokens,
            whole.usage.cache_read_input_tokens,
        )
        stream = await client.messages.create(**options, **BY_HEADER, stream=True)
        usages = [event.usage async for event in stream if event.type == "message_delta"]
        assert list(usages[-1].model_extra["explanation"]["seconds"]) == PHASES
        async with client.messages.stream(**options, **BY_HEADER) as stream:
            assert (await stream.get_final_message()).content[0].text
        plain = await client.messages.create(**options)
        assert "explanation" not in plain.usage.model_extra


async def test_a_header_that_says_neither_yes_nor_no(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"x-pensieve-explain": "maybe\x7f"}
    refused = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-pensieve-explain")
    asked = await client.post("/v1/chat/completions", json=body, headers={"x-pensieve-explain": "0"})
    assert asked.status_code == 200
