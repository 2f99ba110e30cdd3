"""Which replicas the router offers to Serve for a request; test_serve.py and test_routing.py have it in a real Serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.routing.rendezvous import rank_replicas, routing_name
from deployments.routing.session_router import RANK, SessionRouter


def replica(rank: int) -> Any:
    return SimpleNamespace(
        replica_id=SimpleNamespace(unique_id=f"replica-{9 - rank}"),
        routing_stats={RANK: rank},
        replica_metadata={RANK: -1},
    )


async def offered(name: str | None, num_replicas: int = 4, num_fallbacks: int = 2) -> list[int]:
    router: Any = SimpleNamespace(_num_choices=1 + num_fallbacks)
    metadata = SimpleNamespace(session_id=name, internal_request_id="request-1")
    pending: Any = SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace(should_backoff=False))
    chosen = await SessionRouter.choose_replicas(router, [replica(rank) for rank in range(num_replicas)], pending)
    assert pending.routing_context.should_backoff
    assert all(len(choice) == 1 for choice in chosen)
    return [choice[0].routing_stats[RANK] for choice in chosen]


@pytest.mark.parametrize("session", ["a", "b", "1|c"])
async def test_home_first_and_without_those_that_refused(session: str) -> None:
    order = rank_replicas(session, range(4))
    for num_refusals in range(3):
        assert await offered(routing_name(session, num_refusals)) == order[num_refusals:3]


async def test_where_all_refused_they_are_asked_again() -> None:
    assert await offered(routing_name("a", 3)) == await offered(routing_name("a", 0))
    assert await offered(routing_name("a", 1), num_replicas=1) == [0]


async def test_without_a_session_any_replica_may_be_home() -> None:
    assert len(await offered(None)) == 3
