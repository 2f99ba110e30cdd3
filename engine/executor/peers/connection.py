"""One connection between peers, from its opening to its end: a thread opens it and writes, another one reads.

Any thread puts what is to be sent into the connection's outbox and goes on. What was put there is told once whether it was
sent, whatever happens. Knows neither chunks nor queries.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from engine.executor.peers.protocol import HEADER_BYTES, Buffer, Greeting, Header, Kind, pack_frame, unpack_header
from engine.executor.peers.socket import PeerSocket

logger = logging.getLogger(__name__)

# A side that says nothing for so long has vanished: while it lives, it asks for the directory every few seconds.
SILENCE_S = 60.0
# The content of a frame has to follow its header in that time.
CONTENT_TIMEOUT_S = 5.0
# A frame that the other side does not read in that time is given up, and the connection with it.
SEND_TIMEOUT_S = 2.0


class Outgoing(Protocol):
    """Something to be sent."""

    def buffers(self) -> Sequence[Buffer]:
        """Called once, in the thread that writes, just before they are sent; empty = nothing any more."""
        ...

    def end(self, *, ok: bool) -> None:
        """Called once: they were sent, or were not."""
        ...


class Message:
    """A frame whose end is of no interest."""

    def __init__(self, kind: Kind, content: bytes = b"", number: int = 0) -> None:
        self._kind, self._content, self._number = kind, content, number

    def buffers(self) -> Sequence[Buffer]:
        return pack_frame(self._kind, self._content, number=self._number)

    def end(self, *, ok: bool) -> None:
        pass


class Connection:
    """The base of the connections; its classes say how it is opened, what is done with frames, and at its end."""

    def __init__(self, name: str, block_bytes: int, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        """name: of its threads. block_bytes: of a block in a frame."""
        self.closed = threading.Event()
        self.other: Greeting | None = None
        self._name = name
        self._block_bytes = block_bytes
        self._send_timeout_s = send_timeout_s
        self._socket: PeerSocket | None = None
        self._outbox: deque[Outgoing] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Raises RuntimeError, and the connection is closed, if the system has no thread for it."""
        try:
            self._thread.start()
        except RuntimeError:
            self.hang_up()
            raise

    def put(self, item: Outgoing) -> bool:
        """Send it when it is its turn. False = the connection is closed, and nothing is done with the item."""
        with self._changed:
            if self.closed.is_set():
                return False
            self._outbox.append(item)
            self._changed.notify()
        return True

    def hang_up(self, error: BaseException | None = None) -> None:
        """End it; returns at once. error: why, if that is not on purpose."""
        with self._changed:
            if not self.closed.is_set():
                self._error = error
                self.closed.set()
                self._changed.notify()
            if self._socket is not None:
                self._socket.hang_up()

    def join(self, timeout_s: float) -> bool:
        """Whether its threads have ended within that time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- for its classes -----------------------------------------------------------------------------------------------

    def _open(self) -> PeerSocket:
        """The connected socket. Raises OSError."""
        raise NotImplementedError

    def _greet(self, connection: PeerSocket) -> Greeting:
        """Who is on the other side. Raises OSError."""
        raise NotImplementedError

    def _on_frame(self, header: Header, connection: PeerSocket) -> None:
        """Receive the content, and do what is to be done; in the thread that reads. Raises OSError to hang up."""
        raise NotImplementedError

    def _on_end(self, error: BaseException | None) -> None:
        """It is over. error: None = on purpose."""
        raise NotImplementedError

    @staticmethod
    def _receive(header: Header, connection: PeerSocket) -> bytes:
        """The content of a frame that is no block."""
        content = connection.receive(header.length, CONTENT_TIMEOUT_S)
        header.check(content)
        return content

    # -- its threads ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reader: threading.Thread | None = None
        try:
            opened = self._open()
            with self._changed:
                self._socket = opened
            if not self.closed.is_set():
                self.other = self._greet(opened)
                thread = threading.Thread(target=self._read, args=(opened,), name=f"{self._name}-read", daemon=True)
                thread.start()
                reader = thread
                self._write(opened)
        except OSError as error:
            self.hang_up(error)
        except Exception as error:
            logger.exception("a connection to a peer failed")
            self.hang_up(error)
        self.hang_up()
        if reader is not None:
            reader.join()
        if self._socket is not None:
            self._socket.close()
        for item in self._outbox:
            item.end(ok=False)
        self._on_end(self._error)

    def _write(self, connection: PeerSocket) -> None:
        while (item := self._next()) is not None:
            ok = False
            try:
                if buffers := item.buffers():
                    connection.send(buffers, self._send_timeout_s)
                    ok = True
            finally:
                item.end(ok=ok)

    def _next(self) -> Outgoing | None:
        """What is to be sent next; waits for it. None = the connection is closed."""
        with self._changed:
            while not self._outbox and not self.closed.is_set():
                self._changed.wait()
            return None if self.closed.is_set() else self._outbox.popleft()

    def _read(self, connection: PeerSocket) -> None:
        try:
            while not self.closed.is_set():
                data = connection.receive(HEADER_BYTES, SILENCE_S)
                self._on_frame(unpack_header(data, self._block_bytes), connection)
        except OSError as error:
            self.hang_up(error)
        except Exception as error:
            logger.exception("what a peer has said cannot be dealt with")
            self.hang_up(error)
