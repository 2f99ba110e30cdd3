"""A node that is taken out of the cluster: what it serves moves first, and no request fails."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from deployments.app import build
from deployments.cluster.leave_node import main, replicas_here
from deployments.schema import AppArgs
from tests.deployments.local_ray import LocalServe, free_port
from tests.nightly import nightly

NODE: dict[str, Any] = {"object_store_memory": 150 * 2**20, "include_dashboard": False}
PATIENCE_S = 300.0


def test_without_ray_there_is_no_node_to_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    assert main(["--node-id", "00", "--timeout", "1"]) == 1
    assert "Ray does not let this node go" in capsys.readouterr().err


@pytest.fixture
def cluster(local_serve: LocalServe, tmp_path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Ray's address, the URL of the proxy, and the ids of two nodes with room for one engine replica each."""
    local_serve.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # the paths of Ray's sockets are long
        port = free_port()
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **NODE})
        try:
            workers = [nodes.add_node(num_cpus=2, **NODE) for _ in range(2)]
            ray.init(nodes.address, log_to_driver=False)
            serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
            args = AppArgs(
                engine={"model": "embedded", "num_threads": 1, "num_gpu_blocks": 256, "num_cpu_blocks": 256},
                num_cpus=2,
                ingress_num_cpus=0.5,
                store_url=f"sqlite:///{tmp_path / 'conversations.db'}",
            )
            serve.run(build(args), name="app", route_prefix="/")
            yield nodes.address, f"http://127.0.0.1:{port}", [worker.node_id for worker in workers]
        finally:
            serve.shutdown()
            ray.shutdown()
            nodes.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@nightly
async def test_a_replica_moves_before_its_node_goes_and_no_request_fails(cluster: tuple[str, str, list[str]]) -> None:
    address, url, node_ids = cluster
    (old_id,) = (node_id for node_id in node_ids if list(replicas_here(node_id)))
    (new_id,) = set(node_ids) - {old_id}
    statuses: list[int] = []
    has_left = asyncio.Event()

    async def chat(http: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not has_left.is_set() or turn < 2:
            body = {"model": "pensieve-recall-0.6m", "prompt": f"{number} {turn}", "max_tokens": 16}
            response = await http.post("/v1/completions", json=body, headers={"x-session-id": str(number)})
            statuses.append(response.status_code)
            turn += 1

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as http:
        chats = [asyncio.create_task(chat(http, number)) for number in range(4)]
        leaving = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deployments.cluster.leave_node", "--node-id", old_id, "--timeout", "280"),
            env={**os.environ, "RAY_ADDRESS": address},
        )
        status = await leaving.wait()
        assert not list(replicas_here(old_id))
        has_left.set()
        await asyncio.gather(*chats)
    assert status == 0
    assert set(statuses) == {200}
    assert any("LLMServer" in name for name in replicas_here(new_id))
