"""Turns for the tests of the conversation store, in few words, and what is left of them in the database."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.http.errors import wire_of
from deployments.store.conversation_store import ConversationStore
from deployments.store.database import Database
from deployments.store.errors import StoreError
from deployments.store.tables import conversations, items, responses, tenant_usage, transcripts
from deployments.store.usage import ROW_BYTES, Usage
from deployments.store.values import NewItem, NewResponse, Outcome, StoredItem
from engine.text.transcript import Transcript

NOW, LEASE_S = 1000.0, 30.0
ME, OTHER = "me", "other"
FINGERPRINT = "tokenizer-1"
USAGE = {"input_tokens": 3, "output_tokens": 2}


def message(role: str, content: str, item_id: str | None = None) -> NewItem:
    return NewItem(role, {"type": "message", "role": role, "content": content}, item_id)


def new_response(response_id: str, *texts: str, **options: Any) -> NewResponse:
    inputs = [message("user", content) for content in texts or ("hi",)]
    return NewResponse(response_id, "tiny", inputs, "boot-1", NOW + LEASE_S, **options)


def transcript(text_: str, *anchors: int) -> Transcript:
    """One token per character; anchors by their number of characters."""
    return Transcript(array("I", map(ord, text_)), text_, tuple((n, n) for n in anchors), FINGERPRINT)


def outcome(answer: str = "yes", transcript: Transcript | None = None, **options: Any) -> Outcome:
    return Outcome([message("assistant", answer)], USAGE, transcript, NOW + 1, **options)


async def turn(
    store: ConversationStore,
    response_id: str,
    said: str = "hi",
    answer: str = "yes",
    known: Transcript | None = None,
    tenant: str = ME,
    **options: Any,
) -> None:
    await store.begin_response(tenant, new_response(response_id, said, **options), NOW)
    assert await store.complete_response(tenant, response_id, outcome(answer, known))


def contents(found: tuple[StoredItem, ...]) -> list[str]:
    return [item.body["content"] for item in found]


async def count_rows(url: str) -> list[int]:
    """Rows in conversations, items, responses, transcripts. Each tenant's account says the same, and as many bytes."""
    database = Database(url, 5.0)
    try:
        return await database.read(_count_rows)
    finally:
        await database.close()


async def _count_rows(connection: AsyncConnection) -> list[int]:
    found = [
        (await connection.execute(select(table))).all() for table in (conversations, items, responses, transcripts)
    ]
    tenant_of = {row.id: row.tenant for row in (*found[0], *found[2])}
    counted: dict[str, Usage] = {}
    for kind, rows in enumerate(found):
        for row in rows:
            if kind == 0:
                tenant, long = row.tenant, [row.metadata]
            elif kind == 1:
                tenant, long = tenant_of[row.response_id or row.conversation_id], [row.body]
            elif kind == 2:
                tenant, long = row.tenant, [row.params] + ([] if row.instructions is None else [row.instructions])
            else:
                tenant, long = tenant_of[row.response_id], [row.token_ids, row.text, row.anchors]
            lengths = [len(x if isinstance(x, bytes) else json.dumps(x, separators=(",", ":"))) for x in long]
            counted[tenant] = counted.get(tenant, Usage()) + Usage(1, ROW_BYTES + sum(lengths))
    booked = {row.tenant: Usage(row.num_rows, row.num_bytes) for row in await connection.execute(select(tenant_usage))}
    assert {tenant: usage for tenant, usage in booked.items() if usage != Usage()} == counted
    return [len(rows) for rows in found]


async def assert_unavailable(store: ConversationStore, code: str = "store_unavailable") -> StoreError:
    with pytest.raises(StoreError) as caught:
        await store.ping()
    for call in (
        store.begin_response(ME, new_response("lost"), NOW),
        store.get_history(ME, previous_response_id="a"),
    ):
        with pytest.raises(StoreError) as also:
            await call
        assert wire_of(also.value).code == code
    assert wire_of(caught.value)[::2] == (503, code)
    return caught.value
