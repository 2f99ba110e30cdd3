"""What a tenant may keep: the limit holds exactly, over processes, and frees itself as things are deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from deployments.http.errors import wire_of
from deployments.store.conversation_store import ConversationStore
from deployments.store.errors import StoredTooMuchError
from deployments.store.usage import ROW_BYTES, Usage
from deployments.store.values import Quota
from tests.deployments.store.stored_turns import (
    ME,
    NOW,
    OTHER,
    count_rows,
    message,
    new_response,
    outcome,
    transcript,
    turn,
)

QUOTAS = {ME: Quota(max_rows=12, max_bytes=20_000)}


def quota_of(tenant: str) -> Quota:
    return QUOTAS.get(tenant, Quota())


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[ConversationStore]:
    store = ConversationStore(store_url, quota_of=quota_of)
    await store.open(NOW)
    yield store
    await store.close()


async def refused(call: Awaitable[object]) -> str:
    with pytest.raises(StoredTooMuchError) as caught:
        await call
    assert wire_of(caught.value)[:2] == (429, "insufficient_quota")
    assert wire_of(caught.value).code == "storage_quota_exceeded"
    assert caught.value.retry_after_s is None
    return caught.value.message


async def test_bytes(store: ConversationStore, store_url: str) -> None:
    item = message("user", "x" * 8000)
    talk = await store.conversations.create(ME, {}, [item], NOW)
    usage = await store.usage(ME)
    assert usage == Usage(2, 2 * ROW_BYTES + 2 + len('{"type":"message","role":"user","content":""}') + 8000)
    await store.conversations.add_items(ME, talk.id, [message("user", "x" * 8000)], NOW)
    full = await store.usage(ME)
    calls: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: store.conversations.create(ME, {}, [item], NOW),
        lambda: store.conversations.add_items(ME, talk.id, [item], NOW),
        lambda: store.conversations.update(ME, talk.id, {"k": "x" * 9000}, NOW),
        lambda: store.begin_response(ME, new_response("a", "x" * 8000, conversation_id=talk.id), NOW),
        lambda: store.begin_response(ME, new_response("a", "x", instructions="x" * 8000), NOW),
    )
    for call in calls:
        message_ = await refused(call())
        assert "may keep 20000: delete responses and conversations" in message_
        assert "max_stored_bytes" in message_
    assert await store.usage(ME) == full
    await turn(store, "b", said="x" * 8000, tenant=OTHER)  # whose account is another one
    await store.conversations.update(ME, talk.id, {"k": "x"}, NOW)
    await store.conversations.delete(ME, talk.id)
    assert await store.usage(ME) == Usage()
    await turn(store, "a", said="x" * 8000)
    await count_rows(store_url)


async def test_rows(store: ConversationStore, store_url: str) -> None:
    for name in ("a", "b", "c", "d"):
        await turn(store, name)
    assert "12: delete" in await refused(store.begin_response(ME, new_response("e"), NOW))
    await store.delete_response(ME, "a", NOW)
    await turn(store, "e")
    await store.delete_older_than(NOW + 1)
    assert await store.usage(ME) == Usage()
    assert await count_rows(store_url) == [0, 0, 0, 0]


async def test_a_turn_that_began_is_stored_whole(store: ConversationStore, store_url: str) -> None:
    """Its answer was computed, and its client waits for it: it may end above the limit, and the next one is refused."""
    await store.begin_response(ME, new_response("a"), NOW)
    await store.begin_response(ME, new_response("b"), NOW)
    for name in ("a", "b"):
        assert await store.complete_response(ME, name, outcome("x" * 15_000, transcript("hi" + "x" * 1000)))
    assert (await store.usage(ME)).num_bytes > 30_000
    await refused(store.begin_response(ME, new_response("c"), NOW))
    assert (await count_rows(store_url))[2] == 2


async def test_the_limit_is_one_over_several_processes(store: ConversationStore, store_url: str) -> None:
    others = [ConversationStore(store_url, quota_of=quota_of) for _ in range(3)]
    for other in others:
        await other.open(NOW)
    stores = [store, *others]
    begun = await asyncio.gather(
        *(stores[i % 4].begin_response(ME, new_response(f"r{i}"), NOW) for i in range(16)), return_exceptions=True
    )
    assert sum(isinstance(result, StoredTooMuchError) for result in begun) == 10
    assert sum(not isinstance(result, BaseException) for result in begun) == 6  # of 2 rows each
    assert await store.usage(ME) == Usage(
        12, 12 * ROW_BYTES + 6 * len('{}{"type":"message","role":"user","content":"hi"}')
    )
    for other in others:
        await other.close()


async def test_deleting_in_several_processes_frees_once(store: ConversationStore, store_url: str) -> None:
    other = ConversationStore(store_url)
    await other.open(NOW)
    for number in range(30):
        await turn(store, f"r{number}", tenant=OTHER, previous_response_id=f"r{number - 1}" if number else None)
    await asyncio.gather(*(each.delete_older_than(NOW + 1) for each in (store, other, store, other)))
    assert await count_rows(store_url) == [0, 0, 0, 0]
    assert await store.usage(OTHER) == Usage()
    await other.close()
