"""What queries and answers between peers carry: chunks that were found, rows of the directory, an offer. Knows no socket.

Each `unpack_*` raises ProtocolError if the bytes are not what `pack_*` makes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from engine.core.cache.index import KEY_BYTES
from engine.core.handover import FoundChunks
from engine.core.plan import ChunkRecord
from engine.executor.peers.protocol import MAX_ID_BYTES, MAX_KEYS, ProtocolError, read

HASH_BYTES = 8
# Rows of one directory: what is newer than these is told, what is older is forgotten.
MAX_ROWS = 100_000
_COUNT = struct.Struct("<I")
_FOUND = struct.Struct("<Id")
_TAIL = struct.Struct("<II")
_VERSION = struct.Struct("<Q")
_ROW = struct.Struct(f"<{HASH_BYTES}sIf")
# Key, key of the parent, position, number of tokens, idle time, length of the owner's name, of which -1 is none.
_RECORD = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sIIdh")


@dataclass(frozen=True, slots=True)
class DirectoryRow:
    """How much an engine knows of a conversation.

    hashed_id: of the conversation. num_tokens: 0 = it has nothing of it any more. age_s: since its last turn, in seconds.
    """

    hashed_id: bytes
    num_tokens: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    """A conversation that an engine which ends would like to leave to another one.

    records: its chunks, in order of value. transcript: what it has said.
    """

    conversation_id: str
    records: tuple[ChunkRecord, ...]
    transcript: bytes


def pack_found(found: FoundChunks) -> bytes:
    rows = [_FOUND.pack(index, idle_s) for index, idle_s in found.idle_s.items()]
    tails = [_TAIL.pack(*tail) for tail in found.tails]
    return b"".join((_COUNT.pack(len(rows)), *rows, *tails))


def unpack_found(content: bytes, num_keys: int) -> FoundChunks:
    """num_keys: that were asked for."""
    (num_rows,) = read(_COUNT, content, 0)
    end = _COUNT.size + num_rows * _FOUND.size
    if num_rows > num_keys or end > len(content) or (len(content) - end) % _TAIL.size:
        raise ProtocolError("what was found cannot be read")
    idle_s = {index: _seconds(value) for index, value in _FOUND.iter_unpack(content[_COUNT.size : end])}
    tails = tuple((parent, num_tokens) for parent, num_tokens in _TAIL.iter_unpack(content[end:]))
    if any(index >= num_keys for index in (*idle_s, *(parent for parent, _ in tails))):
        raise ProtocolError("what was found was not asked for")
    return FoundChunks(idle_s, tails)


def pack_version(version: int) -> bytes:
    return _VERSION.pack(version)


def unpack_version(content: bytes) -> int:
    return int(read(_VERSION, content, 0)[0])


def pack_rows(version: int, rows: Sequence[DirectoryRow]) -> bytes:
    """version: up to which changes are told."""
    return b"".join((_VERSION.pack(version), *(_ROW.pack(row.hashed_id, row.num_tokens, row.age_s) for row in rows)))


def unpack_rows(content: bytes) -> tuple[int, list[DirectoryRow]]:
    version, rest = unpack_version(content), content[_VERSION.size :]
    if len(rest) % _ROW.size or len(rest) // _ROW.size > MAX_ROWS:
        raise ProtocolError("a directory cannot be read")
    return version, [
        DirectoryRow(hashed, num_tokens, _seconds(age)) for hashed, num_tokens, age in _ROW.iter_unpack(rest)
    ]


def unpack_told(content: bytes) -> tuple[int, DirectoryRow]:
    """Of `pack_rows` with one row."""
    version, rows = unpack_rows(content)
    if len(rows) != 1:
        raise ProtocolError("a row of a directory cannot be read")
    return version, rows[0]


def pack_id(conversation_id: str) -> bytes | None:
    """None if it is too long to be asked for."""
    encoded = conversation_id.encode("utf-8", "surrogatepass")
    return encoded if len(encoded) <= MAX_ID_BYTES else None


def unpack_id(content: bytes) -> str:
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise ProtocolError("the name of a conversation cannot be read") from None


def pack_offer(offer: Offer) -> bytes | None:
    """None if its names are too long, or it has too many chunks."""
    name = pack_id(offer.conversation_id)
    if name is None or len(offer.records) > MAX_KEYS:
        return None
    parts = [_TAIL.pack(len(name), len(offer.records)), name]
    for record in offer.records:
        owner = None if record.owner_id is None else pack_id(record.owner_id)
        length = -1 if owner is None else len(owner)
        sizes = (record.position, record.num_tokens, record.idle_s, length)
        parts += [_RECORD.pack(record.key, record.parent_key, *sizes), owner or b""]
    return b"".join((*parts, offer.transcript))


def unpack_offer(content: bytes, chunk_size: int) -> Offer:
    """chunk_size: no chunk has more tokens."""
    length, num_records = read(_TAIL, content, 0)
    offset = _TAIL.size + length
    if length > MAX_ID_BYTES or num_records > MAX_KEYS or offset > len(content):
        raise ProtocolError("an offer cannot be read")
    conversation_id = unpack_id(content[_TAIL.size : offset])
    records = []
    for _ in range(num_records):
        key, parent_key, position, num_tokens, idle_s, length = read(_RECORD, content, offset)
        offset += _RECORD.size
        end = offset + max(0, length)
        if not 0 < num_tokens <= chunk_size or length > MAX_ID_BYTES or end > len(content):
            raise ProtocolError("an offered chunk cannot be read")
        owner_id = None if length < 0 else unpack_id(content[offset:end])
        offset = end
        records.append(
            ChunkRecord(
                key=key,
                parent_key=parent_key,
                position=position,
                num_tokens=num_tokens,
                owner_id=owner_id,
                idle_s=_seconds(idle_s),
            )
        )
    return Offer(conversation_id, tuple(records), content[offset:])


def _seconds(value: float) -> float:
    """A time that another process told."""
    if not math.isfinite(value):
        raise ProtocolError("a time is no number")
    return max(0.0, value)
