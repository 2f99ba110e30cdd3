"""Keeps responses and the token ids behind them, so that a turn continues after a restart, from any ingress.

Owns the life of a response: in progress under a lease, then whole, or marked as what it is. Knows neither HTTP nor an
engine; time is an argument.

    begin_response --> complete_response     one transaction: items, usage, transcript, the conversation's end
                  |--> fail_response, cancel_response
                  `--> lease over            read as incomplete, reason "interrupted"; never half a turn
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import and_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.completion import complete, find_place
from deployments.store.conversations import Conversations, find_conversation
from deployments.store.database import Database
from deployments.store.history import chain_items, conversation_items, load_transcript
from deployments.store.item_rows import (
    find_items,
    find_session,
    insert_items,
    is_plain_id,
    name_items,
    read_page,
    refuse_odd_id,
)
from deployments.store.leases import IS_RUNNING, Leases, interrupt
from deployments.store.purge import find_purgeable, hide_old, purge, purge_conversations
from deployments.store.response_rows import (
    find_previous,
    find_response,
    finish,
    insert_response,
    read_response,
    read_response_and_lease,
)
from deployments.store.tables import conversations, items, responses, write_probe
from deployments.store.usage import Accounts, Usage, measure, read_usage
from deployments.store.values import (
    INTERRUPTED,
    UNLIMITED,
    History,
    NewResponse,
    Order,
    Outcome,
    Page,
    Quota,
    Status,
    StoredItem,
    StoredResponse,
)
from engine.errors import InvalidParameterError


def random_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


class ConversationStore:
    """One per process, used in one event loop; any number of processes may share a database.

    Every method raises StoreUnavailableError while the database does not answer, and works again by itself once it
    does; and StoreCorruptedError if it is damaged.

    url: sqlite:///path/to/file or postgresql://user@host/database.
    password: for the latter.
    timeout_s: bounds connecting, each statement and each wait for a lock; a whole call takes at most twice that.
    new_id: prefix -> an id that was never used.
    quota_of: tenant -> what it may keep.
    min_free_bytes: what new turns leave of a SQLite file's disk.

    alive: ids of the responses that this process is working on, kept by the turns that work; no clock interrupts them.
    """

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        timeout_s: float = 5.0,
        new_id: Callable[[str], str] = random_id,
        quota_of: Callable[[str], Quota] = lambda tenant: UNLIMITED,
        min_free_bytes: int = 0,
    ) -> None:
        """Touches no database. Raises StoreConfigError."""
        self.new_id = new_id
        self.alive: Collection[str] = ()
        self._database = Database(url, timeout_s, password, min_free_bytes)
        self._accounts = Accounts(self._database, quota_of)
        self._leases = Leases(lambda: self.alive)
        self.conversations = Conversations(self._database, self._accounts, self._leases, new_id)

    async def open(self, now: float) -> None:
        """Brings the schema up to date and marks turns whose lease is over.

        Several processes may do so at once; after a failure it can be called again. Raises StoreVersionError, and
        StoreConfigError for another program's file.
        """
        await self._database.open()
        await self.mark_interrupted(now)

    async def close(self) -> None:
        """Transactions that run come to their end first."""
        await self._database.close()

    async def ping(self) -> None:
        """Returns if the database can be written, with our tables in it."""
        await self._database.write(
            lambda connection: connection.execute(
                update(write_probe).values(num_writes=(write_probe.c.num_writes + 1) % 2**31)
            )
        )

    @property
    def min_free_bytes(self) -> int:
        """What new turns leave of the disk."""
        return self._database.min_free_bytes

    def bytes_left(self) -> int | None:
        """Room on the disk of a SQLite file; None = not known."""
        return self._database.bytes_outside()

    async def usage(self, tenant: str) -> Usage:
        """What this tenant keeps."""
        return await self._database.read(lambda connection: read_usage(connection, tenant))

    # The life of a response

    async def begin_response(self, tenant: str, new: NewResponse, now: float) -> StoredResponse:
        """Records a turn that begins; what it continues cannot be deleted meanwhile.

        Raises NotFoundError for the previous response or the conversation, PreviousResponseError if that is not whole,
        ConversationBusyError if another turn of the conversation is running, StoredTooMuchError above the tenant's
        quota, and StoreFullError.
        """
        if new.previous_response_id is not None and new.conversation_id is not None:
            raise InvalidParameterError(
                "give either 'previous_response_id' or 'conversation': a conversation has its own history",
                "previous_response_id",
            )
        named = name_items(new.input, self.new_id)

        async def work(connection: AsyncConnection) -> StoredResponse:
            session_key, start = await self._enter_session(connection, tenant, new, now)
            begun = StoredResponse(
                id=new.id,
                conversation_id=new.conversation_id,
                previous_response_id=new.previous_response_id,
                session_key=session_key,
                model=new.model,
                created_at=now,
                completed_at=None,
                status=Status.IN_PROGRESS,
                incomplete_reason=None,
                error=None,
                instructions=new.instructions,
                params=dict(new.params),
                usage=None,
                input=named,
                output=(),
            )
            await insert_response(connection, tenant, begun, new.owner, new.lease_until, conversation_start=start)
            await insert_items(connection, named, response_id=new.id)
            added = await measure(
                connection, (responses, responses.c.id == new.id), (items, items.c.response_id == new.id)
            )
            await self._accounts.add(connection, tenant, added)
            return begun

        return await self._database.write(work)

    async def _enter_session(
        self, connection: AsyncConnection, tenant: str, new: NewResponse, now: float
    ) -> tuple[str, int | None]:
        """What the turn is routed by, and where in a conversation its chain began; locks what it continues."""
        if new.previous_response_id is not None:
            previous = await find_previous(connection, tenant, new.previous_response_id, lock=True)
            return previous.session_key, previous.conversation_start
        if new.conversation_id is not None:
            await find_conversation(connection, tenant, new.conversation_id, for_update=True)
            await self._leases.refuse_if_busy(connection, new.conversation_id, now)
            await connection.execute(
                update(conversations).where(conversations.c.id == new.conversation_id).values(used_at=now)
            )
            return new.conversation_id, None
        return new.session_key or new.id, None

    async def renew_leases(self, owner: str, now: float, lease_s: float, running: Collection[str]) -> frozenset[str]:
        """Renews the leases of running turns; returns those that are still in progress.

        The others were cancelled or deleted elsewhere, or interrupted.

        running: the responses that this owner is really working on; a row whose turn died must not be kept alive.
        """
        if not running:
            return frozenset()

        async def work(connection: AsyncConnection) -> frozenset[str]:
            renewed = await connection.scalars(
                update(responses)
                .where(responses.c.owner == owner, responses.c.id.in_(running), IS_RUNNING)
                .values(lease_until=now + lease_s)
                .returning(responses.c.id)
            )
            return frozenset(renewed)

        return await self._database.write(work)

    async def complete_response(self, tenant: str, response_id: str, outcome: Outcome) -> bool:
        """Whether the answer is stored, all of it.

        False: the response is no longer in progress (cancelled, deleted, interrupted), and nothing was changed. After
        StoreUnavailableError the same call may be made again.
        """
        refuse_odd_id(response_id)
        named = name_items(outcome.output, self.new_id)
        # Reading the parent's transcript can be long; it never changes, so no writer has to wait for it.
        place = await self._database.read(lambda connection: find_place(connection, tenant, response_id, outcome))
        if place is None:
            return False
        return await self._database.write(
            lambda connection: complete(connection, self._accounts, tenant, response_id, place, named, outcome)
        )

    async def fail_response(self, tenant: str, response_id: str, error: Mapping[str, Any], now: float) -> bool:
        """Whether it was in progress until now."""
        refuse_odd_id(response_id)
        return await self._database.write(
            lambda connection: finish(
                connection, tenant, response_id, status=Status.FAILED, error=dict(error), completed_at=now
            )
        )

    async def interrupt_response(self, tenant: str, response_id: str, now: float) -> bool:
        """Its client is gone. Whether it was in progress until now."""
        return await self._database.write(
            lambda connection: finish(
                connection,
                tenant,
                response_id,
                status=Status.INCOMPLETE,
                incomplete_reason=INTERRUPTED,
                completed_at=now,
            )
        )

    async def cancel_response(self, tenant: str, response_id: str, now: float) -> bool:
        """Whether it was in progress until now. Raises NotFoundError.

        The ingress that runs it learns of it from `renew_leases` and `complete_response`.
        """

        async def work(connection: AsyncConnection) -> bool:
            await find_response(connection, tenant, response_id)
            await interrupt(connection, and_(responses.c.id == response_id, self._leases.is_over(now)), now)
            return await finish(connection, tenant, response_id, status=Status.CANCELLED, completed_at=now)

        return await self._database.write(work)

    async def mark_interrupted(self, now: float, owner: str | None = None) -> int:
        """Marks turns whose lease is over, or all running ones of an owner that ends. Returns how many."""
        which = self._leases.is_over(now) if owner is None else responses.c.owner == owner
        return await self._database.write(lambda connection: interrupt(connection, which, now))

    # Reading

    async def get_response(self, tenant: str, response_id: str, now: float) -> StoredResponse:
        """Raises NotFoundError. Marks the response first if its lease is over."""
        response, lease_until = await self._database.read(
            lambda connection: read_response_and_lease(connection, tenant, response_id)
        )
        if response.status is not Status.IN_PROGRESS or lease_until >= now or self._leases.is_alive(response_id):
            return response

        async def work(connection: AsyncConnection) -> StoredResponse:
            await interrupt(connection, and_(responses.c.id == response_id, self._leases.is_over(now)), now)
            return await read_response(connection, tenant, response_id)

        return await self._database.write(work)

    async def list_input_items(
        self, tenant: str, response_id: str, after: str | None = None, limit: int = 20, order: Order = "desc"
    ) -> Page:
        async def work(connection: AsyncConnection) -> Page:
            await find_response(connection, tenant, response_id)
            inside = and_(items.c.response_id == response_id, ~items.c.is_output)
            return await read_page(connection, inside, items.c.position, after, limit, order)

        return await self._database.read(work)

    async def find_items(self, tenant: str, ids: Sequence[str], max_bytes: int) -> tuple[StoredItem, ...] | None:
        """The tenant's items with these ids, in this order, wherever they are; None if they are larger together.

        Raises NotFoundError for an id that the tenant does not have.

        max_bytes: of items as JSON.
        """
        return await self._database.read(lambda connection: find_items(connection, tenant, ids, max_bytes))

    async def find_session(self, tenant: str, item_id: str) -> str | None:
        """What the turn that an item comes from is routed by; None if the tenant has no such item."""
        if not is_plain_id(item_id):
            return None
        return await self._database.read(lambda connection: find_session(connection, tenant, item_id))

    async def get_history(
        self,
        tenant: str,
        *,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        max_bytes: int = 2**62,
    ) -> History:
        """What was said before a turn that continues a response or a conversation; exactly one of the two.

        For a conversation, ask after `begin_response`, which keeps other turns out of it. A constant number of queries.
        Raises NotFoundError, PreviousResponseError.

        max_bytes: of items as JSON; the newest ones within that, and no transcript if there are more.
        """
        if (previous_response_id is None) == (conversation_id is None):
            raise ValueError("give either previous_response_id or conversation_id")

        async def work(connection: AsyncConnection) -> History:
            if previous_response_id is not None:
                previous = await find_previous(connection, tenant, previous_response_id)
                said, tip, key = await chain_items(connection, previous, max_bytes), previous.id, previous.session_key
            else:
                row = await find_conversation(connection, tenant, str(conversation_id))
                said = await conversation_items(connection, row.id, row.next_position, max_bytes)
                tip, key = row.tip_response_id, row.id
            transcript = await load_transcript(connection, tip) if said.is_whole else None
            return History(said.items, transcript, key, said.is_whole)

        return await self._database.read(work)

    # Forgetting

    async def delete_response(self, tenant: str, response_id: str, now: float) -> None:
        """Hides the response at once, and cancels it if it was in progress. Raises NotFoundError.

        Its content is removed once nothing that lives depends on it: no later response, no conversation.
        """

        async def mark(connection: AsyncConnection) -> None:
            await find_response(connection, tenant, response_id)
            await finish(connection, tenant, response_id, status=Status.CANCELLED, completed_at=now)
            await connection.execute(update(responses).where(responses.c.id == response_id).values(deleted=True))

        await self._database.write(mark)
        await purge(self._database, self._accounts, [response_id])

    async def delete_older_than(self, cutoff: float) -> int:
        """Deletes responses created and conversations last used before `cutoff`; returns how many.

        Those in progress excepted. Also removes what earlier deletions left. What a newer response continues stays
        readable to it alone.

        cutoff: in Unix seconds.
        """
        num_deleted = await self._database.write(lambda connection: hide_old(connection, cutoff))
        while purgeable := await self._database.read(find_purgeable):
            await purge(self._database, self._accounts, purgeable)
        while await self._database.write(lambda connection: purge_conversations(connection, self._accounts)):
            pass
        return num_deleted
