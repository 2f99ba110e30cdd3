"""The paths of /v1/responses and /v1/conversations. Who asks, and what; the rest is ResponsesApi's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from deployments.http.bodies import RequestBodies
from deployments.http.generation_body import GenerationBody
from deployments.http.parsing import parse_query
from deployments.responses.api import ResponsesApi
from deployments.responses.requests import (
    ConversationBody,
    ConversationUpdateBody,
    ItemsBody,
    ListQuery,
    ResponseBody,
    RetrieveQuery,
)
from engine.tenant import Tenant


def add_response_routes(
    app: FastAPI,
    api: ResponsesApi,
    bodies: RequestBodies,
    tenant_of: Callable[[Request], Tenant],
    in_a_place: Callable[[Tenant, GenerationBody, Callable[[], Awaitable[Response]]], Awaitable[Response]],
) -> None:
    """tenant_of: raises if the request may not ask. in_a_place: calls what needs an engine, or raises if it may not."""

    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        tenant = tenant_of(request)
        body, data = await bodies.parse(ResponseBody, request, tenant)
        return await in_a_place(tenant, body, partial(api.create, tenant, request.headers, body, data))

    @app.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str) -> dict[str, Any]:
        tenant = tenant_of(request)
        parse_query(RetrieveQuery, request.query_params.multi_items())
        return await api.get(tenant, response_id)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
        return await api.delete(tenant_of(request), response_id)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> dict[str, Any]:
        return await api.cancel(tenant_of(request), response_id)

    @app.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(request: Request, response_id: str) -> dict[str, Any]:
        return await api.input_items(tenant_of(request), response_id, _list_query(request))

    @app.post("/v1/conversations")
    async def create_conversation(request: Request) -> dict[str, Any]:
        tenant = tenant_of(request)
        body, _ = await bodies.parse(ConversationBody, request, tenant, default=b"{}")
        return await api.create_conversation(tenant, body)

    @app.get("/v1/conversations/{conversation_id}")
    async def get_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        return await api.get_conversation(tenant_of(request), conversation_id)

    @app.post("/v1/conversations/{conversation_id}")
    async def update_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        tenant = tenant_of(request)
        body, _ = await bodies.parse(ConversationUpdateBody, request, tenant)
        return await api.update_conversation(tenant, conversation_id, body)

    @app.delete("/v1/conversations/{conversation_id}")
    async def delete_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        return await api.delete_conversation(tenant_of(request), conversation_id)

    @app.get("/v1/conversations/{conversation_id}/items")
    async def list_items(request: Request, conversation_id: str) -> dict[str, Any]:
        return await api.list_items(tenant_of(request), conversation_id, _list_query(request))

    @app.post("/v1/conversations/{conversation_id}/items")
    async def add_items(request: Request, conversation_id: str) -> dict[str, Any]:
        tenant = tenant_of(request)
        body, _ = await bodies.parse(ItemsBody, request, tenant)
        return await api.add_items(tenant, conversation_id, body)

    @app.get("/v1/conversations/{conversation_id}/items/{item_id}")
    async def get_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
        return await api.get_item(tenant_of(request), conversation_id, item_id)

    @app.delete("/v1/conversations/{conversation_id}/items/{item_id}")
    async def delete_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
        return await api.delete_item(tenant_of(request), conversation_id, item_id)


def _list_query(request: Request) -> ListQuery:
    return parse_query(ListQuery, [pair for pair in request.query_params.multi_items() if pair[0] != "include"])
