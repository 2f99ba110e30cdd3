"""Conversations go on in another engine of this process, with their KV: pulled when asked for, or left there by a drain.

Over loopback, with the embedded model; whatever goes wrong is a miss.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from engine import peer_link
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.cache.prices import LoadPrices
from engine.core.request import SamplingParams
from engine.core.tier_table import PEER
from engine.dialogue.messages import Message
from engine.generation import Generation
from engine.peer_network import PeerNetwork
from engine.server import create_server
from engine.text.output import OutputDelta, merge_deltas
from engine.text.prompt import ChatPrompt, TokenPrompt

SECRET = b"of these tests" * 3
OPTIONS = {
    "num_threads": 1,
    "dtype": "float32",
    "chunk_size": 8,
    "num_gpu_blocks": 128,
    "num_cpu_blocks": 128,
    "max_model_len": 512,
    "enforce_eager": True,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
# Hardly what a tokenizer would make of its text.
RANDOM = SamplingParams(temperature=2.0, seed=3, max_tokens=40, min_tokens=20)


@pytest.fixture(autouse=True)
def any_load_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is: what is observed does not count, and a peer is given time to answer."""
    monkeypatch.setattr(LoadPrices, "note_load", lambda *_: None)
    monkeypatch.setattr(peer_link, "ASK_TIMEOUT_S", 20.0)


def start(name: str, secret: bytes = SECRET) -> AsyncEngine:
    config = EngineConfig.from_options(OPTIONS)
    return AsyncEngine(config, network=PeerNetwork(secret=secret, host="127.0.0.1", peer_id=name))


@dataclass
class Talk:
    """One conversation as its client has it; `turns` are its answers."""

    session_id: str
    messages: list[Message] = field(default_factory=list)
    turns: list[OutputDelta] = field(default_factory=list)

    async def say(self, engine: AsyncEngine, text: str, sampling: SamplingParams = GREEDY) -> OutputDelta:
        self.messages.append(Message("user", text))
        generation = Generation(
            f"{self.session_id} {len(self.messages)}",
            self.session_id,
            ChatPrompt(tuple(self.messages)),
            sampling,
            return_prompt_token_ids=True,
        )
        answer = merge_deltas([delta async for delta in engine.generate(generation)])
        self.messages.append(Message("assistant", answer.text))
        self.turns.append(answer)
        await engine.check_integrity()
        return answer

    @property
    def num_known(self) -> int:
        """Tokens whose KV the last turn has left."""
        return self.turns[-1].num_prompt_tokens + self.turns[-1].num_output_tokens - 1


async def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "it does not happen"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def engines(*names: str) -> AsyncIterator[list[AsyncEngine]]:
    """Peers of each other."""
    started = [await asyncio.to_thread(start, name) for name in names]
    try:
        introduce(dict(zip(names, started, strict=True)))
        yield started
    finally:
        for engine in started:
            await engine.shutdown()


def introduce(by_name: dict[str, AsyncEngine]) -> None:
    for engine in by_name.values():
        engine.set_peers({name: other.peer_address for name, other in by_name.items() if other is not engine})


def has_no_places(engine: AsyncEngine) -> bool:
    """Whether nothing is expected from peers or on its way to them."""
    stats = engine.get_statistics()
    return stats["num_peer_blocks_free"] == stats["num_peer_blocks"]


async def know(engine: AsyncEngine, talk: Talk) -> None:
    """Wait until the engine has heard that a peer leads the conversation, up to its last turn."""
    conversation_id = f"local\n{talk.session_id}"
    tier = engine._kept._peers
    await until(lambda: any(row.num_tokens >= talk.num_known for row in tier.best_peers(conversation_id)))


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[OutputDelta, SamplingParams], tuple[int, ...]]]:
    """(an answer, how its tokens were chosen) -> the tokens that the stateless mode gives for its prompt."""
    server = create_server(**OPTIONS | {"mode": "stateless"})
    yield lambda answer, sampling: server.complete(TokenPrompt(answer.prompt_token_ids), sampling).token_ids
    server.close()


async def test_a_conversation_goes_on_elsewhere_with_its_kv(fresh):
    async with engines("a", "b") as (first, second):
        talk = Talk("mine")
        await talk.say(first, "My name is Mia, and my cat is called Tom.")
        await talk.say(first, "What is my name?")
        num_known = talk.num_known
        await know(second, talk)
        answer = await talk.say(second, "And what is my cat called?")
        assert answer.num_cached_tokens >= 0.95 * num_known
        assert answer.token_ids == tuple(fresh(answer, GREEDY))
        stats = second.get_statistics()
        assert stats[f"num_{PEER}_cached_tokens"] == answer.cached_by_tier[PEER] >= 0.95 * num_known
        assert stats["handover_conversations"]["recalled"] == 1
        assert stats["slow_seconds"][f"{PEER}_loaded"] > 0
        num_moved = stats["slow_transfers"][f"{PEER}_loaded"]
        assert first.get_statistics()["slow_transfers"][f"{PEER}_sent"] == num_moved > 0
        await until(lambda: has_no_places(first) and has_no_places(second))

        await know(first, talk)  # and back: only what is new travels
        answer = await talk.say(first, "Thank you. What is my name?")
        assert answer.num_cached_tokens >= 0.95 * talk.turns[-2].num_prompt_tokens
        assert answer.token_ids == tuple(fresh(answer, GREEDY))
        assert first.get_statistics()["slow_transfers"][f"{PEER}_loaded"] < num_moved


async def test_ids_that_tokenising_would_not_give_move_first():
    async with engines("a", "b") as (first, second):
        there, here = Talk("there"), Talk("here")
        for talk in (there, here):
            await talk.say(first, "My name is Mia.", RANDOM)
        await know(second, there)
        moved = await there.say(second, "What is my name?")
        stayed = await here.say(first, "What is my name?")
        assert moved.prompt_token_ids == stayed.prompt_token_ids
        assert (moved.recomputed, stayed.recomputed) == (None, None)
        assert moved.token_ids == stayed.token_ids
        assert moved.num_cached_tokens == stayed.num_cached_tokens > 0


async def test_a_drain_leaves_conversations_to_their_next_homes(fresh):
    """One after the other ends, as in a rolling update; nothing is asked in between."""
    talks = [Talk(name) for name in ("Mia", "Bob", "Zoe", "Tim", "Eva", "Max")]
    async with engines("a", "b", "c") as (first, second, third):
        for talk in talks:
            await talk.say(first, f"My name is {talk.session_id}.")
            await talk.say(first, "What is my name?")
        num_known = [talk.num_known for talk in talks]
        await first.drain(60.0, lambda conversation_id: "b")
        counts = first.get_statistics()["handover_conversations"]
        assert counts["offered"] == counts["handed_over"] == len(talks)
        assert second.get_statistics()["handover_conversations"]["received"] == len(talks)
        await first.shutdown()
        await second.drain(60.0, lambda conversation_id: "c")
        await second.shutdown()
        assert third.get_statistics()["num_requests"] == 0
        for talk, num in zip(talks, num_known, strict=True):
            answer = await talk.say(third, "And again: what is my name?")
            assert answer.num_cached_tokens >= 0.95 * num
            assert answer.token_ids == tuple(fresh(answer, GREEDY))
        assert has_no_places(third)


async def test_an_engine_that_is_lost_midway_is_a_miss(fresh):
    async with engines("a", "b") as (first, second):
        talk = Talk("mine")
        await talk.say(first, "My name is Mia, and my cat is called Tom.")
        await know(second, talk)
        wanted = threading.Event()
        first._kept._link.send = lambda keys: wanted.set()  # it has been asked, and that was its last deed
        asked = asyncio.create_task(talk.say(second, "What is my name?"))
        assert await asyncio.to_thread(wanted.wait, 60)
        first._kept._peers.close()
        answer = await asked
        assert answer.num_cached_tokens == 0
        assert answer.token_ids == tuple(fresh(answer, GREEDY))
        assert second.get_statistics()["slow_transfers"][f"{PEER}_load_gone"] > 0
        assert second.get_statistics()["tier_problems"] == {}
        assert has_no_places(second)


async def test_peers_that_know_no_secret_or_are_nowhere_are_a_miss(fresh):
    async with engines("a") as (first,):
        talk = Talk("mine")
        await talk.say(first, "My name is Mia.")
        stranger = await asyncio.to_thread(start, "b", secret=b"another one" * 3)
        try:
            introduce({"a": first, "b": stranger})
            stranger.set_peers({"a": first.peer_address, "nowhere": ("127.0.0.1", 9)})
            answer = await talk.say(stranger, "What is my name?")
            assert answer.num_cached_tokens == 0
            await first.drain(60.0, lambda conversation_id: "b")
            assert answer.token_ids == tuple(fresh(answer, GREEDY))
        finally:
            await stranger.shutdown()


async def test_without_a_network_or_a_cpu_tier_there_are_no_peers():
    for changes in ({}, {"num_cpu_blocks": 0}, {"mode": "stateless"}):
        config = EngineConfig.from_options(OPTIONS | changes)
        network = PeerNetwork(secret=SECRET, host="127.0.0.1", peer_id="a") if changes else None
        engine = await asyncio.to_thread(AsyncEngine, config, network=network)
        try:
            assert engine.peer_address is None
            engine.set_peers({"b": ("127.0.0.1", 9)})
            assert "num_peer_blocks" not in engine.get_statistics()
            await engine.drain(1.0, lambda conversation_id: "b")
        finally:
            await engine.shutdown()
