"""How much each tenant keeps in the store, and that it is no more than its quota.

Each tenant has an account, a row that changes in the transaction that changes what it counts: exact, however many
processes write.

Rows of conversations, responses, items and transcripts count, each with its long columns and ROW_BYTES for the rest:
keys, indexes, and the short columns that are filled in later. Works inside a transaction of the caller's, at its end,
because the account is locked from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Integer, Table, delete, func, literal_column, select, text, union_all, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.database import Database
from deployments.store.errors import StoredTooMuchError
from deployments.store.tables import conversations, items, responses, tenant_usage, transcripts
from deployments.store.values import Quota

# About what SQLite takes for a row of ours besides, measured over turns of a few words; as the migrations count.
ROW_BYTES = 512


@dataclass(frozen=True, slots=True)
class Usage:
    num_rows: int = 0
    num_bytes: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.num_rows + other.num_rows, self.num_bytes + other.num_bytes)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.num_rows - other.num_rows, self.num_bytes - other.num_bytes)

    def __neg__(self) -> Usage:
        return Usage() - self


Freed = dict[str, Usage]  # by tenant


async def measure(connection: AsyncConnection, *parts: tuple[Table, ColumnElement[bool]]) -> Usage:
    """What these rows take: (table, condition)."""
    counts = [
        select(func.count(), func.coalesce(func.sum(_num_bytes(table)), 0)).select_from(table).where(inside)
        for table, inside in parts
    ]
    rows = (await connection.execute(union_all(*counts))).all()
    return Usage(sum(int(row[0]) for row in rows), sum(int(row[1]) for row in rows))


async def remove(
    connection: AsyncConnection,
    table: Table,
    inside: ColumnElement[bool],
    owner: ColumnElement[str],
    tenant_of: Mapping[str, str],
    freed: Freed,
) -> None:
    """Deletes these rows, and notes in `freed` what they took.

    Rows that another process deletes at the same time are not counted.

    owner: the column with the id that `tenant_of` knows.
    """
    gone = await connection.execute(delete(table).where(inside).returning(owner, _num_bytes(table)))
    for owner_id, num_bytes in gone:
        tenant = tenant_of[owner_id]
        freed[tenant] = freed.get(tenant, Usage()) + Usage(1, num_bytes)


class Accounts:
    """quota_of: tenant -> what it may keep."""

    def __init__(self, database: Database, quota_of: Callable[[str], Quota]) -> None:
        self._database = database
        self._quota_of = quota_of

    async def add(self, connection: AsyncConnection, tenant: str, change: Usage, *, is_refusable: bool = True) -> None:
        """Books a change; one that may be rejected raises StoredTooMuchError above the quota.

        Or StoreFullError if the disk is nearly full; the caller's transaction is undone then. The end of a turn is not
        rejected: its answer is there, and was paid for.
        """
        total = await _book(connection, tenant, change)
        if is_refusable and (change.num_rows > 0 or change.num_bytes > 0):
            _refuse_if_above(self._quota_of(tenant), total)
            await self._database.refuse_if_nearly_full(connection)

    async def free(self, connection: AsyncConnection, freed: Freed) -> None:
        """Book what was removed."""
        for tenant in sorted(freed):  # in one order everywhere: each of these rows is locked
            await _book(connection, tenant, -freed[tenant])


async def read_usage(connection: AsyncConnection, tenant: str) -> Usage:
    query = select(tenant_usage.c.num_rows, tenant_usage.c.num_bytes).where(tenant_usage.c.tenant == tenant)
    row = (await connection.execute(query)).one_or_none()
    return Usage() if row is None else Usage(row.num_rows, row.num_bytes)


async def _book(connection: AsyncConnection, tenant: str, change: Usage) -> Usage:
    booking = (
        update(tenant_usage)
        .where(tenant_usage.c.tenant == tenant)
        .values(
            num_rows=tenant_usage.c.num_rows + change.num_rows, num_bytes=tenant_usage.c.num_bytes + change.num_bytes
        )
        .returning(tenant_usage.c.num_rows, tenant_usage.c.num_bytes)
    )
    row = (await connection.execute(booking)).one_or_none()
    if row is None:  # its first; two processes may be here at once
        opening = "INSERT INTO tenant_usage VALUES (:tenant, 0, 0) ON CONFLICT (tenant) DO NOTHING"
        await connection.execute(text(opening), {"tenant": tenant})
        row = (await connection.execute(booking)).one()
    return Usage(row.num_rows, row.num_bytes)


def _refuse_if_above(quota: Quota, total: Usage) -> None:
    for what, option, used, limit in (
        ("bytes", "max_stored_bytes", total.num_bytes, quota.max_bytes),
        ("rows", "max_stored_rows", total.num_rows, quota.max_rows),
    ):
        if limit is not None and used > limit:
            raise StoredTooMuchError(
                f"this tenant would keep {used} {what} in the conversation store and may keep {limit}: delete responses and "
                f"conversations, send store: false, or have the operator raise {option}"
            )


def _num_bytes(table: Table) -> ColumnElement[int]:
    """Of a row."""
    columns = {
        conversations: (conversations.c.metadata,),
        responses: (responses.c.params, responses.c.instructions),
        items: (items.c.body,),
        transcripts: (transcripts.c.token_ids, transcripts.c.text, transcripts.c.anchors),
    }[table]
    size: ColumnElement[int] = literal_column(str(ROW_BYTES), Integer)
    for column in columns:
        # JSON is ASCII here, so that characters are bytes.
        size = size + func.coalesce(func.length(column, type_=Integer), 0)
    return size
