"""The rows of items, which belong to a response, to a conversation, or to both. Works in a transaction of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import ColumnElement, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.errors import NotFoundError
from deployments.store.history import to_items
from deployments.store.tables import items
from deployments.store.values import NewItem, Order, Page, StoredItem
from engine.errors import InvalidParameterError

_MAX_ID_LEN = 256


def name_items(new_items: Sequence[NewItem], new_id: Callable[[str], str]) -> tuple[StoredItem, ...]:
    return tuple(StoredItem(item.id or new_id("msg"), item.role, dict(item.body)) for item in new_items)


def refuse_odd_id(an_id: str, param: str | None = None) -> None:
    """Raises NotFoundError for what cannot be an id of ours.

    Ids come from URLs and bodies, and PostgreSQL rejects some characters.
    """
    if not (0 < len(an_id) <= _MAX_ID_LEN and an_id.isascii() and an_id.isprintable()):
        raise NotFoundError("no object has this id", param)


async def insert_items(
    connection: AsyncConnection,
    named: Sequence[StoredItem],
    *,
    response_id: str | None = None,
    is_output: bool = False,
    conversation: tuple[str, int] | None = None,
) -> None:
    """conversation: (id, position of the first one in it)."""
    conversation_id, start = conversation or (None, 0)
    rows = [
        {
            "id": item.id,
            "response_id": response_id,
            "is_output": is_output,
            "position": position,
            "conversation_id": conversation_id,
            "conversation_position": None if conversation_id is None else start + position,
            "role": item.role,
            "body": item.body,
        }
        for position, item in enumerate(named)
    ]
    if rows:
        await connection.execute(insert(items), rows)


async def read_page(
    connection: AsyncConnection,
    inside: ColumnElement[bool],
    position: ColumnElement[int],
    after: str | None,
    limit: int,
    order: Order,
) -> Page:
    """Up to `limit` of the items `inside`, those after the item `after` in that order.

    Raises InvalidParameterError if `after` is not one of them.
    """
    descending = order == "desc"
    query = select(items.c.id, items.c.role, items.c.body).where(inside)
    if after is not None:
        refuse_odd_id(after, "after")
        start = await connection.scalar(select(position).where(inside, items.c.id == after))
        if start is None:
            raise InvalidParameterError(f"'after' must be the id of an item in this list, not {after!r}", "after")
        query = query.where(position < start if descending else position > start)
    query = query.order_by(position.desc() if descending else position.asc()).limit(limit + 1)
    found = to_items(await connection.execute(query))
    return Page(found[:limit], len(found) > limit)


async def find_item(connection: AsyncConnection, conversation_id: str, item_id: str) -> StoredItem:
    refuse_odd_id(item_id)
    query = select(items).where(items.c.id == item_id, items.c.conversation_id == conversation_id)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFoundError(f"the conversation {conversation_id!r} has no item {item_id!r}")
    return StoredItem(row.id, row.role, row.body)
