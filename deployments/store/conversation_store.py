"""Keeps conversations, responses and the token ids behind them, so that a turn continues after a restart of everything,
from any ingress. Owns the life of a response: in progress under a lease, then whole, or marked as what it is. Knows
neither HTTP nor an engine; time is an argument.

    begin_response --> complete_response     one transaction: items, usage, transcript, the conversation's end
                  |--> fail_response, cancel_response
                  `--> lease over            read as incomplete, reason "interrupted"; never half a turn
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sqlalchemy import Row, and_, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.conversations import (
    IS_RUNNING,
    Conversations,
    Leases,
    find_conversation,
    insert_items,
    interrupt,
    name_items,
    read_page,
    refuse_odd_id,
)
from deployments.store.database import Database
from deployments.store.errors import (
    NotFoundError,
    PreviousResponseError,
    PreviousResponseNotFoundError,
    StoreCorruptedError,
)
from deployments.store.history import chain_items, conversation_items, load_transcript
from deployments.store.purge import find_purgeable, purge_above, purge_conversations
from deployments.store.tables import conversations, items, responses, transcripts, write_probe
from deployments.store.transcript_delta import make_delta
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
from engine.text.transcript import Transcript


def random_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


class ConversationStore:
    """One per process, used in one event loop; any number of processes may share a database. Every method raises
    StoreUnavailableError while the database does not answer, and works again by itself once it does; StoreCorruptedError
    where it is damaged.

    url: sqlite:///path/to/file or postgresql://user@host/database; password: for the latter. timeout_s bounds connecting,
    each statement and each wait for a lock; a whole call takes at most twice that. new_id: prefix -> an id that was never
    used. quota_of: tenant -> what it may keep. min_free_bytes: what new turns leave of a SQLite file's disk.

    alive: ids of the responses that this process is working on, kept by the turns that work: no clock interrupts them.
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
        """Brings the schema up to date, marks turns whose lease is over. Several processes may do so at once; after a
        failure it can be called again. Raises StoreVersionError, and StoreConfigError for another program's file."""
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
        """Raises NotFoundError for the previous response or the conversation, PreviousResponseError if that is not
        whole, ConversationBusyError if another turn of the conversation is running, StoredTooMuchError above the tenant's
        quota, StoreFullError."""
        if new.previous_response_id is not None and new.conversation_id is not None:
            raise InvalidParameterError(
                "give either 'previous_response_id' or 'conversation': a conversation knows what came before",
                "previous_response_id",
            )
        named = name_items(new.input, self.new_id)

        async def work(connection: AsyncConnection) -> StoredResponse:
            session_key, start = new.id, None
            if new.previous_response_id is not None:
                previous = await _find_previous(connection, tenant, new.previous_response_id, lock=True)
                session_key, start = previous.session_key, previous.conversation_start
            elif new.conversation_id is not None:
                await find_conversation(connection, tenant, new.conversation_id, for_update=True)
                await self._leases.refuse_if_busy(connection, new.conversation_id, now)
                await connection.execute(
                    update(conversations).where(conversations.c.id == new.conversation_id).values(used_at=now)
                )
                session_key = new.conversation_id
            await connection.execute(
                insert(responses).values(
                    id=new.id,
                    tenant=tenant,
                    conversation_id=new.conversation_id,
                    conversation_start=start,
                    previous_response_id=new.previous_response_id,
                    session_key=session_key,
                    model=new.model,
                    created_at=now,
                    status=Status.IN_PROGRESS,
                    instructions=new.instructions,
                    params=dict(new.params),
                    owner=new.owner,
                    lease_until=new.lease_until,
                    deleted=False,
                )
            )
            await insert_items(connection, named, response_id=new.id)
            added = await measure(
                connection, (responses, responses.c.id == new.id), (items, items.c.response_id == new.id)
            )
            await self._accounts.add(connection, tenant, added)
            return StoredResponse(
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

        return await self._database.write(work)

    async def renew_leases(self, owner: str, now: float, lease_s: float, running: Collection[str]) -> frozenset[str]:
        """running: the responses that this owner is really working on; a row whose turn died must not be kept alive.
        Returns those that are still in progress: the others were cancelled or deleted elsewhere, or interrupted."""
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
        """Whether the answer is stored, all of it. False: the response is no longer in progress (cancelled, deleted,
        interrupted), and nothing was changed. After StoreUnavailableError the same call may be made again."""
        refuse_odd_id(response_id)
        named = name_items(outcome.output, self.new_id)

        async def read(connection: AsyncConnection) -> tuple[str | None, str | None, Transcript | None] | None:
            query = (
                select(responses.c.conversation_id, responses.c.previous_response_id, conversations.c.tip_response_id)
                .outerjoin(conversations, conversations.c.id == responses.c.conversation_id)
                .where(responses.c.id == response_id, responses.c.tenant == tenant)
            )
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                return None
            parent_id = row.previous_response_id or row.tip_response_id
            parent = None if outcome.transcript is None else await load_transcript(connection, parent_id)
            return row.conversation_id, parent_id if parent is not None else None, parent

        # Reading the parent's transcript can be long; it never changes, so no writer has to wait for it.
        found = await self._database.read(read)
        if found is None:
            return False
        conversation_id, parent_id, parent = found

        async def work(connection: AsyncConnection) -> bool:
            conversation = None
            if conversation_id is not None:
                query = select(conversations).where(conversations.c.id == conversation_id).with_for_update()
                conversation = (await connection.execute(query)).one_or_none()
            is_live = conversation is not None and not conversation.deleted
            values: dict[str, Any] = {
                "status": outcome.status,
                "incomplete_reason": outcome.incomplete_reason,
                "completed_at": outcome.completed_at,
                "usage": dict(outcome.usage),
            }
            if conversation is not None:
                values["conversation_start"] = conversation.next_position
            if not await _finish(connection, tenant, response_id, **values):
                return await _was_completed(connection, tenant, response_id, outcome)
            num_input = 0
            if conversation is not None and is_live:
                num_input = await _append_input(connection, response_id, conversation)
            end = (conversation.id, conversation.next_position + num_input) if conversation and is_live else None
            await insert_items(connection, named, response_id=response_id, is_output=True, conversation=end)
            if outcome.transcript is not None:
                # A conversation that was deleted meanwhile no longer keeps its last transcript.
                kept = conversation is None or conversation.tip_response_id == parent_id
                delta = make_delta(parent if kept else None, outcome.transcript)
                await connection.execute(
                    insert(transcripts).values(
                        response_id=response_id,
                        parent_id=parent_id if kept else None,
                        num_kept_tokens=delta.num_kept_tokens,
                        num_kept_chars=delta.num_kept_chars,
                        num_kept_anchors=delta.num_kept_anchors,
                        token_ids=delta.token_ids,
                        text=delta.text,
                        anchors=delta.anchors,
                        fingerprint=outcome.transcript.fingerprint,
                    )
                )
            if end is not None:
                moved: dict[str, Any] = {"next_position": end[1] + len(named), "used_at": outcome.completed_at}
                if outcome.transcript is not None:
                    moved["tip_response_id"] = response_id
                await connection.execute(update(conversations).where(conversations.c.id == end[0]).values(**moved))
            said = and_(items.c.response_id == response_id, items.c.is_output)
            added = await measure(connection, (items, said), (transcripts, transcripts.c.response_id == response_id))
            await self._accounts.add(connection, tenant, added, is_refusable=False)
            return True

        return await self._database.write(work)

    async def fail_response(self, tenant: str, response_id: str, error: Mapping[str, Any], now: float) -> bool:
        """Whether it was in progress until now."""
        refuse_odd_id(response_id)
        return await self._database.write(
            lambda connection: _finish(
                connection, tenant, response_id, status=Status.FAILED, error=dict(error), completed_at=now
            )
        )

    async def interrupt_response(self, tenant: str, response_id: str, now: float) -> bool:
        """Nobody waits for it any more. Whether it was in progress until now."""
        return await self._database.write(
            lambda connection: _finish(
                connection,
                tenant,
                response_id,
                status=Status.INCOMPLETE,
                incomplete_reason=INTERRUPTED,
                completed_at=now,
            )
        )

    async def cancel_response(self, tenant: str, response_id: str, now: float) -> bool:
        """Whether it was in progress until now. The ingress that runs it learns of it from `renew_leases` and
        `complete_response`. Raises NotFoundError."""

        async def work(connection: AsyncConnection) -> bool:
            await _find_response(connection, tenant, response_id)
            await interrupt(connection, and_(responses.c.id == response_id, self._leases.is_over(now)), now)
            return await _finish(connection, tenant, response_id, status=Status.CANCELLED, completed_at=now)

        return await self._database.write(work)

    async def mark_interrupted(self, now: float, owner: str | None = None) -> int:
        """Marks turns whose lease is over, or all running ones of an owner that ends. Returns how many."""
        which = self._leases.is_over(now) if owner is None else responses.c.owner == owner
        return await self._database.write(lambda connection: interrupt(connection, which, now))

    # Reading

    async def get_response(self, tenant: str, response_id: str, now: float) -> StoredResponse:
        """Raises NotFoundError. Marks the response first if its lease is over."""
        response, lease_until = await self._database.read(
            lambda connection: _read_response_and_lease(connection, tenant, response_id)
        )
        if response.status is not Status.IN_PROGRESS or lease_until >= now or self._leases.is_alive(response_id):
            return response

        async def work(connection: AsyncConnection) -> StoredResponse:
            await interrupt(connection, and_(responses.c.id == response_id, self._leases.is_over(now)), now)
            return await _read_response(connection, tenant, response_id)

        return await self._database.write(work)

    async def list_input_items(
        self, tenant: str, response_id: str, after: str | None = None, limit: int = 20, order: Order = "desc"
    ) -> Page:
        async def work(connection: AsyncConnection) -> Page:
            await _find_response(connection, tenant, response_id)
            inside = and_(items.c.response_id == response_id, ~items.c.is_output)
            return await read_page(connection, inside, items.c.position, after, limit, order)

        return await self._database.read(work)

    async def get_history(
        self,
        tenant: str,
        *,
        previous_response_id: str | None = None,
        conversation_id: str | None = None,
        max_bytes: int = 2**62,
    ) -> History:
        """Exactly one of the two. Of a conversation, ask after `begin_response`, which keeps others out of it. max_bytes: of
        items as JSON; the newest ones that come to that, and no transcript where there are more. A constant number of
        queries. Raises NotFoundError, PreviousResponseError."""
        if (previous_response_id is None) == (conversation_id is None):
            raise ValueError("give either previous_response_id or conversation_id")

        async def work(connection: AsyncConnection) -> History:
            if previous_response_id is not None:
                previous = await _find_previous(connection, tenant, previous_response_id)
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
        """Gone for whoever asks, cancelled if it was in progress. Its content goes once nothing that lives depends on
        it: no later response, no conversation. Raises NotFoundError."""

        async def mark(connection: AsyncConnection) -> None:
            await _find_response(connection, tenant, response_id)
            await _finish(connection, tenant, response_id, status=Status.CANCELLED, completed_at=now)
            await connection.execute(update(responses).where(responses.c.id == response_id).values(deleted=True))

        await self._database.write(mark)
        await self._purge([response_id])

    async def delete_older_than(self, cutoff: float) -> int:
        """Deletes responses created and conversations last used before that (unix seconds), those in progress excepted,
        and removes what earlier deletions left. What a newer response continues stays readable to it alone. Returns how
        many were deleted."""

        async def mark(connection: AsyncConnection) -> int:
            old = await connection.execute(
                update(responses)
                .where(responses.c.created_at < cutoff, ~responses.c.deleted, ~IS_RUNNING)
                .values(deleted=True)
            )
            busy = select(responses.c.id).where(responses.c.conversation_id == conversations.c.id, IS_RUNNING).exists()
            unused = await connection.execute(
                update(conversations)
                .where(conversations.c.used_at < cutoff, ~conversations.c.deleted, ~busy)
                .values(deleted=True, tip_response_id=None)
            )
            return old.rowcount + unused.rowcount

        num_deleted = await self._database.write(mark)
        while purgeable := await self._database.read(find_purgeable):
            await self._purge(purgeable)
        while await self._database.write(lambda connection: purge_conversations(connection, self._accounts)):
            pass
        return num_deleted

    async def _purge(self, response_ids: list[str]) -> None:
        """In short transactions; one that does not come to pass is made up for by the next `delete_older_than`."""
        while response_ids:
            above = response_ids
            response_ids = await self._database.write(
                lambda connection: purge_above(connection, self._accounts, above)  # noqa: B023  # awaited
            )


async def _find_response(connection: AsyncConnection, tenant: str, response_id: str, *, lock: bool = False) -> Row[Any]:
    """lock: it is not deleted until the transaction ends."""
    refuse_odd_id(response_id)
    query = select(responses).where(responses.c.id == response_id, responses.c.tenant == tenant, ~responses.c.deleted)
    row = (await connection.execute(query.with_for_update(read=True) if lock else query)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no response {response_id!r} here")
    return row


async def _find_previous(connection: AsyncConnection, tenant: str, response_id: str, *, lock: bool = False) -> Row[Any]:
    try:
        row = await _find_response(connection, tenant, response_id, lock=lock)
    except NotFoundError as error:
        raise PreviousResponseNotFoundError(error.message, "previous_response_id") from None
    is_whole = row.status == Status.COMPLETED or (
        row.status == Status.INCOMPLETE and row.incomplete_reason != INTERRUPTED
    )
    if not is_whole:
        remedy = "Wait for it"
        if row.status != Status.IN_PROGRESS:
            before = row.previous_response_id
            remedy = "Continue from the one before it" + (f", {before!r}" if before else "") + ", and ask again"
        state = INTERRUPTED if row.status == Status.INCOMPLETE else row.status.replace("_", " ")
        raise PreviousResponseError(
            f"the response {response_id!r} is {state} and has no answer to continue from. {remedy}",
            "previous_response_id",
        )
    return row


async def _finish(connection: AsyncConnection, tenant: str, response_id: str, **values: Any) -> bool:
    """Whether it was in progress; then it has these values now."""
    result = await connection.execute(
        update(responses)
        .where(responses.c.id == response_id, responses.c.tenant == tenant, ~responses.c.deleted, IS_RUNNING)
        .values(**values)
    )
    return result.rowcount == 1


async def _was_completed(connection: AsyncConnection, tenant: str, response_id: str, outcome: Outcome) -> bool:
    """Whether this very outcome was stored already: by a call whose answer was lost."""
    query = select(responses.c.status, responses.c.incomplete_reason, responses.c.completed_at).where(
        responses.c.id == response_id, responses.c.tenant == tenant, ~responses.c.deleted
    )
    row = (await connection.execute(query)).one_or_none()
    return row is not None and tuple(row) == (outcome.status, outcome.incomplete_reason, outcome.completed_at)


async def _append_input(connection: AsyncConnection, response_id: str, conversation: Row[Any]) -> int:
    """Puts the response's input at the conversation's end; returns how many items that are."""
    result = await connection.execute(
        update(items)
        .where(items.c.response_id == response_id, ~items.c.is_output)
        .values(
            conversation_id=conversation.id,
            conversation_position=conversation.next_position + items.c.position,
        )
    )
    return result.rowcount


def _status(name: str) -> Status:
    try:
        return Status(name)
    except ValueError:
        raise StoreCorruptedError from None


async def _read_response(connection: AsyncConnection, tenant: str, response_id: str) -> StoredResponse:
    return (await _read_response_and_lease(connection, tenant, response_id))[0]


async def _read_response_and_lease(
    connection: AsyncConnection, tenant: str, response_id: str
) -> tuple[StoredResponse, float]:
    row = await _find_response(connection, tenant, response_id)
    query = select(items).where(items.c.response_id == response_id).order_by(items.c.is_output, items.c.position)
    found = (await connection.execute(query)).all()
    response = StoredResponse(
        id=row.id,
        conversation_id=row.conversation_id,
        previous_response_id=row.previous_response_id,
        session_key=row.session_key,
        model=row.model,
        created_at=row.created_at,
        completed_at=row.completed_at,
        status=_status(row.status),
        incomplete_reason=row.incomplete_reason,
        error=row.error,
        instructions=row.instructions,
        params=row.params,
        usage=row.usage,
        input=tuple(StoredItem(item.id, item.role, item.body) for item in found if not item.is_output),
        output=tuple(StoredItem(item.id, item.role, item.body) for item in found if item.is_output),
    )
    return response, row.lease_until
