"""Conversations of a tensor-parallel engine go on in another one, with the KV of all ranks."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine import peer_link
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.cache.prices import LoadPrices
from engine.dialogue.messages import Message
from engine.executor.group import GroupExecutor
from engine.peer_network import PeerNetwork
from engine.server import create_server
from engine.text.prompt import TokenPrompt
from tests.engine.group_peer import OPTIONS, OURS, PEER_NAME
from tests.engine.test_handover import GREEDY, SECRET, Talk, has_no_places, until
from tests.nightly import nightly

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs each rank takes one")

ROOT = Path(__file__).parents[2]
END_S = 60


@contextmanager
def other_engine() -> Iterator[subprocess.Popen[str]]:
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.group_peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path},
    )
    try:
        yield process
        assert process.wait(END_S) == 0
    finally:
        process.kill()
        process.wait()


async def know(engine: AsyncEngine, session_id: str, num_tokens: int) -> None:
    """Wait until the engine has heard that its peer has a conversation."""
    tier = engine._kept._peers
    await until(lambda: any(row.num_tokens >= num_tokens for row in tier.best_peers(f"local\n{session_id}")))


@nightly  # test_group_blocks is quick
async def test_conversations_of_all_ranks_go_on_elsewhere(warm_workers, monkeypatch):
    monkeypatch.setattr(LoadPrices, "note_load", lambda *_: None)
    monkeypatch.setattr(peer_link, "ASK_TIMEOUT_S", 20.0)
    with other_engine() as process:

        async def hear() -> object:
            return json.loads(await asyncio.to_thread(process.stdout.readline))

        def tell(value: object) -> None:
            process.stdin.write(json.dumps(value) + "\n")
            process.stdin.flush()

        network = PeerNetwork(secret=SECRET, host="127.0.0.1", peer_id=PEER_NAME)
        engine = AsyncEngine(
            EngineConfig.from_options(OPTIONS),
            lambda config: GroupExecutor(config, warm_workers.starter()),
            network=network,
        )
        answers = []
        try:
            host, port = await hear()
            engine.set_peers({OURS: (host, port)})
            tell(engine.peer_address)
            pulled, pushed = [
                (Talk(name, [Message(*message) for message in messages]), num_known)
                for name, messages, num_known in await hear()
            ]
            talk, num_known = pulled
            await know(engine, talk.session_id, num_known)
            answers.append((await talk.say(engine, "And what is my cat called?"), num_known))
            tell("end")
            assert await hear() == 4
            talk, num_known = pushed
            answers.append((await talk.say(engine, "And what is my cat called?"), num_known))
            assert has_no_places(engine)
            counts = engine.get_statistics()["slow_transfers"]
            assert counts["peer_loaded"] > 0
            assert counts["peer_load_failed"] == 0
        finally:
            await engine.shutdown()
    server = create_server(**{**OPTIONS, "tensor_parallel_size": 1, "mode": "stateless"})
    for answer, num_known in answers:
        assert answer.num_cached_tokens >= 0.95 * num_known
        assert answer.token_ids == server.complete(TokenPrompt(answer.prompt_token_ids), GREEDY).token_ids
    server.close()
