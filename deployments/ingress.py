"""The HTTP face: OpenAI's endpoints over an EngineClient. Validates, names the session, words the answers and
the errors. Nothing here knows a token, a cache or a replica beyond the number that it reports.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.absence import why_absent
from deployments.admission import Admission
from deployments.conversation_store import ConversationStore
from deployments.engine_client import EngineClient
from deployments.event_stream import EventStream
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest, ModelCard
from deployments.http_errors import EXCEPTION_HANDLERS, error_response, too_large
from deployments.openai_responses import (
    DONE,
    AnswerFormat,
    ChatFormat,
    CompletionFormat,
    error_body,
    sse_event,
)
from deployments.openai_types import BodyT, ChatCompletionBody, CompletionBody, parse_request
from deployments.openapi import openapi_document
from deployments.replica_count import ReplicaCount, count_replicas
from deployments.request_limits import RequestLimits
from deployments.responses_api import ResponsesApi
from deployments.responses_routes import add_response_routes
from deployments.session_key import session_key
from deployments.tenants import Authenticator, TenantConfig
from engine import __version__
from engine.errors import UnknownModelError
from engine.paths import data_folder
from engine.tenant import Tenant


class Engine(Protocol):
    """What the HTTP face needs of the engine replicas; EngineClient has it."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationItem, None]: ...

    async def describe(self) -> ModelCard: ...

    async def model_card(self) -> ModelCard: ...

    def choose_session_id(self, candidates: Sequence[str]) -> str: ...


@dataclass(frozen=True, slots=True)
class IngressConfig:
    """What one ingress replica goes by; see AppArgs and TenantConfig."""

    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 32 * 2**10
    tenants: tuple[TenantConfig, ...] = ()
    request_timeout_s: float | None = None
    store_url: str | None = None
    retention_days: float | None = None
    num_fallback_replicas: int = 1
    engine_wait_s: float = 60.0


class Ingress:
    """The ingress deployment; Serve asks it for the application once it is constructed."""

    def __init__(self, handle: DeploymentHandle, config: IngressConfig) -> None:
        why = partial(why_absent, handle.app_name, handle.deployment_name)
        self._engine = EngineClient(handle, config.num_fallback_replicas, why, config.engine_wait_s)
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
            # HAProxy does not say for whom it asks.
            sees_clients=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1",
        )


def create_app(
    engine: Engine,
    config: IngressConfig,
    *,
    ingress_id: str,
    num_ingress_replicas: Callable[[], int] = lambda: 1,
    sees_clients: bool = True,
) -> FastAPI:
    """The application. ingress_id goes out in a header, for experiments with routing. sees_clients: the address that a
    request comes from is its client's."""
    admission = Admission(
        engine,
        config.tenants,
        num_ingress_replicas=num_ingress_replicas,
        default_timeout_s=config.request_timeout_s,
    )

    async def check_model(name: str) -> None:
        _check_model(name, await engine.model_card())

    responses = ResponsesApi(
        admission,
        ConversationStore(config.store_url or _default_store_url()),
        owner=f"{ingress_id}-{uuid.uuid4().hex}",
        check_model=check_model,
        choose_session_id=engine.choose_session_id,
        retention_days=config.retention_days,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await responses.close()

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,  # the bodies are parsed by hand; FastAPI's own document would know nothing of them
        redirect_slashes=False,
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
    )
    app.add_middleware(
        RequestLimits,
        max_body_bytes=config.max_body_bytes,
        max_header_bytes=config.max_header_bytes,
        too_large=too_large(413, f"the body is larger than {config.max_body_bytes} bytes", "body_too_large"),
        headers_too_large=too_large(
            431, f"the headers are larger than {config.max_header_bytes} bytes", "headers_too_large"
        ),
    )
    authenticator = Authenticator(config.tenants, sees_clients=sees_clients)
    started = int(time.time())

    def tenant_of(request: Request) -> Tenant:
        client_host = request.client.host if request.client else None
        return authenticator.authenticate(request.headers.get("authorization"), client_host)

    async def answer(
        request: Request,
        kind: type[BodyT],
        make_format: Callable[[str, int, BodyT], AnswerFormat],
        id_prefix: str,
    ) -> Response:
        tenant = tenant_of(request)
        body, data = parse_request(kind, await request.body())
        sampling = body.sampling_params()
        _check_model(body.model, await engine.model_card())
        generation = GenerationRequest(
            request_id=id_prefix + uuid.uuid4().hex,
            session_id=session_key(request.headers.items(), data),
            prompt=body.prompt_value(),
            sampling=sampling,
            stream=body.stream,
            return_prompt_token_ids=body.return_token_ids,
            tenant=tenant,
        )
        answer_format = make_format(generation.request_id, int(time.time()), body)
        items = admission.generate(generation, body.timeout)
        first = await anext(items)  # decides on the status; nothing is sent before
        if isinstance(first, ErrorItem) or not body.stream:
            await _exhaust(items)
        if isinstance(first, ErrorItem):
            return error_response(first)
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

    add_response_routes(app, responses, tenant_of)

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

    @app.get("/ready")
    async def ready() -> Response:
        await engine.describe()
        await responses.check()
        return JSONResponse({"status": "ready"})

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
    folder = data_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'conversations.db'}"


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
        raise UnknownModelError(f"no model {name!r} here; there is {card.model_name!r}", param="model")


def _model(card: ModelCard, created: int) -> dict[str, Any]:
    return {
        "id": card.model_name,
        "object": "model",
        "created": created,
        "owned_by": "pensieve",
        "max_model_len": card.max_model_len,
    }
