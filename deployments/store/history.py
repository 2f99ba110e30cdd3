"""Reads what a turn continues from: the newest items along a chain of responses, and the transcript.

Each is one recursive query, however long the chain. Works inside a transaction of the caller's and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Integer, Row, Select, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store.errors import StoreCorruptedError
from deployments.store.tables import items, responses, transcripts
from deployments.store.transcript_delta import TranscriptDelta, apply_deltas
from deployments.store.values import StoredItem
from engine.text.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Said:
    """Items, oldest first. is_whole: none were left out. num_bytes: of their bodies."""

    items: tuple[StoredItem, ...]
    is_whole: bool
    num_bytes: int


async def chain_items(connection: AsyncConnection, latest: Row[Any], max_bytes: int) -> Said:
    """Input and output of the chain's responses up to this one.

    A chain that begins inside a conversation begins with what that conversation holds before it.

    max_bytes: of bodies; the newest ones are read, up to the one that reaches it.
    """
    chain = (
        select(responses.c.id, responses.c.previous_response_id, literal(0, Integer).label("depth"))
        .where(responses.c.id == latest.id)
        .cte("chain", recursive=True)
    )
    parent = responses.alias("parent")
    chain = chain.union_all(
        select(parent.c.id, parent.c.previous_response_id, chain.c.depth + 1).join(
            chain, parent.c.id == chain.c.previous_response_id
        )
    )
    inside = _sized(chain.c.depth, items.c.is_output, items.c.position).join(chain, items.c.response_id == chain.c.id)
    said = await _read_newest(connection, inside, max_bytes)
    if latest.conversation_start is None or not said.is_whole:
        return said
    if said.num_bytes >= max_bytes:
        return replace(said, is_whole=latest.conversation_start == 0)
    left = max_bytes - said.num_bytes
    before = await conversation_items(connection, latest.session_key, latest.conversation_start, left)
    return Said(before.items + said.items, before.is_whole, before.num_bytes + said.num_bytes)


async def conversation_items(connection: AsyncConnection, conversation_id: str, end: int, max_bytes: int) -> Said:
    """Those below that position; as chain_items."""
    inside = _sized(literal(0, Integer), literal(0, Integer), items.c.conversation_position).where(
        items.c.conversation_id == conversation_id, items.c.conversation_position < end
    )
    return await _read_newest(connection, inside, max_bytes)


def _sized(depth: ColumnElement[Any], is_output: ColumnElement[Any], position: ColumnElement[Any]) -> Select[Any]:
    """Items without their bodies, which may be large. The latest has the smallest depth, and the largest of the others."""
    return select(
        items.c.id,
        depth.label("depth"),
        is_output.label("is_output"),
        position.label("position"),
        func.length(items.c.body, type_=Integer).label("size"),
    )


async def _read_newest(connection: AsyncConnection, inside: Select[Any], max_bytes: int) -> Said:
    sized = inside.subquery("sized")
    newest_first = (sized.c.depth, sized.c.is_output.desc(), sized.c.position.desc())
    until_here = func.sum(sized.c.size, type_=BigInteger).over(order_by=newest_first, rows=(None, 0))
    counted = select(
        sized, (until_here - sized.c.size).label("newer"), func.count().over().label("num_items")
    ).subquery("counted")
    rows = await connection.execute(
        select(items.c.id, items.c.role, items.c.body, counted.c.size, counted.c.num_items)
        .join(counted, counted.c.id == items.c.id)
        .where(counted.c.newer < max_bytes)
        .order_by(counted.c.depth.desc(), counted.c.is_output, counted.c.position)
    )
    found = rows.all()
    is_whole = not found or len(found) == found[0].num_items
    return Said(to_items(found), is_whole, sum(row.size for row in found))


async def load_transcript(connection: AsyncConnection, response_id: str | None) -> Transcript | None:
    """None: that response has none. Raises StoreCorruptedError."""
    if response_id is None:
        return None
    # Only ids go through the recursion; the blobs are joined once at its end.
    chain = (
        select(transcripts.c.response_id, transcripts.c.parent_id, literal(0, Integer).label("depth"))
        .where(transcripts.c.response_id == response_id)
        .cte("chain", recursive=True)
    )
    parent = transcripts.alias("parent")
    chain = chain.union_all(
        select(parent.c.response_id, parent.c.parent_id, chain.c.depth + 1).join(
            chain, parent.c.response_id == chain.c.parent_id
        )
    )
    columns = [
        transcripts.c.num_kept_tokens,
        transcripts.c.num_kept_chars,
        transcripts.c.num_kept_anchors,
        transcripts.c.token_ids,
        transcripts.c.text,
        transcripts.c.anchors,
    ]
    of_the_latest = [transcripts.c.fingerprint, transcripts.c.answer_start_tokens, transcripts.c.answer_start_chars]
    rows = await connection.execute(
        select(*columns, *of_the_latest)
        .join(chain, transcripts.c.response_id == chain.c.response_id)
        .order_by(chain.c.depth)
    )
    found = rows.all()
    if not found:
        return None
    try:
        # The chain's latest response says which tokenizer and template made the ids, including those of older responses.
        transcript = apply_deltas([TranscriptDelta(*row[: len(columns)]) for row in found], found[0].fingerprint)
    except ValueError:
        raise StoreCorruptedError from None
    start = found[0].answer_start_tokens
    return replace(transcript, answer_start=None if start is None else (start, found[0].answer_start_chars))


def to_items(rows: Iterable[Any]) -> tuple[StoredItem, ...]:
    return tuple(StoredItem(row.id, row.role, row.body) for row in rows)
