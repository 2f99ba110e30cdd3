"""An operator's day under steady conversations: a rolling update, 2 -> 4 -> 2 replicas, autoscaling by a ramp.

No request fails, no answer has forgotten what its session said, and a session finds its KV again one turn after it moved.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe
from tests.nightly import nightly

pytestmark = [pytest.mark.ray, pytest.mark.slow, nightly]

SHARED_SERVE = AS_PENSIEVE_SERVE
APP = "traffic"
NAMES = ("Mia", "Rex", "Tom", "Bella", "Max", "Luna")
# Far longer than anything here takes; only a defect waits for it.
PATIENCE_S = 240.0
# A turn that does not find that much of what its session had computed began cold.
WARM = 0.9
OPENING = "i looked out of the window. " * 30
PAUSE_S = 0.3
NUM_SESSIONS = 12
NUM_TURNS = 8
# Until routers have heard of the last change, and sessions have had turns after it.
AFTER_S = 6.0


@pytest.fixture(scope="module")
def base_url(local_serve: LocalServe) -> Iterator[str]:
    yield local_serve.start(SHARED_SERVE)
    serve.delete(APP)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Of two engine and two ingress replicas."""
    args = {
        "engine": {
            "model": "embedded",
            "dtype": "float32",
            "num_threads": 1,
            "num_gpu_blocks": 1024,
            "num_cpu_blocks": 1024,
            "max_num_seqs": 16,
        },
        "num_cpus": 0.4,
        "ingress_num_cpus": 0.2,
        "graceful_shutdown_timeout_s": 6,
        "store_url": f"sqlite:///{tmp_path / 'conversations.db'}",
    }
    application = {"name": APP, "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    deployments = [{"name": name, "num_replicas": 2} for name in ("LLMServer", "Ingress")]
    return {
        "logging_config": {"enable_access_log": False},
        "applications": [application | {"deployments": deployments}],
    }


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. num_known: tokens that its session had computed before. problem: empty if all is well."""

    session: str
    number: int
    sent_s: float
    status: int
    num_known: int
    num_cached: int
    replica: str
    problem: str

    @property
    def is_cold(self) -> bool:
        return self.num_cached < WARM * self.num_known


class Traffic:
    """Sessions that say two names and ask for them, again and again: by chat, and in responses that the server stores."""

    def __init__(self, base_url: str) -> None:
        self.turns: list[Turn] = []
        self.num_sessions = 0
        self._http = httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S)
        self._tasks: list[asyncio.Task[None]] = []

    def set_load(self, num_sessions: int) -> None:
        """So many sessions at once, from now on."""
        for number in range(len(self._tasks), num_sessions):
            self._tasks.append(asyncio.create_task(self._hold(number)))
        self.num_sessions = num_sessions

    async def _hold(self, number: int) -> None:
        for count in itertools.count():
            while number >= self.num_sessions:
                if not self.num_sessions:
                    return
                await asyncio.sleep(PAUSE_S)
            await self._converse(f"{number}.{count}", number, is_stored=number % 2 == 1)

    async def _converse(self, name: str, number: int, is_stored: bool) -> None:
        """To its end: half a conversation would be no traffic of the kind that is promised."""
        names = (NAMES[number % len(NAMES)], NAMES[(number + 1) % len(NAMES)])
        asks = [(f"what is my {pet} called?", it) for pet, it in zip(("cat", "dog"), names, strict=True)]
        tells = [(f"my {pet} is called {it}", it) for pet, it in zip(("cat", "dog"), names, strict=True)]
        texts = [(f"{name}: {OPENING}", ""), *tells, *itertools.islice(itertools.cycle(asks), NUM_TURNS - 3)]
        before: list[dict[str, str]] = []
        num_known, last_id = 0, None
        for turn, (text, expected) in enumerate(texts):
            message = {"role": "user", "content": text}
            sent_s = time.monotonic()
            if is_stored:
                body = {"input": text, "max_output_tokens": 24, "previous_response_id": last_id}
                response = await self._ask("/v1/responses", body, {})
            else:
                body = {"messages": [*before, message], "max_tokens": 24}
                response = await self._ask("/v1/chat/completions", body, {"x-session-id": name})
            if response.status_code != 200:
                self.turns.append(Turn(name, turn, sent_s, response.status_code, num_known, 0, "", response.text))
                return
            answer = response.json()
            if is_stored:
                said, last_id = answer["output"][0]["content"][0]["text"], answer["id"]
                counts = (answer["usage"][f"{kind}_tokens"] for kind in ("input", "output"))
                num_cached = answer["usage"]["input_tokens_details"]["cached_tokens"]
            else:
                said = answer["choices"][0]["message"]["content"]
                before += [message, {"role": "assistant", "content": said}]
                counts = (answer["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion"))
                num_cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            problem = "" if expected in said else f"{text}: {said}"
            replica = response.headers["x-pensieve-replica"]
            self.turns.append(Turn(name, turn, sent_s, 200, num_known, num_cached, replica, problem))
            num_known = sum(counts) - 1
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        body |= {"model": EMBEDDED_MODEL_NAME, "temperature": 0}
        return await self._http.post(path, json=body, headers=headers)

    async def stop(self) -> None:
        self.num_sessions = 0
        await asyncio.gather(*self._tasks)
        await self._http.aclose()


class Deployment:
    """The application, which can be changed as with `serve deploy`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self.args = config["applications"][0]["args"]
        self.engines = config["applications"][0]["deployments"][0]

    async def apply(self) -> None:
        """Until all is as the file says, and nothing that it replaces is left."""
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate(copy.deepcopy(self._config)), _blocking=False)
        await asyncio.sleep(1)  # Serve begins
        await until(partial(is_running, self.engines.get("num_replicas")))

    async def roll(self) -> None:
        before = replica_names()
        self.args["engine"]["max_num_seqs"] -= 1
        await self.apply()
        await until(lambda: not before & replica_names() and is_running())

    async def scale(self, num_replicas: int) -> None:
        self.engines["num_replicas"] = num_replicas
        await self.apply()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.2)


def is_running(num_replicas: int | None = None) -> bool:
    """All is as it was deployed. num_replicas: of the engine, with those that end; None = any number."""
    application = serve.status().applications.get(APP)
    is_ready = application is not None and application.status == "RUNNING"
    return is_ready and num_replicas in (None, len(replica_names()))


def replica_names() -> set[str]:
    """Of the engine replicas that live, also of those that end."""
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith(f"SERVE_REPLICA::{APP}#LLMServer")}


@asynccontextmanager
async def traffic(base_url: str) -> AsyncIterator[Traffic]:
    running = Traffic(base_url)
    yield running
    await asyncio.sleep(AFTER_S)
    await running.stop()
    check(running.turns)


def check(turns: Sequence[Turn]) -> None:
    """Nothing failed or was forgotten, and no session had two cold turns in a row."""
    assert [turn for turn in turns if turn.problem] == []
    before = {(turn.session, turn.number): turn for turn in turns}
    twice = [
        (before[turn.session, turn.number - 1], turn)
        for turn in turns
        if turn.is_cold and turn.number and before[turn.session, turn.number - 1].is_cold
    ]
    assert twice == []


def report(label: str, turns: Sequence[Turn], begin_s: float) -> None:
    """What a phase was like: its turns, and of those by their place after its beginning what they found."""
    shares: dict[int, list[Turn]] = {}
    counts: dict[str, int] = {}
    for turn in turns:
        if turn.sent_s >= begin_s and turn.num_known:
            counts[turn.session] = counts.get(turn.session, 0) + 1
            shares.setdefault(counts[turn.session], []).append(turn)
    found = {
        place: sum(min(t.num_cached, t.num_known) for t in group) / sum(t.num_known for t in group)
        for place, group in shares.items()
    }
    cold = sum(turn.is_cold for group in shares.values() for turn in group)
    hits = ", ".join(f"{share:.3f}" for _, share in sorted(found.items())[:4])
    print(f"{label}: {sum(map(len, shares.values()))} turns, {cold} cold; hit rate of the first turns after it: {hits}")


@pytest.mark.timeout(900)
async def test_a_rolling_update_and_two_replicas_that_become_four_and_two(
    base_url: str, config: dict[str, Any]
) -> None:
    deployment = Deployment(config)
    await deployment.apply()
    async with traffic(base_url) as running:
        running.set_load(NUM_SESSIONS)
        for label, change in (
            ("all replaced", deployment.roll),
            ("2 -> 4", lambda: deployment.scale(4)),
            ("4 -> 2", lambda: deployment.scale(2)),
        ):
            await asyncio.sleep(AFTER_S)
            begin_s = time.monotonic()
            await change()
            await asyncio.sleep(AFTER_S)
            report(label, running.turns, begin_s)


@pytest.mark.timeout(900)
async def test_replicas_come_and_go_with_the_load(base_url: str, config: dict[str, Any]) -> None:
    """By the policy that counts tokens, KV and seats; both ways."""
    deployment = Deployment(config)
    del deployment.engines["num_replicas"]
    deployment.engines["autoscaling_config"] = {
        "min_replicas": 1,
        "max_replicas": 3,
        "initial_replicas": 1,
        "upscale_delay_s": 1,
        "downscale_delay_s": 4,
        "metrics_interval_s": 1,
        "look_back_period_s": 4,
        "policy": {
            "policy_function": "deployments.cluster.autoscaling:TokensAndKV",
            "policy_kwargs": {"target_seats": 0.1},
        },
    }
    await deployment.apply()
    async with traffic(base_url) as running:
        for num_sessions, num_replicas in ((2, 1), (24, 3), (2, 1)):
            begin_s = time.monotonic()
            running.set_load(num_sessions)
            await until(partial(is_running, num_replicas))
            await asyncio.sleep(AFTER_S)
            report(f"{num_sessions} sessions: {num_replicas} replicas", running.turns, begin_s)
