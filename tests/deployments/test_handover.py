"""Conversations keep their KV when replicas end, come and are replaced under traffic; no request fails.

What a turn finds in the cache is compared with what its conversation had computed until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.deployments.costly_model import make_costly_model
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe
from tests.nightly import IS_NIGHTLY, nightly

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARED_SERVE = AS_PENSIEVE_SERVE
APP = "handover"
MODEL_NAME = "costly"
# Far longer than anything here takes; only a defect waits for it.
PATIENCE_S = 300.0
NUM_WORKERS = 4
# Tokens of a turn that were computed before and are found again, at least.
KEPT = 0.95
MOST = 0.9
# Longer than it takes until routers know of a change, and replicas what the others have.
HEARD_S = 5.0
BEGINNING = "my cat is called Mia and my dog is called Rex and i live in Rome. " * 20
ANSWER_TOKENS = 8
# A longer conversation begins anew.
MAX_TOKENS = 1500


@pytest.fixture(scope="module")
def base_url(local_serve: LocalServe) -> Iterator[str]:
    yield local_serve.start(SHARED_SERVE)
    serve.delete(APP)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_costly_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of replicas with room for all conversations."""
    store = tmp_path_factory.getbasetemp() / "handover.db"
    args = {
        "engine": {
            "model": model,
            "served_model_name": MODEL_NAME,
            "dtype": "float32",
            "num_threads": 1,
            "num_gpu_blocks": 512,
            "num_cpu_blocks": 2048,
        },
        "num_cpus": 0.3,
        "ingress_num_cpus": 0.2,
        "graceful_shutdown_timeout_s": 20,
        "store_url": f"sqlite:///{store}",
    }
    application = {"name": APP, "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    deployments = [{"name": "LLMServer", "num_replicas": 2}, {"name": "Ingress", "num_replicas": 1}]
    logging_config = {"enable_access_log": False}
    return {"applications": [{**application, "deployments": deployments}], "logging_config": logging_config}


def engine_pids() -> list[int]:
    """Of the engine replicas that live, in this cluster."""
    title = f"ray::ServeReplica:{APP}:LLMServer"
    pids = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it is over
            if "".join(process.cmdline()[:1]).startswith(title):
                pids.append(process.pid)
    return pids


def replica_names() -> set[str]:
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith(f"SERVE_REPLICA::{APP}#LLMServer")}


class Deployment:
    """The application, which can be changed as with `serve deploy`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self.args = config["applications"][0]["args"]
        self._engines = config["applications"][0]["deployments"][0]

    async def apply(self) -> None:
        """Until all is as the file says, and nothing of what went is left."""
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate(copy.deepcopy(self._config)), _blocking=False)
        await self.settled()

    async def settled(self) -> None:
        def is_settled() -> bool:
            application = serve.status().applications.get(APP)
            is_running = application is not None and application.status == "RUNNING"
            return is_running and len(replica_names()) == self._engines["num_replicas"]

        async with asyncio.timeout(PATIENCE_S):
            await asyncio.sleep(1)  # Serve begins
            while not await asyncio.to_thread(is_settled):
                await asyncio.sleep(0.1)

    async def scale(self, num_replicas: int) -> None:
        self._engines["num_replicas"] = num_replicas
        await self.apply()

    async def roll(self) -> None:
        """Replace every replica."""
        before = replica_names()
        self.args["engine"]["max_num_seqs"] = self.args["engine"].get("max_num_seqs", 64) - 1
        await self.apply()
        async with asyncio.timeout(PATIENCE_S):
            while before & await asyncio.to_thread(replica_names):
                await asyncio.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Turn:
    """num_known: tokens that the conversation had computed before. replica: the rank that answered."""

    num_known: int
    num_cached: int
    replica: str


@dataclass(slots=True)
class Conversation:
    """A chat that goes on and on."""

    name: str
    messages: list[dict[str, str]] = field(default_factory=list)
    num_known: int = 0
    turns: list[Turn] = field(default_factory=list)

    async def go_on(self, http: httpx.AsyncClient) -> None:
        if self.num_known > MAX_TOKENS:
            self.messages, self.num_known = [], 0
        text = f"{self.name}: {BEGINNING}" if not self.messages else "go on."
        messages = [*self.messages, {"role": "user", "content": text}]
        body = {"model": MODEL_NAME, "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS}
        response = await http.post("/v1/chat/completions", json=body, headers={"x-session-id": self.name})
        assert response.status_code == 200, response.text
        answer = response.json()
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.turns.append(Turn(self.num_known, cached, response.headers["x-pensieve-replica"]))
        self.num_known = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        self.messages = [*messages, {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}]


class Traffic:
    """Conversations that go on all the time, a few at once."""

    def __init__(self, http: httpx.AsyncClient, num_conversations: int) -> None:
        self._http = http
        self.conversations = [Conversation(f"session {number}") for number in range(num_conversations)]
        self._is_over = False

    async def round(self) -> list[Turn]:
        """A turn of each."""
        await self._work(iter(self.conversations))
        return [conversation.turns[-1] for conversation in self.conversations]

    async def _work(self, conversations: Iterator[Conversation]) -> None:
        async def work() -> None:
            for conversation in conversations:
                await conversation.go_on(self._http)

        await asyncio.gather(*(work() for _ in range(min(NUM_WORKERS, len(self.conversations)))))

    def _until_over(self) -> Iterator[Conversation]:
        while not self._is_over:
            for conversation in self.conversations:
                if not self._is_over:
                    yield conversation

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """While the block runs; raises what failed."""
        self._is_over = False
        working = asyncio.create_task(self._work(self._until_over()))
        try:
            yield
        finally:
            self._is_over = True
            await working


def kept(turns: Sequence[Turn]) -> float:
    """The share of what was computed before that was found."""
    return sum(turn.num_cached for turn in turns) / (sum(turn.num_known for turn in turns) or 1)


async def worst_turns(traffic: Traffic, change: Callable[[], Any], label: str) -> list[float]:
    """Of each conversation, the share of its KV that it found in its worst turn, during a change or after it."""
    num_before = [len(conversation.turns) for conversation in traffic.conversations]
    async with traffic.going_on():
        await change()
        await asyncio.sleep(HEARD_S)
    await traffic.round()
    worst, num_turns = [], 0
    for conversation, number in zip(traffic.conversations, num_before, strict=True):
        turns = [turn for turn in conversation.turns[number:] if turn.num_known]
        num_turns += len(turns)
        worst.append(min((kept([turn]) for turn in turns), default=1.0))
    whole = sum(share >= KEPT for share in worst)
    print(f"{label}: {num_turns} turns; {whole} of {len(worst)} kept it in all of them, {mean(worst):.3f} in the worst")
    return worst


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("num_replicas", "num_conversations"), [(2, 8), pytest.param(4, 64, marks=nightly)], ids=["small", "4 replicas"]
)
async def test_conversations_keep_their_kv(
    base_url: str, config: dict[str, Any], num_replicas: int, num_conversations: int
) -> None:
    deployment = Deployment(config)
    await deployment.scale(num_replicas)
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http:
        traffic = Traffic(http, num_conversations)
        await traffic.round()
        assert kept(await traffic.round()) >= KEPT
        await asyncio.sleep(
            HEARD_S
        )  # a conversation that moves when it has just begun is not known elsewhere, and computed
        for label, change in (
            ("one fewer", lambda: deployment.scale(num_replicas - 1)),
            ("one more", lambda: deployment.scale(num_replicas)),
            *([("all replaced", deployment.roll)] if IS_NIGHTLY else []),
        ):
            worst = await worst_turns(traffic, change, label)
            # A request that comes before its KV, or before its replica knows who has it, computes.
            assert mean(worst) >= MOST, (label, worst)
            last = [conversation.turns[-1] for conversation in traffic.conversations]
            assert all(turn.num_cached >= KEPT * turn.num_known for turn in last), (label, last)

        if num_replicas > 2:
            homes = [conversation.turns[-1].replica for conversation in traffic.conversations]
            os.kill(engine_pids()[0], signal.SIGKILL)
            after = await traffic.round()
            lost = {home for home, turn in zip(homes, after, strict=True) if turn.num_cached < KEPT * turn.num_known}
            assert len(lost) <= 1, "what other replicas have is there"
            await deployment.settled()


@nightly
@pytest.mark.timeout(900)
async def test_a_replica_that_replaces_another_finds_its_folder(
    base_url: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """The old one has ended by then; requests wait meanwhile."""
    deployment = Deployment(config)
    deployment.args["engine"] |= {"kv_disk_path": str(tmp_path / "kv"), "kv_disk_size": 0.1}
    await deployment.scale(1)
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http:
        traffic = Traffic(http, 8)
        for _ in range(2):
            await traffic.round()
        worst = await worst_turns(traffic, deployment.roll, "replaced, with a disk")
        assert min(worst) >= KEPT, worst
    assert len(list((tmp_path / "kv").iterdir())) == 1
