"""One answer for all who ask at about the same time. Knows nothing of the question."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Coalesced(Generic[T]):
    """Asks `question` at most once per period, and gives every caller its outcome, also if that is an exception."""

    def __init__(
        self, question: Callable[[], Awaitable[T]], period_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._question = question
        self._period_s = period_s
        self._clock = clock
        self._asking: asyncio.Future[T] | None = None
        self._asked_s = 0.0

    async def __call__(self) -> T:
        """The outcome of the question, which is asked now, or is being asked, or was less than a period ago."""
        return await asyncio.shield(self.start())

    def start(self) -> asyncio.Future[T]:
        """The same without waiting for it."""
        now = self._clock()
        is_old = now - self._asked_s >= self._period_s
        if self._asking is None or (self._asking.done() and is_old):
            self._asked_s = now
            self._asking = asyncio.ensure_future(self._question())
            self._asking.add_done_callback(_note)
        return self._asking


def _note(asked: asyncio.Future[T]) -> None:
    """Take its exception, which no caller may be left to take."""
    if not asked.cancelled():
        asked.exception()
