"""Bodies that clients compressed, made plain again within bounds. Pure functions."""

from __future__ import annotations

import zlib

from deployments.errors import BodyTooLargeError, MalformedBodyError, UnsupportedEncodingError

_GZIP_BITS, _ZLIB_BITS, _BARE_BITS = 31, 15, -15  # how zlib is told which headers there are
PLAIN = frozenset({"", "identity"})
SUPPORTED = {"gzip": _GZIP_BITS, "x-gzip": _GZIP_BITS, "deflate": _ZLIB_BITS}


def check_encoding(encoding: str) -> str:
    """A content-encoding in small letters; PLAIN or one of SUPPORTED. Raises UnsupportedEncodingError."""
    name = encoding.strip().lower()
    if name not in PLAIN and name not in SUPPORTED:
        raise UnsupportedEncodingError(
            f"a body in the content-encoding {name[:64]!r} is not read; send it with gzip or deflate, or as it is"
        )
    return name


def decompressed(raw: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body that was compressed. No more than `max_bytes` are made of it, whatever it would become.

    encoding: one of SUPPORTED. Raises BodyTooLargeError, and MalformedBodyError for what is not compressed in that way.
    """
    bits = SUPPORTED[encoding]
    if bits == _ZLIB_BITS and not _has_zlib_header(raw):
        bits = _BARE_BITS  # as many clients write deflate
    reader = zlib.decompressobj(bits)
    try:
        plain = reader.decompress(raw, max_bytes + 1)
    except zlib.error as error:
        raise MalformedBodyError(f"the body is not compressed with {encoding}: {error}") from None
    if len(plain) > max_bytes:
        raise BodyTooLargeError(f"the body is larger than {max_bytes} bytes when it is decompressed")
    if not reader.eof or reader.unused_data:
        raise MalformedBodyError(f"the body is not one whole {encoding} stream")
    return plain


def _has_zlib_header(raw: bytes) -> bool:
    return len(raw) >= 2 and raw[0] & 15 == 8 and int.from_bytes(raw[:2]) % 31 == 0
