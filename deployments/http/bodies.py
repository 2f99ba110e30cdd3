"""The bodies of requests: read and parsed within bounds.

The tenant is known by then, so that bodies of strangers are never read. Knows no routes and no kind of body.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from deployments.errors import BodyTooLargeError, MalformedBodyError
from deployments.http.encodings import PLAIN, check_encoding, decompressed
from deployments.http.fair_limit import FairLimit
from deployments.http.ignored import note_ignored
from deployments.http.parsing import BodyT, parse_request
from engine.errors import OverloadedError
from engine.tenant import Tenant

# Bytes of bodies that one ingress replica holds unparsed, unless a single body may be larger.
MAX_BYTES_IN_FLIGHT = 64 * 2**20
# Larger bodies are parsed in a thread, one at a time: one of 4 MiB takes a tenth of a second, and its objects much memory.
MAX_INLINE_BYTES = 64 * 2**10


class RequestBodies:
    """All that are under way in one ingress replica."""

    def __init__(self, max_body_bytes: int, *, is_strict: bool = False) -> None:
        """is_strict: unknown parameters are refused; else they are ignored, and noted."""
        self._max_body_bytes = max_body_bytes
        self._is_strict = is_strict
        self._max_bytes_in_flight = max(MAX_BYTES_IN_FLIGHT, max_body_bytes)
        self._in_flight = FairLimit()
        self._parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parser")

    async def parse(
        self, kind: type[BodyT], request: Request, tenant: Tenant, *, default: bytes = b""
    ) -> tuple[BodyT, dict[str, Any]]:
        """Reads the body, and parses it as parse_request does.

        default: what an empty body stands for. Raises BodyTooLargeError, RequestError, and OverloadedError if the
        bodies under way take too much memory.
        """
        encoding = check_encoding(request.headers.get("content-encoding", ""))
        self._check_size(int(length) if (length := request.headers.get("content-length", "")).isdecimal() else 0)
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in request.stream():
                if not chunk:
                    continue
                self._check_size(size + len(chunk))
                if not self._in_flight.try_take(tenant.tenant_id, len(chunk), self._max_bytes_in_flight):
                    raise OverloadedError("too many large requests are arriving at once; try again in a moment")
                size += len(chunk)
                chunks.append(chunk)
            raw = b"".join(chunks) or default
            chunks.clear()
            ignored: list[str] | None = None if self._is_strict else []
            if encoding in PLAIN and len(raw) <= MAX_INLINE_BYTES:
                parsed = parse_request(kind, raw, ignored)
            else:  # what is compressed may be large, too
                loop = asyncio.get_running_loop()
                parsed = await loop.run_in_executor(self._parser, self._parse, kind, raw, encoding, ignored)
            note_ignored(request, ignored or ())
            return parsed
        except ClientDisconnect:
            raise MalformedBodyError("the connection was closed before the end of the body") from None
        finally:
            if size:
                self._in_flight.give_back(tenant.tenant_id, size)

    def _parse(
        self, kind: type[BodyT], raw: bytes, encoding: str, ignored: list[str] | None
    ) -> tuple[BodyT, dict[str, Any]]:
        """In the parser's thread, so that no more than one body is decompressed at a time."""
        if encoding not in PLAIN and raw:
            raw = decompressed(raw, encoding, self._max_body_bytes)
        return parse_request(kind, raw, ignored)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise BodyTooLargeError(f"the body is larger than {self._max_body_bytes} bytes")

    def close(self) -> None:
        self._parser.shutdown(wait=False, cancel_futures=True)
