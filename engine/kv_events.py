"""Tells indexes and routers elsewhere which chunks are cached here, in the wire format of vLLM's KV events.

A message has three frames: the topic, a sequence number of eight bytes (big-endian), and msgpack: [time, [event, ...]].

    ["BlockStored", [hash], parent hash | nil, [token id, ...], tokens in a block, nil, nil]
    ["BlockRemoved", [hash], nil]
    ["AllBlocksCleared"]

A hash is the last eight bytes of the chunk's key as an integer. Two tenants, or models, have other keys for the
same tokens. There is a thread of its own, which asks the engine between two steps; without the option there is none, and
nothing is noted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from engine.core.cache.chunk_events import ChunkRemoved, ChunkStored
from engine.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

# Seconds between two questions to the engine.
PERIOD_S = 0.05
CLEARED: tuple[Any, ...] = ("AllBlocksCleared",)
Taken = Sequence[ChunkStored | ChunkRemoved] | None


def wire_events(taken: Taken, chunk_size: int) -> list[tuple[Any, ...]]:
    """The events as they are sent; None = some were lost, so that subscribers have to begin anew."""
    return [CLEARED] if taken is None else [_wire_event(event, chunk_size) for event in taken]


def _wire_event(event: ChunkStored | ChunkRemoved, chunk_size: int) -> tuple[Any, ...]:
    if isinstance(event, ChunkRemoved):
        return "BlockRemoved", (_hash(event.key),), None
    parent = None if event.parent_key is None else _hash(event.parent_key)
    return "BlockStored", (_hash(event.key),), parent, event.token_ids, chunk_size, None, None


def _hash(key: bytes) -> int:
    return int.from_bytes(key[-8:], "big")


class KvEventPublisher:
    """Publishes the events of one engine from `start` until `close`."""

    def __init__(self, endpoint: str, topic: str, number: int, chunk_size: int) -> None:
        """Raises ConfigError if the address cannot be had, or what publishes is not installed.

        endpoint: tcp://HOST:PORT, bound here; engine `number` takes the port so much higher.
        """
        try:
            import msgpack
            import zmq
        except ImportError as error:
            message = f"kv_events_endpoint needs {error.name}: pip install 'pensieve-ray[events]'"
            raise ConfigError(message, param="kv_events_endpoint") from None
        self._pack: Callable[[Any], bytes] = msgpack.packb
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        host, _, port = endpoint.rpartition(":")
        try:
            self.endpoint = f"{host}:{int(port) + number}"
            self._socket.bind(self.endpoint)
        except (ValueError, zmq.ZMQError) as error:
            self._context.destroy(linger=0)
            message = f"kv_events_endpoint must be an address that can be bound, such as tcp://*:5557, got {endpoint!r}"
            raise ConfigError(f"{message}: {error}", param="kv_events_endpoint") from None
        self._topic = topic.encode()
        self._chunk_size = chunk_size
        self._num_sent = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, submit: Callable[[], Future[Taken]]) -> None:
        """submit: asks the engine for the events since the last time."""
        self._thread = threading.Thread(target=self._run, args=(submit,), name="kv-events", daemon=True)
        self._thread.start()

    def _run(self, submit: Callable[[], Future[Taken]]) -> None:
        self._send([CLEARED])  # what an earlier engine told at this address holds no more
        with contextlib.suppress(EngineError):
            while not self._ended.wait(PERIOD_S):
                events = wire_events(submit().result(), self._chunk_size)
                if events:
                    self._send(events)

    def _send(self, events: Sequence[tuple[Any, ...]]) -> None:
        frames = (self._topic, self._num_sent.to_bytes(8, "big"), self._pack((time.time(), events)))
        self._socket.send_multipart(frames)
        self._num_sent += 1

    def close(self) -> None:
        """Stop. May be called again."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._context.destroy(linger=0)
