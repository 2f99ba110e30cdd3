"""A turn that is stopped, with a reader or without.

The computation ends, the reader hears of it once, and the store has one end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from deployments.generation import DeltaItem, GenerationItem, GenerationRequest, drain
from deployments.http.admission import Admission
from deployments.responses.answers import ResponseObject, ResponseStream
from deployments.responses.requests import ResponseBody
from deployments.responses.store_upkeep import StoreUpkeep
from deployments.responses.turn import CANCELLED, Turn
from deployments.store.conversation_store import ConversationStore
from deployments.store.values import INTERRUPTED, Status
from engine.tenant import LOCAL_TENANT
from engine.text.output import OutputDelta

BODY = ResponseBody(model="tiny", input="hi", stream=True)
WORDS = [DeltaItem(OutputDelta(word, (number,), (), (), 5, 0, number), 0) for number, word in enumerate("ab", 1)]


class Engine:
    """Says WORDS, then does what `after` says; `is_over` once the computation has ended, however."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.is_over = False

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None
    ) -> AsyncGenerator[GenerationItem, None]:
        try:
            for item in WORDS:
                yield item
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.is_over = True


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def upkeep(tmp_path: Path) -> AsyncIterator[StoreUpkeep]:
    upkeep = StoreUpkeep(ConversationStore(f"sqlite:///{tmp_path / 'store.db'}"), owner="this", clock=lambda: 1000.0)
    yield upkeep
    await upkeep.close()


@pytest.fixture
async def turn(engine: Engine, upkeep: StoreUpkeep) -> Turn:
    """After its first item."""
    form = ResponseObject("resp_1", 1000, BODY, lambda prefix: f"{prefix}_1")
    turn = Turn(LOCAL_TENANT, BODY, form, BODY.input_items(lambda prefix: f"{prefix}_0"), "resp_1", upkeep)
    await turn.begin(100)
    assert await turn.start(cast(Admission, engine)) == WORDS[0]
    return turn


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def stored_status(upkeep: StoreUpkeep) -> tuple[Any, ...]:
    async with asyncio.timeout(10):
        while True:
            stored = await upkeep.store.get_response(LOCAL_TENANT.tenant_id, "resp_1", 1000.0)
            if stored.status is not Status.IN_PROGRESS:
                return stored.status, stored.incomplete_reason
            await asyncio.sleep(0.01)


async def test_a_reader_that_waits_is_told_once(turn: Turn, engine: Engine) -> None:
    assert await anext(turn) == WORDS[1]
    waiting = asyncio.create_task(turn.__anext__())
    await settle()
    turn.stop()
    turn.stop()
    assert await waiting == CANCELLED
    assert engine.is_over
    assert [item async for item in turn] == []


async def test_a_reader_that_is_busy_holds_up_no_end(turn: Turn, engine: Engine) -> None:
    """Its client does not take what is sent; the computation ends all the same."""
    turn.stop()
    await settle()
    assert engine.is_over
    assert [item async for item in turn] == [CANCELLED]
    await turn.aclose()


async def test_a_stop_and_a_close_at_the_same_time(turn: Turn, engine: Engine) -> None:
    turn.stop()
    await asyncio.gather(turn.aclose(), turn.aclose())
    assert engine.is_over


async def test_a_timeout_of_the_engines_is_not_a_stop(turn: Turn, engine: Engine) -> None:
    engine.error = TimeoutError("a node does not answer")
    with pytest.raises(TimeoutError, match="a node"):
        await drain(turn)


async def test_a_reader_that_is_cancelled_ends_the_computation(turn: Turn, engine: Engine, upkeep: StoreUpkeep) -> None:
    reader = asyncio.create_task(drain(turn))
    await settle()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert engine.is_over
    turn.end()
    turn.end()
    assert await stored_status(upkeep) == (Status.INCOMPLETE, INTERRUPTED)
    assert not upkeep.running


async def test_what_is_complete_is_not_interrupted_at_the_end(turn: Turn, upkeep: StoreUpkeep) -> None:
    told = ResponseStream(turn.form)
    told.read(OutputDelta("ab", (1, 2), (), (), 5, 0, 2, "stop"))
    assert (await turn.complete(told.whole(), None))["status"] == "completed"
    await turn.close()
    await settle()
    assert await stored_status(upkeep) == (Status.COMPLETED, None)
