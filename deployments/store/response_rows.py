"""The rows of responses: found, read, and brought to their end. Works inside a transaction of the caller's."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.errors import (
    NotFoundError,
    PreviousResponseError,
    PreviousResponseNotFoundError,
    StoreCorruptedError,
)
from deployments.store.item_rows import refuse_odd_id
from deployments.store.leases import IS_RUNNING
from deployments.store.tables import items, responses
from deployments.store.values import INTERRUPTED, Status, StoredItem, StoredResponse


async def insert_response(
    connection: AsyncConnection,
    tenant: str,
    begun: StoredResponse,
    owner: str,
    lease_until: float,
    *,
    conversation_start: int | None,
) -> None:
    """Inserts a response that is in progress, without its items. owner, lease_until: see NewResponse."""
    await connection.execute(
        insert(responses).values(
            id=begun.id,
            tenant=tenant,
            conversation_id=begun.conversation_id,
            conversation_start=conversation_start,
            previous_response_id=begun.previous_response_id,
            session_key=begun.session_key,
            model=begun.model,
            created_at=begun.created_at,
            status=begun.status,
            instructions=begun.instructions,
            params=begun.params,
            owner=owner,
            lease_until=lease_until,
            deleted=False,
        )
    )


async def find_response(connection: AsyncConnection, tenant: str, response_id: str, *, lock: bool = False) -> Row[Any]:
    """lock: it is not deleted until the transaction ends."""
    refuse_odd_id(response_id)
    query = select(responses).where(responses.c.id == response_id, responses.c.tenant == tenant, ~responses.c.deleted)
    row = (await connection.execute(query.with_for_update(read=True) if lock else query)).one_or_none()
    if row is None:
        raise NotFoundError(f"no response has the id {response_id!r}")
    return row


async def find_previous(connection: AsyncConnection, tenant: str, response_id: str, *, lock: bool = False) -> Row[Any]:
    try:
        row = await find_response(connection, tenant, response_id, lock=lock)
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


async def finish(connection: AsyncConnection, tenant: str, response_id: str, **values: Any) -> bool:
    """Whether it was in progress; then it has these values now."""
    result = await connection.execute(
        update(responses)
        .where(responses.c.id == response_id, responses.c.tenant == tenant, ~responses.c.deleted, IS_RUNNING)
        .values(**values)
    )
    return result.rowcount == 1


def _status(name: str) -> Status:
    try:
        return Status(name)
    except ValueError:
        raise StoreCorruptedError from None


async def read_response(connection: AsyncConnection, tenant: str, response_id: str) -> StoredResponse:
    return (await read_response_and_lease(connection, tenant, response_id))[0]


async def read_response_and_lease(
    connection: AsyncConnection, tenant: str, response_id: str
) -> tuple[StoredResponse, float]:
    row = await find_response(connection, tenant, response_id)
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
