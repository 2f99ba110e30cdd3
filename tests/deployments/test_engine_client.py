"""The ingress's side of the handle: sessions are passed on, Ray's exceptions become items, nobody's request is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments.engine_client import EngineClient
from deployments.generation import DeltaItem, ErrorItem, GenerationRequest, ModelCard
from engine.core.request import SamplingParams
from engine.errors import EngineStoppedError
from engine.output import OutputDelta
from engine.prompt import TextPrompt

REQUEST = GenerationRequest("id-1", "session-1", TextPrompt("hi"), SamplingParams(), stream=True)
ITEM = DeltaItem(OutputDelta("a"), 0)
CARD = ModelCard("tiny", 100)


class FakeHandle:
    """A DeploymentHandle as far as EngineClient uses it, and the response generator in one. Raises `error` after ITEM; or
    waits for ever."""

    def __init__(
        self, error: Exception | None = None, *, hangs: bool = False, answers: list[Any] | None = None
    ) -> None:
        self.error = error
        self.hangs = hangs
        self.answers = answers
        self.option_calls: list[dict[str, Any]] = []
        self.num_cancelled = 0
        self.num_broadcasts = 0
        self._items = self._stream()

    def options(self, **options: Any) -> FakeHandle:
        self.option_calls.append(options)
        return self

    @property
    def generate(self) -> FakeHandle:
        return self

    def remote(self, request: GenerationRequest) -> FakeHandle:
        assert request is REQUEST
        return self

    async def _stream(self) -> AsyncIterator[DeltaItem]:
        yield ITEM
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error

    def __aiter__(self) -> AsyncIterator[DeltaItem]:
        return self._items

    def cancel(self) -> None:
        self.num_cancelled += 1

    def broadcast(self, method: str) -> FakeHandle:
        assert method == "describe"
        self.num_broadcasts += 1
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        if self.answers is None:
            raise TimeoutError
        return self.answers


async def test_routes_by_session_and_passes_items_on() -> None:
    handle = FakeHandle()
    assert [item async for item in EngineClient(handle).generate(REQUEST)] == [ITEM]
    assert handle.option_calls == [{"stream": True, "session_id": "session-1"}]
    assert handle.num_cancelled == 0


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after_s"),
    [
        (BackPressureError(5, 5, 429, 2.0), 429, "overloaded", 2.0),
        (ActorDiedError(), 503, "replica_lost", 1.0),
        (RayActorError(), 503, "replica_lost", 1.0),
        (RayServeException("odd"), 500, None, None),
    ],
)
async def test_what_ray_raises_becomes_an_item(
    error: Exception, status: int, code: str | None, retry_after_s: float | None
) -> None:
    handle = FakeHandle(error)
    first, last = [item async for item in EngineClient(handle).generate(REQUEST)]
    assert first == ITEM
    assert isinstance(last, ErrorItem)
    assert (last.status, last.code, last.retry_after_s) == (status, code, retry_after_s)
    assert handle.num_cancelled == 0  # it is over already


async def test_cancelling_cancels_the_call() -> None:
    handle = FakeHandle(hangs=True)

    async def consume() -> None:
        async for _ in EngineClient(handle).generate(REQUEST):
            pass

    consumer = asyncio.create_task(consume())
    for _ in range(5):
        await asyncio.sleep(0)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert handle.num_cancelled == 1


async def test_closing_between_two_items_cancels_the_call() -> None:
    handle = FakeHandle(hangs=True)
    items = EngineClient(handle).generate(REQUEST)
    assert await anext(items) == ITEM
    await items.aclose()
    assert handle.num_cancelled == 1


async def test_one_replica_that_answers_is_enough() -> None:
    client = EngineClient(FakeHandle(answers=[ActorDiedError(), CARD]))
    assert await client.describe() == CARD


@pytest.mark.parametrize("answers", [None, [], [ActorDiedError()]])
async def test_no_replica_that_answers(answers: list[Any] | None) -> None:
    with pytest.raises(EngineStoppedError):
        await EngineClient(FakeHandle(answers=answers)).describe()


async def test_model_card_is_asked_once_and_outlives_the_replicas() -> None:
    handle = FakeHandle(answers=[CARD])
    client = EngineClient(handle)
    assert await client.model_card() == await client.model_card() == CARD
    assert handle.num_broadcasts == 1
    handle.answers = []
    assert await client.model_card() == CARD


async def test_deployment_that_failed_to_start() -> None:
    from ray.serve._private.common import DeploymentID

    handle = FakeHandle(DeploymentUnavailableError(DeploymentID(name="LLMServer")))
    *_, last = [item async for item in EngineClient(handle).generate(REQUEST)]
    assert isinstance(last, ErrorItem)
    assert last.status == 503
