"""What engines of the same model say to each other, as bytes: how they meet, and frames. Knows no socket.

A connection, from the side that opened it (the client) to the one that listens (the server):

    server   hail       magic, version, nonce
    client   hail       magic, version, nonce; its proof of the secret, over both nonces
    server   proof      its own
    both     greeting   who it is, and what its blocks are; with a proof over that and both nonces
    then     frames     a header of 64 bytes, and as many bytes of content as that says

    client   FIND, GET, TRANSCRIPT, DIRECTORY, OFFER; TOLD, which has no answer
    server   ANSWER or NOTHING, to the query of that number; BLOCK and GONE, to GET, by key and in any order

Before its proof is verified, nothing is read of the other side but a few bytes of known number. Every length is bounded
before memory is taken for it; every header and every content has a checksum, and a wrong one is a miss.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, TypeAlias

from engine.core.cache.index import KEY_BYTES

Buffer: TypeAlias = bytes | memoryview

# Of all that is said below: another one is another language.
VERSION = 2
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_GREETING_BYTES = 4096
# Of one query: a context of two million tokens in chunks of 32.
MAX_KEYS = 1 << 16
MAX_ID_BYTES = 4096
# What a conversation has said, with the names of its chunks.
MAX_CONTENT_BYTES = 32 << 20
NO_KEY = bytes(KEY_BYTES)

_MAGIC = b"PENSPEER"
_HAIL = struct.Struct(f"<8sH{NONCE_BYTES}s")
HAIL_BYTES = _HAIL.size
_LENGTH = struct.Struct("<I")
LENGTH_BYTES = _LENGTH.size
# Magic, kind, number of the query, key, number of tokens, length and checksum of the content; then a checksum of these.
_HEADER = struct.Struct(f"<4sB3xQ{KEY_BYTES}sIII")
_SUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _SUM.size


class ProtocolError(ConnectionError):
    """The other side says what it may not say. The connection is of no use any more."""


class StrangerError(ProtocolError):
    """The other side is none of our peers: it does not know the secret, or has another version, model or block size."""


class Kind(IntEnum):
    """What a frame is."""

    FIND = 1
    GET = 2
    TRANSCRIPT = 3
    DIRECTORY = 4
    OFFER = 5
    TOLD = 6
    ANSWER = 16
    NOTHING = 17
    BLOCK = 18
    GONE = 19


_MAX_LENGTHS = {
    Kind.FIND: MAX_KEYS * KEY_BYTES,
    Kind.GET: MAX_KEYS * KEY_BYTES,
    Kind.TRANSCRIPT: MAX_ID_BYTES,
    Kind.DIRECTORY: 8,
    Kind.TOLD: 24,
    Kind.OFFER: MAX_CONTENT_BYTES,
    Kind.ANSWER: MAX_CONTENT_BYTES,
    Kind.NOTHING: 0,
    Kind.GONE: MAX_KEYS * KEY_BYTES,
}


# -- meeting ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Greeting:
    """Who one side is, and what its blocks are.

    peer_id: its name among the peers. incarnation: random, of this process.
    identity: of all that the content of a block depends on, in hexadecimal digits.
    block_bytes: of one chunk. chunk_size: in tokens.
    """

    peer_id: str
    incarnation: str
    identity: str
    block_bytes: int
    chunk_size: int

    def difference(self, other: Greeting) -> str | None:
        """Why these two cannot exchange chunks; None if they can."""
        if self.incarnation == other.incarnation:
            return "it is this engine itself"
        for name in ("identity", "block_bytes", "chunk_size"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return (
                    f"it serves another model, dtype, layout or chunk size: its {name} is {theirs!r:.80}, not {ours!r}"
                )
        return None


def pack_hail(nonce: bytes) -> bytes:
    return _HAIL.pack(_MAGIC, VERSION, nonce)


def unpack_hail(data: bytes) -> bytes:
    """The nonce. Raises StrangerError."""
    magic, version, nonce = _HAIL.unpack(data)
    if magic != _MAGIC:
        raise StrangerError("it does not speak this protocol")
    if version != VERSION:
        raise StrangerError(f"it speaks version {version} of the protocol, not {VERSION}")
    return bytes(nonce)


def prove(secret: bytes, what: str, nonces: tuple[bytes, bytes], content: bytes = b"") -> bytes:
    """A proof that its maker knows the secret, which serves for nothing else.

    what: the side that proves, and for what; so that no proof can be sent back. nonces: the server's and the client's.
    """
    message = b"\0".join((_MAGIC, what.encode())) + b"".join(nonces) + content
    return hmac.digest(secret, message, hashlib.sha256)


def check_proof(proof: bytes, secret: bytes, what: str, nonces: tuple[bytes, bytes], content: bytes = b"") -> None:
    """Raises StrangerError if it is not what `prove` gives."""
    if not hmac.compare_digest(proof, prove(secret, what, nonces, content)):
        raise StrangerError("it does not know the secret of this application")


def pack_greeting(greeting: Greeting) -> bytes:
    return json.dumps(asdict(greeting)).encode()


def unpack_greeting(data: bytes) -> Greeting:
    """Raises StrangerError."""
    try:
        values = json.loads(data)
        greeting = Greeting(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise StrangerError("its greeting cannot be read") from error
    is_text = all(isinstance(text, str) for text in (greeting.peer_id, greeting.incarnation, greeting.identity))
    if not is_text or not all(type(number) is int for number in (greeting.block_bytes, greeting.chunk_size)):
        raise StrangerError("its greeting cannot be read")
    return greeting


def pack_length(length: int) -> bytes:
    return _LENGTH.pack(length)


def unpack_length(data: bytes) -> int:
    """Of a greeting. Raises StrangerError if it is too long."""
    length = int(_LENGTH.unpack(data)[0])
    if length > MAX_GREETING_BYTES:
        raise StrangerError("its greeting is too long")
    return length


# -- frames ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What comes before the content of a frame.

    number: of the query that is asked or answered; counts up on a connection. Of a BLOCK: for how many microseconds its
        source had it not yet where it is sent from.
    key, num_tokens: of a BLOCK.
    length: of the content, in bytes. checksum: of it, under the key.
    """

    kind: Kind
    number: int = 0
    key: bytes = NO_KEY
    num_tokens: int = 0
    length: int
    checksum: int

    def check(self, content: Buffer) -> None:
        """Raises ProtocolError if that is not the content."""
        if checksum_of(self.key, (content,)) != self.checksum:
            raise ProtocolError("a frame was damaged on its way")


def checksum_of(key: bytes, parts: Iterable[Buffer]) -> int:
    """Of a content under its chunk's name, so that another chunk's content is wrong, too."""
    checksum = zlib.crc32(key)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def pack_frame(kind: Kind, *parts: Buffer, number: int = 0, key: bytes = NO_KEY, num_tokens: int = 0) -> list[Buffer]:
    """The frame as buffers to be sent one after the other; the content is not copied."""
    length = sum(memoryview(part).nbytes for part in parts)
    head = _HEADER.pack(_MAGIC[:4], kind, number, key, num_tokens, length, checksum_of(key, parts))
    return [head + _SUM.pack(zlib.crc32(head)), *parts]


def unpack_header(data: bytes, block_bytes: int) -> Header:
    """block_bytes: the length that a BLOCK has to have. Raises ProtocolError."""
    magic, kind, number, key, num_tokens, length, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC[:4] or _SUM.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
        raise ProtocolError("a frame was damaged on its way")
    try:
        kind = Kind(kind)
    except ValueError:
        raise ProtocolError(f"a frame is of an unknown kind, {kind}") from None
    if (length != block_bytes) if kind is Kind.BLOCK else (length > _MAX_LENGTHS[kind]):
        raise ProtocolError(f"a frame of kind {kind.name} has {length} bytes")
    return Header(kind=kind, number=number, key=key, num_tokens=num_tokens, length=length, checksum=checksum)


def pack_keys(keys: Sequence[bytes]) -> bytes:
    return b"".join(keys)


def unpack_keys(content: bytes) -> tuple[bytes, ...]:
    """Raises ProtocolError."""
    if len(content) % KEY_BYTES:
        raise ProtocolError("names of chunks were cut")
    return tuple(content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES))


def read(layout: struct.Struct, content: bytes, offset: int) -> tuple[Any, ...]:
    """Raises ProtocolError if that is not there."""
    try:
        return layout.unpack_from(content, offset)
    except struct.error:
        raise ProtocolError("the content of a frame was cut") from None
