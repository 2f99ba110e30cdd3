"""Which responses count as running: a turn holds a lease on its response, and is interrupted once that is over."""

from __future__ import annotations

from collections.abc import Callable, Collection

from sqlalchemy import ColumnElement, and_, literal_column, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.errors import ConversationBusyError
from deployments.store.tables import responses
from deployments.store.values import INTERRUPTED, Status

# A literal, so that SQLite recognises the condition of its partial index.
IS_RUNNING = responses.c.status == literal_column(f"'{Status.IN_PROGRESS}'")


class Leases:
    """Which turns count as running: those with a lease that is not over, and those of this process.

    alive: the ids of the latter, as of now, whatever the clock says.
    """

    def __init__(self, alive: Callable[[], Collection[str]]) -> None:
        self._alive = alive

    def is_over(self, now: float) -> ColumnElement[bool]:
        """Of a response that runs: no turn works on it any more."""
        return and_(responses.c.lease_until < now, responses.c.id.not_in(list(self._alive())))

    def is_alive(self, response_id: str) -> bool:
        return response_id in self._alive()

    async def refuse_if_busy(self, connection: AsyncConnection, conversation_id: str, now: float) -> None:
        """Call with the conversation locked. Marks turns whose lease is over; raises ConversationBusyError for others."""
        inside = responses.c.conversation_id == conversation_id
        await interrupt(connection, and_(inside, self.is_over(now)), now)
        running = await connection.scalar(select(responses.c.id).where(inside, IS_RUNNING).limit(1))
        if running is not None:
            raise ConversationBusyError(
                f"the conversation {conversation_id!r} is locked: its response {running!r} is still in progress. Wait for it "
                "or cancel it",
                "conversation",
            )


async def interrupt(connection: AsyncConnection, which: ColumnElement[bool], now: float) -> int:
    """Marks those of the running responses; returns how many there were."""
    result = await connection.execute(
        update(responses)
        .where(IS_RUNNING, which)
        .values(status=Status.INCOMPLETE, incomplete_reason=INTERRUPTED, completed_at=now)
    )
    return result.rowcount
