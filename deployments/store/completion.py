"""The end of a turn that has an answer, in one transaction.

Its items, its usage, its transcript and the end of its conversation. Works inside transactions of the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, and_, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.history import load_transcript
from deployments.store.item_rows import insert_items
from deployments.store.response_rows import finish
from deployments.store.tables import conversations, items, responses, transcripts
from deployments.store.transcript_delta import make_delta
from deployments.store.usage import Accounts, measure
from deployments.store.values import Outcome, StoredItem
from engine.text.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Place:
    """What a turn goes on from. parent: the transcript that its own is stored as the difference to; None = to nothing."""

    conversation_id: str | None
    parent_id: str | None
    parent: Transcript | None


async def find_place(connection: AsyncConnection, tenant: str, response_id: str, outcome: Outcome) -> Place | None:
    """None if there is no such response."""
    query = (
        select(responses.c.conversation_id, responses.c.previous_response_id, conversations.c.tip_response_id)
        .outerjoin(conversations, conversations.c.id == responses.c.conversation_id)
        .where(responses.c.id == response_id, responses.c.tenant == tenant)
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    parent_id = row.previous_response_id or row.tip_response_id
    parent = None if outcome.transcript is None else await load_transcript(connection, parent_id)
    return Place(row.conversation_id, None if parent is None else parent_id, parent)


async def complete(
    connection: AsyncConnection,
    accounts: Accounts,
    tenant: str,
    response_id: str,
    place: Place,
    output: Sequence[StoredItem],
    outcome: Outcome,
) -> bool:
    """Whether the answer is stored now. False: the response is no longer in progress, and nothing was changed.

    output: the outcome's, with ids.
    """
    conversation = None
    if place.conversation_id is not None:
        query = select(conversations).where(conversations.c.id == place.conversation_id).with_for_update()
        conversation = (await connection.execute(query)).one_or_none()
    if not await finish(connection, tenant, response_id, **_final_values(outcome, conversation)):
        return await _was_completed(connection, tenant, response_id, outcome)
    end: tuple[str, int] | None = None  # where the output goes: (conversation id, position)
    if conversation is not None and not conversation.deleted:
        num_input = await _append_input(connection, response_id, conversation)
        end = (conversation.id, conversation.next_position + num_input)
    await insert_items(connection, output, response_id=response_id, is_output=True, conversation=end)
    if outcome.transcript is not None:
        # A conversation that was deleted meanwhile no longer keeps its last transcript.
        is_kept = conversation is None or conversation.tip_response_id == place.parent_id
        await _insert_transcript(connection, response_id, place if is_kept else None, outcome.transcript)
    if end is not None:
        await _move_end(connection, end[0], end[1] + len(output), response_id, outcome)
    said = and_(items.c.response_id == response_id, items.c.is_output)
    added = await measure(connection, (items, said), (transcripts, transcripts.c.response_id == response_id))
    await accounts.add(connection, tenant, added, is_refusable=False)
    return True


def _final_values(outcome: Outcome, conversation: Row[Any] | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "status": outcome.status,
        "incomplete_reason": outcome.incomplete_reason,
        "completed_at": outcome.completed_at,
        "usage": dict(outcome.usage),
    }
    if conversation is not None:
        values["conversation_start"] = conversation.next_position
    return values


async def _was_completed(connection: AsyncConnection, tenant: str, response_id: str, outcome: Outcome) -> bool:
    """Whether this very outcome was stored already: by a call whose answer was lost."""
    query = select(responses.c.status, responses.c.incomplete_reason, responses.c.completed_at).where(
        responses.c.id == response_id, responses.c.tenant == tenant, ~responses.c.deleted
    )
    row = (await connection.execute(query)).one_or_none()
    return row is not None and tuple(row) == (outcome.status, outcome.incomplete_reason, outcome.completed_at)


async def _append_input(connection: AsyncConnection, response_id: str, conversation: Row[Any]) -> int:
    """Puts the response's input at the conversation's end; returns how many items that are."""
    result = await connection.execute(
        update(items)
        .where(items.c.response_id == response_id, ~items.c.is_output)
        .values(
            conversation_id=conversation.id,
            conversation_position=conversation.next_position + items.c.position,
        )
    )
    return result.rowcount


async def _insert_transcript(
    connection: AsyncConnection, response_id: str, place: Place | None, transcript: Transcript
) -> None:
    """place: with the parent to store the difference to; None = store all of it."""
    delta = make_delta(None if place is None else place.parent, transcript)
    start_tokens, start_chars = transcript.answer_start or (None, None)
    await connection.execute(
        insert(transcripts).values(
            response_id=response_id,
            parent_id=None if place is None else place.parent_id,
            num_kept_tokens=delta.num_kept_tokens,
            num_kept_chars=delta.num_kept_chars,
            num_kept_anchors=delta.num_kept_anchors,
            token_ids=delta.token_ids,
            text=delta.text,
            anchors=delta.anchors,
            fingerprint=transcript.fingerprint,
            answer_start_tokens=start_tokens,
            answer_start_chars=start_chars,
        )
    )


async def _move_end(
    connection: AsyncConnection, conversation_id: str, next_position: int, response_id: str, outcome: Outcome
) -> None:
    values: dict[str, Any] = {"next_position": next_position, "used_at": outcome.completed_at}
    if outcome.transcript is not None:
        values["tip_response_id"] = response_id
    await connection.execute(update(conversations).where(conversations.c.id == conversation_id).values(**values))
