"""One peer, as an engine knows it: its two connections, its directory, and whether it is left alone at present.

Connections are made when they are needed. A peer that fails is left alone for a while, in which nothing waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from engine.core.plan import SlowTransfer
from engine.executor.peers.connection import Connection, Message
from engine.executor.peers.directory import Directory
from engine.executor.peers.lanes import BlockLane, Lane, Query, QueryLane
from engine.executor.peers.loads import Loads
from engine.executor.peers.messages import DirectoryRow, pack_rows, pack_version, unpack_rows
from engine.executor.peers.protocol import Greeting, Kind, StrangerError
from engine.executor.peers.socket import PeerSocket, greet
from engine.executor.peers.timing import BackOff, Deadlines

logger = logging.getLogger(__name__)
T = TypeVar("T")
AnyLane = TypeVar("AnyLane", QueryLane, BlockLane)

# A peer that does not tell its directory in that time has vanished.
DIRECTORY_TIMEOUT_S = 10.0


class Peer:
    """One peer. Any thread may call it, and no call waits.

    is_listed: it is one of those that are said to be there.
    """

    def __init__(
        self,
        peer_id: str,
        address: tuple[str, int],
        secret: bytes,
        ours: Greeting,
        loads: Loads,
        deadlines: Deadlines,
    ) -> None:
        """Connects to nothing yet. ours: who we are."""
        self.peer_id, self.address = peer_id, address
        self.is_listed = True
        self._secret, self._ours, self._loads, self._deadlines = secret, ours, loads, deadlines
        self._rows = Directory()
        self._incarnation: str | None = None
        self._back_off = BackOff()
        self._queries: QueryLane | None = None
        self._blocks: BlockLane | None = None
        self._open: set[Connection] = set()
        self._mutex = threading.Lock()
        self._is_closing = False
        self._last_reason = ""

    @property
    def rows(self) -> Directory:
        """Its directory, as far as it was told."""
        return self._rows

    def is_aside(self) -> bool:
        """Whether it is left alone at present."""
        return not self._back_off.is_over(time.monotonic())

    def is_connected(self) -> bool:
        return bool(self._open)

    def ask(self, query: Query[T], timeout_s: float) -> Future[T]:
        """Ask it something. The future ends in that time."""
        for _ in range(2):  # a connection may just be ending
            lane = self._query_lane()
            if lane is not None and lane.ask(query, timeout_s):
                return query.future
        query.end(None)
        return query.future

    def pull(self, transfer: SlowTransfer) -> None:
        """Ask it for a chunk. The transfer's end is told to `loads`."""
        for _ in range(2):
            lane = self._block_lane()
            if lane is not None and lane.pull(transfer):
                return
        self._loads.fail(transfer, gone=True)

    def refresh(self) -> None:
        """Ask what has changed in its directory."""
        asked: list[Directory] = []

        def content() -> bytes:
            asked.append(self._rows)  # of the process that is connected now
            return pack_version(asked[0].version)

        def take(answer: bytes) -> None:
            asked[0].take(*unpack_rows(answer), time.monotonic())

        if not self.is_aside():
            self.ask(Query(Kind.DIRECTORY, content, take, None, is_vital=True), DIRECTORY_TIMEOUT_S)

    def tell(self, version: int, row: DirectoryRow) -> None:
        """Tell it a change of our directory, which made it that version, before it asks for all."""
        lane = self._query_lane()
        if lane is not None:
            lane.put(Message(Kind.TOLD, pack_rows(version, (row,))))

    def hear(self, incarnation: str, version: int, row: DirectoryRow) -> None:
        """It has told a change of its directory. incarnation: of the process that did."""
        with self._mutex:
            rows = self._rows if incarnation == self._incarnation else None  # else it is asked for all first
        if rows is not None:
            rows.take_told(version, row, time.monotonic())

    def close(self) -> list[Connection]:
        """Hang up, for good. Returns what has not ended by now."""
        with self._mutex:
            self._is_closing = True
            connections = list(self._open)
        for connection in connections:
            connection.hang_up()
        return connections

    # -- connections ---------------------------------------------------------------------------------------------------

    def _query_lane(self) -> QueryLane | None:
        with self._mutex:
            if self._queries is None:
                self._queries = self._connect(partial(QueryLane, self._deadlines, self._fail))
            return self._queries

    def _block_lane(self) -> BlockLane | None:
        with self._mutex:
            if self._blocks is None:
                self._blocks = self._connect(partial(BlockLane, self._loads, self._deadlines))
            return self._blocks

    def _connect(self, make: Callable[..., AnyLane]) -> AnyLane | None:
        if self._is_closing or self.is_aside():
            return None
        connect = partial(PeerSocket.connect, self.address)
        name, block_bytes = f"peer-ask-{self.peer_id}", self._ours.block_bytes
        lane = make(name, block_bytes, connect, self._greet, self._back_off.end, self._note_end)
        try:
            lane.start()
        except RuntimeError as error:
            self._fail()
            logger.warning("no connection to peer %s: %s", self.peer_id, error)
            return None
        self._open.add(lane)
        return lane

    def _greet(self, connection: PeerSocket) -> Greeting:
        theirs = greet(connection, self._secret, self._ours, is_client=True)
        if theirs.peer_id != self.peer_id:
            raise StrangerError(f"{theirs.peer_id} has its address now")
        with self._mutex:
            if theirs.incarnation != self._incarnation:  # what an earlier process of that name had is gone
                self._incarnation, self._rows = theirs.incarnation, Directory()
        self._back_off.end()
        return theirs

    def _note_end(self, lane: Lane, error: BaseException | None) -> None:
        with self._mutex:
            self._open.discard(lane)
            if self._queries is lane:
                self._queries = None
            if self._blocks is lane:
                self._blocks = None
        if error is None or self._is_closing:
            return
        self._fail()
        reason = str(error)
        is_new, self._last_reason = reason != self._last_reason, reason
        log = logger.warning if is_new and isinstance(error, StrangerError) else logger.info if is_new else logger.debug
        log("peer %s at %s:%d is left alone for a while: %s", self.peer_id, *self.address, reason)

    def _fail(self) -> None:
        self._back_off.fail(time.monotonic())


def query_of(kind: Kind, content: bytes, decode: Callable[[bytes], T], otherwise: T, **traits: Any) -> Query[T]:
    """A query whose content is known."""
    return Query(kind, lambda: content, decode, otherwise, **traits)
