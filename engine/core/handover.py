"""What two engines tell each other of the chunks of a context, as plain data.

Engine A has a request; engine B may have chunks of its context:

    A  query = core.handover.missing_chunks(request)     what no tier of A has
    B  found = core.handover.find_chunks(query.keys)     which of these B has, and what is below the last one
    A  core.handover.expect(records_of(query, found, request), request_id)

Engine B is about to end, and knows what conversations have said:

    B  records = core.handover.records_of(context, ...)[::-1]   the end of a context is worth most
    B  core.handover.value_of(records)                          the most valuable conversation is offered first
    A  core.handover.accept_offer(records, offer_id)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.core.cache.index import chunk_key
from engine.core.plan import ChunkRecord
from engine.core.request import Request

# Before an engine ends: conversations that are looked through, chunks of each, and offers at a time.
MAX_OFFERED = 4096
MAX_OFFERED_CHUNKS = 4096
MAX_OFFERS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class ContextQuery:
    """Consecutive chunks of a context, from the first one on that the asking engine does not have.

    first_position: of that one.
    keys: the name of the chunk before it, then those of the full chunks from it on.
    """

    first_position: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FoundChunks:
    """Which of the asked ones an engine has. It holds for a moment only.

    idle_s: seconds since the last use of each that is there, by its place among the keys.
    tails: (place of the parent among the keys, number of tokens) of partial chunks, the longest first. Which tokens these
        are is not told: a wrong guess names a chunk that is not there.
    """

    idle_s: Mapping[int, float]
    tails: tuple[tuple[int, int], ...] = ()


def records_of(query: ContextQuery, found: FoundChunks, request: Request, chunk_size: int) -> list[ChunkRecord]:
    """The chunks of the request's context that were found, front first; what makes no sense is left out."""
    keys, token_ids = query.keys, request.token_ids
    records = [
        ChunkRecord(
            key=keys[place],
            parent_key=keys[place - 1],
            position=query.first_position + place - 1,
            num_tokens=chunk_size,
            owner_id=None,
            idle_s=max(0.0, idle_s),
        )
        for place, idle_s in sorted(found.idle_s.items())
        if 0 < place < len(keys)
    ]
    for place, num_tokens in found.tails:
        position = query.first_position + place
        tail = token_ids[position * chunk_size : position * chunk_size + num_tokens]
        if 0 <= place < len(keys) and 0 < num_tokens < chunk_size and len(tail) == num_tokens:
            records.append(
                ChunkRecord(
                    key=chunk_key(keys[place], tail),
                    parent_key=keys[place],
                    position=position,
                    num_tokens=num_tokens,
                    owner_id=request.conversation_id,
                    idle_s=0.0,
                )
            )
    return records
