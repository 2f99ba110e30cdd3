"""A value that is kept up to date in the background while it is used. Knows nothing of the question."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


class Refreshed(Generic[T]):
    """Call it for the latest answer. It never waits: a call that finds the answer old asks again in the background."""

    def __init__(
        self,
        question: Callable[[], Awaitable[T]],
        initial: T,
        period_s: float,
        failures: tuple[type[Exception], ...],
    ) -> None:
        """Asks nothing until it is called.

        initial: the answer until the first one is there.
        period_s: least time between two questions, in seconds.
        failures: what `question` may raise; the last answer then stays.
        """
        self._question = question
        self._answer = initial
        self._period_s = period_s
        self._failures = failures
        self._asked_s = -period_s
        self._asking: asyncio.Task[None] | None = None

    def __call__(self) -> T:
        """The latest answer. Call it in an event loop."""
        now = time.monotonic()
        if now - self._asked_s >= self._period_s and self._asking is None:
            self._asked_s = now
            self._asking = asyncio.create_task(self._ask())
        return self._answer

    async def _ask(self) -> None:
        try:
            self._answer = await self._question()
        except self._failures as error:
            logger.debug("no answer to %r: %r", self._question, error)
        finally:
            self._asking = None
