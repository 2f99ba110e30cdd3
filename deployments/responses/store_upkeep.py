"""The conversation store as the endpoints use it: opened at its first use, and kept in order.

Leases are renewed, the disk is watched, and what is older than the retention is deleted. Knows turns only as something
that can be stopped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from deployments.store.conversation_store import ConversationStore
from deployments.store.errors import StoreError

logger = logging.getLogger("ray.serve")

# A turn whose process is gone counts as interrupted after this; renewed several times in between. Seconds.
LEASE_S = 10.0
RENEWAL_S = 3.0
# How often what is older than the retention is deleted, in seconds, and how long after the start for the first time: an
# operator who did not mean it that way has read of it by then.
SWEEP_S = 3600.0
FIRST_SWEEP_S = 600.0
# How often the room on the store's disk is looked at, in seconds, and from what part of what is kept free on it is said.
ROOM_S = 60.0
ROOM_WARNING = 4
DAY_S = 86400.0


class Stoppable(Protocol):
    """A turn under way."""

    def stop(self) -> None: ...


class StoreUpkeep:
    """One per ingress process. `running` holds the turns of this process that the store has, by response id."""

    def __init__(
        self,
        store: ConversationStore,
        *,
        owner: str,
        retention_days: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens nothing yet.

        owner: an id of this process's boot, under which its turns are leased.
        retention_days: what was last used before that is deleted; None = nothing is.
        clock: Unix time in seconds.
        """
        self.store = store
        self.owner = owner
        self.clock = clock
        self.running: dict[str, Stoppable] = {}
        store.alive = self.running.keys()
        self._retention_days = retention_days
        self._opening: asyncio.Task[None] | None = None  # under way or done
        self._room_warning = ""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def opened(self) -> ConversationStore:
        """The store, opened first if it is not yet. Raises StoreError.

        All calls during one attempt wait for that attempt; after it failed, the next call makes another one.
        """
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        await asyncio.shield(self._opening)
        return self.store

    async def check(self) -> None:
        """Returns if the store can be written. Raises StoreError."""
        await (await self.opened()).ping()

    @property
    def warnings(self) -> list[str]:
        """What the store's operator should see to, as of the latest look."""
        return [self._room_warning] if self._room_warning else []

    def lease_until(self) -> float:
        """Up to when a turn that begins now counts as running, in Unix seconds, unless its lease is renewed."""
        return self.clock() + LEASE_S

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Does that in the background, until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop keeps no strong reference
        task.add_done_callback(self._tasks.discard)

    def stop(self, response_id: str) -> None:
        """Stops that turn if it runs in this process."""
        if response_id in self.running:
            self.running[response_id].stop()

    async def close(self) -> None:
        """Turns that still run are marked as interrupted."""
        for turn in list(self.running.values()):
            turn.stop()
        for task in list(self._tasks):
            task.cancel()
        is_open = self._opening is not None and self._opening.done()
        if self._opening is not None:
            self._opening.cancel()  # nothing happens if it is done
        if is_open:
            try:
                await self.store.mark_interrupted(self.clock(), self.owner)
            except StoreError as error:
                logger.warning("turns of this process are not marked as interrupted yet: %s", error.message)
            await self.store.close()

    async def _open(self) -> None:
        try:
            await self.store.open(self.clock())
        except BaseException:
            self._opening = None
            raise
        self.later(self._repeat(self._renew_leases, RENEWAL_S))
        self.later(self._repeat(self._look_for_room, ROOM_S))
        if self._retention_days is not None:
            logger.info(
                "what was last used more than %g days ago is deleted from the conversation store, from %d s from now on "
                "(retention_days)",
                *(self._retention_days, FIRST_SWEEP_S),
            )
            self.later(self._repeat(self._delete_old, SWEEP_S, FIRST_SWEEP_S))

    async def _repeat(self, work: Callable[[], Awaitable[None]], period_s: float, first_s: float = 0.0) -> None:
        """In a task of its own for each kind of work: leases do not wait for a large clean-up."""
        await asyncio.sleep(first_s)
        while True:
            try:
                await work()
            except StoreError as error:
                logger.warning("%s: %s", work.__name__, error.message)
            except Exception:
                logger.exception("%s", work.__name__)  # and again, after the pause
            await asyncio.sleep(period_s)

    async def _renew_leases(self) -> None:
        """Also stops the turns that were cancelled elsewhere."""
        running = list(self.running)
        alive = await self.store.renew_leases(self.owner, self.clock(), LEASE_S, running)
        for response_id in set(running) - alive:
            self.stop(response_id)

    async def _delete_old(self) -> None:
        assert self._retention_days is not None
        num_deleted = await self.store.delete_older_than(self.clock() - self._retention_days * DAY_S)
        logger.info("%d responses and conversations older than the retention were deleted", num_deleted)

    async def _look_for_room(self) -> None:
        """Warns once when the disk is nearly full; /ready repeats it as long as it is."""
        bytes_left, kept_free = self.store.bytes_left(), self.store.min_free_bytes
        warning = ""
        if bytes_left is not None and bytes_left < ROOM_WARNING * kept_free:
            warning = "the disk of the conversation store is nearly full"
            if not self._room_warning:
                logger.warning(
                    "%s: %d MiB are left, and with less than %d MiB (store_min_free_bytes) no new turn is stored. Make room, "
                    "or lower retention_days or max_stored_bytes",
                    *(warning, bytes_left // 2**20, kept_free // 2**20),
                )
        self._room_warning = warning
