"""The HTTP face: OpenAI's endpoints over an EngineClient. Validates, names the session, words the answers and
the errors. Nothing here knows a token, a cache or a replica beyond the number that it reports.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.cache_map import add_cache_routes
from deployments.cluster.coalesced import Coalesced
from deployments.cluster.replica_count import ReplicaCount, count_replicas
from deployments.completions.answers import AnswerFormat, ChatFormat, CompletionFormat
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.generation import (
    CacheHold,
    DeltaItem,
    ErrorItem,
    GenerationItem,
    GenerationRequest,
    ModelCard,
    ReplicaCache,
)
from deployments.http.admission import Admission
from deployments.http.bodies import RequestBodies
from deployments.http.errors import EXCEPTION_HANDLERS, error_body, error_response
from deployments.http.event_stream import DONE, EventStream, sse_event
from deployments.http.fair_limit import FairLimit
from deployments.http.generation_body import GenerationBody
from deployments.http.open_server import check_is_local
from deployments.http.parsing import MAX_NAME_CHARS
from deployments.http.request_limits import RequestLimits
from deployments.openapi import openapi_document
from deployments.page import add_page
from deployments.responses.api import ResponsesApi
from deployments.responses.routes import add_response_routes
from deployments.routing.absence import why_absent
from deployments.routing.engine_client import EngineClient
from deployments.routing.session_key import session_key
from deployments.store.conversation_store import ConversationStore
from deployments.store.url import read_password
from deployments.store.values import NO_STORE_LIMITS, StoreLimits
from deployments.tenants import Authenticator, TenantConfig, WatchedTenants
from engine import __version__
from engine.cache_view import CacheQuery
from engine.errors import ContextLengthError, InvalidParameterError, OverloadedError, UnknownModelError
from engine.paths import data_folder, private_folder
from engine.tenant import LOCAL_TENANT, Tenant
from engine.text.prompt import ChatPrompt, Prompt, TokenPrompt

# How often readiness asks the engines and the store, at most, in seconds: anybody may ask for it.
READY_PERIOD_S = 1.0
BodyT = TypeVar("BodyT", ChatCompletionBody, CompletionBody)
# Until Serve has said how many engine replicas there are: no limit.
MANY_REPLICAS = 1_000_000


class Engine(Protocol):
    """What the HTTP face needs of the engine replicas; EngineClient has it."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]: ...

    async def describe(self) -> ModelCard: ...

    async def model_card(self) -> ModelCard: ...

    def choose_session_id(self, candidates: Sequence[str]) -> str: ...

    async def map_cache(self, query: CacheQuery) -> list[ReplicaCache]: ...

    async def hold_back(self, hold: CacheHold) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class IngressConfig:
    """What one ingress replica goes by; see AppArgs and TenantConfig. tenants: all, as of when the application was built.
    tenants_file, environment_tenants: where they are from, for the file may change."""

    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 32 * 2**10
    tenants: tuple[TenantConfig, ...] = ()
    tenants_file: str | None = None
    environment_tenants: tuple[TenantConfig, ...] = ()
    request_timeout_s: float | None = None
    store_url: str | None = None
    store_password_file: str | None = None
    retention_days: float | None = None
    store_limits: StoreLimits = NO_STORE_LIMITS  # of a tenant whose own entry does not say otherwise
    store_min_free_bytes: int = 0
    num_fallback_replicas: int = 1
    engine_wait_s: float = 60.0
    page: bool = True
    demo: bool = False


class Ingress:
    """The ingress deployment; Serve asks it for the application once it is constructed."""

    def __init__(self, handle: DeploymentHandle, config: IngressConfig) -> None:
        why = partial(why_absent, handle.app_name, handle.deployment_name)
        self._engine = EngineClient(handle, config.num_fallback_replicas, why, config.engine_wait_s)
        self._num_engines = ReplicaCount(
            partial(count_replicas, handle.app_name, handle.deployment_name), MANY_REPLICAS
        )
        self._config = config

    def __serve_build_asgi_app__(self) -> ASGIApp:
        context = serve.get_replica_context()
        return create_app(
            self._engine,
            self._config,
            ingress_id=context.replica_id.unique_id,
            num_ingress_replicas=ReplicaCount(
                partial(count_replicas, context.app_name, context.deployment), context.world_size or 1
            ),
            num_engine_replicas=self._num_engines,
            # HAProxy does not say for whom it asks.
            sees_clients=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1",
            ready_period_s=READY_PERIOD_S,
        )


def create_app(
    engine: Engine,
    config: IngressConfig,
    *,
    ingress_id: str,
    num_ingress_replicas: Callable[[], int] = lambda: 1,
    num_engine_replicas: Callable[[], int] = lambda: 1,
    sees_clients: bool = True,
    ready_period_s: float = 0.0,
) -> FastAPI:
    """The application.

    ingress_id: goes out in a header, for experiments with routing. num_engine_replicas: as many share what is let in here.
    sees_clients: the address that a request comes from is its client's. ready_period_s: how old an answer about readiness
    may be, in seconds.
    """
    tenants = config.tenants
    watched = None
    if config.tenants_file is not None:
        watched = WatchedTenants(config.tenants_file, config.environment_tenants)
        tenants = watched.read_if_changed() or tenants  # the application may have been built long ago
    admission = Admission(
        engine,
        tenants,
        config.store_limits,
        num_ingress_replicas=num_ingress_replicas,
        default_timeout_s=config.request_timeout_s,
    )

    async def check_model(name: str) -> ModelCard:
        card = await engine.model_card()
        _check_model(name, card)
        return card

    responses = ResponsesApi(
        admission,
        ConversationStore(
            config.store_url or _default_store_url(),
            password=read_password(config.store_password_file, os.environ),
            quota_of=admission.quota_of,
            min_free_bytes=config.store_min_free_bytes,
        ),
        owner=f"{ingress_id}-{uuid.uuid4().hex}",
        check_model=check_model,
        choose_session_id=engine.choose_session_id,
        retention_days=config.retention_days,
    )

    authenticator = Authenticator(tenants)
    bodies = RequestBodies(config.max_body_bytes)
    places = FairLimit()
    started = int(time.time())

    def use_tenants(tenants: tuple[TenantConfig, ...]) -> None:
        authenticator.use(tenants)
        admission.use(tenants)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = None if watched is None else asyncio.create_task(watched.watch(use_tenants))
        yield
        if watching is not None:
            watching.cancel()
        bodies.close()
        await responses.close()

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,  # the bodies are parsed by hand; FastAPI's own document would know nothing of them
        redirect_slashes=False,
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
    )
    app.add_middleware(RequestLimits, max_header_bytes=config.max_header_bytes)

    def tenant_of(request: Request) -> Tenant:
        if tenants:
            return authenticator.authenticate(request.headers.get("authorization"))
        client_host = request.client.host if request.client else None
        check_is_local(request.headers.items(), client_host, sees_clients=sees_clients)
        return LOCAL_TENANT

    async def in_a_place(tenant: Tenant, body: GenerationBody, respond: Callable[[], Awaitable[Response]]) -> Response:
        """Lets in as many as the engines run and let wait, all together, and refuses the next one at once: here it would only
        wait where no engine knows of it, and its client could not go elsewhere."""
        card = await engine.model_card()
        _check_body(body, card)
        limit = card.max_num_requests * num_engine_replicas()
        if not places.try_take(tenant.tenant_id, 1, limit):
            raise OverloadedError("as many requests run and wait as may; try again in a moment")
        give_back = partial(places.give_back, tenant.tenant_id, 1)
        try:
            response = await respond()
        except BaseException:
            give_back()
            raise
        if isinstance(response, EventStream):
            response.at_end(give_back)
        else:
            give_back()
        return response

    async def answer(
        request: Request,
        kind: type[BodyT],
        make_format: Callable[[str, int, BodyT], AnswerFormat],
        id_prefix: str,
    ) -> Response:
        tenant = tenant_of(request)
        body, data = await bodies.parse(kind, request, tenant)
        sampling = body.sampling_params()
        generation = GenerationRequest(
            request_id=id_prefix + uuid.uuid4().hex,
            session_id=session_key(request.headers.items(), data),
            prompt=body.prompt_value(),
            sampling=sampling,
            stream=body.stream,
            return_prompt_token_ids=body.return_token_ids,
            tenant=tenant,
        )
        return await in_a_place(tenant, body, partial(respond, generation, body, make_format))

    async def respond(
        generation: GenerationRequest, body: BodyT, make_format: Callable[[str, int, BodyT], AnswerFormat]
    ) -> Response:
        _check_prompt(generation.prompt, await engine.model_card())
        answer_format = make_format(generation.request_id, int(time.time()), body)
        items = admission.generate(generation, body.timeout)
        first = await anext(items)  # decides on the status; nothing is sent before
        if isinstance(first, ErrorItem) or not body.stream:
            await _exhaust(items)
        if isinstance(first, ErrorItem):
            return error_response(body.in_own_words(first))
        headers = {"x-pensieve-replica": str(first.replica_rank), "x-pensieve-ingress": ingress_id}
        if not body.stream:
            return JSONResponse(answer_format.whole(first.delta), headers=headers)
        events = _events(first, items, answer_format, include_usage=body.include_usage)
        return EventStream(events, items.aclose, headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatCompletionBody, ChatFormat, "chatcmpl-")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody, CompletionFormat, "cmpl-")

    def is_operator(tenant: Tenant) -> bool:
        return not tenants or authenticator.is_operator(tenant)

    add_response_routes(app, responses, bodies, tenant_of, in_a_place)
    add_cache_routes(app, engine, bodies, tenant_of, is_operator, demo=config.demo)
    if config.page:
        add_page(app)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        tenant_of(request)
        return JSONResponse({"object": "list", "data": [_model(await engine.model_card(), started)]})

    @app.get("/v1/models/{model:path}")  # path: hub ids have a slash
    async def model(request: Request, model: str) -> Response:
        tenant_of(request)
        card = await engine.model_card()
        _check_model(model, card)
        return JSONResponse(_model(card, started))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    async def check_ready() -> None:
        await engine.describe()
        await responses.check()

    is_ready = Coalesced(check_ready, ready_period_s)

    @app.get("/ready")
    async def ready() -> Response:
        await is_ready()
        warnings = responses.warnings
        return JSONResponse({"status": "ready", **({"warnings": warnings} if warnings else {})})

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document)

    document = openapi_document(
        (method, route.path, route.name)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    )
    return app


def _default_store_url() -> str:
    return f"sqlite:///{private_folder(data_folder()) / 'conversations.db'}"


async def _events(
    first: DeltaItem,
    items: AsyncGenerator[GenerationItem, None],
    answer_format: AnswerFormat,
    *,
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """Server-sent events. An error after the start is an event; without [DONE], for the answer is not done."""
    async with aclosing(items):
        item: GenerationItem = first
        while isinstance(item, DeltaItem):
            if chunks := answer_format.chunks(item.delta):
                yield "".join(map(sse_event, chunks))  # one message: each has its price
            if item.delta.finish_reason is not None:
                if include_usage:
                    yield sse_event(answer_format.usage_chunk(item.delta))
                yield DONE
                break
            item = await anext(items)
        else:
            yield sse_event(error_body(item))
        await _exhaust(items)


async def _exhaust(items: AsyncGenerator[GenerationItem, None]) -> None:
    """To its end: closing it before would cancel a call that is about to be over by itself."""
    async for _ in items:
        pass


def _check_model(name: str, card: ModelCard) -> None:
    if name != card.model_name:
        raise UnknownModelError(f"no model {name[:MAX_NAME_CHARS]!r} here; there is {card.model_name!r}", param="model")


def _check_body(body: GenerationBody, card: ModelCard) -> None:
    """Raises where the model is not here, or cannot do what is asked whatever the prompt is."""
    _check_model(body.model, card)
    if body.min_tokens > card.max_model_len:
        raise InvalidParameterError(
            f"min_tokens must be at most {card.max_model_len}, the context window", param="min_tokens"
        )


def _check_prompt(prompt: Prompt, card: ModelCard) -> None:
    """Raises ContextLengthError where it cannot fit, each message being a token at least. The engine counts exactly."""
    if isinstance(prompt, ChatPrompt):
        size, unit, param = len(prompt.messages), "messages", "messages"
    elif isinstance(prompt, TokenPrompt):
        size, unit, param = len(prompt.token_ids), "tokens", "prompt"
    else:
        return
    if size > card.max_model_len:
        raise ContextLengthError(
            f"the context window is {card.max_model_len} tokens, but the prompt has {size} {unit}; shorten it", param
        )


def _model(card: ModelCard, created: int) -> dict[str, Any]:
    return {
        "id": card.model_name,
        "object": "model",
        "created": created,
        "owned_by": "pensieve",
        "max_model_len": card.max_model_len,
    }
