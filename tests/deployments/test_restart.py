"""Everything is stopped in the middle of traffic and started again.

Conversations go on with the answers of an undisturbed run, and turns that were under way are marked as interrupted and
nowhere else to be seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from openai import AsyncOpenAI
from ray import serve

from deployments.app import build
from deployments.responses.store_upkeep import LEASE_S
from deployments.schema import AppArgs
from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.deployments.local_ray import LocalServe, free_port, start_ray
from tests.nightly import nightly

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_CONVERSATIONS = 6
TURNS = ("my cat is called Mia", "i live in Rome", "what is my cat called?", "where do i live?")
STOPPED_TURN = 2
# An answer goes on after its end-of-sequence token was barred, with tokens that no tokenizer would make of its text.
OPTIONS: dict[str, Any] = {"model": EMBEDDED_MODEL_NAME, "temperature": 0, "max_output_tokens": 40}


@contextmanager
def served(store_url: str, *, drains: bool = False, **engine: Any) -> Iterator[str]:
    """drains: all replicas are told that they are about to end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        port = free_port()
        args = AppArgs(
            engine={"model": "embedded", "dtype": "float32", "num_threads": 1, "num_gpu_blocks": 256, **engine},
            num_replicas=2,
            num_cpus=0.5,
            num_ingress_replicas=2,
            ingress_num_cpus=0.25,
            store_url=store_url,
        )
        start_ray()
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build(args), name="restart", route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            if drains:
                serve.shutdown()
            ray.shutdown()


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


async def turn(client: AsyncOpenAI, number: int, index: int, before: Any, conversation: str | None) -> Any:
    """One turn of conversation `number`: by conversation, or by previous response; streaming or not."""
    context: dict[str, Any] = {}
    if conversation is not None:
        context["conversation"] = conversation
    elif before is not None:
        context["previous_response_id"] = before.id
    sampling = {"temperature": 1.5, "extra_body": {"seed": number, "min_tokens": 30}} if number % 3 == 0 else {}
    options: dict[str, Any] = OPTIONS | context | sampling
    if number % 2:
        return await client.responses.create(input=TURNS[index], **options)
    events = [event async for event in await client.responses.create(input=TURNS[index], stream=True, **options)]
    return events[-1].response  # completed, or incomplete


async def hold(client: AsyncOpenAI, number: int, turns: range, before: Any, conversation: str | None) -> list[Any]:
    responses = [before]
    for index in turns:
        responses.append(await turn(client, number, index, responses[-1], conversation))
    return responses[1:]


async def conversation_of(client: AsyncOpenAI, number: int) -> str | None:
    return (await client.conversations.create()).id if number % 2 else None


async def begin_endless(url: str, before: Any, conversation: str | None) -> str:
    """Begin a turn that will not end by itself; the id of its response."""
    context = {"previous_response_id": before.id} if conversation is None else {"conversation": conversation}
    body = {**OPTIONS, **context, "input": TURNS[STOPPED_TURN], "stream": True, "max_output_tokens": 3000}
    http = httpx.AsyncClient(timeout=60)  # left open: it is the server that goes
    request = http.build_request("POST", f"{url}/v1/responses", json=body | {"ignore_eos": True})
    response = await http.send(request, stream=True)
    assert response.status_code == 200
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            return str(line.partition('"id":"')[2].partition('"')[0])
    raise AssertionError("no event")


@nightly  # that a store survives is tested over both without a cluster
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
async def test_conversations_go_on_after_everything_was_stopped(local_serve: LocalServe, store_url: str) -> None:
    local_serve.stop()
    numbers = range(NUM_CONVERSATIONS)
    with served(store_url) as url:
        client = client_of(url)
        conversations = [await conversation_of(client, number) for number in numbers]
        calm = await asyncio.gather(*(hold(client, n, range(len(TURNS)), None, conversations[n]) for n in numbers))
        conversations = [await conversation_of(client, number) for number in numbers]
        begun = await asyncio.gather(*(hold(client, n, range(STOPPED_TURN), None, conversations[n]) for n in numbers))
        stopped = await asyncio.gather(*(begin_endless(url, begun[n][-1], conversations[n]) for n in numbers))

    with served(store_url) as url:
        client = client_of(url)

        async def is_marked(response_id: str) -> bool:
            response = await client.responses.retrieve(response_id)
            assert response.status in ("in_progress", "incomplete")
            return response.status == "incomplete"

        async with asyncio.timeout(3 * LEASE_S):
            for response_id in stopped:
                while not await is_marked(response_id):
                    await asyncio.sleep(0.5)
        for response_id in stopped:
            response = await client.responses.retrieve(response_id)
            assert (response.output, response.error is not None) == ([], True)
            with pytest.raises(openai.BadRequestError):
                await client.responses.create(input="go on", previous_response_id=response_id, **OPTIONS)
        rest = await asyncio.gather(
            *(hold(client, n, range(STOPPED_TURN, len(TURNS)), begun[n][-1], conversations[n]) for n in numbers)
        )
        for number in numbers:
            told = [response.output_text for response in (*begun[number], *rest[number])]
            assert told == [response.output_text for response in calm[number]]
            usage = [response.usage.input_tokens for response in (*begun[number], *rest[number])]
            assert usage == [response.usage.input_tokens for response in calm[number]]
            if (conversation := conversations[number]) is not None:
                items = [item async for item in client.conversations.items.list(conversation, limit=100)]
                assert len(items) == 2 * len(TURNS)


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_conversations_come_back_with_their_kv(local_serve: LocalServe, store_url: str, tmp_path: Path) -> None:
    """From the disk, to the replicas that had them: chats of named sessions, and responses."""
    local_serve.stop()
    options = {"drains": True, "num_cpu_blocks": 256, "kv_disk_path": str(tmp_path / "kv"), "kv_disk_size": 0.05}
    sessions: dict[str, list[dict[str, str]]] = {f"session {n}": [] for n in range(NUM_CONVERSATIONS)}

    async def chat(client: AsyncOpenAI, name: str, index: int) -> Any:
        sessions[name].append({"role": "user", "content": TURNS[index]})
        answer = await client.chat.completions.create(
            model=EMBEDDED_MODEL_NAME,
            messages=sessions[name],  # type: ignore[arg-type]
            max_tokens=20,
            temperature=1.5,
            seed=index,
            extra_body={"min_tokens": 15, "session_id": name},
        )
        sessions[name].append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        return answer.usage

    async def respond(client: AsyncOpenAI, number: int, index: int, before: Any) -> Any:
        return await turn(client, number, index, before, None)

    numbers = range(NUM_CONVERSATIONS)
    with served(store_url, **options) as url:
        client = client_of(url)
        for index in range(2):
            usages = await asyncio.gather(*(chat(client, name, index) for name in sessions))
        responses = await asyncio.gather(*(respond(client, number, 0, None) for number in numbers))
    folders = sorted(folder.name.rpartition("-")[2] for folder in (tmp_path / "kv").iterdir())
    assert folders == ["0", "1"], "one for each rank"
    with served(store_url, **options) as url:
        client = client_of(url)
        after = await asyncio.gather(*(chat(client, name, 2) for name in sessions))
        known = [usage.prompt_tokens + usage.completion_tokens - 1 for usage in usages]
        cached = [usage.prompt_tokens_details.cached_tokens for usage in after]
        goes_on = await asyncio.gather(*(respond(client, number, 2, responses[number]) for number in numbers))
        known += [response.usage.total_tokens - 1 for response in responses]
        cached += [response.usage.input_tokens_details.cached_tokens for response in goes_on]
    # Nearly all of it; but a machine that is very busy may find that computing is as fast as its disk.
    assert sum(cached) >= 0.5 * sum(known), (cached, known)
