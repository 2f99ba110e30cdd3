"""A tensor-parallel engine in a process of its own, for a peer in another process: a process is in one group at a time.

It has one conversation for each name of `NAMES`. Lines of JSON:

    it says its address                    it is told the address of its peer
    it says what was said, when it was     it is told to end, and leaves the last conversation to its peer
    it says how many requests it had
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.cache.prices import LoadPrices
from engine.peer_network import PeerNetwork
from tests.engine.test_handover import SECRET, Talk

NAMES = ("pulled", "pushed")
OPTIONS = {
    "model": "embedded",
    "dtype": "float32",
    "num_threads": 1,
    "tensor_parallel_size": 2,
    "chunk_size": 8,
    "num_gpu_blocks": 128,
    "num_cpu_blocks": 128,
    "max_model_len": 512,
}
OURS, PEER_NAME = "a group", "its peer"


def tell(value: object) -> None:
    print(json.dumps(value), flush=True)


async def hear() -> object:
    return json.loads(await asyncio.to_thread(sys.stdin.readline))


async def main() -> None:
    network = PeerNetwork(secret=SECRET, host="127.0.0.1", peer_id=OURS)
    engine = await asyncio.to_thread(lambda: AsyncEngine(EngineConfig.from_options(OPTIONS), network=network))
    try:
        tell(engine.peer_address)
        host, port = await hear()
        engine.set_peers({PEER_NAME: (host, port)})
        talks = []
        for name in NAMES:
            talk = Talk(name)
            for text in ("My name is Mia, and my cat is called Tom.", "What is my name?"):
                await talk.say(engine, text)
            talks.append((talk.session_id, [(each.role, each.content) for each in talk.messages], talk.num_known))
        tell(talks)
        await hear()
        await engine.drain(60.0, lambda conversation_id: PEER_NAME if conversation_id.endswith(NAMES[1]) else None)
        tell(engine.get_statistics()["num_finished"])
    finally:
        await engine.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    LoadPrices.note_load = lambda *_: None
    asyncio.run(main())
