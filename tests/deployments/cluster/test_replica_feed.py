"""On a real Serve: replicas share a secret, and hear who runs whenever that changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

from deployments.cluster.replica_feed import PEER_ADDRESS, follow_replicas, join_network, shared_secret
from deployments.routing.peers import Peers
from deployments.routing.session_router import RANK
from tests.deployments.local_ray import AS_PENSIEVE_SERVE, LocalServe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARED_SERVE = AS_PENSIEVE_SERVE
APP = "feed"
PATIENCE_S = 60.0


class Replica:
    """As LLMServer uses the feed, without an engine."""

    def __init__(self) -> None:
        self._network = join_network()
        self._addresses: Any = {}
        self._peers = Peers(self._network.peer_id, 60.0, 1, self._note)
        self._following: asyncio.Task[None] | None = None

    def _note(self, addresses: Any) -> None:
        self._addresses = addresses

    def _rank(self) -> int:
        return int(serve.get_replica_context().rank.rank)

    async def look(self) -> dict[str, Any]:
        return {
            "id": self._network.peer_id,
            "rank": self._rank(),
            "secret": self._network.secret,
            "host": self._network.host,
            "peers": self._addresses,
            "next_home": self._peers.next_home("tenant\nsession"),
        }

    async def record_replica_metadata(self) -> dict[str, Any]:
        follow = follow_replicas(lambda members: self._peers.update(members, time.monotonic()))
        self._following = asyncio.create_task(follow)
        return {RANK: self._rank(), PEER_ADDRESS: (self._network.host, 7000 + self._rank())}

    def record_routing_stats(self) -> dict[str, Any]:
        return {RANK: self._rank()}


def build(args: dict[str, str]) -> Application:
    return serve.deployment(Replica, name="Replica", ray_actor_options={"num_cpus": 0.1}).bind()


@pytest.fixture
def handle(local_serve: LocalServe) -> Iterator[DeploymentHandle]:
    local_serve.start(SHARED_SERVE)
    scale(2)
    end_s = time.monotonic() + PATIENCE_S
    while not ((status := serve.status().applications.get(APP)) and status.status == "RUNNING"):
        assert time.monotonic() < end_s
        time.sleep(0.1)
    yield serve.get_deployment_handle("Replica", APP)
    serve.delete(APP)


def scale(num_replicas: int) -> None:
    client = _get_global_client()
    assert client is not None
    deployment = {"name": "Replica", "num_replicas": num_replicas, "graceful_shutdown_wait_loop_s": 0.1}
    application = {
        "name": APP,
        "import_path": f"{__name__}:build",
        "deployments": [deployment],
        "route_prefix": "/feed",
    }
    schema = {"applications": [application], "logging_config": {"enable_access_log": False}}
    client.deploy_apps(ServeDeploySchema.model_validate(schema), _blocking=False)


async def looks(handle: DeploymentHandle, num_replicas: int, num_peers: int) -> dict[str, dict[str, Any]]:
    """What each replica sees, as soon as so many see so many others."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                answers = await handle.broadcast("look").results_async(timeout_s=10, return_exceptions=True)
            except Exception:
                answers = []
            seen = {answer["id"]: answer for answer in answers if isinstance(answer, dict)}
            if len(seen) == num_replicas and all(len(each["peers"]) == num_peers for each in seen.values()):
                return seen
            await asyncio.sleep(0.1)


async def test_replicas_know_each_other(handle: DeploymentHandle) -> None:
    two = await looks(handle, 2, 1)
    one, other = two.values()
    assert one["secret"] == other["secret"] == shared_secret(APP)
    assert len(one["secret"]) == 32
    assert one["peers"] == {other["id"]: (other["host"], 7000 + other["rank"])}
    assert one["next_home"] == other["id"]

    await asyncio.to_thread(scale, 3)
    three = await looks(handle, 3, 2)
    assert set(two) < set(three)
    assert {each["secret"] for each in three.values()} == {one["secret"]}
    for replica_id, each in three.items():
        assert set(each["peers"]) == set(three) - {replica_id}

    # One that has left may still be asked, and is nobody's next home.
    await asyncio.to_thread(scale, 1)
    (last,) = (await looks(handle, 1, 2)).values()
    async with asyncio.timeout(PATIENCE_S):
        while last["next_home"] is not None:
            (last,) = (await looks(handle, 1, 2)).values()
