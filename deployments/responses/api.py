"""/v1/responses and /v1/conversations: turns whose history the server keeps. Puts together what the store, the formats and
the engine each know; keeps nothing itself but which turns run in this process.

    body -> begin_response -> history -> engine -> complete_response -> answer
                 (lease, renewed while it runs)      (one transaction, before the client hears the end)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi.responses import JSONResponse, Response

from deployments.errors import InternalError, ResponseCancelledError
from deployments.generation import DeltaItem, ErrorItem, GenerationItem, GenerationRequest, ModelCard
from deployments.http.admission import Admission
from deployments.http.errors import error_response
from deployments.http.event_stream import EventStream
from deployments.responses.answers import (
    Response as ResponseJson,
)
from deployments.responses.answers import (
    ResponseObject,
    ResponseStream,
    cancelled,
    conversation_object,
    deleted_conversation,
    deleted_response,
    failed,
    final_status,
    interrupted,
    list_object,
    sse_named_event,
)
from deployments.responses.requests import (
    ConversationBody,
    ConversationUpdateBody,
    Item,
    ItemsBody,
    ListQuery,
    ResponseBody,
    messages_of,
)
from deployments.routing.session_key import session_key
from deployments.store.conversation_store import ConversationStore
from deployments.store.errors import NotFoundError, StoreError, StoreUnavailableError
from deployments.store.values import (
    INTERRUPTED,
    NewItem,
    NewResponse,
    Outcome,
    Page,
    Status,
    StoredConversation,
    StoredResponse,
)
from engine.errors import ContextLengthError, PensieveError
from engine.tenant import Tenant
from engine.text.output import OutputDelta
from engine.text.prompt import ChatPrompt
from engine.text.transcript import Transcript

logger = logging.getLogger("ray.serve")

# A turn whose process is gone counts as interrupted after this; renewed several times in between. Seconds.
LEASE_S = 10.0
RENEWAL_S = 3.0
# A complete answer is worth some patience with a store that does not answer. Pauses in seconds.
STORE_RETRIES_S = (0.2, 1.0, 3.0)
# How often what is older than the retention is deleted, in seconds, and how long after the start for the first time: an
# operator who did not mean it that way has read of it by then.
SWEEP_S = 3600.0
FIRST_SWEEP_S = 600.0
# How often the room on the store's disk is looked at, in seconds, and from what part of what is kept free on it is said.
ROOM_S = 60.0
ROOM_WARNING = 4
DAY_S = 86400.0
NUM_ID_CHOICES = 2
# How much of a history is read for each token of the model's window, as JSON: more cannot fit. The longest tokens of any
# vocabulary have about 128 characters, some of which take several bytes as JSON. With truncation="auto" something is left out
# anyway, and it may be what lies further back than any usual text of that many tokens, short messages included.
MAX_BYTES_PER_TOKEN = 1024
USUAL_BYTES_PER_TOKEN = 64


@dataclass(slots=True)
class _Turn:
    """One turn under way. `is_stored`: the store has it, so its end has to be told there."""

    tenant: Tenant
    body: ResponseBody
    form: ResponseObject
    is_stored: bool
    session_key: str
    history: Sequence[Item] = ()
    new_items: Sequence[Item] = ()
    transcript: Transcript | None = None
    texts: list[str] = field(default_factory=list)
    pump: asyncio.Task[None] | None = None

    @property
    def response_id(self) -> str:
        return self.form.response_id

    def stop(self) -> None:
        if self.pump is not None:
            self.pump.cancel()


class ResponsesApi:
    """One per ingress process; `owner` is an id of its boot."""

    def __init__(
        self,
        admission: Admission,
        store: ConversationStore,
        *,
        owner: str,
        check_model: Callable[[str], Coroutine[Any, Any, ModelCard]],
        choose_session_id: Callable[[Sequence[str]], str],
        retention_days: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """check_model: what is served under that name, or raises UnknownModelError. choose_session_id: which of some ids a
        new session is to have."""
        self._admission = admission
        self._store = store
        self._owner = owner
        self._check_model = check_model
        self._choose_session_id = choose_session_id
        self._retention_days = retention_days
        self._clock = clock
        self._opening: asyncio.Task[None] | None = None  # under way or done
        self._running: dict[str, _Turn] = {}
        store.alive = self._running.keys()
        self._room_warning = ""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def check(self) -> None:
        """Returns if the store can be written. Raises StoreError."""
        await (await self._opened()).ping()

    @property
    def warnings(self) -> list[str]:
        """What the store's operator should see to, as of the latest look."""
        return [self._room_warning] if self._room_warning else []

    async def close(self) -> None:
        """Turns that still run are marked as interrupted."""
        for turn in list(self._running.values()):
            turn.stop()
        for task in list(self._tasks):
            task.cancel()
        if self._opening is not None:
            self._opening.cancel()  # nothing where it is done
        if self._is_open:
            try:
                await self._store.mark_interrupted(self._clock(), self._owner)
            except StoreError as error:
                logger.warning("turns of this process are not marked as interrupted yet: %s", error.message)
            await self._store.close()

    # -- responses -----------------------------------------------------------------------------------------------------

    async def create(
        self, tenant: Tenant, headers: Mapping[str, str], body: ResponseBody, data: Mapping[str, Any]
    ) -> Response:
        """data: what the body was made of."""
        body.sampling_params()  # raises where a value is out of range
        card = await self._check_model(body.model)
        if (refusal := self._admission.refusal(tenant.tenant_id)) is not None:  # before anything is stored
            return error_response(refusal)
        turn = await self._begin(tenant, body, session_key(headers.items(), data), card.max_model_len)
        try:
            first, items = await self._start(turn)
        except BaseException as error:
            self._later(self._without_answer(turn, error))
            raise
        if isinstance(first, ErrorItem):
            await self._without_answer(turn, first)
            return error_response(body.in_own_words(first))
        out_headers = {"x-pensieve-replica": str(first.replica_rank)}
        if body.stream:

            async def end() -> None:
                await items.aclose()
                self._end(turn, ended=False)

            return EventStream(self._events(turn, first, items), end, out_headers)
        ended = False
        try:
            async with aclosing(items):
                async for _ in items:  # to its end: closing it before would cancel a call that is about to be over
                    pass
            answer = await self._complete(turn, first.delta)
            ended = True
        finally:
            self._end(turn, ended)
        return JSONResponse(answer, headers=out_headers)

    async def get(self, tenant: Tenant, response_id: str) -> ResponseJson:
        store = await self._opened()
        return response_of(await store.get_response(tenant.tenant_id, response_id, self._clock()))

    async def cancel(self, tenant: Tenant, response_id: str) -> ResponseJson:
        """A response that is complete stays what it is."""
        store = await self._opened()
        if await store.cancel_response(tenant.tenant_id, response_id, self._clock()) and response_id in self._running:
            self._running[response_id].stop()  # another process hears of it when it renews its leases
        return await self.get(tenant, response_id)

    async def delete(self, tenant: Tenant, response_id: str) -> dict[str, Any]:
        store = await self._opened()
        await store.delete_response(tenant.tenant_id, response_id, self._clock())
        if response_id in self._running:
            self._running[response_id].stop()
        return deleted_response(response_id)

    async def input_items(self, tenant: Tenant, response_id: str, query: ListQuery) -> dict[str, Any]:
        store = await self._opened()
        return _list(await store.list_input_items(tenant.tenant_id, response_id, query.after, query.limit, query.order))

    # -- conversations -------------------------------------------------------------------------------------------------

    async def create_conversation(self, tenant: Tenant, body: ConversationBody) -> dict[str, Any]:
        items = _new_items(body.new_items(self._new_item_id))
        self._admission.admit_storing(tenant.tenant_id, _num_bytes(items, body.metadata))
        store = await self._opened()
        conversation_id = self._choose_id("conv")
        now = self._clock()
        return _conversation(
            await store.conversations.create(tenant.tenant_id, body.metadata, items, now, conversation_id)
        )

    async def get_conversation(self, tenant: Tenant, conversation_id: str) -> dict[str, Any]:
        store = await self._opened()
        return _conversation(await store.conversations.get(tenant.tenant_id, conversation_id))

    async def update_conversation(
        self, tenant: Tenant, conversation_id: str, body: ConversationUpdateBody
    ) -> dict[str, Any]:
        self._admission.admit_storing(tenant.tenant_id, _num_bytes([], body.metadata))
        store = await self._opened()
        now = self._clock()
        return _conversation(await store.conversations.update(tenant.tenant_id, conversation_id, body.metadata, now))

    async def delete_conversation(self, tenant: Tenant, conversation_id: str) -> dict[str, Any]:
        store = await self._opened()
        await store.conversations.delete(tenant.tenant_id, conversation_id)
        return deleted_conversation(conversation_id)

    async def list_items(self, tenant: Tenant, conversation_id: str, query: ListQuery) -> dict[str, Any]:
        store = await self._opened()
        return _list(
            await store.conversations.list_items(
                tenant.tenant_id, conversation_id, query.after, query.limit, query.order
            )
        )

    async def add_items(self, tenant: Tenant, conversation_id: str, body: ItemsBody) -> dict[str, Any]:
        new_items = _new_items(body.new_items(self._new_item_id))
        self._admission.admit_storing(tenant.tenant_id, _num_bytes(new_items))
        store = await self._opened()
        added = await store.conversations.add_items(tenant.tenant_id, conversation_id, new_items, self._clock())
        return _list(Page(added, has_more=False))

    async def get_item(self, tenant: Tenant, conversation_id: str, item_id: str) -> dict[str, Any]:
        store = await self._opened()
        return dict((await store.conversations.get_item(tenant.tenant_id, conversation_id, item_id)).body)

    async def delete_item(self, tenant: Tenant, conversation_id: str, item_id: str) -> dict[str, Any]:
        store = await self._opened()
        now = self._clock()
        return _conversation(await store.conversations.delete_item(tenant.tenant_id, conversation_id, item_id, now))

    def _choose_id(self, prefix: str) -> str:
        """An id for what begins a session: one whose home has the least to do."""
        return self._choose_session_id([self._store.new_id(prefix) for _ in range(NUM_ID_CHOICES)])

    # -- a turn --------------------------------------------------------------------------------------------------------

    async def _begin(self, tenant: Tenant, body: ResponseBody, session: str, max_model_len: int) -> _Turn:
        """Records the turn as running where it is to be stored, and finds what came before. session: what the request is
        routed by where nothing is stored. Raises ContextLengthError where more came before than the window can hold."""
        is_continued = body.previous_response_id is not None or body.conversation_id is not None
        # The id of a chain's first response is what all of it is routed by.
        response_id = self._store.new_id("resp") if is_continued else self._choose_id("resp")
        now = self._clock()
        form = ResponseObject(response_id, int(now), body, self._new_item_id())
        new_items = body.input_items(self._new_item_id)
        turn = _Turn(tenant, body, form, body.store, session, new_items=new_items)
        if not body.store and not is_continued:
            return turn
        store = await self._opened()
        if body.store:
            new = NewResponse(
                id=response_id,
                model=body.model,
                input=_new_items(new_items),
                owner=self._owner,
                lease_until=now + LEASE_S,
                previous_response_id=body.previous_response_id,
                conversation_id=body.conversation_id,
                instructions=body.instructions,
                params=form.in_progress() | {"instructions": None},  # which have a place of their own
            )
            begun = asyncio.create_task(store.begin_response(tenant.tenant_id, new, now))
            try:
                turn.session_key = (await asyncio.shield(begun)).session_key
            except asyncio.CancelledError:
                self._later(self._give_up_begun(turn, begun))
                raise
            self._running[response_id] = turn
        if is_continued:
            is_cut = body.truncation == "auto"
            try:
                history = await store.get_history(
                    tenant.tenant_id,
                    previous_response_id=body.previous_response_id,
                    conversation_id=body.conversation_id,
                    max_bytes=max_model_len * (USUAL_BYTES_PER_TOKEN if is_cut else MAX_BYTES_PER_TOKEN),
                )
                if not (history.is_whole or is_cut):
                    raise ContextLengthError(
                        f"the context window is {max_model_len} tokens, and what came before is longer than that; send "
                        "truncation: auto, or begin a new conversation"
                    )
            except BaseException as error:
                self._later(self._without_answer(turn, error))
                raise
            said = [dict(item.body) for item in history.items]
            while said and not history.is_whole and said[0]["role"] == "assistant":  # an answer without its question
                del said[0]
            turn.history = said
            turn.transcript = history.transcript
            turn.session_key = history.session_key
        return turn

    async def _start(self, turn: _Turn) -> tuple[GenerationItem, AsyncGenerator[GenerationItem, None]]:
        """The first item, which decides on the status, and the rest."""
        body = turn.body
        messages = messages_of([*turn.history, *turn.new_items], body.instructions)
        request = GenerationRequest(
            request_id=turn.response_id,
            session_id=turn.session_key,
            prompt=ChatPrompt(messages, drops_oldest=body.truncation == "auto"),
            sampling=body.sampling_params(),
            stream=body.stream,
            tenant=turn.tenant,
            history=turn.transcript,
            returns_transcript=turn.is_stored,
        )
        items = self._pumped(turn, self._admission.generate(request, body.timeout))
        try:
            return await anext(items), items
        except BaseException:
            turn.stop()
            raise

    async def _pumped(
        self, turn: _Turn, items: AsyncGenerator[GenerationItem, None]
    ) -> AsyncGenerator[GenerationItem, None]:
        """The same items, read by a task of its own: whoever cancels the turn stops that, and not the client's request."""
        queue: asyncio.Queue[GenerationItem | None] = asyncio.Queue()

        async def pump() -> None:
            async with aclosing(items):
                async for item in items:
                    queue.put_nowait(item)

        turn.pump = asyncio.create_task(pump())
        # Not from within: a task that is cancelled before its first step runs nothing.
        turn.pump.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (item := await queue.get()) is not None:
                yield item
            if turn.pump.cancelled():
                yield CANCELLED
            elif (error := turn.pump.exception()) is not None:
                raise error
        finally:
            turn.stop()

    async def _events(
        self, turn: _Turn, first: DeltaItem, items: AsyncGenerator[GenerationItem, None]
    ) -> AsyncGenerator[str, None]:
        """Server-sent events. The last one says completed only after the store has the answer."""
        stream = ResponseStream(turn.form)
        ended = False
        try:
            async with aclosing(items):
                item: GenerationItem = first
                while isinstance(item, DeltaItem):
                    delta = item.delta
                    turn.texts.append(delta.text)
                    if delta.finish_reason is not None:
                        whole = replace(delta, text="".join(turn.texts))
                        try:
                            answer = await self._complete(turn, whole)
                        except StoreError as error:
                            yield sse_named_event(stream.failed_event(ErrorItem.of(error)))
                            return
                        if answer["status"] == "cancelled":
                            yield sse_named_event(stream.error_event(CANCELLED))
                            return
                        ended = True
                        if answer["status"] != final_status(delta) or answer["error"] is not None:
                            yield sse_named_event(stream.closing_event(answer))
                            return
                    yield "".join(map(sse_named_event, stream.events(delta)))
                    if ended:
                        async for _ in items:
                            pass
                        return
                    item = await anext(items)
                if item is CANCELLED:
                    yield sse_named_event(stream.error_event(item))
                    return
                await self._give_up(turn, item)
                ended = True
                yield sse_named_event(stream.failed_event(item))
        finally:
            self._end(turn, ended)

    async def _complete(self, turn: _Turn, delta: OutputDelta) -> ResponseJson:
        """The whole answer, stored; where it was cancelled, deleted or interrupted meanwhile, what the store has instead.
        Raises StoreUnavailableError after some patience, StoreCorruptedError."""
        answer = turn.form.whole(delta)
        if not turn.is_stored:
            return answer
        details = answer["incomplete_details"]
        outcome = Outcome(
            output=_new_items(answer["output"]),
            usage=answer["usage"],
            transcript=delta.transcript,
            completed_at=self._clock(),
            incomplete_reason=None if details is None else details["reason"],
        )
        for pause_s in (*STORE_RETRIES_S, None):
            try:
                is_stored = await self._store.complete_response(turn.tenant.tenant_id, turn.response_id, outcome)
                break
            except StoreUnavailableError:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
        if is_stored:
            return answer
        try:
            return response_of(await self._store.get_response(turn.tenant.tenant_id, turn.response_id, self._clock()))
        except NotFoundError:  # deleted
            return cancelled(turn.form.in_progress())

    async def _give_up(self, turn: _Turn, why: ErrorItem | BaseException | None) -> None:
        """The turn has no answer: it failed, or nobody waits for it any more (None)."""
        turn.stop()
        self._running.pop(turn.response_id, None)
        if not turn.is_stored:
            return
        now = self._clock()
        try:
            if why is None:
                await self._store.interrupt_response(turn.tenant.tenant_id, turn.response_id, now)
                return
            if isinstance(why, PensieveError):
                item = ErrorItem.of(why)
            else:
                item = why if isinstance(why, ErrorItem) else ErrorItem.of(InternalError("internal error"))
            error = failed(turn.form.in_progress(), item)["error"]
            await self._store.fail_response(turn.tenant.tenant_id, turn.response_id, error, now)
        except PensieveError as error:
            logger.warning("response %s stays in progress until its lease is over: %s", turn.response_id, error.message)

    async def _without_answer(self, turn: _Turn, why: ErrorItem | BaseException) -> None:
        """The turn ends before its answer began. Its client hears of an error and of no id, and could not delete what is
        stored of it; so it is forgotten, unless somebody cancelled it, who knows the id, or hung up."""
        if why is CANCELLED or isinstance(why, asyncio.CancelledError):
            await self._give_up(turn, None)
            return
        turn.stop()
        self._running.pop(turn.response_id, None)
        if not turn.is_stored:
            return
        try:
            await self._store.delete_response(turn.tenant.tenant_id, turn.response_id, self._clock())
        except PensieveError as error:
            logger.warning("response %s stays in progress until its lease is over: %s", turn.response_id, error.message)

    async def _give_up_begun(self, turn: _Turn, begun: asyncio.Task[StoredResponse]) -> None:
        """Whoever asked left while the turn was being recorded, and that comes to its end all the same."""
        with contextlib.suppress(PensieveError):
            await begun
            await self._give_up(turn, None)

    def _end(self, turn: _Turn, ended: bool) -> None:
        """The request is over; a turn that did not end is given up, after this. May be called again."""
        was_running = self._running.pop(turn.response_id, None) is not None
        if was_running and not ended:
            self._later(self._give_up(turn, None))

    # -- the store -----------------------------------------------------------------------------------------------------

    @property
    def _is_open(self) -> bool:
        return self._opening is not None and self._opening.done()

    async def _opened(self) -> ConversationStore:
        """Opens it first where that is still to be done. Whoever comes meanwhile waits for the same attempt; the next one is
        made for whoever comes after it failed."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        await asyncio.shield(self._opening)
        return self._store

    async def _open(self) -> None:
        try:
            await self._store.open(self._clock())
        except BaseException:
            self._opening = None
            raise
        self._later(self._repeat(self._renew_leases, RENEWAL_S))
        self._later(self._repeat(self._look_for_room, ROOM_S))
        if self._retention_days is not None:
            logger.info(
                "what was last used more than %g days ago is deleted from the conversation store, from %d s from now on "
                "(retention_days)",
                *(self._retention_days, FIRST_SWEEP_S),
            )
            self._later(self._repeat(self._forget_what_is_old, SWEEP_S, FIRST_SWEEP_S))

    async def _repeat(self, work: Callable[[], Awaitable[None]], period_s: float, first_s: float = 0.0) -> None:
        """In a task of its own for each kind of work: leases do not wait for a large clean-up."""
        await asyncio.sleep(first_s)
        while True:
            try:
                await work()
            except StoreError as error:
                logger.warning("%s: %s", work.__name__, error.message)
            except Exception:
                logger.exception("%s", work.__name__)  # and again, after the pause
            await asyncio.sleep(period_s)

    async def _renew_leases(self) -> None:
        """Also stops the turns that were cancelled elsewhere."""
        running = list(self._running)
        alive = await self._store.renew_leases(self._owner, self._clock(), LEASE_S, running)
        for response_id in set(running) - alive:
            if response_id in self._running:
                self._running[response_id].stop()

    async def _forget_what_is_old(self) -> None:
        assert self._retention_days is not None
        num_deleted = await self._store.delete_older_than(self._clock() - self._retention_days * DAY_S)
        logger.info("%d responses and conversations older than the retention were deleted", num_deleted)

    async def _look_for_room(self) -> None:
        """Says once that the disk is nearly full, and /ready says it as long as it is."""
        bytes_left, kept_free = self._store.bytes_left(), self._store.min_free_bytes
        warning = ""
        if bytes_left is not None and bytes_left < ROOM_WARNING * kept_free:
            warning = "the disk of the conversation store is nearly full"
            if not self._room_warning:
                logger.warning(
                    "%s: %d MiB are left, and with less than %d MiB (store_min_free_bytes) no new turn is stored. Make room, "
                    "or lower retention_days or max_stored_bytes",
                    *(warning, bytes_left // 2**20, kept_free // 2**20),
                )
        self._room_warning = warning

    def _later(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # nobody else holds it
        task.add_done_callback(self._tasks.discard)

    def _new_item_id(self) -> str:
        return self._store.new_id("msg")


CANCELLED = ErrorItem.of(ResponseCancelledError())


def response_of(stored: StoredResponse) -> ResponseJson:
    """A stored response as its client saw it."""
    base: ResponseJson = dict(stored.params) | {"instructions": stored.instructions}
    if stored.status is Status.IN_PROGRESS:
        return base
    if stored.status is Status.CANCELLED:
        return cancelled(base)
    if stored.status is Status.FAILED:
        return base | {"status": "failed", "error": stored.error}
    if stored.incomplete_reason == INTERRUPTED:
        return interrupted(base)
    details = None if stored.incomplete_reason is None else {"reason": stored.incomplete_reason}
    output = [item.body for item in stored.output]
    return base | {
        "status": stored.status.value,
        "output": output,
        "usage": stored.usage,
        "incomplete_details": details,
    }


def _new_items(items: Sequence[Item]) -> list[NewItem]:
    return [NewItem(item["role"], item, item["id"]) for item in items]


def _num_bytes(new_items: Sequence[NewItem], metadata: Mapping[str, str] | None = None) -> int:
    """What they are as JSON, which is how they are stored."""
    return len(json.dumps([metadata, *(dict(item.body) for item in new_items)]))


def _list(page: Page) -> dict[str, Any]:
    return list_object([dict(item.body) for item in page.items], has_more=page.has_more)


def _conversation(stored: StoredConversation) -> dict[str, Any]:
    return conversation_object(stored.id, int(stored.created_at), stored.metadata)
