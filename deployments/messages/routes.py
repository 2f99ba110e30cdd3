"""/v1/messages and /v1/messages/count_tokens: one body, one answer, nothing kept between them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest, ModelCard, drain
from deployments.http.admission import Admission, Generates
from deployments.http.answer_stream import EventFormat, Items, answer_events
from deployments.http.event_stream import EventStream, sse_event
from deployments.http.gate import Gate
from deployments.http.keep_alive import end, kept_alive
from deployments.http.served_model import check_prompt
from deployments.messages.answers import MessageFormat
from deployments.messages.errors import MessagesRoute, error_response
from deployments.messages.requests import CountTokensBody, MessagesBody
from deployments.routing.session_key import session_key

# A stream that says nothing for so long, in seconds, says that it is alive.
PING_PERIOD_S = 10.0
PING = sse_event({"type": "ping"}, "ping")


def add_message_routes(
    app: FastAPI,
    gate: Gate,
    admission: Admission,
    engine: Generates,
    ingress_id: str,
) -> None:
    """engine: asked without admission for what uses no tokens. ingress_id: sent in a header, for experiments with routing."""

    async def create_message(request: Request) -> Response:
        tenant, body, data = await gate.read(MessagesBody, request)
        generation = body.generation_request(
            body.prompt,
            request_id="msg_" + uuid.uuid4().hex,
            session_id=session_key(request.headers.items(), data),
            tenant=tenant,
        )
        return await gate.in_a_place(tenant, body, partial(answer, request.state.request_id, generation, body))

    async def answer(request_id: str, generation: GenerationRequest, body: MessagesBody, card: ModelCard) -> Response:
        """The status says what comes first: mostly errors come at once, and a response without a body is tried again.

        Only a stream that has nothing to say for a whole period (a long prompt is being computed) begins without knowing, as
        its client would give it up; it says pings then, and an error is an event.
        """
        check_prompt(generation.prompt, card, body.prompt_param)
        # Clients ask for more than any window has, and a tenant's account is charged with what is asked for until the end.
        num_most = min(max(1, body.max_tokens), card.max_model_len)
        generation = replace(generation, sampling=replace(generation.sampling, max_tokens=num_most))
        form = MessageFormat(generation.request_id, request_id, body)
        items = admission.generate(generation, body.timeout)
        coming = asyncio.ensure_future(anext(items))
        try:
            await asyncio.wait((coming,), timeout=PING_PERIOD_S if body.stream else None)
        except BaseException:
            await _leave(coming, items)
            raise
        headers = {"x-pensieve-ingress": ingress_id}
        if not coming.done():
            events = kept_alive(_late_events(coming, items, form), PING, PING_PERIOD_S)
            return EventStream(events, partial(_leave, coming, items), headers)
        first = coming.result()
        if isinstance(first, ErrorItem):
            await drain(items)
            return error_response(first, request_id)
        headers["x-pensieve-replica"] = str(first.replica_rank)
        if body.stream:
            events = kept_alive(answer_events(first, items, form), PING, PING_PERIOD_S)
            return EventStream(events, items.aclose, headers)
        await drain(items)
        return JSONResponse(form.whole(first.delta), headers=headers)

    async def count_message_tokens(request: Request) -> Response:
        tenant, body, data = await gate.read(CountTokensBody, request)
        generation = body.generation_request(
            body.prompt,
            request_id="count_" + uuid.uuid4().hex,
            session_id=session_key(request.headers.items(), data),
            tenant=tenant,
        )
        generation = replace(generation, stream=False, only_encodes=True)
        return await gate.in_a_place(tenant, body, partial(count, request.state.request_id, generation, body))

    async def count(request_id: str, generation: GenerationRequest, body: CountTokensBody, card: ModelCard) -> Response:
        check_prompt(generation.prompt, card, body.prompt_param)
        item: GenerationItem | None = admission.refusal(generation.tenant.tenant_id)
        if item is None:
            items = engine.generate(generation)
            item = await anext(items)
            await drain(items)
        if isinstance(item, ErrorItem):
            return error_response(item, request_id)
        return JSONResponse({"input_tokens": item.delta.num_prompt_tokens})

    for path, endpoint in (("/v1/messages", create_message), ("/v1/messages/count_tokens", count_message_tokens)):
        app.router.add_api_route(path, endpoint, methods=["POST"], route_class_override=MessagesRoute)


async def _late_events(coming: Awaitable[GenerationItem], rest: Items, form: EventFormat) -> AsyncGenerator[str, None]:
    """All events of a stream that has begun before its first item came."""
    yield PING
    first = await coming
    if isinstance(first, DeltaItem):
        async with aclosing(answer_events(first, rest, form)) as events:
            async for event in events:
                yield event
    else:
        yield await form.error(first)
        await drain(rest)


async def _leave(coming: asyncio.Future[GenerationItem], items: Items) -> None:
    await end(coming)
    await items.aclose()
