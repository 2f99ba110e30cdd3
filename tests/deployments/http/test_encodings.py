"""Compressed bodies: as clients write them, and malformed ones."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest

from deployments.errors import BodyTooLargeError, MalformedBodyError, UnsupportedEncodingError
from deployments.http.encodings import PLAIN, check_encoding, decompressed

TEXT = b"some text " * 100


def bare_deflate(raw: bytes) -> bytes:
    return zlib.compressobj(wbits=-15).compress(b"") + (lambda c: c.compress(raw) + c.flush())(
        zlib.compressobj(wbits=-15)
    )


COMPRESSED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate without a header": ("deflate", bare_deflate),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_was_compressed_is_plain_again(name: str) -> None:
    encoding, compress = COMPRESSED[name]
    assert decompressed(compress(TEXT), check_encoding(f" {encoding.upper()}"), len(TEXT)) == TEXT
    with pytest.raises(BodyTooLargeError):
        decompressed(compress(TEXT), encoding, len(TEXT) - 1)


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_is_damaged_or_goes_on_is_refused(name: str) -> None:
    encoding, compress = COMPRESSED[name]
    whole = compress(TEXT)
    for raw in (whole[:-1], whole[: len(whole) // 2], whole + b"x", b"", b"\x00", TEXT):
        with pytest.raises(MalformedBodyError):
            decompressed(raw, encoding, len(TEXT))


def test_no_more_is_made_of_a_bomb_than_a_body_may_have() -> None:
    bomb, max_bytes = gzip.compress(bytes(100_000_000)), 100_000
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLargeError):
            decompressed(bomb, "gzip", max_bytes)
        assert tracemalloc.get_traced_memory()[1] < 5 * max_bytes + len(bomb)
    finally:
        tracemalloc.stop()


def test_encodings() -> None:
    assert {check_encoding(""), check_encoding("identity")} == PLAIN
    for unknown in ("br", "zstd", "gzip, gzip", "x" * 1000):
        with pytest.raises(UnsupportedEncodingError) as caught:
            check_encoding(unknown)
        assert len(caught.value.message) < 200
