"""Answers the peers: a listener, and for each connection of a peer a thread that reads and one that writes."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, TypeVar

from engine.core.handover import FoundChunks
from engine.core.plan import ChunkRecord
from engine.executor.peers.connection import Connection, Message
from engine.executor.peers.directory import Directory
from engine.executor.peers.messages import (
    DirectoryRow,
    pack_found,
    pack_rows,
    unpack_id,
    unpack_offer,
    unpack_told,
    unpack_version,
)
from engine.executor.peers.protocol import (
    MAX_CONTENT_BYTES,
    Greeting,
    Header,
    Kind,
    ProtocolError,
    StrangerError,
    unpack_keys,
)
from engine.executor.peers.sends import Sends
from engine.executor.peers.socket import PeerSocket, greet

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Of a peer's two connections each; strangers take places until they have failed to prove that they are none.
MAX_CONNECTIONS = 256
# Queries of one connection that are being answered; further ones get nothing.
MAX_QUERIES = 256
# After an error of the listener itself, such as too many open files.
ACCEPT_PAUSE_S = 0.2


class PeerHandlers(Protocol):
    """What the transport asks of its engine, in threads of its own. All calls return at once."""

    def find(self, keys: Sequence[bytes]) -> FoundChunks:
        """Which of these chunks are here."""
        ...

    def send(self, keys: Sequence[bytes]) -> None:
        """Plan transfers of these chunks to the tier of peers, or decline them: each key once, if not at once."""
        ...

    def transcript(self, conversation_id: str) -> Future[bytes | None]:
        """What a conversation has said; None if that is not known."""
        ...

    def offered(
        self, conversation_id: str, records: Sequence[ChunkRecord], transcript: bytes, peer_id: str
    ) -> Future[bool]:
        """A peer that ends would like to leave a conversation here; ends when all was taken that is wanted."""
        ...


class PeerServer:
    """Listens, and serves those that prove to be peers."""

    def __init__(
        self,
        secret: bytes,
        ours: Greeting,
        host: str,
        sends: Sends,
        directory: Directory,
        on_told: Callable[[Greeting, int, DirectoryRow], None],
    ) -> None:
        """Take a port. Raises OSError if that is not possible.

        on_told: is told a change of a peer's directory, with that peer and the version.
        """
        self.is_draining = False
        self.secret, self.ours, self.sends, self.directory, self.on_told = secret, ours, sends, directory, on_told
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=MAX_CONNECTIONS)
        name = self._listener.getsockname()
        self.address: tuple[str, int] = (name[0], name[1])
        self.handlers: PeerHandlers | None = None
        self._connections: set[ServedConnection] = set()
        self._reasons: set[str] = set()
        self._mutex = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._accept, name="peer-listen", daemon=True)

    def run(self, handlers: PeerHandlers) -> None:
        self.handlers = handlers
        self._thread.start()

    def close(self, deadline_s: float) -> bool:
        """End all connections. Returns whether all threads have ended by then."""
        self._is_closing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self._listener.close()
        with self._mutex:
            connections = list(self._connections)
        for connection in connections:
            connection.hang_up()
        ended = [connection.join(max(0.0, deadline_s - time.monotonic())) for connection in connections]
        return all(ended) and not self._thread.is_alive()

    def remove(self, connection: ServedConnection, error: BaseException | None) -> None:
        """It has ended."""
        with self._mutex:
            self._connections.discard(connection)
            reason = str(error)
            is_new = isinstance(error, StrangerError) and reason not in self._reasons and len(self._reasons) < 64
            if is_new:
                self._reasons.add(reason)
        if is_new:
            logger.warning("refused a connection from %s: %s (told once)", connection.address, reason)
        elif error is not None and not self._is_closing:
            logger.debug("the connection from %s has ended: %r", connection.address, error)

    def _accept(self) -> None:
        is_told = False
        while not self._is_closing:
            try:
                self._welcome(*self._listener.accept())
                is_told = False
            except (OSError, RuntimeError) as error:  # no more files, or threads
                if self._is_closing:
                    return
                if not is_told:
                    logger.warning("connections of peers cannot be accepted at present: %s", error)
                is_told = True
                time.sleep(ACCEPT_PAUSE_S)

    def _welcome(self, tcp: socket.socket, address: tuple[str, int]) -> None:
        """Serve a connection, unless there are too many. Raises RuntimeError if the system has no thread for it."""
        connection = ServedConnection(tcp, address[0], self)
        with self._mutex:
            has_room = len(self._connections) < MAX_CONNECTIONS and not self._is_closing
            if has_room:
                try:
                    connection.start()
                    self._connections.add(connection)
                except RuntimeError:
                    tcp.close()
                    raise
        if not has_room:
            tcp.close()


class ServedConnection(Connection):
    """One that a peer has opened."""

    def __init__(self, tcp: socket.socket, address: str, server: PeerServer) -> None:
        super().__init__(f"peer-serve-{address}", server.ours.block_bytes, server.sends.timeout_s)
        self.address = address
        self._tcp = tcp
        self._server = server
        self._num_queries = 0
        self._queries_mutex = threading.Lock()

    def _open(self) -> PeerSocket:
        return PeerSocket(self._tcp)

    def _greet(self, connection: PeerSocket) -> Greeting:
        return greet(connection, self._server.secret, self._server.ours, is_client=False)

    def _on_end(self, error: BaseException | None) -> None:
        self._tcp.close()
        self._server.remove(self, error)

    def _on_frame(self, header: Header, connection: PeerSocket) -> None:
        if header.kind is Kind.BLOCK:
            raise ProtocolError("it sends a block without being asked")
        content = self._receive(header, connection)
        handlers, server, number = self._server.handlers, self._server, header.number
        assert handlers is not None
        assert self.other is not None
        match header.kind:
            case Kind.GET:
                server.sends.want(unpack_keys(content), self, handlers.send)
            case Kind.FIND:
                keys = unpack_keys(content)
                self._answer(number, lambda: _done(handlers.find(keys)), pack_found)
            case Kind.DIRECTORY:
                version, rows = server.directory.changes_since(unpack_version(content), time.monotonic())
                self.put(Message(Kind.ANSWER, pack_rows(version, rows), number))
            case Kind.TOLD:
                server.on_told(self.other, *unpack_told(content))
            case Kind.TRANSCRIPT:
                conversation_id = unpack_id(content)
                self._answer(number, lambda: handlers.transcript(conversation_id), lambda transcript: transcript)
            case Kind.OFFER if server.is_draining:
                self.put(Message(Kind.NOTHING, number=number))
            case Kind.OFFER:
                offer, peer_id = unpack_offer(content, server.ours.chunk_size), self.other.peer_id
                values = (offer.conversation_id, offer.records, offer.transcript, peer_id)
                self._answer(number, lambda: handlers.offered(*values), lambda is_taken: b"" if is_taken else None)
            case _:
                raise ProtocolError(f"it sends {header.kind.name} without being asked")

    def _answer(self, number: int, ask: Callable[[], Future[T]], encode: Callable[[T], bytes | None]) -> None:
        """Answer a query when the engine does; with NOTHING if it fails, or has nothing."""
        with self._queries_mutex:
            is_too_much = self._num_queries >= MAX_QUERIES
            self._num_queries += not is_too_much
        if is_too_much:
            self.put(Message(Kind.NOTHING, number=number))
            return

        def finish(future: Future[T]) -> None:
            with self._queries_mutex:
                self._num_queries -= 1
            has_failed = future.cancelled() or future.exception() is not None
            content = None if has_failed else encode(future.result())
            if content is None or len(content) > MAX_CONTENT_BYTES:
                self.put(Message(Kind.NOTHING, number=number))
            else:
                self.put(Message(Kind.ANSWER, content, number))

        try:
            answer = ask()
        except Exception as error:  # the engine may be stopping
            logger.warning("a peer's query cannot be answered: %r", error)
            answer = Future()
            answer.set_exception(error)
        answer.add_done_callback(finish)


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future
