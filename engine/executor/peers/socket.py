"""One TCP connection between peers as blocking calls that all end, and how the two sides prove who they are.

Every call of a socket is bounded by the system's own time-outs, which hold for a peer that trickles, too: the time of one
call counts, not that of each byte. Another thread ends all calls with `hang_up`.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

from engine.executor.peers.protocol import (
    HAIL_BYTES,
    LENGTH_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    Buffer,
    Greeting,
    StrangerError,
    check_proof,
    pack_greeting,
    pack_hail,
    pack_length,
    prove,
    unpack_greeting,
    unpack_hail,
    unpack_length,
)

CONNECT_TIMEOUT_S = 1.0
# Each message of the two sides that meet.
HANDSHAKE_TIMEOUT_S = 5.0
# A machine that is gone is noticed.
LOST_AFTER_S = 10.0


class PeerSocket:
    """A connected socket. One thread may receive while another one sends."""

    def __init__(self, tcp: socket.socket) -> None:
        tcp.settimeout(None)  # else Python would make it one that does not block
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LOST_AFTER_S * 1000))
        self._tcp = tcp
        self._timeouts_s: dict[int, float] = {}

    @classmethod
    def connect(cls, address: tuple[str, int]) -> PeerSocket:
        """Raises OSError."""
        return cls(socket.create_connection(address, CONNECT_TIMEOUT_S))

    def receive(self, num_bytes: int, timeout_s: float) -> bytes:
        """So many bytes. Raises OSError if they do not come in that time, or the connection ends."""
        content = bytearray(num_bytes)
        self.receive_into(memoryview(content), timeout_s)
        return bytes(content)

    def receive_into(self, view: memoryview, timeout_s: float) -> None:
        """Fill it. Raises OSError if that takes longer, or the connection ends."""
        self._limit(socket.SO_RCVTIMEO, timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while len(view):
            try:
                num_bytes = self._tcp.recv_into(view, flags=socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError(f"it has said nothing for {timeout_s:g} s") from None
            if not num_bytes:
                raise ConnectionError("it has hung up")
            view = view[num_bytes:]
            if len(view) and time.monotonic() >= deadline_s:
                raise TimeoutError(f"it has not said the rest within {timeout_s:g} s")

    def send(self, buffers: Sequence[Buffer], timeout_s: float) -> None:
        """Send them all, one after the other. Raises OSError if that takes longer, or the connection ends."""
        self._limit(socket.SO_SNDTIMEO, timeout_s)
        deadline_s = time.monotonic() + timeout_s
        rest = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while rest:
            try:
                num_bytes = self._tcp.sendmsg(rest)
            except BlockingIOError:
                raise TimeoutError(f"it has read nothing for {timeout_s:g} s") from None
            while rest and num_bytes >= len(rest[0]):
                num_bytes -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][num_bytes:]
                if time.monotonic() >= deadline_s:
                    raise TimeoutError(f"it has not read a frame within {timeout_s:g} s")

    def hang_up(self) -> None:
        """From any thread and more than once: all calls end, here and on the other side."""
        with suppress(OSError):
            self._tcp.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """When no other thread uses it any more."""
        self._tcp.close()

    def _limit(self, option: int, timeout_s: float) -> None:
        # The system's time-out instead of Python's, which would make a call for each part that has arrived.
        if self._timeouts_s.get(option) != timeout_s:
            seconds, rest = divmod(timeout_s, 1)
            self._tcp.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), max(1, int(rest * 1e6))))
            self._timeouts_s[option] = timeout_s


def greet(connection: PeerSocket, secret: bytes, ours: Greeting, *, is_client: bool) -> Greeting:
    """Prove to each other that both know the secret, and say who one is; see protocol.

    Returns who the other one is. Raises OSError; StrangerError if it is none of our peers.
    """
    own_nonce = os.urandom(NONCE_BYTES)
    here, there = ("client", "server") if is_client else ("server", "client")
    if is_client:
        nonces = (_receive_hail(connection), own_nonce)
        connection.send([pack_hail(own_nonce), prove(secret, here, nonces)], HANDSHAKE_TIMEOUT_S)
    else:
        connection.send([pack_hail(own_nonce)], HANDSHAKE_TIMEOUT_S)
        nonces = (own_nonce, _receive_hail(connection))
    check_proof(connection.receive(PROOF_BYTES, HANDSHAKE_TIMEOUT_S), secret, there, nonces)
    if not is_client:
        connection.send([prove(secret, here, nonces)], HANDSHAKE_TIMEOUT_S)
    content = pack_greeting(ours)
    proof = prove(secret, f"{here} greeting", nonces, content)
    connection.send([pack_length(len(content)), content, proof], HANDSHAKE_TIMEOUT_S)
    length = unpack_length(connection.receive(LENGTH_BYTES, HANDSHAKE_TIMEOUT_S))
    content = connection.receive(length, HANDSHAKE_TIMEOUT_S)
    check_proof(connection.receive(PROOF_BYTES, HANDSHAKE_TIMEOUT_S), secret, f"{there} greeting", nonces, content)
    theirs = unpack_greeting(content)
    if (difference := ours.difference(theirs)) is not None:
        raise StrangerError(difference)
    return theirs


def _receive_hail(connection: PeerSocket) -> bytes:
    return unpack_hail(connection.receive(HAIL_BYTES, HANDSHAKE_TIMEOUT_S))
