"""What a server says of itself: its models, whether it is alive and ready, its version."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from deployments.generation import ModelCard
from deployments.http.gate import Gate
from deployments.http.served_model import check_model
from engine import __version__

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def add_model_routes(
    app: FastAPI,
    gate: Gate,
    model_card: Callable[[str], Awaitable[ModelCard]],
    model_cards: Callable[[], Awaitable[list[ModelCard]]],
) -> None:
    """/v1/models. model_card: what serves a model. model_cards: of all of them."""
    started = int(time.time())

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        gate.tenant_of(request)
        return JSONResponse({"object": "list", "data": [_model(card, started) for card in await model_cards()]})

    @app.get("/v1/models/{model:path}")  # path: hub ids have a slash
    async def model(request: Request, model: str) -> Response:
        gate.tenant_of(request)
        card = await model_card(model)
        check_model(model, card)
        return JSONResponse(_model(card, started))


def add_status_routes(
    app: FastAPI, check_ready: Callable[[], Awaitable[None]], warnings: Callable[[], list[str]]
) -> None:
    """/health, /ping, /ready and /version, which need no key.

    check_ready: raises what keeps the server from working.
    warnings: what an operator should see to although it works.
    """

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ping")
    async def ping() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        await check_ready()
        found = warnings()
        return JSONResponse({"status": "ready", **({"warnings": found} if found else {})})

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})


def add_load_routes(
    app: FastAPI, gate: Gate, load: Callable[[], Awaitable[int]], metrics: Callable[[], Awaitable[str]]
) -> None:
    """/load, which needs no key, and /metrics.

    load: how many requests run or wait in all engine replicas.
    metrics: the application's series, in Prometheus's text format.
    """

    @app.get("/load")
    async def server_load() -> Response:
        return JSONResponse({"server_load": await load()})

    @app.get("/metrics")
    async def application_metrics(request: Request) -> Response:
        gate.tenant_of(request)
        return Response(await metrics(), media_type=PROMETHEUS_TEXT)


def _model(card: ModelCard, created: int) -> dict[str, Any]:
    return {
        "id": card.model_name,
        "object": "model",
        "created": created,
        "owned_by": "pensieve",
        "max_model_len": card.max_model_len,
        **({} if card.parent is None else {"parent": card.parent}),
    }
