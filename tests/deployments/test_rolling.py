"""Deploys under steady traffic: whatever changes, no request fails and none is answered wrongly.

What cannot be served says why, in every answer; and the log is what was asked for.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.routing.rendezvous import rank_replicas
from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe
from tests.nightly import nightly

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARED_SERVE = AS_PENSIEVE_SERVE
APP = "rolling"
NAMES = ("Mia", "Rex", "Tom", "Bella", "Max", "Luna")
# Far longer than anything here takes; only a defect waits for it.
PATIENCE_S = 120.0
LOGGING = {"logging_config": {"enable_access_log": False}}


@pytest.fixture(scope="module")
def base_url(local_serve: LocalServe) -> Iterator[str]:
    yield local_serve.start(SHARED_SERVE)
    serve.delete(APP)


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one engine and one ingress replica."""
    store = tmp_path_factory.getbasetemp() / "rolling.db"
    args = {
        "engine": {
            "model": "embedded",
            "dtype": "float32",
            "num_threads": 1,
            "num_gpu_blocks": 256,
            "max_num_seqs": 16,
        },
        "num_cpus": 0.5,
        "ingress_num_cpus": 0.25,
        "graceful_shutdown_timeout_s": 5,
        "store_url": f"sqlite:///{store}",
    }
    application = {"name": APP, "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    deployments = [{"name": name, "num_replicas": 1} for name in ("LLMServer", "Ingress")]
    return {**LOGGING, "applications": [{**application, "deployments": deployments}]}


def deploy(config: dict[str, Any]) -> None:
    """As `serve deploy`: says what is wanted, and does not wait for it."""
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(copy.deepcopy(config)), _blocking=False)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


def replicas(deployment: str) -> set[str]:
    """Names of the actors that live; not of those that are being replaced."""
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith(f"SERVE_REPLICA::{APP}#{deployment}")}


def is_running() -> bool:
    application = serve.status().applications.get(APP)
    return application is not None and application.status == "RUNNING"


async def roll(config: dict[str, Any]) -> None:
    """Deploy, and wait until nothing is left of what ran before."""
    before = replicas("LLMServer") | replicas("Ingress")
    deploy(config)
    await until(lambda: not before & (replicas("LLMServer") | replicas("Ingress")) and is_running())


class Traffic:
    """Sessions that tell a name and ask for it, again and again, every other one in streams.

    Any failure is raised by `stop`.
    """

    def __init__(self, base_url: str) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S)
        self.num_turns = 0
        self.homes: dict[str, list[str]] = {name: [] for name in NAMES}
        self._is_over = False
        self._tasks = [asyncio.create_task(self._hold(number, name)) for number, name in enumerate(NAMES)]

    async def _hold(self, number: int, name: str) -> None:
        for _ in itertools.count():
            messages = [{"role": "user", "content": f"my cat is called {name}"}]
            messages.append({"role": "assistant", "content": await self._say(number, name, messages)})
            messages.append({"role": "user", "content": "what is my cat called?"})
            answer = await self._say(number, name, messages)
            assert name in answer, f"{name}: {answer}"
            if self._is_over:
                return

    async def _say(self, number: int, name: str, messages: list[dict[str, str]]) -> str:
        body = {"model": EMBEDDED_MODEL_NAME, "messages": messages, "temperature": 0, "max_tokens": 24}
        response = await self._http.post("/v1/chat/completions", json=body, headers={"x-session-id": name})
        assert response.status_code == 200, response.text
        self.homes[name].append(response.headers["x-pensieve-replica"])
        self.num_turns += 1
        return str(response.json()["choices"][0]["message"]["content"])

    async def turns(self, num_turns: int) -> None:
        """So many more."""
        end = self.num_turns + num_turns
        while self.num_turns < end and not any(task.done() for task in self._tasks):
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)
        await self._http.aclose()


@asynccontextmanager
async def traffic(base_url: str) -> AsyncIterator[Traffic]:
    running = Traffic(base_url)
    await running.turns(4 * len(NAMES))
    yield running
    await running.turns(4 * len(NAMES))
    await running.stop()


async def follow(base_url: str, num_tokens: int) -> str:
    """The last line of a long stream."""
    body = {"model": EMBEDDED_MODEL_NAME, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    last = ""
    async with (
        httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http,
        http.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "max_tokens": num_tokens}) as response,
    ):
        async for line in response.aiter_lines():
            last = line or last
    return last


def logs(pattern: str) -> str:
    """What Serve's processes of these names have logged so far; of the replicas, those of this module."""
    folder = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1] / "logs" / "serve"
    return "".join(path.read_text() for path in folder.glob(f"{pattern}.log"))


@pytest.mark.parametrize(
    ("num_replicas", "max_surge_percent"),
    [
        pytest.param(1, None, marks=nightly),
        (1, 0),
        pytest.param(2, None, marks=nightly),
        pytest.param(2, 0, marks=nightly),
    ],
    ids=["1 beside the old one", "1 after the old one", "2 beside the old ones", "2 after the old ones"],
)
async def test_a_change_of_args_under_traffic(
    base_url: str, config: dict[str, Any], num_replicas: int, max_surge_percent: int | None
) -> None:
    application = config["applications"][0]
    application["args"]["max_surge_percent"] = max_surge_percent
    for deployment in application["deployments"]:
        deployment["num_replicas"] = num_replicas
    deploy(config)
    await until(is_running)
    async with traffic(base_url):
        stream = asyncio.create_task(follow(base_url, 3000))
        application["args"]["engine"]["max_num_seqs"] = 8
        await roll(config)
    assert await stream == "data: [DONE]"
    assert len(replicas("LLMServer")) == len(replicas("Ingress")) == num_replicas
    assert f"{EMBEDDED_MODEL_NAME} is ready after" in logs(f"replica_{APP}_LLMServer_*")
    assert "torch.float32 on cpu" in logs(f"replica_{APP}_LLMServer_*")  # a line of the engine's own
    assert "Proxy" in logs("proxy_*")
    for access in ("/v1/chat/completions 200", "CALL generate"):
        assert access not in logs("proxy_*") + logs(f"replica_{APP}_*")


@nightly
async def test_autoscaling_under_traffic(base_url: str, config: dict[str, Any]) -> None:
    """The switch to it rolls, because Ray counts it as another version of the code.

    A change of its bounds leaves the replicas alone, and sessions their homes, but for those that a new replica takes
    over.
    """
    deploy(config)
    await until(is_running)
    async with traffic(base_url) as running:
        engines = config["applications"][0]["deployments"][0]
        del engines["num_replicas"]
        engines["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 3}
        await roll(config)
        await running.turns(4 * len(NAMES))
        before = replicas("LLMServer") | replicas("Ingress")
        engines["autoscaling_config"] = {"min_replicas": 3, "max_replicas": 3}
        deploy(config)
        await until(lambda: len(replicas("LLMServer")) == 3 and is_running())
        assert before <= replicas("LLMServer") | replicas("Ingress")
        num_before = {name: len(homes) for name, homes in running.homes.items()}
        await running.turns(8 * len(NAMES))
        homes = {name: homes[num_before[name] + 2 :] for name, homes in running.homes.items()}
    expected = {name: str(rank_replicas(name, range(3))[0]) for name in NAMES}
    assert {name: set(used) for name, used in homes.items()} == {name: {expected[name]} for name in NAMES}


@nightly
async def test_a_stream_that_outlasts_the_application_is_told(base_url: str, config: dict[str, Any]) -> None:
    config["applications"][0]["args"]["graceful_shutdown_timeout_s"] = 1
    deploy(config)
    await until(is_running)
    streams = [asyncio.create_task(follow(base_url, 4000)) for _ in range(4)]
    await asyncio.sleep(2)
    await asyncio.to_thread(serve.delete, APP)
    ends = await asyncio.gather(*streams)
    assert all("server_stopping" in end for end in ends), ends


def has_failed() -> bool:
    application = serve.status().applications.get(APP)
    return application is not None and application.status == "DEPLOY_FAILED"


@nightly
async def test_a_deploy_that_cannot_start_leaves_what_runs(
    base_url: str, config: dict[str, Any], tmp_path: Path
) -> None:
    deploy(config)
    await until(is_running)
    old = replicas("LLMServer")
    config["applications"][0]["args"]["engine"]["model"] = str(tmp_path / "no-such-model")
    async with traffic(base_url):
        deploy(config)
        await until(has_failed)
    assert old <= replicas("LLMServer")


async def test_a_model_that_cannot_be_loaded_is_in_every_answer(
    base_url: str, config: dict[str, Any], tmp_path: Path
) -> None:
    config["applications"][0]["args"]["engine"]["model"] = str(tmp_path / "no-such-model")
    serve.delete(APP)
    deploy(config)
    await until(has_failed)
    body = {"model": EMBEDDED_MODEL_NAME, "messages": [{"role": "user", "content": "hi"}]}
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http:
        for request in (
            http.get("/ready"),
            http.get("/v1/models"),
            http.post("/v1/chat/completions", json=body),
            http.post("/v1/responses", json={"model": EMBEDDED_MODEL_NAME, "input": "hi"}),
        ):
            response = await request
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "model_not_loaded"), error
            assert "no-such-model" in error["message"]
            assert str(tmp_path) not in error["message"]
            assert "Traceback" not in error["message"]
    assert "the engine cannot start" in logs(f"replica_{APP}_LLMServer_*")
    assert "Exception during graceful shutdown" not in logs(f"replica_{APP}_*")


async def test_a_replica_that_no_node_has_room_for(base_url: str, config: dict[str, Any]) -> None:
    """And requests that wait for it are told when the application goes."""
    config["applications"][0]["args"]["num_gpus"] = 1
    serve.delete(APP)
    deploy(config)
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http, asyncio.timeout(PATIENCE_S):
        while True:
            response = await http.get("/ready")
            if "0 of 0 GPU" in response.text:
                break
            await asyncio.sleep(0.1)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_not_placed")
        waiting = asyncio.create_task(http.get("/v1/models"))
        await asyncio.sleep(1)
        assert not waiting.done()
        await asyncio.to_thread(serve.delete, APP)
        response = await waiting
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_stopping")
        assert int(response.headers["retry-after"]) >= 1
