"""Removes what was deleted once nothing that lives depends on it.

A deleted response is hidden at once, but its rows stay while a later response, or a conversation's next turn, would
continue it. All but `purge` works inside a transaction of the caller's.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from sqlalchemy import ColumnElement, and_, exists, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.database import Database
from deployments.store.leases import IS_RUNNING
from deployments.store.tables import conversations, items, responses, transcripts
from deployments.store.usage import Accounts, Freed, remove

_BATCH = 500  # ids in one statement; drivers limit its parameters
_MAX_LEVELS = 64  # of a chain in one transaction, so that no other waits long for it


async def hide_old(connection: AsyncConnection, cutoff: float) -> int:
    """Hides responses created and conversations last used before `cutoff`, unless they run; returns how many.

    cutoff: in Unix seconds.
    """
    old = await connection.execute(
        update(responses).where(responses.c.created_at < cutoff, ~responses.c.deleted, ~IS_RUNNING).values(deleted=True)
    )
    busy = select(responses.c.id).where(responses.c.conversation_id == conversations.c.id, IS_RUNNING).exists()
    unused = await connection.execute(
        update(conversations)
        .where(conversations.c.used_at < cutoff, ~conversations.c.deleted, ~busy)
        .values(deleted=True, tip_response_id=None)
    )
    return old.rowcount + unused.rowcount


async def purge(database: Database, accounts: Accounts, response_ids: Collection[str]) -> None:
    """Removes those of these deleted responses that can go, and what they continued, in short transactions.

    One that does not come to pass is made up for by the next `delete_older_than`.
    """
    while response_ids:
        response_ids = await database.write(partial(_purge_above, accounts=accounts, response_ids=response_ids))


async def _purge_above(connection: AsyncConnection, accounts: Accounts, response_ids: Collection[str]) -> list[str]:
    """Removes those of these responses that can go, then what they continued, and so on.

    Returns where to go on in another transaction; empty = done.
    """
    candidates, freed = list(response_ids), Freed()
    for _ in range(_MAX_LEVELS):
        if not candidates:
            break
        candidates = await _purge_level(connection, freed, candidates[:_BATCH]) + candidates[_BATCH:]
    await accounts.free(connection, freed)
    return candidates


async def find_purgeable(connection: AsyncConnection) -> list[str]:
    """Some of the deleted responses that can go. A crash between two transactions leaves such."""
    return list(await connection.scalars(select(responses.c.id).where(_is_purgeable()).limit(_BATCH)))


async def purge_conversations(
    connection: AsyncConnection, accounts: Accounts, conversation_ids: Collection[str] | None = None
) -> int:
    """Removes deleted conversations, of these or of all, whose last response is gone. Returns how many."""
    freed = Freed()
    num_removed = await _purge_conversations(connection, freed, conversation_ids)
    await accounts.free(connection, freed)
    return num_removed


async def _purge_conversations(
    connection: AsyncConnection, freed: Freed, conversation_ids: Collection[str] | None
) -> int:
    empty = and_(
        conversations.c.deleted,
        ~exists(select(responses.c.id).where(responses.c.conversation_id == conversations.c.id)),
    )
    if conversation_ids is not None:
        empty &= conversations.c.id.in_(conversation_ids)
    found = await connection.execute(select(conversations.c.id, conversations.c.tenant).where(empty).limit(_BATCH))
    tenant_of = {row.id: row.tenant for row in found}
    for table, owner in ((items, items.c.conversation_id), (conversations, conversations.c.id)):
        await remove(connection, table, owner.in_(tenant_of), owner, tenant_of, freed)
    return len(tenant_of)


def _is_purgeable() -> ColumnElement[bool]:
    child, later = responses.alias("child"), transcripts.alias("later")
    return and_(
        responses.c.deleted,
        ~exists(select(child.c.id).where(child.c.previous_response_id == responses.c.id)),
        ~exists(select(later.c.response_id).where(later.c.parent_id == responses.c.id)),
        ~exists(select(conversations.c.id).where(conversations.c.tip_response_id == responses.c.id)),
    )


async def _purge_level(connection: AsyncConnection, freed: Freed, candidates: Collection[str]) -> list[str]:
    rows = await connection.execute(
        select(
            responses.c.id,
            responses.c.tenant,
            responses.c.previous_response_id,
            responses.c.conversation_id,
            transcripts.c.parent_id,
        )
        .outerjoin(transcripts, transcripts.c.response_id == responses.c.id)
        .where(responses.c.id.in_(candidates), _is_purgeable())
    )
    gone = rows.all()
    if not gone:
        return []
    tenant_of = {row.id: row.tenant for row in gone}
    owner = items.c.response_id
    alone = and_(owner.in_(tenant_of), items.c.conversation_id.is_(None))
    await remove(connection, items, alone, owner, tenant_of, freed)
    await connection.execute(update(items).where(owner.in_(tenant_of)).values(response_id=None))
    for table, owner in ((transcripts, transcripts.c.response_id), (responses, responses.c.id)):
        await remove(connection, table, owner.in_(tenant_of), owner, tenant_of, freed)
    if in_conversations := {row.conversation_id for row in gone if row.conversation_id is not None}:
        await _purge_conversations(connection, freed, in_conversations)
    above = {row.previous_response_id for row in gone} | {row.parent_id for row in gone}
    return [response_id for response_id in above if response_id is not None]
