"""The HTTP application: OpenAI's and Anthropic's endpoints over an EngineClient.

Wiring only; each endpoint is in its own package. Nothing in them knows a token, a cache or a replica beyond the number
that it reports.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from deployments.cache_map import STREAM_PATH, add_cache_routes
from deployments.cluster.application_metrics import ApplicationMetrics
from deployments.cluster.coalesced import Coalesced
from deployments.cluster.replica_count import replica_count
from deployments.completions.routes import add_completion_routes
from deployments.completions.tokens import add_token_routes
from deployments.conversation_cache import add_conversation_cache_routes
from deployments.http.adapters import add_adapter_routes
from deployments.http.admission import Admission
from deployments.http.errors import EXCEPTION_HANDLERS
from deployments.http.gate import Gate
from deployments.http.ignored import IGNORED_HEADER, TellingRoute
from deployments.http.paths import TrailingSlashes
from deployments.http.request_limits import RequestLimits
from deployments.http.status import add_load_routes, add_model_routes, add_status_routes
from deployments.messages.routes import add_message_routes
from deployments.openapi import openapi_document
from deployments.options import IngressOptions
from deployments.page import add_page
from deployments.request_log import RequestLog
from deployments.responses.api import ResponsesApi
from deployments.responses.conversations import ConversationsApi
from deployments.responses.routes import add_conversation_routes, add_response_routes
from deployments.responses.store_upkeep import StoreUpkeep
from deployments.routing.absence import why_absent
from deployments.routing.engine_client import EngineClient
from deployments.routing.models import Engine, Models
from deployments.store.conversation_store import ConversationStore
from deployments.store.url import read_password
from deployments.tenants import TenantConfig, WatchedTenants
from deployments.traces import IngressTraces, start_tracing
from deployments.watched import Watch, Watched
from engine.paths import data_folder, private_folder

# How often readiness asks the engines and the store, at most, in seconds: that needs no key.
READY_PERIOD_S = 1.0
# And the nodes for their metrics: Ray collects them every ten seconds.
METRICS_PERIOD_S = 5.0
# Until Serve has said how many engine replicas there are: no limit.
MANY_REPLICAS = 1_000_000


class IngressConfig(IngressOptions):
    """What one ingress replica goes by: the application's options that it reads, and the tenants.

    tenants: all of them, as of when the application was built; `tenants_file` may have changed since.
    environment_tenants: those of them that are not from the file.
    """

    tenants: tuple[TenantConfig, ...] = ()
    environment_tenants: tuple[TenantConfig, ...] = ()


class Ingress:
    """The ingress deployment; Serve asks it for the application once it is constructed."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], config: IngressConfig) -> None:
        """handles: of the engine deployments, by the names of their models; a single one may have any name."""
        self._engines = {name: self._client(handle, config) for name, handle in handles.items()}
        self._counts = [replica_count(each.app_name, each.deployment_name, MANY_REPLICAS) for each in handles.values()]
        self._config = config

    @staticmethod
    def _client(handle: DeploymentHandle, config: IngressConfig) -> EngineClient:
        why = partial(why_absent, handle.app_name, handle.deployment_name)
        return EngineClient(handle, config.num_fallback_replicas, why, config.engine_wait_s)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        context = serve.get_replica_context()
        return create_app(
            self._engines,
            self._config,
            ingress_id=context.replica_id.unique_id,
            num_ingress_replicas=replica_count(context.app_name, context.deployment, context.world_size or 1),
            num_engine_replicas=lambda: sum(count() for count in self._counts),
            # HAProxy hides the client's address.
            sees_clients=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1",
            ready_period_s=READY_PERIOD_S,
            watches=_watches(self._config),
            application_metrics=Coalesced(ApplicationMetrics(context.app_name), METRICS_PERIOD_S),
        )


def _watches(config: IngressConfig) -> list[Watch]:
    # Traces first: the log names the trace that they begin, if the client has none.
    watches: list[Watch] = [] if config.traces == "off" else [IngressTraces(start_tracing(config.traces))]
    return [*watches, RequestLog()] if config.log_requests else watches


async def _no_metrics() -> str:
    return ""


def create_app(
    engines: Engine | Mapping[str, Engine],
    config: IngressConfig,
    *,
    ingress_id: str,
    num_ingress_replicas: Callable[[], int] = lambda: 1,
    num_engine_replicas: Callable[[], int] = lambda: 1,
    sees_clients: bool = True,
    ready_period_s: float = 0.0,
    watches: Sequence[Watch] = (),
    application_metrics: Callable[[], Awaitable[str]] = _no_metrics,
) -> FastAPI:
    """The application.

    engines: of its models, by their names; of a single one, the engine alone.
    ingress_id: sent in a header, for experiments with routing.
    num_ingress_replicas: how many ingress replicas share the tenants' limits.
    num_engine_replicas: how many engine replicas share what is let in here.
    sees_clients: whether the address that a request comes from is its client's.
    ready_period_s: how old an answer about readiness, or about the load, may be, in seconds.
    watches: what hears of each generation.
    application_metrics: the application's series, in Prometheus's text format.
    """
    engine = Models(engines if isinstance(engines, Mapping) else {"": engines})
    tenants = config.tenants
    watched = None
    if config.tenants_file is not None:
        watched = WatchedTenants(config.tenants_file, config.environment_tenants)
        tenants = watched.read_if_changed() or tenants  # the application may have been built long ago
    admission = Admission(
        Watched(engine, watches) if watches else engine,
        tenants,
        config.store_limits,
        num_ingress_replicas=num_ingress_replicas,
        default_timeout_s=config.request_timeout_s,
    )
    gate = Gate(
        tenants,
        engine.model_card,
        max_body_bytes=config.max_body_bytes,
        num_engine_replicas=num_engine_replicas,
        sees_clients=sees_clients,
        is_strict=config.strict_parameters,
        allowed_origins=config.cors_allowed_origins,
    )
    upkeep = StoreUpkeep(
        ConversationStore(
            config.store_url or _default_store_url(),
            password=read_password(config.store_password_file, os.environ),
            quota_of=admission.quota_of,
            min_free_bytes=config.store_min_free_bytes,
        ),
        owner=f"{ingress_id}-{uuid.uuid4().hex}",
        retention_days=config.retention_days,
    )

    def use_tenants(tenants: tuple[TenantConfig, ...]) -> None:
        gate.use(tenants)
        admission.use(tenants)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = None if watched is None else asyncio.create_task(watched.watch(use_tenants))
        yield
        if watching is not None:
            watching.cancel()
        gate.close()
        await upkeep.close()
        for watch in watches:
            await asyncio.to_thread(watch.close)

    replica_warnings: list[str] = []

    async def check_ready() -> None:
        replica_warnings[:] = (await engine.describe()).warnings
        await upkeep.check()

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,  # the bodies are parsed by hand; FastAPI's own document would know nothing of them
        redirect_slashes=False,
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
    )
    app.router.route_class = TellingRoute
    app.add_middleware(TrailingSlashes)
    if config.cors_allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_allowed_origins,
            allow_methods=("GET", "HEAD", "POST", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=(IGNORED_HEADER, "x-pensieve-replica", "x-pensieve-ingress", "x-request-id", "retry-after"),
        )
    app.add_middleware(RequestLimits, max_header_bytes=config.max_header_bytes)  # the outermost
    add_completion_routes(app, gate, admission, ingress_id)
    add_token_routes(app, gate, admission, engine)
    add_message_routes(app, gate, admission, engine, ingress_id)
    add_response_routes(app, gate, ResponsesApi(admission, upkeep, engine.choose_session_id))
    conversations = ConversationsApi(admission, upkeep, engine.choose_session_id)
    add_conversation_routes(app, gate, conversations)
    add_conversation_cache_routes(app, gate, admission, engine, conversations.get)
    add_cache_routes(app, gate, engine, demo=config.demo)
    if config.page:
        add_page(app)
    add_adapter_routes(app, gate, engine)
    add_model_routes(app, gate, engine.model_card, engine.model_cards)
    add_status_routes(app, Coalesced(check_ready, ready_period_s), lambda: [*upkeep.warnings, *replica_warnings])
    add_load_routes(app, gate, Coalesced(engine.load, ready_period_s), application_metrics)
    _add_document_route(app, is_strict=config.strict_parameters)
    _answer_heads(app)
    return app


def _answer_heads(app: FastAPI) -> None:
    """HEAD is answered wherever GET is, but for streams. The HTTP server leaves the body out."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods == {"GET"} and route.path != STREAM_PATH:
            route.methods.add("HEAD")


def _add_document_route(app: FastAPI, *, is_strict: bool) -> None:
    """Serves the document of all routes that the application has by now."""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document)

    routes = [
        (method, route.path, route.name)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    ]
    document = openapi_document(routes, is_strict=is_strict)


def _default_store_url() -> str:
    return f"sqlite:///{private_folder(data_folder()) / 'conversations.db'}"
