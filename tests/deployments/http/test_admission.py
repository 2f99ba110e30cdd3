"""Limits of tenants and deadlines, over a scripted engine and a clock that the test sets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from deployments.errors import AnswerTimeoutError, TenantLimitError, TooManyRequestsError, TooManyTokensError
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.http.admission import Admission
from deployments.http.errors import wire_of
from deployments.store.values import Quota, StoreLimits
from deployments.tenants import TenantConfig, hash_key
from engine.core.request import SamplingParams
from engine.errors import RequestError
from engine.tenant import Tenant
from engine.text.output import OutputDelta
from engine.text.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt


class Engine:
    """Two deltas, of 10 prompt tokens and up to 5 output tokens; between them it waits for `go`."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.is_open = True  # else it tokenises, and says nothing yet
        self.num_running = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        self.num_running += 1
        try:
            while not self.is_open:
                await asyncio.sleep(0)
            yield DeltaItem(OutputDelta("a", (1,), num_prompt_tokens=10, num_output_tokens=1), 0)
            await self.go.wait()
            last = OutputDelta("b", (2,), num_prompt_tokens=10, num_output_tokens=5, finish_reason="stop")
            yield DeltaItem(last, 0)
        finally:
            self.num_running -= 1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def tenant(name: str, **limits: Any) -> TenantConfig:
    return TenantConfig(id=name, api_keys_sha256=(hash_key(name),), **limits)


def request(name: str = "a", **sampling: Any) -> GenerationRequest:
    return GenerationRequest("id", "s", TextPrompt("x"), SamplingParams(**sampling), stream=True, tenant=Tenant(name))


async def drain(items: AsyncGenerator[GenerationItem, None]) -> list[GenerationItem]:
    return [item async for item in items]


def refusal(items: list[GenerationItem]) -> ErrorItem:
    (item,) = items
    assert isinstance(item, ErrorItem)
    assert wire_of(item).status == 429
    assert item.retry_after_s is not None
    return item


async def test_concurrent_requests_of_a_tenant_are_limited_exactly() -> None:
    engine = Engine()
    admission = Admission(engine, [tenant("a", max_concurrent_requests=2), tenant("b")])
    running = [admission.generate(request()) for _ in range(2)]
    for items in running:
        await anext(items)
    assert refusal(await drain(admission.generate(request()))).is_a(TooManyRequestsError)
    others = [admission.generate(request("b")) for _ in range(10)]
    for items in others:
        await anext(items)
    await running[0].aclose()
    again = admission.generate(request())
    assert isinstance(await anext(again), DeltaItem)
    refusal(await drain(admission.generate(request())))
    engine.go.set()
    for items in (*running, *others, again):
        await drain(items)
    assert engine.num_running == 0
    assert len(await drain(admission.generate(request()))) == 2


async def test_each_ingress_replica_holds_its_part_of_a_limit() -> None:
    admission = Admission(Engine(), [tenant("a", max_concurrent_requests=5)], num_ingress_replicas=lambda: 3)
    running = [admission.generate(request()) for _ in range(2)]
    for items in running:
        await anext(items)
    refusal(await drain(admission.generate(request())))
    for items in running:
        await items.aclose()


async def test_tokens_per_minute() -> None:
    engine, clock = Engine(), Clock()
    engine.go.set()
    admission = Admission(engine, [tenant("a", tokens_per_minute=60)], clock=clock)
    for _ in range(4):  # 15 tokens each
        assert len(await drain(admission.generate(request()))) == 2
    item = refusal(await drain(admission.generate(request())))
    assert (item.kind, item.retry_after_s) == (TooManyTokensError.__name__, 1.0)
    clock.now += 1
    assert len(await drain(admission.generate(request()))) == 2  # one token is left: it may end, and then owes 14
    assert refusal(await drain(admission.generate(request()))).retry_after_s == 15.0
    clock.now += 14
    refusal(await drain(admission.generate(request())))
    clock.now += 3600  # no more than a minute's worth is saved up
    for _ in range(4):
        assert len(await drain(admission.generate(request()))) == 2
    refusal(await drain(admission.generate(request())))


async def test_what_runs_has_its_tokens_set_aside() -> None:
    """However little of the account is left, one request may begin; the next one waits until that is over."""
    engine, clock = Engine(), Clock()
    admission = Admission(engine, [tenant("a", tokens_per_minute=1000)], clock=clock)
    running = [admission.generate(request(max_tokens=300)) for _ in range(8)]
    begun = [await anext(items) for items in running]
    assert [isinstance(item, DeltaItem) for item in begun] == [True] * 4 + [False] * 4
    assert isinstance(begun[4], ErrorItem)
    assert "running requests count with their max_tokens" in begun[4].message
    assert begun[4].retry_after_s == 1.0  # when one of them ends, which cannot be known, and not when a debt is paid
    engine.go.set()
    for items in running:
        await drain(items)
    for _ in range(4):  # what they did not use has come back: 1000 - 4 * 15 are left
        assert isinstance(await anext(admission.generate(request(max_tokens=300))), DeltaItem)


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [(TextPrompt("x" * 4000), 1000), (TokenPrompt((7,) * 1000), 1000), (ChatPrompt((("user", "x" * 4000),)), 1000)],
)
async def test_a_prompt_is_charged_before_it_is_tokenised(prompt: Prompt, num_tokens: int) -> None:
    """By its length, until the engine has counted: it has 10 tokens here."""
    engine = Engine()
    admission = Admission(engine, [tenant("a", tokens_per_minute=1000)], clock=Clock())
    first = admission.generate(replace(request(max_tokens=1), prompt=prompt))
    engine.is_open = False
    waiting = asyncio.create_task(anext(first))
    await asyncio.sleep(0)
    refusal(await drain(admission.generate(request())))
    engine.is_open = True
    await waiting
    assert isinstance(await anext(admission.generate(request())), DeltaItem)


async def test_a_request_that_fails_costs_nothing() -> None:
    class Failing:
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
            yield ErrorItem.of(RequestError("too long"))

    admission = Admission(Failing(), [tenant("a", tokens_per_minute=100)], clock=Clock())
    for _ in range(5):
        (item,) = await drain(admission.generate(request(max_tokens=1000)))
        assert isinstance(item, ErrorItem)
        assert item.is_a(RequestError)


async def test_a_part_of_what_was_let_pass_counts_and_is_not_refused() -> None:
    """Its time began with that of the whole."""
    engine = Engine()
    admission = Admission(engine, [tenant("a", max_concurrent_requests=2, tokens_per_minute=20)], clock=Clock())
    now = asyncio.get_running_loop().time()
    assert (admission.num_places("a"), admission.num_places("b")) == (2, math.inf)
    parts = [admission.generate(request(max_tokens=50), 60.0, admitted_s=now) for _ in range(3)]
    for items in parts:
        assert isinstance(await anext(items), DeltaItem)
    assert admission.num_places("a") == -1
    assert refusal(await drain(admission.generate(request()))).is_a(TooManyRequestsError)
    late = await drain(admission.generate(request(), 60.0, admitted_s=now - 60.0))
    assert isinstance(late[-1], ErrorItem)
    assert late[-1].is_a(AnswerTimeoutError)
    for items in parts:
        await items.aclose()
    assert admission.num_places("a") == 2
    assert engine.num_running == 0


async def test_what_only_stores_is_limited_per_minute() -> None:
    clock = Clock()
    others = StoreLimits(Quota(7, 8), requests_per_minute=4, bytes_per_minute=1000)
    own = tenant("a", store_bytes_per_minute=60, max_stored_bytes=9)
    admission = Admission(Engine(), [own], others, num_ingress_replicas=lambda: 2, clock=clock)
    assert (admission.quota_of("a"), admission.quota_of("b")) == (Quota(7, 9), Quota(7, 8))

    def refused(tenant_id: str, num_bytes: int = 1) -> tuple[str | None, float | None]:
        with pytest.raises(TenantLimitError) as caught:
            admission.admit_storing(tenant_id, num_bytes)
        assert wire_of(caught.value).status == 429
        return wire_of(caught.value).code, caught.value.retry_after_s

    admission.admit_storing("b", 10)
    admission.admit_storing("b", 10)  # two of four: this is one of two replicas
    assert refused("b") == ("store_requests_per_minute", 30.0)
    admission.admit_storing("a", 59)  # of 30: the rest is owed
    assert refused("a") == ("store_bytes_per_minute", 60.0)
    clock.now += 60
    admission.admit_storing("a", 1)
    admission.admit_storing("b", 501)
    assert refused("b")[0] == "store_bytes_per_minute"


async def test_what_a_client_did_not_wait_for_is_counted_too() -> None:
    engine, clock = Engine(), Clock()
    admission = Admission(engine, [tenant("a", tokens_per_minute=11)], clock=clock)
    items = admission.generate(request())
    await anext(items)
    await items.aclose()
    assert engine.num_running == 0
    refusal(await drain(admission.generate(request())))


async def test_tenants_without_limits_have_none() -> None:
    engine = Engine()
    engine.go.set()
    admission = Admission(engine, [])
    for _ in range(100):
        assert len(await drain(admission.generate(request("local")))) == 2


@pytest.mark.parametrize(("default", "own"), [(0.02, None), (None, 0.02), (100.0, 0.02)])
async def test_a_deadline_ends_the_request_in_the_engine(default: float | None, own: float | None) -> None:
    engine = Engine()
    admission = Admission(engine, [], default_timeout_s=default)
    first, last = await drain(admission.generate(request(), own))
    assert isinstance(first, DeltaItem)
    assert isinstance(last, ErrorItem)
    assert (last.kind, last.param) == (AnswerTimeoutError.__name__, "timeout")
    assert engine.num_running == 0


async def test_cancelling_ends_the_request_in_the_engine_and_frees_its_place() -> None:
    engine = Engine()
    admission = Admission(engine, [tenant("a", max_concurrent_requests=1)])
    consumer = asyncio.create_task(drain(admission.generate(request())))
    while not engine.num_running:
        await asyncio.sleep(0)
    refusal(await drain(admission.generate(request())))
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert engine.num_running == 0
    engine.go.set()
    assert len(await drain(admission.generate(request()))) == 2
