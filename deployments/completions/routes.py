"""/v1/chat/completions and /v1/completions: one body, one answer with its choices, nothing kept between them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from deployments.completions.answers import AnswerFormat, ChatFormat, CompletionFormat
from deployments.completions.choices import ChoiceItem, generate_choices
from deployments.completions.requests import ChatCompletionBody, CompletionBody
from deployments.generation import DeltaItem, ErrorItem, GenerationRequest, ModelCard
from deployments.http.admission import Admission
from deployments.http.errors import error_response
from deployments.http.event_stream import EventStream
from deployments.http.gate import Gate, num_running_choices
from deployments.http.served_model import check_prompt
from deployments.routing.session_key import session_key
from engine.tenant import Tenant
from engine.text.output import OutputDelta, merge_deltas

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
        answer_id = id_prefix + uuid.uuid4().hex

        def session_of(number: int) -> str:
            """Each prompt of several has a session of its own, unless the client names one."""
            name = body.prompt_param
            of_prompt = data if body.num_prompts == 1 else {**data, name: data[name][number]}
            return session_key(request.headers.items(), of_prompt)

        prompt, *others = body.prompts
        first = body.generation_request(prompt, request_id=answer_id, session_id=session_of(0), tenant=tenant)
        generations = [first]
        for number, other in enumerate(others, start=1):
            request_id = f"{answer_id}.{number * body.n}"
            generations.append(replace(first, prompt=other, request_id=request_id, session_id=session_of(number)))
        form = make_format(answer_id, int(time.time()), body)
        return await gate.in_a_place(tenant, body, partial(respond, tenant, generations, body, form))

    async def respond(
        tenant: Tenant, generations: list[GenerationRequest], body: PromptBodyT, form: AnswerFormat, card: ModelCard
    ) -> Response:
        for generation in generations:
            check_prompt(generation.prompt, card, body.prompt_param)
        refusal = admission.refusal(tenant.tenant_id)
        if refusal is not None:
            return error_response(refusal)
        items = generate_choices(
            generations,
            body.n,
            partial(admission.generate, timeout_s=body.timeout, admitted_s=asyncio.get_running_loop().time()),
            max_running=num_running_choices(body, card),
            num_places=partial(admission.num_places, tenant.tenant_id),
        )
        first = await anext(items)  # decides on the status; nothing is sent before
        if isinstance(first.item, ErrorItem):
            await items.aclose()
            return error_response(body.in_own_words(first.item))
        headers = {"x-pensieve-replica": str(first.item.replica_rank), "x-pensieve-ingress": ingress_id}
        if body.stream:
            return EventStream(_events(first, items, form), items.aclose, headers)
        deltas: list[list[OutputDelta]] = [[] for _ in range(body.num_choices)]
        deltas[first.choice].append(first.item.delta)
        async with aclosing(items):
            async for index, item in items:
                if isinstance(item, ErrorItem):
                    return error_response(body.in_own_words(item))
                deltas[index].append(item.delta)
        return JSONResponse(form.whole(*map(merge_deltas, deltas)), headers=headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatCompletionBody, ChatFormat, "chatcmpl-")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody, CompletionFormat, "cmpl-")


async def _events(
    first: ChoiceItem, rest: AsyncGenerator[ChoiceItem, None], form: AnswerFormat
) -> AsyncGenerator[str, None]:
    """All events of a stream that begins with `first`. Closing this closes `rest`."""
    async with aclosing(rest):
        choice: ChoiceItem | None = first
        while choice is not None:
            index, item = choice
            if isinstance(item, DeltaItem):
                if events := form.events(item.delta, index):
                    yield events
            else:
                yield form.error(item)
            choice = await anext(rest, None)
