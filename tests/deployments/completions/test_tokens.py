"""/tokenize and /detokenize over the embedded model: the tokens are those that the other endpoints compute."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from deployments.ingress import IngressConfig, create_app
from engine.config import EngineConfig
from tests.deployments.engine_here import EngineHere

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "pensieve-recall-0.6m"
OPTIONS = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "max_model_len": 4096}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "gr\u00fcn"}]},
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
LONG = "a long text " * 600  # which a thread tokenises


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    engine = EngineHere(EngineConfig.from_options(OPTIONS), stream_interval_s=0.0)
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'conversations.db'}"
    transport = httpx.ASGITransport(create_app(engine, IngressConfig(store_url=url), ingress_id="ingress-1"))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await engine.__del__()


async def tokenize(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def detokenize(client: httpx.AsyncClient, tokens: list[int]) -> str:
    response = await client.post("/detokenize", json={"model": MODEL, "tokens": tokens})
    assert response.status_code == 200, response.text
    return str(response.json()["prompt"])


@pytest.mark.parametrize("prompt", ["It is gr\u00fcn.", "\U0001f98a", LONG])
async def test_a_text(client: httpx.AsyncClient, prompt: str) -> None:
    found = await tokenize(client, prompt=prompt, model=MODEL)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "return_token_ids": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert found["tokens"] == answer["choices"][0]["prompt_token_ids"]
    assert found["count"] == len(found["tokens"]) == answer["usage"]["prompt_tokens"]
    assert found["max_model_len"] == OPTIONS["max_model_len"]
    assert found["token_strs"] is None
    bare = await tokenize(client, prompt=prompt, add_special_tokens=False, return_token_strs=True)
    assert await detokenize(client, bare["tokens"]) == prompt
    assert len(bare["token_strs"]) == bare["count"] <= found["count"]
    assert all(bare["token_strs"])


CONTINUED = [*MESSAGES, {"role": "assistant", "content": "a meadow"}]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tools": [TOOL]},
        {"add_generation_prompt": False},
        {"messages": CONTINUED, "continue_final_message": True},
    ],
)
async def test_a_chat(client: httpx.AsyncClient, more: dict[str, Any]) -> None:
    more = {"messages": MESSAGES} | more
    found = await tokenize(client, chat_template_kwargs={"enable_thinking": False}, **more)
    body = {"model": MODEL, "max_tokens": 1, "return_token_ids": True, **more}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert found["tokens"] == answer["prompt_token_ids"]
    assert "gr\u00fcn" in await detokenize(client, found["tokens"])


async def test_no_tokens_are_an_empty_text(client: httpx.AsyncClient) -> None:
    assert await detokenize(client, []) == ""


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("tokenize", {}, 400, "prompt"),
        ("tokenize", {"prompt": ""}, 400, "prompt"),
        ("tokenize", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("tokenize", {"messages": MESSAGES, "tools": [TOOL, TOOL]}, 400, "tools"),
        ("tokenize", {"messages": MESSAGES, "chat_template_kwargs": {"tools": 1}}, 400, "chat_template_kwargs.tools"),
        ("tokenize", {"prompt": "a", "continue_final_message": True}, 400, "continue_final_message"),
        ("tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message"),
        ("tokenize", {"prompt": "a", "model": "another"}, 404, "model"),
        ("tokenize", {"prompt": LONG * 20}, 400, "prompt"),
        ("tokenize", {"messages": [{"role": "user", "content": LONG * 20}]}, 400, "messages"),
        ("detokenize", {}, 400, "tokens"),
        ("detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("detokenize", {"tokens": [10**9]}, 400, "tokens"),
        ("detokenize", {"tokens": [5] * 5000}, 400, "tokens"),
        ("detokenize", {"tokens": [5], "model": "another"}, 404, "model"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = await client.post(f"/{path}", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
