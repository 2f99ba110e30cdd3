"""How chunks lie in the files of the disk tier.

A segment is a file of `rows_per_segment` rows, each a page that says which chunk lies in the slot of the same number, and
then as many slots of one chunk each:

    | row 0 | row 1 | ... | slot 0 | slot 1 | ...        a row: 4 KiB; a slot: a block, rounded up to 4 KiB

All chunks of one identity have one size, so a slot is written in place, and free space is a free slot. Nothing is trusted but
checksums: the slot is written first, then its row, whose checksum covers the row and names the checksum of the slot. So a
process that is killed between the two, a lost page and a flipped bit all leave a chunk that is not there, and never a wrong
one. Knows no file.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

from engine.core.cache.index import KEY_BYTES
from engine.core.plan import ChunkRecord

PAGE_BYTES = 4096
# A file is about so large: many small ones take long to open, a large one long to allocate.
SEGMENT_BYTES = 32 << 20
IDENTITY_BYTES = 16

# Of the layout, and of what blocks hold: another one makes all files those of another version.
FORMAT_VERSION = 1
_MAGIC = b"PENSKV01"
# Magic, identity, number of the block, key, key of the parent, position, number of tokens, wall-clock time of the last use,
# checksum of the slot, length of the owner's name, of which -1 is none.
_ROW = struct.Struct(f"<8s{IDENTITY_BYTES}sQ{KEY_BYTES}s{KEY_BYTES}sIIdIh")
_SUM = struct.Struct("<I")
MAX_OWNER_BYTES = PAGE_BYTES - _ROW.size - _SUM.size


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what lies.

    identity: of all that the content of a block depends on, but for the rank.
    block_bytes: of one chunk on this rank. num_blocks: of all segments.
    rank: of a tensor-parallel group, if the slots hold that rank's part of each chunk; None = they hold whole chunks.
    """

    identity: bytes
    block_bytes: int
    num_blocks: int
    chunk_size: int
    rank: int | None = None

    @property
    def row_identity(self) -> bytes:
        """Of the rank too, so that no rank takes another one's files for its own."""
        if self.rank is None:
            return self.identity
        return hashlib.sha256(self.identity + struct.pack("<I", self.rank)).digest()[:IDENTITY_BYTES]

    @property
    def slot_bytes(self) -> int:
        return -(-self.block_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def rows_per_segment(self) -> int:
        return max(1, min(self.num_blocks, SEGMENT_BYTES // (PAGE_BYTES + self.slot_bytes)))

    @property
    def num_segments(self) -> int:
        return -(-self.num_blocks // self.rows_per_segment)

    @property
    def segment_bytes(self) -> int:
        return self.rows_per_segment * (PAGE_BYTES + self.slot_bytes)

    def row_offset(self, row: int) -> int:
        return row * PAGE_BYTES

    def slot_offset(self, row: int) -> int:
        return self.rows_per_segment * PAGE_BYTES + row * self.slot_bytes

    @classmethod
    def blocks_for(cls, num_bytes: int, block_bytes: int) -> int:
        """How many blocks so many bytes of files hold."""
        return num_bytes // (PAGE_BYTES + -(-block_bytes // PAGE_BYTES) * PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Row:
    """What lies in a slot. last_used: by the wall clock, as other processes have to read it. checksum: of the slot."""

    record: ChunkRecord
    last_used: float
    checksum: int


def slot_checksum(key: bytes, content: memoryview) -> int:
    """Of the content of a block under its chunk's name, so that another chunk's content is wrong, too."""
    return zlib.crc32(content, zlib.crc32(key))


def pack_row(layout: Layout, block: int, row: Row) -> bytes:
    """One page."""
    record = row.record
    owner = None if record.owner_id is None else record.owner_id.encode("utf-8", "surrogatepass")
    if owner is not None and len(owner) > MAX_OWNER_BYTES:
        owner = None  # its conversation copies the tail instead of writing on in it
    head = _ROW.pack(
        _MAGIC,
        layout.row_identity,
        block,
        record.key,
        record.parent_key,
        record.position,
        record.num_tokens,
        row.last_used,
        row.checksum,
        -1 if owner is None else len(owner),
    ) + (owner or b"")
    return (head + _SUM.pack(zlib.crc32(head))).ljust(PAGE_BYTES, b"\0")


def unpack_row(layout: Layout, block: int, page: bytes | memoryview, now: float) -> Row | None:
    """None if the page is not whole, or not of that block and layout. now: by the wall clock."""
    if len(page) < PAGE_BYTES or bytes(page[: len(_MAGIC)]) != _MAGIC:
        return None
    _, identity, number, key, parent, position, num_tokens, last_used, checksum, owner_len = _ROW.unpack_from(page)
    end = _ROW.size + max(0, owner_len)
    if end + _SUM.size > PAGE_BYTES or _SUM.unpack_from(page, end)[0] != zlib.crc32(page[:end]):
        return None
    if (identity, number) != (layout.row_identity, block) or not 0 < num_tokens <= layout.chunk_size:
        return None
    owner = None if owner_len < 0 else bytes(page[_ROW.size : end]).decode("utf-8", "surrogatepass")
    record = ChunkRecord(
        key=key,
        parent_key=parent,
        position=position,
        num_tokens=num_tokens,
        owner_id=owner,
        idle_s=max(0.0, now - last_used),
    )
    return Row(record, last_used, checksum)
