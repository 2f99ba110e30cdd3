"""Records what an engine was asked, as a trace in Mooncake's format: times, lengths and hashes of blocks; no text, no token.

Whatever reads Mooncake's traces replays it: `pensieve bench`, the simulator, aiperf. Hashes are keyed with a secret that lies
beside the trace: without it, nothing tells whether a text was in a prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import tempfile
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore

from engine.errors import ConfigError
from engine.paths import private_folder
from engine.workloads.mooncake import BLOCK_TOKENS, Row, format_row

logger = logging.getLogger(__name__)

# Requests that wait to be written; further ones are left out, so that a slow disk delays nothing.
MAX_WAITING = 1024
# Then the recording ends.
MAX_BYTES = 1 << 30
# Sessions whose last answer is remembered, for the pause before the next turn.
MAX_SESSIONS = 1 << 16
SALT_FILE = "salt"
# Numbers that every reader of JSON keeps exactly.
_HASH_BITS = 53


class TraceRecorder:
    """The trace of one engine. A thread of its own hashes and writes; what goes wrong there ends the recording only."""

    def __init__(self, folder: Path, number: int) -> None:
        """number: of this engine among those with this folder; the file is trace-NUMBER.jsonl, to which it appends.

        Raises ConfigError.
        """
        try:
            private_folder(folder)
            self._salt = _salt_of(folder)
            self._file = (folder / f"trace-{number}.jsonl").open("a")
        except OSError as error:
            raise ConfigError(
                f"record_trace {folder} cannot be written: {error.strerror}; name a folder that can be made",
                param="record_trace",
            ) from error
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trace")
        self._room = BoundedSemaphore(MAX_WAITING)
        self._ended: OrderedDict[str, float] = OrderedDict()
        self._is_recording = True
        self.num_left_out = 0

    def record(
        self, tenant: str, conversation_id: str | None, token_ids: Sequence[int], num_output_tokens: int, begin_s: float
    ) -> None:
        """An answer has ended. Returns at once. begin_s: of the wall clock, when it was asked."""
        if not self._is_recording or not num_output_tokens:
            return
        if not self._room.acquire(blocking=False):
            self.num_left_out += 1
            return
        self._thread.submit(self._write, tenant, conversation_id, token_ids, num_output_tokens, begin_s, time.time())

    def close(self) -> None:
        """Write what waits. May be called again."""
        self._thread.shutdown()
        self._file.close()
        if self.num_left_out:
            logger.warning("record_trace: %d requests were left out, because the disk was too slow", self.num_left_out)
            self.num_left_out = 0

    def _write(
        self,
        tenant: str,
        conversation_id: str | None,
        token_ids: Sequence[int],
        num_output_tokens: int,
        begin_s: float,
        end_s: float,
    ) -> None:
        try:
            session = "" if conversation_id is None else self._hash(f"{tenant}\0{conversation_id}".encode()).hex()
            row = Row(
                begin_s,
                len(token_ids),
                num_output_tokens,
                self._block_hashes(tenant, token_ids),
                session,
                self._pause(session, begin_s, end_s),
            )
            self._file.write(format_row(row) + "\n")
            self._file.flush()
            if self._file.tell() > MAX_BYTES:
                logger.warning("record_trace: the trace has %d MiB, and ends here", MAX_BYTES >> 20)
                self._is_recording = False
        except (OSError, ValueError) as error:
            logger.warning("record_trace: the recording ends: %s", error)
            self._is_recording = False
        finally:
            self._room.release()

    def _pause(self, session: str, begin_s: float, end_s: float) -> float | None:
        """From the end of the session's last answer; None if it is not known."""
        if not session:
            return None
        before_s = self._ended.pop(session, None)
        self._ended[session] = end_s
        if len(self._ended) > MAX_SESSIONS:
            self._ended.popitem(last=False)
        return None if before_s is None else max(0.0, begin_s - before_s)

    def _block_hashes(self, tenant: str, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Each of all up to its end, and of the tenant, whose cache no other one sees."""
        packed = array("I", token_ids)
        key, hashes = self._hash(tenant.encode()), []
        for begin in range(0, len(packed), BLOCK_TOKENS):
            key = self._hash(key + packed[begin : begin + BLOCK_TOKENS].tobytes())
            hashes.append(int.from_bytes(key) >> (8 * len(key) - _HASH_BITS))
        return tuple(hashes)

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._salt, digest_size=16).digest()


def _salt_of(folder: Path) -> bytes:
    """The secret of this folder, made by the first engine that asks for it."""
    path = folder / SALT_FILE
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)  # as a whole, and only the first time
    return path.read_bytes()
