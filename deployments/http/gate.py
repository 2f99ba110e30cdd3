"""What every request passes before its endpoint acts.

Who asks, a body within bounds, a model that is served, and a place among the requests that the engines can take.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from deployments.generation import ModelCard
from deployments.http.bodies import RequestBodies
from deployments.http.event_stream import EventStream
from deployments.http.fair_limit import FairLimit
from deployments.http.generation_body import GenerationBody
from deployments.http.ignored import note_ignored
from deployments.http.open_server import check_is_local
from deployments.http.parsing import BodyT, parse_query
from deployments.http.served_model import check_body
from deployments.origin import origin_of
from deployments.tenants import Authenticator, TenantConfig
from engine.errors import OverloadedError
from engine.tenant import LOCAL_TENANT, Tenant

# Choices of one request that run at the same time; the others wait for their turn in the ingress.
MAX_RUNNING_CHOICES = 16


def num_running_choices(body: GenerationBody, card: ModelCard) -> int:
    """How many of a request's choices run at the same time; no more than one engine replica takes."""
    return min(body.num_choices, MAX_RUNNING_CHOICES, card.max_num_requests)


class Gate:
    """One per ingress replica."""

    def __init__(
        self,
        tenants: Sequence[TenantConfig],
        model_card: Callable[[str], Awaitable[ModelCard]],
        *,
        max_body_bytes: int,
        num_engine_replicas: Callable[[], int] = lambda: 1,
        sees_clients: bool = True,
        is_strict: bool = False,
        allowed_origins: Collection[str] = (),
    ) -> None:
        """Nothing is asked yet.

        tenants: who may ask; none = every program on this machine.
        model_card: what serves a model; of no name, the first one. Raises UnknownModelError.
        num_engine_replicas: how many engine replicas share what is let in here.
        sees_clients: whether the address that a request comes from is its client's.
        is_strict: unknown parameters are refused; else they are ignored, and the answer tells their names.
        allowed_origins: see check_is_local.
        """
        self._has_keys = bool(tenants)
        self._authenticator = Authenticator(tenants)
        self._model_card = model_card
        self._bodies = RequestBodies(max_body_bytes, is_strict=is_strict)
        self._is_strict = is_strict
        self._allowed_origins = frozenset(allowed_origins)
        self._num_engine_replicas = num_engine_replicas
        self._sees_clients = sees_clients
        self._places = FairLimit()

    def use(self, tenants: Sequence[TenantConfig]) -> None:
        """From now on, the keys of these."""
        self._authenticator.use(tenants)

    def close(self) -> None:
        """Parse no further bodies."""
        self._bodies.close()

    def tenant_of(self, request: Request) -> Tenant:
        """Who asks. Raises RequestError if the request may not."""
        if self._has_keys:
            return self._authenticator.authenticate(
                request.headers.get("authorization"), request.headers.get("x-api-key")
            )
        client_host = request.client.host if request.client else None
        check_is_local(
            request.headers.items(),
            client_host,
            sees_clients=self._sees_clients,
            allowed_origins=self._allowed_origins,
        )
        return LOCAL_TENANT

    def is_operator(self, tenant: Tenant) -> bool:
        """Whether the tenant may see what concerns all tenants."""
        return not self._has_keys or self._authenticator.is_operator(tenant)

    async def read(
        self, kind: type[BodyT], request: Request, *, default: bytes = b""
    ) -> tuple[Tenant, BodyT, dict[str, Any]]:
        """Who asks, the checked body, and the plain data that it was made of. Raises RequestError, OverloadedError.

        default: what an empty body stands for.
        """
        tenant = self.tenant_of(request)  # first: the bodies of strangers are never read
        origin = origin_of(request.headers)
        body, data = await self._bodies.parse(kind, request, tenant, default=default)
        if isinstance(body, GenerationBody):
            body.note_origin(origin)
        return tenant, body, data

    def read_query(self, kind: type[BodyT], request: Request, *, without: Sequence[str] = ()) -> BodyT:
        """The checked query string. Raises RequestError.

        without: names of parameters that are left out of it.
        """
        ignored: list[str] | None = None if self._is_strict else []
        pairs = [pair for pair in request.query_params.multi_items() if pair[0] not in without]
        query = parse_query(kind, pairs, ignored)
        note_ignored(request, ignored or ())
        return query

    async def in_a_place(
        self, tenant: Tenant, body: GenerationBody, respond: Callable[[ModelCard], Awaitable[Response]]
    ) -> Response:
        """Calls `respond` with what is served, and holds places until its response is over: one for each choice that runs.

        There are as many places as requests that all engines together may run and let wait. The next one is rejected at
        once: here it would only wait where no engine knows of it, and its client could not go elsewhere. Raises
        OverloadedError, RequestError.
        """
        card = await self._model_card(body.model)
        check_body(body, card)
        return await self._in_places(tenant, num_running_choices(body, card), card, respond)

    async def in_one_place(
        self, tenant: Tenant, respond: Callable[[ModelCard], Awaitable[Response]], model: str = ""
    ) -> Response:
        """The same for what is computed without an answer of the model."""
        return await self._in_places(tenant, 1, await self._model_card(model), respond)

    async def _in_places(
        self, tenant: Tenant, num_places: int, card: ModelCard, respond: Callable[[ModelCard], Awaitable[Response]]
    ) -> Response:
        limit = card.max_num_requests * self._num_engine_replicas()
        if not self._places.try_take(tenant.tenant_id, num_places, limit):
            raise OverloadedError("the server is full; try again in a moment")
        give_back = partial(self._places.give_back, tenant.tenant_id, num_places)
        try:
            response = await respond(card)
        except BaseException:
            give_back()
            raise
        if isinstance(response, EventStream):
            response.at_end(give_back)
        else:
            give_back()
        return response
