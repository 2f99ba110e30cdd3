"""The conversation store on SQLite and on PostgreSQL: what it keeps, who may see it, what is left after a crash."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from deployments.http.errors import wire_of
from deployments.store.conversation_store import ConversationStore
from deployments.store.database import Database
from deployments.store.errors import (
    ConversationBusyError,
    NotFoundError,
    PreviousResponseError,
    PreviousResponseNotFoundError,
    StoreConfigError,
    StoreUnavailableError,
    StoreVersionError,
)
from deployments.store.tables import metadata
from deployments.store.transcript_delta import apply_deltas, make_delta
from deployments.store.values import NewItem, NewResponse, Outcome, Status, StoredItem, StoredResponse
from engine.errors import InvalidParameterError
from engine.text.transcript import Transcript
from tests.deployments.store.stored_turns import (
    FINGERPRINT,
    LEASE_S,
    ME,
    NOW,
    OTHER,
    USAGE,
    assert_unavailable,
    contents,
    count_rows,
    message,
    new_response,
    outcome,
    transcript,
    turn,
)

ROOT = Path(__file__).parents[3]
# What clients and models do send, and what PostgreSQL's own types would refuse.
ODD_TEXT = 'a\x00b\ud800"é\U0001f600'


def counting_ids() -> Callable[[str], str]:
    numbers = itertools.count(1)
    return lambda prefix: f"{prefix}_{next(numbers)}"


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[ConversationStore]:
    store = ConversationStore(store_url, new_id=counting_ids())
    await store.open(NOW)
    yield store
    await store.close()


async def said_in(store: ConversationStore, conversation_id: str) -> list[str]:
    return contents((await store.get_history(ME, conversation_id=conversation_id)).items)


# A response from begin to end


async def test_response_is_kept_as_given(store: ConversationStore) -> None:
    new = NewResponse(
        "resp_a",
        "tiny",
        [message("user", ODD_TEXT), NewItem(None, {"type": "reasoning", "summary": []})],
        "boot-1",
        NOW + LEASE_S,
        instructions=ODD_TEXT,
        params={"temperature": 0.5, "metadata": {"k": ODD_TEXT}},
    )
    begun = await store.begin_response(ME, new, NOW)
    assert begun == StoredResponse(
        id="resp_a",
        conversation_id=None,
        previous_response_id=None,
        session_key="resp_a",
        model="tiny",
        created_at=NOW,
        completed_at=None,
        status=Status.IN_PROGRESS,
        incomplete_reason=None,
        error=None,
        instructions=ODD_TEXT,
        params={"temperature": 0.5, "metadata": {"k": ODD_TEXT}},
        usage=None,
        input=(
            StoredItem("msg_1", "user", dict(new.input[0].body)),
            StoredItem("msg_2", None, dict(new.input[1].body)),
        ),
        output=(),
    )
    assert await store.get_response(ME, "resp_a", NOW) == begun
    known = transcript(ODD_TEXT, 1, 2)
    answer = message("assistant", ODD_TEXT, "msg_streamed")
    assert await store.complete_response(ME, "resp_a", Outcome([answer], USAGE, known, NOW + 1))
    done = await store.get_response(ME, "resp_a", NOW + 1000)
    assert done == replace(
        begun,
        status=Status.COMPLETED,
        completed_at=NOW + 1,
        usage=USAGE,
        output=(StoredItem("msg_streamed", "assistant", dict(answer.body)),),
    )
    history = await store.get_history(ME, previous_response_id="resp_a")
    assert history.items == done.input + done.output
    assert (history.transcript, history.session_key) == (known, "resp_a")


async def test_answer_cut_at_max_tokens_can_be_continued(store: ConversationStore) -> None:
    await store.begin_response(ME, new_response("a"), NOW)
    assert await store.complete_response(ME, "a", outcome(incomplete_reason="max_output_tokens"))
    found = await store.get_response(ME, "a", NOW)
    assert (found.status, found.incomplete_reason) == (Status.INCOMPLETE, "max_output_tokens")
    await turn(store, "b", previous_response_id="a")


async def test_completing_again_after_a_lost_answer(store: ConversationStore) -> None:
    """The caller cannot know whether a write took effect that ended in StoreUnavailableError."""
    created = await store.conversations.create(ME, {}, [], NOW)
    await store.begin_response(ME, new_response("a", conversation_id=created.id), NOW)
    assert await store.complete_response(ME, "a", outcome())
    assert await store.complete_response(ME, "a", outcome())
    assert await said_in(store, created.id) == ["hi", "yes"]
    assert not await store.complete_response(ME, "a", replace(outcome(), completed_at=NOW + 2))


async def test_cancelled_stays_cancelled(store: ConversationStore) -> None:
    created = await store.conversations.create(ME, {}, [], NOW)
    await store.begin_response(ME, new_response("a", conversation_id=created.id), NOW)
    assert await store.cancel_response(ME, "a", NOW + 1)
    assert not await store.cancel_response(ME, "a", NOW + 2)
    assert not await store.complete_response(ME, "a", outcome("yes", transcript("yes")))
    assert not await store.fail_response(ME, "a", {}, NOW + 2)
    found = await store.get_response(ME, "a", NOW + 2)
    assert (found.status, found.completed_at, found.output) == (Status.CANCELLED, NOW + 1, ())
    assert await said_in(store, created.id) == []
    with pytest.raises(PreviousResponseError, match="cancelled"):
        await store.begin_response(ME, new_response("b", previous_response_id="a"), NOW)


async def test_failed(store: ConversationStore) -> None:
    await store.begin_response(ME, new_response("a"), NOW)
    assert await store.fail_response(ME, "a", {"code": "executor_failed", "message": ODD_TEXT}, NOW + 1)
    found = await store.get_response(ME, "a", NOW + 1)
    assert (found.status, found.error) == (Status.FAILED, {"code": "executor_failed", "message": ODD_TEXT})
    assert not await store.fail_response(ME, "a", {}, NOW + 2)


async def test_previous_response_has_to_be_whole(store: ConversationStore) -> None:
    await turn(store, "a")
    await store.begin_response(ME, new_response("b", previous_response_id="a"), NOW)
    with pytest.raises(PreviousResponseError, match=r"in progress.*Wait") as caught:
        await store.get_history(ME, previous_response_id="b")
    assert (wire_of(caught.value).status, caught.value.param) == (400, "previous_response_id")
    assert await store.mark_interrupted(NOW + LEASE_S + 1) == 1
    with pytest.raises(PreviousResponseError, match=r"interrupted.*'a'"):
        await store.begin_response(ME, new_response("c", previous_response_id="b"), NOW)
    with pytest.raises(InvalidParameterError):
        await store.begin_response(ME, new_response("c", previous_response_id="a", conversation_id="conv"), NOW)
    with pytest.raises(ValueError, match="either"):
        await store.get_history(ME)


# Leases


async def test_interrupted_turn_is_marked_when_read(store: ConversationStore) -> None:
    created = await store.conversations.create(ME, {}, [], NOW)
    await store.begin_response(ME, new_response("a", conversation_id=created.id), NOW)
    assert (await store.get_response(ME, "a", NOW + LEASE_S)).status is Status.IN_PROGRESS
    found = await store.get_response(ME, "a", NOW + LEASE_S + 1)
    assert (found.status, found.incomplete_reason) == (Status.INCOMPLETE, "interrupted")
    assert contents(found.input) == ["hi"]
    assert not await store.complete_response(ME, "a", outcome())
    assert await said_in(store, created.id) == []


async def test_leases_are_renewed_for_what_is_running(store: ConversationStore) -> None:
    for name in ("a", "b", "c", "orphan"):
        await store.begin_response(ME, new_response(name), NOW)
    await store.begin_response(ME, replace(new_response("d"), owner="boot-2"), NOW)
    await store.cancel_response(ME, "c", NOW)
    assert await store.renew_leases("boot-1", NOW + 20, LEASE_S, []) == frozenset()
    assert await store.renew_leases("boot-1", NOW + 20, LEASE_S, ["a", "b", "c", "d", "none"]) == {"a", "b"}
    assert await store.mark_interrupted(NOW + 40) == 2  # the orphan, and boot-2's
    assert await store.mark_interrupted(NOW + 40, owner="boot-1") == 2
    assert (await store.get_response(ME, "a", NOW + 40)).incomplete_reason == "interrupted"


async def test_a_late_answer_counts_until_somebody_marks_the_turn(store: ConversationStore) -> None:
    """The database may have been away for longer than a lease."""
    await store.begin_response(ME, new_response("a"), NOW)
    assert await store.renew_leases("boot-1", NOW + 500, LEASE_S, ["a"]) == {"a"}
    assert await store.mark_interrupted(NOW + 500) == 0
    assert await store.complete_response(ME, "a", replace(outcome(), completed_at=NOW + 900))


async def test_cancelling_an_interrupted_turn(store: ConversationStore) -> None:
    await store.begin_response(ME, new_response("a"), NOW)
    assert not await store.cancel_response(ME, "a", NOW + LEASE_S + 1)
    assert (await store.get_response(ME, "a", NOW)).incomplete_reason == "interrupted"


async def test_opening_marks_interrupted_turns(store: ConversationStore, store_url: str) -> None:
    await store.begin_response(ME, new_response("a"), NOW)
    again = ConversationStore(store_url)
    await again.open(NOW + LEASE_S + 1)
    assert (await again.get_response(ME, "a", NOW)).status is Status.INCOMPLETE
    await again.close()


# Conversations


async def test_conversation(store: ConversationStore) -> None:
    created = await store.conversations.create(ME, {"topic": "x"}, [message("user", "1"), message("user", "2")], NOW)
    assert (created.id, created.created_at, created.metadata) == ("conv_1", NOW, {"topic": "x"})
    assert await store.conversations.get(ME, created.id) == created
    updated = await store.conversations.update(ME, created.id, {"topic": "y"}, NOW + 1)
    assert updated == await store.conversations.get(ME, created.id) == replace(created, metadata={"topic": "y"})
    (added,) = await store.conversations.add_items(ME, created.id, [message("user", "3")], NOW)
    assert await store.conversations.get_item(ME, created.id, added.id) == added
    await turn(store, "a", "4", "5", conversation_id=created.id)
    assert await said_in(store, created.id) == ["1", "2", "3", "4", "5"]
    assert await store.conversations.delete_item(ME, created.id, added.id, NOW) == updated
    first_input = (await store.get_response(ME, "a", NOW)).input[0]
    await store.conversations.delete_item(ME, created.id, first_input.id, NOW)
    assert await said_in(store, created.id) == ["1", "2", "5"]
    assert (await store.get_response(ME, "a", NOW)).input == (first_input,)
    for item_id in (added.id, first_input.id):
        with pytest.raises(NotFoundError):
            await store.conversations.get_item(ME, created.id, item_id)
    await turn(store, "b", "6", "7", conversation_id=created.id)
    assert await said_in(store, created.id) == ["1", "2", "5", "6", "7"]
    assert (await store.get_response(ME, "b", NOW)).session_key == created.id


async def test_one_turn_at_a_time_in_a_conversation(store: ConversationStore) -> None:
    created = await store.conversations.create(ME, {}, [message("user", "0")], NOW)
    (first,) = (await store.conversations.list_items(ME, created.id)).items
    await store.begin_response(ME, new_response("a", conversation_id=created.id), NOW)
    with pytest.raises(ConversationBusyError) as caught:
        await store.begin_response(ME, new_response("b", conversation_id=created.id), NOW + 1)
    assert wire_of(caught.value)[::2] == (409, "conversation_locked")
    with pytest.raises(ConversationBusyError):
        await store.conversations.add_items(ME, created.id, [message("user", "x")], NOW)
    with pytest.raises(ConversationBusyError):
        await store.conversations.delete_item(ME, created.id, first.id, NOW)
    with pytest.raises(NotFoundError):
        await store.get_response(ME, "b", NOW)
    late = NOW + LEASE_S + 1
    await store.begin_response(ME, replace(new_response("c", conversation_id=created.id), lease_until=late + 9), late)
    assert not await store.complete_response(ME, "a", outcome())
    assert await store.complete_response(ME, "c", outcome())
    await turn(store, "d", conversation_id=created.id)
    assert await said_in(store, created.id) == ["0", "hi", "yes", "hi", "yes"]


async def test_turns_at_once_in_one_conversation(store: ConversationStore) -> None:
    created = await store.conversations.create(ME, {}, [], NOW)
    begun = await asyncio.gather(
        *(store.begin_response(ME, new_response(f"r{i}", conversation_id=created.id), NOW) for i in range(8)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, StoredResponse) for result in begun) == 1
    assert sum(isinstance(result, ConversationBusyError) for result in begun) == 7


async def test_forks_run_at_once(store: ConversationStore) -> None:
    await turn(store, "root", "q", "a", transcript("qa"))
    names = [f"fork{i}" for i in range(6)]
    await asyncio.gather(
        *(turn(store, n, n, "x", transcript("qa" + n + "x"), previous_response_id="root") for n in names)
    )
    for name in names:
        history = await store.get_history(ME, previous_response_id=name)
        assert contents(history.items) == ["q", "a", name, "x"]
        assert (history.transcript, history.session_key) == (transcript("qa" + name + "x"), "root")


async def test_continuing_from_inside_a_conversation(store: ConversationStore) -> None:
    created = await store.conversations.create(ME, {}, [message("user", "0")], NOW)
    await turn(store, "a", "1", "2", transcript("012"), conversation_id=created.id)
    await turn(store, "b", "3", "4", transcript("01234"), conversation_id=created.id)
    await turn(store, "fork", "5", "6", transcript("01256"), previous_response_id="a")
    await store.conversations.delete(ME, created.id)
    history = await store.get_history(ME, previous_response_id="fork")
    assert contents(history.items) == ["0", "1", "2", "5", "6"]
    assert (history.transcript, history.session_key) == (transcript("01256"), created.id)
    assert contents((await store.get_history(ME, previous_response_id="b")).items) == ["0", "1", "2", "3", "4"]
    with pytest.raises(NotFoundError):
        await store.get_history(ME, conversation_id=created.id)


async def test_only_so_much_of_a_history_is_read(store: ConversationStore) -> None:
    """The newest items, whole, up to the one that reaches the limit; and the transcript only with all of them."""
    created = await store.conversations.create(ME, {}, [message("user", "0"), message("user", "1")], NOW)
    await turn(store, "a", "2", "3", transcript("0123"), conversation_id=created.id)
    await turn(store, "b", "4", "5", transcript("012345"), previous_response_id="a")
    await turn(store, "c", "6", "7", transcript("01234567"), previous_response_id="b")
    sizes = {role: len(f'{{"type":"message","role":"{role}","content":"0"}}') for role in ("user", "assistant")}
    everything = [str(number) for number in range(8)]
    for target, whole in (
        ({"conversation_id": created.id}, everything[:4]),
        ({"previous_response_id": "a"}, everything[:4]),
        ({"previous_response_id": "c"}, everything),
    ):
        found = await store.get_history(ME, **target)
        assert (contents(found.items), found.is_whole) == (whole, True)
        num_bytes = 0
        for num_kept, number in enumerate(reversed(whole)):
            for max_bytes in (num_bytes + 1, num_bytes + sizes["user"]):
                found = await store.get_history(ME, **target, max_bytes=max_bytes)
                assert contents(found.items) == whole[len(whole) - num_kept - 1 :]
                assert found.is_whole == (num_kept + 1 == len(whole))
                assert (found.transcript is None) == (not found.is_whole)
            num_bytes += sizes["assistant" if int(number) % 2 and number != "1" else "user"]


async def test_conversation_deleted_under_a_running_turn(store: ConversationStore, store_url: str) -> None:
    created = await store.conversations.create(ME, {}, [message("user", "0")], NOW)
    await turn(store, "a", "1", "2", transcript("012"), conversation_id=created.id)
    await store.begin_response(ME, new_response("b", "3", conversation_id=created.id), NOW)
    await store.conversations.delete(ME, created.id)
    await store.delete_response(ME, "a", NOW)
    assert await store.complete_response(ME, "b", outcome("4", transcript("01234")))
    history = await store.get_history(ME, previous_response_id="b")
    assert contents(history.items) == ["0", "1", "2", "3", "4"]
    assert history.transcript == transcript("01234")
    await store.delete_response(ME, "b", NOW)
    assert await count_rows(store_url) == [0, 0, 0, 0]


async def test_pages(store: ConversationStore) -> None:
    created = await store.conversations.create(ME, {}, [message("user", str(i)) for i in range(5)], NOW)
    names = [item.id for item in (await store.conversations.list_items(ME, created.id, order="asc")).items]

    async def page(after: str | None, limit: int, order: Any) -> tuple[list[str], bool]:
        found = await store.conversations.list_items(ME, created.id, after, limit, order)
        return contents(found.items), found.has_more

    assert await page(None, 2, "asc") == (["0", "1"], True)
    assert await page(names[1], 2, "asc") == (["2", "3"], True)
    assert await page(names[3], 2, "asc") == (["4"], False)
    assert await page(names[4], 2, "asc") == ([], False)
    assert await page(None, 2, "desc") == (["4", "3"], True)
    assert await page(names[3], 3, "desc") == (["2", "1", "0"], False)
    with pytest.raises(InvalidParameterError) as caught:
        await page("msg_unknown", 2, "asc")
    assert caught.value.param == "after"

    await store.begin_response(ME, new_response("a", "x", "y", "z"), NOW)
    assert await store.complete_response(ME, "a", outcome())
    first = await store.list_input_items(ME, "a", None, 2, "asc")
    assert (contents(first.items), first.has_more) == (["x", "y"], True)
    rest = await store.list_input_items(ME, "a", first.items[-1].id, 2, "asc")
    assert (contents(rest.items), rest.has_more) == (["z"], False)
    assert contents((await store.list_input_items(ME, "a")).items) == ["z", "y", "x"]


# Tenants


async def test_unknown_ids(store: ConversationStore) -> None:
    for odd_id in ("unknown", "", "a\x00b", "\ud800", "x" * 5000, "é"):
        await assert_nothing_there(store, ME, odd_id, odd_id, odd_id)


async def test_ids_of_another_tenant_are_unknown(store: ConversationStore, store_url: str) -> None:
    created = await store.conversations.create(ME, {}, [message("user", "0")], NOW)
    await turn(store, "a", conversation_id=created.id)
    await store.begin_response(ME, new_response("running"), NOW)
    (item, *_) = (await store.conversations.list_items(ME, created.id)).items
    before = await count_rows(store_url)
    await assert_nothing_there(store, OTHER, created.id, "a", item.id)
    await assert_nothing_there(store, OTHER, created.id, "running", item.id)
    assert await count_rows(store_url) == before
    assert (await store.get_response(ME, "running", NOW)).status is Status.IN_PROGRESS


async def assert_nothing_there(
    store: ConversationStore, tenant: str, conversation_id: str, response_id: str, item_id: str
) -> None:
    """Every way to name an id says 404, in words that do not depend on whose it is."""
    of_conversation, new = store.conversations, new_response("mine")
    calls = {
        "get": store.get_response(tenant, response_id, NOW),
        "cancel": store.cancel_response(tenant, response_id, NOW),
        "delete": store.delete_response(tenant, response_id, NOW),
        "input": store.list_input_items(tenant, response_id),
        "previous": store.begin_response(tenant, replace(new, previous_response_id=response_id), NOW),
        "history": store.get_history(tenant, previous_response_id=response_id),
        "conversation": store.begin_response(tenant, replace(new, conversation_id=conversation_id), NOW),
        "its history": store.get_history(tenant, conversation_id=conversation_id),
        "its get": of_conversation.get(tenant, conversation_id),
        "its update": of_conversation.update(tenant, conversation_id, {}, NOW),
        "its delete": of_conversation.delete(tenant, conversation_id),
        "its items": of_conversation.list_items(tenant, conversation_id),
        "its add": of_conversation.add_items(tenant, conversation_id, [], NOW),
        "its item": of_conversation.get_item(tenant, conversation_id, item_id),
        "its item's delete": of_conversation.delete_item(tenant, conversation_id, item_id, NOW),
    }
    for name, call in calls.items():
        with pytest.raises(NotFoundError) as caught:
            await call
        assert wire_of(caught.value).status == 404, name
        if name in ("previous", "history"):
            assert isinstance(caught.value, PreviousResponseNotFoundError)
            assert caught.value.param == "previous_response_id"
    if response_id.isalnum() and response_id.isascii() and len(response_id) < 100:
        assert not await store.complete_response(tenant, response_id, outcome())
        assert not await store.fail_response(tenant, response_id, {}, NOW)


# Deletion


async def test_deleted_response_is_gone_but_what_continues_it_is_not(store: ConversationStore, store_url: str) -> None:
    await turn(store, "a", "1", "2", transcript("12"))
    await turn(store, "b", "3", "4", transcript("1234"), previous_response_id="a")
    await turn(store, "c", "5", "6", transcript("123456"), previous_response_id="b")
    await store.delete_response(ME, "a", NOW)
    await store.delete_response(ME, "b", NOW)
    await assert_nothing_there(store, ME, "none", "b", "none")
    assert (await count_rows(store_url))[2] == 3
    history = await store.get_history(ME, previous_response_id="c")
    assert contents(history.items) == ["1", "2", "3", "4", "5", "6"]
    assert history.transcript == transcript("123456")
    await store.delete_response(ME, "c", NOW)
    assert await count_rows(store_url) == [0, 0, 0, 0]


async def test_deleting_a_running_response(store: ConversationStore, store_url: str) -> None:
    await turn(store, "a")
    await store.begin_response(ME, new_response("b", previous_response_id="a"), NOW)
    await store.delete_response(ME, "b", NOW)
    assert not await store.complete_response(ME, "b", outcome())
    assert await store.renew_leases("boot-1", NOW, LEASE_S, ["b"]) == frozenset()
    await store.delete_response(ME, "a", NOW)
    assert await count_rows(store_url) == [0, 0, 0, 0]


async def test_a_conversation_outlives_its_responses(store: ConversationStore, store_url: str) -> None:
    created = await store.conversations.create(ME, {}, [], NOW)
    await turn(store, "a", "1", "2", transcript("12"), conversation_id=created.id)
    await turn(store, "b", "3", "4", transcript("1234"), conversation_id=created.id)
    await store.delete_response(ME, "a", NOW)
    await store.delete_response(ME, "b", NOW)
    history = await store.get_history(ME, conversation_id=created.id)
    assert contents(history.items) == ["1", "2", "3", "4"]
    assert history.transcript == transcript("1234")
    await store.conversations.delete(ME, created.id)
    assert await count_rows(store_url) == [0, 0, 0, 0]


async def test_a_long_deleted_chain_goes_in_parts(store: ConversationStore, store_url: str) -> None:
    names = [f"r{i}" for i in range(70)]
    for before, name in zip([None, *names], names, strict=False):
        await turn(store, name, previous_response_id=before)
    for name in names:
        await store.delete_response(ME, name, NOW)
    assert await count_rows(store_url) == [0, 0, 0, 0]


async def test_retention(store: ConversationStore, store_url: str) -> None:
    old = await store.conversations.create(ME, {}, [message("user", "x")], NOW)
    await turn(store, "in-old", conversation_id=old.id)
    used = await store.conversations.create(ME, {}, [], NOW)
    await turn(store, "in-used", known=transcript("hiyes"), conversation_id=used.id)
    await turn(store, "a", "1", "2")
    await turn(store, "alone")
    await store.begin_response(ME, new_response("running"), NOW)
    later = NOW + 100
    await store.begin_response(ME, new_response("b", "3", previous_response_id="a"), later)
    await store.complete_response(ME, "b", replace(outcome("4"), completed_at=later))
    await store.conversations.update(ME, used.id, {}, later)
    assert await store.delete_older_than(NOW) == 0
    assert await store.delete_older_than(NOW + 50) == 5  # old, in-old, in-used, a, alone
    for name in ("in-old", "in-used", "a", "alone"):
        with pytest.raises(NotFoundError):
            await store.get_response(ME, name, NOW)
    assert contents((await store.get_history(ME, previous_response_id="b")).items) == ["1", "2", "3", "4"]
    assert (await store.get_history(ME, conversation_id=used.id)).transcript == transcript("hiyes")
    assert (await store.get_response(ME, "running", NOW)).status is Status.IN_PROGRESS
    assert await count_rows(store_url) == [1, 7, 4, 1]
    await store.mark_interrupted(later)
    assert await store.delete_older_than(later + 1) == 3
    assert await count_rows(store_url) == [0, 0, 0, 0]


# Transcripts and histories against a plain model


def test_delta_keeps_what_is_the_same() -> None:
    parent, child = transcript("one two", 3), transcript("one two three", 3, 7)
    delta = make_delta(parent, child)
    assert (delta.num_kept_tokens, delta.num_kept_chars, delta.num_kept_anchors) == (7, 7, 1)
    assert delta.token_ids[:4] == b" \0\0\0"
    assert (delta.text, delta.anchors) == (b" three", b"\7\0\0\0\7\0\0\0")
    assert apply_deltas([delta, make_delta(None, parent)], FINGERPRINT) == child


async def test_where_the_answer_begins_is_kept(store: ConversationStore) -> None:
    await turn(store, "a", known=replace(transcript("hiyes"), answer_start=(2, 2)))
    await turn(store, "b", known=transcript("hiyeshiyes"), previous_response_id="a")
    for response_id, start in (("a", (2, 2)), ("b", None)):
        known = (await store.get_history(ME, previous_response_id=response_id)).transcript
        assert known is not None
        assert known.answer_start == start


async def test_items_are_found_wherever_they_are(store: ConversationStore) -> None:
    talk = await store.conversations.create(ME, {}, [message("user", "0", "msg_0")], NOW)
    await turn(store, "a", conversation_id=talk.id)
    await turn(store, "b", tenant=OTHER)
    await turn(store, "c")
    in_a, in_b, in_c = [
        (await store.list_input_items(tenant, name)).items[0] for tenant, name in ((ME, "a"), (OTHER, "b"), (ME, "c"))
    ]
    out_a = (await store.get_response(ME, "a", NOW)).output[0]
    ids = [out_a.id, "msg_0", in_c.id, in_a.id]
    found = await store.find_items(ME, ids, 10_000)
    assert found is not None
    assert [item.id for item in found] == ids
    assert found[0] == out_a
    assert await store.find_items(ME, ids, 100) is None
    assert await store.find_items(ME, [], 0) == ()
    for unknown in (in_b.id, "msg_1", "", "x" * 300, "a\x00b"):
        with pytest.raises(NotFoundError):
            await store.find_items(ME, ["msg_0", unknown], 10_000)
        assert await store.find_session(ME, unknown) is None
    assert [await store.find_session(ME, item_id) for item_id in ids] == [talk.id, talk.id, "c", talk.id]
    await store.delete_response(ME, "c", NOW)
    assert await store.find_session(ME, in_c.id) is None
    await store.conversations.delete(ME, talk.id)
    assert await store.find_session(ME, "msg_0") is None
    assert await store.find_session(ME, out_a.id) == talk.id  # the response is still there


async def test_a_turn_that_continues_nothing_is_routed_by_its_name(store: ConversationStore) -> None:
    for session_key, expected in (("by name", "by name"), (None, "b")):
        name = "a" if session_key else "b"
        new = NewResponse(
            id=name,
            model="m",
            input=[message("user", "hi")],
            owner="this",
            lease_until=NOW + 10,
            session_key=session_key,
        )
        assert (await store.begin_response(ME, new, NOW)).session_key == expected
        assert await store.complete_response(ME, name, outcome())
        assert (await store.get_history(ME, previous_response_id=name)).session_key == expected


texts = st.text(alphabet="ab\x00\ud800é", max_size=6)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the data
@given(st.lists(st.tuples(st.integers(0, 12), texts, st.integers(0, 2)), min_size=1, max_size=8))
def test_deltas_give_back_the_transcript(steps: list[tuple[int, str, int]]) -> None:
    deltas, last = [], None
    for num_kept, added, num_anchors in steps:
        whole = ("" if last is None else last.text[:num_kept]) + added
        last, parent = transcript(whole, *range(1, min(num_anchors, len(whole)) + 1)), last
        deltas.insert(0, make_delta(parent, last))
    assert apply_deltas(deltas, FINGERPRINT) == last


@dataclass
class ModelTurn:
    """previous: the turn, or the conversation, that it continues."""

    own: list[str]
    known: Transcript | None
    previous: ModelTurn | None = None
    conversation: ModelConversation | None = None
    start: int = 0

    def said(self) -> list[str]:
        if self.previous is not None:
            return self.previous.said() + self.own
        before = [] if self.conversation is None else self.conversation.said(self.start)
        return before + self.own


@dataclass
class ModelConversation:
    slots: list[tuple[str, str] | None] = field(default_factory=list)  # (item id, content); None = taken out
    known: Transcript | None = None
    is_deleted: bool = False

    def said(self, end: int | None = None) -> list[str]:
        return [slot[1] for slot in self.slots[:end] if slot is not None]


KINDS = ["start", "continue", "continue", "converse", "converse", "add", "take out", "forget", "new", "end"]
ENDS = ["whole", "whole", "whole", "whole", "cut", "no transcript", "cancelled", "failed", "interrupted"]
steps = st.tuples(st.sampled_from(KINDS), st.sampled_from(ENDS), st.integers(0, 99), st.integers(0, 99), texts)
numbers = itertools.count()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(plan=st.lists(steps, min_size=1, max_size=25))
async def test_random_conversations_equal_a_plain_model(
    store: ConversationStore, store_url: str, plan: list[tuple[str, str, int, int, str]]
) -> None:
    tenant = f"tenant-{next(numbers)}"
    turns: dict[str, ModelTurn] = {}
    keys: dict[str, str] = {}
    talks: dict[str, ModelConversation] = {}

    for kind, ending, pick, cut, said in plan:
        live_talks = [name for name, talk in talks.items() if not talk.is_deleted]
        if kind == "new":
            created = await store.conversations.create(tenant, {}, [message("user", said)], NOW)
            (item,) = (await store.conversations.list_items(tenant, created.id)).items
            talks[created.id] = ModelConversation([(item.id, said)])
        elif kind == "end" and live_talks:
            name = live_talks[pick % len(live_talks)]
            await store.conversations.delete(tenant, name)
            talks[name].is_deleted = True
        elif kind == "add" and live_talks:
            name = live_talks[pick % len(live_talks)]
            (item,) = await store.conversations.add_items(tenant, name, [message("user", said)], NOW)
            talks[name].slots.append((item.id, said))
        elif kind == "take out" and live_talks:
            talk = talks[name := live_talks[pick % len(live_talks)]]
            taken = [i for i, slot in enumerate(talk.slots) if slot is not None]
            if taken:
                index = taken[cut % len(taken)]
                await store.conversations.delete_item(tenant, name, talk.slots[index][0], NOW)  # type: ignore[index]
                talk.slots[index] = None
        elif kind == "forget" and turns:
            name = list(turns)[pick % len(turns)]
            await store.delete_response(tenant, name, NOW)
            del turns[name]
        elif kind in ("start", "continue", "converse"):
            response_id = store.new_id("resp")
            model = ModelTurn([said, f"to {said}"], None)
            target: dict[str, str] = {}
            keys[response_id] = response_id
            if kind == "continue" and turns:
                target["previous_response_id"] = name = list(turns)[pick % len(turns)]
                model.previous, keys[response_id] = turns[name], keys[name]
            elif kind == "converse" and live_talks:
                target["conversation_id"] = name = live_talks[pick % len(live_talks)]
                model.conversation, keys[response_id] = talks[name], name
                model.start = len(talks[name].slots)
            before = model.previous.known if model.previous is not None else None
            if model.conversation is not None:
                before = model.conversation.known
            # Mostly a continuation, sometimes of a part only: truncated, or edited by hand.
            kept = "" if before is None else before.text[: cut if cut % 3 == 0 else None]
            whole = kept + said + "!"
            await store.begin_response(tenant, new_response(response_id, said, **target), NOW)
            if ending == "cancelled":
                assert await store.cancel_response(tenant, response_id, NOW)
            elif ending == "failed":
                assert await store.fail_response(tenant, response_id, {}, NOW)
            elif ending == "interrupted":
                assert await store.mark_interrupted(NOW + LEASE_S + 1) == 1
            else:
                if ending != "no transcript":
                    model.known = transcript(whole, *range(2, len(whole), 3))
                reason = "max_output_tokens" if ending == "cut" else None
                done = outcome(model.own[1], model.known, incomplete_reason=reason)
                assert await store.complete_response(tenant, response_id, done)
                turns[response_id] = model
                if model.conversation is not None:
                    stored = await store.get_response(tenant, response_id, NOW)
                    model.conversation.slots += zip(
                        [item.id for item in stored.input + stored.output], model.own, strict=True
                    )
                    model.conversation.known = model.known or model.conversation.known

    for name, model in turns.items():
        history = await store.get_history(tenant, previous_response_id=name)
        assert (contents(history.items), history.transcript) == (model.said(), model.known)
        assert history.session_key == keys[name]
    for name, talk in talks.items():
        if not talk.is_deleted:
            history = await store.get_history(tenant, conversation_id=name)
            assert (contents(history.items), history.transcript) == (talk.said(), talk.known)
    await count_rows(store_url)
    for name in turns:
        await store.delete_response(tenant, name, NOW)
    await store.delete_older_than(NOW + 10_000)
    assert await count_rows(store_url) == [0, 0, 0, 0]


# Several processes, and what is left of one that was killed

STORM = """
import asyncio, sys
from array import array
from deployments.store.conversation_store import ConversationStore
from deployments.store.errors import ConversationBusyError
from deployments.store.values import NewItem, NewResponse, Outcome
from engine.text.transcript import Transcript

url, process, num_turns, shared = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def item(role, content):
    return NewItem(role, {"content": content})

def tell(*words):
    print(*words, flush=True)

async def take_turn(store, target, name):
    response = NewResponse(name, "tiny", [item("user", "q" + name)], process, 1030.0, **target)
    while True:
        try:
            await store.begin_response("me", response, 1000.0)
            break
        except ConversationBusyError:
            await asyncio.sleep(0.01)
    tell("begun", name)
    history = await store.get_history("me", **target) if target else None
    known = history.transcript.text if target and history.transcript else ""
    known += "q" + name + "a" + name
    transcript = Transcript(array("I", map(ord, known)), known)
    outcome = Outcome([item("assistant", "a" + name)], {}, transcript, 1001.0)
    if await store.complete_response("me", name, outcome):
        tell("done", name)

async def talk(store, index):
    created = (await store.conversations.create("me", {}, [], 1000.0)).id
    tell("conversation", created)
    last = None
    for number in range(num_turns):
        name = f"{process}-{index}-{number}"
        await take_turn(store, {"conversation_id": created}, name + "-own")
        await take_turn(store, {"previous_response_id": last} if last else {}, name + "-chain")
        last = name + "-chain"
        if shared != "none":
            await take_turn(store, {"conversation_id": shared}, name + "-shared")

async def main():
    store = ConversationStore(url, timeout_s=20)
    await store.open(1000.0)
    await asyncio.gather(*(talk(store, index) for index in range(3)))
    await store.close()

asyncio.run(main())
"""


def start_python(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


async def assert_whole_or_marked(store: ConversationStore, lines: list[list[str]]) -> None:
    """What a process said that it did is there; what it began is whole or marked, and nothing is in between."""
    done = {name for kind, name in lines if kind == "done"}
    for name in {name for kind, name in lines if kind == "begun"}:
        found = await store.get_response(ME, name, 2000.0)
        assert contents(found.input) == ["q" + name]
        if found.status is Status.COMPLETED:
            assert contents(found.output) == ["a" + name]
            history = await store.get_history(ME, previous_response_id=name)
            assert history.transcript is not None
            assert history.transcript.text == "".join(contents(history.items))
        else:
            assert name not in done
            assert (found.status, found.incomplete_reason, found.output) == (Status.INCOMPLETE, "interrupted", ())
    for created in (name for kind, name in lines if kind == "conversation"):
        history = await store.get_history(ME, conversation_id=created)
        said = contents(history.items)
        assert [q[1:] for q in said[::2]] == [a[1:] for a in said[1::2]]
        assert (history.transcript.text if history.transcript else "") == "".join(said)
        await store.begin_response(ME, new_response(f"next-{created}", conversation_id=created), NOW)


async def test_killed_in_a_storm_of_turns(store: ConversationStore, store_url: str) -> None:
    process = start_python(STORM, store_url, "p", 100000, "none")
    assert process.stdout is not None
    try:
        lines = []
        while sum(kind == "done" for kind, _ in lines) < 40:
            lines.append(process.stdout.readline().split())
    finally:
        process.send_signal(signal.SIGKILL)
    lines += [words for line in process.stdout if line.endswith("\n") and len(words := line.split()) == 2]
    process.wait()
    await store.close()
    again = ConversationStore(store_url)
    await again.open(2000.0)
    await assert_whole_or_marked(again, lines)
    await again.close()


async def test_two_processes_write_at_once(store: ConversationStore, store_url: str) -> None:
    shared = (await store.conversations.create(ME, {}, [], NOW)).id
    processes = [start_python(STORM, store_url, name, 2, shared) for name in ("p", "q")]
    outputs = await asyncio.gather(*(asyncio.to_thread(process.communicate) for process in processes))
    assert [process.returncode for process in processes] == [0, 0]
    lines = [line.split() for output, _ in outputs for line in output.splitlines()]
    begun, done = ({name for kind, name in lines if kind == wanted} for wanted in ("begun", "done"))
    assert begun == done
    assert len(done) == 2 * 3 * 2 * 3
    await assert_whole_or_marked(store, [*lines, ["conversation", shared]])
    said = await said_in(store, shared)
    assert sorted(q[1:] for q in said[::2]) == sorted(name for name in done if name.endswith("shared"))


# The schema

OPEN = """
import asyncio, sys
from deployments.store.conversation_store import ConversationStore

async def main():
    store = ConversationStore(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    await store.open(1000.0)
    await store.ping()
    await store.close()

asyncio.run(main())
"""


async def test_three_processes_create_one_database(store_url: str) -> None:
    processes = [start_python(OPEN, store_url) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    await asyncio.gather(*(asyncio.to_thread(process.communicate, "\n") for process in processes))
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert await count_rows(store_url) == [0, 0, 0, 0]


async def run_sql(url: str, *statements: str) -> None:
    if url.startswith("sqlite"):
        sqlite3.connect(url.removeprefix("sqlite:///")).close()
    database = Database(url, 5.0)

    async def work(connection: Any) -> None:
        for statement in statements:
            await connection.execute(text(statement))

    try:
        await database.write(work)
    finally:
        await database.close()


async def test_upgrade_from_an_empty_revision(store_url: str) -> None:
    await run_sql(
        store_url, "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)", "CREATE TABLE theirs (x INTEGER)"
    )
    store = ConversationStore(store_url)
    with pytest.raises(StoreUnavailableError):
        await store.get_response(ME, "a", NOW)
    await store.open(NOW)
    await turn(store, "a")
    await store.open(NOW)
    assert (await store.get_response(ME, "a", NOW)).status is Status.COMPLETED
    await store.close()


async def test_a_store_of_the_first_version_is_upgraded_in_place(store: ConversationStore, store_url: str) -> None:
    """Its texts stay, its token ids say no longer who made them, and what each tenant keeps is counted."""
    talk = await store.conversations.create(ME, {"topic": "x"}, [message("user", ODD_TEXT)], NOW)
    await turn(store, "a", "1", "2", transcript("012", 1), conversation_id=talk.id)
    await turn(store, "b", "3", "4", transcript("01234", 1), conversation_id=talk.id, instructions="be brief")
    await turn(store, "c", "5", "6", transcript("56"), tenant=OTHER)
    await store.close()
    before = await count_rows(store_url)
    database = Database(store_url, 5.0)

    def downgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(ROOT / "deployments/store/migrations"))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")

    await database.write(lambda connection: connection.run_sync(downgrade))
    await database.close()
    again = ConversationStore(store_url)
    await again.open(NOW)
    assert await count_rows(store_url) == before
    history = await again.get_history(ME, conversation_id=talk.id)
    assert contents(history.items) == [ODD_TEXT, "1", "2", "3", "4"]
    assert history.transcript == replace(transcript("01234", 1), fingerprint="")
    await turn(again, "d", "7", "8", transcript("0123478"), conversation_id=talk.id)
    assert (await again.get_history(ME, conversation_id=talk.id)).transcript == transcript("0123478")
    await again.close()


async def test_database_newer_than_the_code(store: ConversationStore, store_url: str) -> None:
    await run_sql(store_url, "UPDATE alembic_version SET version_num = '9999'")
    again = ConversationStore(store_url)
    with pytest.raises(StoreVersionError, match="9999"):
        await again.open(NOW)
    await again.close()


async def test_migrations_make_the_tables_of_the_schema(store: ConversationStore, store_url: str) -> None:
    database = Database(store_url, 5.0)
    differences = await database.read(
        lambda c: c.run_sync(lambda sync: compare_metadata(MigrationContext.configure(sync), metadata))
    )
    await database.close()
    assert differences == []


# A database that is away


async def test_postgres_stopped_and_started_again(postgres: Any) -> None:
    url = postgres.empty_database()
    store = ConversationStore(url)
    await store.open(NOW)
    await turn(store, "a", "1", "2", transcript("12"))
    await store.begin_response(ME, new_response("b", "3", previous_response_id="a"), NOW)
    postgres.stop()
    try:
        await assert_unavailable(store)
        with pytest.raises(StoreUnavailableError):
            await store.complete_response(ME, "b", outcome("4", transcript("1234")))
        early = ConversationStore(url)
        with pytest.raises(StoreUnavailableError):
            await early.open(NOW)
    finally:
        postgres.start()
    await store.ping()
    assert await store.complete_response(ME, "b", outcome("4", transcript("1234")))
    await early.open(NOW)
    history = await early.get_history(ME, previous_response_id="b")
    assert (contents(history.items), history.transcript) == (["1", "2", "3", "4"], transcript("1234"))
    await early.close()
    await store.close()


async def test_postgres_that_never_answers(caplog: pytest.LogCaptureFixture) -> None:
    """Something takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        store = ConversationStore(f"postgresql://user:se_cret@127.0.0.1:{port}/db?password=hid_den", timeout_s=0.2)
        error = await assert_unavailable(store)
        for secret in ("127.0.0.1", str(port), "se_cret", "hid_den"):
            assert secret not in error.message
        assert f"127.0.0.1:{port}) fails: TimeoutError" in caplog.text
        assert "se_cret" not in caplog.text
        assert "hid_den" not in caplog.text
        await store.close()


async def test_postgres_that_hangs_in_a_statement(postgres: Any) -> None:
    url = postgres.empty_database()
    store, other = ConversationStore(url, timeout_s=0.3), Database(url, 5.0)
    await store.open(NOW)
    await turn(store, "a")
    is_locked, may_go = asyncio.Event(), asyncio.Event()

    async def lock_everything(connection: Any) -> None:
        await connection.execute(text("LOCK TABLE responses, write_probe IN ACCESS EXCLUSIVE MODE"))
        is_locked.set()
        await may_go.wait()

    locking = asyncio.create_task(other.write(lock_everything))
    await is_locked.wait()
    await assert_unavailable(store)
    may_go.set()
    await locking
    await turn(store, "b", previous_response_id="a")
    await asyncio.gather(store.close(), other.close())


async def test_caller_that_is_cancelled(store: ConversationStore) -> None:
    """Clients hang up at any moment: a write comes to its end, and no connection suffers."""
    for number in range(40):
        name = f"r{number}"
        task = asyncio.create_task(turn(store, name))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await turn(store, "last")
    assert (await store.get_response(ME, "last", NOW)).status is Status.COMPLETED


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "sqlite://", "sqlite:///:memory:", "sqlite:///x.db?mode=ro", "mysql://u:se_cret@h/d", "redis://h"],
)
def test_urls_that_cannot_be(url: str) -> None:
    with pytest.raises(StoreConfigError) as caught:
        ConversationStore(url)
    assert "se_cret" not in json.dumps(caught.value.message)
