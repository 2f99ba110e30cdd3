"""KV events as their subscribers elsewhere read them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core.cache.chunk_events import ChunkRemoved, ChunkStored
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.kv_events import wire_events
from engine.server import create_server
from engine.text.prompt import TextPrompt

OPTIONS: dict[str, Any] = {
    "num_threads": 1,
    "dtype": "float32",
    "chunk_size": 8,
    "num_gpu_blocks": 16,
    "num_cpu_blocks": 0,
    "max_model_len": 96,
}


def test_events_on_the_wire() -> None:
    first, second = (number.to_bytes(16, "big") for number in (7, 1 << 63))
    taken = [ChunkStored(first, None, (1, 2), 0), ChunkStored(second, first, (3, 4), 1), ChunkRemoved(first)]
    assert wire_events(taken, 2) == [
        ("BlockStored", (7,), None, (1, 2), 2, None, None),
        ("BlockStored", (1 << 63,), 7, (3, 4), 2, None, None),
        ("BlockRemoved", (7,), None),
    ]
    assert wire_events(None, 2) == [("AllBlocksCleared",)]
    assert wire_events([], 2) == []


def test_an_index_elsewhere_has_what_is_cached_here() -> None:
    """A subscriber that decodes as vLLM's own example does: typed structures in arrays, told apart by their names."""
    zmq, msgspec = pytest.importorskip("zmq"), pytest.importorskip("msgspec")

    def event(name: str, *fields: tuple[str, Any]) -> Any:
        return msgspec.defstruct(name, fields, array_like=True, tag=True)

    stored = event(
        "BlockStored",
        ("block_hashes", list[int]),
        ("parent_block_hash", int | None),
        ("token_ids", list[int]),
        ("block_size", int),
        ("lora_id", int | None),
        ("medium", str | None),
    )
    removed = event("BlockRemoved", ("block_hashes", list[int]), ("medium", str | None))
    cleared = event("AllBlocksCleared")
    batch = msgspec.defstruct("Batch", [("ts", float), ("events", list[stored | removed | cleared])], array_like=True)
    decoder = msgspec.msgpack.Decoder(batch)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        probe = context.socket(zmq.PUB)
        port = probe.bind_to_random_port("tcp://127.0.0.1")
        probe.close(linger=0)
        socket.setsockopt(zmq.SUBSCRIBE, b"kv")
        socket.connect(f"tcp://127.0.0.1:{port}")
        options = OPTIONS | {"kv_events_endpoint": f"tcp://127.0.0.1:{port}", "kv_events_topic": "kv"}
        index: dict[int, Any] = {}
        numbers = []
        with create_server(**options) as server:
            session = 0
            while not (index and any(isinstance(each, removed) for each in index.values())) and session < 200:
                server.complete(
                    TextPrompt(f"{session} is a number. " * 4), SamplingParams(max_tokens=2, temperature=0.0)
                )
                session += 1
                while socket.poll(100):
                    topic, number, payload = socket.recv_multipart()
                    assert topic == b"kv"
                    numbers.append(int.from_bytes(number, "big"))
                    for told in decoder.decode(payload).events:
                        for name in getattr(told, "block_hashes", ()):
                            index[name] = told
        assert numbers == sorted(numbers)
        blocks = [each for each in index.values() if isinstance(each, stored)]
        assert {each.block_size for each in blocks} == {8}
        assert {len(each.token_ids) for each in blocks} == {8}
        known = set(index)
        assert all(each.parent_block_hash in known for each in blocks if each.parent_block_hash is not None)


def test_an_address_that_cannot_be_bound_says_so() -> None:
    pytest.importorskip("zmq")
    with pytest.raises(ConfigError, match="must be an address that can be bound"):
        create_server(**OPTIONS, kv_events_endpoint="tcp://no.such.host.invalid:1")


def test_without_the_option_nothing_is_noted() -> None:
    assert EngineConfig.from_options(OPTIONS).kv_events_endpoint is None
