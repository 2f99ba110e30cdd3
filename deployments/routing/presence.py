"""Whether engine replicas are there, and what they serve.

Asks all of them at once, because a call that is routed waits behind the requests: busy is not dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.cluster.coalesced import Coalesced
from deployments.errors import NoReplicaError
from deployments.generation import GenerationItem, ModelCard
from deployments.routing.replica_failures import REPLICA_LOST
from engine.errors import EngineStoppedError

logger = logging.getLogger("ray.serve")

# How long an engine replica may take to say that it is alive, in seconds.
DESCRIBE_TIMEOUT_S = 5.0
# All questions within this time share one look at the replicas, in seconds; and so long a request waits for its first item
# before it asks whether there are any.
LOOK_PERIOD_S = 1.0
# How old what is known of the model may be, in seconds: a deploy may change it while this ingress lives.
CARD_PERIOD_S = 10.0


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look found: a card, or why no replica is there; neither if they are too busy to answer."""

    card: ModelCard | None = None
    absence: NoReplicaError | None = None


class Presence:
    """What is known of the replicas behind one handle."""

    def __init__(
        self, handle: DeploymentHandle, why_absent: Callable[[], NoReplicaError], engine_wait_s: float
    ) -> None:
        """Asks nothing yet.

        why_absent: why there is no replica; may block.
        engine_wait_s: how long a request waits for a replica while there is none, in seconds.
        """
        self._handle = handle
        self._why_absent = why_absent
        self._why_logged = ""
        self._engine_wait_s = engine_wait_s
        self._look = Coalesced(self._ask_replicas, LOOK_PERIOD_S)
        self._card: ModelCard | None = None
        self._card_s = 0.0
        self._absent_since_s: float | None = None  # as of the last look

    async def describe(self) -> ModelCard:
        """What the replicas serve; the first good answer, at most LOOK_PERIOD_S old.

        Raises NoReplicaError when there is none, and EngineStoppedError when none answers in time.
        """
        look = await self._look()
        if look.absence is not None:
            raise look.absence
        if look.card is None:
            raise EngineStoppedError(f"no engine replica answered within {DESCRIBE_TIMEOUT_S:g} seconds")
        return look.card

    async def model_card(self) -> ModelCard:
        """What the replicas serve, as far as it is known here; the first time, waits until one says so.

        One that is busy is waited for as one that starts is. Raises EngineStoppedError when that takes too long.
        """
        if self._card is None:
            return await self._first_card()
        if time.monotonic() - self._card_s >= CARD_PERIOD_S:
            self._look.start()
        return self._card

    async def look_again(self) -> None:
        """Ask the replicas what they serve now, although that was asked a moment ago."""
        await self._ask_replicas()

    async def wait(self) -> None:
        """Until a replica is there. Raises NoReplicaError when that takes too long, or none is to be expected."""
        start_s = time.monotonic()
        while (absence := (await self._look()).absence) is not None:
            self._give_up(absence, start_s)
            await asyncio.sleep(LOOK_PERIOD_S)

    async def _first_card(self) -> ModelCard:
        start_s = time.monotonic()
        while True:
            try:
                return await self.describe()
            except NoReplicaError as absence:
                self._give_up(absence, start_s)
            except EngineStoppedError:
                if time.monotonic() - start_s >= self._engine_wait_s:
                    raise
            await asyncio.sleep(LOOK_PERIOD_S)

    async def first_of(self, items: AsyncIterator[GenerationItem]) -> GenerationItem:
        """The first item. While it does not come, looks whether there is a replica that it could come from.

        A router without replicas waits for ever. Raises as `wait` does.
        """
        start_s = time.monotonic()
        first = asyncio.ensure_future(anext(items))
        first.add_done_callback(lambda task: task.cancelled() or task.exception())  # so that it counts as seen
        try:
            while not (await asyncio.wait([first], timeout=LOOK_PERIOD_S))[0]:
                if (absence := (await self._look()).absence) is not None and not first.done():
                    self._give_up(absence, start_s)
            return first.result()
        finally:
            first.cancel()

    def _give_up(self, absence: NoReplicaError, start_s: float) -> None:
        """Raises `absence` when a request that waits since `start_s` is to wait no longer."""
        since_s = max(start_s, self._absent_since_s or start_s)
        if absence.is_final or time.monotonic() - since_s >= self._engine_wait_s:
            raise absence

    async def _ask_replicas(self) -> _Look:
        start_s = time.monotonic()
        is_busy = False
        try:
            answers: list[Any] = await self._handle.broadcast("describe").results_async(
                timeout_s=DESCRIBE_TIMEOUT_S, return_exceptions=True
            )
        except TimeoutError:
            answers, is_busy = [], True
        except REPLICA_LOST:
            answers = []
        cards = [answer for answer in answers if isinstance(answer, ModelCard)]
        card = None
        if cards:
            card = replace(
                cards[0],
                warnings=tuple(sorted(warning for each in cards for warning in each.warnings)),
                adapters=tuple(dict.fromkeys(name for each in cards for name in each.adapters)),
            )
            self._card, self._card_s = card, time.monotonic()
        if card is not None or is_busy:
            self._absent_since_s = None
            self._why_logged = ""
            return _Look(card)
        if self._absent_since_s is None:
            self._absent_since_s = start_s
        absence = await asyncio.to_thread(self._why_absent)
        if str(absence) != self._why_logged:  # waiting requests ask every second
            self._why_logged = str(absence)
            logger.warning("%s", absence)
        return _Look(absence=absence)
