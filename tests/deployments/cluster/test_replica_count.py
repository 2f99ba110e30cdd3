"""The number of replicas is asked for beside the requests, and what is not known changes nothing."""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray.serve.exceptions import RayServeException

from deployments.cluster import replica_count
from deployments.cluster.replica_count import ReplicaCount


async def test_the_number_follows_the_deployment_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int | Exception] = [4, RayServeException("no controller"), KeyError("app"), 0]
    asked = threading.Semaphore(0)

    def ask() -> int:
        asked.acquire()
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    count = ReplicaCount(ask, 2)
    monkeypatch.setattr(replica_count, "PERIOD_S", 0.0)
    for before, after in [(2, 4), (4, 4), (4, 4), (4, 1)]:
        assert [count(), count()] == [before, before]  # asked once, and not waited for
        asked.release()
        async with asyncio.timeout(10):
            while count._asking is not None:
                await asyncio.sleep(0.001)
        assert count._num_replicas == after
    assert answers == []


async def test_it_is_not_asked_for_at_every_request() -> None:
    num_asked = 0

    def ask() -> int:
        nonlocal num_asked
        num_asked += 1
        return 3

    count = ReplicaCount(ask, 1)
    for _ in range(10):
        count()
        await asyncio.sleep(0.01)
    assert (count(), num_asked) == (3, 1)
