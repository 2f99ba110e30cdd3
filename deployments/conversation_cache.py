"""GET and PATCH /v1/conversations/{id}/cache: what is cached of one conversation, and how long that is worth keeping.

A conversation is what requests are routed by: one that the server keeps, or a client's own session. Depends on neither the
engine nor Ray.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Protocol, Self

from fastapi import FastAPI, Request
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.generation import KeptConversation
from deployments.http.admission import Admission
from deployments.http.cache_details import outcome_report
from deployments.http.gate import Gate
from deployments.http.parsing import Body
from deployments.routing.session_key import short_name
from engine.core.retention import MAX_PRIORITY, RetentionHint
from engine.tenant import Tenant


class CacheHintBody(Body):
    """PATCH /v1/conversations/{id}/cache.

    ttl_s: seconds for which the conversation is to be kept in preference to others. priority: how much, 50 = like any other.
    expected_return_s: seconds until its next turn. release: it may go first, until its next turn.
    """

    ttl_s: Annotated[float, Field(gt=0)] | None = None
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] | None = None
    expected_return_s: Annotated[float, Field(gt=0)] | None = None
    release: bool = False

    @model_validator(mode="after")
    def _check_says_something(self) -> Self:
        others = [self.ttl_s, self.priority, self.expected_return_s]
        if self.release and any(other is not None for other in others):
            message = "a conversation that is released is not kept; give either release or the others"
            raise PydanticCustomError("mutually_exclusive_parameters", message, {"param": "release"})
        if not self.release and all(other is None for other in others):
            message = "give at least one of ttl_s, priority, expected_return_s and release"
            raise PydanticCustomError("missing", message)
        return self

    def hint(self) -> RetentionHint:
        """As the engine takes it."""
        return RetentionHint.of(
            ttl_s=self.ttl_s,
            priority=self.priority,
            expected_return_s=self.expected_return_s,
            release=self.release,
        )


class KeepingEngine(Protocol):
    """What is asked of the engine replica that has the conversation; see EngineClient."""

    async def keep(
        self, tenant: Tenant, session_id: str, hint: RetentionHint | None, *, even_unknown: bool = False
    ) -> KeptConversation | None: ...


def add_conversation_cache_routes(
    app: FastAPI,
    gate: Gate,
    admission: Admission,
    engine: KeepingEngine,
    check_is_stored: Callable[[Tenant, str], Awaitable[object]],
) -> None:
    """check_is_stored: raises NotFoundError unless the server keeps a conversation of that id for that tenant."""

    async def keep(tenant: Tenant, conversation_id: str, hint: RetentionHint | None) -> dict[str, Any]:
        admission.admit_storing(tenant.tenant_id, 0)
        session_id = short_name(conversation_id)
        kept = await engine.keep(tenant, session_id, hint)
        if kept is None:  # its replica has not seen it since it started
            await check_is_stored(tenant, conversation_id)
            kept = await engine.keep(tenant, session_id, hint, even_unknown=True)
        assert kept is not None
        by_tier = dict(kept.cache.tokens_by_tier)
        told = {} if kept.outcome is None else {"prompt_cache_hint": outcome_report(kept.outcome)}
        return {
            "object": "conversation.cache",
            "id": conversation_id,
            "replica": kept.replica_rank,
            "tokens": kept.cache.num_tokens,
            "cached_tokens": sum(by_tier.values()),
            "cached_tokens_by_tier": by_tier,
            "hint": None if kept.cache.hint is None else _shown(kept.cache.hint),
            **told,
        }

    @app.get("/v1/conversations/{conversation_id}/cache")
    async def get_conversation_cache(request: Request, conversation_id: str) -> dict[str, Any]:
        return await keep(gate.tenant_of(request), conversation_id, None)

    @app.patch("/v1/conversations/{conversation_id}/cache")
    async def hint_conversation_cache(request: Request, conversation_id: str) -> dict[str, Any]:
        tenant, body, _ = await gate.read(CacheHintBody, request)
        return await keep(tenant, conversation_id, body.hint())


def _shown(hint: RetentionHint) -> dict[str, Any]:
    """A hint on a whole conversation in the words of the request."""
    span = hint.spans[0] if hint.spans else None
    return {
        "priority": hint.rest_priority if span is None else span.priority,
        "ttl_s": None if span is None else span.ttl_s,
        "expected_return_s": hint.expected_return_s,
    }
