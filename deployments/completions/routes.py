"""/v1/chat/completions and /v1/completions: one body, one answer, nothing kept between them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from deployments.completions.answers import AnswerFormat, ChatFormat, CompletionFormat
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.generation import ErrorItem, GenerationRequest, ModelCard, drain
from deployments.http.admission import Admission
from deployments.http.answer_stream import answer_events
from deployments.http.errors import error_response
from deployments.http.event_stream import EventStream
from deployments.http.gate import Gate
from deployments.http.served_model import check_prompt
from deployments.routing.session_key import session_key

PromptBodyT = TypeVar("PromptBodyT", ChatCompletionBody, CompletionBody)


def add_completion_routes(app: FastAPI, gate: Gate, admission: Admission, ingress_id: str) -> None:
    """ingress_id: sent in a header, for experiments with routing."""

    async def answer(
        request: Request,
        kind: type[PromptBodyT],
        make_format: Callable[[str, int, PromptBodyT], AnswerFormat],
        id_prefix: str,
    ) -> Response:
        tenant, body, data = await gate.read(kind, request)
        generation = body.generation_request(
            body.prompt_value(),
            request_id=id_prefix + uuid.uuid4().hex,
            session_id=session_key(request.headers.items(), data),
            tenant=tenant,
        )
        return await gate.in_a_place(tenant, body, partial(respond, generation, body, make_format))

    async def respond(
        generation: GenerationRequest,
        body: PromptBodyT,
        make_format: Callable[[str, int, PromptBodyT], AnswerFormat],
        card: ModelCard,
    ) -> Response:
        check_prompt(generation.prompt, card, body.prompt_param)
        form = make_format(generation.request_id, int(time.time()), body)
        items = admission.generate(generation, body.timeout)
        first = await anext(items)  # decides on the status; nothing is sent before
        if isinstance(first, ErrorItem):
            await drain(items)
            return error_response(body.in_own_words(first))
        headers = {"x-pensieve-replica": str(first.replica_rank), "x-pensieve-ingress": ingress_id}
        if body.stream:
            return EventStream(answer_events(first, items, form), items.aclose, headers)
        await drain(items)
        return JSONResponse(form.whole(first.delta), headers=headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatCompletionBody, ChatFormat, "chatcmpl-")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody, CompletionFormat, "cmpl-")
