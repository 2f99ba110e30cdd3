"""Who knows how much of which conversation: an engine's own directory, and what it knows of its peers' ones.

A conversation is known by a hash of its name that only holders of the secret can make. Rows that are out of date do no harm:
they say where to ask. Knows no socket and no clock.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from engine.executor.peers.messages import HASH_BYTES, MAX_ROWS, DirectoryRow


def hash_conversation(conversation_id: str, secret: bytes) -> bytes:
    key = hashlib.sha256(b"directory\0" + secret).digest()
    name = conversation_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(name, digest_size=HASH_BYTES, key=key).digest()


class _Row(NamedTuple):
    version: int
    num_tokens: int
    last_used_s: float


class Directory:
    """The newest rows of one engine, and in which order they changed. Any thread may call it."""

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._rows: OrderedDict[bytes, _Row] = OrderedDict()  # in the order of versions
        self._version = 0
        self._mutex = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def note(self, hashed_id: bytes, num_tokens: int, now: float) -> int:
        """It has so many tokens of the conversation now; 0 = none, which is a row too, so that others learn of it.

        Returns the version with that change.
        """
        with self._mutex:
            self._version += 1
            self._put(hashed_id, _Row(self._version, num_tokens, now))
            return self._version

    def changes_since(self, version: int, now: float) -> tuple[int, list[DirectoryRow]]:
        """The present version, and what has changed since that one: the older changes first."""
        with self._mutex:  # not for longer than it takes to look at them
            newest = takewhile(lambda entry: entry[1].version > version, reversed(self._rows.items()))
            changed, present = list(newest), self._version
        return present, [_row_of(hashed_id, row, now) for hashed_id, row in reversed(changed)]

    # -- of a peer -----------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Up to which changes are known."""
        return self._version

    def take(self, version: int, rows: Sequence[DirectoryRow], now: float) -> None:
        """Changes of a peer's directory, up to that version."""
        for row in rows:
            with self._mutex:  # for each, because others look for one meanwhile
                self._take_row(version, row, now)
        self._version = version

    def take_told(self, version: int, row: DirectoryRow, now: float) -> None:
        """One change of a peer's directory, which made it that version, before the peer is asked for all."""
        with self._mutex:
            if version > self._version:
                self._take_row(version, row, now)

    def find(self, hashed_id: bytes, now: float) -> DirectoryRow | None:
        with self._mutex:
            row = self._rows.get(hashed_id)
        return None if row is None else _row_of(hashed_id, row, now)

    def _take_row(self, version: int, row: DirectoryRow, now: float) -> None:
        known = self._rows.get(row.hashed_id)
        if known is not None and known.version > version:  # told before an answer that was made earlier
            return
        if row.num_tokens:
            self._put(row.hashed_id, _Row(version, row.num_tokens, now - row.age_s))
        else:
            self._rows.pop(row.hashed_id, None)

    def _put(self, hashed_id: bytes, row: _Row) -> None:
        self._rows.pop(hashed_id, None)
        self._rows[hashed_id] = row
        if len(self._rows) > self._max_rows:
            self._rows.popitem(last=False)


def _row_of(hashed_id: bytes, row: _Row, now: float) -> DirectoryRow:
    return DirectoryRow(hashed_id, row.num_tokens, max(0.0, now - row.last_used_s))
