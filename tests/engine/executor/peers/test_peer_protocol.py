"""What peers say: it comes back as it was said, and anything else is an error of the protocol and nothing else."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.handover import FoundChunks
from engine.core.plan import ChunkRecord
from engine.executor.peers import messages, protocol
from engine.executor.peers.messages import (
    MAX_ROWS,
    DirectoryRow,
    Offer,
    pack_found,
    pack_id,
    pack_offer,
    pack_rows,
    pack_version,
    unpack_found,
    unpack_id,
    unpack_offer,
    unpack_rows,
    unpack_version,
)
from engine.executor.peers.protocol import (
    HEADER_BYTES,
    MAX_CONTENT_BYTES,
    MAX_KEYS,
    NO_KEY,
    VERSION,
    Greeting,
    Kind,
    ProtocolError,
    StrangerError,
    check_proof,
    pack_frame,
    pack_greeting,
    pack_hail,
    pack_keys,
    prove,
    unpack_greeting,
    unpack_hail,
    unpack_header,
    unpack_keys,
    unpack_length,
)

BLOCK_BYTES = 100
KEYS = st.binary(min_size=32, max_size=32)
SECONDS = st.floats(0, 1e6, width=32)
COUNTS = st.integers(0, 2**32 - 1)
IDS = st.text(max_size=20).filter(lambda text: pack_id(text) is not None)
RECORDS = st.builds(
    ChunkRecord,
    key=KEYS,
    parent_key=KEYS,
    position=COUNTS,
    num_tokens=st.integers(1, 32),
    owner_id=st.none() | IDS,
    idle_s=SECONDS,
)
FOUND = st.builds(
    FoundChunks,
    st.dictionaries(st.integers(0, 9), SECONDS),
    st.lists(st.tuples(st.integers(0, 9), COUNTS), max_size=4).map(tuple),
)
ROWS = st.builds(DirectoryRow, st.binary(min_size=8, max_size=8), COUNTS, SECONDS)
GREETING = Greeting("a#1", "00" * 16, "11" * 16, BLOCK_BYTES, 4)
NONCES = (b"n" * 32, b"m" * 32)


@settings(deadline=None)
@given(st.sampled_from(list(Kind)), st.binary(max_size=50), st.integers(0, 2**64 - 1), KEYS, COUNTS)
def test_frames_come_back(kind, content, number, key, num_tokens):
    content = content.ljust(BLOCK_BYTES, b"x") if kind is Kind.BLOCK else content[:8]
    if kind is Kind.NOTHING:
        content = b""
    head, *rest = pack_frame(kind, content[:3], content[3:], number=number, key=key, num_tokens=num_tokens)
    assert len(head) == HEADER_BYTES
    assert b"".join(rest) == content
    header = unpack_header(head, BLOCK_BYTES)
    assert (header.kind, header.number, header.key, header.num_tokens) == (kind, number, key, num_tokens)
    assert header.length == len(content)
    header.check(content)
    with pytest.raises(ProtocolError):
        header.check(content + b"x")
    with pytest.raises(ProtocolError):
        replace(header, key=bytes(byte ^ 1 for byte in key)).check(content)


def test_any_flipped_bit_of_a_header_is_an_error():
    head, _ = pack_frame(Kind.BLOCK, bytes(BLOCK_BYTES), number=7, key=b"k" * 32, num_tokens=4)
    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(head)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            unpack_header(bytes(damaged), BLOCK_BYTES)


def test_lengths_are_bounded():
    """Before anything is allocated: with headers that are whole otherwise."""

    def header_of(kind: Kind | int, length: int) -> bytes:
        values = (b"PENS", kind, 0, NO_KEY, 0, length, 0)
        head = protocol._HEADER.pack(*values)
        return head + struct.pack("<I", protocol.zlib.crc32(head))

    keys, content = MAX_KEYS * 32, MAX_CONTENT_BYTES
    longest = {Kind.FIND: keys, Kind.GET: keys, Kind.GONE: keys, Kind.TRANSCRIPT: 4096, Kind.DIRECTORY: 8}
    longest[Kind.TOLD] = 24
    longest |= {Kind.OFFER: content, Kind.ANSWER: content, Kind.NOTHING: 0, Kind.BLOCK: BLOCK_BYTES}
    for kind in Kind:
        assert unpack_header(header_of(kind, longest[kind]), BLOCK_BYTES).length == longest[kind]
        for length in (longest[kind] + 1, 2**32 - 1):
            with pytest.raises(ProtocolError):
                unpack_header(header_of(kind, length), BLOCK_BYTES)
    for wrong in (header_of(Kind.BLOCK, BLOCK_BYTES - 1), header_of(0, 0), header_of(99, 0)):
        with pytest.raises(ProtocolError):
            unpack_header(wrong, BLOCK_BYTES)
    with pytest.raises(StrangerError):
        unpack_length(struct.pack("<I", 4097))


@settings(deadline=None, max_examples=20)
@given(
    st.lists(KEYS, max_size=5),
    FOUND,
    COUNTS,
    st.lists(ROWS, max_size=5),
    IDS,
    st.lists(RECORDS, max_size=4),
    st.binary(),
)
def test_contents_come_back(keys, found, version, rows, name, records, transcript):
    assert unpack_keys(pack_keys(keys)) == tuple(keys)
    assert unpack_found(pack_found(found), 10) == found
    assert unpack_version(pack_version(version)) == version
    assert unpack_rows(pack_rows(version, rows)) == (version, rows)
    assert unpack_id(pack_id(name)) == name
    offer = Offer(name, tuple(records), transcript)
    assert unpack_offer(pack_offer(offer), 32) == offer


READERS = {
    "keys": unpack_keys,
    "found": lambda content: unpack_found(content, 10),
    "version": unpack_version,
    "rows": unpack_rows,
    "id": unpack_id,
    "offer": lambda content: unpack_offer(content, 32),
    "header": lambda content: unpack_header(content.ljust(HEADER_BYTES, b"\0"), BLOCK_BYTES),
    "hail": lambda content: unpack_hail(content[:42].ljust(42, b"\0")),
    "greeting": unpack_greeting,
}


def read_or_refuse(name: str, content: bytes) -> None:
    with suppress(ProtocolError):
        READERS[name](content)


@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, max_examples=60)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(name, content):
    read_or_refuse(name, content)


@settings(deadline=None, max_examples=40)
@given(FOUND, st.lists(ROWS, max_size=5), st.lists(RECORDS, max_size=4), st.data())
def test_contents_that_were_cut_or_changed_are_read_or_refused(found, rows, records, data):
    contents = {
        "found": pack_found(found),
        "rows": pack_rows(3, rows),
        "offer": pack_offer(Offer("chat", tuple(records), b"said")),
        "greeting": pack_greeting(GREETING),
    }
    for name, content in contents.items():
        read_or_refuse(name, content[: data.draw(st.integers(0, len(content)))])
        changed = bytearray(content)
        changed[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        read_or_refuse(name, bytes(changed))


def test_what_is_larger_than_was_asked_for_is_refused():
    with pytest.raises(ProtocolError):
        unpack_found(pack_found(FoundChunks({3: 1.0})), 3)
    with pytest.raises(ProtocolError):
        unpack_found(pack_found(FoundChunks({}, ((3, 1),))), 3)
    with pytest.raises(ProtocolError):
        unpack_rows(pack_version(1) + bytes((MAX_ROWS + 1) * messages._ROW.size))
    for num_tokens in (0, 33):
        record = ChunkRecord(
            key=NO_KEY, parent_key=NO_KEY, position=0, num_tokens=num_tokens, owner_id=None, idle_s=0.0
        )
        with pytest.raises(ProtocolError):
            unpack_offer(pack_offer(Offer("", (record,), b"")), 32)
    for age in (float("nan"), float("inf")):
        with pytest.raises(ProtocolError):
            unpack_rows(pack_rows(1, [DirectoryRow(bytes(8), 1, age)]))
    assert pack_id("x" * 4097) is None
    assert pack_offer(Offer("x" * 4097, (), b"")) is None


def test_a_proof_serves_for_one_side_one_meeting_and_one_content():
    secret = b"s" * 32
    proof = prove(secret, "client", NONCES, b"content")
    check_proof(proof, secret, "client", NONCES, b"content")
    others = [
        (b"t" * 32, "client", NONCES, b"content"),
        (secret, "server", NONCES, b"content"),
        (secret, "client", NONCES[::-1], b"content"),
        (secret, "client", (NONCES[0], b"o" * 32), b"content"),
        (secret, "client", NONCES, b"contents"),
    ]
    for other in others:
        with pytest.raises(StrangerError):
            check_proof(proof, *other)


def test_another_version_or_language_is_a_strangers():
    nonce = b"n" * 32
    assert unpack_hail(pack_hail(nonce)) == nonce
    hail = bytearray(pack_hail(nonce))
    hail[8] += 1
    with pytest.raises(StrangerError, match=f"version {VERSION + 1} "):
        unpack_hail(bytes(hail))
    with pytest.raises(StrangerError, match="does not speak"):
        unpack_hail(b"HTTP/1.1" + hail[8:])


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"1", b'{"peer_id": "x"}', b"[" * 4000, pack_greeting(replace(GREETING, block_bytes="1"))],
    ids=range(6),
)
def test_a_greeting_that_is_none(content):
    with pytest.raises(StrangerError, match="cannot be read"):
        unpack_greeting(content)


def test_who_can_exchange_chunks():
    other = replace(GREETING, incarnation="22" * 16, peer_id="b#1")
    assert unpack_greeting(pack_greeting(other)) == other
    assert GREETING.difference(other) is None
    assert "itself" in GREETING.difference(GREETING)
    for name, value in {"identity": "33" * 16, "block_bytes": 1, "chunk_size": 5}.items():
        assert name in GREETING.difference(replace(other, **{name: value}))
