"""Fixtures of the deployments' tests: a scripted engine behind the HTTP application, in this process and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from deployments.generation import DeltaItem, GenerationItem, GenerationRequest, ModelCard
from deployments.ingress import IngressConfig, create_app
from engine.errors import EngineStoppedError
from engine.output import OutputDelta

MAX_BODY_BYTES = 4096


class ScriptedEngine:
    """Says `items`, whatever it is asked, and notes what it was asked. hangs: never comes to an end."""

    def __init__(self) -> None:
        self.items: list[GenerationItem] = [
            DeltaItem(OutputDelta("Hel", (1,), (), (7, 8), 5, 3, 1), 2),
            DeltaItem(OutputDelta("", (2,), (), (), 5, 3, 2), 2),
            DeltaItem(OutputDelta("lo", (3, 4), (), (), 5, 3, 4, "stop"), 2),
        ]
        self.requests: list[GenerationRequest] = []
        self.hangs = False
        self.is_up = True
        self.num_describes = 0
        self.num_running = 0
        self.num_aborted = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]:
        self.requests.append(request)
        self.num_running += 1
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.hangs:
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.num_aborted += 1
            raise
        finally:
            self.num_running -= 1

    async def describe(self) -> ModelCard:
        self.num_describes += 1
        if not self.is_up:
            raise EngineStoppedError("no engine replica is ready")
        return ModelCard("tiny", 100)

    async def model_card(self) -> ModelCard:
        return await self.describe()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def app(engine: ScriptedEngine) -> FastAPI:
    return create_app(engine, IngressConfig(max_body_bytes=MAX_BODY_BYTES), ingress_id="ingress-1")


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
