"""Streams that say something now and then while there is nothing to tell, so that nothing on the way gives them up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import anyio


async def kept_alive(events: AsyncGenerator[str, None], ping: str, period_s: float) -> AsyncGenerator[str, None]:
    """The same events, and a ping whenever none came for `period_s` seconds. Closing this closes `events`."""
    async with aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait((coming,), timeout=period_s))[0]:
                    yield ping
            finally:
                await end(coming)
            event = coming.result()
            if event is None:
                return
            yield event


async def end(task: asyncio.Future[Any]) -> None:
    """Cancels a task, if it is not done, and waits for its end, whatever that is."""
    task.cancel()
    with anyio.CancelScope(shield=True):  # a response whose client left is cancelled again in each turn of the loop
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # so that it counts as seen
