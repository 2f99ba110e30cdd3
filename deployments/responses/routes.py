"""The paths of /v1/responses and /v1/conversations: who asks, and what. The rest is ResponsesApi's and ConversationsApi's."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from deployments.generation import ModelCard
from deployments.http.gate import Gate
from deployments.responses.api import ResponsesApi
from deployments.responses.conversation_requests import (
    INCLUDE,
    ConversationBody,
    ConversationUpdateBody,
    ItemsBody,
    ListQuery,
    RetrieveQuery,
)
from deployments.responses.conversations import ConversationsApi
from deployments.responses.requests import ResponseBody


def add_response_routes(app: FastAPI, gate: Gate, api: ResponsesApi) -> None:
    """/v1/responses."""

    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        tenant, body, data = await gate.read(ResponseBody, request)

        async def respond(card: ModelCard) -> Response:
            return await api.create(tenant, request.headers, body, data, card)

        return await gate.in_a_place(tenant, body, respond)

    @app.post("/v1/responses/input_tokens")
    async def count_input_tokens(request: Request) -> Response:
        tenant, body, data = await gate.read(ResponseBody, request)

        async def respond(card: ModelCard) -> Response:
            return await api.count_input(tenant, request.headers, body, data, card)

        return await gate.in_a_place(tenant, body, respond)

    async def refuse_to_compact(request: Request) -> Response:
        gate.tenant_of(request)
        detail = "histories are not compacted here; send truncation: auto, or begin a new conversation with a summary"
        raise HTTPException(404, detail)

    # Else the path would be that of a response whose id is "compact".
    app.router.add_route("/v1/responses/compact", refuse_to_compact, methods=["POST"], include_in_schema=False)

    @app.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str) -> Response:
        tenant = gate.tenant_of(request)
        query = gate.read_query(RetrieveQuery, request, without=INCLUDE)
        return await api.retrieve(tenant, response_id, query)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
        return await api.delete(gate.tenant_of(request), response_id)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> dict[str, Any]:
        return await api.cancel(gate.tenant_of(request), response_id)

    @app.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(request: Request, response_id: str) -> dict[str, Any]:
        return await api.input_items(
            gate.tenant_of(request), response_id, gate.read_query(ListQuery, request, without=INCLUDE)
        )


def add_conversation_routes(app: FastAPI, gate: Gate, api: ConversationsApi) -> None:
    """/v1/conversations."""

    @app.post("/v1/conversations")
    async def create_conversation(request: Request) -> dict[str, Any]:
        tenant, body, _ = await gate.read(ConversationBody, request, default=b"{}")
        return await api.create(tenant, body)

    @app.get("/v1/conversations/{conversation_id}")
    async def get_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        return await api.get(gate.tenant_of(request), conversation_id)

    @app.post("/v1/conversations/{conversation_id}")
    async def update_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        tenant, body, _ = await gate.read(ConversationUpdateBody, request)
        return await api.update(tenant, conversation_id, body)

    @app.delete("/v1/conversations/{conversation_id}")
    async def delete_conversation(request: Request, conversation_id: str) -> dict[str, Any]:
        return await api.delete(gate.tenant_of(request), conversation_id)

    @app.get("/v1/conversations/{conversation_id}/items")
    async def list_items(request: Request, conversation_id: str) -> dict[str, Any]:
        return await api.list_items(
            gate.tenant_of(request), conversation_id, gate.read_query(ListQuery, request, without=INCLUDE)
        )

    @app.post("/v1/conversations/{conversation_id}/items")
    async def add_items(request: Request, conversation_id: str) -> dict[str, Any]:
        tenant, body, _ = await gate.read(ItemsBody, request)
        return await api.add_items(tenant, conversation_id, body)

    @app.get("/v1/conversations/{conversation_id}/items/{item_id}")
    async def get_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
        return await api.get_item(gate.tenant_of(request), conversation_id, item_id)

    @app.delete("/v1/conversations/{conversation_id}/items/{item_id}")
    async def delete_item(request: Request, conversation_id: str, item_id: str) -> dict[str, Any]:
        return await api.delete_item(gate.tenant_of(request), conversation_id, item_id)
