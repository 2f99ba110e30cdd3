"""Loading and unloading adapters while the server runs, with the requests and answers of vLLM's.

For operators alone, if there are API keys; and only if the option adapter_folder says from where.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field

from deployments.errors import NotAnOperatorError
from deployments.http.gate import Gate
from deployments.http.parsing import MAX_NAME_CHARS, Body

MAX_PATH_CHARS = 4096

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter.

    lora_path: a folder as peft saves it, below adapter_folder, or its path from there on. model: that it belongs to, if
    several are served.
    """

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARS)]
    model: str = ""


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Name


class LoadsAdapters(Protocol):
    """What the routes need of the engines; Models has it."""

    def load_adapter(self, name: str, folder: str, model: str = "") -> Awaitable[None]: ...

    def unload_adapter(self, name: str) -> Awaitable[None]: ...


def add_adapter_routes(app: FastAPI, gate: Gate, engine: LoadsAdapters) -> None:
    """The two routes; they answer with a text when all replicas have done it."""

    def check_may(request: Request) -> None:
        if not gate.is_operator(gate.tenant_of(request)):
            raise NotAnOperatorError("this changes what all tenants are served, so it needs an operator's key")

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Response:
        check_may(request)
        _, body, _ = await gate.read(LoadAdapterBody, request)
        await engine.load_adapter(body.lora_name, body.lora_path, body.model)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Response:
        check_may(request)
        _, body, _ = await gate.read(UnloadAdapterBody, request)
        await engine.unload_adapter(body.lora_name)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")
