"""Limits of tenants and deadlines, over a scripted engine and a clock that the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from deployments.admission import Admission
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest
from deployments.tenants import TenantConfig, hash_key
from engine.core.request import SamplingParams
from engine.output import OutputDelta
from engine.prompt import TextPrompt
from engine.tenant import Tenant


class Engine:
    """Two deltas, of 10 prompt tokens and up to 5 output tokens; between them it waits for `go`."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.num_running = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        self.num_running += 1
        try:
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


def request(name: str = "a") -> GenerationRequest:
    return GenerationRequest("id", "s", TextPrompt("x"), SamplingParams(), True, tenant=Tenant(name))


async def drain(items: AsyncGenerator[GenerationItem, None]) -> list[GenerationItem]:
    return [item async for item in items]


def refusal(items: list[GenerationItem]) -> ErrorItem:
    (item,) = items
    assert isinstance(item, ErrorItem)
    assert item.status == 429
    assert item.retry_after_s is not None
    return item


async def test_concurrent_requests_of_a_tenant_are_limited_exactly() -> None:
    engine = Engine()
    admission = Admission(engine, [tenant("a", max_concurrent_requests=2), tenant("b")])
    running = [admission.generate(request()) for _ in range(2)]
    for items in running:
        await anext(items)
    assert refusal(await drain(admission.generate(request()))).code == "too_many_requests"
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
    assert (item.code, item.retry_after_s) == ("tokens_per_minute", 1.0)
    clock.now += 1
    assert len(await drain(admission.generate(request()))) == 2  # one token is left: it may end, and then owes 14
    assert refusal(await drain(admission.generate(request()))).retry_after_s == 15.0
    clock.now += 14
    refusal(await drain(admission.generate(request())))
    clock.now += 3600  # no more than a minute's worth is saved up
    for _ in range(4):
        assert len(await drain(admission.generate(request()))) == 2
    refusal(await drain(admission.generate(request())))


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
    assert (last.status, last.code, last.param) == (504, "timeout", "timeout")
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
