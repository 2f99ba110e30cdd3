"""Reads what a turn continues from: the items along a chain of responses, and the transcript put together again. Each is
one recursive query, however long the chain. Works inside a transaction of the caller's and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Integer, Row, and_, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.store_schema import items, responses, transcripts
from deployments.store_values import Item, StoreCorruptedError
from deployments.transcript_delta import TranscriptDelta, apply_deltas
from engine.core.conversation import Transcript


async def chain_items(connection: AsyncConnection, latest: Row[Any]) -> tuple[Item, ...]:
    """Input and output of the chain's responses up to this one, oldest first. A chain that begins inside a conversation
    begins with what that conversation holds before it."""
    before: tuple[Item, ...] = ()
    if latest.conversation_start is not None:
        before = await conversation_items(connection, latest.session_key, latest.conversation_start)
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
    rows = await connection.execute(
        select(items.c.id, items.c.role, items.c.body)
        .join(chain, items.c.response_id == chain.c.id)
        .order_by(chain.c.depth.desc(), items.c.is_output, items.c.position)
    )
    return before + to_items(rows)


async def conversation_items(connection: AsyncConnection, conversation_id: str, end: int) -> tuple[Item, ...]:
    """Those below that position."""
    inside = and_(items.c.conversation_id == conversation_id, items.c.conversation_position < end)
    rows = await connection.execute(
        select(items.c.id, items.c.role, items.c.body).where(inside).order_by(items.c.conversation_position)
    )
    return to_items(rows)


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
        transcripts.c.fingerprint,
    ]
    rows = await connection.execute(
        select(*columns).join(chain, transcripts.c.response_id == chain.c.response_id).order_by(chain.c.depth)
    )
    found = rows.all()
    if not found:
        return None
    try:
        # What an older one of them kept is the same ids, whoever made those: the latest says by whom they were made.
        return apply_deltas([TranscriptDelta(*row[:-1]) for row in found], found[0].fingerprint)
    except ValueError:
        raise StoreCorruptedError from None


def to_items(rows: Iterable[Any]) -> tuple[Item, ...]:
    return tuple(Item(row.id, row.role, row.body) for row in rows)
