"""Replicas with real engines in one process, without Ray: conversations that leave one find their KV at another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from unittest import mock

import pytest

from deployments import llm_server
from deployments.cluster.replica_feed import PEER_ADDRESS
from deployments.generation import DeltaItem, GenerationRequest
from deployments.llm_server import LLMServer
from deployments.routing.peers import Member
from deployments.routing.rendezvous import rank_replicas
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.peer_network import PeerNetwork
from engine.text.prompt import ChatPrompt
from tests.deployments.costly_model import make_costly_model

CHUNK_SIZE = 32
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "num_threads": 1,
    "chunk_size": CHUNK_SIZE,
    "num_gpu_blocks": 128,
    "num_cpu_blocks": 256,
    "kv_handover": "on",
}
DRAIN_S = 20.0
# Longer than it takes until a peer knows which conversations this one has.
DIRECTORY_S = 4.0
KEPT = 0.95
BEGINNING = "my cat is called Mia and my dog is called Rex and i live in Rome. " * 15


class Replica(LLMServer):
    """Of a rank, and without Serve."""

    def __init__(self, rank: int, model: str) -> None:
        self._rank = rank
        self.tell: Callable[[Sequence[Member]], None] = lambda members: None
        network = PeerNetwork(b"secret", "127.0.0.1", f"replica-{rank}")
        with mock.patch.object(llm_server, "log_engine_with_serve"):
            super().__init__(
                EngineConfig.from_options({"model": model, **OPTIONS}),
                0.0,
                drain_s=DRAIN_S,
                join_network=lambda: network,
            )

    def replica_rank(self) -> int:
        return self._rank

    async def member(self) -> Member:
        async def follow(on_members: Callable[[Sequence[Member]], None]) -> None:
            self.tell = on_members

        with mock.patch.object(llm_server, "follow_replicas", follow):
            metadata = await self.record_replica_metadata()
            await asyncio.sleep(0)
        return Member(f"replica-{self._rank}", self._rank, metadata[PEER_ADDRESS])

    async def end(self) -> None:
        await LLMServer.__del__(self)

    def __del__(self) -> None:
        pass


class Chat:
    """A session. num_known: tokens whose KV its last turn left."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._messages: list[tuple[str, str]] = []
        self.num_known = 0

    async def go_on(self, replica: Replica) -> int:
        """The next turn; how many of its tokens were cached."""
        text = "go on." if self._messages else f"{self.name}: {BEGINNING}"
        self._messages.append(("user", text))
        request = GenerationRequest(
            f"{self.name} {len(self._messages)}",
            self.name,
            ChatPrompt(tuple(self._messages)),
            SamplingParams(temperature=0.0, max_tokens=12),
            stream=False,
        )
        (item,) = [item async for item in replica.generate(request)]
        assert isinstance(item, DeltaItem), item
        delta = item.delta
        self._messages.append(("assistant", delta.text))
        self.num_known = delta.num_prompt_tokens + delta.num_output_tokens - 1
        return delta.num_cached_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_costly_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def replicas(model: str) -> AsyncIterator[list[Replica]]:
    replicas = [Replica(rank, model) for rank in range(3)]
    await tell_all(replicas)
    yield replicas
    for replica in replicas:
        await replica.end()


async def tell_all(replicas: Sequence[Replica]) -> None:
    members = [await replica.member() for replica in replicas]
    for replica in replicas:
        replica.tell(members)


def home(chat: Chat, ranks: Sequence[int]) -> int:
    return ranks[rank_replicas(chat.name, ranks)[0]]


async def test_conversations_go_where_the_router_sends_them_when_a_replica_ends(replicas: list[Replica]) -> None:
    chats = [Chat(f"session {number}") for number in range(6)]
    for _ in range(2):
        for chat in chats:
            await chat.go_on(replicas[home(chat, range(3))])
    moved = [chat for chat in chats if home(chat, range(3)) == 0]
    assert 0 < len(moved) < len(chats)
    members = [await replica.member() for replica in replicas]
    for replica in replicas:
        replica.tell(members[1:])
    await replicas[0].end()
    for chat in chats:
        num_known = chat.num_known
        num_cached = await chat.go_on(replicas[home(chat, (1, 2))])
        assert num_cached >= KEPT * num_known, (chat.name, chat in moved)


async def test_a_conversation_that_goes_elsewhere_finds_its_kv(replicas: list[Replica]) -> None:
    chat = Chat("a session")
    for _ in range(2):
        await chat.go_on(replicas[0])
    num_known = chat.num_known
    await asyncio.sleep(DIRECTORY_S)
    assert await chat.go_on(replicas[1]) >= KEPT * num_known


async def test_one_that_still_answers_leaves_copies(replicas: list[Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be killed before its last answer ends."""
    monkeypatch.setattr(llm_server, "LEAVE_S", 0.0)
    chat = next(chat for chat in map(Chat, map(str, range(99))) if home(chat, range(3)) == 0)
    await chat.go_on(replicas[0])
    num_known = chat.num_known
    members = [await replica.member() for replica in replicas]
    engine = replicas[home(chat, (1, 2))]._engine
    replicas[0].tell(members[1:])
    async with asyncio.timeout(30):
        while engine.get_statistics()["slow_transfers"]["peer_loaded"] < num_known // CHUNK_SIZE:
            await asyncio.sleep(0.05)
    replicas[0]._engine.check_health()
    assert await chat.go_on(replicas[home(chat, (1, 2))]) >= KEPT * num_known
