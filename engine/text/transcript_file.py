"""What conversations have said, in a file, so that their exact token ids outlive the process.

KV without the ids that it was computed for is hardly found again: an answer that is tokenised anew may get others. A row is
one conversation, with a checksum; whatever is wrong with the file is a conversation that is not known. Written by a thread
of its own, about once a second.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sqlite3
import struct
import sys
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

from engine.text.transcript import Remembered, Transcript
from engine.text.turns import Turn

logger = logging.getLogger(__name__)

FILE_NAME = "transcripts.db"
WRITE_INTERVAL_S = 1.0
CLOSE_TIMEOUT_S = 5.0
# Conversations that are asked for at a time.
MAX_WANTED = 256
_FRAME = struct.Struct("<II")  # checksum of what follows; length of the head
_TABLE = "CREATE TABLE IF NOT EXISTS conversations (id TEXT PRIMARY KEY, last_used REAL, content BLOB) WITHOUT ROWID"
_INDEX = "CREATE INDEX IF NOT EXISTS by_use ON conversations (last_used)"


class TranscriptFile:
    """The conversations of one engine. Any thread may ask; one tells. No call waits for the disk but `close`.

    num_written_bytes: of the rows that were written so far. SQLite writes each twice, to its log and then to its file.
    """

    def __init__(self, folder: Callable[[], Path | None], max_bytes: int) -> None:
        """Opens no file yet.

        folder: where the file is, or None as long as there is no place.
        max_bytes: of all conversations; the least recently used ones go.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self.num_written_bytes = 0
        self._database: sqlite3.Connection | None = None
        self._mutex = threading.Lock()  # of the connection
        self._pending: dict[str, Remembered] = {}
        self._wanted: queue.SimpleQueue[tuple[str, Future[Remembered | None]] | None] = queue.SimpleQueue()
        self._is_closing = threading.Event()
        # Daemons, so that a disk that hangs does not keep the process.
        self._writer = threading.Thread(target=self._write_until_closed, name="transcripts-write", daemon=True)
        self._reader = threading.Thread(target=self._read_until_closed, name="transcripts-read", daemon=True)
        self._writer.start()
        self._reader.start()

    def find(self, conversation_id: str) -> Future[Remembered | None]:
        """What a conversation has said; None if it is not known, or too many are asked for."""
        found: Future[Remembered | None] = Future()
        remembered = self._pending.get(conversation_id)
        if remembered is not None or self._wanted.qsize() >= MAX_WANTED:
            found.set_result(remembered)
        else:
            self._wanted.put((conversation_id, found))
        return found

    def _read_until_closed(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            conversation_id, found = wanted
            if found.set_running_or_notify_cancel():
                found.set_result(self._read(conversation_id))

    def _read(self, conversation_id: str) -> Remembered | None:
        with self._mutex:
            try:
                database = self._open()
                if database is None:
                    return None
                query = "SELECT content FROM conversations WHERE id = ?"
                with closing(database.execute(query, (_key(conversation_id),))) as cursor:
                    row = cursor.fetchone()
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)
                return None
        return None if row is None else decode(conversation_id, row[0])

    def put(self, conversation_id: str, remembered: Remembered) -> None:
        """Keep a conversation as it is now; returns at once."""
        self._pending[conversation_id] = remembered

    def close(self) -> None:
        """Write what is left, unless the disk hangs."""
        self._is_closing.set()
        self._wanted.put(None)
        self._writer.join(CLOSE_TIMEOUT_S)
        self._reader.join(CLOSE_TIMEOUT_S)
        if not (self._writer.is_alive() or self._reader.is_alive()):
            self._close()

    def _write_until_closed(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_closing.wait(WRITE_INTERVAL_S)
            # Of a copy: it may be told again meanwhile, and `find` finds it until it is written.
            rows = list(self._pending.copy().items())
            self._write(rows)
            for conversation_id, remembered in rows:
                if self._pending.get(conversation_id) is remembered:
                    del self._pending[conversation_id]

    def _write(self, conversations: Sequence[tuple[str, Remembered]]) -> None:
        if not conversations:
            return
        now = time.time()
        rows = [(_key(name), now, encode(name, remembered)) for name, remembered in conversations]
        with self._mutex:
            try:
                database = self._open()
                if database is None:
                    return
                with database:
                    database.executemany("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?)", rows)
                    self._make_room(database)
                self.num_written_bytes += sum(len(content) for _, _, content in rows)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)

    def _make_room(self, database: sqlite3.Connection) -> None:
        (num_bytes,) = database.execute("SELECT COALESCE(SUM(LENGTH(content)), 0) FROM conversations").fetchone()
        while num_bytes > self._max_bytes:
            oldest = database.execute(
                "SELECT id, LENGTH(content) FROM conversations ORDER BY last_used LIMIT 64"
            ).fetchall()
            for name, length in oldest:
                if num_bytes > self._max_bytes:
                    database.execute("DELETE FROM conversations WHERE id = ?", (name,))
                    num_bytes -= length

    def _open(self) -> sqlite3.Connection | None:
        folder = self._folder()
        if self._database is None and folder is not None:
            path = folder / FILE_NAME
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # its log gets the same mode
            database = sqlite3.connect(path, check_same_thread=False, timeout=1.0)
            try:
                for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL", _TABLE, _INDEX):
                    database.execute(statement)
                database.commit()
            except BaseException:
                database.close()
                raise
            self._database = database
        return self._database

    def _give_up(self, error: Exception) -> None:
        """Close the file, to try again with the next call; remove it if it is damaged."""
        logger.warning("the file with the transcripts of conversations cannot be used at present: %s", error)
        self._close()
        folder = self._folder()
        is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        if is_damaged and folder is not None:
            for suffix in ("", "-wal", "-shm"):
                with suppress(OSError):
                    (folder / (FILE_NAME + suffix)).unlink()

    def _close(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
        self._database = None


def _key(conversation_id: str) -> str:
    """As SQLite can have it: a name may hold anything."""
    return conversation_id.encode("utf-8", "backslashreplace").decode()


def encode(conversation_id: str, remembered: Remembered) -> bytes:
    """The rows of ids, anchors and texts, behind a head that says how long they are and has the rest."""
    head, parts = [], []
    for branch in remembered.branches:
        anchors = array("I", chain.from_iterable(branch.anchors))
        text = branch.text.encode("utf-8", "surrogatepass")
        head.append([len(branch.token_ids), len(anchors), len(text), branch.fingerprint, branch.answer_start])
        parts += [branch.token_ids.tobytes(), anchors.tobytes(), text]
    turns = [
        [key.hex(), turn.reasoning, turn.beginning.hex(), turn.num_tokens, turn.tools_key.hex(), turn.system_key.hex()]
        for key, turn in remembered.turns
    ]
    packed = json.dumps([conversation_id, sys.byteorder, head, turns]).encode()
    body = b"".join([packed, *parts])
    return _FRAME.pack(zlib.crc32(body), len(packed)) + body


def decode(conversation_id: str, content: bytes) -> Remembered | None:
    """None if a single bit is wrong, or it is another conversation."""
    try:
        checksum, head_len = _FRAME.unpack_from(content)
        body = memoryview(content)[_FRAME.size :]
        if zlib.crc32(body) != checksum:
            return None
        name, byteorder, head, turns = json.loads(bytes(body[:head_len]))
        if (name, byteorder) != (conversation_id, sys.byteorder):
            return None
        rest, branches = body[head_len:], []
        for num_tokens, num_numbers, num_bytes, fingerprint, answer_start in head:
            token_ids, rest = _numbers(rest, num_tokens)
            anchors, rest = _numbers(rest, num_numbers)
            text, rest = bytes(rest[:num_bytes]).decode("utf-8", "surrogatepass"), rest[num_bytes:]
            pairs = tuple(zip(anchors[::2], anchors[1::2], strict=True))
            start = None if answer_start is None else (answer_start[0], answer_start[1])
            branches.append(Transcript(token_ids, text, pairs, fingerprint, start))
        return Remembered(tuple(branches), tuple((bytes.fromhex(key), _turn(*turn)) for key, *turn in turns))
    except (struct.error, ValueError, TypeError) as error:
        logger.warning("a transcript cannot be read: %r", error)
        return None


def _numbers(data: memoryview, num: int) -> tuple[array[int], memoryview]:
    """So many of them, and what follows."""
    numbers = array("I")
    end = num * numbers.itemsize
    numbers.frombytes(data[:end])
    return numbers, data[end:]


def _turn(reasoning: str, beginning: str, num_tokens: int, tools_key: str, system_key: str) -> Turn:
    keys = map(bytes.fromhex, (tools_key, system_key))
    return Turn(reasoning, bytes.fromhex(beginning), num_tokens, *keys)
