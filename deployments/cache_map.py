"""GET /v1/cache/map and POST /v1/cache/demo: where the chunks of conversations are, as server-sent events.

Asks the engines only while there are watchers, and once for all of them. Depends on neither the engine nor Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from deployments.cluster.coalesced import Coalesced
from deployments.errors import NotAnOperatorError
from deployments.generation import CacheHold, ErrorItem, ReplicaCache
from deployments.http.errors import error_body
from deployments.http.event_stream import EventStream, sse_event
from deployments.http.fair_limit import FairLimit
from deployments.http.gate import Gate
from deployments.http.parsing import Body, Query
from engine.cache_view import CacheQuery, ConversationView, EvictionView
from engine.errors import OverloadedError, RequestError
from engine.tenant import Tenant

# Seconds between two events: the least, and if the watcher does not say.
MIN_INTERVAL_S = 0.25
DEFAULT_INTERVAL_S = 1.0
MAX_INTERVAL_S = 60.0
# After so long without an event a comment says that the stream is alive, in seconds.
HEARTBEAT_S = 15.0
# Streams of one ingress replica.
MAX_WATCHERS = 64
STREAM_PATH = "/v1/cache/map"


class MapQuery(Query):
    """The query of GET /v1/cache/map.

    interval: seconds between two events.
    num_events: how many; without it they end when the client leaves.
    """

    interval: Annotated[float, Field(ge=MIN_INTERVAL_S, le=MAX_INTERVAL_S)] = DEFAULT_INTERVAL_S
    num_events: Annotated[int, Field(ge=1)] | None = None


class HoldBody(Body):
    """POST /v1/cache/demo: blocks of each tier that every replica is to leave in use; null or absent = all."""

    gpu_blocks: Annotated[int, Field(ge=0)] | None = None
    cpu_blocks: Annotated[int, Field(ge=0)] | None = None


class CacheEngine(Protocol):
    """What is asked of the engine replicas; see EngineClient."""

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]: ...

    async def hold_back(self, hold: CacheHold) -> list[int]: ...


class CacheWatchers:
    """All watchers of this ingress replica.

    However many there are, the engines are asked once per moment; without any, not at all.
    """

    def __init__(
        self, engine: CacheEngine, *, can_hold_back: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """can_hold_back: operators may use POST /v1/cache/demo, and are told so."""
        self._engine = engine
        self._can_hold_back = can_hold_back
        self._clock = clock
        self._places = FairLimit()
        self._tenants: Counter[str] = Counter()
        self._num_operators = 0
        self._look = Coalesced(self._ask, MIN_INTERVAL_S / 2, clock)
        self._salt = secrets.token_bytes(16)

    async def _ask(self) -> tuple[CacheQuery, list[ReplicaCache]]:
        query = CacheQuery(tuple(sorted(+self._tenants)), self._num_operators > 0)
        return query, await self._engine.map_cache(query)

    def enter(self, tenant: Tenant, *, is_operator: bool) -> Callable[[], None]:
        """Let one more watch; returns how to leave. Raises OverloadedError when as many watch as may."""
        tenant_id = tenant.tenant_id
        if not self._places.try_take(tenant_id, 1, MAX_WATCHERS):
            raise OverloadedError("the cache has too many watchers; close another page or try again later")
        self._tenants[tenant_id] += 1
        self._num_operators += is_operator

        def leave() -> None:
            self._places.give_back(tenant_id, 1)
            self._tenants[tenant_id] -= 1
            self._num_operators -= is_operator

        return leave

    async def events(self, tenant: Tenant, query: MapQuery, sees_all: Callable[[], bool]) -> AsyncGenerator[str, None]:
        """One event per interval, at the same moments for all watchers of that interval.

        Call it between `enter` and leaving.

        sees_all: called each time; raises RequestError when the watcher may see nothing any more, which ends the
        stream.
        """
        num_left = query.num_events
        while True:
            asked, replicas = await self._look()
            try:
                is_operator = sees_all()
            except RequestError as error:
                yield sse_event(error_body(ErrorItem.of(error)))
                return
            if tenant.tenant_id not in asked.tenants:
                await asyncio.sleep(MIN_INTERVAL_S / 2)  # asked before this one came
                continue
            yield sse_event(self._event(tenant, replicas, is_operator=is_operator))
            if num_left is not None:
                num_left -= 1
                if not num_left:
                    return
            left_s = query.interval - self._clock() % query.interval
            while left_s > HEARTBEAT_S:
                await asyncio.sleep(HEARTBEAT_S)
                yield ": alive\n\n"
                left_s -= HEARTBEAT_S
            await asyncio.sleep(left_s)

    def _event(self, tenant: Tenant, replicas: Sequence[ReplicaCache], *, is_operator: bool) -> dict[str, Any]:
        return {
            "object": "cache.map",
            "operator": is_operator,
            "demo": is_operator and self._can_hold_back,
            "replicas": [self._replica(tenant, replica, is_operator=is_operator) for replica in replicas],
        }

    def _replica(self, tenant: Tenant, replica: ReplicaCache, *, is_operator: bool) -> dict[str, Any]:
        view = replica.view
        return {
            "replica": replica.replica_rank,
            "chunk_size": view.chunk_size,
            "tiers": [
                {
                    "name": tier.name,
                    "blocks": tier.num_blocks,
                    "used": tier.num_used - tier.num_held,
                    "held": tier.num_held,
                }
                for tier in view.tiers
            ],
            "hit_rates": {name: round(rate, 4) for name, rate in view.hit_rates.items()},
            "conversations": [
                self._conversation(tenant, row)
                for row in view.conversations
                if is_operator or row.tenant == tenant.tenant_id
            ],
            "evictions": list(self._evictions(tenant, view.evictions, is_operator=is_operator)),
        }

    def _conversation(self, tenant: Tenant, row: ConversationView) -> dict[str, Any]:
        return {
            "id": self._name(tenant, row.tenant, row.session_id),
            "tenant": row.tenant,
            "status": row.status,
            "num_chunks": row.num_chunks,
            "cells": [
                {
                    "state": cell.state,
                    "tokens": cell.num_tokens,
                    "idle_s": _rounded(cell.idle_s),
                    "retention_value": _rounded(cell.retention_value),
                }
                for cell in row.cells
            ],
        }

    def _evictions(
        self, tenant: Tenant, evictions: Sequence[EvictionView], *, is_operator: bool
    ) -> Iterator[dict[str, Any]]:
        for eviction in evictions:
            if not is_operator and eviction.tenant != tenant.tenant_id:
                continue
            name = None
            if eviction.tenant is not None and eviction.session_id is not None:
                name = self._name(tenant, eviction.tenant, eviction.session_id)
            yield {
                "number": eviction.number,
                "ago_s": _rounded(eviction.ago_s),
                "reason": eviction.reason,
                "from": eviction.source,
                "to": eviction.target,
                "conversation": name,
                "position": eviction.position,
                "tokens": eviction.num_tokens,
                "idle_s": _rounded(eviction.idle_s),
                "retention_value": _rounded(eviction.retention_value),
            }

    def _name(self, viewer: Tenant, tenant_id: str, session_id: str) -> str:
        """Its session key, to its own tenant; to an operator of another one, something that only tells it from others."""
        if viewer.tenant_id == tenant_id:
            return session_id
        named = f"{tenant_id}\n{session_id}".encode()
        return "hidden-" + hmac.new(self._salt, named, hashlib.sha256).hexdigest()[:12]


def _rounded(value: float | None) -> float | None:
    """To four digits: it is to be looked at, thousands of times."""
    return None if value is None else float(f"{value:.4g}")


def add_cache_routes(
    app: FastAPI,
    gate: Gate,
    engine: CacheEngine,
    *,
    demo: bool,
) -> None:
    """demo: the tiers can be made smaller."""
    watchers = CacheWatchers(engine, can_hold_back=demo)

    @app.get(STREAM_PATH)
    async def watch_cache(request: Request) -> Response:
        tenant = gate.tenant_of(request)
        query = gate.read_query(MapQuery, request)

        def sees_all() -> bool:
            return gate.is_operator(gate.tenant_of(request))  # keys may be withdrawn

        leave = watchers.enter(tenant, is_operator=sees_all())
        stream = EventStream(watchers.events(tenant, query, sees_all), _nothing_to_end, {})
        stream.at_end(leave)
        return stream

    if not demo:
        return

    @app.post("/v1/cache/demo")
    async def hold_back(request: Request) -> dict[str, Any]:
        if not gate.is_operator(gate.tenant_of(request)):
            raise NotAnOperatorError("this changes the cache of all tenants, so it needs an operator's key")
        _, body, _ = await gate.read(HoldBody, request, default=b"{}")
        return {
            "object": "cache.demo",
            "replicas": await engine.hold_back(CacheHold(body.gpu_blocks, body.cpu_blocks)),
        }


async def _nothing_to_end() -> None: ...
