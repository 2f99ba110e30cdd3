"""The two connections to a peer: one for queries, one for chunks, so that no answer waits behind chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, Generic, TypeVar

from engine.core.plan import SlowTransfer
from engine.executor.peers.connection import Connection
from engine.executor.peers.loads import Loads, Pull
from engine.executor.peers.protocol import (
    MAX_KEYS,
    Buffer,
    Greeting,
    Header,
    Kind,
    ProtocolError,
    pack_frame,
    pack_keys,
    unpack_keys,
)
from engine.executor.peers.socket import PeerSocket
from engine.executor.peers.timing import Deadlines

T = TypeVar("T")

# How often a connection for chunks is looked at, in seconds.
WATCH_INTERVAL_S = 0.5
# It is closed when nothing comes for so long although something was asked for, or nothing was asked for.
STALL_S = 3.0
IDLE_S = 30.0
# A chunk that is not there by then is given up, so that the tier does not count as one that hangs.
MAX_LOAD_S = 8.0


class Lane(Connection):
    """What both have in common."""

    def __init__(
        self,
        name: str,
        block_bytes: int,
        connect: Callable[[], PeerSocket],
        greet: Callable[[PeerSocket], Greeting],
        on_alive: Callable[[], None],
        on_end: Callable[[Lane, BaseException | None], None],
    ) -> None:
        """on_alive: something has come from the peer. on_end: the connection is over; without an error, on purpose."""
        super().__init__(name, block_bytes)
        self._connect, self._greet_peer, self._on_alive, self._tell_end = connect, greet, on_alive, on_end

    def _open(self) -> PeerSocket:
        return self._connect()

    def _greet(self, connection: PeerSocket) -> Greeting:
        return self._greet_peer(connection)


class Query(Generic[T]):
    """A query, and where its answer goes.

    content: called just before it is sent. otherwise: the result if there is no answer, or nothing. is_patient: a peer that
    does not answer in time may be well. is_vital: one that does not has vanished.
    """

    def __init__(
        self,
        kind: Kind,
        content: Callable[[], bytes],
        decode: Callable[[bytes], T],
        otherwise: T,
        *,
        is_patient: bool = False,
        is_vital: bool = False,
    ) -> None:
        self.kind, self.content, self.decode = kind, content, decode
        self.is_patient, self.is_vital = is_patient, is_vital
        self.future: Future[T] = Future()
        self._otherwise = otherwise

    def end(self, answer: bytes | None) -> None:
        """Called once. Raises ProtocolError, after the query has ended, if the answer cannot be read."""
        error: ProtocolError | None = None
        result = self._otherwise
        if answer is not None:
            try:
                result = self.decode(answer)
            except ProtocolError as unreadable:
                error = unreadable
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(result)
        if error is not None:
            raise error


class QueryLane(Lane):
    """Queries that wait for their answers, by number."""

    def __init__(self, deadlines: Deadlines, on_late: Callable[[], None], *lane: Any) -> None:
        """on_late: the peer has not answered in time. lane: of Lane."""
        super().__init__(*lane)
        self._deadlines = deadlines
        self._on_late = on_late
        self._numbers = count(1)
        self._pending: dict[int, Query[Any]] = {}

    def ask(self, query: Query[Any], timeout_s: float) -> bool:
        """False = the connection has ended, and nothing is done with the query."""
        number = next(self._numbers)
        self._pending[number] = query
        if not self.put(_Question(query, number)) and self._pending.pop(number, None) is not None:
            return False
        self._deadlines.call_after(timeout_s, lambda: self._expire(number))
        return True

    def _expire(self, number: int) -> None:
        query = self._pending.pop(number, None)
        if query is None:
            return
        if query.is_vital:
            self.hang_up(TimeoutError("it does not answer any more"))
        elif not query.is_patient:
            self._on_late()
        query.end(None)

    def _on_frame(self, header: Header, connection: PeerSocket) -> None:
        if header.kind not in (Kind.ANSWER, Kind.NOTHING):
            raise ProtocolError(f"it answers a query with {header.kind.name}")
        content = self._receive(header, connection)
        self._on_alive()
        query = self._pending.pop(header.number, None)
        if query is not None:
            query.end(content if header.kind is Kind.ANSWER else None)

    def _on_end(self, error: BaseException | None) -> None:
        # Told first, so that what is asked next finds no connection that is over.
        self._tell_end(self, error)
        for number in list(self._pending):
            if (query := self._pending.pop(number, None)) is not None:
                query.end(None)


class _Question:
    """A query's frame."""

    def __init__(self, query: Query[Any], number: int) -> None:
        self._query, self._number = query, number

    def buffers(self) -> Sequence[Buffer]:
        return pack_frame(self._query.kind, self._query.content(), number=self._number)

    def end(self, *, ok: bool) -> None:
        pass


class BlockLane(Lane):
    """Chunks that were asked for, by key."""

    def __init__(self, loads: Loads, deadlines: Deadlines, *lane: Any) -> None:
        """lane: of Lane."""
        super().__init__(*lane)
        self._loads = loads
        self._deadlines = deadlines
        self._mutex = threading.Lock()
        self._pending: dict[bytes, Pull] = {}
        self._to_ask: list[bytes] = []
        self._last_frame_s = time.perf_counter()
        self._watch_later()

    def pull(self, transfer: SlowTransfer) -> bool:
        """Ask for a chunk. False = the connection has ended, and nothing is done with the transfer."""
        now = time.perf_counter()
        with self._mutex:
            if not self._pending:
                self._last_frame_s = now
            replaced = self._pending.get(transfer.key)
            self._pending[transfer.key] = Pull(transfer, now)
            self._to_ask.append(transfer.key)
            is_first = len(self._to_ask) == 1
        if replaced is not None:
            self._loads.fail(replaced.transfer, gone=True)
        is_open = self.put(_Asking(self)) if is_first else not self.closed.is_set()
        # What is pending when the connection is closed ends with it; what comes later is taken back.
        return is_open or self._take(transfer.key) is None

    def questions(self) -> Sequence[Buffer]:
        """The frames that ask for all chunks that were not asked for yet."""
        with self._mutex:
            keys, self._to_ask = self._to_ask, []
            keys = [key for key in keys if key in self._pending]
        parts = (keys[i : i + MAX_KEYS] for i in range(0, len(keys), MAX_KEYS))
        return [buffer for part in parts for buffer in pack_frame(Kind.GET, pack_keys(part))]

    def _take(self, key: bytes) -> Pull | None:
        with self._mutex:
            return self._pending.pop(key, None)

    def _on_frame(self, header: Header, connection: PeerSocket) -> None:
        if header.kind is Kind.BLOCK:
            self._loads.receive(self._take(header.key), header, connection, self.closed)
        elif header.kind is Kind.GONE:
            for key in unpack_keys(self._receive(header, connection)):
                if (pull := self._take(key)) is not None:
                    self._loads.fail(pull.transfer, gone=True)
        else:
            raise ProtocolError(f"it answers a request for chunks with {header.kind.name}")
        self._last_frame_s = time.perf_counter()
        self._on_alive()

    def _on_end(self, error: BaseException | None) -> None:
        self._tell_end(self, error)
        self._fail_older_than(0.0)

    def _fail_older_than(self, seconds: float) -> None:
        now = time.perf_counter()
        with self._mutex:
            late = [pull for pull in self._pending.values() if now - pull.since_s >= seconds]
            for pull in late:
                del self._pending[pull.transfer.key]
        for pull in late:
            self._loads.fail(pull.transfer, gone=True)

    def _watch_later(self) -> None:
        self._deadlines.call_after(WATCH_INTERVAL_S, self._watch)

    def _watch(self) -> None:
        if self.closed.is_set():
            return
        silence_s = time.perf_counter() - self._last_frame_s
        if self._pending and silence_s > STALL_S + 2 * self._loads.pace_s:
            self.hang_up(TimeoutError(f"no chunk has come for {silence_s:.1f} s"))
        elif not self._pending and silence_s > IDLE_S:
            self.hang_up()
        else:
            self._fail_older_than(MAX_LOAD_S)
            self._watch_later()


class _Asking:
    """The frames that ask for chunks."""

    def __init__(self, lane: BlockLane) -> None:
        self._lane = lane

    def buffers(self) -> Sequence[Buffer]:
        return self._lane.questions()

    def end(self, *, ok: bool) -> None:
        pass
