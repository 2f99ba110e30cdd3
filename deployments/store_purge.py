"""Removes what was deleted once nothing that lives depends on it. A deleted response is hidden at once, but its rows stay
while a later response continues it, or a conversation's next turn would. Works inside a transaction of the caller's.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, and_, delete, exists, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store_schema import conversations, items, responses, transcripts

_BATCH = 500  # ids in one statement; drivers limit its parameters
_MAX_LEVELS = 64  # of a chain in one transaction, so that nobody waits long for it


async def purge_above(connection: AsyncConnection, response_ids: Collection[str]) -> list[str]:
    """Removes those of these responses that can go, then what they continued, and so on. Returns where to go on in
    another transaction; empty = done."""
    candidates = list(response_ids)
    for _ in range(_MAX_LEVELS):
        if not candidates:
            break
        candidates = await _purge_level(connection, candidates[:_BATCH]) + candidates[_BATCH:]
    return candidates


async def find_purgeable(connection: AsyncConnection) -> list[str]:
    """Some of the deleted responses that can go. A crash between two transactions leaves such."""
    return list(await connection.scalars(select(responses.c.id).where(_is_purgeable()).limit(_BATCH)))


async def purge_conversations(connection: AsyncConnection, conversation_ids: Collection[str] | None = None) -> int:
    """Removes deleted conversations, of these or of all, whose last response is gone. Returns how many."""
    empty = and_(
        conversations.c.deleted,
        ~exists(select(responses.c.id).where(responses.c.conversation_id == conversations.c.id)),
    )
    if conversation_ids is not None:
        empty &= conversations.c.id.in_(conversation_ids)
    ids = list(await connection.scalars(select(conversations.c.id).where(empty).limit(_BATCH)))
    if ids:
        await connection.execute(delete(items).where(items.c.conversation_id.in_(ids)))
        await connection.execute(delete(conversations).where(conversations.c.id.in_(ids)))
    return len(ids)


def _is_purgeable() -> ColumnElement[bool]:
    child, later = responses.alias("child"), transcripts.alias("later")
    return and_(
        responses.c.deleted,
        ~exists(select(child.c.id).where(child.c.previous_response_id == responses.c.id)),
        ~exists(select(later.c.response_id).where(later.c.parent_id == responses.c.id)),
        ~exists(select(conversations.c.id).where(conversations.c.tip_response_id == responses.c.id)),
    )


async def _purge_level(connection: AsyncConnection, candidates: Collection[str]) -> list[str]:
    rows = await connection.execute(
        select(responses.c.id, responses.c.previous_response_id, responses.c.conversation_id, transcripts.c.parent_id)
        .outerjoin(transcripts, transcripts.c.response_id == responses.c.id)
        .where(responses.c.id.in_(candidates), _is_purgeable())
    )
    gone = rows.all()
    if not gone:
        return []
    ids = [row.id for row in gone]
    inside = items.c.response_id.in_(ids)
    await connection.execute(delete(items).where(inside, items.c.conversation_id.is_(None)))
    await connection.execute(update(items).where(inside).values(response_id=None))
    await connection.execute(delete(transcripts).where(transcripts.c.response_id.in_(ids)))
    await connection.execute(delete(responses).where(responses.c.id.in_(ids)))
    if in_conversations := {row.conversation_id for row in gone if row.conversation_id is not None}:
        await purge_conversations(connection, in_conversations)
    above = {row.previous_response_id for row in gone} | {row.parent_id for row in gone}
    return [response_id for response_id in above if response_id is not None]
