"""Several answers in one request, and several prompts: when they start, what is told of them, and that each is its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from deployments.completions.answers import ChatFormat
from deployments.completions.choices import generate_choices
from deployments.completions.choices_body import MAX_N
from deployments.completions.requests import ChatCompletionBody
from deployments.errors import ReplicaLostError
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.http.gate import MAX_RUNNING_CHOICES
from deployments.ingress import IngressConfig, create_app
from deployments.tenants import TenantConfig, hash_key
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.text.output import OutputDelta
from engine.text.prompt import TextPrompt
from tests.deployments.engine_here import EngineHere

MODEL = "pensieve-recall-0.6m"
CAT = "My cat is called Mia. What is my cat called?"
DOG = "My dog is called Rex. What is my dog called?"


# -- when they start ---------------------------------------------------------------------------------------------------


class Scripted:
    """Says two deltas to each request, the second one when `go` is set. Notes what was asked, and how much ran at once."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.go = asyncio.Event()
        self.num_running = self.most_running = self.num_aborted = 0
        self.failing = ""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        self.requests.append(request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            if request.request_id == self.failing:
                yield ErrorItem.of(ReplicaLostError("lost"))
                return
            yield DeltaItem(OutputDelta(request.request_id, (1,)), 0)
            await self.go.wait()
            yield DeltaItem(OutputDelta("", (2,), finish_reason="stop"), 0)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_aborted += 1
            raise
        finally:
            self.num_running -= 1


def requests(num_prompts: int, n: int, **sampling: Any) -> list[GenerationRequest]:
    params = SamplingParams(**sampling)
    return [
        GenerationRequest(f"r.{number * n}", "s", TextPrompt("x"), params, stream=False)
        for number in range(num_prompts)
    ]


def choices(engine: Scripted, num_prompts: int, n: int, *, max_running: int = 16, places: float = 99, **sampling: Any):
    return generate_choices(
        requests(num_prompts, n, **sampling),
        n,
        engine.generate,
        max_running=max_running,
        num_places=lambda: places - engine.num_running,
    )


async def test_forks_start_when_the_first_answer_has_begun() -> None:
    engine = Scripted()
    items = choices(engine, 1, 4, seed=7)
    first = await anext(items)
    assert first.choice == 0
    assert [request.request_id for request in engine.requests] == ["r.0"]
    assert engine.requests[0].stream  # or it would say too late that the prompt is computed
    others = [await anext(items) for _ in range(3)]
    assert [item.choice for item in others] == [1, 2, 3]
    assert [request.request_id for request in engine.requests[1:]] == ["r.0.1", "r.0.2", "r.0.3"]
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 9, 10]
    assert not any(request.stream for request in engine.requests[1:])
    engine.go.set()
    rest = [item async for item in items]
    assert sorted(item.choice for item in rest) == [0, 1, 2, 3]
    assert (engine.num_running, engine.num_aborted) == (0, 0)


async def test_each_choice_is_in_a_context_of_its_own() -> None:
    """Ray Serve's router takes concurrent calls within one request context for the same call, and loses one."""
    request_context: ContextVar[str] = ContextVar("request_context")
    request_context.set("of the request")
    seen = []

    class Noting(Scripted):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
            seen.append(request_context.get("none"))
            async for item in super().generate(request):
                yield item

    engine = Noting()
    engine.go.set()
    assert len([item async for item in choices(engine, 2, 2)]) == 8
    assert seen == ["none"] * 4


async def test_seeds_stay_64_bit_integers_and_those_that_are_not_given_are_left_to_the_engine() -> None:
    for seed, expected in ((2**63 - 1, -(2**63)), (None, None)):
        engine = Scripted()
        engine.go.set()
        assert len([item async for item in choices(engine, 1, 2, seed=seed)]) == 4
        assert engine.requests[1].sampling.seed == expected


async def test_prompts_start_at_once_and_each_answer_has_its_place() -> None:
    engine = Scripted()
    engine.go.set()
    said: dict[int, str] = {}
    async for choice, item in choices(engine, 3, 2):
        assert isinstance(item, DeltaItem)
        said[choice] = said.get(choice, "") + item.delta.text
    assert said == {0: "r.0", 1: "r.0.1", 2: "r.2", 3: "r.2.1", 4: "r.4", 5: "r.4.1"}


@pytest.mark.parametrize(("max_running", "places", "most"), [(3, 99, 3), (16, 2, 2), (16, 0, 1), (16, -5, 1)])
async def test_no_more_run_at_once_than_may(max_running: int, places: int, most: int) -> None:
    """A tenant whose places are all taken by others meanwhile still gets its answer, one choice after the other."""
    engine = Scripted()
    engine.go.set()
    items = [item async for item in choices(engine, 5, 2, max_running=max_running, places=places)]
    assert len(items) == 20
    assert engine.most_running == most


@pytest.mark.parametrize("failing", ["r.0", "r.0.2"])
async def test_the_failure_of_one_ends_all(failing: str) -> None:
    engine = Scripted()
    engine.failing = failing
    items = [item async for item in choices(engine, 1, 4)]
    assert isinstance(items[-1].item, ErrorItem)
    assert not any(isinstance(item.item, ErrorItem) for item in items[:-1])
    assert engine.num_running == 0
    assert engine.num_aborted == len(engine.requests) - 1


@pytest.mark.parametrize("num_taken", [0, 1, 2, 4])
async def test_leaving_ends_all(num_taken: int) -> None:
    engine = Scripted()
    items = choices(engine, 1, 4)
    for _ in range(num_taken):
        await anext(items)
    await items.aclose()
    assert engine.num_running == 0
    assert engine.num_aborted == len(engine.requests)


def test_calls_of_several_answers_have_different_ids() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 2}
    form = ChatFormat("id", 1, ChatCompletionBody.model_validate(body))
    assert form._call(0, 0, "f", "", "")["id"] != form._call(1, 0, "f", "", "")["id"]


# -- with an engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def engine() -> AsyncIterator[EngineHere]:
    options = {"num_threads": 1, "dtype": "float32", "num_gpu_blocks": 256, "max_model_len": 1024, "chunk_size": 8}
    here = EngineHere(EngineConfig.from_options(options), stream_interval_s=0.0)
    yield here
    await here._engine.check_integrity()
    assert here._engine.get_statistics()["num_requests_running"] == 0
    await here.__del__()


@pytest.fixture
async def http(engine: EngineHere, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    tenants = (
        TenantConfig(id="a", api_keys_sha256=(hash_key("a"),)),
        TenantConfig(id="slow", api_keys_sha256=(hash_key("slow"),), max_concurrent_requests=1),
    )
    app = create_app(
        engine, IngressConfig(store_url=f"sqlite:///{tmp_path / 'c.db'}", tenants=tenants), ingress_id="ingress-1"
    )
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://localhost/v1/",
            timeout=None,
            headers={"authorization": "Bearer a"},
        ) as client,
    ):
        yield client


@pytest.fixture
def client(http: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(base_url="http://localhost/v1", api_key="a", http_client=http, max_retries=0)


def chat(*questions: str) -> list[Any]:
    return [{"role": "user", "content": question} for question in questions]


async def test_greedy_answers_are_equal_and_the_prompt_counts_once(client: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": chat(CAT), "temperature": 0, "max_tokens": 12}
    one = await client.chat.completions.create(**options)
    four = await client.chat.completions.create(**options, n=4)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert {choice.message.content for choice in four.choices} == {one.choices[0].message.content}
    assert four.usage.prompt_tokens == one.usage.prompt_tokens
    assert four.usage.completion_tokens == 4 * one.usage.completion_tokens


async def test_forks_compute_no_more_than_a_chunk_of_the_prompt(client: AsyncOpenAI, engine: EngineHere) -> None:
    """And their last token, which has no logits otherwise."""
    options: dict[str, Any] = {"model": MODEL, "messages": chat(CAT), "temperature": 0, "max_tokens": 4, "n": 5}
    usage = (await client.chat.completions.create(**options, extra_body={"ignore_eos": True})).usage
    num_computed = engine._engine.get_statistics()["num_computed_tokens"]
    partial = (usage.prompt_tokens - 1) % 8 + 1
    assert num_computed == usage.prompt_tokens + 4 * partial + 5 * 3  # the last token of an answer is not computed


async def test_seeds_differ_by_index(client: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": CAT, "temperature": 2.0, "max_tokens": 12}
    several = await client.completions.create(**options, n=3, seed=5)
    alone = [await client.completions.create(**options, seed=5 + index) for index in range(3)]
    assert [choice.text for choice in several.choices] == [completion.choices[0].text for completion in alone]
    assert len({choice.text for choice in several.choices}) == 3


async def test_streamed_choices_are_the_whole_ones(http: httpx.AsyncClient) -> None:
    """With token ids and log-probabilities, for prompts of words and of tokens."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": [CAT, DOG],
        "n": 3,
        "seed": 1,
        "max_tokens": 9,
        "logprobs": 2,
        "return_token_ids": True,
    }
    whole = (await http.post("completions", json=body)).json()
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    ids = [whole["choices"][index]["prompt_token_ids"] for index in (0, 3)]
    assert (await http.post("completions", json=body | {"prompt": ids})).json()["choices"] == whole["choices"]
    streamed = await http.post("completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    blocks = [block.removeprefix("data: ") for block in streamed.text.split("\n\n")]
    assert blocks[-2:] == ["[DONE]", ""]
    assert blocks.count("[DONE]") == 1
    *chunks, last = map(json.loads, blocks[:-2])
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens"):
        assert last["usage"][name] == whole["usage"][name]
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert order != sorted(order)  # as they come
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]


async def test_a_list_is_each_of_its_prompts(client: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    prompts = [f"{index} {CAT}" for index in range(MAX_RUNNING_CHOICES + 3)]
    together = await client.completions.create(prompt=prompts, **options)
    alone = [await client.completions.create(prompt=prompt, **options) for prompt in prompts]
    assert [choice.text for choice in together.choices] == [completion.choices[0].text for completion in alone]
    assert together.usage.prompt_tokens == sum(completion.usage.prompt_tokens for completion in alone)
    assert together.usage.completion_tokens == sum(completion.usage.completion_tokens for completion in alone)


async def test_choices_with_calls_and_forms(client: AsyncOpenAI) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}}}
    called = await client.chat.completions.create(
        model=MODEL,
        messages=chat(CAT),
        n=3,
        temperature=1.5,
        max_tokens=200,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
    )
    ids = [call.id for choice in called.choices for call in choice.message.tool_calls]
    assert len(ids) == len(set(ids)) >= 3
    formed = await client.chat.completions.create(
        model=MODEL, messages=chat(CAT), n=3, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert {choice.message.content for choice in formed.choices} <= {"yes", "no"}


async def test_one_prompt_that_cannot_be_ends_the_request(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": [[1, 2], [10**6]], "max_tokens": 400, "ignore_eos": True}
    response = await http.post("completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


async def test_a_tenant_with_one_place_gets_all_choices(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": [CAT, DOG], "n": MAX_N, "max_tokens": 3}
    response = await http.post("completions", json=body, headers={"authorization": "Bearer slow"})
    assert len(response.json()["choices"]) == 2 * MAX_N


async def test_logit_bias_forces_and_forbids(http: httpx.AsyncClient) -> None:
    """Also under a form, which it does not break, and for greedy answers."""
    body = {"model": MODEL, "messages": chat(CAT), "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    path = "chat/completions"
    plain = (await http.post(path, json=body)).json()["choices"][0]["token_ids"]
    other = (await http.post(path, json=body | {"logit_bias": {str(plain[0]): -100}})).json()
    assert plain[0] not in other["choices"][0]["token_ids"]
    forced = (await http.post(path, json=body | {"temperature": 1, "logit_bias": {"70": 100}})).json()
    assert forced["choices"][0]["token_ids"] == [70] * 6
    form = {"structured_outputs": {"choice": ["yes", "no"]}, "logit_bias": {"70": 100}}
    assert (await http.post(path, json=body | form)).json()["choices"][0]["message"]["content"] in ("yes", "no")
    refused = await http.post(path, json=body | {"logit_bias": {"1000000": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")
