"""The rows of items, which belong to a response, to a conversation, or to both. Works in a transaction of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, and_, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.errors import NotFoundError
from deployments.store.history import to_items
from deployments.store.tables import conversations, items, responses
from deployments.store.values import NewItem, Order, Page, StoredItem
from engine.errors import InvalidParameterError

_MAX_ID_LEN = 256
_MAX_IDS = 1000  # in one query


def name_items(new_items: Sequence[NewItem], new_id: Callable[[str], str]) -> tuple[StoredItem, ...]:
    return tuple(StoredItem(item.id or new_id("msg"), item.role, dict(item.body)) for item in new_items)


def refuse_odd_id(an_id: str, param: str | None = None) -> None:
    """Raises NotFoundError for what cannot be an id of ours.

    Ids come from URLs and bodies, and PostgreSQL rejects some characters.
    """
    if not is_plain_id(an_id):
        raise NotFoundError("no object has this id", param)


def is_plain_id(an_id: str) -> bool:
    """Whether it can be an id of ours."""
    return 0 < len(an_id) <= _MAX_ID_LEN and an_id.isascii() and an_id.isprintable()


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


async def find_items(
    connection: AsyncConnection, tenant: str, ids: Sequence[str], max_bytes: int
) -> tuple[StoredItem, ...] | None:
    """A tenant's items wherever they are, in this order; None if their bodies are larger together.

    Raises NotFoundError for an id that the tenant does not have.
    """
    for item_id in ids:
        refuse_odd_id(item_id, "input")
    found: dict[str, StoredItem] = {}
    for start in range(0, len(ids), _MAX_IDS):
        inside = items.c.id.in_(ids[start : start + _MAX_IDS])
        size = await connection.scalar(
            _of_tenant(select(func.sum(func.length(items.c.body), type_=Integer)), tenant).where(inside)
        )
        max_bytes -= size or 0
        if max_bytes < 0:
            return None
        rows = await connection.execute(
            _of_tenant(select(items.c.id, items.c.role, items.c.body), tenant).where(inside)
        )
        found |= {item.id: item for item in to_items(rows)}
    for item_id in ids:
        if item_id not in found:
            raise NotFoundError(f"no item has the id {item_id!r}", "input")
    return tuple(found[item_id] for item_id in ids)


async def find_session(connection: AsyncConnection, tenant: str, item_id: str) -> str | None:
    """The session of the response, or the conversation, that an item belongs to; None if the tenant has no such item."""
    session = func.coalesce(responses.c.session_key, items.c.conversation_id)
    found: str | None = await connection.scalar(_of_tenant(select(session), tenant).where(items.c.id == item_id))
    return found


def _of_tenant(query: Select[Any], tenant: str) -> Select[Any]:
    """Only what belongs to something of the tenant's that is not deleted."""
    in_response = and_(responses.c.tenant == tenant, ~responses.c.deleted)
    in_conversation = and_(conversations.c.tenant == tenant, ~conversations.c.deleted)
    return (
        query.select_from(items)
        .outerjoin(responses, responses.c.id == items.c.response_id)
        .outerjoin(conversations, conversations.c.id == items.c.conversation_id)
        .where(or_(in_response, in_conversation))
    )
