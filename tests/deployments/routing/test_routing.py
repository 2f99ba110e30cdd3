"""Where sessions go on a real Serve, through two ingress replicas.

Home, whatever the ingress, at moderate load; most of them still after a replica was added; and back again with the
replacement of one that was lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from engine.embedded_model import EMBEDDED_MODEL_NAME
from tests.deployments.local_ray import AS_RAY, LocalServe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_SESSIONS, NUM_TURNS, NUM_CLIENTS = 100, 10, 4
APP = "routing"
PATIENCE_S = 120.0


def config(store_url: str, num_replicas: int) -> ServeDeploySchema:
    """As a file says it: only so does a change of the scale leave running replicas alone."""
    args = {
        "engine": {"model": "embedded", "num_threads": 1, "num_gpu_blocks": 160},
        "num_cpus": 0.3,
        "ingress_num_cpus": 0.2,
        "store_url": store_url,
    }
    return ServeDeploySchema.model_validate(
        {
            "applications": [
                {
                    "name": APP,
                    "route_prefix": "/",
                    "import_path": "deployments.app:build",
                    "args": args,
                    "deployments": [
                        {"name": "LLMServer", "num_replicas": num_replicas},
                        {"name": "Ingress", "num_replicas": 2},
                    ],
                }
            ],
        }
    )


class Cluster:
    """A Serve application whose number of engine replicas can be changed."""

    def __init__(self, url: str, store_url: str) -> None:
        self.url = url
        self._store_url = store_url

    async def scale(self, num_replicas: int) -> None:
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(config(self._store_url, num_replicas), _blocking=False)
        await self.wait_for(num_replicas)

    async def wait_for(self, num_replicas: int) -> None:
        """Until that many engine replicas run, with ranks from 0, and both ingress replicas know."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = serve.status().applications.get(APP)
                if status is not None and status.status == "RUNNING":
                    engines = serve.get_deployment_handle("LLMServer", APP)
                    answers = await engines.broadcast("get_load").results_async(return_exceptions=True)
                    ranks = sorted(answer[0] for answer in answers if isinstance(answer, tuple))
                    if ranks == list(range(num_replicas)):
                        break
                await asyncio.sleep(0.5)
        await asyncio.sleep(3)  # routers hear of new replicas and ranks by long poll


@pytest.fixture(scope="module")
def cluster(local_serve: LocalServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    store_url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'conversations.db'}"
    yield Cluster(local_serve.start(AS_RAY), store_url)
    local_serve.stop()


@pytest.fixture
async def http(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as client:
        yield client


async def ask(http: httpx.AsyncClient, session: str) -> tuple[str, str]:
    """(replica, ingress) that a turn of the session went to."""
    body: dict[str, Any] = {"model": EMBEDDED_MODEL_NAME, "messages": [{"role": "user", "content": session}]}
    headers = {"x-session-id": session}
    response = await http.post("/v1/chat/completions", json=body | {"max_tokens": 1}, headers=headers)
    assert response.status_code == 200, response.text
    return response.headers["x-pensieve-replica"], response.headers["x-pensieve-ingress"]


async def ask_all(http: httpx.AsyncClient, sessions: list[str]) -> list[tuple[str, str]]:
    """One turn of each, a few at a time."""
    places = asyncio.Semaphore(NUM_CLIENTS)

    async def limited(session: str) -> tuple[str, str]:
        async with places:
            return await ask(http, session)

    return list(await asyncio.gather(*map(limited, sessions)))


async def test_sessions_stay_home_through_growth_and_loss(cluster: Cluster, http: httpx.AsyncClient) -> None:
    sessions = [f"session-{number}" for number in range(NUM_SESSIONS)]
    await cluster.scale(3)
    before = [replica for replica, _ in await ask_all(http, sessions)]

    await cluster.scale(4)
    turns = [await ask_all(http, sessions) for _ in range(NUM_TURNS)]
    home = [replica for replica, _ in turns[0]]
    assert set(home) == {"0", "1", "2", "3"}
    moved = sum(now != then for now, then in zip(home, before, strict=True))
    assert 0 < moved <= 0.3 * NUM_SESSIONS
    assert all(now == "3" for now, then in zip(home, before, strict=True) if now != then)

    at_home = sum(replica == home[number] for turn in turns for number, (replica, _) in enumerate(turn))
    assert at_home >= 0.99 * NUM_SESSIONS * NUM_TURNS
    assert len({ingress for turn in turns for _, ingress in turn}) == 2

    title = f"ray::ServeReplica:{APP}:LLMServer"
    pids = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "".join(process.cmdline()[:1]).startswith(title)
    ]
    assert len(pids) == 4
    os.kill(pids[0], signal.SIGKILL)
    await ask_all(http, sessions)  # none of them is refused meanwhile
    await cluster.wait_for(4)
    assert [replica for replica, _ in await ask_all(http, sessions)] == home
    print(
        f"{at_home} of {NUM_SESSIONS * NUM_TURNS} turns at home, {moved} of {NUM_SESSIONS} sessions moved to a new replica"
    )
