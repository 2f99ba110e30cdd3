"""/v1/responses: turns whose history the server keeps.

Puts together what the store, the formats and the engine each know; a turn's own life is in turn.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response

from deployments.generation import ErrorItem, ModelCard, drain
from deployments.http.admission import Admission
from deployments.http.answer_stream import answer_events
from deployments.http.errors import error_response
from deployments.http.event_stream import EventStream
from deployments.responses.answers import (
    ResponseJson,
    ResponseObject,
    ResponseStream,
    deleted_response,
    retold_events,
    sse_named_event,
)
from deployments.responses.conversation_requests import ListQuery, RetrieveQuery
from deployments.responses.items import ItemJson
from deployments.responses.requests import ResponseBody
from deployments.responses.store_upkeep import StoreUpkeep
from deployments.responses.stored import list_of, response_of
from deployments.responses.turn import MAX_BYTES_PER_TOKEN, Turn
from deployments.responses.turn_events import TurnEvents
from deployments.routing.session_key import session_key, session_name
from engine.errors import ContextLengthError, InvalidParameterError
from engine.tenant import Tenant

# Of these many ids, a new session gets the one whose home has the least to do.
NUM_ID_CHOICES = 2
ChooseId = Callable[[Sequence[str]], str]


class ResponsesApi:
    """One per ingress process."""

    def __init__(
        self,
        admission: Admission,
        upkeep: StoreUpkeep,
        choose_session_id: Callable[[Sequence[str], str], str],
    ) -> None:
        """choose_session_id: which of some ids a new session of a model is to have."""
        self._admission = admission
        self._upkeep = upkeep
        self._choose_session_id = choose_session_id

    async def create(
        self,
        tenant: Tenant,
        headers: Mapping[str, str],
        body: ResponseBody,
        data: Mapping[str, Any],
        card: ModelCard,
    ) -> Response:
        """Answers one body, whole or as a stream.

        data: what the body was made of.
        card: what is served under the body's model name.
        """
        body.sampling_params()  # raises if a value is out of range
        if (refusal := self._admission.refusal(tenant.tenant_id)) is not None:  # before anything is stored
            return error_response(refusal)
        session = await self._session(tenant, headers, body, data)
        stored = await self._referenced(tenant, body.referenced_ids, card.max_model_len)
        turn = self._turn(tenant, body, session, stored)
        await turn.begin(card.max_model_len)
        first = await turn.start(self._admission)
        if isinstance(first, ErrorItem):
            await turn.forget(first)
            return error_response(body.in_own_words(first))
        out_headers = {"x-pensieve-replica": str(first.replica_rank)}
        if body.stream:
            return EventStream(answer_events(first, turn, TurnEvents(turn)), turn.close, out_headers)
        try:
            await drain(turn)
            whole = ResponseStream(turn.form)
            whole.read(first.delta)
            answer = await turn.complete(whole.whole(), first.delta.transcript)
        finally:
            turn.end()
        return JSONResponse(answer, headers=out_headers)

    async def count_input(
        self,
        tenant: Tenant,
        headers: Mapping[str, str],
        body: ResponseBody,
        data: Mapping[str, Any],
        card: ModelCard,
    ) -> Response:
        """How many tokens the same body would be read as; as create. Nothing is computed, nor stored."""
        session = await self._session(tenant, headers, body, data)
        stored = await self._referenced(tenant, body.referenced_ids, card.max_model_len)
        turn = self._turn(tenant, body.model_copy(update={"store": False, "stream": False}), session, stored)
        await turn.begin(card.max_model_len)
        first = await turn.start(self._admission, only_encodes=True)
        await drain(turn)
        if isinstance(first, ErrorItem):
            return error_response(body.in_own_words(first))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": first.delta.num_prompt_tokens})

    async def _session(
        self, tenant: Tenant, headers: Mapping[str, str], body: ResponseBody, data: Mapping[str, Any]
    ) -> str | None:
        """What the turn is routed by if it continues nothing; None = the id of its response.

        A client that sends the history itself gets to the replica that computed it, and to the tokens that were generated: by
        the id of what was answered last, if it comes from the store; else by its beginning, as in chat.
        """
        if not body.store:
            return session_key(headers.items(), data)
        if (name := session_name(headers.items(), data)) is not None or not body.tells_history:
            return name
        if body.last_answer_id is not None:
            store = await self._upkeep.opened()
            session = await store.find_session(tenant.tenant_id, body.last_answer_id)
            if session is not None:
                return session
        return session_key(headers.items(), data)

    async def _referenced(self, tenant: Tenant, ids: Sequence[str], max_model_len: int) -> Mapping[str, ItemJson]:
        """The items of the store that the input refers to, by id. Raises NotFoundError, ContextLengthError."""
        if not ids:
            return {}
        store = await self._upkeep.opened()
        found = await store.find_items(tenant.tenant_id, ids, max_model_len * MAX_BYTES_PER_TOKEN)
        if found is None:
            raise ContextLengthError(
                f"the context window is {max_model_len} tokens, and the items that the input refers to are longer",
                "input",
            )
        return {item.id: dict(item.body) for item in found}

    def _turn(self, tenant: Tenant, body: ResponseBody, session: str | None, stored: Mapping[str, ItemJson]) -> Turn:
        new_id = self._upkeep.store.new_id
        # The id of a chain's first response may be what all of it is routed by.
        response_id = (
            new_id("resp")
            if body.is_continued
            else choose_id("resp", new_id, lambda ids: self._choose_session_id(ids, body.model))
        )
        form = ResponseObject(response_id, int(self._upkeep.clock()), body, new_id)
        return Turn(tenant, body, form, body.input_items(new_id, stored), session or response_id, self._upkeep)

    async def get(self, tenant: Tenant, response_id: str) -> ResponseJson:
        """A stored response. Raises NotFoundError."""
        store = await self._upkeep.opened()
        return response_of(await store.get_response(tenant.tenant_id, response_id, self._upkeep.clock()))

    async def retrieve(self, tenant: Tenant, response_id: str, query: RetrieveQuery) -> Response:
        """A stored response, whole or told again as events. Raises NotFoundError, InvalidParameterError."""
        response = await self.get(tenant, response_id)
        if not query.stream:
            return JSONResponse(response)
        if response["status"] == "in_progress":
            raise InvalidParameterError(
                f"stream: the response {response_id!r} is still in progress, and only the client that asked for it is told "
                "as it comes; retrieve it without stream, or later",
                "stream",
            )
        events = "".join(map(sse_named_event, retold_events(response, query.starting_after)))
        return Response(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def cancel(self, tenant: Tenant, response_id: str) -> ResponseJson:
        """The response as it is then; one that is complete stays so. Raises NotFoundError."""
        store = await self._upkeep.opened()
        if await store.cancel_response(tenant.tenant_id, response_id, self._upkeep.clock()):
            self._upkeep.stop(response_id)  # another process hears of it when it renews its leases
        return await self.get(tenant, response_id)

    async def delete(self, tenant: Tenant, response_id: str) -> dict[str, Any]:
        """Deletes a response, and stops it if it runs. Raises NotFoundError."""
        store = await self._upkeep.opened()
        await store.delete_response(tenant.tenant_id, response_id, self._upkeep.clock())
        self._upkeep.stop(response_id)
        return deleted_response(response_id)

    async def input_items(self, tenant: Tenant, response_id: str, query: ListQuery) -> dict[str, Any]:
        """Part of what was asked. Raises NotFoundError."""
        store = await self._upkeep.opened()
        return list_of(
            await store.list_input_items(tenant.tenant_id, response_id, query.after, query.limit, query.order)
        )


def choose_id(prefix: str, new_id: Callable[[str], str], choose_session_id: ChooseId) -> str:
    """An id for what begins a session: of a few, one whose home has the least to do."""
    return choose_session_id([new_id(prefix) for _ in range(NUM_ID_CHOICES)])
