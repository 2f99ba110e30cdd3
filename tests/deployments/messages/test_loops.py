"""The Messages API through an engine: loops of calls, what is cached of them, stop sequences, and Anthropic's client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
HELLO = {"role": "user", "content": "My cat is called Mia."}
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"name": name, "description": "d", "input_schema": PLACE} for name in ("weather", "time")]
OPTIONS: dict[str, Any] = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "max_model_len": 2048}

CHOICE = {"type": "any", "disable_parallel_tool_use": True}
CHUNK_SIZE = 32  # the last chunk of a prompt goes on with its answer


async def serving(mode: str, folder: Path) -> AsyncIterator[FastAPI]:
    here = EngineHere(EngineConfig.from_options(OPTIONS | {"mode": mode}), stream_interval_s=0.0)
    app = create_app(here, IngressConfig(store_url=f"sqlite:///{folder / 'c.db'}"), ingress_id="ingress-1")
    async with app.router.lifespan_context(app):
        yield app
    await here.check_integrity()
    await here.__del__()


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[FastAPI]:
    async for app in serving("pensieve", tmp_path):
        yield app


class Client:
    """Asks one application in one session."""

    def __init__(self, app: FastAPI, session: str) -> None:
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None)
        self._headers = {"x-claude-code-session-id": session}

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = await self._client.post(path, json={"model": MODEL} | body, headers=self._headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def ask(self, **body: Any) -> Any:
        return await self.post("/v1/messages", {"max_tokens": 200, "temperature": 0} | body)

    async def count(self, **body: Any) -> int:
        return int((await self.post("/v1/messages/count_tokens", body))["input_tokens"])


def num_prompt_tokens(usage: dict[str, int]) -> int:
    return usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]


def sent_back(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a client does that keeps calls as objects: with their keys in another order."""
    return [
        block | {"input": dict(sorted(block["input"].items(), reverse=True))} if block["type"] == "tool_use" else block
        for block in content
    ]


async def loop_of_calls(client: Client) -> list[Any]:
    """Four turns, each of which has to call something; (calls, usage, tokens as counted before)."""
    messages: list[Any] = [HELLO]
    told: list[Any] = []
    for turn in range(4):
        choice = ({"type": "any"}, {"type": "tool", "name": "time"})[turn % 2]
        asked = {
            "system": [
                {"type": "text", "text": f"x-anthropic-billing-header: cch={turn};"},
                {"type": "text", "text": "hi"},
            ],
            "messages": messages,
            "tools": TOOLS,
            "tool_choice": choice | {"disable_parallel_tool_use": True},
        }
        counted = await client.count(**asked)
        message = await client.ask(**asked)
        assert message["stop_reason"] == "tool_use"
        (call,) = message["content"]
        assert call["input"]["city"] in ("Rome", "Paris")
        assert list(call["input"]) == ["city", "days"]
        assert call["name"] == "time" or turn % 2 == 0
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": f"result {turn}", "is_error": turn == 2}
        messages = [
            *messages,
            {"role": "assistant", "content": sent_back(message["content"])},
            {"role": "user", "content": [result]},
        ]
        told.append(((call["name"], call["input"]), message["usage"], counted))
    return told


async def test_a_loop_of_calls_computes_only_what_is_new(app: FastAPI, tmp_path: Path) -> None:
    told = await loop_of_calls(Client(app, "loop"))
    for (_, before, _), (_, usage, _) in pairwise(told):
        # The last token of the answer was never computed.
        assert usage["cache_read_input_tokens"] >= num_prompt_tokens(before) + before["output_tokens"] - 1
    assert [num_prompt_tokens(usage) for _, usage, _ in told] == [counted for *_, counted in told]
    async for stateless in serving("stateless", tmp_path):
        computed = await loop_of_calls(Client(stateless, "loop"))
    assert [calls for calls, *_ in computed] == [calls for calls, *_ in told]
    assert {usage["cache_read_input_tokens"] for _, usage, _ in computed} == {0}


async def test_the_line_about_billing_does_not_break_the_cache(app: FastAPI) -> None:
    client = Client(app, "billing")
    mark = {"cache_control": {"type": "ephemeral"}}
    usages = []
    for number in range(2):
        system = f"x-anthropic-billing-header: cc_version=2.1.295; cch={number};\nYou know cats. " + "Be brief. " * 20
        usages.append((await client.ask(system=system, messages=[HELLO], **mark))["usage"])
    first, second = usages
    written = first["cache_creation"]["ephemeral_5m_input_tokens"]
    assert written == first["cache_creation_input_tokens"] == num_prompt_tokens(first) > 32
    assert second["cache_read_input_tokens"] >= num_prompt_tokens(first) - CHUNK_SIZE


async def test_a_stop_sequence_is_told(app: FastAPI) -> None:
    client = Client(app, "stop")
    (whole,) = (await client.ask(messages=[HELLO]))["content"]
    words = whole["text"].split(" ")
    message = await client.ask(messages=[HELLO], stop_sequences=["never", f" {words[2]}"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", f" {words[2]}")
    assert message["content"] == [{"type": "text", "text": " ".join(words[:2])}]


async def test_answers_end_with_the_window(app: FastAPI) -> None:
    client = Client(app, "window")
    one, two = [await client.count(messages=[HELLO] * num) for num in (1, 2)]
    messages = [HELLO] * (1 + (OPTIONS["max_model_len"] - 20 - one) // (two - one))
    message = await client.ask(messages=messages, max_tokens=32_000, ignore_eos=True)
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert num_prompt_tokens(message["usage"]) + message["usage"]["output_tokens"] == OPTIONS["max_model_len"]


async def test_a_prompt_can_be_cached_ahead(app: FastAPI) -> None:
    client = Client(app, "ahead")
    long = HELLO | {"content": "My cat is called Mia. " * 20}
    warmed = await client.ask(messages=[long], max_tokens=0)
    assert (warmed["content"], warmed["stop_reason"]) == ([], "max_tokens")
    usage = (await client.ask(messages=[long]))["usage"]
    assert usage["cache_read_input_tokens"] >= num_prompt_tokens(usage) - CHUNK_SIZE


async def test_anthropic_s_client(app: FastAPI) -> None:
    anthropic = pytest.importorskip("anthropic")
    httpx2 = pytest.importorskip("httpx2")
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost", timeout=None)
    client = anthropic.AsyncAnthropic(base_url="http://localhost", api_key="none", http_client=http, max_retries=0)
    options = {"model": MODEL, "max_tokens": 200, "messages": [HELLO]}
    greedy = {"extra_body": {"temperature": 0}}
    whole = await client.messages.create(**options, **greedy)
    assert "Mia" in whole.content[0].text
    async with client.messages.stream(**options, **greedy) as stream:
        said = "".join([text async for text in stream.text_stream])
        streamed = await stream.get_final_message()
    assert said == whole.content[0].text == streamed.content[0].text
    assert streamed.stop_reason == whole.stop_reason == "end_turn"
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    counted = await client.messages.count_tokens(model=MODEL, messages=[HELLO])
    assert counted.input_tokens == num_prompt_tokens(whole.usage.to_dict())
    async with client.messages.stream(**options, **greedy, tools=TOOLS, tool_choice=CHOICE) as stream:
        called = await stream.get_final_message()
    assert called.stop_reason == "tool_use"
    assert called.content[0].input["city"] in ("Rome", "Paris")
    back = {"role": "assistant", "content": called.content}
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"} for block in called.content]
    await client.messages.create(
        **options | {"messages": [HELLO, back, {"role": "user", "content": results}]}, **greedy
    )
    form = {"type": "json_schema", "schema": PLACE}
    formed = await client.messages.create(**options, **greedy, output_config={"format": form})
    assert json.loads(formed.content[0].text)["days"] in (1, 2)
    with pytest.raises(anthropic.NotFoundError) as caught:
        await client.messages.create(**options | {"model": "x"})
    assert caught.value.type == "not_found_error"
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        await client.messages.create(**options | {"messages": [HELLO | {"content": "x " * 9000}]})
