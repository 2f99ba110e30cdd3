"""The number of replicas follows the deployment, and what is not known changes nothing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

from deployments.cluster import replica_count as module
from deployments.cluster.replica_count import replica_count


def status(num_running: int) -> Any:
    deployment = SimpleNamespace(replica_states={ReplicaState.RUNNING: num_running, ReplicaState.STARTING: 1})
    return SimpleNamespace(applications={"app": SimpleNamespace(deployments={"LLMServer": deployment})})


async def test_the_number_follows_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [
        status(4),
        RayServeException("no controller"),
        SimpleNamespace(applications={}),  # as it is being deleted
        status(0),
        status(3),
    ]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(serve, "status", ask)
    monkeypatch.setattr(module, "PERIOD_S", 0.0)
    count = replica_count("app", "LLMServer", 2)
    said = []
    for num_left in (4, 3, 2, 1, 0):
        said.append(count())
        async with asyncio.timeout(10):
            while len(answers) > num_left or len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)
    assert said == [2, 4, 4, 4, 1]
