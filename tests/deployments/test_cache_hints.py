"""What clients say of the cache, as the clients of OpenAI and Anthropic send it, and what they are told of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI

from deployments.ingress import IngressConfig, create_app
from deployments.tenants import TenantConfig, hash_key
from engine.config import EngineConfig
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
CHUNK = 8
OPTIONS: dict[str, Any] = {
    "num_threads": 1,
    "dtype": "float32",
    "chunk_size": CHUNK,
    "num_gpu_blocks": 96,
    "num_cpu_blocks": 64,
    "max_model_len": 512,
    "kv_hints": "client",
}
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0}
KEYS = ("key-of-acme-0123456789", "key-of-zeta-0123456789")
FACT = "My cat is called Mia. It is a good cat. " * 3
ASK = [{"role": "user", "content": FACT}]


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[FastAPI]:
    here = EngineHere(EngineConfig.from_options(OPTIONS), stream_interval_s=0.0)
    tenants = tuple(
        TenantConfig(id=name, api_keys_sha256=(hash_key(key),))
        for name, key in zip(("acme", "zeta"), KEYS, strict=True)
    )
    config = IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}", tenants=tenants)
    application = create_app(here, config, ingress_id="ingress-1")
    async with application.router.lifespan_context(application):
        yield application
    await here.check_integrity()
    await here.__del__()


def openai_client(app: FastAPI, key: str = KEYS[0]) -> AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=None)
    return AsyncOpenAI(base_url="http://localhost/v1", api_key=key, http_client=http, max_retries=0)


def anthropic_client(app: FastAPI, key: str = KEYS[0]) -> Any:
    anthropic, httpx2 = pytest.importorskip("anthropic"), pytest.importorskip("httpx2")
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost", timeout=None)
    return anthropic.AsyncAnthropic(base_url="http://localhost", api_key=key, http_client=http, max_retries=0)


def web(app: FastAPI, key: str = KEYS[0]) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://localhost/v1",
        headers={"authorization": f"Bearer {key}"},
        timeout=None,
    )


async def test_options_and_breakpoints_of_openai(app: FastAPI) -> None:
    client = openai_client(app)
    parts = [
        {"type": "text", "text": FACT, "prompt_cache_breakpoint": {"mode": "explicit"}},
        {"type": "text", "text": "What is its name?"},
    ]
    answer = await client.chat.completions.create(
        messages=[{"role": "user", "content": parts}],
        max_tokens=4,
        prompt_cache_key="chat",
        prompt_cache_options={"mode": "explicit", "ttl": "30m"},
        **GREEDY,
    )
    told = answer.model_extra["prompt_cache_hint"]
    assert told["outcome"] == "accepted", told
    details = answer.usage.prompt_tokens_details
    assert 0 < details.cache_write_tokens < answer.usage.prompt_tokens
    assert details.model_extra["cache_write_tokens_details"] == {
        "ttl_30m_tokens": details.cache_write_tokens,
        "ttl_12h_tokens": 0,
    }
    # What is kept are whole chunks that have a token in front of the breakpoint.
    assert abs(told["kept_tokens"] - details.cache_write_tokens) < CHUNK
    state = (await web(app).get("conversations/chat/cache")).json()
    assert state["cached_tokens"] >= told["kept_tokens"]


async def test_a_plain_request_is_told_nothing_of_hints(app: FastAPI) -> None:
    answer = await openai_client(app).chat.completions.create(messages=ASK, max_tokens=2, **GREEDY)
    assert "prompt_cache_hint" not in answer.model_extra
    assert "prompt_cache_diagnostics" not in answer.model_extra
    assert answer.usage.prompt_tokens_details.cache_write_tokens == answer.usage.prompt_tokens


async def test_a_stream_tells_what_came_of_a_hint(app: FastAPI) -> None:
    stream = await openai_client(app).chat.completions.create(
        messages=ASK, max_tokens=2, stream=True, prompt_cache_options={"ttl": "30m"}, **GREEDY
    )
    told = [chunk.model_extra for chunk in [chunk async for chunk in stream] if chunk.model_extra]
    assert [extra["prompt_cache_hint"]["outcome"] for extra in told if "prompt_cache_hint" in extra] == ["accepted"]


async def test_prewarming_generates_nothing_and_what_follows_is_cached(app: FastAPI) -> None:
    client = openai_client(app)
    options: dict[str, Any] = {"input": ASK, **GREEDY}
    warmed = await client.responses.create(prompt_cache_options={"prewarm": True, "ttl": "12h"}, **options)
    assert (warmed.status, warmed.output, warmed.usage.output_tokens) == ("completed", [], 0)
    assert warmed.usage.input_tokens_details.cache_write_tokens == warmed.usage.input_tokens
    assert warmed.usage.input_tokens_details.cache_write_tokens_details.ttl_12h_tokens == warmed.usage.input_tokens
    assert warmed.prompt_cache_options.to_dict() == {"mode": "implicit", "ttl": "12h"}
    assert warmed.model_extra["prompt_cache_hint"]["outcome"] == "accepted"
    answer = await client.responses.create(max_output_tokens=4, **options, extra_headers={"x-session-id": warmed.id})
    assert answer.usage.input_tokens_details.cached_tokens >= warmed.usage.input_tokens - 1
    followed = await client.responses.create(
        input="And?", previous_response_id=warmed.id, max_output_tokens=4, **GREEDY
    )
    assert followed.usage.input_tokens_details.cached_tokens > CHUNK


async def test_prewarming_chats_completions_and_messages(app: FastAPI) -> None:
    client = openai_client(app)
    more: dict[str, Any] = {"extra_body": {"prompt_cache_options": {"prewarm": True}}}
    chat = await client.chat.completions.create(messages=ASK, **GREEDY, **more)
    (choice,) = chat.choices
    assert (choice.message.content, choice.finish_reason, chat.usage.completion_tokens) == ("", "stop", 0)
    text = await client.completions.create(prompt=FACT, **GREEDY, **more)
    assert (text.choices[0].text, text.usage.completion_tokens) == ("", 0)
    again = await client.completions.create(prompt=FACT, max_tokens=1, **GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens >= text.usage.prompt_tokens - 1
    message = await anthropic_client(app).messages.create(model=MODEL, max_tokens=0, messages=ASK)
    assert (message.content, message.usage.output_tokens, message.stop_reason) == ([], 0, "max_tokens")
    assert message.usage.cache_read_input_tokens >= chat.usage.prompt_tokens - 1


async def test_why_a_prompt_was_not_cached(app: FastAPI) -> None:
    client = openai_client(app)
    first = await client.responses.create(input=ASK, max_output_tokens=4, prompt_cache_key="why", **GREEDY)

    async def compared(new: Any, with_id: str = first.id, client: AsyncOpenAI = client) -> Any:
        answer = await client.responses.create(
            input=new,
            max_output_tokens=4,
            prompt_cache_key="why",
            prompt_cache_options={"comparison_response_id": with_id},
            **GREEDY,
        )
        assert answer.prompt_cache_options.comparison_response_id == with_id
        return answer.prompt_cache_diagnostics

    assert (await compared(ASK)).type == "cache_hit"
    changed = await compared([{"role": "user", "content": FACT.replace("good", "bad", 1)}])
    assert (changed.type, changed.reason) == ("cache_miss", "input_changed")
    difference = changed.model_extra["first_difference"]
    assert (difference["message"], difference["role"]) == (0, "user")
    assert difference["token"] == changed.comparison_reusable_tokens > CHUNK
    assert difference["before"].startswith((" good", "good", " g", "g"))
    assert (await compared(ASK, "resp_unknown")).type == "comparison_response_not_found"
    # Of another tenant nothing is told, not even that it is there.
    assert (await compared(ASK, client=openai_client(app, KEYS[1]))).type == "comparison_response_not_found"


async def test_why_something_was_evicted(app: FastAPI) -> None:
    client = openai_client(app)
    first = await client.chat.completions.create(messages=ASK, max_tokens=2, **GREEDY)
    for number in range(14):
        await client.chat.completions.create(
            messages=[{"role": "user", "content": f"{number} is a number. " * 10}], max_tokens=2, **GREEDY
        )
    answer = await client.chat.completions.create(
        messages=ASK,
        max_tokens=2,
        extra_body={"prompt_cache_options": {"comparison_response_id": first.id}},
        **GREEDY,
    )
    told = answer.model_extra["prompt_cache_diagnostics"]
    assert (told["type"], told["reason"]) == ("cache_miss", "evicted"), told
    assert "first_difference" not in told
    assert {lost["reason"] for lost in told["lost"]} <= {"gpu_dropped", "cpu_dropped", "cpu_evicted"}, told
    assert min(lost["ago_s"] for lost in told["lost"]) > 0
    assert sum(lost["tokens"] for lost in told["lost"]) == told["cache_missed_tokens"]


async def test_marks_and_diagnostics_of_anthropic(app: FastAPI) -> None:
    client = anthropic_client(app)
    system = [
        {"type": "text", "text": "You know cats. " * 8, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"type": "text", "text": "Today is Monday."},
    ]
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 4}
    first = await client.messages.create(
        system=system, messages=ASK, cache_control={"type": "ephemeral"}, diagnostics={}, **options
    )
    usage = first.usage
    assert usage.cache_creation_input_tokens > 0
    assert usage.input_tokens == 0
    hour, minutes = usage.cache_creation.ephemeral_1h_input_tokens, usage.cache_creation.ephemeral_5m_input_tokens
    assert hour > CHUNK
    assert minutes > CHUNK
    assert hour + minutes == usage.cache_creation_input_tokens
    assert usage.model_extra["prompt_cache_hint"]["outcome"] == "accepted"
    system[1]["text"] = "Today is Tuesday."
    second = await client.messages.create(
        system=system, messages=ASK, diagnostics={"previous_message_id": first.id}, **options
    )
    assert second.usage.cache_read_input_tokens >= hour // CHUNK * CHUNK
    assert second.diagnostics.cache_miss_reason.type == "system_changed"
    assert second.diagnostics.cache_miss_reason.cache_missed_input_tokens > 0
    async with client.messages.stream(
        system=system, messages=ASK, diagnostics={"previous_message_id": "msg_unknown"}, **options
    ) as stream:
        streamed = await stream.get_final_message()
    assert streamed.diagnostics.cache_miss_reason.type == "previous_message_not_found"


async def test_a_part_that_is_not_worth_keeping(app: FastAPI) -> None:
    messages = [
        {"role": "user", "content": "Look it up."},
        {"role": "user", "content": [{"type": "text", "text": "A table. " * 12, "cache_control": {"type": "skip"}}]},
        {"role": "user", "content": "What is in it?"},
    ]
    answer = await openai_client(app).chat.completions.create(
        messages=messages, max_tokens=2, prompt_cache_options={"ttl": "30m"}, **GREEDY
    )
    details, told = answer.usage.prompt_tokens_details, answer.model_extra["prompt_cache_hint"]
    assert told["outcome"] == "accepted"
    assert details.cache_write_tokens < answer.usage.prompt_tokens - 2 * CHUNK
    assert 0 < told["kept_tokens"] < answer.usage.prompt_tokens - CHUNK


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"ttl": "2h"}, "prompt_cache_options.ttl"),
        ({"mode": "none"}, "prompt_cache_options.mode"),
        ({"prewarm": "yes"}, "prompt_cache_options.prewarm"),
    ],
)
async def test_a_bad_value_is_refused_by_name(app: FastAPI, options: dict[str, Any], param: str) -> None:
    for path, prompt in (("chat/completions", {"messages": ASK}), ("responses", {"input": ASK})):
        answer = await web(app).post(path, json={"model": MODEL, "prompt_cache_options": options, **prompt})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_an_unknown_option_is_told(app: FastAPI) -> None:
    body = {"model": MODEL, "messages": ASK, "max_tokens": 1, "prompt_cache_options": {"tier": "gold"}}
    answer = await web(app).post("chat/completions", json=body)
    assert answer.headers["x-pensieve-ignored"] == "prompt_cache_options.tier"


async def test_the_older_word_for_a_time(app: FastAPI) -> None:
    answer = await openai_client(app).responses.create(
        input=ASK, max_output_tokens=2, prompt_cache_retention="24h", **GREEDY
    )
    assert answer.prompt_cache_retention == "24h"
    assert answer.model_extra["prompt_cache_hint"]["outcome"] == "accepted"
    assert answer.usage.input_tokens_details.cache_write_tokens_details.ttl_12h_tokens > 0


async def test_a_conversations_cache_is_seen_and_hinted_at(app: FastAPI) -> None:
    client, own, other = openai_client(app), web(app), web(app, KEYS[1])
    conversation = await client.conversations.create()
    path = f"conversations/{conversation.id}/cache"
    empty = (await own.get(path)).json()
    assert (empty["tokens"], empty["cached_tokens"], empty["hint"]) == (0, 0, None)
    answer = await client.responses.create(input=ASK, conversation=conversation.id, max_output_tokens=4, **GREEDY)
    state = (await own.get(path)).json()
    assert state["object"] == "conversation.cache"
    assert state["cached_tokens_by_tier"] == {"gpu": state["cached_tokens"]}
    assert state["cached_tokens"] >= answer.usage.input_tokens
    hinted = (await own.patch(path, json={"ttl_s": 600, "priority": 90, "expected_return_s": 30})).json()
    assert hinted["prompt_cache_hint"]["outcome"] == "accepted"
    assert hinted["prompt_cache_hint"]["kept_tokens"] > 0
    assert hinted["hint"] == {"priority": 90, "ttl_s": 600.0, "expected_return_s": 30.0}
    released = (await own.patch(path, json={"release": True})).json()
    assert released["prompt_cache_hint"]["outcome"] == "accepted"
    assert released["prompt_cache_hint"]["kept_tokens"] == 0
    for asked in (other.get(path), other.patch(path, json={"release": True})):
        assert (await asked).status_code == 404
    session = "my own session, named by the client"
    await client.chat.completions.create(messages=ASK, max_tokens=2, extra_headers={"x-session-id": session}, **GREEDY)
    assert (await own.get(f"conversations/{session}/cache")).json()["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"release": False}, None),
        ({"release": True, "ttl_s": 5}, "release"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"priority": 101}, "priority"),
        ({"expected_return_s": -1}, "expected_return_s"),
    ],
)
async def test_a_hint_that_says_nothing_or_too_much_is_refused(
    app: FastAPI, body: dict[str, Any], param: str | None
) -> None:
    answer = await web(app).patch("conversations/some/cache", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
