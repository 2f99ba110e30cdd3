"""The conversations of the store: what `/v1/conversations` needs, and the lock under which turns are added.

Knows responses only as turns that may be running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, and_, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.database import Database
from deployments.store.errors import NotFoundError
from deployments.store.item_rows import find_item, insert_items, name_items, read_page, refuse_odd_id
from deployments.store.leases import Leases
from deployments.store.purge import purge, purge_conversations
from deployments.store.tables import conversations, items
from deployments.store.usage import Accounts, Freed, measure, remove
from deployments.store.values import NewItem, Order, Page, StoredConversation, StoredItem


class Conversations:
    """The conversations of all tenants.

    What grows raises StoredTooMuchError above the tenant's quota, and StoreFullError if the disk is nearly full.

    new_id: prefix -> an id that was never used.
    """

    def __init__(self, database: Database, accounts: Accounts, leases: Leases, new_id: Callable[[str], str]) -> None:
        self._database = database
        self._accounts = accounts
        self._leases = leases
        self._new_id = new_id

    async def create(
        self,
        tenant: str,
        metadata: Mapping[str, Any],
        initial_items: Sequence[NewItem],
        now: float,
        conversation_id: str | None = None,
    ) -> StoredConversation:
        """conversation_id: one that `new_id` gave."""
        created = StoredConversation(conversation_id or self._new_id("conv"), now, dict(metadata))

        async def work(connection: AsyncConnection) -> StoredConversation:
            await connection.execute(
                insert(conversations).values(
                    id=created.id,
                    tenant=tenant,
                    created_at=now,
                    used_at=now,
                    metadata=created.metadata,
                    deleted=False,
                    next_position=len(initial_items),
                )
            )
            await insert_items(connection, self._name(initial_items), conversation=(created.id, 0))
            this, inside = conversations.c.id == created.id, items.c.conversation_id == created.id
            added = await measure(connection, (conversations, this), (items, inside))
            await self._accounts.add(connection, tenant, added)
            return created

        return await self._database.write(work)

    async def get(self, tenant: str, conversation_id: str) -> StoredConversation:
        """Raises NotFoundError, as everything here does for ids that this tenant does not have."""

        async def work(connection: AsyncConnection) -> StoredConversation:
            return _to_conversation(await find_conversation(connection, tenant, conversation_id))

        return await self._database.read(work)

    async def update(
        self, tenant: str, conversation_id: str, metadata: Mapping[str, Any], now: float
    ) -> StoredConversation:
        """Replaces the metadata."""

        async def work(connection: AsyncConnection) -> StoredConversation:
            row = await find_conversation(connection, tenant, conversation_id, for_update=True)
            this = (conversations, conversations.c.id == conversation_id)
            before = await measure(connection, this)
            await _change(connection, conversation_id, metadata=dict(metadata), used_at=now)
            await self._accounts.add(connection, tenant, await measure(connection, this) - before)
            return StoredConversation(row.id, row.created_at, dict(metadata))

        return await self._database.write(work)

    async def delete(self, tenant: str, conversation_id: str) -> None:
        """Its responses stay, and so does what they continued; a turn that is running ends as a response alone."""

        async def mark(connection: AsyncConnection) -> list[str]:
            row = await find_conversation(connection, tenant, conversation_id, for_update=True)
            await _change(connection, conversation_id, deleted=True, tip_response_id=None)
            await purge_conversations(connection, self._accounts, [conversation_id])
            return [] if row.tip_response_id is None else [row.tip_response_id]

        await purge(self._database, self._accounts, await self._database.write(mark))

    async def list_items(
        self, tenant: str, conversation_id: str, after: str | None = None, limit: int = 20, order: Order = "desc"
    ) -> Page:
        async def work(connection: AsyncConnection) -> Page:
            await find_conversation(connection, tenant, conversation_id)
            inside = items.c.conversation_id == conversation_id
            return await read_page(connection, inside, items.c.conversation_position, after, limit, order)

        return await self._database.read(work)

    async def add_items(
        self, tenant: str, conversation_id: str, new_items: Sequence[NewItem], now: float
    ) -> tuple[StoredItem, ...]:
        """Raises ConversationBusyError while a turn is running: its answer would not know of them."""
        named = self._name(new_items)

        async def work(connection: AsyncConnection) -> tuple[StoredItem, ...]:
            row = await find_conversation(connection, tenant, conversation_id, for_update=True)
            await self._leases.refuse_if_busy(connection, conversation_id, now)
            await insert_items(connection, named, conversation=(conversation_id, row.next_position))
            await _change(connection, conversation_id, next_position=row.next_position + len(named), used_at=now)
            added = and_(items.c.conversation_id == conversation_id, items.c.conversation_position >= row.next_position)
            await self._accounts.add(connection, tenant, await measure(connection, (items, added)))
            return named

        return await self._database.write(work)

    async def get_item(self, tenant: str, conversation_id: str, item_id: str) -> StoredItem:
        async def work(connection: AsyncConnection) -> StoredItem:
            await find_conversation(connection, tenant, conversation_id)
            return await find_item(connection, conversation_id, item_id)

        return await self._database.read(work)

    async def delete_item(self, tenant: str, conversation_id: str, item_id: str, now: float) -> StoredConversation:
        """Takes the item out of the conversation; a response that it belongs to keeps it.

        Raises ConversationBusyError while a turn is running.
        """

        async def work(connection: AsyncConnection) -> StoredConversation:
            row = await find_conversation(connection, tenant, conversation_id, for_update=True)
            await self._leases.refuse_if_busy(connection, conversation_id, now)
            await find_item(connection, conversation_id, item_id)
            this, freed = items.c.id == item_id, Freed()
            alone = and_(this, items.c.response_id.is_(None))
            await remove(connection, items, alone, items.c.conversation_id, {conversation_id: tenant}, freed)
            await connection.execute(update(items).where(this).values(conversation_id=None, conversation_position=None))
            await _change(connection, conversation_id, used_at=now)
            await self._accounts.free(connection, freed)
            return _to_conversation(row)

        return await self._database.write(work)

    def _name(self, new_items: Sequence[NewItem]) -> tuple[StoredItem, ...]:
        return name_items(new_items, self._new_id)


async def find_conversation(
    connection: AsyncConnection, tenant: str, conversation_id: str, *, for_update: bool = False
) -> Row[Any]:
    """The conversation's row. Raises NotFoundError.

    for_update: until the transaction ends, no other one changes it or begins or ends a turn of it.
    """
    refuse_odd_id(conversation_id, "conversation")
    query = select(conversations).where(
        conversations.c.id == conversation_id, conversations.c.tenant == tenant, ~conversations.c.deleted
    )
    row = (await connection.execute(query.with_for_update() if for_update else query)).one_or_none()
    if row is None:
        raise NotFoundError(f"no conversation has the id {conversation_id!r}", "conversation")
    return row


async def _change(connection: AsyncConnection, conversation_id: str, **values: Any) -> None:
    await connection.execute(update(conversations).where(conversations.c.id == conversation_id).values(**values))


def _to_conversation(row: Row[Any]) -> StoredConversation:
    return StoredConversation(row.id, row.created_at, row.metadata)
