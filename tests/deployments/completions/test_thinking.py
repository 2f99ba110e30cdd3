"""Chats with a model that thinks: a limit of its thinking, its tokens in the usage, and what holds the answer behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from deployments.completions.requests import ChatCompletionBody
from deployments.http.parsing import parse_request
from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from engine.tenant import LOCAL_TENANT as TENANT
from engine.text.prompt import AnswerBeginning
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 1.0,
    "seed": 1,
    "max_tokens": 60,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": CITY}}
CALLING = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
LIMIT = 6


@pytest.fixture
async def engine() -> AsyncIterator[EngineHere]:
    """Takes what the model writes for thinking from its first token on."""
    options = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "reasoning_parser": "deepseek_r1"}
    here = EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0)
    yield here
    await here.__del__()


@pytest.fixture
async def client(engine: EngineHere, tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    app = create_app(engine, IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}"), ingress_id="ingress-1")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None) as http,
    ):
        yield AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


async def ask(client: AsyncOpenAI, **more: Any) -> Any:
    """The only choice, with the usage as `usage`."""
    completion = await client.chat.completions.create(**{**ASKED, "extra_body": more})
    (choice,) = completion.choices
    choice.message.usage = completion.usage
    return choice


def num_closing_tokens(engine: EngineHere) -> int:
    return len(engine._engine._tokenizer.encode_marker("</think>"))


async def test_a_limit_ends_the_thinking(client: AsyncOpenAI, engine: EngineHere) -> None:
    without = (await ask(client)).message
    assert without.usage.completion_tokens_details.reasoning_tokens == without.usage.completion_tokens > LIMIT
    assert not without.content
    limited = (await ask(client, max_thinking_tokens=LIMIT)).message
    assert without.reasoning_content.startswith(limited.reasoning_content)
    assert limited.content
    assert limited.usage.completion_tokens_details.reasoning_tokens == LIMIT + num_closing_tokens(engine)


async def test_a_form_and_a_call_come_behind_the_thinking(client: AsyncOpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": CITY | {"additionalProperties": False}}}
    formed = await ask(client, max_thinking_tokens=LIMIT, response_format=form)
    assert formed.message.reasoning_content
    assert json.loads(formed.message.content) == {"city": "Rome"}
    forced = await ask(client, max_thinking_tokens=LIMIT, **CALLING)
    assert forced.finish_reason == "tool_calls"
    assert json.loads(forced.message.tool_calls[0].function.arguments) == {"city": "Rome"}
    assert forced.message.reasoning_content


async def test_the_usage_says_what_it_costs_that_a_template_drops_thinking(client: AsyncOpenAI) -> None:
    first = await ask(client, max_thinking_tokens=LIMIT, session_id="s")
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": first.message.content},
        {"role": "user", "content": "more"},
    ]
    second = await client.chat.completions.create(**{**ASKED, "messages": messages}, extra_body={"session_id": "s"})
    told = second.usage.model_dump()["prompt_tokens_details"]
    assert list(told["recomputed"]) == ["template_dropped"]
    assert 0 < told["recomputed"]["template_dropped"] <= first.message.usage.completion_tokens
    third = await client.chat.completions.create(**{**ASKED, "messages": messages}, extra_body={"session_id": "t"})
    assert "recomputed" not in third.usage.model_dump()["prompt_tokens_details"]


async def test_another_replica_goes_on_within_the_thinking(engine: EngineHere) -> None:
    asked = ASKED | {"max_thinking_tokens": LIMIT, "stream": True}
    body = parse_request(ChatCompletionBody, json.dumps(asked).encode())[0]
    request = body.generation_request(body.prompt_value(), request_id="r", session_id="s", tenant=TENANT)
    deltas = [delta async for delta in engine._engine.generate(request)]
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    most = LIMIT + num_closing_tokens(engine)
    for num_there in (1, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 5):
        beginning = AnswerBeginning(tuple(token_ids[:num_there]), 0)
        resumed = replace(request, request_id=f"r{num_there}", beginning=beginning)
        rest = [delta async for delta in engine._engine.generate(resumed)]
        assert [token_id for delta in rest for token_id in delta.token_ids] == token_ids[num_there:]
        assert all(delta.num_reasoning_tokens == min(delta.num_output_tokens, most) for delta in (*deltas, *rest))
