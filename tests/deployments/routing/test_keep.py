"""Hints on a conversation go to the replica that has it, and whatever Ray raises is an error for clients."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.errors import ReplicaLostError
from deployments.generation import KeptConversation
from deployments.routing.engine_client import EngineClient
from deployments.routing.load import ReplicaLoad
from deployments.routing.rendezvous import rank_replicas
from engine.core.retention import ConversationCache, RetentionHint
from engine.tenant import Tenant

ACME = Tenant("acme")
KEPT = KeptConversation(1, ConversationCache(8, {"gpu": 8}))
IDLE = ReplicaLoad(num_requests=0, num_ahead=-9, turn_s=0.0, compute_s=None)


class KeepingHandle:
    """Answers every call with `answer`, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.sessions: list[str] = []
        self.asked: list[tuple[Any, ...]] = []

    def options(self, *, session_id: str) -> KeepingHandle:
        self.sessions.append(session_id)
        return self

    @property
    def keep(self) -> KeepingHandle:
        return self

    async def remote(self, conversation_id: str, hint: RetentionHint | None, *, even_unknown: bool) -> Any:
        self.asked.append((conversation_id, hint, even_unknown))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def make_client(handle: KeepingHandle, ranks: tuple[int, ...]) -> EngineClient:
    client = EngineClient(handle)  # type: ignore[arg-type]
    client._loads = lambda: dict.fromkeys(ranks, IDLE)  # type: ignore[assignment]
    return client


async def test_the_home_is_asked_in_the_tenants_name() -> None:
    handle = KeepingHandle(KEPT)
    hint = RetentionHint.of(release=True)
    assert await make_client(handle, (0, 1, 2)).keep(ACME, "s", hint) is KEPT
    assert (handle.sessions, handle.asked) == (["0|s"], [("acme\ns", hint, False)])


async def test_the_replica_that_answered_last_is_asked() -> None:
    handle = KeepingHandle(None)
    client = make_client(handle, (0, 1, 2))
    second = rank_replicas("s", (0, 1, 2))[1]
    client._sizes.note("s", 100, second)
    assert await client.keep(ACME, "s", None, even_unknown=True) is None
    assert handle.sessions == ["1|s"]


async def test_a_lost_replica_is_an_error_for_the_client() -> None:
    with pytest.raises(ReplicaLostError):
        await make_client(KeepingHandle(RayActorError()), ()).keep(ACME, "s", None)
